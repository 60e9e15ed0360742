"""The truth of a photo index: one SQLite file with a row for each photograph and a vector for each content.

In: photographs with their vectors; paths that are gone; a `Filter`; concepts. Out: photographs, their vectors, the
words of their names and captions; concepts. Knows nothing of models, of folders on disk, or of ranking. Shapes: n
photographs, d numbers a row.

SQLite because it survives `kill -9` and power cuts, lets many read while one writes (write-ahead log), and is already
there. A vector belongs to (model, content), so a moved file keeps its own, copies share one, and a second model can be
filled in while the first still answers. Whatever is derived from this file (vectors.py) can be lost.

A file that can't be written is read.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sqlite3
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipmatch.config import MAX_DIM
from clipmatch.errors import ClipmatchError, Failure, unwritable
from clipmatch.photo import Metadata, Photo, Stamp
from clipmatch.sanity import (
    check_concept,
    check_failure,
    check_labels,
    check_path,
    check_photo,
    check_rows,
    check_stamp,
    making_sense,
    require,
)
from clipmatch.storefile import all_or_nothing, empty_log, one_writer, open_file, reading_errors
from clipmatch.teaching import Concept

if TYPE_CHECKING:
    from clipmatch.calibration import Calibration
    from clipmatch.embedder import Embedder
    from clipmatch.storage import PhotoStore

MOST = (1 << 63) - 1  # that SQLite can hold
MOMENT = "coalesce(taken, strftime('%Y-%m-%dT%H:%M:%S', mtime / 1000000000, 'unixepoch', 'localtime'))"


@dataclass(frozen=True)
class ModelName:
    """The model that filled an index. name: how to load it, None for the one that comes with clipmatch."""

    fingerprint: str
    dim: int
    name: str | None = None

    @classmethod
    def of_json(cls, text: str | bytes) -> ModelName:
        """What an index says of it. Raises ValueError and its like for what makes no sense."""
        found = cls(**json.loads(text))
        require(isinstance(found.fingerprint, str) and isinstance(found.name, str | None), "its model is none")
        require(isinstance(found.dim, int) and 0 < found.dim <= MAX_DIM, f"vectors of {found.dim!r} numbers")
        return found


@dataclass(frozen=True)
class Root:
    """A folder that the index keeps up with, and how it is walked."""

    path: Path
    exclude: tuple[str, ...] = ()
    follow_links: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for what an index may say, but no folder is."""
        check_path(self.path)
        require(all(isinstance(name, str) for name in self.exclude), "a pattern is no text")


@dataclass(frozen=True)
class Filter:
    """Which photographs take part. None and False: no matter.

    folders: with their subfolders, absolute, or files; any of them. after, before: of the time in the EXIF data,
    `before` itself left out. camera: a part of its name, in any case. min_side: pixels of the shorter side. min_size:
    bytes of the file. box: south, west, north, east in degrees; a box over the date line has its west east of its east.
    """

    folders: tuple[Path, ...] = ()
    after: datetime | None = None
    before: datetime | None = None
    camera: str | None = None
    min_side: int | None = None
    min_size: int | None = None
    has_caption: bool = False
    box: tuple[float, float, float, float] | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) not in (None, False, ()) for field in fields(self))

    def sql(self) -> tuple[str, list[Any]]:
        """A condition over `photos` that says all but the folders, and its values."""
        parts: list[tuple[str, list[Any]]] = []
        if self.after:
            parts.append(("taken >= ?", [self.after.isoformat()]))
        if self.before:
            parts.append(("taken < ?", [self.before.isoformat()]))
        if self.camera:
            parts.append(("instr(lower(camera), lower(?))", [self.camera.encode("utf-8", "replace").decode()]))
        if self.min_side:
            parts.append(("min(width, height) >= ?", [min(self.min_side, MOST)]))
        if self.min_size:
            parts.append(("size >= ?", [min(self.min_size, MOST)]))
        if self.has_caption:
            parts.append(("caption IS NOT NULL", []))
        if self.box:
            south, west, north, east = self.box
            over = "longitude BETWEEN ? AND ?" if west <= east else "(longitude >= ? OR longitude <= ?)"
            parts.append((f"latitude BETWEEN ? AND ? AND {over}", [south, north, west, east]))
        return " AND ".join(text for text, _ in parts) or "1", [value for _, values in parts for value in values]


