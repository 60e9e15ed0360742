"""The rows of a very large gallery that are probably nearest to a query, without looking at all of them.

In: a gallery, a query's row [d]. Out: places in the gallery with their cosines, which the search then compares exactly.
Derived from the store like its vectors: STORE.CONTENT.ivf, where CONTENT is the store's token, so one that is out of
date is never read; without it every row is compared.

An inverted file of 8-bit rows (FAISS): of the kept libraries it finds the most at a million photographs, is built in
a minute and takes a quarter of the vectors' room (benchmarks/warm_query.py). It is mapped, so a process holds
what its queries have looked at. What passes a filter is compared as a whole if it is little. Else, where one row of s
passes, a query looks into s times as many lists: it compares as many rows as without, and finds as much; and it looks
into more until it has as many candidates as it wants.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipmatch.atomic import atomic_file
from clipmatch.runtime import usable_cores
from clipmatch.vectors import Gallery, Rows

LEAST = 300_000  # rows; fewer are compared exactly within 12 ms
LISTS = 4  # for each root of the number of rows
TRAINED = 40  # rows that each list is placed by
ADDED = 50_000  # rows read at once
PROBES = 48  # lists that a query looks into
SAMPLE = 4096  # photographs that stand for all that a query does not look at
FEW = 30_000  # rows that pass a filter: so many, or fewer, are all compared; they take 30 MB
MORE = 4  # times as many, where they held too few rows that pass


class Approximate:
    """An index that is open. May be used by several threads.

    drawn: some places, rising, taken at random. sample: the photographs at those.
    """

    def __init__(self, faiss: Any, index: Any, gallery: Gallery):
        self.faiss, self.index = faiss, index
        drawn = np.random.default_rng(0).choice(len(gallery), min(SAMPLE, len(gallery)), replace=False)
        self.drawn = np.sort(drawn)
        sample = gallery.part(self.drawn)
        self.sample = replace(sample, rows=Rows(sample.rows[:]))  # in memory
        with contextlib.suppress(AttributeError):  # an index that is not mapped
            # By default it starts 32 threads for each query, to read ahead; that takes longer than the query.
            faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0

    def nearest(
        self, row: NDArray[np.float32], most: int, passing: Passing | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """A unit row [d] -> rising places [m] of about `most` rows that are probably nearest, and their rough cosines.

        passing: the places among which to look; None: all.
        """
        self.faiss.omp_set_num_threads(1)  # of this thread: the lists are read before a second one has begun
        selector = None if passing is None else passing.selector(self.faiss, self.index.ntotal)
        share = 1.0 if passing is None else len(passing.places) / self.index.ntotal
        lists = self.index.nlist
        probes = min(lists, math.ceil(PROBES / share))
        while True:
            settings = self.faiss.SearchParametersIVF(sel=selector, nprobe=probes)
            cosines, places = self.index.search(row[None], most, params=settings)
            if probes == lists or places[0, -1] >= 0:
                break
            probes = min(lists, probes * MORE)
        good = np.flatnonzero((places[0] >= 0) & (places[0] < self.index.ntotal))
        good = good[np.argsort(places[0, good])]
        return places[0, good], cosines[0, good]


class Passing:
    """The places that pass a filter, rising, in the forms that searches want; kept, for a page follows another."""

    def __init__(self, places: NDArray[np.int64]):
        self.places, self.are_few = places, len(places) <= FEW
        self._selector: Any = None
        self._few: Gallery | None = None

    def part_of(self, gallery: Gallery) -> Gallery:
        """The photographs there; a few in memory."""
        if not self.are_few:
            return gallery.part(self.places)
        if self._few is None:
            part = gallery.part(self.places)
            self._few = replace(part, rows=Rows(part.rows[:]))
        return self._few

    def selector(self, faiss: Any, count: int) -> Any:
        """One bit for each of `count` places, for FAISS."""
        if self._selector is None:
            mask = np.zeros(count, bool)
            mask[self.places] = True
            self._selector = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
        return self._selector


def approximate_file(store: Path, content: str) -> Path:
    """Where the index of a store with that content token lies."""
    return store.with_name(f"{store.name}.{content}.ivf")


def build_approximate(store: Path, content: str, gallery: Gallery) -> bool:
    """Make the index of a large gallery, unless it is there, and remove older ones -> False where it can't be made:
    without FAISS (the extra `scale`), or on a full disk.
    """
    path = approximate_file(store, content)
    for other in store.parent.glob(f"{store.name}.*.ivf"):
        if other != path:
            with contextlib.suppress(OSError):
                other.unlink()
    if len(gallery) < LEAST or path.is_file():
        return True
    faiss = load_faiss()
    if faiss is None:
        return False
    try:
        with atomic_file(path) as draft:
            faiss.write_index(make_index(faiss, gallery), str(draft))
    except (OSError, RuntimeError):  # a full disk; faiss has no kind of its own
        return False
    return True


def make_index(faiss: Any, gallery: Gallery) -> Any:
    """A FAISS index of all rows."""
    faiss.omp_set_num_threads(usable_cores())
    lists = max(1, round(LISTS * len(gallery) ** 0.5))
    index = faiss.index_factory(gallery.rows.shape[1], f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    some = np.random.default_rng(0).permutation(len(gallery))[: TRAINED * lists]
    index.train(gallery.rows[np.sort(some)])
    for start in range(0, len(gallery), ADDED):
        index.add(gallery.rows[start : start + ADDED])
    return index


def open_approximate(store: Path, content: str, gallery: Gallery) -> Approximate | None:
    """The index of a gallery; None if it is small enough to be compared as a whole, or there is no good index."""
    path = approximate_file(store, content)
    faiss = load_faiss() if len(gallery) >= LEAST and path.is_file() else None
    if faiss is None:
        return None
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError:  # damaged
        return None
    return (
        Approximate(faiss, index, gallery) if (index.ntotal, index.d) == (len(gallery), gallery.rows.shape[1]) else None
    )


def load_faiss() -> Any:
    """The library; None where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss
