"""The reader of Parquet files: a column of image paths, or the pictures themselves, as Hugging Face stores them.

In: a file, a folder of them, or a pattern such as `data/train-{00000..00004}-of-00005.parquet`. Out: entries and notes,
as `formats` describes them. Pictures inside a file are unpacked once, into the folder for caches; knows nothing of what
they show.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from clipmatch.atomic import atomic_folder
from clipmatch.errors import ClipmatchError, reason_of
from clipmatch.folders import has_shards, image_root, list_shards, split_of
from clipmatch.formats import CAPTION_COLUMNS, IMAGE_COLUMNS, Entry, LineNote, Reader, captions_of, find_columns

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

BATCH = 256  # rows; with pictures inside perhaps 100 MB
RECORD = "unpacked.json"  # written last: names and sizes of what was unpacked
PLAIN_NAME = re.compile(r"\w[\w .,+()&=-]{0,98}\w")  # that every system can write
BEGINNINGS = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}


@dataclass(frozen=True)
class Table:
    """An opened file and the names of its columns. embedded: the image column holds the pictures themselves.

    light: what can be read of it without them: the paths, if there are some.
    """

    path: Path
    file: ParquetFile
    image: str
    captions: tuple[str, ...]
    split: str | None
    embedded: bool
    light: tuple[str, ...]


def read_parquet(path: Path) -> Iterator[Entry | LineNote]:
    """Rows of an image (path, bytes, or Hugging Face's `{bytes, path}`) and its captions (a string or a list)."""
    tables, root, number = open_tables(path), image_root(path), 0
    names = iter(unpacked_names(tables)) if tables[0].embedded else None
    first: dict[str, tuple[int, str, str]] = {}  # of each picture: its row, the name and the split that this tells
    for table in tables:
        columns = [*table.captions, *([table.split] if table.split else []), *table.light]
        shard_split = split_of(table.path.relative_to(root).as_posix())
        for row in rows_of(table, columns):
            number += 1
            name = next(names) if names else row[table.image]
            if not name or not isinstance(name, str):
                yield LineNote(number, "no image")
                continue
            split = row[table.split] if table.split else shard_split
            split = split if isinstance(split, str) else ""
            own = picture_of(row.get(table.image))[1] if names else name
            before, *told = first.setdefault(name, (number, own, split))
            copy = "" if told == [own, split] else f"the picture of row {before} again: {one_image(told[1], split)}"
            for caption in captions_of([row[column] for column in table.captions]) or [""]:
                yield Entry(number, name, caption, copy, split)


def one_image(before: str, split: str) -> str:
    """What becomes of a picture that two rows hold, of these splits."""
    return "one image" if before == split else f"one image, though of {before or 'no split'} and {split or 'no split'}"


def open_tables(path: Path) -> list[Table]:
    """The files that a path names, opened. Raises ClipmatchError if one is damaged or lacks a column."""
    tables = [open_table(file) for file in list_shards(path, ".parquet")]
    if not tables:
        raise ClipmatchError(f"{path} holds no .parquet file; give another folder or format.")
    if len({table.embedded for table in tables}) != 1:
        raise ClipmatchError(f"The files of {path} differ in how they hold their images; name them one by one.")
    return tables


def open_table(path: Path) -> Table:
    """Open a file and find its columns, by name as in a table of text."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        raise ClipmatchError('Parquet files need pyarrow; install it: pip install "clipmatch[data]"') from error
    with reading(path):
        file = parquet.ParquetFile(path)
    names: list[str] = file.schema_arrow.names
    columns = find_columns(names)
    if columns is None:
        raise ClipmatchError(
            f"{path} needs an image column ({', '.join(IMAGE_COLUMNS)}) and a caption column "
            f"({', '.join(CAPTION_COLUMNS)}); it has {', '.join(names)}."
        )
    kind = file.schema_arrow.field(columns.image).type
    embedded = arrow.types.is_struct(kind) or arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)
    captions = tuple(names[at] for at in columns.captions)
    split = names[columns.split] if columns.split is not None else None
    image = names[columns.image]
    has_paths = arrow.types.is_struct(kind) and kind.get_field_index("path") >= 0
    light = (f"{image}.path",) if has_paths else () if embedded else (image,)
    return Table(path, file, image, captions, split, embedded, light)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the library raises on a damaged file, which is of many kinds, into a ClipmatchError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not the library's
            raise
        why = reason_of(error)
        raise ClipmatchError(f"{path} is not a whole Parquet file ({why}); copy or download it again.") from error


def rows_of(table: Table, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file as objects with these columns."""
    with reading(table.path):
        for batch in table.file.iter_batches(BATCH, columns=list(columns)):
            yield from batch.to_pylist()


# Pictures inside


def image_folder(path: Path) -> Path | None:
    """Where the pictures inside the files of a path are unpacked; None if the files hold paths."""
    tables = open_tables(path)
    return unpack_folder(tables) if tables[0].embedded else None


def unpack_folder(tables: Sequence[Table]) -> Path:
    """A folder for these files as they are now: a changed file gets another."""
    from clipmatch.runtime import cache_folder

    stamps = [(str(table.path.absolute()), table.path.stat()) for table in tables]
    key = json.dumps([(name, status.st_size, status.st_mtime_ns) for name, status in stamps])
    return cache_folder() / "unpacked" / f"{tables[0].path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def unpacked_names(tables: Sequence[Table]) -> list[str]:
    """The name of each row's picture in `unpack_folder`, "" for none; they are unpacked if they are not all there."""
    from filelock import FileLock

    folder = unpack_folder(tables)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            names = read_record(folder)
            return unpack(tables, folder) if names is None else names
    except OSError as error:
        raise ClipmatchError(
            f"The pictures of {tables[0].path} can't be unpacked into {folder} ({error.strerror or error}); make room "
            "there, or name another folder in the variable CLIPMATCH_CACHE."
        ) from error


def read_record(folder: Path) -> list[str] | None:
    """The names of what was unpacked into a folder; None unless each file is there in its full size."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        with os.scandir(folder) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if entry.name != RECORD}
    except (OSError, ValueError):
        return None
    names: list[str] = record["rows"]
    return names if sizes == record["sizes"] else None


def unpack(tables: Sequence[Table], folder: Path) -> list[str]:
    """Write the pictures of all rows into a folder that appears when it is complete -> their names by row.

    A picture that several rows hold is one file, so that it is one image with all their captions.
    """
    from tqdm import tqdm

    rows: list[str] = []
    names: dict[str, str] = {}  # by content
    sizes: dict[str, int] = {}
    taken = {RECORD}  # in small letters: some file systems know no others
    total = sum(table.file.metadata.num_rows for table in tables)
    bar = tqdm(total=total, desc="unpacking", unit="row", disable=total < BATCH)
    with atomic_folder(folder) as draft, bar:
        for table in tables:
            for row in rows_of(table, [table.image]):
                bar.update()
                data, path = picture_of(row[table.image])
                digest = hashlib.sha256(data).hexdigest()
                if data and digest not in names:
                    names[digest] = name = file_name(path, data, digest, taken)
                    (draft / name).write_bytes(data)
                    sizes[name] = len(data)
                    taken.add(name.lower())
                rows.append(names[digest] if data else "")
        (draft / RECORD).write_text(json.dumps({"rows": rows, "sizes": sizes}))
    return rows


def picture_of(value: Any) -> tuple[bytes, str]:
    """A value of the image column -> the bytes of the picture (none: b"") and its path, if it tells one."""
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        return data if isinstance(data, bytes) else b"", path if isinstance(path, str) else ""
    return value if isinstance(value, bytes) else b"", ""


def file_name(path: str, data: bytes, digest: str, taken: set[str]) -> str:
    """A picture's own name; where it has none, or another picture has it, one made of its content."""
    name = PurePosixPath(path.replace("\\", "/")).name
    if PLAIN_NAME.fullmatch(name) and name.lower() not in taken:
        return name
    return digest[:24] + next((suffix for start, suffix in BEGINNINGS.items() if data.startswith(start)), "")


def is_parquet(path: Path, head: list[str]) -> bool:
    """Whether a path names Parquet files and no tar archives: img2dataset writes a table beside each of these."""
    return has_shards(path, ".parquet") and not has_shards(path, ".tar")


PARQUET_READERS = (Reader("parquet", is_parquet, read_parquet, unit="row", images=image_folder, folders=True),)
