"""Photographs -> the pictures that a page shows: small ones, and large ones in a format that browsers know.

In: photographs of an index. Out: the bytes of pictures, upright and without EXIF data. Each is made when it is first
asked for and kept in the cache folder by its content, so a moved file keeps its own. Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from clipmatch.archive import locate
from clipmatch.atomic import atomic_file
from clipmatch.photo import Photo
from clipmatch.preprocess import ImageError, load_image, plain_reason
from clipmatch.remote import is_remote, status_of
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


def is_unchanged(photo: Photo) -> bool:
    """Whether the file is the one that was indexed. Raises ImageError if it is gone or no file any more."""
    try:
        inside = locate(photo.path)
        if inside or is_remote(photo.path):
            size, modified = status_of(inside[0] if inside else photo.path)
            return modified == photo.stamp.mtime and (inside is not None or size == photo.stamp.size)
        status = photo.path.stat()
    except (OSError, ValueError) as error:
        raise ImageError(photo.path, plain_reason(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(photo.path, "it is not a regular file")
    return (status.st_size, status.st_mtime_ns) == (photo.stamp.size, photo.stamp.mtime)


def render(photo: Photo, kind: Kind) -> tuple[bytes, bool]:
    """A photograph -> the bytes of its picture, and whether they show what was indexed. Raises ImageError."""
    same = is_unchanged(photo)
    place = pictures_folder() / photo.digest[:2] / f"{photo.digest}.{kind.name}.{kind.form}"
    if same:
        with contextlib.suppress(OSError):
            if time.time() - place.stat().st_mtime > DAY:
                os.utime(place)  # still wanted
            return place.read_bytes(), True
    data = draw(photo.path, kind)
    if same:
        # A full disk, or one that can't be written: made again next time. As a whole: another thread may be reading.
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(place) as draft:
                draft.write_bytes(data)
    return data, same


def draw(path: Path, kind: Kind) -> bytes:
    """A file -> the bytes of its picture, computed."""
    image = load_image(path, min(kind.box))
    image.thumbnail(kind.box)
    buffer = BytesIO()
    image.save(buffer, kind.form, **dict(kind.settings))
    return buffer.getvalue()


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
