"""What is said of a photograph outside its file: the names of side-cars, and a number that tells when that changes.

In: paths, listings, captions in tables. Out: names, stamps. Opens nothing, and knows nothing of captions' forms.

A picture may be found in a folder, which shows its side-cars, and be named by a table, which has a caption. So a stamp
says of each of the two what is there, or that whoever has found the picture doesn't know.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

SIDECARS = (".txt", ".json", ".xmp")
UNSEEN = 1  # in place of half a stamp: of side-cars that nobody has looked for


def sidecar_names(name: str) -> tuple[str, str, str, str]:
    """photo.txt; photo.json; photo.jpg.xmp (darktable, digiKam), which belongs to one file alone; photo.xmp (Adobe)."""
    stem = os.path.splitext(name)[0]  # noqa: PTH122 (it is asked of every file: pathlib takes much longer)
    return f"{stem}.txt", f"{stem}.json", f"{name}.xmp", f"{stem}.xmp"


def sidecar_stamp(path: Path, names: AbstractSet[str] | None = None) -> int:
    """A number of 63 bits that changes when a side-car comes, changes or goes; 0 if there is none.

    names: those of the files in the same folder, where they are known; then a photograph without a side-car costs no
    look at the disk.
    """
    there = []
    for name in sidecar_names(path.name):
        if names is None or name in names:
            try:
                status = path.with_name(name).stat()
            except (OSError, ValueError):  # there is none; ValueError: a null byte
                continue
            there.append((name, status.st_size, status.st_mtime_ns))
    return number_of(there) if there else 0


def listed_stamp(name: str, listed: Mapping[str, tuple[int, int]]) -> int:
    """`sidecar_stamp` of a file that a listing names, whose side-cars are listed with their sizes and times."""
    there = [(beside, *listed[beside]) for beside in sidecar_names(name) if beside in listed]
    return number_of(there) if there else 0


def told_stamp(caption: str | None, beside: int | None = 0) -> int:
    """A negative number of the caption, or of there being none, in a table that has or names a picture, and of what
    lies beside the picture. beside: its `sidecar_stamp`; None where nobody has looked.
    """
    return joined(UNSEEN if beside is None else half(beside), half(number_of(caption)) if caption else 0)


def joined(beside: int, told: int) -> int:
    """Two halves -> one stamp."""
    return -(1 << 62 | beside << 31 | told)


def half(number: int) -> int:
    """A number of 63 bits in 31; 0 stays 0, and no other becomes that, or `UNSEEN`."""
    return max(number >> 32, UNSEEN + 1) if number else 0


def halves(stamp: int) -> tuple[int | None, int | None]:
    """What a stamp says of side-cars, and of a caption in a table: 0 for none, None where it says nothing."""
    if stamp >= 0:
        return half(stamp), None
    beside, told = divmod(-stamp & ((1 << 62) - 1), 1 << 31)
    return (None if beside == UNSEEN else beside), told


def is_known(now: int, known: int) -> bool:
    """Whether a stamp says nothing that differs from another one."""
    pairs = zip(halves(now), halves(known), strict=True)
    return all(said is None or said == (before or 0) for said, before in pairs)


def completed(now: int, known: int) -> int:
    """A stamp of a table that doesn't know of side-cars, with what another one says of them."""
    (beside, told), seen = halves(now), halves(known)[0]
    return joined(seen, told) if told is not None and beside is None and seen is not None else now


def without_sidecars(stamp: int) -> int:
    """A stamp that says nothing of side-cars: where there are some, the picture differs next time."""
    told = halves(stamp)[1]
    return 0 if told is None else joined(UNSEEN, told)


def has_sidecars(stamp: int) -> bool:
    """Whether there are side-cars to be read."""
    return bool(halves(stamp)[0])


def number_of(value: object) -> int:
    """A number of 63 bits, above 0, that is another one for another value."""
    digest = hashlib.blake2b(repr(value).encode(errors="backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1 or 1
