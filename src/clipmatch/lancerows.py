"""How photographs lie in a Lance table: its columns, its conditions, and what they are here.

In: photographs with their rows [d]; filters; paths. Out: Arrow tables and SQL; photographs. Opens nothing.

A photograph's number is a hash of its path, so that many processes can write without asking each other, and one that
writes the same photograph twice writes the same row. Two paths may have the same hash: see `LanceStore`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipmatch.errors import own_version
from clipmatch.photo import Metadata, Photo, Stamp
from clipmatch.sanity import check_photo, check_rows, require
from clipmatch.store import MOST, Filter, ModelName

FORMAT = "clipmatch"  # key of a table's metadata: the version of what follows
VERSION = b"1"
NEEDS = "clipmatch.needs"  # likewise: a clipmatch that can read it
MODEL = "clipmatch.model"  # likewise: the model whose rows it holds
TOKEN = "clipmatch.token"  # likewise: tells it from any other table that had its name  # nosec B105
BITS = 53  # of a number: JSON's readers know no more
STRAY = 0x100000  # from a stray byte of a file name, as Python has it, to a private character of Unicode, and back
KEY = {"lance-schema:unenforced-primary-key": "true"}  # two writers that insert the same row at once: one tries again

PHOTO = (
    "path", "digest", "size", "mtime", "sidecar", "width", "height", "taken", "latitude", "longitude", "camera",
    "caption", "picture_hash",
)  # fmt: skip
ROOTS = pa.schema(
    [
        pa.field("path", pa.string(), False, KEY),
        ("exclude", pa.list_(pa.string())),
        ("follow_links", pa.bool_()),
    ],
    {FORMAT: VERSION, NEEDS: own_version()},
)
FAILURES = pa.schema(
    [
        pa.field("path", pa.string(), False, KEY),
        ("size", pa.int64()),
        ("mtime", pa.int64()),
        ("sidecar", pa.int64()),
        ("reason", pa.string()),
    ]
)
CONCEPTS = pa.schema(
    [
        pa.field("key", pa.string(), False, KEY),  # the name, by which upper and lower case are the same
        ("name", pa.string()),
        ("model", pa.string()),
        ("row", pa.list_(pa.float32())),
        ("examples", pa.list_(pa.string())),
        ("others", pa.list_(pa.string())),
        ("precision", pa.float64()),
    ]
)
SMALL = {"roots": ROOTS, "failures": FAILURES, "concepts": CONCEPTS}
STAGED = "staged"
NULLABLE = {"taken", "latitude", "longitude", "camera", "caption", "precision"}  # all other columns have values


def photos_schema(model: ModelName) -> pa.Schema:
    """The columns of the photographs of an index that is bound to a model.

    moment: when it was taken, else changed; form: the suffix of its name; words: what a search in words looks at.
    """
    columns = [
        pa.field("id", pa.int64(), False, KEY),
        ("path", pa.string()),
        ("digest", pa.string()),
        ("size", pa.int64()),
        ("mtime", pa.int64()),
        ("sidecar", pa.int64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("taken", pa.timestamp("us")),
        ("latitude", pa.float64()),
        ("longitude", pa.float64()),
        ("camera", pa.string()),
        ("caption", pa.string()),
        ("picture_hash", pa.uint64()),
        ("moment", pa.timestamp("us")),
        ("form", pa.string()),
        ("words", pa.string()),
        ("vector", pa.list_(pa.float32(), model.dim)),
    ]
    return pa.schema(columns, {FORMAT: VERSION, MODEL: json.dumps(vars(model)), TOKEN: os.urandom(8).hex()})


def staged_schema(model: str, dim: int) -> pa.Schema:
    """The columns of rows by contents, of a model that the index is changing over to."""
    columns = [pa.field("digest", pa.string(), False, KEY), ("vector", pa.list_(pa.float32(), dim))]
    return pa.schema(columns, {MODEL: model})


def check_form(name: str, schema: pa.Schema) -> None:
    """Raise ValueError and its like unless a table is of the form that it has in an index."""
    about = schema.metadata or {}
    if name == "photos":
        expected = photos_schema(ModelName.of_json(about[MODEL.encode()]))
    elif name == STAGED:
        expected = staged_schema(about[MODEL.encode()].decode(), schema.field("vector").type.list_size)
    else:
        expected = SMALL[name]
    require(about.keys() == (expected.metadata or {}).keys(), f"what the table {name} says of itself is not all there")
    require(schema.equals(expected), f"the table {name} has other columns")


def strange(schema: pa.Schema) -> list[str]:
    """What the metadata of a table hold beyond ours: LanceDB would run models that they name, when rows are written."""
    own = {key.encode() for key in (FORMAT, NEEDS, MODEL, TOKEN)}
    return [key.decode(errors="replace") for key in sorted((schema.metadata or {}).keys() - own)]


def check_values(rows: pa.Table | pa.RecordBatch) -> None:
    """Raise ValueError if a value is missing."""
    for name in rows.schema.names:
        require(name in NULLABLE or not rows[name].null_count, f"a {name} is missing")


def number_of(path: Path) -> int:
    """The number that a photograph has by its path, if no other has it."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "big") >> (64 - BITS)