def below(folder: Path) -> tuple[str, list[Any]]:
    """The condition that a path is the folder's own or lies below it."""
    start = os.fsencode(os.path.abspath(folder))  # noqa: PTH100 - a link stays a link
    inside = start.rstrip(os.fsencode(os.sep)) + os.fsencode(os.sep)
    return "(path = ? OR (path >= ? AND path < ?))", [start, inside, inside[:-1] + bytes([inside[-1] + 1])]


class Store:
    """One index file. `Store.open` makes or opens it; close it, or use it in a `with` statement."""

    def __init__(self, path: Path, connection: sqlite3.Connection, obstacle: OSError | None = None):
        self.path = path
        self._db, self._obstacle = connection, obstacle
        self._updating = False

    @classmethod
    def open(cls, path: str | Path, create: bool = False) -> Store:
        """The store in a file, brought to today's version.

        Raises ClipmatchError when there is none (unless `create`), it is damaged, or from a newer clipmatch.
        """
        path = Path(path).expanduser().absolute()
        if not create and not path.is_file():
            raise ClipmatchError(f"There is no index {path}; make it with: clipmatch index DIR")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClipmatchError(f"The folder {path.parent} can't be made ({error.strerror}).") from error
        return cls(path, *open_file(path))

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    # Who writes

    @contextmanager
    def writer(self, wait: bool = True) -> Iterator[None]:
        """For as long as an update lasts: one process at a time.

        A second one waits, and says so; without `wait` it raises ClipmatchError. The lock goes with its process.
        """
        with one_writer(self.path, wait):
            self._updating = True
            try:
                yield
            finally:
                self._updating = False
                empty_log(self._db)

    @contextmanager
    def writing(self, photographs: bool = True) -> Iterator[None]:
        """One transaction: all of it is stored, or nothing. What is derived of `photographs` is stale afterwards."""
        if self._obstacle:
            raise unwritable(f"The index {self.path}", self._obstacle)
        with reading_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            with all_or_nothing(self._db):
                yield
                if photographs:
                    self._set("content", os.urandom(16).hex())
        if not self._updating:
            empty_log(self._db)

    # What it is about

    @property
    def unchanging(self) -> bool:
        """Whether it is read as a file that nobody changes, since nothing can be written there: not what others do."""
        return self._obstacle is not None

    @property
    def model(self) -> ModelName | None:
        """The model that it is bound to; None while it is empty."""
        value = self._get("model")
        with making_sense(self.path):
            return ModelName.of_json(value) if value else None

    def bind(self, model: ModelName) -> None:
        """Take the vectors of `model` from now on, and drop those of any other."""
        with self.writing():
            self._set("model", json.dumps(vars(model)))
            self._db.execute("DELETE FROM vectors WHERE model != ?", (model.fingerprint,))
            self._db.execute(
                "DELETE FROM photos WHERE NOT EXISTS"
                " (SELECT 1 FROM vectors v WHERE v.model = ? AND v.digest = photos.digest)",
                (model.fingerprint,),
            )

    @property
    def content(self) -> str:
        """A token that every write changes; "" for an empty store."""
        return self._get("content") or ""

    def roots(self) -> list[Root]:
        """The folders that it keeps up with."""
        rows = list(self._read("SELECT path, exclude, follow_links FROM roots ORDER BY path"))
        with making_sense(self.path):
            return [Root(Path(os.fsdecode(path)), tuple(json.loads(names)), bool(links)) for path, names, links in rows]

    def add_root(self, root: Root) -> None:
        """Remember a folder, or how it is walked from now on."""
        if root in self.roots():
            return
        with self.writing():
            self._db.execute(
                "INSERT OR REPLACE INTO roots VALUES (?, ?, ?)",
                (os.fsencode(root.path), json.dumps(root.exclude), root.follow_links),
            )

    def remove_below(self, folder: Path) -> tuple[int, int]:
        """Forget a folder, what lies below it, and the folders kept up with there -> how many photographs and folders
        were forgotten.
        """
        condition, values = below(folder)
        with self.writing():
            count = {}
            for table in ("photos", "failures", "roots"):
                count[table] = self._db.execute(f"DELETE FROM {table} WHERE {condition}", values).rowcount
            self._db.execute("DELETE FROM vectors WHERE digest NOT IN (SELECT digest FROM photos)")
        return count["photos"], count["roots"]

    # Photographs

    def __len__(self) -> int:
        return int(next(self._read("SELECT count(*) FROM photos"))[0])

    def stamps(self, root: Path) -> tuple[dict[Path, Stamp], dict[Path, tuple[Stamp, str]]]:
        """Below a folder: the stamps of its photographs, and stamps and reasons of files that could not be used."""
        condition, values = below(root)
        good = list(self._read(f"SELECT path, size, mtime, sidecar FROM photos WHERE {condition}", values))
        with making_sense(self.path):
            known = {Path(os.fsdecode(path)): check_stamp(Stamp(*stamp)) for path, *stamp in good}
        return known, self.broken(condition, values)

    def stamps_of(self, paths: Iterable[Path]) -> tuple[dict[Path, Stamp], dict[Path, tuple[Stamp, str]]]:
        """As `stamps`, of these files."""
        wanted = set(paths)
        known = {photo.path: photo.stamp for photo in self.photos_of(self.numbers_of(wanted).values())}
        broken = self.broken() if wanted else {}
        return known, {path: found for path, found in broken.items() if path in wanted}

    def with_content(self, digests: Iterable[str]) -> dict[str, Photo]:
        """A photograph of each content that has one."""
        found = {}
        for digest in digests:
            if row := next(
                self._read(f"SELECT {COLUMNS} FROM photos WHERE digest = ?", (bytes.fromhex(digest),)), None
            ):
                found[digest] = photo_of(row)
        return found

    def not_embedded(self, model: str) -> list[Photo]:
        """A photograph of each content that has no vector by the model with that fingerprint."""
        rows = self._read(
            f"SELECT {COLUMNS} FROM photos p WHERE NOT EXISTS"
            " (SELECT 1 FROM vectors v WHERE v.model = ? AND v.digest = p.digest) GROUP BY digest ORDER BY id",
            (model,),
        )
        return [photo_of(row) for row in rows]

    def embedded(self, model: str, digests: Iterable[str]) -> set[str]:
        """Those contents that have a vector by the model with that fingerprint."""
        question = "SELECT 1 FROM vectors WHERE model = ? AND digest = ?"
        return {digest for digest in digests if any(self._read(question, (model, bytes.fromhex(digest))))}

    def vector(self, digest: str) -> NDArray[np.float32] | None:
        """The unit row [d] of a content; None if there is none."""
        question = "SELECT row FROM vectors WHERE model = ? AND digest = ?"
        model = self.model
        found = next(self._read(question, (model.fingerprint if model else "", bytes.fromhex(digest))), None)
        return self._row(found[0], model.dim) if found and model else None

    def upsert(
        self,
        photos: Sequence[Photo],
        model: str,
        rows: Mapping[str, NDArray[np.float32]],
        failures: Mapping[Path, tuple[Stamp, str]],
    ) -> None:
        """Store photographs, vectors by content (of contents that are new), and files that could not be used."""
        marks = ", ".join("?" * 14)
        settings = ", ".join(f"{name} = excluded.{name}" for name in COLUMN_NAMES if name != "path")
        with self.writing():
            self._db.executemany(
                f"INSERT INTO photos ({COLUMNS}) VALUES ({marks}) ON CONFLICT (path) DO UPDATE SET {settings}",
                [row_of(photo) for photo in photos],
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)",
                [(model, bytes.fromhex(digest), row.astype("<f4").tobytes()) for digest, row in rows.items()],
            )
            self._db.executemany("DELETE FROM failures WHERE path = ?", [(os.fsencode(p.path),) for p in photos])
            self._delete(failures)
            self._db.executemany(
                "INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?, ?)",
                [
                    (os.fsencode(path), stamp.size, stamp.mtime, stamp.sidecar, reason)
                    for path, (stamp, reason) in failures.items()
                ],
            )

    def delete(self, paths: Iterable[Path]) -> None:
        """Forget files, and vectors that no photograph has any more."""
        with self.writing():
            self._delete(paths)
            self._db.execute("DELETE FROM vectors WHERE digest NOT IN (SELECT digest FROM photos)")

    def _delete(self, paths: Iterable[Path]) -> None:
        keys = [(os.fsencode(path),) for path in paths]
        self._db.executemany("DELETE FROM photos WHERE path = ?", keys)
        self._db.executemany("DELETE FROM failures WHERE path = ?", keys)

    def photos(self) -> Iterator[tuple[int, Photo]]:
        """Each photograph, with its number, by rising number."""
        for number, *row in self._read(f"SELECT id, {COLUMNS} FROM photos ORDER BY id"):
            yield number, photo_of(row)

    def photo(self, number: int) -> Photo:
        """The photograph with a number. Raises KeyError if it is gone."""
        row = next(self._read(f"SELECT {COLUMNS} FROM photos WHERE id = ?", (int(number),)), None)
        if row is None:
            raise KeyError(number)
        return photo_of(row)

    def photos_of(self, numbers: Iterable[int]) -> list[Photo]:
        """The photographs with these numbers, in their order. Raises KeyError if one is gone."""
        return [self.photo(number) for number in numbers]

    def number(self, path: Path) -> int | None:
        """The number of the photograph in a file; None if it is not in the index."""
        row = next(self._read("SELECT id FROM photos WHERE path = ?", (os.fsencode(path),)), None)
        return None if row is None else int(row[0])

    def numbers_of(self, paths: Iterable[Path]) -> dict[Path, int]:
        """The numbers of the photographs in these files, of those that are there."""
        return {path: number for path in paths if (number := self.number(path)) is not None}

    def newest(self, where: Filter, most: int, skip: int = 0) -> list[int]:
        """The numbers of photographs that pass, the newest first: by when they were taken, else by their files' age."""
        conditions, values = [], []
        for folder in where.folders:
            place, found = below(folder)
            conditions.append(place)
            values += found
        condition, found = where.sql()
        place = f"({' OR '.join(conditions)})" if conditions else "1"
        order = f"ORDER BY {MOMENT} DESC, id DESC LIMIT ? OFFSET ?"
        question = f"SELECT id FROM photos WHERE {place} AND {condition} {order}"
        return [number for (number,) in self._read(question, [*values, *found, most, skip])]

    def tally(self) -> dict[str, Any]:
        """How many photographs, bytes and captions there are, and how many of each year, camera and file format."""
        photos, size, captions = next(self._read("SELECT count(*), total(size), count(caption) FROM photos"))
        formats: dict[str, int] = {}
        count = "SELECT {0}, count(*) FROM photos WHERE {0} IS NOT NULL GROUP BY 1 ORDER BY {1}"
        years = list(self._read(count.format("substr(taken, 1, 4)", "1")))
        cameras = list(self._read(count.format("camera", "2 DESC, 1")))
        with making_sense(self.path), closing(self._read("SELECT name FROM photos")) as names:
            for (name,) in names:
                form = Path(name).suffix.lower().removeprefix(".")
                formats[form] = formats.get(form, 0) + 1
            return {
                "photos": photos,
                "bytes": int(size),
                "captions": captions,
                "years": check_labels(years),
                "cameras": check_labels(cameras),
                "formats": sorted(formats.items(), key=lambda pair: -pair[1]),
            }

    def count(self, where: Filter) -> int:
        """How many photographs pass."""
        return len(self.numbers(where)) if where else len(self)

    def numbers(self, where: Filter) -> NDArray[np.int64]:
        """The numbers of the photographs that pass, rising."""
        condition, values = where.sql()
        found = [np.empty(0, np.int64)]
        for place, places in [below(folder) for folder in where.folders] or [("1", [])]:
            question = f"SELECT id FROM photos WHERE {place} AND {condition}"
            found.append(np.fromiter((number for (number,) in self._read(question, places + values)), np.int64))
        return np.unique(np.concatenate(found))

    def hashes(self, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The picture hashes [n] of photographs, by their numbers."""
        question = "SELECT picture_hash FROM photos WHERE id = ?"
        found = [next(self._read(question, (number,)), None) for number in numbers.tolist()]
        with making_sense(self.path):
            return np.array([row[0] if row else 0 for row in found], np.int64).view(np.uint64)

    def vectors(self) -> tuple[str, NDArray[np.int64], NDArray[np.float32]]:
        """The content token, and numbers [n] (rising) and unit rows [n, d] of all photographs, of one moment."""
        model = self.model
        with self.snapshot():
            content, count = self.content, len(self)
            numbers = np.empty(count, np.int64)
            rows = np.empty((count, model.dim if model else 0), np.float32)
            found = self._read(
                "SELECT p.id, v.row FROM photos p JOIN vectors v ON v.model = ? AND v.digest = p.digest ORDER BY p.id",
                (model.fingerprint if model else "",),
            )
            place = 0
            with closing(found), making_sense(self.path):
                length = 4 * rows.shape[1]
                for place, (number, row) in enumerate(found, 1):
                    require(len(row) == length, "a vector is of another length")  # one number would fill its row
                    numbers[place - 1], rows[place - 1] = number, np.frombuffer(row, "<f4")
                check_rows(rows[:place])
        return content, numbers[:place], rows[:place]

    def named(self, text: str, most: int) -> list[int]:
        """The numbers of photographs whose name or caption has words of `text`, best first (BM25)."""
        words = re.findall(r"\w+", text)
        if not words:
            return []
        rows = self._read(
            "SELECT rowid FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?",
            (" OR ".join(f'"{word}"' for word in words), most),
        )
        return [number for (number,) in rows]

    def rows_of(self, paths: Iterable[Path]) -> dict[Path, NDArray[np.float32]]:
        """The unit rows [d] of photographs, by their paths; of those that are there."""
        model, found = self.model, {}
        question = "SELECT v.row FROM photos p JOIN vectors v ON v.model = ? AND v.digest = p.digest WHERE p.path = ?"
        for path in paths:
            row = next(self._read(question, (model.fingerprint if model else "", os.fsencode(path))), None)
            if row and model:
                found[path] = self._row(row[0], model.dim)
        return found

    def _row(self, data: bytes, dim: int) -> NDArray[np.float32]:
        """A stored row [d]."""
        with making_sense(self.path):
            row = np.frombuffer(data, "<f4")
            require(row.shape == (dim,), "a vector is of another length")
            return check_rows(row)

    # Concepts

    def concepts(self) -> dict[str, tuple[str, Concept]]:
        """By name, in the order of names: the fingerprint of the model that each was taught to, and the concept."""
        found, bound = {}, self.model
        for name, model, row, *files, precision in self._read(
            "SELECT name, model, row, examples, others, precision FROM concepts ORDER BY name"
        ):
            with making_sense(self.path):
                examples, others = (tuple(map(Path, json.loads(listed))) for listed in files)
                concept = Concept(name, np.frombuffer(row, "<f4"), examples, others, precision)
                found[name] = check_concept(model, concept, bound.dim if bound and bound.fingerprint == model else None)
        return found

    def keep_concept(self, model: str, concept: Concept) -> None:
        """Store a concept, in the place of one of that name."""
        files = [json.dumps([str(path) for path in paths]) for paths in (concept.examples, concept.others)]
        with self.writing(photographs=False):
            self._db.execute(
                "INSERT OR REPLACE INTO concepts VALUES (?, ?, ?, ?, ?, ?)",
                (concept.name, model, concept.row.astype("<f4").tobytes(), *files, concept.precision),
            )

    def rename_concept(self, old: str, new: str) -> bool:
        """Give a concept another name -> whether there is one. Raises ClipmatchError if the new name is taken."""
        with self.writing(photographs=False):
            taken = next(self._read("SELECT name FROM concepts WHERE name = ?", (new,)), None)
            if taken and old.casefold() != new.casefold():
                raise ClipmatchError(
                    f"There is a concept @{taken[0]} already; remove it first, or choose another name."
                )
            return self._db.execute("UPDATE concepts SET name = ? WHERE name = ?", (new, old)).rowcount > 0

    def forget_concept(self, name: str) -> bool:
        """Remove a concept -> whether there was one."""
        with self.writing(photographs=False):
            return self._db.execute("DELETE FROM concepts WHERE name = ?", (name,)).rowcount > 0

    # Files that could not be used

    def broken(self, condition: str = "1", values: Sequence[Any] = ()) -> dict[Path, tuple[Stamp, str]]:
        """By path: their stamps, and the reasons."""
        question = f"SELECT path, size, mtime, sidecar, reason FROM failures WHERE {condition} ORDER BY path"
        rows = list(self._read(question, values))
        with making_sense(self.path):
            return {
                check_path(Path(os.fsdecode(path))): check_failure(Stamp(*stamp), reason)
                for path, *stamp, reason in rows
            }

    def failures(self) -> list[Failure]:
        """The same, for people."""
        return [Failure(path, reason) for path, (_, reason) in self.broken().items()]

    # What it leaves to others

    @property
    def derived(self) -> Path:
        """The name beside which the files lie that are derived of it."""
        return self.path

    def tidy(self) -> None:
        """Nothing is left to do after an update."""

    def collection(self, calibration: Calibration | None) -> None:
        """It has no search of its own: it is searched by the files derived of it."""

    # SQLite

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read within is of one moment, whatever another process writes meanwhile."""
        if self._db.in_transaction:
            yield
            return
        with reading_errors(self.path):
            self._db.execute("BEGIN")
            with all_or_nothing(self._db):
                yield

    def _read(self, question: str, values: Sequence[Any] = ()) -> Generator[tuple[Any, ...], None, None]:
        """The rows that answer a question."""
        with reading_errors(self.path):
            yield from self._db.execute(question, values)

    def _get(self, name: str) -> str | None:
        row = next(self._read("SELECT value FROM about WHERE name = ?", (name,)), None)
        with making_sense(self.path):
            require(row is None or isinstance(row[0], str), f"its {name} is no text")
        return row[0] if row else None

    def _set(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, value))


