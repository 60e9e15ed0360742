"""How sure a match is: the probability that a picture is the one that a query describes.

In: unit rows of a query and of the pictures searched. Out: a number in 0..1 for each picture. How the weights are found
is in `calibration_fit`. Knows nothing of models, files of pictures or PyTorch. Shapes: n pictures, m queries, c rows of
a bank, d numbers a row.

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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipmatch.atomic import atomic_file
from clipmatch.errors import ClipmatchError, unwritable
from clipmatch.modelfolder import CALIBRATION

Floats: TypeAlias = NDArray[np.float32]

SCHEMA = 2  # 1 had no exclusion
NEAREST = 0.03  # part of a bank that makes a background
RIVALS = 100  # the best so many pictures are looked at for likeness
BLOCK = 4096  # pictures compared with a bank at once


class RowsByPlace(Protocol):
    """Rows that are asked for by their places [m] -> [m, d]: an array, or what need not be in memory."""

    def __getitem__(self, places: NDArray[np.int64], /) -> Floats: ...


@dataclass(frozen=True, eq=False)
class Bank:
    """What anything is compared with: generic pictures [c, d] and generic captions [c', d], unit rows, float16."""

    pictures: NDArray[np.float16]
    captions: NDArray[np.float16]


@dataclass(frozen=True)
class Exclusion:
    """When a picture counts as showing a concept; what the numbers mean is said in `clipmatch.exclusion`.

    weights: those of 1, cosine, context, level. needed: the log odds from which on a picture is vetoed, as a constant
    and what is added for familiarity. familiar: how familiar a concept must be for all this to hold. usual: the mean
    cosine with the bank's likest pictures that most pictures reach.
    """

    weights: tuple[float, float, float, float]
    needed: tuple[float, float]
    familiar: float
    usual: float

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Exclusion:
        """What `dataclasses.asdict` gave. Raises ValueError if numbers are missing or not finite."""
        one, cosine, context, level = (float(weight) for weight in values["weights"])
        constant, slope = (float(part) for part in values["needed"])
        rest = float(values["familiar"]), float(values["usual"])
        found = cls((one, cosine, context, level), (constant, slope), *rest)
        if not np.isfinite([*found.weights, *found.needed, *rest]).all():
            raise ValueError("a number of the exclusion is not finite")
        return found


@dataclass(frozen=True, eq=False)
class Calibration:
    """Weights, bank and figures of one model. `fingerprint` names it, `split_hash` the pictures of the fit.

    weights: those of 1, cosine, background of the picture, background of the query. alike: the cosine of two pictures
    from which on they count as showing the same. exclusion: None where the captions could not tell.
    """

    weights: tuple[float, float, float, float]
    alike: float
    bank: Bank
    fingerprint: str
    split_hash: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    exclusion: Exclusion | None = None

    def probabilities(
        self,
        query_row: ArrayLike,
        gallery_rows: ArrayLike,
        background: ArrayLike | None = None,
        searched: int | None = None,
    ) -> NDArray[np.float64]:
        """A query [d] and the pictures searched [n, d], unit rows -> [n], each picture's probability of being meant.

        background: what `background(gallery_rows)` gave, so that many queries pay for it once. searched: how many
        pictures the collection has, where these are but the likeliest of it. All else being equal, a
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
        settled = self.background(rows) if background is None else np.asarray(background, np.float32)
        return self.choose(self.evidence(query)(scores, settled), rows, searched or len(rows))

    def evidence(self, query_row: Floats) -> Callable[[Floats, Floats], NDArray[np.float64]]:
        """A query [d] -> the function of its cosines with pictures [n] and their backgrounds [n] that gives what speaks
        for each picture [n]. Raises ClipmatchError, as that function does, on what is not finite.
        """
        check_finite(query_row)
        constant, cosine, picture, query = self.weights
        known = constant + query * float(self.familiarity(query_row[None])[0])

        def weigh(scores: Floats, background: Floats) -> NDArray[np.float64]:
            check_finite(scores)
            return cosine * scores.astype(np.float64) + picture * background + known

        return weigh

    def choose(
        self,
        evidence: NDArray[np.float64],
        rows: RowsByPlace,
        searched: int,
        sample: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float64]:
        """Evidence [n] -> probabilities [n] by the module's formula, where look-alikes are no rivals of each other.

        rows: gives the rows at some places, of which only the best few are looked at. searched: pictures of the
        collection. sample: evidence [s] of some of its pictures that are not among the n, drawn at random; they stand
        for all of those.
        """
        count = len(evidence)
        others = np.zeros(0) if sample is None else sample
        top = max(float(evidence.max()), float(others.max(initial=0)))  # so that no exponential overflows
        odds = np.exp(evidence - top)
        unseen = (searched - count) * float(np.exp(others - top).mean()) if len(others) else 0.0
        rivals = np.full(count, searched * np.exp(-top) + odds.sum() + unseen)
        best = np.argpartition(-evidence, RIVALS - 1)[:RIVALS] if count > RIVALS else np.arange(count)
        likely = rows[best]
        same = (likely @ likely.T >= self.alike).astype(np.float64)
        np.fill_diagonal(same, 0)
        rivals[best] -= same @ odds[best]
        chances: NDArray[np.float64] = np.minimum(odds / rivals, 1)  # rounding
        return chances

    def background(self, gallery_rows: ArrayLike) -> Floats:
        """Pictures [n, d] -> [n]: mean cosine of each with the nearest captions of the bank; high for a hub."""
        return nearest_mean(np.asarray(gallery_rows, np.float32), self.captions)

    def familiarity(self, query_rows: ArrayLike) -> Floats:
        """Queries [m, d] -> [m]: mean cosine of each with the nearest pictures of the bank."""
        return nearest_mean(np.asarray(query_rows, np.float32), self.pictures)

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
            "exclusion": None if self.exclusion is None else asdict(self.exclusion),
            "dim": self.dim,
            "bank": {"pictures": _pack(self.bank.pictures), "captions": _pack(self.bank.captions)},
        }
        try:
            with atomic_file(path) as draft:
                draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise unwritable(f"The file {path}", error, "see that its folder can be written") from error
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
            known, veto = str(values["fingerprint"]), values.get("exclusion")
            rest = float(values["alike"]), bank, known, str(values["split_hash"]), dict(values["figures"])
            exclusion = None if veto is None else Exclusion.from_json(veto)
        except (OSError, LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ClipmatchError(f"The file {path} is damaged ({error}); evaluate the model again.") from error
        if known != fingerprint:
            raise ClipmatchError(
                f"The file {path} was fitted for model {known} and this one is {fingerprint}; evaluate the model again."
            )
        return cls((first, cosine, picture, query), *rest, exclusion)

    @cached_property
    def captions(self) -> Floats:
        """The captions of the bank, ready to be multiplied with."""
        return self.bank.captions.astype(np.float32)

    @cached_property
    def pictures(self) -> Floats:
        """The pictures of the bank, the same."""
        return self.bank.pictures.astype(np.float32)


def check_finite(values: Floats) -> None:
    """Raise ClipmatchError unless all values are finite."""
    if not np.isfinite(values).all():
        raise ClipmatchError("An embedding of the query or of a picture is not finite; check the model.")


def nearest_mean(rows: Floats, bank_rows: Floats) -> Floats:
    """Rows [n, d] against a bank [c, d] -> [n]: mean cosine with the nearest few rows of the bank."""
    few = max(1, round(NEAREST * len(bank_rows)))
    parts = []
    for start in range(0, len(rows), BLOCK):
        scores = rows[start : start + BLOCK] @ bank_rows.T  # [b, c]
        parts.append(np.partition(scores, -few, axis=1)[:, -few:].mean(axis=1))
    return np.concatenate(parts)


def _pack(rows: NDArray[np.float16]) -> str:
    return base64.b64encode(rows.astype("<f2").tobytes()).decode("ascii")


def _unpack(text: str, dim: int) -> NDArray[np.float16]:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f2").reshape(-1, dim).astype(np.float16)
