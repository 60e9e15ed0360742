"""Fitting when a picture counts as showing a concept.

In: captioned pictures that the model was not trained on. Out: an `Exclusion`. The concepts are words of the captions:
no list and no language is built in. How well it excludes is measured by benchmarks/exclusion.py. Shapes: n pictures, m
captions, k concepts, p phrasings, d numbers a row.

A word is a concept if captions agree on it: of two captions of one picture, where one has it, the other has it more
often than not. Words of grammar occur by chance and fail; names of what can be seen pass. A picture shows the concept
if two of its captions say so, lacks it if none does, and is left out for it if one does.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipmatch.calibration import Calibration, Exclusion, Floats
from clipmatch.exclusion import EmbedTexts, Integers, embed_concept, familiarity, features, find_likest, strangeness

Pair: TypeAlias = tuple[int, Integers, Integers]

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")  # letters of any script, with inner hyphens and apostrophes
AGREEMENT = 0.5  # of captions of one picture, from which on a word is a concept
LIFT = 3.0  # how much more often than by chance they must agree
FEWEST = 8  # pictures that show a concept; concepts that can be fitted
COMMON = 5  # pictures of a pair of concepts that show both, and that show the first without the second
MOST = 300  # concepts: the most frequent ones
PICTURES = 2000  # that a fit looks at: more change nothing
REMOVED = 0.908  # of what is excluded, on the fit's own pictures and concepts: of others it is 0.9
FAMILIAR = 2 / 3  # of the familiarity that the fit's concepts have on average: less is not what it was fitted for
USUAL = 0.25  # of the pictures are less like the bank's than is usual
RIDGE = 1e-3  # against weights that run away where concepts are perfectly separable


@dataclass(frozen=True, eq=False)
class Concept:
    """A word, its phrasings' unit rows [p, d], and which of n pictures show it and which lack it."""

    word: str
    rows: Floats
    shown: NDArray[np.bool_]
    lacking: NDArray[np.bool_]

    def among(self, pictures: Integers) -> Concept:
        """The same for some pictures [k] alone."""
        return replace(self, shown=self.shown[pictures], lacking=self.lacking[pictures])


# Concepts


def find_concepts(captions: Sequence[str], owners: ArrayLike, embed_texts: EmbedTexts) -> list[Concept]:
    """Captions [m] and the picture of each [m] -> the concepts that they agree on, the most frequent first."""
    owner = np.asarray(owners, np.int64)
    counts = {word: count for word, count in mentions(captions, owner).items() if is_concept(count, owner)}
    words = sorted(counts, key=lambda word: (-int((counts[word] >= 2).sum()), word))[:MOST]
    return [Concept(word, embed_concept(embed_texts, word), counts[word] >= 2, counts[word] == 0) for word in words]


def mentions(captions: Sequence[str], owner: Integers) -> dict[str, Integers]:
    """For each word, how many captions of each picture [n] have it; a plural in -s counts as its singular."""
    said = [set(WORD.findall(caption.lower())) for caption in captions]
    known = set().union(*said)
    counts: dict[str, Integers] = defaultdict(lambda: np.zeros(int(owner.max()) + 1, np.int64))
    for picture, words in zip(owner, said, strict=True):
        for word in {singular(word, known) for word in words}:
            counts[word][picture] += 1
    return counts


def singular(word: str, known: Iterable[str]) -> str:
    """The word without its plural ending, if the captions have that too: "dogs" -> "dog", but "bus" stays."""
    stems = (word[: -len(ending)] for ending in ("s", "es") if word.endswith(ending) and len(word) > len(ending) + 2)
    return next((stem for stem in stems if stem in known), word)


def is_concept(count: Integers, owner: Integers) -> bool:
    """How many captions of each picture [n] have a word -> whether captions of one picture agree on it."""
    captions = np.bincount(owner, minlength=len(count))
    others = int((count * (captions - 1)).sum())  # captions beside one that has the word
    if others == 0 or (count >= 2).sum() < FEWEST:
        return False
    agreement = int((count * (count - 1)).sum()) / others
    return agreement >= AGREEMENT and agreement >= LIFT * int(count.sum()) / len(owner)


# Fitting


