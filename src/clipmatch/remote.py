"""Files on object storage, by paths: `s3:/bucket/photos/a.jpg` is what `pathlib` makes of `s3://bucket/photos/a.jpg`.

In: addresses, paths. Out: listings, open files, sizes and times. A path that does not begin with a scheme is an
ordinary file. Knows nothing of pictures. Apache Arrow reads them (the extra `distributed`), by the usual environment
variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...); it is imported by the first such path.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import IO, Any, cast

from clipmatch.errors import ClipmatchError, reason_of
from clipmatch.photo import Stamp

KEPT = 256 << 20  # bytes
PART = 16 << 20  # bytes read at once: a request for each part, of which most pictures need one
fetched: dict[Path, bytes] = {}  # the oldest first
turn = Lock()
NOT_REGULAR = "it is not a regular file"

SCHEME = re.compile(r"^([a-z][a-z0-9+]+):/+")


def is_remote(path: str | Path) -> bool:
    """Whether a path or an address is of object storage."""
    return SCHEME.match(str(path)) is not None


def address_of(path: str | Path) -> str:
    """A path as people write it: of object storage with both slashes, any other as it is."""
    return SCHEME.sub(r"\1://", str(path), count=1)


def absolute(path: str | Path) -> Path:
    """A path as the index keeps it; a link stays a link, an address becomes what `pathlib` makes of it."""
    if is_remote(path):
        return Path(path)
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 - which `resolve` would follow


def open_raw(path: Path) -> IO[bytes]:
    """A file, open for reading wherever one likes. Raises OSError."""
    if not is_remote(path):
        return open(path, "rb", opener=open_regular)
    system, inside = locate(path)
    return cast("IO[bytes]", system.open_input_file(inside))


def open_regular(path: str, flags: int) -> int:
    """As `os.open`, of an ordinary file alone: a pipe would be waited for, a device may never end. Raises OSError."""
    try:
        file = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # without it a pipe is waited for here
    except OSError as error:
        raise OSError(error.errno, NOT_REGULAR, path) if error.errno == errno.ENXIO else error from None  # a socket
    kind = os.fstat(file).st_mode
    if stat.S_ISREG(kind):
        return file
    os.close(file)
    raise OSError(errno.EINVAL, "it is a folder" if stat.S_ISDIR(kind) else NOT_REGULAR, path)


def read_whole(path: Path) -> bytes:
    """The bytes of a file. Raises OSError."""
    from clipmatch.patience import count_anew  # a query does without it

    parts = []
    with open_raw(path) as file:
        while part := file.read(PART):
            parts.append(part)
            count_anew()  # a large file on a slow line takes long, and comes
    return b"".join(parts)


def keep(path: Path, data: bytes) -> None:
    """Remember the bytes of a picture that has been hashed, and will be decoded: they are fetched once.

    What nobody comes for is forgotten.
    """
    with turn:
        fetched.pop(path, None)
        fetched[path] = data
        while sum(map(len, fetched.values())) > KEPT:
            del fetched[next(iter(fetched))]


def take(path: Path) -> bytes | None:
    """What was remembered, once."""
    with turn:
        return fetched.pop(path, None)


def status_of(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in ns of a file. Raises OSError."""
    if not is_remote(path):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    system, inside = locate(path)
    found = system.get_file_info(inside)
    if not found.is_file:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address_of(path))
    return found.size, found.mtime_ns or 0


@dataclass(frozen=True, eq=False)
class Listing:
    """Files below a folder, hidden ones left out, which can be gone through more than once.

    inside: the name of the folder there. infos: what Arrow says of each, in less memory than what is made of it here.
    """

    folder: Path
    inside: str
    infos: Sequence[Any]

    def __iter__(self) -> Iterator[tuple[Path, Stamp]]:
        for found in self.infos:
            below = found.path.lstrip("/")[len(self.inside) :].strip("/")  # some begin with a slash
            if found.is_file and not any(part.startswith(".") for part in below.split("/")):
                yield (self.folder / below if below else self.folder), Stamp(found.size, found.mtime_ns or 0)


def list_files(folder: Path) -> Listing:
    """All files below a folder of object storage; a file stands for itself.

    Raises ClipmatchError when there is nothing, or it can't be read.
    """
    from pyarrow.fs import FileSelector

    try:
        system, inside = locate(folder)
        root = system.get_file_info(inside)
        listed = [root] if root.is_file else system.get_file_info(FileSelector(inside, recursive=True))
    except OSError as error:
        raise ClipmatchError(f"{address_of(folder)} can't be read ({reason_of(error)}); check its name.") from error
    return Listing(folder, inside.strip("/"), listed)


def locate(path: Path) -> tuple[Any, str]:
    """The file system of a path, and the name of the file there. Raises OSError."""
    scheme, _, rest = address_of(path).partition("://")
    bucket, _, below = rest.partition("/")
    system, inside = file_system(scheme, bucket)
    return system, f"{inside}/{below}" if below else inside or "/"


@lru_cache
def file_system(scheme: str, bucket: str) -> tuple[Any, str]:
    """The file system that holds a bucket, and the bucket's name there: of Azure without the account, of HDFS "".

    Raises ClipmatchError if there is none of that scheme.
    """
    try:
        from pyarrow.fs import FileSystem

        system, inside = FileSystem.from_uri(f"{scheme}://{bucket}")
        return system, str(inside).rstrip("/")
    except ModuleNotFoundError as error:
        raise ClipmatchError(f'{scheme}:// needs pyarrow: pip install "clipmatch[distributed]"') from error
    except ValueError as error:  # of Arrow's errors: an unknown scheme
        raise ClipmatchError(f"{scheme}://{bucket} can't be read ({reason_of(error)}).") from error
