"""Pictures inside tar archives, read where they lie: `shards/00000.tar/000001.jpg` is a member of `shards/00000.tar`.
Those in rows of Parquet files (tablefiles.py) likewise.

In: paths. Out: open files, bytes, and what an archive holds. A path that leads into no archive is an ordinary file.
Knows nothing of captions or models. Nothing is unpacked: a member is found by its offset, which is looked up in a table
that each process makes once an archive from the headers alone. All functions may be called from threads.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, cast

from clipmatch.imageformats import SUFFIXES
from clipmatch.patience import count_anew, patiently
from clipmatch.remote import is_remote, keep, open_raw, read_whole, status_of, take
from clipmatch.tablefiles import SUFFIX as PARQUET
from clipmatch.tablefiles import read_row, row_names

TABLES = 4096  # archives whose tables are kept: of 10,000 pictures each, a table takes about 2 MB
TEXTS = 8  # archives of which the other files are known as well: whoever reads these goes through them in turn
BLOCK = 512  # bytes, of a header
READ = 1 << 20  # bytes hashed at once
BUFFER = 1 << 18  # bytes that are read at once from object storage
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip"}


@dataclass(frozen=True)
class Member:
    """A file in an archive: its name there, and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Contents:
    """The regular files of an archive in order; problem: why there may be more than could be read."""

    members: tuple[Member, ...]
    problem: str | None


