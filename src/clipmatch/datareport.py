"""A check of captioned photographs as text.

In: a `DataReport`. Out: lines for a terminal: sections, each with its counts first, then at most ten examples a kind.
Knows nothing of files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from clipmatch.datacheck import BadImage, Copies, DataReport, Mislabelled
from clipmatch.formats import LineNote
from clipmatch.output import printable

EXAMPLES = 10  # of one kind that are shown; --json has all
SHOWN = 70  # characters of a caption


def report_text(report: DataReport) -> str:
    """All sections, with a blank line between two."""
    sections = (rows, images, captions, splits, duplicates, mislabelled, verdict)
    return "\n\n".join("\n".join(section(report)) for section in sections)


def rows(report: DataReport) -> Iterator[str]:
    """What the caption file came to."""
    yield f"{printable(Path(report.source).name)} ({report.format})"
    repaired, dropped = len(report.repaired), len(report.dropped)
    yield f"rows: {report.rows:,} read, {repaired:,} repaired, {dropped:,} dropped"
    yield from listed("repaired", [note(line) for line in report.repaired])
    yield from listed("dropped", [note(line) for line in report.dropped])


def images(report: DataReport) -> Iterator[str]:
    """The files, and how many captions they have."""
    missing, unreadable = len(report.missing), len(report.unreadable)
    yield f"images: {report.images:,} named, {missing:,} missing, {unreadable:,} unreadable"
    yield from listed("missing", [bad_image(image, report.unit) for image in report.missing])
    yield from listed("unreadable", [bad_image(image, report.unit) for image in report.unreadable])
    spread = report.per_image
    yield f"captions per image: {spread.min} at least, {spread.median:g} in the median, {spread.max} at most"
    by_count = [f"{plural(count, 'image')} with {number}" for number, count in spread.counts.items()]
    yield from listed("", by_count)


def captions(report: DataReport) -> Iterator[str]:
    """What the words tell."""
    yield (
        f"captions: {len(report.odd):,} odd, {len(report.repeated):,} repeated with one image, "
        f"{len(report.shared):,} shared by many images"
    )
    odd = [f"{report.unit} {one.line}: {one.reason}: {quoted(one.caption)}" for one in report.odd]
    yield from listed("odd", odd)
    repeated = [
        f"{lines(one.lines, report.unit)}: {printable(one.image)}: {quoted(one.caption)}" for one in report.repeated
    ]
    yield from listed("repeated with one image", repeated)
    shared = [
        f"{quoted(one.caption)}: {plural(len(one.images), 'image')}, {lines(one.lines, report.unit)}"
        for one in report.shared
    ]
    yield from listed("shared by many images", shared)


def splits(report: DataReport) -> Iterator[str]:
    """What would be trained on, and what held out."""
    parts = report.splits
    if parts.problem:
        yield f"splits: none. {parts.problem}"
    else:
        yield f"splits: {parts.train:,} train, {parts.dev:,} dev, {parts.neither:,} in neither ({parts.origin})"


def duplicates(report: DataReport) -> Iterator[str]:
    """Images that are there more than once; those that are in train and dev first."""
    near = "near ones not looked for" if report.near is None else f"{len(report.near):,} near"
    across = report.counts["across_splits"]
    yield f"copies: {plural(len(report.exact), 'group')} byte for byte, {near}; {across:,} across train and dev"
    yield from listed("byte for byte", copies(report.exact))
    yield from listed("near", copies(report.near or []))
    if report.near_note:
        yield report.near_note


def mislabelled(report: DataReport) -> Iterator[str]:
    """Captions that seem to belong to another picture."""
    if report.mislabelled is None:
        yield f"{report.mislabelled_note}"
        return
    single = [one for one in report.mislabelled if not one.picture]
    whole: dict[str, list[int]] = defaultdict(list)
    for one in report.mislabelled:
        if one.picture:
            whole[one.image].append(one.line)
    yield f"mislabelled, perhaps: {plural(len(single), 'caption')}, {plural(len(whole), 'image')}"
    yield from listed(
        "captions that fit other pictures better, worst first", [suspicion(one, report.unit) for one in single]
    )
    pictures = [f"{printable(image)} ({lines(sorted(numbers), report.unit)})" for image, numbers in whole.items()]
    yield from listed("images that none of their captions fits", pictures)


def verdict(report: DataReport) -> Iterator[str]:
    """All in one line."""
    names = {
        "across_splits": "copies across splits",
        "exact": "copies",
        "near": "near copies",
        "splits": "unusable splits",
    }
    found = [f"{names.get(kind, kind)} {count:,}" for kind, count in report.counts.items() if count]
    yield f"found: {', '.join(found)}" if found else "found: nothing wrong"


def listed(heading: str, examples: Sequence[str]) -> Iterator[str]:
    """The first examples of a kind, and how many more there are; nothing if there are none."""
    if examples and heading:
        yield f"  {heading}:"
    yield from (f"    {example}" for example in examples[:EXAMPLES])
    if len(examples) > EXAMPLES:
        yield f"    and {len(examples) - EXAMPLES:,} more"


def copies(groups: Sequence[Copies]) -> list[str]:
    """Groups of copies, those across train and dev first, each image with its part."""
    ordered = sorted(groups, key=lambda group: not group.across)
    return [
        ("across train and dev: " if group.across else "")
        + ", ".join(
            f"{printable(image)}{f' ({part})' if part else ''}"
            for image, part in zip(group.images[:EXAMPLES], group.splits, strict=False)
        )
        + (f" and {len(group.images) - EXAMPLES:,} more" if len(group.images) > EXAMPLES else "")
        for group in ordered
    ]


def suspicion(one: Mislabelled, unit: str) -> str:
    """A caption that seems to belong to another picture, in a line."""
    better = f"{100 * one.better:.0f} % of the images fit it better"
    return f"{unit} {one.line}: {printable(one.image)}: {quoted(one.caption)} ({better})"


def bad_image(image: BadImage, unit: str) -> str:
    """An image that can't be used, in a line."""
    return f"{printable(image.image)}: {image.reason} ({lines(image.lines, unit)})"


def note(line: LineNote) -> str:
    """A line of the caption file, and what was done about it."""
    return f"{line.place}: {printable(line.text)}"


def lines(numbers: Sequence[int], unit: str) -> str:
    """Line numbers in words, the first few of many."""
    numbers = list(dict.fromkeys(numbers))  # a record has perhaps five captions
    first = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
    return f"{unit}{'s' * (len(numbers) > 1)} {first}"


def quoted(caption: str) -> str:
    """A caption on one line, cut off if it is long."""
    text = printable(caption)
    return f'"{text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"}"'


def plural(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
