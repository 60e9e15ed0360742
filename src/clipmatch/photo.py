"""What is known of a photograph: its file, what that says of itself, and what an index adds. Plain data.

Importing this loads nothing slow: every query answers with photographs.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Stamp:
    """What changes when a file changes: size in bytes, modification time in ns, and what lies beside it.

    sidecar: 0 if nothing does; of side-car files a positive number (`sidecars.sidecar_stamp`); of a picture in a table,
    or named by one, a negative number of these and of the caption there (`sidecars.told_stamp`).
    """

    size: int
    mtime: int
    sidecar: int = 0


@dataclass(frozen=True)
class Metadata:
    """Of a photograph. width, height: pixels, upright. taken: EXIF time, naive, by the camera's clock.

    latitude, longitude: degrees, WGS 84, both or neither. camera: "Make Model". caption: see `metadata.caption_of`.
    """

    width: int
    height: int
    taken: datetime | None = None
    latitude: float | None = None
    longitude: float | None = None
    camera: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Photo:
    """What the index knows of one file.

    digest: SHA-256 of its bytes, in hex. picture_hash: 64 bits, of which few differ between alike pictures.
    """

    path: Path
    digest: str
    stamp: Stamp
    metadata: Metadata
    picture_hash: int

    def row(self) -> dict[str, Any]:
        """What people ask of it, as one flat row: size in bytes, width and height in pixels, what the camera says."""
        return {"path": str(self.path), "size": self.stamp.size, **vars(self.metadata)}
