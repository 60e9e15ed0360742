"""Similarity -> ranks -> recall@k, both ways.

In: unit rows of pictures and captions, and which caption belongs to which picture; or a model and captioned pictures.
Out: figures with their chance level and interval, and the ranks behind them. Knows nothing of PyTorch, towers or files
of captions. Shapes: n pictures, m captions, d numbers a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipmatch.data import CaptionedImage, CaptionSet, content_hash
from clipmatch.embedder import missing_files
from clipmatch.errors import ClipmatchError

if TYPE_CHECKING:
    from clipmatch.embedder import Embedder, ImageEmbeddings
    from clipmatch.errors import Failure

Integers: TypeAlias = NDArray[np.int64]
Figures: TypeAlias = dict[str, dict[str, Any]]

RECALLS = (1, 5, 10)
RESAMPLES = 1000
BLOCK_SCORES = 1 << 22  # scores held at once: about 80 MB with what is derived from them, whatever the gallery


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The figures of one model on one set of captioned pictures, with the arrays that a report draws.

    `text_to_image` and `image_to_text` are as `measure` returns them. Ranks are 1-based: `text_ranks` [m] is each
    caption's, `image_ranks` [n] each picture's. `paths` and `captions` are in the order of the rows.
    """

    text_to_image: dict[str, Any]
    image_to_text: dict[str, Any]
    text_ranks: Integers
    image_ranks: Integers
    image_rows: NDArray[np.float32]
    text_rows: NDArray[np.float32]
    image_of_text: Integers
    paths: tuple[Path, ...]
    captions: tuple[str, ...]
    split_hash: str
    failures: tuple[Failure, ...]
    fingerprint: str
    model_path: str | None
    seed: int

    def to_json(self) -> dict[str, Any]:
        """The figures alone, as plain JSON types; recalls, intervals and chance levels are fractions of 1."""
        return {
            "text_to_image": self.text_to_image,
            "image_to_text": self.image_to_text,
            "images": len(self.paths),
            "captions": len(self.captions),
            "gallery": len(self.paths),
            "split_hash": self.split_hash,
            "failures": [{"path": str(failure.path), "reason": failure.reason} for failure in self.failures],
            "model": {"fingerprint": self.fingerprint, "path": self.model_path},
            "seed": self.seed,
        }


def retrieval_ranks(
    image_rows: ArrayLike, text_rows: ArrayLike, image_of_text: ArrayLike, block_scores: int = BLOCK_SCORES
) -> tuple[Integers, Integers]:
    """Rows [n, d] and [m, d], owner of each caption [m] -> ranks of the captions [m] and of the pictures [n], 1-based.

    A caption's rank is 1 + the number of other pictures that score at least as high as its own: a tie counts against
    the model. A picture's rank is that of its best caption among the captions of other pictures: its own never compete
    with each other. Scores are dot products, so rows should have unit length; at most about `block_scores` of them are
    held at once.

    Raises `ClipmatchError` on rows that are empty, zero or not finite (no comparison with NaN is true, so a broken
    model would rank first everywhere), on shapes that don't fit, and on a picture without a caption.
    """
    images, texts = _checked(image_rows, "picture"), _checked(text_rows, "caption")
    owner = _checked_owner(image_of_text, images, texts)
    own = np.einsum("md,md->m", texts, images[owner]).astype(np.float32)  # [m]: of each caption with its own picture
    best = np.full(len(images), -np.inf, np.float32)  # [n]: of each picture with the best of its own captions
    np.maximum.at(best, owner, own)
    text_ranks = np.empty(len(texts), np.int64)
    image_ranks = 1 - np.bincount(owner[own == best[owner]], minlength=len(images))  # its own best is no rival
    for part in _blocks(len(texts), len(images), block_scores):
        scores = _scores(texts[part], images)  # [b, n]
        scores[np.arange(len(scores)), owner[part]] = own[part]  # whatever the last bit of the product was
        text_ranks[part] = (scores >= own[part, None]).sum(axis=1)  # its own picture is the 1 of "1 +"
        image_ranks += (scores >= best).sum(axis=0)
    return text_ranks, image_ranks


def recall_at_k(ranks: ArrayLike, k: int) -> float:
    """The fraction of 1-based ranks that are k or better."""
    return float(np.mean(np.asarray(ranks) <= k))


def chance_level(k: int, candidates: int, own: ArrayLike = 1) -> float:
    """Expected recall@k of a random order of `candidates`, of which `own` are right (averaged, where own is an array).

    1 - C(m - c, k) / C(m, k) for c right ones among m; k / m for a single one.
    """
    k = min(k, candidates)
    every = math.comb(candidates, k)
    counts, queries = np.unique(np.atleast_1d(np.asarray(own)), return_counts=True)
    hits = [(every - math.comb(candidates - int(count), k)) / every for count in counts]  # exact until the division
    return float(np.average(hits, weights=queries))


