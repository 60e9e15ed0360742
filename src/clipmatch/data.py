"""Caption files -> captioned images, and their split into train and dev.

In: a caption file (or a folder that holds one), the image folder, split files. The formats are those of `formats`.
Out: immutable rows, one an image, with a note for every line that was repaired or dropped. Knows nothing of pixels,
tokens or models; it looks whether an image file is there and never opens one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from clipmatch.errors import ClipmatchError
from clipmatch.formats import CAPTION_COLUMNS, IMAGE_COLUMNS, READERS, Entry, Reader, read_lines, split_lines
from clipmatch.formats import LineNote as LineNote  # part of this module's interface

CAPTION_FILES = (
    "captions.txt",
    "results.csv",
    "Flickr8k.token.txt",
    "results_20130124.token",
    "captions.csv",
    "captions.tsv",
    "metadata.csv",
)
IMAGE_FOLDERS = (
    "Images",
    "images",
    "Flicker8k_Dataset",  # spelt so by its makers
    "Flickr8k_Dataset",
    "flickr30k_images",
    "flickr30k-images",
)
OFFICIAL_SPLITS = (
    ("splits/train.txt", "splits/dev.txt"),
    ("Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt"),
)


@dataclass(frozen=True)
class CaptionedImage:
    """One image that is on disk, with all its captions in file order."""

    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class CaptionSet:
    """What a caption file came to: images in order of first appearance, and what is not among them."""

    rows: tuple[CaptionedImage, ...]
    format: str
    source: Path
    repaired: tuple[LineNote, ...]
    dropped: tuple[LineNote, ...]
    missing: tuple[str, ...]  # names of images that are not on disk
    entries: tuple[Entry, ...] = ()  # every caption with its line, in file order, those of missing images too


@dataclass(frozen=True)
class Splits:
    """Two parts without a common image.

    origin: in words, where the division comes from. missing: images that the caption file lists and the folder lacks.
    """

    train: tuple[CaptionedImage, ...]
    dev: tuple[CaptionedImage, ...]
    origin: str
    missing: tuple[str, ...] = ()


def load_captions(path: str | Path, images: str | Path | None = None, format: str | None = None) -> CaptionSet:
    """Read a caption file and find its images.

    `path` is the file or a folder that holds one, up to two folders deep. `images` is the image folder, guessed from
    the usual names beside the file if None. `format` is a name in `READERS`, recognised if None.
    Raises `ClipmatchError` if nothing can be read or none of the images is there.
    """
    source = find_caption_file(Path(path).expanduser())
    with readable(source):
        reader = pick_reader(source, format)
        entries, repaired, dropped = gather(reader.read(source))
    captions = by_image(entries)
    if not captions:
        first = f"; the first was line {dropped[0].line}: {dropped[0].text}" if dropped else ""
        raise ClipmatchError(
            f"{source} has no caption that can be read as {reader.name} (dropped lines: {len(dropped)}{first}); "
            "choose another file or format."
        )
    folder = Path(images).expanduser() if images is not None else guess_images(source, captions)
    if not folder.is_dir():
        raise ClipmatchError(f"The image folder {folder} does not exist; give the folder that holds the images.")
    missing = tuple(name for name in captions if not exists(folder / name))
    if len(missing) == len(captions):
        raise ClipmatchError(
            f"None of the {len(captions)} images that {source.name} names is in {folder} "
            f"(tried {folder / missing[0]}); give the folder that holds them."
        )
    absent = set(missing)
    rows = (CaptionedImage(folder / name, tuple(texts)) for name, texts in captions.items() if name not in absent)
    return CaptionSet(tuple(rows), reader.name, source, repaired, dropped, missing, entries)


def find_caption_file(path: Path) -> Path:
    """The file itself, or the shallowest file with a known name in the folder or two folders below it."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ClipmatchError(f"There is no caption file or folder {path}; check the path.")
    level = [path]
    for _ in range(3):
        found = [file for folder in level for file in known_files(folder)[:1]]
        if len(found) == 1:
            return found[0]
        if found:
            raise ClipmatchError(
                f"{path} holds more than one caption file ({found[0]}, {found[1]}); name the one that you mean."
            )
        level = [inner for folder in level for inner in subfolders(folder)]
    raise ClipmatchError(
        f"{path} holds no caption file: looked for {', '.join(CAPTION_FILES)} there and two folders deep; "
        "give the file itself."
    )