def open_file(path: Path) -> IO[bytes]:
    """An ordinary file, or a member of an archive, open for reading. Raises OSError."""
    return open_raw(path) if locate(path) is None and not is_remote(path) else io.BytesIO(read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """The bytes of an ordinary file or of a member of an archive. Raises OSError."""
    kept = take(path) if is_remote(path) else None
    return read_now(path) if kept is None else kept


def read_now(path: Path) -> bytes:
    """`read_bytes`, from where they lie."""
    inside = locate(path)
    if inside is None:
        return read_whole(path)
    archive, name = inside
    if archive.suffix.lower() == PARQUET:
        return read_row(archive, name)
    place = table(archive).get(name)
    if place is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return read_at(archive, *place)


def digest_of(path: Path) -> str:
    """SHA-256, in hex, of the bytes of an ordinary file or of a member of an archive. Raises OSError.

    That is TimeoutError if the next part of it does not come within `patience.LIMIT` seconds.
    """

    def compute() -> str:
        if is_remote(path):
            data = read_now(path)
            keep(path, data)
            return hashlib.sha256(data).hexdigest()
        sha = hashlib.sha256()
        with open_file(path) as file:
            left = file.seek(0, io.SEEK_END)  # a file may grow as fast as it is read
            file.seek(0)
            while left > 0 and (block := file.read(min(left, READ))):
                count_anew()  # a large file on a slow line takes long, and comes
                sha.update(block)
                left -= len(block)
        return sha.hexdigest()

    return patiently(compute)


def read_small(path: Path, limit: int) -> bytes | None:
    """The bytes of an ordinary file or of any file in a tar archive; None above the limit. Raises OSError."""
    inside = locate(path)
    if inside is None:
        with open_raw(path) as file:
            data = file.read(limit + 1)
        return data if len(data) <= limit else None
    archive, name = inside
    place = others(archive).get(name) if archive.suffix.lower() != PARQUET else None
    if place is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return read_at(archive, *place) if place[1] <= limit else None


def read_at(archive: Path, offset: int, size: int) -> bytes:
    """Bytes of a file from an offset on. Raises OSError if it ends before."""
    with open_raw(archive) as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise OSError(errno.EIO, "the archive ends inside it", str(archive))
    return data


def is_file(path: Path) -> bool:
    """Whether a path is an ordinary file or a picture in an archive. Raises OSError or ValueError on odd names."""
    inside = locate(path)
    if inside is None:
        return path.is_file()
    archive, name = inside
    return archive.is_file() and name in (row_names(archive) if archive.suffix.lower() == PARQUET else table(archive))


def locate(path: Path) -> tuple[Path, str] | None:
    """A path that leads into an archive -> the archive and the member's name; None for every other."""
    named = str(path).lower()
    if ".tar" not in named and PARQUET not in named:  # asked of every picture
        return None
    for parent in path.parents:
        if parent.suffix.lower() in (".tar", PARQUET) and (is_remote(parent) or not parent.is_dir()):
            return parent, path.relative_to(parent).as_posix()
    return None


def table(archive: Path) -> dict[str, tuple[int, int]]:
    """The pictures of an archive: name -> offset and size. Read again when the archive has changed."""
    size, modified = status_of(archive)
    return _table(str(archive), modified, size)


@lru_cache(maxsize=TABLES)
def _table(archive: str, modified: int, size: int) -> dict[str, tuple[int, int]]:
    return places(_contents(archive, modified, size), pictures=True)


def others(archive: Path) -> dict[str, tuple[int, int]]:
    """As `table`, of the files that are no pictures."""
    size, modified = status_of(archive)
    return _others(str(archive), modified, size)


@lru_cache(maxsize=TEXTS)
def _others(archive: str, modified: int, size: int) -> dict[str, tuple[int, int]]:
    return places(_contents(archive, modified, size), pictures=False)


def places(found: Contents, pictures: bool) -> dict[str, tuple[int, int]]:
    """Where the pictures in an archive are, or its other files."""
    where: dict[str, tuple[int, int]] = {}
    for member in found.members:
        suffix = os.path.splitext(member.name)[1].lower()  # noqa: PTH122 - of each of perhaps a million
        if (suffix in SUFFIXES) == pictures:
            where.setdefault(member.name, (member.offset, member.size))  # of two of one name the first
    return where


def contents(archive: Path) -> Contents:
    """What an archive holds, by its headers. Raises OSError if it can't be opened."""
    size, modified = status_of(archive)
    return _contents(str(archive), modified, size)


@lru_cache(maxsize=2)  # tables are made of it right after, while the next archive may be begun
def _contents(archive: str, modified: int, size: int) -> Contents:
    members, end, problem = [], 0, None
    try:
        with buffered(Path(archive)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                end = info.offset_data + info.size
                if info.isreg() and not info.issparse() and end <= size:
                    members.append(Member(name_within(info.name), info.offset_data, info.size))
            end = tar.offset
    except (tarfile.TarError, ValueError, EOFError) as error:  # of damaged headers
        problem = f"damaged or cut off after {len(members)} files ({error})"
    if not members and (kind := compression(Path(archive))):
        problem = f"compressed by {kind}; unpack it first, for pictures are read from their place"
    elif problem is None and not ends_well(archive, end):
        problem = f"damaged or cut off after {len(members)} files (no end mark)"
    return Contents(tuple(members), problem)


def buffered(archive: Path) -> IO[bytes]:
    """An archive whose headers are to be read; on object storage each read is a request. Raises OSError."""
    file = open_raw(archive)
    return io.BufferedReader(cast("io.RawIOBase", file), BUFFER) if is_remote(archive) else file


def name_within(name: str) -> str:
    """A member's name without what would lead out of the archive: a root, or a folder above."""
    return str(PurePosixPath(*(part for part in PurePosixPath(name).parts if part.strip("/") not in ("", ".."))))


def compression(file: Path) -> str | None:
    """What has compressed a file, by its first bytes; None for a file as it is. Raises OSError."""
    with open_raw(file) as opened:
        head = opened.read(8)
    return next((kind for start, kind in COMPRESSED.items() if head.startswith(start)), None)


def ends_well(archive: str, end: int) -> bool:
    """Whether a block of zeros follows: after a damaged header `tarfile` stops as if it were the end."""
    with open_raw(Path(archive)) as file:
        file.seek(end)
        return file.read(BLOCK) == bytes(BLOCK)
