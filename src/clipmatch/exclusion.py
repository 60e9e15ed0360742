"""Which pictures show what is not wanted: a veto by confidence, for `find ... --not "person"`.

In: a concept, a word or a few, and the unit rows of pictures. Out: for each picture the confidence that it shows the
concept, and whether that is enough to leave it out. The weights are found in `exclusion_fit`. Knows nothing of what is
searched for. Shapes: n pictures, p phrasings of a concept, c rows of a bank, d numbers a row.

Subtracting the concept from the query makes a picture that shows it a little less near, no more. A veto asks of each
picture by itself whether it shows the concept, from three numbers:

    cosine     with the concept, the softest maximum over several phrasings of it;
    context    the mean cosine with the concept of the bank's pictures that are most like this one: what is seen badly
               here may be seen well there (Diaz, Regularizing ad hoc retrieval scores, CIKM 2005);
    level      the mean cosine of all the bank's pictures with the concept: some words are near to everything.

A logistic regression makes a confidence of them, from even odds: how often a concept is shown differs from collection
to collection, so what is known is how far the numbers speak for one or the other. How much confidence is enough depends
on the concept's familiarity, how near those captions come that name it: where captions say a thing plainly
("basketball"), the pictures that show it speak for it plainly too, and less is something else; of what captions rather
imply ("person") less must do. It also depends on the picture: the less it is like the bank's, the less is known of what
the numbers mean there, and the more is asked of them.

A concept that no captions come near (nonsense, or a thing that they never name) is not one of those that the weights
were found for. Then only pictures are vetoed that stand out from the bank's as a normal distribution would let hardly
any: a word that means nothing should not empty the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipmatch.calibration import BLOCK, Calibration, Floats
from clipmatch.embedder import Embedder
from clipmatch.errors import ClipmatchError

Integers: TypeAlias = NDArray[np.int64]

EmbedTexts: TypeAlias = Callable[[list[str]], Floats]


class RowsInBlocks(Protocol):
    """Unit rows [n, d] that are asked for some at a time: an array, or what need not be in memory."""

    def __len__(self) -> int: ...
    def __getitem__(self, places: slice, /) -> Floats: ...


PLURAL = "{}s"  # not for what ends in s already
PHRASINGS = ("a photo of {}", PLURAL)
# Captions say who is there, not that it is a person; a model that has learnt from them knows no better.
PEOPLE = ("person", "man", "woman", "boy", "girl")
HUMAN = frozenset(
    ("person", "persons", "people", "human", "humans", "human being", "human beings", "somebody", "anyone")
)
ARTICLES = ("a ", "an ", "the ", "any ", "some ")
SHARPNESS = 10.0  # of the soft maximum
NEIGHBOURS = 10  # pictures of the bank that make a context
STRANGE = (
    15.0  # log odds asked for each 1 that the cosine with the likest pictures of the bank falls short of the usual
)
NAMING = 5  # captions of the bank that tell how familiar a concept is
OUTSTANDING = 3.0  # standard deviations above the bank's mean


@dataclass(frozen=True, eq=False)
class Likest:
    """Of n pictures: the places [n, few] of the bank's that are most like each, and the mean cosine [n] with them."""

    places: Integers
    cosine: Floats


@dataclass(frozen=True, eq=False)
class Verdict:
    """Of n pictures: the confidence [n] that each shows the concept, and whether [n] it is vetoed.

    familiar: False for a concept of which the model is not known to know anything.
    """

    confidence: NDArray[np.float64]
    vetoed: NDArray[np.bool_]
    familiar: bool


def shows(
    embedder: Embedder, calibration: Calibration, gallery_rows: RowsInBlocks, concepts: Sequence[str]
) -> list[NDArray[np.bool_]]:
    """For each concept, which pictures [n] are taken to show it. Raises ClipmatchError as `judge` does."""
    embedded = [embed_concept(embedder.embed_texts, text) for text in concepts]
    vetoed = [np.zeros(len(gallery_rows), bool) for _ in concepts]
    for start in range(0, len(gallery_rows), BLOCK):
        rows = gallery_rows[start : start + BLOCK]
        likest = find_likest(calibration, rows) if calibration.exclusion else None
        for concept, found in zip(embedded, vetoed, strict=True):
            found[start : start + BLOCK] = judge(calibration, concept, rows, likest).vetoed
    return vetoed


def embed_concept(embed_texts: EmbedTexts, concept: str) -> Floats:
    """What a person types after --not -> unit rows [p, d], one for each phrasing; the mean where it has several names.

    Raises ClipmatchError if it is empty.
    """
    names = names_of(concept)
    used = [phrasing for phrasing in PHRASINGS if phrasing != PLURAL or not names[0].endswith("s")]
    rows = embed_texts([phrasing.format(name) for phrasing in used for name in names])
    means = rows.reshape(len(used), len(names), -1).mean(axis=1)
    unit: Floats = means / np.linalg.norm(means, axis=1, keepdims=True)
    return unit