def known_files(folder: Path) -> list[Path]:
    """The caption files with a known name that lie directly in a folder."""
    return [folder / name for name in CAPTION_FILES if exists(folder / name)]


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in a folder, by name; a folder that may not be listed counts as empty."""
    try:
        # scandir knows folders from files without a look-up each: an image folder has tens of thousands of files
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except OSError:
        return []


def guess_images(source: Path, names: Iterable[str]) -> Path:
    """The usual image folder near a caption file that holds most of the first names; a draw goes to the nearest."""
    sample = list(itertools.islice(names, 50))
    folders: list[Path] = []
    for base in (source.parent, source.parent.parent):
        for name in IMAGE_FOLDERS:
            folders += [base / name, *(base / name / inner for inner in IMAGE_FOLDERS)]
    folders = [folder for folder in folders if folder.is_dir()] + [source.parent]
    return max(folders, key=lambda folder: sum(exists(folder / name) for name in sample))


def exists(path: Path) -> bool:
    """Whether a file is there. A name that no file could have (too long, say) is not there."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to read a file into a `ClipmatchError`."""
    try:
        yield
    except OSError as error:
        raise ClipmatchError(f"Cannot read {path}: {error.strerror or error}.") from error


def pick_reader(source: Path, format: str | None) -> Reader:
    """The reader of that name, or the first that recognises the file."""
    known = ", ".join(reader.name for reader in READERS)
    with source.open("rb") as file:
        head = [line.text for line in split_lines(file.read(1 << 14)) if line.text.strip()][:5]
    if not head:
        raise ClipmatchError(f"The caption file {source} is empty; give another.")
    if format is not None:
        for reader in READERS:
            if reader.name == format:
                return reader
        raise ClipmatchError(f"Unknown caption format {format!r}; known: {known}.")
    for reader in READERS:
        if reader.sniff(source, head):
            return reader
    raise ClipmatchError(
        f"The format of {source} is not recognised (first line {head[0][:80]!r}); known: {known}. A table needs a "
        f"header with one of {', '.join(IMAGE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}."
    )


def gather(
    entries: Iterable[Entry | LineNote],
) -> tuple[tuple[Entry, ...], tuple[LineNote, ...], tuple[LineNote, ...]]:
    """What a reader found -> entries that can be used, notes on repaired lines, notes on dropped lines."""
    kept: list[Entry] = []
    repaired: list[LineNote] = []
    dropped: list[LineNote] = []
    for entry in entries:
        problem = entry if isinstance(entry, LineNote) else check(entry)
        if problem is not None:
            dropped.append(problem)
            continue
        assert isinstance(entry, Entry)
        kept.append(replace(entry, image=normal_name(entry.image), caption=entry.caption.strip()))
        if entry.repair:
            repaired.append(LineNote(entry.line, entry.repair))
    return tuple(kept), tuple(repaired), tuple(dropped)


def by_image(entries: Iterable[Entry]) -> dict[str, list[str]]:
    """Captions by image name, both in file order."""
    captions: dict[str, list[str]] = {}
    for entry in entries:
        captions.setdefault(entry.image, []).append(entry.caption)
    return captions


def check(entry: Entry) -> LineNote | None:
    """Why an entry cannot be used, or None."""
    name = normal_name(entry.image)
    if name in ("", "."):
        return LineNote(entry.line, "no image name")
    if not entry.caption.strip():
        return LineNote(entry.line, f"empty caption of {entry.image}")
    # judged by the rules of both systems: a caption file travels
    paths = (PurePosixPath(name), PureWindowsPath(name))
    if any(path.anchor or ".." in path.parts for path in paths):
        return LineNote(entry.line, f"the image name {name} leaves the image folder")
    return None


def normal_name(name: str) -> str:
    r"""One spelling for one relative path: `.\a\b.jpg` and `a/b.jpg` are the same image."""
    name = name.strip().replace("\\", "/")
    return str(PurePosixPath(name)) if name else ""


