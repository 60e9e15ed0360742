"""A query against a gallery -> the photographs that match it, best first.

In: a `Collection` with its store, a `Query`, a model. Out: `Match` rows, which draw themselves as a grid in a notebook.
Knows nothing of folders on disk or of training. Shapes: n photographs, d numbers a row, t terms of the query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clipmatch.calibration import Calibration
from clipmatch.collection import Collection, Narrowed
from clipmatch.duplicates import stack_places
from clipmatch.embedder import Embedder
from clipmatch.errors import ClipmatchError, Failure
from clipmatch.photo import Photo
from clipmatch.query import Query
from clipmatch.storage import PhotoStore
from clipmatch.store import Filter
from clipmatch.vectors import Gallery

Stacking: TypeAlias = Literal["show", "stack", "hide"]
Order: TypeAlias = Callable[[int], NDArray[np.int64]]  # at most so many places, best first

FUSION = 60  # constant of reciprocal rank fusion
WORDS = 1000  # photographs that the words of names and captions contribute at most
POOL = 10  # candidates for each match that is shown, for they may be near-duplicates of each other
CANDIDATES = 1000  # rows of a very large gallery that are looked at
EXACT = 100  # of them that are compared exactly, and as many more as a page may need
BLOCK = 100  # matches that are put in order together, where they are to differ from each other
RELEVANCE = 0.5  # weight of relevance against novelty


@dataclass(frozen=True)
class Match:
    """A photograph that matches.

    score: the cosine, in -1..1, of its embedding with the query's; for a query of sentences and examples together the
    weighted mean of their standardised cosines. confidence: the probability, in 0..1, that it is what the query
    describes; None if the model is not calibrated, or the query has an example. photo: what the index knows of it.
    duplicates: near-duplicates that are stacked below it.
    """

    path: Path
    score: float
    confidence: float | None = None
    photo: Photo | None = None
    duplicates: tuple[Path, ...] = ()

    def row(self) -> dict[str, Any]:
        """All of it as one flat row, for tables: `pandas.DataFrame(match.row() for match in matches)`."""
        known = self.photo.row() if self.photo else {}
        found = {"path": str(self.path), "score": self.score, "confidence": self.confidence}
        return {**found, **known, **found, "duplicates": [str(path) for path in self.duplicates]}


class Matches(list[Match]):
    """Matches, best first. In a notebook they show as a grid of pictures.

    failures: images that could not be read. best: the best match, also if its confidence was too low to be listed.
    searched: photographs that passed the filter. vetoed: how many of them show what was excluded.
    """

    def __init__(
        self,
        query: str,
        matches: Sequence[Match],
        failures: Sequence[Failure] = (),
        best: Match | None = None,
        searched: int = 0,
        vetoed: int = 0,
    ):
        super().__init__(matches)
        self.query = query
        self.failures = list(failures)
        self.best = best or (matches[0] if matches else None)
        self.searched, self.vetoed = searched, vetoed

    def _repr_png_(self) -> bytes | None:
        import io

        from clipmatch.report import match_grid

        if not self:
            return None
        buffer = io.BytesIO()
        match_grid(self.query, self).savefig(buffer, format="png", dpi=80, bbox_inches="tight")
        return buffer.getvalue()


@dataclass(frozen=True)
class Request:
    """How to search.

    exclude: what must not be shown. where: which photographs take part. top_k, page: how many, from which on; page 1 is
    the first. min_confidence: leave out what is less probable. hybrid: words of names and captions take part.
    diverse: prefer matches that differ from each other. duplicates: show each, stack them below the best, or hide them.
    """

    exclude: tuple[str, ...] = ()
    where: Filter = field(default_factory=Filter)
    top_k: int = 9
    page: int = 1
    min_confidence: float | None = None
    hybrid: bool = False
    diverse: bool = False
    duplicates: Stacking = "stack"

    def __post_init__(self) -> None:
        if self.top_k < 1 or self.page < 1:
            name = "top_k" if self.top_k < 1 else "page"
            raise ClipmatchError(f"{name} is {getattr(self, name)}; it starts at 1.")


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores [n] and, for a calibrated model and a query of sentences, confidences [n] of a gallery."""

    scores: NDArray[np.float32]
    confidences: NDArray[np.float64] | None

    def best(self, most: int, among: NDArray[np.bool_]) -> NDArray[np.int64]:
        """At most so many of the places that are marked [n], best first: confidence allows for photographs that are
        near to every sentence.
        """
        places = np.flatnonzero(among)
        values = (self.scores if self.confidences is None else self.confidences)[places]
        if most < len(places):  # sorting all takes far longer than finding the best
            good = values >= np.partition(values, -most)[-most]
            places, values = places[good], values[good]
        return places[np.lexsort((-self.scores[places], -values))][:most]


