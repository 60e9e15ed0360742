"""A concept, learnt from a few photographs that show it.

In: unit rows of examples, of counter-examples, and of any other photographs. Out: a direction [d]; the higher a
photograph's cosine with it, the more of the concept it shows. Knows nothing of files or indexes. Shapes: p examples, q
counter-examples, r other photographs, n all of them, d numbers a row.

A logistic regression whose weights are held near a prior: zero for a concept, and the query's own row where ticks and
crosses refine a query, so that without any tick the order stays the query's. The other photographs stand for all that
is not meant. Some of them may show the concept all the same, so those that come before most examples are left out of a
second fit.

web/ranking.js does the same for galleries that are given away; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STIFFNESS = 0.1  # how strongly the weights are held near the prior
TRUST = 0.7  # spread, over the other photographs, of what the prior of a query adds up to
OTHERS = 1000  # photographs of a collection that stand for all of it
COPY = 0.98  # cosine from which on another photograph is taken for a copy of an example
FOLDS = 20  # as many fits, at most, tell how well a concept is learnt
LITTLE = 0.02  # spread of cosines in a collection of photographs that are all alike
STEPS = 25  # of Newton's method; it needs about eight


@dataclass(frozen=True, eq=False)
class Concept:
    """What "@name" means in a query.

    row [d]: its direction, a unit vector. examples, others: the files that showed it, and those that did not.
    precision: the average precision of the examples, each judged by what was learnt without it, among as many other
    photographs. Others that show the concept too count as wrong. None for a single example.
    """

    name: str
    row: NDArray[np.float32]
    examples: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()
    precision: float | None = None


def learn(
    liked: NDArray[np.float32],
    disliked: NDArray[np.float32],
    rest: NDArray[np.float32],
    query: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Rows [p, d] of examples, [q, d] of counter-examples, [r, d] of others -> the concept's direction [d].

    query: the row [d] that a direction without examples would have.
    """
    rest = rest[~copies(rest, np.concatenate([liked, disliked]))]
    prior = np.zeros(rest.shape[1])
    if query is not None:
        spread = float((rest @ query).std()) if len(rest) else 0.0
        prior += TRUST / max(spread, LITTLE) * query
    weights = fit(liked, disliked, rest, prior)
    if len(liked):
        doubtful = rest @ weights > np.median(liked @ weights)
        weights = fit(liked, disliked, rest[~doubtful], prior)
    return (weights / max(float(np.linalg.norm(weights)), 1e-9)).astype(np.float32)


def leave_one_out(liked: NDArray[np.float32], disliked: NDArray[np.float32], rest: NDArray[np.float32]) -> float | None:
    """The precision that `Concept` tells of; None if there are less than two examples.

    With more than `FOLDS` examples some of them are left out together, and always a part of the others with them.
    """
    if len(liked) < 2:
        return None
    groups = (liked, disliked, rest[~copies(rest, np.concatenate([liked, disliked]))])
    scores = [np.empty(len(group)) for group in groups]
    folds = min(FOLDS, len(liked))
    for fold in range(folds):
        held = [np.arange(len(group)) % folds == fold for group in groups]
        row = learn(*(group[~out] for group, out in zip(groups, held, strict=True)))
        for values, group, out in zip(scores, groups, held, strict=True):
            values[out] = group[out] @ row
    right, wrong = scores[0], np.concatenate(scores[1:])
    found = np.array([np.mean(right >= score) for score in right])
    mistaken = np.array([np.count_nonzero(wrong >= score) for score in right]) / max(len(wrong), 1)
    return float(np.mean(found / (found + mistaken)))


def copies(rows: NDArray[np.float32], of: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which rows [n, d] show the same as one of others [m, d]."""
    alike: NDArray[np.bool_] = (rows @ of.T).max(axis=1, initial=-1) >= COPY
    return alike


def fit(liked: NDArray[np.float32], disliked: NDArray[np.float32], rest: NDArray[np.float32], prior: Floats) -> Floats:
    """Weights [d] of a logistic regression with a constant, by Newton's method.

    Examples weigh as much as all that is not meant; of that, counter-examples as much as the rest.
    """
    rows = np.concatenate([liked, disliked, rest]).astype(np.float64)
    inputs = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)  # [n, d + 1]
    marks = np.repeat([1.0, -1.0, -1.0], [len(liked), len(disliked), len(rest)])
    against = max(bool(len(disliked)) + bool(len(rest)), 1)
    shares = np.repeat(
        [1 / max(len(liked), 1), 1 / max(len(disliked), 1) / against, 1 / max(len(rest), 1) / against],
        [len(liked), len(disliked), len(rest)],
    )
    start = np.append(prior, 0.0)
    held = np.append(np.full(len(prior), STIFFNESS), 1e-6)  # the constant is all but free

    def loss(weights: Floats) -> float:
        away = weights - start
        return float(shares @ np.logaddexp(0, -marks * (inputs @ weights)) + held @ (away * away) / 2)

    weights, now = start, loss(start)
    for _ in range(STEPS):
        wrong = 1 / (1 + np.exp(np.clip(marks * (inputs @ weights), -500, 500)))  # [n]: how probably each is missed
        slope = inputs.T @ (-marks * shares * wrong) + held * (weights - start)
        curve = (inputs * (shares * wrong * (1 - wrong))[:, None]).T @ inputs + np.diag(held)
        step = np.linalg.solve(curve, slope)
        size = 1.0
        while (new := loss(weights - size * step)) > now and size > 1e-3:
            size /= 2
        if now - new < 1e-9:
            break
        weights, now = weights - size * step, new
    return weights[:-1]
