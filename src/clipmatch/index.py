"""A photo collection, indexed: kept up to date with its folders, and asked.

In: folders, questions. Out: `Matches`, `Summary`, photographs. This is the public face of store, vectors, ingest and
search; how any of them works is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from clipmatch.approximate import approximate_file, build_approximate
from clipmatch.calibration import Calibration
from clipmatch.collection import Collection, DerivedFiles, open_collection
from clipmatch.duplicates import group_near
from clipmatch.embedder import Embedder, load_model
from clipmatch.errors import ClipmatchError, Failure
from clipmatch.imageformats import SUFFIXES
from clipmatch.leave import give
from clipmatch.photo import Photo
from clipmatch.query import Query, Term, concept_name, parse_query
from clipmatch.remote import absolute, address_of, is_remote
from clipmatch.runtime import cache_folder
from clipmatch.sanity import are_unit, check_concept
from clipmatch.search import Match, Matches, Request, Stacking, need_calibration, search, sum_of_terms
from clipmatch.storage import PhotoStore, default_index, open_store
from clipmatch.store import Filter, ModelName, Root, check_model
from clipmatch.teaching import OTHERS, Concept, learn, leave_one_out
from clipmatch.vectors import DamagedVectors, Gallery, vectors_file

if TYPE_CHECKING:
    from clipmatch.comparison import Summary

Answer = TypeVar("Answer")

CONCEPTS = 1  # of the form in which concepts are exported


@dataclass(frozen=True, eq=False)
class Opened:
    """What an index is searched by. stamp: what it was made of."""

    stamp: tuple[object, ...]
    collection: Collection


class Index:
    """An index file and its model. `Index.open` opens or makes it; close it, or use it in a `with` statement.

        with Index.open() as index:
            index.update(["~/Pictures"])
            for match in index.find("two dogs in the snow", where=Filter(camera="Pixel"), top_k=5):
                print(match.confidence, match.path, match.photo.metadata.taken)

    Photographs and matches have a `row()` for tables: `pandas.DataFrame(photo.row() for photo in index)`.
    """

    def __init__(self, store: PhotoStore, embedder: Callable[[], Embedder]):
        self.store = store
        self._load = embedder
        self._embedder: Embedder | None = None
        self._opened: Opened | None = None
        self._opening = Lock()

    @classmethod
    def open(
        cls, path: str | Path | None = None, model: str | Path | Embedder | None = None, create: bool = True
    ) -> Index:
        """The index in a file; or at an address such as s3://bucket/index or in a folder that ends in .lance, where it
        is of Lance tables (the extra `distributed`).

        model: a loaded one, or the name of one as for `load_model`; None: the one that filled the index, or for a new
        index the one that comes with clipmatch. It is loaded when it is first needed.
        Raises ClipmatchError when the file is no index, or there is none and `create` is False.
        """
        store = open_store(path or default_index(), create)
        bound = store.model
        if isinstance(model, str | Path) or model is None:
            name = str(model) if model else bound.name if bound else None
            return cls(store, lambda: load_model(name))
        return cls(store, lambda: model)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        self._opened = None
        self.store.close()

    def __len__(self) -> int:
        return len(self.store)

    def __iter__(self) -> Iterator[Photo]:
        return (photo for _, photo in self.store.photos())

    @property
    def embedder(self) -> Embedder:
        """The model. Raises ClipmatchError if it can't be loaded, or is not the one that filled the index."""
        if self._embedder is None:
            self._embedder = self._load()
            check_model(self.store, self._embedder)
        return self._embedder

    def update(
        self,
        folders: Sequence[str | Path] = (),
        exclude: Sequence[str] | None = None,
        follow_links: bool | None = None,
        wait: bool = True,
        progress: bool = True,
    ) -> Summary:
        """Make the index what the folders are now; without `folders`, all that it keeps up with.

        exclude: patterns of names, or of paths below the folder, that are left out. follow_links: enter folders that
        links lead to. Both are remembered with the folder; None leaves them as they are. One process at a time: another
        waits, or without `wait` raises ClipmatchError.
        """
        check_folders(folders)
        known = {root.path: root for root in self.store.roots()}
        roots = [
            changed(known.get(absolute(folder), Root(absolute(folder))), exclude, follow_links) for folder in folders
        ]
        from clipmatch.ingest import update

        embedder = self.embedder
        with self.store.writer(wait):
            if self.store.model is None:
                self.store.bind(name_of(embedder))
            for root in roots:
                self.store.add_root(root)
            give(self.store.path, [root.path for root in roots])
            if not (roots or self.store.roots()):
                raise ClipmatchError("This index keeps up with no folder yet; name one: clipmatch index DIR")
            summary = update(self.store, embedder, roots or self.store.roots(), progress)
            summary.derived = self.derive()
        return summary

    def find(
        self,
        query: str | Path | Sequence[str | Path],
        *,
        exclude: str | Sequence[str] = (),
        where: Filter | None = None,
        top_k: int = 9,
        page: int = 1,
        min_confidence: float | None = None,
        hybrid: bool = False,
        diverse: bool = False,
        duplicates: Stacking = "stack",
    ) -> Matches:
        """The photographs that match best: `Request` says what each setting does, `parse_query` what a query can be."""
        excluded = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        request = Request(excluded, where or Filter(), top_k, page, min_confidence, hybrid, diverse, duplicates)
        return self.answer(parse_query(query), request)

    def answer(self, query: Query, request: Request) -> Matches:
        """`find`, for a query and a request that are made already."""
        with self.store.snapshot():
            check_model(self.store, self.embedder)  # another process may have changed it
            known = self.with_concepts(query)
            return self._use(lambda seen: self._search(seen, known, request))

    def refine(self, query: Query | None, liked: Sequence[Path], disliked: Sequence[Path], request: Request) -> Matches:
        """The photographs that match a query as it is meant: more like some of the index, and less like others.

        query: None where the photographs alone say what is meant. Raises ClipmatchError if none of them is in the
        index.
        """
        with self.store.snapshot():
            check_model(self.store, self.embedder)
            known = self.with_concepts(query) if query else None
            base = sum_of_terms(known, known.vectors(self.embedder)) if known else None
            good, bad = (rows_in(self.store.rows_of(paths), self.embedder.dim) for paths in (liked, disliked))
            if not len(good) and (base is None or not len(bad)):
                raise ClipmatchError("None of the photographs that were ticked is in the index now.")
            row = learn(good, bad, self._sample(), base)
            meant = Query((Term(concept="refined", row=row),))
            found = self._use(lambda seen: self._search(seen, meant, request))
        found.query = str(query) if query else ""
        return found

    # Concepts: each is one transaction, so they need not wait for an update that may take hours

    def teach(self, name: str, examples: Sequence[str | Path], others: Sequence[str | Path] = ()) -> Concept:
        """Learn what "@name" means from pictures that show it, and others that do not; in the place of one so named.

        Pictures may lie anywhere; folders stand for the pictures below them. What the index holds stands for all that
        is not meant. Raises ClipmatchError if one can't be read, or the name could not stand in a query.
        """
        plain = concept_name(name)
        files = [picture_files(paths) for paths in (examples, others)]
        if not files[0]:
            raise ClipmatchError(f"To teach @{plain} takes at least one picture that shows it.")
        if both := set(files[0]) & set(files[1]):
            raise ClipmatchError(f"The picture {min(both)} can't both show @{plain} and not.")
        with self.store.snapshot():
            check_model(self.store, self.embedder)
            known = self.store.rows_of([*files[0], *files[1]])
            rest = self._sample()
        if not len(rest) and not files[1]:
            raise ClipmatchError(
                f"The index is empty, so nothing says what @{plain} is not; index your photographs first, or show some "
                "that are not meant."
            )
        new = [path for path in [*files[0], *files[1]] if path not in known]
        made = self.embedder.embed_images(new, progress=True)
        if made.failures:
            bad = made.failures[0]
            raise ClipmatchError(f"The picture {bad.path} can't be read: {bad.reason}; leave it out.")
        known.update(zip(made.paths, made.rows, strict=True))
        good, bad_rows = (rows_in({path: known[path] for path in paths}, self.embedder.dim) for paths in files)
        row, precision = learn(good, bad_rows, rest), leave_one_out(good, bad_rows, rest)
        if not are_unit(row):
            raise ClipmatchError(f"To this model the pictures that show @{plain} are those that do not; choose others.")
        concept = Concept(plain, row, tuple(files[0]), tuple(files[1]), precision)
        if self.store.model is None:
            with self.store.writer():
                if self.store.model is None:
                    self.store.bind(name_of(self.embedder))
        check_model(self.store, self.embedder)  # another process may have changed it meanwhile
        self.store.keep_concept(self.embedder.fingerprint, concept)
        return concept

    def concepts(self) -> list[Concept]:
        """Those that were taught, by name."""
        return [concept for _, concept in self.store.concepts().values()]

    def rename_concept(self, old: str, new: str) -> None:
        """Give a concept another name. Raises ClipmatchError if there is none, or one of the new name."""
        if not self.store.rename_concept(concept_name(old), concept_name(new)):
            raise self._unknown(concept_name(old))

    def forget_concept(self, name: str) -> None:
        """Remove a concept. Raises ClipmatchError if there is none."""
        if not self.store.forget_concept(concept_name(name)):
            raise self._unknown(concept_name(name))

    def export_concepts(self) -> dict[str, Any]:
        """All concepts as values of JSON, for `import_concepts` of another index of the same model."""
        taught = self.store.concepts().values()
        return {
            "schema": CONCEPTS,
            "concepts": [
                {
                    "name": concept.name,
                    "model": model,
                    "row": concept.row.tolist(),
                    "examples": list(map(str, concept.examples)),
                    "others": list(map(str, concept.others)),
                    "precision": concept.precision,
                }
                for model, concept in taught
            ],
        }

    def import_concepts(self, values: dict[str, Any]) -> int:
        """Take in what `export_concepts` gave, in the place of concepts so named -> how many there are.

        Raises ClipmatchError, and takes in none, if one was taught to another model; KeyError, TypeError or ValueError
        for what is none of its values.
        """
        if values["schema"] != CONCEPTS:
            raise ClipmatchError("These concepts are from another version of clipmatch; export them anew.")
        taken = []
        for value in values["concepts"]:
            row = np.array(value["row"], np.float32)
            name = concept_name(str(value["name"]))
            if value["model"] != self.embedder.fingerprint or row.shape != (self.embedder.dim,):
                raise ClipmatchError(f"The concept @{name} was taught to another model than that of this index.")
            examples, others = (tuple(map(Path, value[key])) for key in ("examples", "others"))
            precision = value["precision"]
            concept = Concept(name, row, examples, others, None if precision is None else float(precision))
            taken.append(check_concept(value["model"], concept, self.embedder.dim)[1])
        for concept in taken:
            self.store.keep_concept(self.embedder.fingerprint, concept)
        return len(taken)

    def with_concepts(self, query: Query) -> Query:
        """A query with the directions of its concepts. Raises ClipmatchError for one that this model was not taught."""
        if not query.concepts:
            return query
        known = {name.casefold(): taught for name, taught in self.store.concepts().items()}
        rows = {}
        for name in query.concepts:
            if name.casefold() not in known:
                raise self._unknown(name)
            model, concept = known[name.casefold()]
            if model != self.embedder.fingerprint:
                raise ClipmatchError(f"The concept @{concept.name} was taught to another model; teach it once more.")
            rows[name] = concept.row
        return query.with_concepts(rows)

    def _unknown(self, name: str) -> ClipmatchError:
        names = [f"@{known}" for known in self.store.concepts()]
        return ClipmatchError(
            f"There is no concept @{name}; teach it with: clipmatch teach @{name} PHOTO..."
            + (f" There {'are' if names[1:] else 'is'} {', '.join(names)}." if names else "")
        )

    def _sample(self) -> NDArray[np.float32]:
        """Rows [r, d] that stand for all of the collection."""
        return self._use(lambda seen: seen.sample(OTHERS)).reshape(-1, self.embedder.dim)

    def _search(self, seen: Collection, query: Query, request: Request) -> Matches:
        return search(self.store, seen, self.embedder, self.calibration, query, request)

    def remove(self, folder: str | Path) -> int:
        """Forget a folder with all its photographs -> how many there were. The files stay as they are.

        What lies below a folder that the index keeps up with comes back with the next update. Raises ClipmatchError if
        nothing of it is in the index.
        """
        with self.store.writer():
            photographs, roots = self.store.remove_below(absolute(folder))
        if not (photographs or roots):
            raise ClipmatchError(f"Nothing of {absolute(folder)} is in the index {self.store.path}.")
        return photographs

    def more_like(self, matches: Matches, rank: int) -> Query:
        """The query for photographs like the one of that rank, from 1 on. Raises ClipmatchError if there is none."""
        if not 1 <= rank <= len(matches):
            raise ClipmatchError(f"There is no match {rank} to look for more like it; there are {len(matches)}.")
        match = matches[rank - 1]
        return Query((Term("", match.path, row=self.store.vector(match.photo.digest) if match.photo else None),))

    def duplicates(self, where: Filter | None = None) -> list[list[Photo]]:
        """Groups of near-duplicates, the largest group first, in each the photograph with the most pixels first."""
        with self.store.snapshot():
            found = self._use(lambda seen: self._groups(seen.all_of(where or Filter())))
        return [sorted(group, key=pixels, reverse=True) for group in found]

    def _groups(self, gallery: Gallery) -> list[list[Photo]]:
        groups = group_near(gallery.rows, self.store.hashes(gallery.numbers))
        return [self.store.photos_of(gallery.numbers[group].tolist()) for group in groups]

    def reembed(self, model: str | Path | Embedder | None = None, progress: bool = True) -> Summary:
        """Change over to another model; None: the one that comes with clipmatch.

        Until every photograph has its new vector the index answers with the old ones; interrupted, the next call goes
        on. Photographs whose files are gone or damaged leave the index, as failures say.
        """
        from clipmatch.ingest import reembed

        embedder = load_model(model) if model is None or isinstance(model, str | Path) else model
        with self.store.writer():
            summary = reembed(self.store, embedder, name_of(embedder), progress)
            self._embedder = embedder
            self.derive()
        for concept in self.concepts():
            try:
                self.teach(concept.name, concept.examples, concept.others)
            except ClipmatchError as error:
                summary.failures.append(Failure(Path(f"@{concept.name}"), f"is not taught anew: {error}"))
        return summary

    def gallery(self) -> Gallery:
        """What is searched, as it is now."""
        return self._open().all_of(Filter())

    def derive(self) -> bool:
        """Make what searches are quicker with -> whether all that this many rows need is there."""
        self.store.tidy()
        with self.store.snapshot():
            check_model(self.store, self.embedder)
            return self._use(self._build)

    def _build(self, seen: Collection) -> bool:
        if not isinstance(seen, DerivedFiles):
            return True
        return build_approximate(self.store.derived, self.store.content, seen.gallery)

    def _open(self) -> Collection:
        """What is searched, opened once for as long as the store and its derived files stay as they are."""
        calibration = self.calibration
        with self._opening:
            if self._opened is None or self._opened.stamp != self._stamp():
                self._opened = None  # lets go of the old files first
                collection = open_collection(self.store, calibration)
                self._opened = Opened(self._stamp(), collection)
            return self._opened.collection

    def _stamp(self) -> tuple[object, ...]:
        """What changes when something else should be opened."""
        path, content = self.store.derived, self.store.content
        return content, self.calibration, stamp_of(vectors_file(path)), stamp_of(approximate_file(path, content))

    def _use(self, ask: Callable[[Collection], Answer]) -> Answer:
        """Ask what is searched; once more if one turns out to be damaged, for it is made anew then."""
        try:
            return ask(self._open())
        except DamagedVectors:
            return ask(self._open())

    @property
    def calibration(self) -> Calibration | None:
        """How sure the model's matches are, if that is known."""
        return getattr(self.embedder, "calibration", None)


