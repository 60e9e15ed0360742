"""Which picture files there are: folders walked, nothing opened.

In: a folder, names to leave out. Out: a `Found` for each picture file, at the price of one `stat`, and what could not
be looked into. Knows nothing of pictures, models or stores.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from clipmatch.errors import ClipmatchError, Failure
from clipmatch.imageformats import SUFFIXES, is_image_name
from clipmatch.photo import Stamp
from clipmatch.sidecars import sidecar_stamp

GALLERY = "clipmatch-gallery.json"  # in a folder that export-gallery has made


@dataclass(frozen=True)
class Found:
    """A picture file, by absolute path. caption: in the table that has or names it."""

    path: Path
    stamp: Stamp
    caption: str | None = None


def list_images(folder: str | Path) -> list[Path]:
    """All picture files below a folder, hidden ones left out, sorted; a file stands for itself.

    Raises ClipmatchError when the folder does not exist or holds no picture.
    """
    root = Path(folder).expanduser()
    if root.is_file():
        return [root]
    found = sorted(root / item.path.relative_to(root.absolute()) for item in walk(root) if isinstance(item, Found))
    if not found:
        raise ClipmatchError(f"The folder {root} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    return found


def walk(
    folder: str | Path, exclude: Sequence[str] = (), follow_links: bool = False, also: tuple[str, ...] = ()
) -> Iterator[Found | Failure]:
    """A folder -> its picture files, and a `Failure` for each folder that can't be read; a file stands for itself.

    Hidden files and folders are left out, and those whose name, or path below `folder`, fits a pattern of `exclude`
    (as in a shell: "*.gif", "Trash", "2019/raw"). A link to a folder is entered only with `follow_links`, and no folder
    twice, and no gallery that clipmatch has exported. also: suffixes of files that are listed too.
    Raises ClipmatchError when the folder does not exist.
    """
    root = Path(folder).expanduser().absolute()
    try:
        status = root.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ClipmatchError(f"The image folder {root} does not exist; check its name.") from error
    if not stat.S_ISDIR(status.st_mode):
        yield Found(root, Stamp(status.st_size, status.st_mtime_ns, sidecar_stamp(root)))
        return
    entered = {(status.st_dev, status.st_ino)}
    waiting = [root]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield Failure(place, error.strerror or "can't be read")
            continue
        names = {entry.name for entry in inside}
        if GALLERY in names and place != root:
            continue  # copies, made by clipmatch export-gallery
        below = []
        for entry in inside:
            if entry.name.startswith(".") or left_out(entry, root, exclude):
                continue
            if is_folder(entry, follow_links, entered):
                below.append(Path(entry.path))
            elif is_image_name(entry.name) or (also and entry.name.lower().endswith(also)):
                yield look(entry, names)
        waiting += reversed(below)


def left_out(entry: os.DirEntry[str], root: Path, exclude: Iterable[str]) -> bool:
    """Whether a pattern fits the entry's name or its path below the root."""
    below = Path(entry.path).relative_to(root).as_posix() if exclude else ""
    return any(fnmatch(entry.name, pattern) or fnmatch(below, pattern.strip("/")) for pattern in exclude)


def is_folder(entry: os.DirEntry[str], follow_links: bool, entered: set[tuple[int, int]]) -> bool:
    """Whether to enter; remembers folders that links lead to, so that a loop of links ends."""
    try:
        if not entry.is_dir(follow_symlinks=follow_links):
            return False
        if follow_links:
            status = entry.stat()
            if (status.st_dev, status.st_ino) in entered:
                return False
            entered.add((status.st_dev, status.st_ino))
    except OSError:  # a link that leads nowhere
        return False
    return True


def look(entry: os.DirEntry[str], names: set[str]) -> Found | Failure:
    """The stamp of a file whose folder holds `names`."""
    path = Path(entry.path)
    try:
        status = entry.stat()
    except OSError as error:
        return Failure(path, error.strerror or "can't be read")
    return Found(path, Stamp(status.st_size, status.st_mtime_ns, sidecar_stamp(path, names)))
