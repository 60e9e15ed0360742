"""Fitting a calibration, and measuring how far its probabilities are to be trusted.

In: unit rows of captioned pictures that the model was not trained on. Out: a `Calibration` with figures for pictures
that it was not fitted on. Captions are asked of simulated collections of many sizes, with and without their own
picture. Shapes: n pictures, m captions, c rows of a bank, d numbers a row, q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipmatch.calibration import Bank, Calibration, Floats
from clipmatch.errors import ClipmatchError
from clipmatch.exclusion_fit import PICTURES, Concept, fit_exclusion

Integers: TypeAlias = NDArray[np.int64]

BANK = 1000  # pictures of a bank, one caption each: more changes little, fewer costs some
GALLERIES = (1, 3, 10, 30, 100, 300, 1000)  # sizes of the simulated collections
QUERIES = 1000  # captions asked of collections of each size
RIDGE = 1.0  # against weights that run away where few pictures are perfectly separable
FEWEST = 20  # captioned pictures of a bank, of a fit and of its measurement
BINS = 10  # of a reliability curve
KEPT = 0.8  # of the right best answers, where a threshold is looked for


def make_bank(image_rows: ArrayLike, text_rows: ArrayLike, owners: ArrayLike, seed: int = 0) -> Bank:
    """Captioned pictures [n, d], [m, d], the picture of each caption [m] -> a bank of at most 1,000 of them.

    One caption of each: further captions of the same pictures add little that is new.
    """
    images, texts, owner = _checked(image_rows, text_rows, owners)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(images))[:BANK]
    order = rng.permutation(len(owner))
    order = order[np.isin(owner[order], chosen)]
    _, first = np.unique(owner[order], return_index=True)  # of each picture's captions a random one
    return Bank(images[chosen].astype(np.float16), texts[order[first]].astype(np.float16))


def calibrate(
    image_rows: ArrayLike,
    text_rows: ArrayLike,
    owners: ArrayLike,
    bank: Bank | None = None,
    *,
    concepts: Sequence[Concept] = (),
    fingerprint: str,
    split_hash: str = "",
    seed: int = 0,
) -> Calibration:
    """Captioned pictures that the model was not trained on -> its calibration, with figures for held-out pictures.

    Rows [n, d] and [m, d], the picture of each caption [m]. bank: of yet other pictures; None takes a third of these.
    concepts: what `find_concepts` found in the captions; without them nothing can be excluded.
    The figures come from two more fits, each on one half of the pictures and measured on the other.

    Raises ClipmatchError on rows that are not finite or don't fit, and if there are too few pictures.
    """
    rows = _checked(image_rows, text_rows, owners)
    needed = FEWEST * (2 if bank else 3)
    if len(rows[0]) < needed:
        raise ClipmatchError(f"{len(rows[0])} captioned pictures are too few to calibrate with; give {needed} or more.")
    order = np.random.default_rng(seed).permutation(len(rows[0]))
    if bank is None:
        aside, order = np.split(order, [len(order) // 3])
        bank = make_bank(*only(aside, *rows), seed)
    halves = [only(half, *rows) for half in np.array_split(order, 2)]
    sizes = gallery_sizes(len(order) // 2)
    measured = [
        ask(fit(*here, bank, fingerprint=fingerprint, seed=seed), *there, sizes=sizes, seed=seed)
        for here, there in (halves, halves[::-1])
    ]
    calibration = fit(*only(order, *rows), bank, fingerprint=fingerprint, seed=seed)
    seen = order[:PICTURES]
    exclusion = fit_exclusion(calibration, rows[0][seen], [concept.among(seen) for concept in concepts])
    return replace(calibration, split_hash=split_hash, figures=figures_of(join(measured)), exclusion=exclusion)


def fit(
    image_rows: ArrayLike, text_rows: ArrayLike, owners: ArrayLike, bank: Bank, *, fingerprint: str, seed: int = 0
) -> Calibration:
    """Captioned pictures, none of them in the bank -> a calibration without figures.

    Their captions are asked of simulated collections of several sizes, which hold the caption's own picture or lack
    it. Only that picture counts as right. This is strict, for another may fit as well, so the probabilities err on the
    low side.
    """
    images, texts, owner = _checked(image_rows, text_rows, owners)
    draft = Calibration((0.0, 0.0, 0.0, 0.0), likeness(bank.pictures), bank, fingerprint)
    background, familiarity = draft.background(images), draft.familiarity(texts)
    rng, designs = np.random.default_rng(seed), []
    for size in gallery_sizes(len(images)):
        queries, galleries = simulate(owner, len(images), size, rng)
        scores = np.take_along_axis(texts[queries] @ images.T, galleries, axis=1)
        query = np.broadcast_to(familiarity[queries, None], scores.shape)
        designs.append(np.stack([np.ones_like(scores), scores, background[galleries], query], axis=-1))
    return replace(draft, weights=fit_weights(designs))


def only(pictures: Integers, images: Floats, texts: Floats, owner: Integers) -> tuple[Floats, Floats, Integers]:
    """These pictures [k] with their captions -> images, texts and owners of them alone."""
    place = np.full(len(images), -1)
    place[pictures] = np.arange(len(pictures))
    kept = place[owner] >= 0
    return images[pictures], texts[kept], place[owner[kept]]


def likeness(pictures: NDArray[np.float16]) -> float:
    """Pictures [c, d] -> the median cosine of one with its nearest other: how alike two of one kind of scene are."""
    rows = pictures.astype(np.float32)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -1)
    return float(np.median(cosines.max(axis=1)))


def gallery_sizes(pictures: int) -> list[int]:
    """The sizes of collection that so many pictures can make, with one to spare."""
    return sorted({min(size, pictures - 1) for size in GALLERIES})


def simulate(owner: Integers, pictures: int, size: int, rng: np.random.Generator) -> tuple[Integers, Integers]:
    """Up to 1,000 random captions [q] and pictures for each [q, 1 + size]: first its own, then others at random.

    All but the last are a collection that holds the answer, all but the first one of the same size that lacks it.
    """
    queries = rng.permutation(len(owner))[:QUERIES]
    others = np.stack([rng.choice(pictures - 1, size, replace=False) for _ in queries])
    others += others >= owner[queries, None]  # skips its own
    return queries, np.column_stack([owner[queries], others])


def fit_weights(designs: Sequence[Floats]) -> tuple[float, float, float, float]:
    """Features [q, 1 + size, 4] of `simulate`'s pictures, a constant 1 and the cosine first -> their weights."""
    flat = np.concatenate([design.reshape(-1, 4) for design in designs]).astype(np.float64)
    centre, scale = flat.mean(axis=0), flat.std(axis=0)
    centre[0], scale[0] = 0, 1
    scale[scale == 0] = 1
    ready = [(design - centre) / scale for design in designs]
    weights = _most_likely(ready)
    if weights[1] <= 0:  # cosines that say nothing, or the opposite: what is left is how often the answer is there
        weights[0], weights[1:] = _most_likely([design[..., :1] for design in ready])[0], 0
    constant, cosine, picture, query = (float(weight) for weight in weights / scale)
    return constant - float(centre[1:] @ (weights / scale)[1:]), cosine, picture, query


