"""Which pictures there are on object storage and inside archives and Parquet files: listed as `crawl` lists folders.

In: an address, an archive. Out: a `Found` for each picture, a `Failure` for what can't be read. Opens no picture, and
looks for the side-cars of those that are listed in the listing itself, never by a request for each.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from clipmatch.archive import contents
from clipmatch.crawl import Found
from clipmatch.errors import ClipmatchError, Failure
from clipmatch.imageformats import is_image_name
from clipmatch.metadata import attempt
from clipmatch.photo import Stamp
from clipmatch.preprocess import plain_reason
from clipmatch.remote import absolute, is_remote, list_files, status_of
from clipmatch.sidecars import SIDECARS, completed, listed_stamp, sidecar_names, sidecar_stamp, told_stamp
from clipmatch.tablefiles import SUFFIX as PARQUET
from clipmatch.tablefiles import captions_in, has_captions, linked, row_names

ARCHIVES = (".tar", PARQUET)
GONE = "it is not there, and its table still names it"
AWAY = "it is not there now, nor any other in its folder; an index that has it keeps it until: clipmatch index --remove"


def is_archive(path: Path) -> bool:
    """Whether a path is named as an archive or a Parquet file is."""
    return path.suffix.lower() in ARCHIVES


def files_at(root: Path, exclude: Sequence[str] = ()) -> Iterator[Found]:
    """The pictures and archives below a folder of object storage. Raises ClipmatchError if it can't be read."""
    listed = list_files(root)
    texts = {str(path): (stamp.size, stamp.mtime) for path, stamp in listed if path.suffix in SIDECARS}
    for path, stamp in listed:
        if path == root:  # a single file: what lies beside it is not listed
            texts = {
                name: status for name in sidecar_names(str(path)) if (status := attempt(partial(status_of, Path(name))))
            }
        name = path.relative_to(root).as_posix()
        fits = any(fnmatch(path.name, pattern) or fnmatch(name, pattern) for pattern in exclude)
        if not fits and (is_image_name(path.name) or is_archive(path)):
            yield Found(path, replace(stamp, sidecar=listed_stamp(str(path), texts)))


def pictures_in(archive: Path) -> Iterator[Found | Failure]:
    """The pictures in an archive, whose time is the archive's, and what is wrong with it."""
    try:
        modified = status_of(archive)[1]
        if archive.suffix.lower() == PARQUET:
            yield from rows_of(archive, modified)
        else:
            yield from members_of(archive, modified)
    except (OSError, ValueError) as error:  # ValueError: bytes of a table that are no text
        yield Failure(archive, plain_reason(error))


def members_of(archive: Path, modified: int) -> Iterator[Found | Failure]:
    """The pictures in a tar archive; of two of one name the first. Raises OSError if it can't be read."""
    inside = contents(archive)
    if inside.problem:
        yield Failure(archive, inside.problem)
    sizes: dict[str, int] = {}
    for member in inside.members:
        sizes.setdefault(member.name, member.size)
    texts = {name: (size, modified) for name, size in sizes.items() if name.endswith(SIDECARS)}
    for name, size in sizes.items():
        if is_image_name(os.path.basename(name)):  # noqa: PTH119 - of each of very many
            yield Found(archive / name, Stamp(size, modified, listed_stamp(name, texts)))


def rows_of(table: Path, modified: int) -> Iterator[Found | Failure]:
    """The pictures in a Parquet file, or those whose paths it has, which are meant from its folder on, with captions.

    A picture that is not there is gone, unless all that are named in its folder are not there: that may be of a disk
    that is not plugged in. Raises OSError if it can't be read.
    """
    paths, captions = linked(table), captions_in(table)
    if paths is None:
        for name, words in zip(row_names(table), captions, strict=True):
            caption = " ".join(words) or None
            yield Found(table / name, Stamp(0, modified, told_stamp(caption) if caption else 0), caption)
        return
    told: dict[Path, list[str]] = {}  # a picture may be in a row for each of its captions
    for text, words in zip(paths, captions, strict=True):
        if text:
            told.setdefault(absolute(text if is_remote(text) else table.parent / text), []).extend(words)
    speaks = has_captions(table)
    items = [named(path, " ".join(dict.fromkeys(words)) or None, speaks) for path, words in told.items()]
    folders = {item.path.parent for item in items if isinstance(item, Found)}
    for item in items:
        away = isinstance(item, Failure) and item.reason == GONE and item.path.parent not in folders
        yield Failure(item.path, AWAY) if away else item


def named(path: Path, caption: str | None, speaks: bool) -> Found | Failure:
    """A picture that a table names; if it lies here, its side-cars are looked for. speaks: whether the table has
    captions at all, so that none is one that may have been taken away.
    """
    try:
        size, modified = status_of(path)
    except FileNotFoundError:
        return Failure(path, GONE)
    except (OSError, ValueError, ClipmatchError) as error:  # a null byte; an address of no file system
        return Failure(path, plain_reason(error))
    beside = None if is_remote(path) else sidecar_stamp(path)
    return Found(path, Stamp(size, modified, told_stamp(caption, beside) if speaks else beside or 0), caption)


def taken_once(items: Iterable[Found | Failure]) -> list[Found | Failure]:
    """Pictures that are both listed and named by tables, or named twice, as one each: with side-cars and caption."""
    once: dict[Path, Found | Failure] = {}
    for item in items:
        other = once.get(item.path)
        if isinstance(item, Found) and isinstance(other, Found):
            first, second = (item, other) if item.stamp.sidecar < 0 else (other, item)
            once[item.path] = with_sidecars(first, second.stamp)
        elif not isinstance(other, Found):
            once[item.path] = item
    return list(once.values())


def with_sidecars(item: Found, known: Stamp | None) -> Found:
    """What a table names, with what is known of its side-cars already, where the table can't tell."""
    if known is None:
        return item
    return replace(item, stamp=replace(item.stamp, sidecar=completed(item.stamp.sidecar, known.sidecar)))
