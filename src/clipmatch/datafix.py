"""A clean copy of a caption file.

In: captions that were read, what was found in them, a path. Out: a CSV file that `formats` reads back, with a column
for the parts that the captions themselves tell, beside it split files if the data set has some, and what was left out.
Never touches the captions, their images or anything that is there already.

Suspicions (near copies, mislabelled captions) are not acted on: they need a person's eye.
"""

from __future__ import annotations

import csv
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from clipmatch.atomic import atomic_file
from clipmatch.data import CaptionSet, splits_of
from clipmatch.datacheck import DataReport, read_parts
from clipmatch.errors import ClipmatchError, unwritable
from clipmatch.formats import Entry
from clipmatch.parquet import image_folder as unpacked_folder


@dataclass(frozen=True)
class Fixed:
    """What was written, how to train on it, and what was left out, each kind in words with its number.

    remarks: what else a person must know, in sentences.
    """

    file: Path
    splits: tuple[Path, ...]
    kept: int
    left_out: dict[str, int]
    command: str
    remarks: tuple[str, ...]


def check_free(out: Path) -> None:
    """Raise ClipmatchError if a clean copy can't go there; asked before the work."""
    if out.suffix.lower() != ".csv":
        raise ClipmatchError(f"The clean captions are a CSV file: name it .csv (got {out}).")
    if is_there(out):
        raise in_the_way(out)


def is_there(path: Path) -> bool:
    """Whether something lies there, be it a link that leads nowhere."""
    return path.exists() or path.is_symlink()


def in_the_way(path: Path) -> ClipmatchError:
    """The sentence for it."""
    return ClipmatchError(f"{path} is there already and is not overwritten; name another file.")


def split_names(out: Path) -> tuple[Path, Path]:
    """The split files of a caption file: captions.csv, captions.train.txt, captions.dev.txt."""
    return out.with_suffix(".train.txt"), out.with_suffix(".dev.txt")


def write_clean(
    data: CaptionSet, report: DataReport, out: Path, train: str | Path | None = None, dev: str | Path | None = None
) -> Fixed:
    """Write the captions that are worth training on. Raises ClipmatchError if a file is in the way.

    The captions come last, so that they are there only if all is; split files that a write that was killed has left
    behind are no obstacle, for they hold what would be written.
    """
    check_free(out)
    kept, left_out = sort_out(data, report)
    if not kept:
        raise ClipmatchError(f"Nothing of {data.source} is worth keeping; {out} was not written.")
    names = {entry.image for entry in kept}
    parts, splits = read_parts(data, train, dev)
    files: tuple[Path, ...] = ()
    texts: dict[Path, str] = {}
    command = f"clipmatch train --captions {shlex.quote(str(out))} --images {shlex.quote(report.folder)}"
    if parts and not splits.origin.startswith("split by hash"):  # a hash divides the clean copy in the same way
        files = split_names(out)
        for part, file in zip(("train", "dev"), files, strict=True):
            listed = (name for name, own in parts.items() if own == part and name in names)
            texts[file] = "".join(f"{name}\n" for name in listed)
        command += f" --train-split {shlex.quote(str(files[0]))} --dev-split {shlex.quote(str(files[1]))}"
    for path in split_names(out):
        if is_there(path) and not holds(path, texts.get(path)):
            raise in_the_way(path)
    for path, text in {**texts, out: as_csv(kept, splits_of(data.entries))}.items():
        write_new(path, text)
    remarks = [f"No split files were written. {splits.problem}"] if splits.problem else []
    if data.format == "parquet" and unpacked_folder(data.source):
        remarks.append(f"The pictures lie in the folder for caches, {report.folder}; keep it, or a copy.")
    return Fixed(out, files, len(kept), left_out, f"{command} --out out/clean", tuple(remarks))


def sort_out(data: CaptionSet, report: DataReport) -> tuple[list[Entry], dict[str, int]]:
    """The captions to keep, and how many are left out for which reason; a caption counts once."""
    copied = {
        name
        for copies in report.exact
        if copies.across
        for name, part in zip(copies.images, copies.splits, strict=True)
        if part != "dev"  # what is held out stays, and is learnt no more
    }
    reasons = (
        ("captions of missing images", {image.image for image in report.missing}),
        ("captions of unreadable images", {image.image for image in report.unreadable}),
        ("captions of images that dev has too", copied),
        (
            "captions of images with names that no text file holds",
            {e.image for e in data.entries if not is_line(e.image)},
        ),
    )
    odd = {(caption.line, caption.image, caption.caption) for caption in report.odd}
    left_out = {f"{data.unit}s that were dropped": len(report.dropped)}
    left_out |= {name: 0 for name, _ in reasons} | {"odd captions": 0}
    kept = []
    for entry in data.entries:
        reason = next((name for name, images in reasons if entry.image in images), None)
        if reason is None and (entry.line, entry.image, entry.caption) in odd:
            reason = "odd captions"
        if reason is None:
            kept.append(entry)
        else:
            left_out[reason] += 1
    return kept, left_out


def is_line(name: str) -> bool:
    """Whether a file of lines in UTF-8 can hold a name: Linux allows any bytes, line breaks too."""
    return not re.search("[\n\r\ud800-\udfff]", name)


def as_csv(entries: list[Entry], splits: dict[str, str]) -> str:
    """Captions as CSV, one a line: a line break in a caption becomes a space. splits: the parts of images, if any."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "caption", *(["split"] if splits else [])])
    for entry in entries:
        part = [splits.get(entry.image, "")] if splits else []
        writer.writerow([entry.image, " ".join(entry.caption.split()), *part])
    return text.getvalue()


def holds(path: Path, text: str | None) -> bool:
    """Whether a file has this content."""
    try:
        return text is not None and path.read_bytes() == text.encode()
    except OSError:
        return False


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet, or holds just that."""
    if holds(path, text):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, replace=False) as draft:
            draft.write_text(text, encoding="utf-8", newline="")
    except FileExistsError:
        raise in_the_way(path) from None
    except OSError as error:
        raise unwritable(path, error) from error