def read_split(path: str | Path) -> list[str]:
    """The image names of a split file, one a line. Raises `ClipmatchError` if it lists none."""
    with readable(Path(path)):
        names = [line.text.strip() for line in read_lines(Path(path)) if line.text.strip()]
    if not names:
        raise ClipmatchError(f"The split file {path} lists no image; give another.")
    return names


def select_split(rows: Iterable[CaptionedImage], split_file: str | Path) -> tuple[CaptionedImage, ...]:
    """The rows whose image a split file lists, by name with or without extension, or by the end of its path.

    A listed name without a row is no error; a list of which no name has a row is.
    """
    rows, listed = tuple(rows), {normal_name(name) for name in read_split(split_file)}
    chosen = tuple(row for row in rows if not listed.isdisjoint(spellings(row.path)))
    if not chosen:
        raise ClipmatchError(
            f"None of the {len(listed)} images that {split_file} lists is among the {len(rows)} captioned images; "
            "give a split file of this data set."
        )
    return chosen


def spellings(path: Path) -> list[str]:
    """How a list may name an image: `b`, `b.jpg`, `a/b.jpg`, ..."""
    parts = path.as_posix().split("/")
    return [path.stem, *("/".join(parts[at:]) for at in range(len(parts)))]


def split_captions(
    captions: CaptionSet,
    train: str | Path | None = None,
    dev: str | Path | None = None,
    dev_fraction: float = 0.1,
    seed: int = 0,
) -> Splits:
    """Divide by image, never by row: by the given split files, else the official ones, else by hash.

    The hash of seed and image name decides for each image alone, so a row more or less never moves another image.
    Raises `ClipmatchError` if an image is in both parts or a part is empty.
    """
    if (train is None) != (dev is None):
        raise ClipmatchError("Only one of the train and dev split files is given; give both, or neither.")
    if train is not None and dev is not None:
        splits = split_by_files(captions.rows, Path(train), Path(dev), f"split files {train} and {dev}")
        return replace(splits, missing=captions.missing)
    for names in OFFICIAL_SPLITS:
        files = (captions.source.parent / names[0], captions.source.parent / names[1])
        if exists(files[0]) and exists(files[1]):
            origin = f"official split files {names[0]} and {names[1]} beside {captions.source.name}"
            return replace(split_by_files(captions.rows, *files, origin), missing=captions.missing)
    return replace(split_by_hash(captions.rows, dev_fraction, seed), missing=captions.missing)


def split_by_files(rows: tuple[CaptionedImage, ...], train: Path, dev: Path, origin: str) -> Splits:
    """Split by two files that list image names."""
    splits = Splits(select_split(rows, train), select_split(rows, dev), origin)
    both = set(read_split(train)).intersection(read_split(dev))
    both |= {row.path.name for row in set(splits.train).intersection(splits.dev)}
    if both:
        raise ClipmatchError(
            f"{train} and {dev} both list {min(both)} ({len(both)} images in all); take them out of one of the files."
        )
    return splits


def split_by_hash(rows: tuple[CaptionedImage, ...], dev_fraction: float, seed: int) -> Splits:
    """Split by the hash of seed and image name."""
    if not 0 < dev_fraction < 1:
        raise ClipmatchError(f"dev_fraction must lie between 0 and 1, both excluded (got {dev_fraction}).")
    parts: dict[bool, list[CaptionedImage]] = {True: [], False: []}
    for row in rows:
        parts[hash_fraction(f"{seed}/{row.path.name}") < dev_fraction].append(row)
    if not parts[True] or not parts[False]:
        empty = "train" if parts[True] else "dev"
        raise ClipmatchError(
            f"With dev_fraction {dev_fraction} and seed {seed} none of the {len(rows)} images falls into {empty}; "
            "change one of them, or give split files."
        )
    origin = f"split by hash of the image name, {100 * dev_fraction:g} % to dev, seed {seed}"
    return Splits(tuple(parts[False]), tuple(parts[True]), origin)


def hash_fraction(text: str) -> float:
    """Text -> number in [0, 1) that is the same on every machine."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # 48 bits: exact in a float


def content_hash(rows: Iterable[CaptionedImage]) -> str:
    """16 hex digits that change with any image name or caption, and with nothing else: not with order or folder."""
    lines = sorted(json.dumps([row.path.name, sorted(row.captions)]) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
