"""A photo collection, indexed: kept up to date with its folders, and asked.

In: folders, questions. Out: `Matches`, `Summary`, photographs. This is the public face of store, vectors, ingest and
search; how any of them works is not known here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from clipmatch.approximate import Approximate, approximate_file, build_approximate, open_approximate
from clipmatch.calibration import Calibration
from clipmatch.duplicates import group_near
from clipmatch.embedder import Embedder, Failure, load_model
from clipmatch.errors import ClipmatchError
from clipmatch.imageformats import SUFFIXES
from clipmatch.ingest import Summary, check_model, reembed, update
from clipmatch.query import Query, Term, parse_query
from clipmatch.runtime import cache_folder
from clipmatch.search import Match, Matches, Request, Stacking, need_calibration, search
from clipmatch.store import Filter, ModelName, Photo, Root, Store, default_index
from clipmatch.vectors import DamagedVectors, Gallery, open_gallery, vectors_file

Answer = TypeVar("Answer")

FILTERS = 4  # whose places are remembered, for a page follows another


@dataclass(frozen=True, eq=False)
class Opened:
    """The derived files of an index, open. stamp: what they were at that time. passing: places by filter."""

    stamp: tuple[object, ...]
    gallery: Gallery
    near: Approximate | None
    passing: dict[Filter, NDArray[np.int64]] = field(default_factory=dict)


class Index:
    """An index file and its model. `Index.open` opens or makes it; close it, or use it in a `with` statement.

        with Index.open() as index:
            index.update(["~/Pictures"])
            for match in index.find("two dogs in the snow", where=Filter(camera="Pixel"), top_k=5):
                print(match.confidence, match.path, match.photo.metadata.taken)

    Photographs and matches have a `row()` for tables: `pandas.DataFrame(photo.row() for photo in index)`.
    """

    def __init__(self, store: Store, embedder: Callable[[], Embedder]):
        self.store = store
        self._load = embedder
        self._embedder: Embedder | None = None
        self._opened: Opened | None = None
        self._opening = Lock()

    @classmethod
    def open(
        cls, path: str | Path | None = None, model: str | Path | Embedder | None = None, create: bool = True
    ) -> Index:
        """The index in a file.

        model: a loaded one, or the name of one as for `load_model`; None: the one that filled the index, or for a new
        index the one that comes with clipmatch. It is loaded when it is first needed.
        Raises ClipmatchError when the file is no index, or there is none and `create` is False.
        """
        store = Store.open(path or default_index(), create)
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
        """Let go of the file."""
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
        embedder = self.embedder
        with self.store.writer(wait):
            if self.store.model is None:
                self.store.bind(name_of(embedder))
            for root in roots:
                self.store.add_root(root)
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
            return self._use(lambda opened: self._search(opened, query, request))

    def _search(self, opened: Opened, query: Query, request: Request) -> Matches:
        passing = self._passing(opened, request.where)
        return search(self.store, opened.gallery, opened.near, passing, self.embedder, self.calibration, query, request)

    def _passing(self, opened: Opened, where: Filter) -> NDArray[np.int64] | None:
        """Places of the photographs that pass a filter; None without one. The last filters' are remembered."""
        if not where:
            return None
        places = opened.passing.get(where)
        if places is None:
            places = opened.gallery.places(self.store.numbers(where))
            with self._opening:
                for oldest in list(opened.passing)[: 1 - FILTERS]:
                    del opened.passing[oldest]
                opened.passing[where] = places
        return places

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
            found = self._use(lambda opened: self._groups(opened.gallery, where))
        return [sorted(group, key=pixels, reverse=True) for group in found]

    def _groups(self, gallery: Gallery, where: Filter | None) -> list[list[Photo]]:
        if where:
            gallery = gallery.part(gallery.places(self.store.numbers(where)))
        groups = group_near(gallery.rows, self.store.hashes(gallery.numbers))
        return [[self.store.photo(int(gallery.numbers[place])) for place in group] for group in groups]

    def reembed(self, model: str | Path | Embedder | None = None, progress: bool = True) -> Summary:
        """Change over to another model; None: the one that comes with clipmatch.

        Until every photograph has its new vector the index answers with the old ones; interrupted, the next call goes
        on. Photographs whose files are gone or damaged leave the index, as failures say.
        """
        embedder = load_model(model) if model is None or isinstance(model, str | Path) else model
        with self.store.writer():
            summary = reembed(self.store, embedder, name_of(embedder), progress)
            self._embedder = embedder
            self.derive()
        return summary

    def gallery(self) -> Gallery:
        """What is searched, as it is now."""
        return self._open().gallery

    def derive(self) -> bool:
        """Make the files that searches are quicker with -> whether all that this many rows need are there."""
        with self.store.snapshot():
            check_model(self.store, self.embedder)
            return self._use(lambda opened: build_approximate(self.store.path, self.store.content, opened.gallery))

    def _open(self) -> Opened:
        """The derived files, opened once for as long as the store and they stay as they are."""
        path, calibration = self.store.path, self.calibration
        with self._opening:
            if self._opened is None or self._opened.stamp != self._stamp():
                self._opened = None  # lets go of the old files first
                gallery = open_gallery(self.store, calibration)
                near = open_approximate(path, self.store.content, gallery)
                self._opened = Opened(self._stamp(), gallery, near)
            return self._opened

    def _stamp(self) -> tuple[object, ...]:
        """What changes when something else should be opened."""
        path, content = self.store.path, self.store.content
        return content, self.calibration, stamp_of(vectors_file(path)), stamp_of(approximate_file(path, content))

    def _use(self, ask: Callable[[Opened], Answer]) -> Answer:
        """Ask the derived files; once more if one turns out to be damaged, for it is made anew then."""
        try:
            return ask(self._open())
        except DamagedVectors:
            return ask(self._open())

    @property
    def calibration(self) -> Calibration | None:
        """How sure the model's matches are, if that is known."""
        return getattr(self.embedder, "calibration", None)


def check_folders(folders: Sequence[str | Path]) -> None:
    """Raise ClipmatchError if one of them does not exist."""
    for folder in map(absolute, folders):
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


def absolute(path: str | Path) -> Path:
    """A path as the index keeps it; a link stays a link."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 - which `resolve` would follow


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