def photos_table(
    photos: Sequence[Photo], numbers: Sequence[int], rows: Mapping[str, NDArray[np.float32]], schema: pa.Schema
) -> pa.Table:
    """Photographs, their numbers, and rows by content -> rows of the table."""
    values: dict[str, Any] = {name: [None] * len(photos) for name in schema.names if name not in ("id", "vector")}
    for at, photo in enumerate(photos):
        for name, value in values_of(photo).items():
            values[name][at] = value
    values["id"] = list(numbers)
    vectors = np.array([rows[photo.digest] for photo in photos], "<f4")
    width = schema.field("vector").type.list_size
    values["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
    return pa.table({name: values[name] for name in schema.names}, schema=schema)


def values_of(photo: Photo) -> dict[str, Any]:
    """A photograph -> its values in the table, all but the number and the row."""
    data, stamp = photo.metadata, photo.stamp
    name, camera, caption = (plain(text) for text in (photo.path.name, data.camera, data.caption))
    return {
        "path": text_of(photo.path),
        "digest": photo.digest,
        "size": stamp.size,
        "mtime": stamp.mtime,
        "sidecar": stamp.sidecar,
        "width": data.width,
        "height": data.height,
        "taken": data.taken,
        "latitude": data.latitude,
        "longitude": data.longitude,
        "camera": camera,
        "caption": caption,
        "picture_hash": photo.picture_hash,
        "moment": data.taken or moment_of(stamp),
        "form": photo.path.suffix.lower().removeprefix("."),
        "words": f"{name} {caption or ''}",
    }


def photo_of(values: Mapping[str, Any]) -> Photo:
    """The values of the columns `PHOTO` -> a photograph."""
    metadata = Metadata(*(values[name] for name in PHOTO[5:12]))
    stamp = Stamp(values["size"], values["mtime"], values["sidecar"])
    return check_photo(Photo(path_of(values["path"]), values["digest"], stamp, metadata, values["picture_hash"]))


def moment_of(stamp: Stamp) -> datetime | None:
    """When a file was changed, in full seconds of local time; None for what no calendar has."""
    try:
        return datetime.fromtimestamp(stamp.mtime // 10**9)
    except (ValueError, OverflowError, OSError):
        return None


def rows_in(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A column of rows -> [n, d]. Raises ValueError if they are no unit rows."""
    width = column.type.list_size
    require(not column.null_count, "a vector is missing")
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    return check_rows(np.concatenate(parts)) if parts else np.empty((0, width), np.float32)


# Text


def text_of(path: Path) -> str:
    """A path as text that UTF-8 can hold."""
    return "".join(chr(ord(c) + STRAY) if "\udc80" <= c <= "\udcff" else c for c in str(path))


def path_of(text: str) -> Path:
    """The path that `text_of` made a text of."""
    if text.isascii():
        return Path(text)
    return Path("".join(chr(ord(c) - STRAY) if 0xDC80 <= ord(c) - STRAY <= 0xDCFF else c for c in text))


def plain(text: str | None) -> str | None:
    """Text without what UTF-8 can't hold."""
    return text and text.encode("utf-8", "replace").decode()


# Conditions


def quoted(text: str) -> str:
    """A text of SQL."""
    return "'" + text.replace("'", "''") + "'"


def among(column: str, values: Iterable[int | str]) -> str:
    """The condition that a column has one of some values."""
    listed = ", ".join(quoted(value) if isinstance(value, str) else str(int(value)) for value in values)
    return f"{column} IN ({listed})" if listed else "false"


def below(folder: Path) -> str:
    """The condition that a path is the folder's own or lies below it."""
    start = text_of(folder)
    inside = start.rstrip("/") + "/"
    return f"(path = {quoted(start)} OR (path >= {quoted(inside)} AND path < {quoted(inside[:-1] + '0')}))"


def condition_of(where: Filter) -> str:
    """What a filter says; "" for one that lets all pass."""
    parts = ["(" + " OR ".join(map(below, where.folders)) + ")"] if where.folders else []
    if where.after:
        parts.append(f"taken >= {moment(where.after)}")
    if where.before:
        parts.append(f"taken < {moment(where.before)}")
    if where.camera:
        parts.append(f"contains(lower(camera), {quoted((plain(where.camera) or '').lower())})")
    if where.min_side:
        parts.append(f"width >= {min(where.min_side, MOST)} AND height >= {min(where.min_side, MOST)}")
    if where.min_size:
        parts.append(f"size >= {min(where.min_size, MOST)}")
    if where.has_caption:
        parts.append("caption IS NOT NULL")
    if where.box:
        south, west, north, east = map(float, where.box)
        over = f"longitude >= {west} {'AND' if west <= east else 'OR'} longitude <= {east}"
        parts.append(f"latitude >= {south} AND latitude <= {north} AND ({over})")
    return " AND ".join(parts)


def moment(value: datetime) -> str:
    """A moment of SQL."""
    return f"TIMESTAMP {quoted(value.isoformat(sep=' '))}"
