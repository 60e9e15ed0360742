"""What a person needs to know of captioned photographs before training.

In: a caption file, its image folder, split files, a model if mislabelled captions are to be looked for. Out: a
`DataReport`, of which every part is a plain value: `to_json` is a stable form of it. Knows nothing of how it is shown,
and changes nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from clipmatch.captionrules import (
    OddCaption,
    RepeatedCaption,
    SharedCaption,
    find_odd,
    find_repeated,
    find_shared,
    why_odd,
)
from clipmatch.data import CaptionSet, by_image, load_captions, split_captions
from clipmatch.errors import ClipmatchError
from clipmatch.formats import Entry, LineNote
from clipmatch.mislabels import FEWEST, find_misfits
from clipmatch.picturecheck import NEEDS_LIBRARY, Look, find_hash, group_exact, group_near, look_at

if TYPE_CHECKING:
    from clipmatch.embedder import BatchedEmbedder

SCHEMA = 1  # of the JSON


@dataclass(frozen=True)
class BadImage:
    """An image that can't be used, and the lines of its captions."""

    image: str
    reason: str
    lines: list[int]


@dataclass(frozen=True)
class Spread:
    """How many captions the images have. counts: images by number of captions."""

    min: int
    median: float
    max: int
    counts: dict[int, int]


@dataclass(frozen=True)
class SplitCheck:
    """The division that training would use. problem: why there is none, in a sentence; then all numbers are 0."""

    origin: str
    train: int
    dev: int
    neither: int
    problem: str | None = None


@dataclass(frozen=True)
class Copies:
    """Images that are one; splits: that of each (train, dev, or None). across: whether train and dev both have it."""

    images: list[str]
    splits: list[str | None]

    @property
    def across(self) -> bool:
        """Whether what is learnt is also measured."""
        return {"train", "dev"} <= set(self.splits)


@dataclass(frozen=True)
class Mislabelled:
    """A caption that seems to belong to another picture; figures as in `mislabels.Misfit`."""

    line: int
    image: str
    caption: str
    cosine: float
    better: float
    picture: bool


@dataclass(frozen=True)
class DataReport:
    """All that was found. near and mislabelled are None where they were not looked for; a note says why. unit: what the
    numbers of "line" and "lines" count: lines, or records of a file without lines.
    """

    source: str
    format: str
    unit: str
    folder: str
    rows: int
    repaired: list[LineNote]
    dropped: list[LineNote]
    images: int
    missing: list[BadImage]
    unreadable: list[BadImage]
    per_image: Spread
    odd: list[OddCaption]
    repeated: list[RepeatedCaption]
    shared: list[SharedCaption]
    splits: SplitCheck
    exact: list[Copies]
    near: list[Copies] | None
    near_note: str | None
    mislabelled: list[Mislabelled] | None
    mislabelled_note: str | None

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each kind of finding."""
        across = sum(copies.across for copies in [*self.exact, *(self.near or [])])
        names = ("repaired", "dropped", "missing", "unreadable", "odd", "repeated", "shared", "exact", "near")
        found = {name: len(getattr(self, name) or []) for name in (*names, "mislabelled")}
        return {**found, "across_splits": across, "splits": int(self.splits.problem is not None)}

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names of the fields; schema says when their meaning has changed."""
        values = asdict(self)
        for kind in ("exact", "near"):
            for shown, copies in zip(values[kind] or [], getattr(self, kind) or [], strict=True):
                shown["across"] = copies.across
        return {"schema": SCHEMA, "counts": self.counts, **values}


def check_data(
    captions: str | Path | CaptionSet,
    images: str | Path | None = None,
    format: str | None = None,
    train: str | Path | None = None,
    dev: str | Path | None = None,
    model: BatchedEmbedder | None = None,
    progress: bool = True,
) -> DataReport:
    """Look at every caption and every image of a data set.

    The arguments are those of `load_captions` and `split_captions`. model: with it, captions that seem to belong to
    another picture are looked for, which embeds all.
    Raises ClipmatchError where nothing can be read at all; whatever else is wrong is in the report.
    """
    data = captions if isinstance(captions, CaptionSet) else load_captions(captions, images, format)
    paths, lines = image_paths(data), lines_of(data.entries)
    picture_hash = find_hash()
    looks = dict(zip(paths, look_at(list(paths.values()), picture_hash, progress), strict=True))
    readable = {name: look for name, look in looks.items() if look.reason is None}
    parts, splits = read_parts(data, train, dev)
    numbers = [len(texts) for texts in by_image(data.entries).values()]
    mislabelled, note = find_mislabelled(data, {name: paths[name] for name in readable}, model, progress)
    return DataReport(
        source=str(data.source),
        format=data.format,
        unit=data.unit,
        folder=str(image_folder(data)),
        rows=len(data.entries) + len(data.dropped),
        repaired=list(data.repaired),
        dropped=list(data.dropped),
        images=len(lines),
        missing=[BadImage(name, "does not exist", lines[name]) for name in data.missing],
        unreadable=[BadImage(name, look.reason, lines[name]) for name, look in looks.items() if look.reason],
        per_image=Spread(min(numbers), median(numbers), max(numbers), dict(sorted(Counter(numbers).items()))),
        odd=find_odd(data.entries),
        repeated=find_repeated(data.entries),
        shared=find_shared(data.entries),
        splits=splits,
        exact=find_exact(readable, parts),
        near=find_near(readable, parts) if picture_hash else None,
        near_note=None if picture_hash else NEEDS_LIBRARY,
        mislabelled=mislabelled,
        mislabelled_note=note,
    )


