"""All vectors of an index in one file, as search reads them; derived from the store, so it may be lost.

In: a store, the calibration of its model. Out: a `Gallery`: numbers [n], unit rows [n, d], backgrounds [n]. Knows
nothing of queries.

The file lies beside the store as STORE.vectors. It is good if its header names the store's content token and the
calibration; anything else makes it anew. It is written beside, put on the disk and moved into place, so a reader never
meets half a file, and one that has the old file open keeps it.

What may damage it later is a sector that can't be read any more (the disk says so), a bit that flips on the way, a
program that copies or cleans up half of it: rare, and local. So each row has a checksum of its own, compared whenever
the row is read, and so have the other arrays together, compared when the file is opened: no number is used unseen, and
opening reads 20 bytes a photograph, not the rows. A damaged file is removed and said to be so by `DamagedVectors`;
opened once more, it is made anew. A process that compares all rows again maps them instead, unchecked from then on: it
has seen them whole, and by then they are in memory.

Rows are read in blocks that fit into the cache of a core, so a process that asks once takes next to no memory for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipmatch.atomic import atomic_file
from clipmatch.calibration import Calibration
from clipmatch.errors import ClipmatchError
from clipmatch.runtime import usable_cores

if TYPE_CHECKING:
    from clipmatch.storage import PhotoStore

FORMAT = 2  # 1 had one checksum for the whole file
HEADER = 512  # bytes, JSON padded with blanks
READ = getattr(os, "preadv", None)  # Windows has none; rows are mapped there
BLOCK = 512  # rows read at once: half a megabyte, in the cache when they are compared
ALONE = 64  # to read a row that lies alone takes as long as to compare so many that are in memory


class DamagedVectors(ClipmatchError):
    """The file of vectors does not hold what was written; it is removed, to be made anew."""


class Rows:
    """Unit rows [n, d] in memory."""

    def __init__(self, array: NDArray[np.float32]):
        self.array = array
        self.shape: tuple[int, int] = array.shape  # type: ignore[assignment]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """The rows at some places, as an array."""
        return self.array[places]

    def cosines(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Unit rows of one query [d] or several [t, d] -> [n] or [n, t]."""
        found: NDArray[np.float32] = self.array @ queries.T
        return found

    def part(self, places: NDArray[np.int64]) -> Rows:
        """Those at some places, which rise; read when they are needed."""
        return PartOfRows(self, places)


