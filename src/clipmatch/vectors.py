"""All vectors of an index in one memory-mapped file, as search reads them; derived from the store, so it may be lost.

In: a store, the calibration of its model. Out: a `Gallery`: numbers [n], unit rows [n, d], backgrounds [n]. Knows
nothing of queries.

The file lies beside the store as STORE.vectors. It is good if its header names the store's content token and the
calibration, and if its checksum is right; anything else makes it anew. It is written beside and moved into place, so a
reader never meets half a file, and one that has the old file open keeps it.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipmatch.calibration import Calibration
from clipmatch.store import Store

FORMAT = 1
HEADER = 512  # bytes, JSON padded with blanks


@dataclass(frozen=True, eq=False)
class Gallery:
    """What is searched. numbers [n]: of the store's photographs, rising. rows [n, d]: unit vectors, float32.

    background [n]: what the calibration says of each photograph (`Calibration.background`); None without one.
    """

    numbers: NDArray[np.int64]
    rows: NDArray[np.float32]
    background: NDArray[np.float32] | None

    def __len__(self) -> int:
        return len(self.numbers)

    def places(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers -> places in the arrays, of those that are there."""
        at = np.searchsorted(self.numbers, numbers)
        at = np.minimum(at, max(len(self) - 1, 0))
        return at[self.numbers[at] == numbers] if len(self) else np.empty(0, np.int64)

    def part(self, places: NDArray[np.int64]) -> Gallery:
        """Only these places, which rise."""
        background = None if self.background is None else self.background[places]
        return Gallery(self.numbers[places], self.rows[places], background)


def open_gallery(store: Store, calibration: Calibration | None) -> Gallery:
    """The vectors of a store; from the derived file if it is good, else made anew and kept there."""
    path = Path(f"{store.path}.vectors")
    mark = {"format": FORMAT, "calibration": calibration.fingerprint + calibration.split_hash if calibration else None}
    gallery = read_gallery(path, {**mark, "content": store.content})
    if gallery is None:
        content, numbers, rows = store.vectors()
        background = calibration.background(rows) if calibration and len(rows) else None
        gallery = Gallery(numbers, rows, background)
        with contextlib.suppress(OSError):  # a read-only place, a full disk: it is searched from memory then
            write_gallery(path, gallery, {**mark, "content": content})
    return gallery


def read_gallery(path: Path, mark: dict[str, Any]) -> Gallery | None:
    """The file's arrays, mapped; None if there is none, it is of something else, or damaged."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(HEADER))
        count, dim, checksum = header.pop("count"), header.pop("dim"), header.pop("checksum")
        with_background = header.pop("background")
        if header != mark:
            return None
        words = np.memmap(path, np.uint8, "r", HEADER)
        ends = np.cumsum([8 * count, 4 * count if with_background else 0, 4 * count * dim])
        if len(words) != padded(int(ends[-1])) or sum_of(words) != checksum:
            return None
        numbers = words[: ends[0]].view(np.int64)
        background = words[ends[0] : ends[1]].view(np.float32) if with_background else None
        return Gallery(numbers, words[ends[1] : ends[2]].view(np.float32).reshape(count, dim), background)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def write_gallery(path: Path, gallery: Gallery, mark: dict[str, Any]) -> None:
    """The file in one step: written beside, moved into place."""
    parts = [gallery.numbers.tobytes(), b"", np.ascontiguousarray(gallery.rows, np.float32).tobytes()]
    if gallery.background is not None:
        parts[1] = gallery.background.astype(np.float32).tobytes()
    body = b"".join(parts)
    body += bytes(padded(len(body)) - len(body))
    checksum = sum_of(np.frombuffer(body, np.uint8))
    count, dim = gallery.rows.shape
    header = {**mark, "count": count, "dim": dim, "background": gallery.background is not None, "checksum": checksum}
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(json.dumps(header).encode().ljust(HEADER))
            file.write(body)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def padded(size: int) -> int:
    """Bytes, up to whole words of 8."""
    return -(-size // 8) * 8


def sum_of(data: NDArray[np.uint8]) -> int:
    """Checksum of whole words of 8 bytes: their sum, which is read at the speed of memory."""
    return int(np.add.reduce(data.view(np.uint64), dtype=np.uint64)) if len(data) else 0
