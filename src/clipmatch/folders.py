"""The readers of captions that lie beside their pictures: text files in a folder, and WebDataset's tar archives.

In: a folder, an archive, or a pattern such as `shards/{00000..00099}.tar`. Out: entries and notes, as `formats`
describes them, with images named by their paths below `image_root`. Opens no picture and unpacks nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clipmatch.errors import ClipmatchError
from clipmatch.formats import Entry, LineNote, Reader, captions_of, is_wide, split_lines
from clipmatch.remote import open_raw

if TYPE_CHECKING:
    from clipmatch.archive import Member

CAPTION_SUFFIX = ".txt"
SPLIT_NAME = re.compile(
    r"(?:^|[^a-z])(train|training|val|valid|validation|dev|test|testing)(?=[^a-z]|$)", re.IGNORECASE
)
STEM = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")  # WebDataset: a sample's name ends at the first dot
RANGE = re.compile(r"\{([+-]?\d{1,30})\.\.([+-]?\d{1,30})[.}]")  # in a pattern
MAX_SHARDS = 1_000_000  # that a pattern may mean
MANY = 10  # archives, which take a second each
MAX_CAPTION_FILE = 1 << 20  # bytes; what is longer is no captions


# Files of a data set


def has_shards(path: Path, suffix: str) -> bool:
    """Whether a path is a file of that suffix, a folder with one, or a pattern of such files."""
    return bool(list_shards(path, suffix)) if path.is_dir() else path.suffix.lower() == suffix


def is_pattern(path: Path) -> bool:
    """Whether a path is a pattern in braces and no file."""
    return "{" in str(path) and not path.exists()


def list_shards(path: Path, suffix: str) -> list[Path]:
    """The file itself, the files of that suffix in a folder, or those that a pattern in braces means."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() == suffix)
    return [Path(name) for name in expand(str(path))] if is_pattern(path) else [path]


def expand(pattern: str) -> Iterable[str]:
    """A pattern in braces -> the names that it means."""
    try:
        from braceexpand import braceexpand
    except ModuleNotFoundError as error:
        raise ClipmatchError(
            'Patterns in braces need braceexpand; install it: pip install "clipmatch[data]"'
        ) from error
    sizes = (abs(int(last) - int(first)) + 1 for first, last in RANGE.findall(pattern))
    if math.prod(sizes) > MAX_SHARDS:  # told before: the library makes all of them at once
        raise ClipmatchError(f"The pattern {pattern} means more than {MAX_SHARDS:,} files; is there a digit too many?")
    try:
        return list(braceexpand(pattern, escape=False))
    except (ValueError, RecursionError) as error:
        raise ClipmatchError(f"The pattern {pattern} can't be understood ({error}); write e.g. {{00..99}}.") from None


def image_root(path: Path) -> Path:
    """The folder that the images of a folder, an archive or a pattern are named from."""
    if path.is_dir():
        return path
    parents = [str(Path(name).parent) for name in expand(str(path))] if is_pattern(path) else [str(path.parent)]
    return Path(os.path.commonpath(parents))


def split_of(name: str) -> str:
    """The split that the name of a shard tells, as `train-00000-of-00002.parquet` and `val/000.tar` do; else ""."""
    parts = SPLIT_NAME.findall(name)
    return parts[-1].lower() if parts else ""


# A folder of pictures, each with a text file


def read_image_folder(path: Path) -> Iterator[Entry | LineNote]:
    """Pictures with a text file of the same stem, a caption a line, at any depth."""
    number = 0
    for folder, pictures, texts in walk_pairs(path):
        for stem in sorted(pictures.keys() | texts):
            number += 1
            below = (folder / stem).relative_to(path).as_posix()
            if stem not in pictures:
                yield LineNote(number, f"{below}{CAPTION_SUFFIX} has no picture")
            elif stem not in texts:
                yield LineNote(number, f"{(folder / pictures[stem][0]).relative_to(path).as_posix()} has no captions")
            else:
                names = [(folder / name).relative_to(path).as_posix() for name in pictures[stem]]
                yield from pair_entries(number, names, folder / f"{stem}{CAPTION_SUFFIX}")


def walk_pairs(path: Path) -> Iterator[tuple[Path, dict[str, list[str]], set[str]]]:
    """Each folder below with its pictures by stem and the stems of its text files, in order of names."""
    from clipmatch.imageformats import SUFFIXES  # here: it brings Pillow, which not every command needs

    for folder, inner, files in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        pictures: dict[str, list[str]] = {}
        texts = set()
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)  # noqa: PTH122 - of each of perhaps a million
            if name.startswith("."):
                continue
            if suffix.lower() in SUFFIXES:
                pictures.setdefault(stem, []).append(name)
            elif suffix == CAPTION_SUFFIX:
                texts.add(stem)
        yield Path(folder), pictures, texts