def image_paths(data: CaptionSet) -> dict[str, Path]:
    """The files of the images that are there, by name, in order of first appearance."""
    absent = set(data.missing)
    names = [name for name in by_image(data.entries) if name not in absent]
    return {name: row.path for name, row in zip(names, data.rows, strict=True)}


def image_folder(data: CaptionSet) -> Path:
    """The folder that image names start from."""
    name, path = next(iter(image_paths(data).items()))
    return path.parents[len(PurePosixPath(name).parts) - 1]


def lines_of(entries: Sequence[Entry]) -> dict[str, list[int]]:
    """The lines of each image's captions."""
    lines: dict[str, dict[int, None]] = defaultdict(dict)
    for entry in entries:
        lines[entry.image][entry.line] = None  # a record has perhaps five captions
    return {name: list(numbers) for name, numbers in lines.items()}


def read_parts(data: CaptionSet, train: str | Path | None, dev: str | Path | None) -> tuple[dict[str, str], SplitCheck]:
    """The part of each image that is in one, and the division as training would make it."""
    try:
        splits = split_captions(data, train, dev)
    except ClipmatchError as error:  # training would stop here; a check goes on
        return {}, SplitCheck("", 0, 0, 0, str(error))
    names = {path: name for name, path in image_paths(data).items()}
    parts = {names[row.path]: "train" for row in splits.train} | {names[row.path]: "dev" for row in splits.dev}
    neither = len(data.rows) - len(parts)
    return parts, SplitCheck(splits.origin, len(splits.train), len(splits.dev), neither)


def find_exact(looks: Mapping[str, Look], parts: Mapping[str, str]) -> list[Copies]:
    """Images of the same bytes."""
    names = list(looks)
    groups = group_exact([look.digest for look in looks.values()])
    return [copies_of([names[place] for place in group], parts) for group in groups]


def find_near(looks: Mapping[str, Look], parts: Mapping[str, str]) -> list[Copies]:
    """Images of the same looks, unless they are all of the same bytes."""
    hashed = [(name, look) for name, look in looks.items() if look.bits is not None]
    hashes = np.array([look.bits for _, look in hashed], bool).reshape(-1, 64)
    groups = [[hashed[place] for place in group] for group in group_near(hashes)] if hashed else []
    different = [group for group in groups if len({look.digest for _, look in group}) > 1]
    return [copies_of([name for name, _ in group], parts) for group in different]


def copies_of(names: list[str], parts: Mapping[str, str]) -> Copies:
    """A group of images that are one."""
    return Copies(names, [parts.get(name) for name in names])


def find_mislabelled(
    data: CaptionSet, paths: Mapping[str, Path], model: BatchedEmbedder | None, progress: bool
) -> tuple[list[Mislabelled] | None, str | None]:
    """The captions that a model finds far from their pictures, or why they were not looked for."""
    if model is None:
        return None, "Mislabelled captions were not looked for; --model NAME or --model embedded does that."
    if len(paths) < FEWEST:
        return None, f"Mislabelled captions can't be told among {len(paths)} images; that takes {FEWEST}."
    embedded = model.embed_images(list(paths.values()), progress)
    names = {path: name for name, path in paths.items()}
    numbers = {names[path]: number for number, path in enumerate(embedded.paths)}
    entries = [entry for entry in data.entries if entry.image in numbers and not why_odd(entry.caption)]
    texts = model.embed_texts([entry.caption for entry in entries], progress)
    owners = np.array([numbers[entry.image] for entry in entries], np.int64)
    found = []
    for misfit in find_misfits(embedded.rows, texts, owners):
        entry = entries[misfit.place]
        figures = round(misfit.cosine, 4), round(misfit.better, 4), misfit.picture
        found.append(Mislabelled(entry.line, entry.image, entry.caption, *figures))
    return found, None
