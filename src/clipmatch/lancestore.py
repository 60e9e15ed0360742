"""The truth of a very large photo index: Lance tables in a folder or on object storage, read and written by LanceDB.

In and out: as `Store` of store.py, whose methods say what each does; a `PhotoStore`. Here is only what differs:

- Many processes and machines may write at once: each commit is a version of the table, a writer that comes second tries
  again, and a photograph's number follows from its path, so what is written twice is there once. Only in a folder one
  update at a time is let in.
- A handle sees the version that it has until it asks for the latest; here every question does, but for those within
  `snapshot`, which are all of one version.
- The row of a photograph lies beside it, so that a search with a filter is one question. While the index changes over
  to another model, its rows by content wait in a table of their own.
- Lance finds neighbours itself (`LanceCollection`) from `approximate.LEAST` photographs on; below, the rows are copied
  into the cache folder and compared there, as those of an SQLite file are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from lancedb.index import FTS, BTree, IvfRq
from lancedb.query import ColumnOrdering, MatchQuery
from numpy.typing import NDArray

from clipmatch import approximate
from clipmatch.errors import ClipmatchError, Failure, newer
from clipmatch.lancerows import (
    CONCEPTS,
    FAILURES,
    FORMAT,
    MODEL,
    NEEDS,
    PHOTO,
    ROOTS,
    SMALL,
    STAGED,
    TOKEN,
    VERSION,
    among,
    below,
    condition_of,
    number_of,
    path_of,
    photo_of,
    photos_schema,
    photos_table,
    rows_in,
    staged_schema,
    text_of,
)
from clipmatch.lancetables import PART, LanceTables, in_parts, reading_errors
from clipmatch.photo import Photo, Stamp
from clipmatch.runtime import cache_folder
from clipmatch.sanity import check_concept, check_failure, check_path, making_sense, require
from clipmatch.store import Filter, ModelName, Root
from clipmatch.storefile import one_writer
from clipmatch.teaching import Concept

if TYPE_CHECKING:
    from clipmatch.calibration import Calibration
    from clipmatch.collection import Collection

TRIES = 3  # numbers that a photograph may have, if others have the first
KEPT = timedelta(minutes=10)  # for which a version stays that someone may be reading


class LanceStore:
    """One index. `LanceStore.open` makes or opens it; close it, or use it in a `with` statement."""

    unchanging = False  # each question sees the latest version

    def __init__(self, tables: LanceTables):
        self.path, self.tables = tables.path, tables

    @classmethod
    def open(cls, path: Path | str, create: bool = False) -> LanceStore:
        """The store in a folder or at an address. Raises ClipmatchError as `open_store` says."""
        if not create and isinstance(path, Path) and not path.is_dir():
            raise no_index(path)
        tables = LanceTables(path)
        names = tables.names()
        if "roots" not in names:
            if names:
                raise ClipmatchError(f"{path} is a database of something else, no index; name another place.")
            if not create:
                raise no_index(path)
            for name in reversed(SMALL):  # by "roots", the last, an index is known
                tables.create(name, SMALL[name])
        about = tables.about("roots")
        if FORMAT.encode() not in about:
            raise ClipmatchError(f"{path} is a database of something else, no index; name another place.")
        with making_sense(path):
            version = int(about[FORMAT.encode()])
        if version > int(VERSION):
            raise newer(f"The index {path}", about.get(NEEDS.encode(), b"").decode(errors="replace"))
        tables.table("roots")  # or it is refused
        return cls(tables)

    def __enter__(self) -> LanceStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the tables."""
        self.tables.close()

    # Who writes, and what is read

    @contextmanager
    def writer(self, wait: bool = True) -> Iterator[None]:
        """As `Store.writer` in a folder; on object storage several may write."""
        if isinstance(self.path, str):
            yield
            return
        with one_writer(self.path, wait):
            yield

    def snapshot(self) -> AbstractContextManager[None]:
        """All that is read within is of one version, whatever is written meanwhile."""
        return self.tables.snapshot()

    # What it is about

    @property
    def _about(self) -> dict[bytes, bytes]:
        photos = self.tables.table("photos")
        return {} if photos is None else photos.schema.metadata or {}

    @property
    def model(self) -> ModelName | None:
        """The model that it is bound to; None while it is empty."""
        value = self._about.get(MODEL.encode())
        with making_sense(self.path):
            return ModelName.of_json(value) if value else None

    @property
    def content(self) -> str:
        """A token that every write changes; "" for an empty store."""
        photos = self.tables.table("photos")
        if photos is None:
            return ""
        with making_sense(self.path):
            return f"{photos.schema.metadata[TOKEN.encode()].decode()}-{photos.version}"

    def bind(self, model: ModelName) -> None:
        """Take the rows of `model` from now on: those that were stored for it, by content, are put in their places."""
        bound = self.model
        if bound == model:
            return
        with reading_errors(self.path):
            if bound is None:
                self.tables.create("photos", photos_schema(model))
            elif bound.fingerprint == model.fingerprint:
                self.tables.table("photos").to_lance().update_schema_metadata({MODEL: json.dumps(vars(model))})
                self.tables.reopen("photos")
                return
            else:
                with making_sense(self.path):
                    self._check_staged(model)
                schema = photos_schema(model)
                changed = pa.RecordBatchReader.from_batches(schema, self._changed(model.fingerprint, schema))
                self.tables.create("photos", schema, changed, replace=True)
                self.tables.remove(STAGED)
            self._make_indexes()

    def _check_staged(self, model: ModelName) -> None:
        """Raise ValueError if the rows by the model to come are of another length than its own."""
        staged = self._staged_for(model.fingerprint)
        same = staged is None or staged.schema.field("vector").type.list_size == model.dim
        require(same, "a vector is of another length")

    def _changed(self, model: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All photographs with their rows by the model to come; those without one are left out."""
        for batch in self.tables.table("photos").search().limit(None).to_batches(PART):
            rows = self._staged(model, set(batch["digest"].to_pylist()))
            kept = batch.filter(pa.array([digest in rows for digest in batch["digest"].to_pylist()], pa.bool_()))
            vectors = [rows[digest] for digest in kept["digest"].to_pylist()]
            columns = {name: kept[name] for name in schema.names if name != "vector"}
            columns["vector"] = pa.array(vectors, schema.field("vector").type)
            yield pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)

    def _make_indexes(self) -> None:
        """What finds photographs by number, content, folder and words, unless it is there."""
        photos = self.tables.table("photos")
        there = {column for index in photos.list_indices() for column in index.columns}
        for column in ("id", "digest", "path"):
            if column not in there:
                photos.create_index(column, config=BTree())
        if "words" not in there:
            photos.create_index("words", config=FTS(stem=False, remove_stop_words=False))

    # Folders

    def roots(self) -> list[Root]:
        """The folders that it keeps up with."""
        rows = self.tables.rows("roots", ROOTS.names)
        with making_sense(self.path):
            found = [Root(path_of(row["path"]), tuple(row["exclude"]), row["follow_links"]) for row in rows]
        return sorted(found, key=lambda root: os.fsencode(root.path))

    def add_root(self, root: Root) -> None:
        """Remember a folder, or how it is walked from now on."""
        if root not in self.roots():
            row = {"path": text_of(root.path), "exclude": list(root.exclude), "follow_links": root.follow_links}
            self.tables.merge("roots", "path", pa.Table.from_pylist([row], schema=ROOTS))

    def remove_below(self, folder: Path) -> tuple[int, int]:
        """Forget a folder, and what lies below it -> how many photographs and folders that it kept up with."""
        condition = below(folder)
        photographs = self.tables.drop("photos", condition)
        self.tables.drop("failures", condition)
        return photographs, self.tables.drop("roots", condition)

    # Photographs

    def __len__(self) -> int:
        return self.count(Filter())

    def count(self, where: Filter) -> int:
        """How many photographs pass."""
        photos = self.tables.table("photos")
        if photos is None:
            return 0
        with reading_errors(self.path):
            return int(photos.count_rows(condition_of(where) or None))

    def stamps(self, root: Path) -> tuple[dict[Path, Stamp], dict[Path, tuple[Stamp, str]]]:
        """Below a folder: the stamps of its photographs, and stamps and reasons of files that could not be used."""
        columns, condition = ("path", "size", "mtime", "sidecar"), below(root)
        known = {path_of(row["path"]): stamp_of(row) for row in self.tables.rows("photos", columns, condition)}
        return known, self.broken(condition)

    def stamps_of(self, paths: Iterable[Path]) -> tuple[dict[Path, Stamp], dict[Path, tuple[Stamp, str]]]:
        """As `stamps`, of these files."""
        listed = list(paths)
        wanted, columns = set(listed), ("path", "size", "mtime", "sidecar")
        tried = [number_of(path) + more for path in listed for more in range(TRIES)]
        rows = [(path_of(row["path"]), stamp_of(row)) for row in self.tables.found("id", tried, columns)]
        broken: dict[Path, tuple[Stamp, str]] = {}
        for part in in_parts(map(text_of, listed)):
            broken |= self.broken(among("path", part))
        return {path: stamp for path, stamp in rows if path in wanted}, broken

    def with_content(self, digests: Iterable[str]) -> dict[str, Photo]:
        """A photograph of each content that has one."""
        with making_sense(self.path):
            return {row["digest"]: photo_of(row) for row in self.tables.found("digest", digests, PHOTO)}

    def not_embedded(self, model: str) -> list[Photo]:
        """A photograph of each content that has no row by the model with that fingerprint."""
        bound = self.model
        if bound is None or bound.fingerprint == model:
            return []
        found = {photo.digest: photo for _, photo in self.photos()}
        there = self.embedded(model, found)
        return [photo for digest, photo in found.items() if digest not in there]

    def embedded(self, model: str, digests: Iterable[str]) -> set[str]:
        """Those contents that have a row by the model with that fingerprint."""
        bound = self.model
        if bound is not None and bound.fingerprint == model:
            return {row["digest"] for row in self.tables.found("digest", digests, ["digest"])}
        return set(self._staged(model, digests))

    def vector(self, digest: str) -> NDArray[np.float32] | None:
        """The unit row [d] of a content; None if there is none."""
        return self._vectors("digest", [digest]).get(digest)

    def _vectors(self, key: str, values: Iterable[Any], name: str = "photos") -> dict[Any, NDArray[np.float32]]:
        """By the values of a column, those that are there: the unit rows [d] beside them."""
        found: dict[Any, NDArray[np.float32]] = {}
        for part in in_parts(values):
            rows = self.tables.read(name, (key, "vector"), among(key, part))
            if len(rows):
                with making_sense(self.path):
                    found.update(zip(rows[key].to_pylist(), rows_in(rows["vector"]), strict=True))
        return found

    def _staged(self, model: str, digests: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """Rows by content of a model that the index is changing over to."""
        return {} if self._staged_for(model) is None else self._vectors("digest", digests, STAGED)

    def _staged_for(self, model: str) -> Any:
        """The table of rows by a model that the index is changing over to; None if there is none, or of another one."""
        table = self.tables.table(STAGED)
        return None if table is None or table.schema.metadata[MODEL.encode()] != model.encode() else table

    def upsert(
        self,
        photos: Sequence[Photo],
        model: str,
        rows: Mapping[str, NDArray[np.float32]],
        failures: Mapping[Path, tuple[Stamp, str]],
    ) -> None:
        """Store photographs, rows by content (of contents that are new), and files that could not be used."""
        bound = self.model
        if bound is None or bound.fingerprint != model:
            self._stage(model, rows)
        elif photos:
            numbers = self._numbers_for([photo.path for photo in photos])
            vectors = {**rows, **self._vectors("digest", {photo.digest for photo in photos} - rows.keys())}
            schema = self.tables.table("photos").schema
            self.tables.merge("photos", "id", photos_table(photos, numbers, vectors, schema))
        self._forget_failures(photo.path for photo in photos)
        if failures:
            self._forget_photos(failures)
            listed = [
                {"path": text_of(path), **vars(stamp), "reason": reason} for path, (stamp, reason) in failures.items()
            ]
            self.tables.merge("failures", "path", pa.Table.from_pylist(listed, schema=FAILURES))

    def _stage(self, model: str, rows: Mapping[str, NDArray[np.float32]]) -> None:
        if not rows:
            return
        schema = staged_schema(model, len(next(iter(rows.values()))))
        if self._staged_for(model) is None:
            self.tables.remove(STAGED)  # an earlier change, to yet another model, was given up
            self.tables.create(STAGED, schema)
        vectors = pa.array([row.astype(np.float32) for row in rows.values()], schema.field("vector").type)
        self.tables.merge(STAGED, "digest", pa.table([list(rows), vectors], schema=schema))

    def delete(self, paths: Iterable[Path]) -> None:
        """Forget files."""
        listed = list(paths)
        self._forget_photos(listed)
        self._forget_failures(listed)

    def _forget_photos(self, paths: Iterable[Path]) -> None:
        for part in in_parts(self.numbers_of(paths).values()):
            self.tables.drop("photos", among("id", part))

    def _forget_failures(self, paths: Iterable[Path]) -> None:
        for part in in_parts(map(text_of, paths)):
            self.tables.drop("failures", among("path", part))

    def photos(self) -> Iterator[tuple[int, Photo]]:
        """Each photograph, with its number, in no order."""
        table = self.tables.table("photos")
        if table is None:
            return
        with reading_errors(self.path):
            for batch in table.search().select(["id", *PHOTO]).limit(None).to_batches(PART):
                with making_sense(self.path):
                    found = [(row["id"], photo_of(row)) for row in batch.to_pylist()]
                yield from found

    def photo(self, number: int) -> Photo:
        """The photograph with a number. Raises KeyError if it is gone."""
        return self.photos_of([number])[0]

    def photos_of(self, numbers: Iterable[int]) -> list[Photo]:
        """The photographs with these numbers, in their order. Raises KeyError if one is gone."""
        listed = [int(number) for number in numbers]
        with making_sense(self.path):
            found = {row["id"]: photo_of(row) for row in self.tables.found("id", set(listed), ("id", *PHOTO))}
        return [found[number] for number in listed]

    # Numbers

    def number(self, path: Path) -> int | None:
        """The number of the photograph in a file; None if it is not in the index."""
        return self.numbers_of([path]).get(path)

    def numbers_of(self, paths: Iterable[Path]) -> dict[Path, int]:
        """The numbers of the photographs in these files, of those that are there."""
        listed = list(paths)
        taken = self._taken(listed)
        wanted = set(listed)
        return {path: number for number, path in taken.items() if path in wanted}

    def _taken(self, paths: Iterable[Path]) -> dict[int, Path]:
        """Of the numbers that files could have, those that some have, by whom."""
        tried = [number_of(path) + more for path in paths for more in range(TRIES)]
        return {row["id"]: path_of(row["path"]) for row in self.tables.found("id", tried, ("id", "path"))}

    def _numbers_for(self, paths: Sequence[Path]) -> list[int]:
        """Of each file the number that it has; of a new one the first that is free from the hash of its path on."""
        taken = self._taken(paths)
        own = {path: number for number, path in taken.items()}
        for path in paths:
            if path not in own:
                own[path] = next(n for n in range(number_of(path), number_of(path) + 1000) if n not in taken)
                taken[own[path]] = path
        return [own[path] for path in paths]

    def newest(self, where: Filter, most: int, skip: int = 0) -> list[int]:
        """The numbers of photographs that pass, the newest first: by when they were taken, else by their files' age."""
        photos = self.tables.table("photos")
        if photos is None:
            return []
        order = [ColumnOrdering(column_name=name, ascending=False) for name in ("moment", "id")]
        with reading_errors(self.path):
            question = photos.search().select(["id", "moment"]).order_by(order).limit(most).offset(skip)
            if condition := condition_of(where):
                question = question.where(condition)
            numbers: list[int] = question.to_arrow()["id"].to_pylist()
        return numbers

    def numbers(self, where: Filter) -> NDArray[np.int64]:
        """The numbers of the photographs that pass, rising."""
        found = self.tables.read("photos", ["id"], condition_of(where))["id"]
        return np.sort(found.to_numpy().astype(np.int64))

    # Numbers of photographs -> what is known of them

    def hashes(self, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The picture hashes [n] of photographs, by their numbers."""
        rows = self.tables.found("id", numbers.tolist(), ("id", "picture_hash"))
        known = {row["id"]: row["picture_hash"] for row in rows}
        return np.array([known.get(number, 0) for number in numbers.tolist()], np.uint64)

    def vectors(self) -> tuple[str, NDArray[np.int64], NDArray[np.float32]]:
        """The content token, and numbers [n] (rising) and unit rows [n, d] of all photographs, of one version."""
        model = self.model
        with self.snapshot():
            if model is None:
                return self.content, np.empty(0, np.int64), np.empty((0, 0), np.float32)
            return self.content, *self.rows_where("")

    def rows_where(self, condition: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Numbers [n] (rising) and unit rows [n, d] of the photographs that fulfil a condition."""
        return self._numbered(self.tables.read("photos", ("id", "vector"), condition))

    def _numbered(self, found: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        with making_sense(self.path):
            return rows_by_number(found)

    def rows_at(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The same of those at some places in the table."""
        with reading_errors(self.path):
            question = self.tables.table("photos").take_offsets(places.tolist()).select(["id", "vector"])
            return self._numbered(question.to_arrow())

    def nearest(
        self, row: NDArray[np.float32], most: int, condition: str, probes: int | None, refine: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Numbers [n] (rising) and unit rows [n, d] of about `most` photographs that are probably nearest to a row [d].

        probes: parts of the index that are looked into; 0: as many as it takes; None: it is not used, every row is
        compared. refine: times as many are compared exactly.
        """
        with reading_errors(self.path):
            question = self.tables.table("photos").search(row).distance_type("dot").limit(most)
            if probes is None:
                question = question.bypass_vector_index()
            elif probes:
                question = question.nprobes(probes).refine_factor(refine)
            else:
                question = question.maximum_nprobes(0).refine_factor(refine)
            if condition:
                question = question.where(condition, prefilter=True)
            return self._numbered(question.select(["id", "vector", "_distance"]).to_arrow())

    def named(self, text: str, most: int) -> list[int]:
        """The numbers of photographs whose name or caption has words of `text`, best first (BM25)."""
        words, photos = re.findall(r"\w+", text), self.tables.table("photos")
        if not words or photos is None:
            return []
        with reading_errors(self.path):
            question = photos.search(MatchQuery(" ".join(words), "words"), query_type="fts").limit(most)
            numbers: list[int] = question.select(["id", "_score"]).to_arrow()["id"].to_pylist()
        return numbers

    def rows_of(self, paths: Iterable[Path]) -> dict[Path, NDArray[np.float32]]:
        """The unit rows [d] of photographs, by their paths; of those that are there."""
        known = {number: path for path, number in self.numbers_of(paths).items()}
        return {known[number]: row for number, row in self._vectors("id", known).items()}

    def tally(self) -> dict[str, Any]:
        """How many photographs, bytes and captions there are, and how many of each year, camera and file format."""
        if self.tables.table("photos") is None:
            return {"photos": 0, "bytes": 0, "captions": 0, "years": [], "cameras": [], "formats": []}
        photos, size, captions = self.tables.sql("photos", "SELECT count(*), sum(size), count(caption) FROM dataset")[0]
        count = "SELECT {0}, count(*) FROM dataset WHERE {0} IS NOT NULL GROUP BY 1 ORDER BY {1}"
        return {
            "photos": photos,
            "bytes": int(size or 0),
            "captions": captions,
            "years": self.tables.sql("photos", count.format("substr(CAST(taken AS string), 1, 4)", "1")),
            "cameras": self.tables.sql("photos", count.format("camera", "2 DESC, 1")),
            "formats": self.tables.sql("photos", count.format("form", "2 DESC, 1")),
        }

    # Concepts

    def concepts(self) -> dict[str, tuple[str, Concept]]:
        """By name, in the order of names: the fingerprint of the model that each was taught to, and the concept."""
        found, bound = {}, self.model
        for row in sorted(self.tables.rows("concepts", CONCEPTS.names), key=lambda row: str(row["key"])):
            with making_sense(self.path):
                examples, others = (tuple(map(path_of, row[name])) for name in ("examples", "others"))
                concept = Concept(row["name"], np.array(row["row"], np.float32), examples, others, row["precision"])
                width = bound.dim if bound and bound.fingerprint == row["model"] else None
                found[row["name"]] = check_concept(row["model"], concept, width)
        return found

    def keep_concept(self, model: str, concept: Concept) -> None:
        """Store a concept, in the place of one of that name."""
        row = {
            "key": concept.name.casefold(),
            "name": concept.name,
            "model": model,
            "row": concept.row.astype(np.float32).tolist(),
            "examples": [text_of(path) for path in concept.examples],
            "others": [text_of(path) for path in concept.others],
            "precision": concept.precision,
        }
        self.tables.merge("concepts", "key", pa.Table.from_pylist([row], schema=CONCEPTS))

    def rename_concept(self, old: str, new: str) -> bool:
        """Give a concept another name -> whether there is one. Raises ClipmatchError if the new name is taken."""
        known = {row["key"]: row for row in self.tables.rows("concepts", CONCEPTS.names)}
        taken = known.get(new.casefold())
        if taken and old.casefold() != new.casefold():
            raise ClipmatchError(
                f"There is a concept @{taken['name']} already; remove it first, or choose another name."
            )
        if old.casefold() not in known:
            return False
        row = {**known[old.casefold()], "key": new.casefold(), "name": new}
        self.tables.merge("concepts", "key", pa.Table.from_pylist([row], schema=CONCEPTS))
        if old.casefold() != new.casefold():
            self.forget_concept(old)
        return True

    def forget_concept(self, name: str) -> bool:
        """Remove a concept -> whether there was one."""
        return self.tables.drop("concepts", among("key", [name.casefold()])) > 0

    # Files that could not be used

    def broken(self, condition: str = "") -> dict[Path, tuple[Stamp, str]]:
        """By path: their stamps, and the reasons."""
        rows = sorted(self.tables.rows("failures", FAILURES.names, condition), key=lambda row: str(row["path"]))
        with making_sense(self.path):
            return {check_path(path_of(row["path"])): check_failure(stamp_of(row), row["reason"]) for row in rows}

    def failures(self) -> list[Failure]:
        """The same, for people."""
        return [Failure(path, reason) for path, (_, reason) in self.broken().items()]

    # What makes searches quick

    @property
    def derived(self) -> Path:
        """The name beside which the files lie that are derived of it: in the cache folder."""
        name = hashlib.blake2b(str(self.path).encode(errors="surrogateescape"), digest_size=12).hexdigest()
        folder = cache_folder() / "indexes"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"lance-{name}"

    def paths_where(self, name: str, condition: str) -> Iterator[Path]:
        """The paths in a table that fulfil a condition."""
        table = self.tables.table(name)
        if table is not None:
            with reading_errors(self.path):
                for batch in table.search().select(["path"]).where(condition).limit(None).to_batches(PART):
                    with making_sense(self.path):
                        found = list(map(path_of, batch["path"].to_pylist()))
                    yield from found

    def tidy(self) -> None:
        """After an update: indexes of the new rows, small files made large ones, and old versions removed.

        Also what `bind` has left to do where it was killed.
        """
        photos, bound = self.tables.table("photos"), self.model
        if photos is None or bound is None:
            return
        with reading_errors(self.path):
            if self._staged_for(bound.fingerprint) is not None:
                self.tables.remove(STAGED)
            self._make_indexes()
            indexes = photos.list_indices()
            if len(self) >= approximate.LEAST and not any(index.columns == ["vector"] for index in indexes):
                photos.create_index("vector", config=IvfRq(distance_type="dot"))
            unindexed = any(index.num_unindexed_rows for index in indexes)
            for name in ("photos", *SMALL):
                table = self.tables.table(name)
                if unindexed or len(table.list_versions()) > 1:  # deletions leave some, too
                    table.optimize(cleanup_older_than=KEPT)

    def collection(self, calibration: Calibration | None) -> Collection | None:
        """The search of its own, for very many photographs."""
        if len(self) < approximate.LEAST:
            return None
        from clipmatch.lancesearch import LanceCollection

        return LanceCollection(self, calibration)


def rows_by_number(found: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Columns `id` and `vector` -> numbers [n], rising, and rows [n, d]."""
    numbers = found["id"].to_numpy().astype(np.int64)
    order = np.argsort(numbers)
    return numbers[order], np.ascontiguousarray(rows_in(found["vector"])[order])


def stamp_of(row: Mapping[str, Any]) -> Stamp:
    """The stamp in a row of a table."""
    return Stamp(row["size"], row["mtime"], row["sidecar"])


def no_index(path: Path | str) -> ClipmatchError:
    """The error for a place without an index."""
    return ClipmatchError(f"There is no index {path}; make it with: clipmatch index DIR --store {path}")
