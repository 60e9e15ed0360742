"""How sure a match is: the probability that a picture is the one that a query describes.

In: unit rows of a query and of the pictures searched; to fit, captioned pictures and a bank of others. Out: a number
in 0..1 for each picture. Knows nothing of models, files of pictures or PyTorch. Shapes: n pictures, m captions, c rows
of a bank, d numbers a row.

A cosine means little alone: some pictures are near to every sentence (hubs), some sentences to every picture. So each
picture's evidence is its cosine set against two backgrounds,

    e = w0 + w1 cosine + w2 background(picture) + w3 background(query),

where the background of a picture is the mean of its cosines with the nearest few captions of a bank, and that of a
query the same with the nearest few pictures. This is how speaker verification makes scores comparable (adaptive score
normalisation: Matejka et al., Interspeech 2017); its picture side is that of retrieval without hubs (NNN: Chowdhury et
al., EMNLP 2024). Either one picture of the collection is meant, or none is:

    P(picture i) = exp(e_i) / (n + sum_j exp(e_j)),

a conditional logit with "none" as one more choice (McFadden, 1974). That choice weighs as much as all n pictures do
before anything is known, so a collection of three and one of thousands need no setting of their own. Pictures that
look alike don't compete: five shots of one scene show it equally well. Different pictures do, so a query that many
answer ("a dog") leaves each of them a small share.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipmatch.errors import ClipmatchError
from clipmatch.modelfolder import CALIBRATION

Floats: TypeAlias = NDArray[np.float32]
Integers: TypeAlias = NDArray[np.int64]

SCHEMA = 1
BANK = 1000  # pictures of a bank, one caption each: more changes little, fewer costs some
NEAREST = 0.03  # part of a bank that makes a background
GALLERIES = (1, 3, 10, 30, 100, 300, 1000)  # sizes of the simulated collections
QUERIES = 1000  # captions asked of collections of each size
RIDGE = 1.0  # against weights that run away where few pictures are perfectly separable
RIVALS = 100  # the best so many pictures are looked at for likeness
FEWEST = 20  # captioned pictures of a bank, of a fit and of its measurement
BINS = 10  # of a reliability curve
KEPT = 0.8  # of the right best answers, where a threshold is looked for
BLOCK = 4096  # pictures compared with a bank at once


@dataclass(frozen=True, eq=False)
class Bank:
    """What anything is compared with: generic pictures [c, d] and generic captions [c', d], unit rows, float16."""

    pictures: NDArray[np.float16]
    captions: NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Weights, bank and figures of one model. `fingerprint` names it, `split_hash` the pictures of the fit.

    weights: those of 1, cosine, background of the picture, background of the query. alike: the cosine of two pictures
    from which on they count as showing the same.
    """

    weights: tuple[float, float, float, float]
    alike: float
    bank: Bank
    fingerprint: str
    split_hash: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def probabilities(
        self, query_row: ArrayLike, gallery_rows: ArrayLike, background: ArrayLike | None = None
    ) -> NDArray[np.float64]:
        """A query [d] and the pictures searched [n, d], unit rows -> [n], each picture's probability of being meant.

        background: what `background(gallery_rows)` gave, so that many queries pay for it once. All else being equal, a
        higher cosine means a higher probability, and a lower one for the other pictures. The sum is the probability
        that the collection holds what is asked for, except that pictures that look alike each have all of theirs.

        Raises ClipmatchError on rows that are not finite or don't fit.
        """
        query, rows = np.asarray(query_row, np.float32), np.asarray(gallery_rows, np.float32)
        if rows.ndim != 2 or not len(rows) or query.shape != (self.dim,) or rows.shape[1] != self.dim:
            raise ClipmatchError(
                f"The query has shape {query.shape} and the pictures {rows.shape}, but this calibration is for rows of "
                f"{self.dim} numbers; embed both with the model that it was fitted for."
            )
        with np.errstate(invalid="ignore"):  # infinity times zero; refused below
            scores = rows @ query  # [n]
        if not np.isfinite(scores).all():
            raise ClipmatchError("An embedding of the query or of a picture is not finite; check the model.")
        settled = self.background(rows) if background is None else np.asarray(background, np.float32)
        return self._choose(self._evidence(scores, settled, self.familiarity(query[None])[0]), rows)

    def background(self, gallery_rows: ArrayLike) -> Floats:
        """Pictures [n, d] -> [n]: mean cosine of each with the nearest captions of the bank; high for a hub."""
        return nearest_mean(np.asarray(gallery_rows, np.float32), self._captions)

    def familiarity(self, query_rows: ArrayLike) -> Floats:
        """Queries [m, d] -> [m]: mean cosine of each with the nearest pictures of the bank."""
        return nearest_mean(np.asarray(query_rows, np.float32), self._pictures)

    @property
    def dim(self) -> int:
        """Numbers in a row."""
        return int(self.bank.captions.shape[1])

    def save(self, folder: str | Path) -> Path:
        """Write calibration.json into a model folder, in one step. Raises ClipmatchError when it can't be written."""
        path = Path(folder) / CALIBRATION
        values = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "split_hash": self.split_hash,
            "figures": self.figures,
            "weights": list(self.weights),
            "alike": self.alike,
            "dim": self.dim,
            "bank": {"pictures": _pack(self.bank.pictures), "captions": _pack(self.bank.captions)},
        }
        draft = path.with_name(CALIBRATION + ".draft")
        try:
            draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            draft.replace(path)
        except OSError as error:
            raise ClipmatchError(f"The file {path} can't be written ({error.strerror}).") from error
        return path

    @classmethod
    def load(cls, folder: str | Path, fingerprint: str) -> Calibration:
        """The calibration in a model folder. Raises ClipmatchError if there is none, or it is not of this model."""
        path = Path(folder) / CALIBRATION
        if not path.is_file():
            raise ClipmatchError(f"The model {folder} is not calibrated; run: clipmatch evaluate --model {folder} ...")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["schema"] > SCHEMA:
                raise ClipmatchError(
                    f"The file {path} is from a newer clipmatch; upgrade, or evaluate the model again."
                )
            bank = Bank(*(_unpack(values["bank"][part], values["dim"]) for part in ("pictures", "captions")))
            first, cosine, picture, query = (float(weight) for weight in values["weights"])
            if not np.isfinite([first, cosine, picture, query]).all():
                raise ValueError("a weight is not finite")
            known = str(values["fingerprint"])
            rest = float(values["alike"]), bank, known, str(values["split_hash"]), dict(values["figures"])
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise ClipmatchError(f"The file {path} is damaged ({error}); evaluate the model again.") from error
        if known != fingerprint:
            raise ClipmatchError(
                f"The file {path} was fitted for model {known} and this one is {fingerprint}; evaluate the model again."
            )
        return cls((first, cosine, picture, query), *rest)

    @cached_property
    def _captions(self) -> Floats:
        return self.bank.captions.astype(np.float32)

    @cached_property
    def _pictures(self) -> Floats:
        return self.bank.pictures.astype(np.float32)

    def _evidence(self, scores: Floats, background: Floats, familiarity: float) -> NDArray[np.float64]:
        constant, cosine, picture, query = self.weights
        return cosine * scores.astype(np.float64) + picture * background + (constant + query * familiarity)

    def _choose(self, evidence: NDArray[np.float64], rows: Floats) -> NDArray[np.float64]:
        """Evidence [n] -> probabilities [n] by the module's formula, where look-alikes are no rivals of each other."""
        count = len(evidence)
        top = max(float(evidence.max()), 0.0)  # so that no exponential overflows
        odds = np.exp(evidence - top)
        rivals = np.full(count, count * np.exp(-top) + odds.sum())
        best = np.argpartition(-evidence, RIVALS - 1)[:RIVALS] if count > RIVALS else np.arange(count)
        same = (rows[best] @ rows[best].T >= self.alike).astype(np.float64)
        np.fill_diagonal(same, 0)
        rivals[best] -= same @ odds[best]
        chances: NDArray[np.float64] = np.minimum(odds / rivals, 1)  # rounding
        return chances


def nearest_mean(rows: Floats, bank_rows: Floats) -> Floats:
    """Rows [n, d] against a bank [c, d] -> [n]: mean cosine with the nearest few rows of the bank."""
    few = max(1, round(NEAREST * len(bank_rows)))
    parts = []
    for start in range(0, len(rows), BLOCK):
        scores = rows[start : start + BLOCK] @ bank_rows.T  # [b, c]
        parts.append(np.partition(scores, -few, axis=1)[:, -few:].mean(axis=1))
    return np.concatenate(parts)


# Fitting


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
    fingerprint: str,
    split_hash: str = "",
    seed: int = 0,
) -> Calibration:
    """Captioned pictures that the model was not trained on -> its calibration, with figures for held-out pictures.

    Rows [n, d] and [m, d], the picture of each caption [m]. bank: of yet other pictures; None takes a third of these.
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
    return replace(calibration, split_hash=split_hash, figures=figures_of(join(measured)))


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


def _pack(rows: NDArray[np.float16]) -> str:
    return base64.b64encode(rows.astype("<f2").tobytes()).decode("ascii")


def _unpack(text: str, dim: int) -> NDArray[np.float16]:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f2").reshape(-1, dim).astype(np.float16)
