"""The search of very many photographs in Lance tables: candidates come from its index, and nothing is copied here.

In: filters, rows [t, d] of a query. Out: galleries in memory; a `Collection`. Knows nothing of ranking.

The index is IVF_RQ (one bit a number, RaBitQ; Gao and Long, SIGMOD 2024), `REFINE` times the candidates are compared
exactly. With a filter as many parts of it are looked into as it takes: where few pass, those are anywhere. What passes
a narrow filter is compared as a whole.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipmatch import approximate
from clipmatch.collection import Narrowed
from clipmatch.errors import ClipmatchError
from clipmatch.lancerows import among, condition_of
from clipmatch.store import Filter
from clipmatch.vectors import Gallery, Rows, are_among

if TYPE_CHECKING:
    from clipmatch.calibration import Calibration
    from clipmatch.lancestore import LanceStore

PROBES = 50  # parts of the index that a query without a filter looks into
REFINE = 5  # times the candidates: compared exactly
FILTERS = 4  # whose samples are remembered


class LanceCollection:
    """The `Collection` of a `LanceStore`, of the version that it had when this was made."""

    def __init__(self, store: LanceStore, calibration: Calibration | None):
        self.store, self.calibration = store, calibration
        self.total = len(store)
        drawn = np.random.default_rng(0).choice(self.total, min(approximate.SAMPLE, self.total), replace=False)
        self.drawn = self._gallery(*store.rows_at(np.sort(drawn)))
        self._drawn_passing = lru_cache(FILTERS)(self._drawn_passing_uncached)

    def count(self, where: Filter) -> int:
        """How many pass a filter."""
        return self.store.count(where) if where else self.total

    def all_of(self, where: Filter) -> Gallery:
        """All that pass, in memory. Raises ClipmatchError where they are too many for that."""
        count = self.count(where)
        if count > approximate.LEAST:
            raise ClipmatchError(
                f"These are {count:,} photographs, more than the {approximate.LEAST:,} that can be looked at one by "
                "one here; choose among them with a filter, such as --folder or --after."
            )
        return self._gallery(*self.store.rows_where(condition_of(where)))

    def narrowed(
        self, targets: NDArray[np.float32], where: Filter, named: NDArray[np.int64], most: int
    ) -> Narrowed | None:
        """Candidates of the index for each of the rows; None where no more pass than are looked at anyway."""
        count = self.count(where)
        if count <= min(most, approximate.LEAST):
            return None
        condition = condition_of(where)
        probes = None if count <= approximate.FEW else 0 if where else PROBES
        found = [self.store.nearest(row, most, condition, probes, REFINE) for row in targets]
        if len(named):
            chosen = among("id", named.tolist())
            found.append(self.store.rows_where(f"({chosen}) AND {condition}" if condition else chosen))
        numbers, first = np.unique(np.concatenate([numbers for numbers, _ in found]), return_index=True)
        gallery = self._gallery(numbers, np.concatenate([rows for _, rows in found])[first])
        rest = self._drawn_passing(where)
        rest = rest.part(np.flatnonzero(~are_among(rest.numbers, numbers)))
        return Narrowed(gallery, gallery.rows.cosines(targets[0]), rest)

    def sample(self, most: int) -> NDArray[np.float32]:
        """Rows drawn at random, but always the same."""
        return self.drawn.rows[:][:most]

    def _gallery(self, numbers: NDArray[np.int64], rows: NDArray[np.float32]) -> Gallery:
        background = self.calibration.background(rows).astype(np.float32) if self.calibration and len(rows) else None
        return Gallery(numbers, Rows(rows), background)

    def _drawn_passing_uncached(self, where: Filter) -> Gallery:
        """The photographs that were drawn at random, and pass."""
        if not where:
            return self.drawn
        condition = f"({among('id', self.drawn.numbers.tolist())}) AND {condition_of(where)}"
        numbers = np.sort(self.store.tables.read("photos", ["id"], condition)["id"].to_numpy().astype(np.int64))
        return self.drawn.part(self.drawn.places(numbers))