def _most_likely(designs: Sequence[NDArray[np.float64]], steps: int = 100) -> NDArray[np.float64]:
    """Newton's method on the likelihood with a ridge; the constant goes free."""
    size = designs[0].shape[-1]
    ridge = np.diag([1e-6] + [RIDGE] * (size - 1))
    weights, step, best = np.zeros(size), np.zeros(size), -np.inf
    for _ in range(steps):
        tried = weights + step
        value, slope, bend = _likelihood(designs, tried)
        value -= 0.5 * float(tried @ ridge @ tried)
        if value < best:  # too far
            step = step / 2
            continue
        gain, weights, best = value - best, tried, value
        if gain < 1e-6:
            break
        step = np.linalg.solve(bend + ridge, slope - ridge @ weights).astype(np.float64)
    return weights


def _likelihood(
    designs: Sequence[NDArray[np.float64]], weights: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Log-likelihood of the right choices, its gradient, and its curvature with the sign turned."""
    size = len(weights)
    value, slope, bend = 0.0, np.zeros(size), np.zeros((size, size))
    for design in designs:
        for gallery, right in ((design[:, :-1], 1.0), (design[:, 1:], 0.0)):  # the answer is first, or "none"
            evidence, none = gallery @ weights, float(np.log(gallery.shape[1]))  # [q, n]
            top = np.maximum(evidence.max(axis=1), none)
            total = top + np.log(np.exp(evidence - top[:, None]).sum(axis=1) + np.exp(none - top))  # [q]
            chance = np.exp(evidence - total[:, None])
            expected = np.einsum("qn,qnk->qk", chance, gallery)
            value += float((right * evidence[:, 0] + (1 - right) * none - total).sum())
            slope += (right * gallery[:, 0] - expected).sum(axis=0)
            weighted = (gallery * chance[..., None]).reshape(-1, size)
            bend += weighted.T @ gallery.reshape(-1, size) - expected.T @ expected
    return value, slope, bend


# Measuring


@dataclass(frozen=True, eq=False)
class Answers:
    """The best answer to each of k queries: its probability, whether it is right, and whether a right one was there.

    size: of the collection that was asked.
    """

    probability: NDArray[np.float64]
    right: NDArray[np.bool_]
    present: NDArray[np.bool_]
    size: Integers

    def among(self, chosen: NDArray[np.bool_]) -> Answers:
        """The chosen ones [k] alone."""
        return Answers(self.probability[chosen], self.right[chosen], self.present[chosen], self.size[chosen])


def join(parts: Sequence[Answers]) -> Answers:
    """Several sets of answers as one."""
    names = ("probability", "right", "present", "size")
    return Answers(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def ask(
    calibration: Calibration,
    image_rows: ArrayLike,
    text_rows: ArrayLike,
    owners: ArrayLike,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
) -> Answers:
    """Captions of pictures that it has not seen, asked of simulated collections with and without their own picture."""
    images, texts, owner = _checked(image_rows, text_rows, owners)
    background, rng, found = calibration.background(images), np.random.default_rng(seed), []
    for size in sizes or gallery_sizes(len(images)):
        for query, pictures in zip(*simulate(owner, len(images), size, rng), strict=True):
            for gallery in (pictures[:-1], pictures[1:]):
                chances = calibration.probabilities(texts[query], images[gallery], background[gallery])
                present = gallery[0] == pictures[0]
                right = present and (chances[1:] < chances[0]).all()  # a tie counts as wrong
                found.append((chances.max(), right, present, size))
    probability, right, present, asked = zip(*found, strict=True)
    return Answers(np.array(probability), np.array(right), np.array(present), np.array(asked))


def figures_of(answers: Answers) -> dict[str, Any]:
    """Reliability and error over all sizes of collection, and what a threshold does at each of them, as plain JSON."""
    bins, error = reliability(answers.probability, answers.right)
    sizes = {int(size): answers.among(answers.size == size) for size in np.unique(answers.size)}
    return {"ece": error, "reliability": bins, "galleries": {str(size): silence(part) for size, part in sizes.items()}}


def silence(answers: Answers) -> dict[str, float]:
    """How answers fare under a threshold, fractions of 1.

    right: of the best answers, where a right one was there. kept@0.5: of those right ones, how many have a probability
    of 0.5 or more; nothing@0.5: of the queries without a right answer, how many get nothing. threshold: the one that
    keeps 80 % of the right best answers; nothing: what it gives. both: the most that both shares reach together.
    """
    right, absent = np.sort(answers.probability[answers.right]), np.sort(answers.probability[~answers.present])
    figures = {
        "right": float(answers.right[answers.present].mean()),
        "ece": reliability(answers.probability, answers.right)[1],
    }
    if not len(right) or not len(absent):
        return figures

    def shares(threshold: float) -> tuple[float, float]:
        """Of the right ones, how many stay; of the absent ones, how many get nothing."""
        kept = 1 - int(np.searchsorted(right, threshold)) / len(right)
        return kept, int(np.searchsorted(absent, threshold)) / len(absent)

    threshold = float(np.quantile(right, 1 - KEPT))
    figures["kept@0.5"], figures["nothing@0.5"] = shares(0.5)
    figures["threshold"], figures["nothing"] = threshold, shares(threshold)[1]
    figures["both"] = max(min(shares(value)) for value in right)
    return figures


def reliability(probabilities: ArrayLike, truths: ArrayLike, bins: int = BINS) -> tuple[list[dict[str, float]], float]:
    """Probabilities [k] and what came true [k] -> the reliability curve and the expected calibration error.

    A bin of the curve has its bounds, its count, the mean probability in it and the share that came true; the error is
    the mean distance of the last two, weighted by the count (Naeini et al., AAAI 2015; Guo et al., ICML 2017). Empty
    bins are left out.
    """
    chances, true = np.asarray(probabilities, np.float64), np.asarray(truths, np.float64)
    if chances.shape != true.shape or not chances.size or not ((chances >= 0) & (chances <= 1)).all():
        raise ClipmatchError("Reliability needs a truth for each probability, each in 0..1, and at least one of them.")
    place = np.minimum((chances * bins).astype(int), bins - 1)
    curve = []
    for number in np.unique(place):
        here = place == number
        curve.append(
            {
                "low": float(number / bins),
                "high": float((number + 1) / bins),
                "count": int(here.sum()),
                "probability": float(chances[here].mean()),
                "share": float(true[here].mean()),
            }
        )
    error = sum(part["count"] * abs(part["probability"] - part["share"]) for part in curve) / len(chances)
    return curve, float(error)


def _checked(image_rows: ArrayLike, text_rows: ArrayLike, owners: ArrayLike) -> tuple[Floats, Floats, Integers]:
    images, texts = np.asarray(image_rows, np.float32), np.asarray(text_rows, np.float32)
    owner = np.asarray(owners)
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or owner.shape != (len(texts),):
        raise ClipmatchError(
            f"Pictures {images.shape}, captions {texts.shape} and owners {owner.shape} don't fit together; calibration "
            "needs [n, d], [m, d] and [m]."
        )
    if not (np.isfinite(images).all() and np.isfinite(texts).all()):
        raise ClipmatchError("Embeddings to calibrate with are not finite; use a checkpoint from before that.")
    if not len(texts) or owner.min() < 0 or owner.max() >= len(images):
        raise ClipmatchError(f"Each caption needs the number of its picture, 0 to {len(images) - 1}.")
    return images, texts, owner.astype(np.int64)
