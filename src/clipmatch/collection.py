"""What a search looks at: all photographs that pass a filter, or of very many those that are probably nearest.

In: filters, rows [t, d] of a query. Out: galleries. Knows nothing of ranking. A store may bring a `Collection` of its
own; of any other it is its derived files, opened here (vectors.py, approximate.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from clipmatch.approximate import Approximate, Passing, open_approximate
from clipmatch.store import Filter
from clipmatch.vectors import Gallery, are_among, open_gallery

if TYPE_CHECKING:
    from clipmatch.calibration import Calibration
    from clipmatch.storage import PhotoStore

FILTERS = 4  # whose places are remembered, for a page follows another


@dataclass(frozen=True, eq=False)
class Narrowed:
    """Of a very large gallery: what is worth looking at, with rough cosines [n], and a sample of the rest."""

    gallery: Gallery
    rough: NDArray[np.float32]
    rest: Gallery


class Collection(Protocol):
    """The photographs of an index at one moment, as a search sees them."""

    def count(self, where: Filter) -> int:
        """How many pass a filter."""
        ...

    def all_of(self, where: Filter) -> Gallery:
        """All that pass. Raises ClipmatchError where they are too many to be looked at one by one."""
        ...

    def narrowed(
        self, targets: NDArray[np.float32], where: Filter, named: NDArray[np.int64], most: int
    ) -> Narrowed | None:
        """About `most` that pass and are probably nearest to one of the unit rows [t, d], and the photographs with the
        numbers `named` [m]; None where all that pass should be compared.
        """
        ...

    def sample(self, most: int) -> NDArray[np.float32]:
        """Rows [r, d] drawn at random, but always the same, that stand for all."""
        ...


@dataclass(frozen=True, eq=False)
class DerivedFiles:
    """The `Collection` of a store whose vectors lie in a file here. near: finds candidates among very many.

    passing: what filters let pass; the last are remembered.
    """

    store: PhotoStore
    gallery: Gallery
    near: Approximate | None
    passing: dict[Filter, Passing] = field(default_factory=dict)
    turn: Lock = field(default_factory=Lock)

    def count(self, where: Filter) -> int:
        """How many pass a filter."""
        passing = self.those_passing(where)
        return len(self.gallery) if passing is None else len(passing.places)

    def all_of(self, where: Filter) -> Gallery:
        """All that pass; copies no rows, unless they are few."""
        passing = self.those_passing(where)
        return self.gallery if passing is None else passing.part_of(self.gallery)

    def narrowed(
        self, targets: NDArray[np.float32], where: Filter, named: NDArray[np.int64], most: int
    ) -> Narrowed | None:
        """Candidates of the approximate index for a query of one row; None without an index, or where few pass."""
        passing = self.those_passing(where)
        few = passing is not None and passing.are_few
        if self.near is None or few or len(targets) > 1 or self.count(where) <= most:
            return None
        return narrow(self.gallery, self.near, targets[0], passing, named, most)

    def sample(self, most: int) -> NDArray[np.float32]:
        """Rows drawn at random, but always the same."""
        if not len(self.gallery):
            return np.empty((0, self.gallery.rows.shape[1]), np.float32)
        places = np.random.default_rng(0).choice(len(self.gallery), min(most, len(self.gallery)), replace=False)
        return self.gallery.rows[np.sort(places)]

    def those_passing(self, where: Filter) -> Passing | None:
        """What passes a filter; None without one."""
        if not where:
            return None
        found = self.passing.get(where)
        if found is None:
            found = Passing(self.gallery.places(self.store.numbers(where)))
            with self.turn:
                for oldest in list(self.passing)[: 1 - FILTERS]:
                    del self.passing[oldest]
                self.passing[where] = found
        return found


def open_collection(store: PhotoStore, calibration: Calibration | None) -> Collection:
    """What the photographs of a store are searched by, as it is now."""
    own = store.collection(calibration)
    if own is not None:
        return own
    gallery = open_gallery(store, calibration)
    return DerivedFiles(store, gallery, open_approximate(store.derived, store.content, gallery))


def narrow(
    gallery: Gallery,
    near: Approximate,
    row: NDArray[np.float32],
    passing: Passing | None,
    named: NDArray[np.int64],
    most: int,
) -> Narrowed:
    """What is probably nearest of the places that pass a filter, and the photographs with these numbers."""
    places, cosines = near.nearest(row, most, passing)
    if len(named):
        others = np.setdiff1d(gallery.places(named), places)
        if passing is not None:
            others = others[are_among(others, passing.places)]
        places = np.concatenate([places, others])
        order = np.argsort(places)
        places, cosines = places[order], np.concatenate([cosines, gallery.rows[others] @ row])[order]
    left = ~are_among(near.drawn, places)
    if passing is not None:
        left &= are_among(near.drawn, passing.places)
    return Narrowed(gallery.part(places), cosines, near.sample.part(np.flatnonzero(left)))