def names_of(concept: str) -> tuple[str, ...]:
    """The bare name of a concept, without an article; of people, several. Raises ClipmatchError if there is none."""
    name = " ".join(concept.split())
    if not name:
        raise ClipmatchError("What is to be left out is empty; type what the photographs should not show.")
    article = next((article for article in ARTICLES if name.lower().startswith(article)), "")
    name = name[len(article) :]
    return PEOPLE if name.lower() in HUMAN else (name,)


def judge(
    calibration: Calibration, concept_rows: ArrayLike, gallery_rows: ArrayLike, likest: Likest | None = None
) -> Verdict:
    """The rows of a concept's phrasings [p, d] and pictures [n, d], all of them unit rows -> a verdict on each picture.

    likest: what `find_likest(calibration, gallery_rows)` gave, so that many concepts pay for it once.
    Raises ClipmatchError on rows that are not finite or don't fit, and if the calibration knows no exclusion.
    """
    exclusion = calibration.exclusion
    if exclusion is None:
        raise ClipmatchError(
            "This model's calibration does not say when a picture shows something; run clipmatch evaluate with it "
            "again, on some hundred pictures with two or more captions each."
        )
    concept, rows = np.asarray(concept_rows, np.float32), np.asarray(gallery_rows, np.float32)
    if concept.ndim != 2 or rows.ndim != 2 or {concept.shape[1], rows.shape[1]} != {calibration.dim}:
        raise ClipmatchError(
            f"The concept has shape {concept.shape} and the pictures {rows.shape}, but this calibration is for rows of "
            f"{calibration.dim} numbers; embed both with the model that it was fitted for."
        )
    likest = likest or find_likest(calibration, rows)
    evidence = features(calibration, concept, rows, likest) @ np.array(exclusion.weights)
    if not np.isfinite(evidence).all():
        raise ClipmatchError("An embedding of the concept or of a picture is not finite; check the model.")
    confidence = 1 / (1 + np.exp(-np.clip(evidence, -500, 500)))
    known = familiarity(calibration, concept)
    if known >= exclusion.familiar:
        constant, slope = exclusion.needed
        return Verdict(confidence, evidence >= constant + slope * known + strangeness(likest, exclusion.usual), True)
    usual = nearness(calibration.pictures, concept)
    return Verdict(confidence, nearness(rows, concept) >= usual.mean() + OUTSTANDING * usual.std(), False)


def features(
    calibration: Calibration, concept_rows: Floats, gallery_rows: Floats, likest: Likest
) -> NDArray[np.float64]:
    """A concept [p, d] and pictures [n, d] -> [n, 4]: 1, cosine, context, level."""
    usual = nearness(calibration.pictures, concept_rows)  # [c]
    cosine = nearness(gallery_rows, concept_rows)
    return np.stack(
        [np.ones_like(cosine), cosine, usual[likest.places].mean(axis=1), np.full_like(cosine, usual.mean())], axis=1
    )


def find_likest(calibration: Calibration, gallery_rows: Floats) -> Likest:
    """Pictures [n, d] -> those of the bank that are most like each."""
    few = min(NEIGHBOURS, len(calibration.pictures))
    places, cosine = np.empty((len(gallery_rows), few), np.int64), np.empty(len(gallery_rows), np.float32)
    for start in range(0, len(gallery_rows), BLOCK):
        alike = gallery_rows[start : start + BLOCK] @ calibration.pictures.T  # [b, c]
        found = np.argpartition(-alike, few - 1, axis=1)[:, :few]
        places[start : start + BLOCK] = found
        cosine[start : start + BLOCK] = np.take_along_axis(alike, found, axis=1).mean(axis=1)
    return Likest(places, cosine)


def strangeness(likest: Likest, usual: float) -> NDArray[np.float64]:
    """What is asked of each picture [n] beside the rest, for being unlike the bank's. usual: how like them most are."""
    asked: NDArray[np.float64] = STRANGE * np.maximum(0.0, usual - likest.cosine.astype(np.float64))
    return asked


def nearness(rows: Floats, concept_rows: Floats) -> NDArray[np.float64]:
    """Rows [n, d] and a concept [p, d] -> [n]: the soft maximum of the cosines with its phrasings.

    The maximum where they differ much, the mean where they don't.
    """
    cosines = (rows @ concept_rows.T).astype(np.float64)  # [n, p]
    found: NDArray[np.float64] = np.log(np.exp(SHARPNESS * cosines).mean(axis=1)) / SHARPNESS
    return found


def familiarity(calibration: Calibration, concept_rows: Floats) -> float:
    """How much nearer the bank's few nearest captions are to a concept [p, d] than its captions on average."""
    cosines = np.sort(nearness(calibration.captions, concept_rows))
    return float(cosines[-NAMING:].mean() - cosines.mean())