def fit_exclusion(calibration: Calibration, image_rows: ArrayLike, concepts: Sequence[Concept]) -> Exclusion | None:
    """Pictures [n, d], none of them in the calibration's bank, and what they show -> when to veto.

    None if there are too few concepts, or the cosines say nothing of them.
    """
    images = np.asarray(image_rows, np.float32)
    usable = [one for one in concepts if one.shown.sum() >= COMMON and one.lacking.sum() >= COMMON]
    if len(usable) < FEWEST:
        return None
    likest = find_likest(calibration, images)
    usual = float(np.quantile(likest.cosine, USUAL))
    tables = [features(calibration, concept.rows, images, likest) for concept in usable]
    weights = fit_weights(tables, usable)
    if weights[1] <= 0:
        return None
    one, cosine, context, level = (float(weight) for weight in weights)
    known = np.array([familiarity(calibration, concept.rows) for concept in usable])  # [k]
    evidence = np.stack([table @ weights for table in tables])  # [k, n]
    typical = [row[concept.shown].mean() for row, concept in zip(evidence, usable, strict=True)]
    slope = float(np.polyfit(known, typical, 1)[0]) if np.ptp(known) > 0 else 0.0
    left = evidence - slope * known[:, None] - strangeness(likest, usual)
    constant = removing(left, pairs_of(usable) or alone(usable))
    return Exclusion((one, cosine, context, level), (constant, slope), FAMILIAR * float(known.mean()), usual)


def fit_weights(tables: Sequence[NDArray[np.float64]], concepts: Sequence[Concept]) -> NDArray[np.float64]:
    """Features [n, 4] of each concept, 1 first -> the weights [4] of a logistic regression.

    All concepts weigh the same, and in each the pictures that show it as much as those that lack it.
    """
    design, truth, weight = [], [], []
    for table, concept in zip(tables, concepts, strict=True):
        for pictures, right in ((concept.shown, 1.0), (concept.lacking, 0.0)):
            design.append(table[pictures])
            truth.append(np.full(int(pictures.sum()), right))
            weight.append(np.full(int(pictures.sum()), 0.5 / pictures.sum() / len(concepts)))
    flat = np.concatenate(design)
    centre, scale = flat.mean(axis=0), flat.std(axis=0)
    centre[0], scale[0] = 0, 1
    scale[scale == 0] = 1
    weights: NDArray[np.float64] = logistic((flat - centre) / scale, np.concatenate(truth), np.concatenate(weight))
    weights /= scale
    weights[0] -= float(centre[1:] @ weights[1:])
    return weights


def logistic(
    design: NDArray[np.float64], truth: NDArray[np.float64], weight: NDArray[np.float64], steps: int = 50
) -> NDArray[np.float64]:
    """Features [r, f], 1 first, what is true [r] and how much each row counts [r] -> weights [f], by Newton's method.

    With a ridge, from which the constant is free. No step is longer than 1: far out the curvature says little.
    """
    size = design.shape[1]
    ridge = RIDGE * np.eye(size)
    ridge[0, 0] = 1e-9
    weights = np.zeros(size)
    for _ in range(steps):
        chance = 1 / (1 + np.exp(-np.clip(design @ weights, -50, 50)))
        slope = design.T @ (weight * (truth - chance)) - ridge @ weights
        bend = (design * (weight * chance * (1 - chance))[:, None]).T @ design + ridge
        step = np.linalg.solve(bend, slope)
        weights = weights + step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-6:
            break
    return weights


def pairs_of(concepts: Sequence[Concept], excluded: Iterable[int] | None = None) -> list[Pair]:
    """Questions "A but not B" that the pictures can answer -> for each the number of B, and the pictures (places) that
    show both and those that show A and lack B.

    excluded: which concepts may be B; None for all. Where most of A's pictures show B too, nobody would ask.
    """
    found = []
    for b in range(len(concepts)) if excluded is None else excluded:
        for a in range(len(concepts)):
            both = np.flatnonzero(concepts[a].shown & concepts[b].shown)
            wanted = np.flatnonzero(concepts[a].shown & concepts[b].lacking)
            if a != b and len(both) >= COMMON and len(wanted) >= max(COMMON, len(both) / 2):
                found.append((b, both, wanted))
    return found


def alone(concepts: Sequence[Concept]) -> list[Pair]:
    """The same for questions "not B": where the pictures are too few for pairs."""
    return [(at, np.flatnonzero(one.shown), np.flatnonzero(one.lacking)) for at, one in enumerate(concepts)]


def removing(evidence: NDArray[np.float64], pairs: Sequence[Pair]) -> float:
    """Evidence [k, n] -> the highest threshold that removes 90 % of what each pair excludes, on average over pairs."""
    values = np.concatenate([evidence[b, both] for b, both, _ in pairs])
    share = np.concatenate([np.full(len(both), 1 / len(both) / len(pairs)) for _, both, _ in pairs])
    order = np.argsort(-values)
    place = int(np.searchsorted(np.cumsum(share[order]), REMOVED - 1e-9))
    return float(values[order][min(place, len(order) - 1)])