def bootstrap_interval(
    ranks: ArrayLike,
    image_of_rank: ArrayLike,
    ks: Sequence[int] = RECALLS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[int, tuple[float, float]]:
    """95 % percentile interval of recall@k for each k, from resampling pictures with all the ranks they own.

    Captions of one picture are not independent of each other, so pictures are drawn, not captions. Ranks stay those of
    the whole gallery. Method: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    owner = np.asarray(image_of_rank)
    hits = np.asarray(ranks)[:, None] <= np.asarray(ks)  # [m, K]
    images = int(owner.max()) + 1
    tally = np.zeros((images, len(ks) + 1))  # hits at each k, and in the last column how many ranks the picture owns
    np.add.at(tally, owner, np.column_stack([hits, np.ones(len(hits))]))
    rng, share = np.random.default_rng(seed), np.full(images, 1 / images)
    sums = np.concatenate(
        [rng.multinomial(images, share, size=part.stop - part.start) @ tally for part in _blocks(resamples, images)]
    )  # [resamples, K + 1]
    low, high = np.percentile(sums[:, :-1] / sums[:, -1:], [2.5, 97.5], axis=0)
    return {k: (float(low[i]), float(high[i])) for i, k in enumerate(ks)}


def measure(
    image_rows: ArrayLike, text_rows: ArrayLike, image_of_text: ArrayLike, seed: int = 0, bootstrap: bool = True
) -> Figures:
    """Rows as for `retrieval_ranks` -> {"text_to_image": {...}, "image_to_text": {...}}.

    Each direction has recall@1, @5 and @10 (fractions), median_rank, mean_rank, chance and, with `bootstrap`, interval.
    """
    text_ranks, image_ranks = retrieval_ranks(image_rows, text_rows, image_of_text)
    return _figures(text_ranks, image_ranks, np.asarray(image_of_text), seed, bootstrap)


def evaluate(
    model: Embedder | str | Path | None,
    data: CaptionSet | Sequence[CaptionedImage],
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """A model (or its name, as for `load_model`) and captioned pictures -> figures both ways.

    Pictures that are missing or can't be read are left out with their captions and listed in `failures`. The split
    hash is that of the data as given, so it names the split whether or not every file could be read.

    Raises `ClipmatchError` if there is nothing to measure: no rows, a row without captions, no readable picture.
    """
    rows = tuple(data.rows if isinstance(data, CaptionSet) else data)
    _check_captioned(rows)
    absent = missing_files(data.missing) if isinstance(data, CaptionSet) else []
    embedder = _embedder(model)
    images = embedder.embed_images([row.path for row in rows], progress=progress)
    kept = _readable(rows, images)
    captions = tuple(caption for row in kept for caption in row.captions)
    owner = np.repeat(np.arange(len(kept)), [len(row.captions) for row in kept])
    texts = embedder.embed_texts(list(captions), progress=progress)
    text_ranks, image_ranks = retrieval_ranks(images.rows, texts, owner)
    return Evaluation(
        **_figures(text_ranks, image_ranks, owner, seed, bootstrap=True),
        text_ranks=text_ranks,
        image_ranks=image_ranks,
        image_rows=images.rows,
        text_rows=texts,
        image_of_text=owner,
        paths=tuple(row.path for row in kept),
        captions=captions,
        split_hash=content_hash(rows),
        failures=(*absent, *images.failures),
        fingerprint=embedder.fingerprint,
        model_path=str(model) if isinstance(model, str | Path) else None,
        seed=seed,
    )


def recall_table(figures: dict[str, Any]) -> str:
    """The figures as a small table, percent."""
    lines = [f"{figures['images']} images, {figures['captions']} captions; percent (95 % interval; chance)"]
    for direction, label in (("text_to_image", "text -> image"), ("image_to_text", "image -> text")):
        part = figures[direction]
        cells = []
        for k in (1, 5, 10):
            low, high = (100 * bound for bound in part["interval"][f"recall@{k}"])
            chance = 100 * part["chance"][f"recall@{k}"]
            cells.append(f"R@{k} {100 * part[f'recall@{k}']:.1f} ({low:.1f}-{high:.1f}; {chance:.1f})")
        lines.append(f"{label}  {'  '.join(cells)}  median rank {part['median_rank']:g}")
    return "\n".join(lines)


def _figures(text_ranks: Integers, image_ranks: Integers, owner: Integers, seed: int, bootstrap: bool) -> Figures:
    images, texts = len(image_ranks), len(text_ranks)
    captions_of_image = np.bincount(owner, minlength=images)
    towards_image = {k: chance_level(k, images) for k in RECALLS}
    towards_text = {k: chance_level(k, texts, captions_of_image) for k in RECALLS}
    return {
        "text_to_image": _direction(text_ranks, owner, towards_image, seed, bootstrap),
        "image_to_text": _direction(image_ranks, np.arange(images), towards_text, seed, bootstrap),
    }


def _direction(
    ranks: Integers, owner: Integers, chance: dict[int, float], seed: int, bootstrap: bool
) -> dict[str, Any]:
    figures: dict[str, Any] = {f"recall@{k}": recall_at_k(ranks, k) for k in RECALLS}
    figures["median_rank"] = float(np.median(ranks))
    figures["mean_rank"] = float(np.mean(ranks))
    if bootstrap:
        intervals = bootstrap_interval(ranks, owner, seed=seed)
        figures["interval"] = {f"recall@{k}": list(interval) for k, interval in intervals.items()}
    figures["chance"] = {f"recall@{k}": level for k, level in chance.items()}
    return figures


def _scores(queries: NDArray[np.float64], candidates: NDArray[np.float64]) -> NDArray[np.float32]:
    """[b, d], [c, d] -> [b, c]. Summed in float64 and rounded to float32: two equal rows then tie exactly, where the
    last bit of a matrix product would otherwise depend on their place in the block.
    """
    scores: NDArray[np.float64] = queries @ candidates.T
    return scores.astype(np.float32)


def _blocks(rows: int, row_length: int, cells: int = BLOCK_SCORES) -> Iterator[slice]:
    step = max(1, cells // row_length)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _checked(rows: ArrayLike, what: str) -> NDArray[np.float64]:
    array = np.asarray(rows, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ClipmatchError(f"The {what} embeddings have shape {array.shape}; pass at least one row, as [rows, d].")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise ClipmatchError(
            f"{(~finite).sum()} of {len(array)} {what} embeddings hold NaN or infinity, the first in row "
            f"{int(np.argmin(finite))}, so no rank means anything; use a checkpoint from before training diverged."
        )
    blank = ~array.any(axis=1)
    if blank.any():
        raise ClipmatchError(
            f"{blank.sum()} of {len(array)} {what} embeddings are all zeros, the first in row {int(np.argmax(blank))}; "
            "check the model that made them."
        )
    return array


def _checked_owner(
    image_of_text: ArrayLike, images: NDArray[np.float64], texts: NDArray[np.float64]
) -> NDArray[np.int64]:
    owner = np.asarray(image_of_text)
    if images.shape[1] != texts.shape[1]:
        raise ClipmatchError(
            f"Picture rows have {images.shape[1]} numbers and caption rows {texts.shape[1]}; embed both with one model."
        )
    if owner.shape != (len(texts),) or not np.issubdtype(owner.dtype, np.integer):
        raise ClipmatchError(
            f"image_of_text has shape {owner.shape} and type {owner.dtype}; it needs one picture number for each of "
            f"the {len(texts)} captions."
        )
    if owner.min() < 0 or owner.max() >= len(images):
        raise ClipmatchError(
            f"image_of_text names pictures {owner.min()} to {owner.max()}; there are {len(images)}, counted from 0."
        )
    bare = np.bincount(owner, minlength=len(images)) == 0
    if bare.any():
        raise ClipmatchError(
            f"{bare.sum()} pictures have no caption, the first is number {int(np.argmax(bare))}; leave them out."
        )
    return owner.astype(np.int64)


def _check_captioned(rows: Sequence[CaptionedImage]) -> None:
    if not rows:
        raise ClipmatchError("There are no captioned pictures to evaluate; check the caption file and the split.")
    for row in rows:
        if not row.captions:
            raise ClipmatchError(f"{row.path} has no captions; leave it out of the evaluation.")


def _embedder(model: Embedder | str | Path | None) -> Embedder:
    if model is not None and not isinstance(model, str | Path):
        return model
    from clipmatch.embedder import load_model  # here, because it may load PyTorch

    return load_model(model)


def _readable(rows: Sequence[CaptionedImage], images: ImageEmbeddings) -> list[CaptionedImage]:
    if not images.paths:
        first = images.failures[0]
        raise ClipmatchError(
            f"None of the {len(rows)} pictures could be read, so there is nothing to evaluate; the first is "
            f"{first.path}: {first.reason}"
        )
    readable = set(images.paths)
    kept = [row for row in rows if row.path in readable]
    if [row.path for row in kept] != list(images.paths):
        raise ClipmatchError("The embedder's pictures are not those that were asked for; it must keep their order.")
    return kept
