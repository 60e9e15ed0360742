"""Photographs -> the pictures that a page shows: small ones, and large ones in a format that browsers know.

In: the bytes of photographs. Out: the bytes of pictures, upright and without EXIF data. They are kept in the cache
folder by their content, so a moved file keeps its own. Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from clipmatch.atomic import atomic_file
from clipmatch.preprocess import load_image
from clipmatch.runtime import cache_folder

DAY = 86_400  # seconds
KEPT = 90  # days since a picture was last looked at

SHOWN = {  # formats that every browser shows, and turns upright -> their media types
    ".avif": "image/avif",
    ".bmp": "image/bmp",
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
}


@dataclass(frozen=True)
class Kind:
    """A kind of picture: how large it may be, and how it is written."""

    name: str
    box: tuple[int, int]
    form: str
    settings: tuple[tuple[str, Any], ...]

    @property
    def media_type(self) -> str:
        """What HTTP calls it."""
        return f"image/{self.form}"


THUMB = Kind("thumb", (960, 480), "webp", (("quality", 80), ("method", 2)))  # rows are up to 240 pixels high, or twice
FULL = Kind("full", (4096, 4096), "jpeg", (("quality", 90),))


def kind_named(name: str) -> Kind:
    """The kind that has a name."""
    return {kind.name: kind for kind in (THUMB, FULL)}[name]


def kept(digest: str, kind: Kind) -> bytes | None:
    """The picture of a content, if it is kept; None if it has to be drawn."""
    place = place_of(digest, kind)
    with contextlib.suppress(OSError):
        if time.time() - place.stat().st_mtime > DAY:
            os.utime(place)  # still wanted
        return place.read_bytes()
    return None


def keep(digest: str, kind: Kind, data: bytes) -> None:
    """Keep a picture; on a full disk, or one that can't be written, it is drawn again next time."""
    place = place_of(digest, kind)
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(place) as draft:  # as a whole: another thread may be reading
            draft.write_bytes(data)


def draw(path: Path, kind: Kind, data: bytes) -> bytes:
    """The bytes of a file, whose name tells RAW files -> the bytes of its picture. Raises ImageError."""
    image = load_image(path, min(kind.box), data)
    image.thumbnail(kind.box)
    image.info = {}  # a comment in the file would be written again
    buffer = BytesIO()
    image.save(buffer, kind.form, **dict(kind.settings))
    return buffer.getvalue()


def place_of(digest: str, kind: Kind) -> Path:
    """Where the picture of a content is kept."""
    return pictures_folder() / digest[:2] / f"{digest}.{kind.name}.{kind.form}"


def pictures_folder() -> Path:
    """Where pictures are kept."""
    return cache_folder() / "pictures"


def forget_unwanted() -> int:
    """Remove pictures that nobody has looked at for `KEPT` days, whose photographs may be long gone -> their number."""
    oldest, removed = time.time() - KEPT * DAY, 0
    for path in pictures_folder().glob("*/*"):
        with contextlib.suppress(OSError):  # another server may be doing the same
            if path.stat().st_mtime < oldest:
                path.unlink()
                removed += 1
    return removed
