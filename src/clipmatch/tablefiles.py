"""Pictures in the rows of Parquet files, read where they lie: `train.parquet/00000123` is the picture in row 123.

In: paths. Out: how many pictures there are, their bytes, or where else they lie, and their captions. All functions may
be called from threads; a group of rows is kept for the rows that follow.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

from clipmatch.errors import ClipmatchError
from clipmatch.formats import caption_columns, captions_of
from clipmatch.remote import open_raw, status_of

SUFFIX = ".parquet"
COLUMNS = ("image", "jpg", "png", "webp", "image_bytes", "img", "filename", "file_name", "image_path", "path", "url")
GROUPS = 2  # of rows that are kept, of each perhaps a hundred megabytes


@dataclass(frozen=True, eq=False)
class Opened:
    """A file, its column of pictures, and those of captions. starts: the first row of each group, and their number."""

    file: Any
    column: str
    captions: tuple[str, ...]
    starts: tuple[int, ...]
    turn: Lock = field(default_factory=Lock)


def row_names(path: Path) -> list[str]:
    """What the pictures in a file are called. Raises OSError if it can't be read."""
    return [f"{row:08d}" for row in range(opened(path).starts[-1])]


def linked(path: Path) -> list[str] | None:
    """Where the pictures lie, row by row, if the file has their paths; None if it has the pictures themselves."""
    table = opened(path)
    kind = table.file.schema_arrow.field(table.column).type
    if str(kind).startswith("dictionary"):  # as pandas writes categories
        kind = kind.value_type
    if str(kind) not in ("string", "large_string", "string_view"):
        return None
    with table.turn:
        found: list[str] = table.file.read(columns=[table.column])[table.column].to_pylist()
    return found


def has_captions(path: Path) -> bool:
    """Whether a file has a column of captions. Raises OSError if it can't be read."""
    return bool(opened(path).captions)


def captions_in(path: Path) -> list[list[str]]:
    """The captions of each row, of none an empty list. Raises OSError if the file can't be read."""
    table = opened(path)
    if not table.captions:
        return [[] for _ in range(table.starts[-1])]
    with table.turn:
        rows = table.file.read(columns=list(table.captions)).to_pylist()
    return [captions_of([row[name] for name in table.captions]) for row in rows]


def read_row(path: Path, name: str) -> bytes:
    """The bytes of a picture. Raises OSError if there is none."""
    table = opened(path)
    if not name.isdecimal() or int(name) >= table.starts[-1]:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path / name))
    number = bisect_right(table.starts, int(name)) - 1
    value = group(str(path), *status_of(path), number)[int(name) - table.starts[number]].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise OSError(errno.ENODATA, "the row has no picture", str(path / name))
    return data


def opened(path: Path) -> Opened:
    """A file, opened once for as long as it stays as it is. Raises OSError."""
    return _opened(str(path), *status_of(path))


@lru_cache(maxsize=8)
def _opened(path: str, size: int, modified: int) -> Opened:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ClipmatchError('Parquet files need pyarrow; install it with: pip install "clipmatch[data]"') from error
    try:
        file = ParquetFile(open_raw(Path(path)))
    except ArrowException as error:
        raise OSError(errno.EIO, f"it is a damaged Parquet file ({error})", path) from error
    found = file.schema_arrow.names
    names = {name.lower(): name for name in reversed(found)}
    column = next((names[name] for name in COLUMNS if name in names), None)
    if column is None:
        raise OSError(errno.EIO, f"it has no column of pictures ({', '.join(COLUMNS)})", path)
    counts = (file.metadata.row_group(number).num_rows for number in range(file.num_row_groups))
    captions = tuple(found[at] for at in caption_columns([name.lower() for name in found]))
    return Opened(file, column, captions, (0, *accumulate(counts)))


@lru_cache(maxsize=GROUPS)
def group(path: str, size: int, modified: int, number: int) -> Any:
    """The column of pictures in a group of rows."""
    table = _opened(path, size, modified)
    with table.turn:
        return table.file.read_row_group(number, columns=[table.column])[table.column]