def search(
    store: PhotoStore,
    collection: Collection,
    embedder: Embedder,
    calibration: Calibration | None,
    query: Query,
    request: Request,
) -> Matches:
    """The photographs of an index that match a query best.

    Raises ClipmatchError when confidence or exclusion is asked of a model that is not calibrated.
    """
    need_calibration(calibration, query, request)
    searched = collection.count(request.where)
    if not searched:
        return Matches(str(query), [])
    rows = query.vectors(embedder)
    named = np.array(store.named(query.text, WORDS) if request.hybrid and query.text else [], np.int64)
    targets = rows if query.is_mixed else sum_of_terms(query, rows)[None]
    narrow = collection.narrowed(targets, request.where, named, candidates(request))
    if narrow is not None:
        gallery, ranking = narrow.gallery, rank_narrowed(narrow, rows, query, calibration, searched, request)
    else:
        gallery = collection.all_of(request.where)
        ranking = rank(gallery, rows, query, calibration)
    shown = ~permitted(gallery, embedder, calibration, request.exclude)
    vetoed = int(np.count_nonzero(shown))
    best = list(ranking.best(1, ~shown)[:, None])
    among = ~shown
    if request.min_confidence is not None and ranking.confidences is not None:
        among &= ranking.confidences >= request.min_confidence
    order: Order = partial(ranking.best, among=among)
    if len(named):
        places = gallery.places(named)
        order = order_of(fuse(order(len(gallery)), places[among[places]]))
    found = matches_of(store, gallery, ranking, best + arrange(store, gallery, order, request))
    top = found[0] if best else None
    return Matches(str(query), found[len(best) :], best=top, searched=searched, vetoed=vetoed)


def candidates(request: Request) -> int:
    """How many rows of a very large gallery are worth looking at."""
    return max(CANDIDATES, request.page * request.top_k * POOL)


def need_calibration(calibration: Calibration | None, query: Query, request: Request) -> None:
    """Raise ClipmatchError for what an uncalibrated model, or a query with examples, can't give."""
    wanted = "confidence" if request.min_confidence is not None else "what a photograph does not show"
    if calibration is None and (request.min_confidence is not None or request.exclude):
        raise ClipmatchError(
            f"This model is not calibrated, so it knows nothing of {wanted}; run clipmatch evaluate with it once, on "
            "captioned pictures that it was not trained on."
        )
    if request.min_confidence is not None and not query.is_text:
        raise ClipmatchError("Confidence is known for sentences only; leave out --min-confidence or the example.")


def rank(gallery: Gallery, rows: NDArray[np.float32], query: Query, calibration: Calibration | None) -> Ranking:
    """Terms' unit rows [t, d] -> how well each photograph matches.

    Sentences, or examples, are added up as vectors. Cosines of a sentence are of another size than those of an
    example, so where both occur each term's are standardised over the gallery first.
    """
    if query.is_mixed:
        cosines = gallery.rows.cosines(rows)
        return rank_mixed(cosines, cosines, query)
    row = sum_of_terms(query, rows)
    scores = gallery.rows.cosines(row)
    if calibration is None or gallery.background is None or not query.is_text:
        return Ranking(scores, None)
    evidence = calibration.evidence(row)(scores, gallery.background)
    return Ranking(scores, calibration.choose(evidence, gallery.rows, len(gallery)))


def rank_mixed(cosines: NDArray[np.float32], all_cosines: NDArray[np.float32], query: Query) -> Ranking:
    """Cosines [n, t] with each term, standardised by what is usual among all [m, t], and added up by weight."""
    spread = np.maximum(all_cosines.std(axis=0), 1e-6)
    return Ranking((cosines - all_cosines.mean(axis=0)) / spread @ (query.weights / query.weights.sum()), None)


def rank_narrowed(
    narrow: Narrowed,
    rows: NDArray[np.float32],
    query: Query,
    calibration: Calibration | None,
    searched: int,
    request: Request,
) -> Ranking:
    """The same for what was narrowed from `searched` photographs, whose best are compared exactly."""
    if query.is_mixed:
        return rank_mixed(narrow.gallery.rows.cosines(rows), narrow.rest.rows.cosines(rows), query)
    gallery, row = narrow.gallery, sum_of_terms(query, rows)
    most = EXACT + request.page * request.top_k * POOL
    if calibration is None or gallery.background is None or narrow.rest.background is None or not query.is_text:
        return Ranking(refined(gallery, row, narrow.rough, narrow.rough, most), None)
    weigh = calibration.evidence(row)
    scores = refined(gallery, row, narrow.rough, weigh(narrow.rough, gallery.background), most)
    sample = weigh(narrow.rest.rows.cosines(row), narrow.rest.background)
    evidence = weigh(scores, gallery.background)
    return Ranking(scores, calibration.choose(evidence, gallery.rows, searched, sample))


