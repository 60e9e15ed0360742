"""All the kinds of captions that can be read, and which of them a file, a folder or a pattern is.

In: a path, or a folder that holds captions somewhere. Out: the path to read and its `Reader`. A further kind is one
more `Reader`, listed here before those that would take its files for their own.
"""

from __future__ import annotations

import fnmatch
import io
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from clipmatch.archive import compression
from clipmatch.errors import ClipmatchError
from clipmatch.folders import FOLDER_READERS, has_shards, is_image_folder, is_pattern
from clipmatch.formats import (  # fmt: skip
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    LINE_READERS,
    MAX_LINE,
    Reader,
    lines_of,
    refuse_wide,
)
from clipmatch.parquet import PARQUET_READERS
from clipmatch.records import JSON_READERS
from clipmatch.remote import open_raw

# The first that recognises a source reads it. Archives come first: as text they look like what they hold.
# Special cases come before the general ones.
READERS: tuple[Reader, ...] = (*FOLDER_READERS, *PARQUET_READERS, *JSON_READERS, *LINE_READERS)

CAPTION_FILES = (
    "captions.txt",
    "results.csv",
    "Flickr8k.token.txt",
    "results_20130124.token",
    "captions.csv",
    "captions.tsv",
    "metadata.csv",
    "metadata.jsonl",
    "dataset_[cf]*.json",  # Karpathy's, of COCO and Flickr; dataset_infos.json is something else
    "captions*.json",
    "captions*.jsonl",
)
CAPTION_SUFFIXES = tuple({Path(name).suffix for name in CAPTION_FILES})
SHARDS = (".tar", ".parquet")
FIRST_LINES = 5  # that tell the kind of a file
DEPTH = 3  # folders below the one that is given: Kaggle's are two or three deep


def find_caption_file(path: Path, format: str | None = None) -> Path:
    """The path itself if it is a file or a pattern, else the shallowest captions in the folder or below it.

    Files with a known name go before folders of archives or Parquet files, and these before pictures with text files.
    """
    if path.is_file() or (is_pattern(path) and path.suffix.lower() in SHARDS):
        return path
    if not path.is_dir():
        raise ClipmatchError(f"There is no caption file or folder {path}; check the path.")
    if any(reader.folders for reader in READERS if reader.name == format):
        return path
    levels = list(folder_levels(path))
    for level in levels:
        if found := [file for folder in level for file in known_files(folder)]:
            return the_one(path, found)
    for level in levels:
        if found := [folder for folder in level if any(has_shards(folder, suffix) for suffix in SHARDS)]:
            return the_one(path, found)
    if is_image_folder(path, []):
        return path
    raise ClipmatchError(
        f"{path} holds no captions: looked for {', '.join(CAPTION_FILES)} and for .tar and .parquet files there and "
        "three folders deep, and for pictures with a .txt file of the same name; give the file itself."
    )


def the_one(path: Path, found: list[Path]) -> Path:
    """The only one. Raises ClipmatchError if there are more."""
    if len(found) > 1:
        raise ClipmatchError(
            f"{path} holds more than one caption file ({found[0]}, {found[1]}); name the one that you mean."
        )
    return found[0]


def folder_levels(path: Path) -> Iterator[list[Path]]:
    """The folder itself, the folders in it, those in these, and so on."""
    level = [path]
    for _ in range(DEPTH + 1):
        yield level
        level = [inner for folder in level for inner in subfolders(folder)]


def known_files(folder: Path) -> list[Path]:
    """The caption files directly in a folder that have the first of the known names that occurs there."""
    try:
        # a folder of pictures has tens of thousands of names: no Path of each
        names = sorted(name for name in os.listdir(folder) if name.endswith(CAPTION_SUFFIXES))  # noqa: PTH208
    except OSError:  # it may not be listed
        return []
    for pattern in CAPTION_FILES:
        if found := [folder / name for name in fnmatch.filter(names, pattern) if (folder / name).is_file()]:
            return found
    return []


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in a folder, by name; a folder that may not be listed counts as empty."""
    try:
        # scandir knows folders from files without a look-up each: an image folder has tens of thousands of files
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except OSError:
        return []


def pick_reader(source: Path, format: str | None) -> Reader:
    """The reader of that name, or the first that recognises the source."""
    known = ", ".join(reader.name for reader in READERS)
    head = first_lines(source)
    if format is not None:
        for reader in READERS:
            if reader.name == format:
                return reader
        raise ClipmatchError(f"Unknown caption format {format!r}; known: {known}.")
    for reader in READERS:
        if reader.sniff(source, head):
            return reader
    if source.is_file() and (kind := compression(source)):
        raise ClipmatchError(f"{source} is compressed by {kind}; unpack it, and give what is inside.")
    if source.is_file():
        with open_raw(source) as file:
            refuse_wide(source, file.read(4))
    raise ClipmatchError(
        f"The format of {source} is not recognised (first line {head[0][:80]!r}); known: {known}. A table needs a "
        f"header with one of {', '.join(IMAGE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}."
    )


def first_lines(source: Path) -> list[str]:
    """The first lines of a file that are not blank; of a folder or a pattern [""]. Raises ClipmatchError if empty."""
    if not source.is_file():
        return [""]
    with open_raw(source) as file:
        start = io.BytesIO(file.read(MAX_LINE))
    head = list(islice((line.text for line in lines_of(start) if line.text.strip()), FIRST_LINES))
    if not head:
        raise ClipmatchError(f"The caption file {source} is empty; give another.")
    return head