def pair_entries(number: int, names: list[str], text: Path) -> Iterator[Entry | LineNote]:
    """The captions in a text file, for the pictures of its stem."""
    try:
        with open_raw(text) as file:
            data = file.read(MAX_CAPTION_FILE + 1)
    except OSError as error:
        yield LineNote(number, f"{text.name} can't be read ({error.strerror})")
        return
    if len(data) > MAX_CAPTION_FILE or is_wide(data):
        why = "in UTF-16 or UTF-32" if is_wide(data) else f"longer than {MAX_CAPTION_FILE:,} bytes"
        yield LineNote(number, f"{text.name} is {why}, so its captions were not read")
        return
    lines = [line for line in split_lines(data) if line.text.strip()]
    if not lines:
        yield LineNote(number, f"{text.name} holds no caption")
    for name in names:
        for line in lines:
            yield Entry(number, name, line.text, line.repair)


def is_image_folder(path: Path, head: list[str]) -> bool:
    """Whether there is a picture with a text file of its stem, at any depth."""
    return path.is_dir() and any(not texts.isdisjoint(pictures) for _, pictures, texts in walk_pairs(path))


# WebDataset


def is_webdataset(path: Path, head: list[str]) -> bool:
    """Whether a path names tar archives."""
    return has_shards(path, ".tar")


def read_webdataset(path: Path) -> Iterator[Entry | LineNote]:
    """Tar archives of samples: members of one stem, a picture and its captions in `.txt` (one a line) or `.json`.

    Bad samples, archives that are cut off, and archives that a pattern names in vain are notes.
    """
    from tqdm import tqdm

    from clipmatch.archive import contents, table

    shards, root, number = list_shards(path, ".tar"), image_root(path), 0
    for shard in tqdm(shards, desc="archives", unit="tar", disable=len(shards) < MANY):
        name = shard.relative_to(root).as_posix()
        try:
            found = contents(shard)
            table(shard)  # made while the contents are at hand: the pictures will be read by it
        except OSError as error:
            number += 1
            yield LineNote(number, f"{name} can't be read ({error.strerror})")
            continue
        for stem, sample in samples_of(found.members).items():
            number += 1
            yield from sample_entries(number, shard, name, stem, sample)
        if found.problem:
            yield LineNote(number, f"{name} is {found.problem}")


def samples_of(members: Iterable[Member]) -> dict[str, dict[str, Member]]:
    """Members of an archive -> samples by stem, each with its members by suffix; of two of one name the first."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        if parts := STEM.fullmatch(member.name):
            samples.setdefault(parts[1], {}).setdefault(parts[2].lower(), member)
    return samples


def sample_entries(
    number: int, shard: Path, name: str, stem: str, sample: dict[str, Member]
) -> Iterator[Entry | LineNote]:
    """A sample -> its entries, or a note that says what it lacks. name: of the archive, below the root."""
    picture, captions = sample_picture(sample), sample_captions(shard, sample)
    if picture is None or not captions:
        yield LineNote(number, f"{name}/{stem} has no {'picture' if picture is None else 'caption that can be read'}")
        return
    for caption in captions:
        yield Entry(number, f"{name}/{picture.name}", caption, split=split_of(name))


def sample_picture(sample: dict[str, Member]) -> Member | None:
    """The picture of a sample, if it has one."""
    from clipmatch.imageformats import SUFFIXES

    return next((member for suffix, member in sample.items() if f".{suffix}" in SUFFIXES and member.size), None)


def sample_captions(shard: Path, sample: dict[str, Member]) -> list[str]:
    """The captions of a sample: the lines of its text, else those in its JSON."""
    from clipmatch.archive import read_at

    for suffix, parse in (("txt", caption_lines), ("json", caption_fields)):
        member = sample.get(suffix)
        if member and member.size <= MAX_CAPTION_FILE:
            try:
                captions = parse(read_at(shard, member.offset, member.size))
            except (OSError, ValueError, RecursionError):  # damaged JSON
                continue
            if captions:
                return captions
    return []


def caption_lines(data: bytes) -> list[str]:
    """Text, a caption a line."""
    return [line.text for line in split_lines(data) if line.text.strip()]


def caption_fields(data: bytes) -> list[str]:
    """A JSON object with its captions as a string or a list. Raises ValueError for no JSON."""
    record = json.loads(data)
    return captions_of(record) if isinstance(record, dict) else []


# A folder with archives may hold text files beside them, so it comes first.
FOLDER_READERS = (
    Reader("webdataset", is_webdataset, read_webdataset, unit="sample", images=image_root, folders=True),
    Reader("image-folder", is_image_folder, read_image_folder, unit="file", images=image_root, folders=True),
)