def refined(
    gallery: Gallery, row: NDArray[np.float32], rough: NDArray[np.float32], values: NDArray[Any], most: int
) -> NDArray[np.float32]:
    """Rough cosines [n] -> [n], those with the highest values [n] compared exactly."""
    best = np.sort(np.argpartition(-values, most)[:most]) if most < len(rough) else np.arange(len(rough))
    scores: NDArray[np.float32] = rough.copy()
    scores[best] = gallery.rows[best] @ row
    return scores


def sum_of_terms(query: Query, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Terms' unit rows [t, d] -> one unit row [d], each term by its weight."""
    row: NDArray[np.float32] = query.weights @ rows
    return row / max(float(np.linalg.norm(row)), 1e-6)


def permitted(
    gallery: Gallery, embedder: Embedder, calibration: Calibration | None, exclude: Sequence[str]
) -> NDArray[np.bool_]:
    """Which photographs [n] show nothing of what is excluded."""
    allowed = np.ones(len(gallery), bool)
    if exclude and calibration:
        from clipmatch.exclusion import shows

        for shown in shows(embedder, calibration, gallery.rows, exclude):
            allowed &= ~shown
    return allowed


def fuse(*orders: NDArray[np.int64]) -> NDArray[np.int64]:
    """Several orders of places -> one, by reciprocal ranks (Cormack et al., SIGIR 2009)."""
    points: dict[int, float] = {}
    for order in orders:
        for rank, place in enumerate(order.tolist(), 1):
            points[place] = points.get(place, 0.0) + 1 / (FUSION + rank)
    return np.array(sorted(points, key=lambda place: -points[place]), np.int64)


def order_of(places: NDArray[np.int64]) -> Order:
    """The order of places that are in order already."""
    return lambda most: places[:most]


def arrange(store: PhotoStore, gallery: Gallery, order: Order, request: Request) -> list[NDArray[np.int64]]:
    """The order of the places -> those of the page that is asked for, each with the near-duplicates below it.

    Whatever the pages' size, one page goes on where the one before has ended.
    """
    most = request.page * request.top_k
    needed = -(-most // BLOCK) * BLOCK if request.diverse else most
    if request.duplicates == "show":
        stacks = list(order(needed)[:, None])
    else:
        stacks = make_stacks(store, gallery, order, needed)
    if request.diverse:
        blocks = [stacks[at : at + BLOCK] for at in range(0, len(stacks), BLOCK)]
        stacks = [
            block[at] for block in blocks for at in diversify(gallery.rows[np.array([stack[0] for stack in block])])
        ]
    if request.duplicates == "hide":
        stacks = [stack[:1] for stack in stacks]
    return stacks[most - request.top_k : most]


def make_stacks(store: PhotoStore, gallery: Gallery, order: Order, most: int) -> list[NDArray[np.int64]]:
    """The order of the places -> `most` stacks of near-duplicates, or as many as there are."""
    size = most * POOL
    while True:
        pool = order(size)
        stacks = stack_places(pool, gallery.rows[pool], store.hashes(gallery.numbers[pool]), most)
        if len(stacks) == most or len(pool) < size:
            return stacks
        size *= 4


def diversify(rows: NDArray[np.float32]) -> list[int]:
    """Rows [p, d], best first -> all their places, first those that are good and differ from the ones before.

    Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998). Relevance falls evenly with the rank, for cosines
    with a sentence and among photographs are of different sizes; likeness is measured from the mean to 1.
    """
    relevance = 1 - np.arange(len(rows)) / max(len(rows), 1)
    alike = rows @ rows.T  # [p, p]
    floor = float(alike.mean())
    novelty = np.ones(len(rows))
    left = np.ones(len(rows), bool)
    chosen: list[int] = []
    while left.any():
        value = np.where(left, RELEVANCE * relevance + (1 - RELEVANCE) * novelty, -np.inf)
        best = int(np.argmax(value))
        left[best] = False
        chosen.append(best)
        novelty = np.minimum(novelty, 1 - np.clip((alike[best] - floor) / max(1 - floor, 1e-6), 0, 1))
    return chosen


def matches_of(
    store: PhotoStore, gallery: Gallery, ranking: Ranking, stacks: Sequence[NDArray[np.int64]]
) -> list[Match]:
    """Stacks of places, in each the best first -> their matches, their photographs looked up together."""
    numbers = gallery.numbers[np.concatenate(stacks)].tolist() if stacks else []
    photos = iter(store.photos_of(numbers))
    return [match_of(ranking, int(stack[0]), list(islice(photos, len(stack)))) for stack in stacks]


def match_of(ranking: Ranking, place: int, photos: Sequence[Photo]) -> Match:
    """The place of the best photograph of a stack, and all of them -> the match."""
    confidence = None if ranking.confidences is None else float(ranking.confidences[place])
    photo, *below = photos
    return Match(photo.path, float(ranking.scores[place]), confidence, photo, tuple(other.path for other in below))
