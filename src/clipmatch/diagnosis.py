"""What is likely wrong with a run, and what to do about it: one sentence each, said once.

In: the rows of a run's log, unit rows of dev, the captions. Out: warnings. Pure functions of figures; knows nothing of
models or files. The bounds are far from what healthy runs show, for an alarm that is often false is soon not read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipmatch.config import TrainConfig
from clipmatch.data import CaptionedImage

CHANCE = 0.97  # of the loss of pure guessing; an epoch of learning brings it below 0.9 even in a small run
LONG = 500  # steps of a first epoch, whose second half should tell more than guessing
CEILING = 0.999  # of the largest logit scale
FLOOR = 2.0  # a logit scale at which no softmax can be sharp; runs begin at 14 (10 with the sigmoid)
COLLAPSED = 0.9  # mean cosine of different dev pictures or captions; 0.0 to 0.4 is usual
SETTLED = (20, 0.2)  # steps, and share of all steps, after which a run from random weights tells its pictures apart
FALLING = 3  # looks at dev in a row, each worse than the one before, while the training loss falls
FALL = 0.01  # of recall@10 in these looks: less is chance
SKIPPED = 0.2  # of an epoch's steps, that float16 could not take
SHARED = 0.2  # of the pictures, whose captions are all those of other pictures too
ALIKE = 1e-4  # spread of features over pictures, as a share of their size: a tower that sees no difference


@dataclass(frozen=True)
class Finding:
    """Something that is likely wrong. name: of its kind, for the log; text: what, and what to do."""

    name: str
    text: str


def check_epoch(
    history: Sequence[dict[str, Any]], settings: TrainConfig, batch_size: int, most: float
) -> list[Finding]:
    """The rows of a log up to the end of an epoch -> what that epoch shows. most: the largest logit scale."""
    epochs = [row for row in history if row["kind"] == "epoch"]
    steps = [row for row in history if row["kind"] == "step" and row["epoch"] == epochs[-1]["epoch"]]
    last = len([row for row in history if row["kind"] == "step"])
    found = [*check_scale(steps, most), *check_steps(steps), *check_overfitting(epochs)]
    plain = settings.loss == "softmax" and not settings.teachers and not settings.concepts
    if plain and last >= 20 and epochs[-1]["epoch"] > 0:  # the first epoch may be all warm-up ...
        found += check_chance(epochs[-1]["train_loss"], batch_size)
    elif plain and len(steps) >= LONG and settings.warmup * settings.epochs < 0.5:  # ... unless it is a long one
        found += check_chance(float(np.mean([row["loss"] for row in steps[len(steps) // 2 :]])), batch_size)
    return found


def check_scale(steps: Sequence[dict[str, Any]], most: float) -> Iterator[Finding]:
    """Is the temperature at one of its ends, or dead?"""
    scales = [row["logit_scale"] for row in steps]
    if min(scales) >= CEILING * most:
        yield Finding(
            "scale-at-ceiling",
            f"the logit scale stays at its largest, {most:g}: similarities are as sharp as they may be. Lower "
            "--rate-heads, or stop earlier: such a model has often learnt its pictures by heart",
        )
    if max(scales) < FLOOR:
        yield Finding(
            "scale-sunk",
            f"the logit scale has sunk to {scales[-1]:.2f}: the model has stopped telling pairs apart. Lower the "
            "learning rates, and see whether captions belong to their pictures: clipmatch data check",
        )


def check_chance(loss: float, batch_size: int) -> Iterator[Finding]:
    """Is the loss that of guessing?"""
    guess = math.log(batch_size)
    if loss >= CHANCE * guess:
        yield Finding(
            "chance",
            f"the loss, {loss:.2f}, is still that of guessing among {batch_size} pairs ({guess:.2f}). See whether "
            "captions belong to their pictures (clipmatch data check), whether the towers are pretrained, and raise "
            "--rate-heads",
        )


def check_overfitting(epochs: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Does dev get worse while training gets better?"""
    looks = [row for row in epochs if "dev" in row][-FALLING - 1 :]
    if len(looks) <= FALLING:
        return
    recalls = [row["dev"]["text_to_image"]["recall@10"] for row in looks]
    losses = [row["train_loss"] for row in looks]
    if all(np.diff(recalls) < 0) and all(np.diff(losses) < 0) and recalls[0] - recalls[-1] > FALL:
        yield Finding(
            "overfitting",
            f"dev recall@10 has fallen {FALLING} times in a row, to {100 * recalls[-1]:.1f} %, while the training loss "
            "falls: the model learns its pictures by heart. best/ is kept; fewer --epochs, --feature-dropout 0.2, more "
            "--views or --patience help",
        )


def check_steps(steps: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Are steps lost?"""
    lost = sum(row["gradient_norm"] is None for row in steps) / len(steps)
    if lost > SKIPPED and len(steps) >= 10:
        yield Finding(
            "skipped-steps",
            f"{100 * lost:.0f} % of the steps were skipped, for float16 can't hold their gradients; take --precision "
            "bfloat16 or float32, or halve the learning rates",
        )


def check_rows(images: NDArray[np.float32], texts: NDArray[np.float32], step: int, total: int) -> Iterator[Finding]:
    """Unit rows [n, d] and [m, d] of dev: are they all the same? From random weights they are at first."""
    if step < max(SETTLED[0], SETTLED[1] * total):
        return
    for name, rows in (("pictures", images), ("captions", texts)):
        cosine = mean_cosine(rows)
        if cosine > COLLAPSED:
            yield Finding(
                f"collapsed-{name}",
                f"all {name} are embedded alike (mean cosine {cosine:.2f}): nothing can be told apart. Lower the "
                "learning rates, take a larger batch, and see that the towers are pretrained",
            )


def mean_cosine(rows: NDArray[np.float32]) -> float:
    """Of different unit rows [n, d], by way of the length of their sum; 0 for one row."""
    count = len(rows)
    total = float(np.square(rows.sum(axis=0, dtype=np.float64)).sum())
    return (total - count) / (count * (count - 1)) if count > 1 else 0.0


def check_captions(rows: Sequence[CaptionedImage]) -> Iterator[Finding]:
    """Are pictures without a caption of their own? In a batch they are taken for negatives of each other."""
    owners = Counter(caption for row in rows for caption in set(row.captions))
    shared = sum(all(owners[caption] > 1 for caption in row.captions) for row in rows) / len(rows)
    if shared > SHARED:
        yield Finding(
            "shared-captions",
            f"{100 * shared:.0f} % of the pictures have only captions that other pictures have too: the loss pushes "
            "them apart though they fit. See clipmatch data check; more precise captions help, and smaller batches",
        )


def check_features(kind: str, sample: NDArray[Any]) -> Iterator[Finding]:
    """Features [k, h] of a frozen tower: do they differ?"""
    values = np.asarray(sample, np.float64)
    size = float(np.abs(values).mean())
    if len(values) > 1 and float(values.std(axis=0).mean()) <= ALIKE * size:
        yield Finding(
            f"dead-{kind}-tower",
            f"the {kind} tower gives the same for everything, so heads can learn nothing from it; take another tower "
            f"or pooling, or train it: --tune-{kind} all",
        )