COLUMN_NAMES = (
    "path", "name", "digest", "size", "mtime", "sidecar", "width", "height", "taken", "latitude", "longitude",
    "camera", "caption", "picture_hash",
)  # fmt: skip
COLUMNS = ", ".join(COLUMN_NAMES)
KINDS: tuple[Any, ...] = (
    bytes, str, bytes, int, int, int, int, int, str | None, float | None, float | None, str | None, str | None, int
)  # fmt: skip


def row_of(photo: Photo) -> tuple[Any, ...]:
    """A photograph -> the values of `COLUMNS`."""
    data, stamp = photo.metadata, photo.stamp
    taken = data.taken.isoformat() if data.taken else None
    signed = photo.picture_hash - (1 << 64) if photo.picture_hash >> 63 else photo.picture_hash  # SQLite's are signed
    name = os.fsencode(photo.path.name).decode("utf-8", "replace")
    return (
        os.fsencode(photo.path), name, bytes.fromhex(photo.digest), stamp.size, stamp.mtime, stamp.sidecar,
        data.width, data.height, taken, data.latitude, data.longitude, data.camera, data.caption, signed,
    )  # fmt: skip


def photo_of(row: Sequence[Any]) -> Photo:
    """The values of `COLUMNS` -> a photograph."""
    path, _, digest, size, mtime, sidecar, width, height, taken, latitude, longitude, camera, caption, signed = row
    with making_sense():
        kinds = zip(row, KINDS, strict=True)
        require(all(isinstance(value, kind) for value, kind in kinds), "a value is of another kind")
        moment = datetime.fromisoformat(taken) if taken else None
        metadata = Metadata(width, height, moment, latitude, longitude, camera, caption)
        stamp = Stamp(size, mtime, sidecar)
        return check_photo(Photo(Path(os.fsdecode(path)), digest.hex(), stamp, metadata, signed % (1 << 64)))


class OtherModel(ClipmatchError):
    """The store holds the vectors of another model; perhaps it was changed over a moment ago."""


def check_model(store: PhotoStore, embedder: Embedder) -> None:
    """Raise OtherModel if the store holds another model's vectors."""
    from clipmatch.storage import default_index

    bound = store.model
    if bound and bound.fingerprint != embedder.fingerprint:
        here = "" if store.path == default_index() else f" --index {shlex.quote(str(store.path))}"
        own = getattr(embedder, "name", None)
        change = f"clipmatch index --reembed{here}" + (f" --model {shlex.quote(own)}" if own else "")
        search = f"clipmatch find QUERY{here}" + (f" --model {shlex.quote(bound.name)}" if bound.name else "")
        old = "" if bound.name else " in the version of clipmatch that made it"
        raise OtherModel(
            f"The index {store.path} holds the vectors of another model; search it by that{old}: {search}; or change "
            f"it over: {change}"
        )