def picture_files(paths: Sequence[str | Path]) -> list[Path]:
    """Pictures and folders of them -> pictures, absolute, each once. Raises ClipmatchError for what does not exist."""
    from clipmatch.crawl import list_images

    return list(dict.fromkeys(file for path in paths for file in list_images(absolute(path))))


def rows_in(rows: Mapping[Path, NDArray[np.float32]], dim: int) -> NDArray[np.float32]:
    """Rows [d] by path -> [n, d]."""
    return np.stack(list(rows.values())) if rows else np.empty((0, dim), np.float32)


def check_folders(folders: Sequence[str | Path]) -> None:
    """Raise ClipmatchError if one of them does not exist."""
    for folder in map(absolute, folders):
        if is_remote(folder):
            raise ClipmatchError(f"{address_of(folder)} is on object storage; index it with --engine ray.")
        if not folder.exists():
            raise ClipmatchError(f"The image folder {folder} does not exist; check its name.")


def changed(root: Root, exclude: Sequence[str] | None, follow_links: bool | None) -> Root:
    """A folder, walked in another way where one is given; an empty pattern is none."""
    if exclude is not None:
        root = replace(root, exclude=tuple(pattern for pattern in exclude if pattern))
    return root if follow_links is None else replace(root, follow_links=follow_links)


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """Which file lies there, and as of when; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def pixels(photo: Photo) -> int:
    """How many a photograph has."""
    return photo.metadata.width * photo.metadata.height


def name_of(embedder: Embedder) -> ModelName:
    """How to find a model again."""
    name = getattr(embedder, "name", None)
    return ModelName(embedder.fingerprint, embedder.dim, name)


@contextmanager
def open_folders(
    images: str | Path | Sequence[str | Path], model: str | Path | Embedder | None = None, progress: bool = True
) -> Iterator[tuple[Index, Summary]]:
    """An index in the cache folder, one for each model, brought up to date with some folders or files only.

    What lies in other folders is in it too: search it with `Filter(folders=...)`. Raises ClipmatchError when a folder
    does not exist, or nothing in them can be searched.
    """
    from clipmatch.ingest import update

    listed = [images] if isinstance(images, str | Path) else list(images)
    if not listed:
        raise ClipmatchError("The list of images is empty; name at least one.")
    missing = [Path(path) for path in listed if not absolute(path).exists()]
    if len(listed) == 1 and missing:  # a wrong name among many is a failure, alone it is an error
        raise ClipmatchError(f"The image folder {absolute(missing[0])} does not exist; check its name.")
    roots = [Root(absolute(path)) for path in listed if Path(path) not in missing]
    embedder = load_model(model) if model is None or isinstance(model, str | Path) else model
    with Index.open(cache_folder() / "indexes" / f"{embedder.fingerprint}.sqlite", embedder) as index:
        with index.store.writer():
            if index.store.model is None:
                index.store.bind(name_of(embedder))
            summary = update(index.store, embedder, roots, progress, keep_empty=False)
        summary.failures += [Failure(path, "does not exist") for path in missing]
        if not len(index.store.numbers(Filter(folders=tuple(map(absolute, listed))))):
            raise nothing_to_search(Path(listed[0]), summary)
        yield index, summary


def find_matches(
    query: str | Path | Sequence[str | Path],
    model: Embedder | str | Path | None = None,
    images: str | Path | Sequence[str | Path] = ".",
    top_k: int = 9,
    progress: bool = True,
    min_confidence: float | None = None,
) -> Matches:
    """The `top_k` images of a folder that match a query best: by confidence if the model is calibrated, else by cosine.

    model: a loaded model, or the name of one as for `load_model`; None: the one that comes with clipmatch. images: a
    folder (searched with its subfolders) or a list of files and folders. Each image is embedded once and remembered,
    in an index in the cache folder; a bad one is left out and listed in the result's `failures`. min_confidence: leave
    out those that are less probable than this; the result may be empty.
    Raises ClipmatchError when the query is empty, a folder does not exist or has no pictures, none of them can be read,
    or confidence is asked of a model that was never evaluated.
    """
    asked = parse_query(query)
    request = Request(top_k=top_k, min_confidence=min_confidence, duplicates="show")
    listed = [images] if isinstance(images, str | Path) else list(images)
    embedder = load_model(model) if model is None or isinstance(model, str | Path) else model
    need_calibration(getattr(embedder, "calibration", None), asked, request)
    with open_folders(images, embedder, progress) as (index, summary):
        where = Filter(folders=tuple(absolute(folder) for folder in listed))
        matches = index.answer(asked, replace(request, where=where))
    matches.failures = summary.failures
    return spoken(matches, {absolute(folder): Path(folder) for folder in listed})


def spoken(matches: Matches, names: dict[Path, Path]) -> Matches:
    """Matches with the paths as the caller wrote their folders, for a relative path is shorter."""

    def rename(match: Match) -> Match:
        for root, name in names.items():
            if match.path.is_relative_to(root):
                return replace(match, path=name.expanduser() / match.path.relative_to(root))
        return match

    matches[:] = [rename(match) for match in matches]
    matches.best = rename(matches.best) if matches.best else None
    return matches


def nothing_to_search(place: Path, summary: Summary) -> ClipmatchError:
    """The sentence for a folder without pictures, or with none that can be read."""
    if not summary.failures:
        return ClipmatchError(f"The folder {place} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    first = summary.failures[0]
    return ClipmatchError(f"None of the {len(summary.failures)} images can be read; the first: {first.reason}.")