class PartOfRows(Rows):
    """Some places [m] of other rows, as rows of their own."""

    def __init__(self, whole: Rows, places: NDArray[np.int64]):
        self.whole, self.places = whole, places
        self.shape = (len(places), whole.shape[1])

    def __getitem__(self, places: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        return self.whole[self.places[places]]

    def cosines(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """As of any rows; of all where they lie too scattered."""
        runs = 1 + np.count_nonzero(np.diff(self.places) != 1)
        if len(self) + ALONE * runs > len(self.whole):
            return self.whole.cosines(queries)[self.places]
        return np.concatenate([rows @ queries.T for rows in in_blocks(self)])


class StoredRows(Rows):
    """Unit rows [n, d] in an open file from a byte on, with their checksums [n]. May be used by several threads."""

    def __init__(self, path: Path, descriptor: int, start: int, dim: int, checksums: NDArray[np.uint64]):
        self.path, self.descriptor, self.start, self.checksums = path, descriptor, start, checksums
        self.shape = (len(checksums), dim)
        self.compared = False  # all of them, once
        weakref.finalize(self, os.close, descriptor)

    @cached_property
    def mapped(self) -> NDArray[np.float32]:
        """The rows where they lie, unchecked."""
        with open(self.descriptor, "rb", closefd=False) as file:
            return np.memmap(file, np.float32, "r", self.start, self.shape)

    def __getitem__(self, places: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        chosen = np.arange(*places.indices(len(self))) if isinstance(places, slice) else places
        rows = np.empty((len(chosen), self.shape[1]), np.float32)
        edges = [0, *(np.flatnonzero(np.diff(chosen) != 1) + 1).tolist(), len(chosen)]
        for start, end in pairwise(edges if len(chosen) else ()):
            self.read(int(chosen[start]), rows[start:end])
        self.check(rows, self.checksums[chosen])
        return rows

    def cosines(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """As of any rows; read in blocks the first time, mapped from then on."""
        if self.compared:
            return Rows(self.mapped).cosines(queries)
        found = np.empty((len(self), *queries.shape[:-1]), np.float32)

        def compare(start: int) -> None:
            buffer = np.empty((BLOCK, self.shape[1]), np.float32)
            for place in range(start, min(start + share, len(self)), BLOCK):
                rows = buffer[: len(self) - place]
                self.read(place, rows)
                self.check(rows, self.checksums[place : place + BLOCK])
                np.matmul(rows, queries.T, out=found[place : place + BLOCK])

        share = -(-len(self) // (usable_cores() * BLOCK)) * BLOCK
        on_all_cores(compare, range(0, len(self), share or 1))  # most of the time is the copy from the system's cache
        self.compared = True
        return found

    def read(self, place: int, rows: NDArray[np.float32]) -> None:
        """Fill rows with those from a place on."""
        if READ is None:
            rows[:] = self.mapped[place : place + len(rows)]
            return
        try:
            done = READ(self.descriptor, [rows.data], self.start + place * rows.strides[0])
        except OSError:
            done = -1
        if done != rows.nbytes:
            raise self.damaged()

    def check(self, rows: NDArray[np.float32], checksums: NDArray[np.uint64]) -> None:
        """Raise DamagedVectors unless rows are what was written."""
        if not np.array_equal(checksums_of(rows), checksums):
            raise self.damaged()

    def damaged(self) -> DamagedVectors:
        """What to raise; the file is gone then."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        return DamagedVectors(f"The file {self.path} was damaged and is removed; ask again, and it is made anew.")


@dataclass(frozen=True, eq=False)
class Gallery:
    """What is searched. numbers [n]: of the store's photographs, rising. rows [n, d]: unit vectors, float32.

    background [n]: what the calibration says of each photograph (`Calibration.background`); None without one.
    """

    numbers: NDArray[np.int64]
    rows: Rows
    background: NDArray[np.float32] | None

    def __len__(self) -> int:
        return len(self.numbers)

    def places(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers -> places in the arrays, of those that are there."""
        return np.searchsorted(self.numbers, numbers[are_among(numbers, self.numbers)])

    def part(self, places: NDArray[np.int64]) -> Gallery:
        """Only these places, which rise. Copies no rows."""
        background = None if self.background is None else self.background[places]
        return Gallery(self.numbers[places], self.rows.part(places), background)


def on_all_cores(work: Callable[[int], None], items: Iterable[int]) -> None:
    """Call a function with each item, each in a thread of its own; the first error is raised.

    Without `concurrent.futures`, whose import takes longer than the work of a single query.
    """
    errors: list[Exception] = []

    def attempt(item: int) -> None:
        try:
            work(item)
        except Exception as error:
            errors.append(error)

    threads = [Thread(target=attempt, args=(item,)) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def vectors_file(store: Path) -> Path:
    """Where the vectors of a store lie."""
    return store.with_name(f"{store.name}.vectors")


def open_gallery(store: PhotoStore, calibration: Calibration | None) -> Gallery:
    """The vectors of a store; from the derived file if it is good, else made anew and kept there."""
    path = vectors_file(store.derived)
    mark = {"format": FORMAT, "calibration": calibration.fingerprint + calibration.split_hash if calibration else None}
    gallery = read_gallery(path, {**mark, "content": store.content})
    if gallery is None:
        content, numbers, rows = store.vectors()
        background = calibration.background(rows) if calibration and len(rows) else None
        gallery = Gallery(numbers, Rows(rows), background)
        with contextlib.suppress(OSError):  # a read-only place, a full disk: it is searched from memory then
            write_gallery(path, gallery, {**mark, "content": content})
            gallery = read_gallery(path, {**mark, "content": content}) or gallery
    return gallery


def read_gallery(path: Path, mark: dict[str, Any]) -> Gallery | None:
    """The file's arrays, its rows still in it; None if there is none, it is of something else, or damaged."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(HEADER))
            count, dim, checksum = header.pop("count"), header.pop("dim"), header.pop("checksum")
            with_background = header.pop("background")
            if header != mark:
                return None
            small = np.fromfile(file, np.uint8, 16 * count + padded(4 * count if with_background else 0))
            start = HEADER + len(small)
            if sum_of(small) != checksum or os.fstat(file.fileno()).st_size != start + 4 * count * dim:
                return None
            descriptor = os.dup(file.fileno())
        numbers, checksums = small[: 8 * count].view(np.int64), small[8 * count : 16 * count].view(np.uint64)
        background = small[16 * count :].view(np.float32)[:count] if with_background else None
        return Gallery(numbers, StoredRows(path, descriptor, start, dim, checksums), background)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def write_gallery(path: Path, gallery: Gallery, mark: dict[str, Any]) -> None:
    """The file in one step: written beside, put on the disk, moved into place."""
    checksums = [checksums_of(rows) for rows in in_blocks(gallery.rows)]
    parts = [gallery.numbers.tobytes(), *(part.tobytes() for part in checksums)]
    if gallery.background is not None:
        parts.append(gallery.background.astype(np.float32).tobytes())
    small = b"".join(parts)
    small += bytes(padded(len(small)) - len(small))
    count, dim = gallery.rows.shape
    header = {**mark, "count": count, "dim": dim, "background": gallery.background is not None}
    header["checksum"] = sum_of(np.frombuffer(small, np.uint8))
    with atomic_file(path) as draft, draft.open("wb") as file:
        file.write(json.dumps(header).encode().ljust(HEADER))
        file.write(small)
        for rows in in_blocks(gallery.rows):
            file.write(np.ascontiguousarray(rows, np.float32).data)


def are_among(values: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which values [n] are among others, which rise."""
    at = np.minimum(np.searchsorted(others, values), len(others) - 1)
    return others[at] == values if len(others) else np.zeros(len(values), bool)


def in_blocks(rows: Rows) -> Iterator[NDArray[np.float32]]:
    """All rows, some at a time."""
    return (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))


def padded(size: int) -> int:
    """Bytes, up to whole words of 8."""
    return -(-size // 8) * 8


def checksums_of(rows: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Rows [n, d] -> [n]: the sum of each row's words."""
    words = np.ascontiguousarray(rows, np.float32).view(np.uint32 if rows.shape[1] % 2 else np.uint64)
    sums: NDArray[np.uint64] = np.add.reduce(words, axis=1, dtype=np.uint64)
    return sums


def sum_of(data: NDArray[np.uint8]) -> int:
    """Checksum of whole words of 8 bytes: their sum."""
    return int(np.add.reduce(data.view(np.uint64), dtype=np.uint64)) if len(data) else 0
