"""What a server lets out of an index and of the files that it names.

In: the folders of an index, photographs. Out: their files, opened, if they lie where they may be shown; names of files
and folders as clients see them. Knows nothing of HTTP or pictures.

A path is only a name, and may lead elsewhere by the time it is opened: a link in a shared folder, a folder swapped for
a link, a pipe. So a file is opened first, and then asked where it lies; nothing of it is read before.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from clipmatch.archive import locate, read_bytes
from clipmatch.output import printable
from clipmatch.photo import Photo
from clipmatch.preprocess import ImageError, plain_reason
from clipmatch.remote import is_remote, status_of
from clipmatch.runlog import note
from clipmatch.store import Root

LARGEST = 1 << 29  # bytes of a photograph's file that are read: RAW files have a fifth
NOT_SHOWN = "it lies in no folder that may be shown; see clipmatch serve --show"
PATH = re.compile(r"(?<![\w.:/])/\S|\b[A-Za-z]:\\")  # where one begins; where it ends can't be told, names have spaces
UNTOLD = "That can't be done; why is said on the computer that clipmatch runs on, for it names folders there."
FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class Exposure:
    """allowed: which of the index's folders may be shown. originals: whether clients get the files as they are, with
    all that cameras note in them, and names of folders on this computer; otherwise pictures drawn anew, and paths from
    the indexed folder on.
    """

    allowed: Callable[[Root], bool] = lambda root: True
    originals: bool = True

    def of(self, roots: Sequence[Root]) -> View:
        """What that means for an index with these folders."""
        return View(tuple(root for root in roots if self.allowed(root)), self.originals)

    def told(self, text: str) -> str:
        """A sentence for clients: another one, if it names folders that they may not know; then it goes to stderr."""
        if self.originals or not PATH.search(text):
            return text
        note(text)
        return UNTOLD


@dataclass
class Source:
    """The file of a photograph. same: whether it is what was indexed. file: open; None in archives and beyond."""

    photo: Photo
    same: bool
    file: IO[bytes] | None

    def read(self) -> bytes:
        """All of it. Raises ImageError."""
        try:
            data = read_bytes(self.photo.path) if self.file is None else self.file.read(LARGEST + 1)
        except (OSError, ValueError) as error:
            raise ImageError(self.photo.path, plain_reason(error)) from error
        if len(data) > LARGEST:
            raise ImageError(self.photo.path, f"its file is larger than {LARGEST >> 20} MB")
        return data


@dataclass(frozen=True)
class View:
    """An index as clients see it, by the folders that may be shown."""

    roots: tuple[Root, ...]
    originals: bool

    def folders(self) -> dict[str, Path]:
        """The folders by the names that clients know."""
        return {self.named(root.path): root.path for root in self.roots}

    def label(self, root: Root) -> str:
        """What clients know a folder by: its name, numbered where others have the same."""
        name = root.path.name
        same = [other.path for other in self.roots if other.path.name == name]
        place = same.index(root.path)
        return f"{name} ({place + 1})" if place else name

    def named(self, path: Path) -> str:
        """A path as clients see it. Stray bytes are shown escaped, for JSON can't hold them."""
        root = None if self.originals else self.root_of(path)
        if self.originals or root is None:
            return printable(path if self.originals else path.name)
        return printable(Path(self.label(root)) / path.relative_to(root.path))

    def root_of(self, path: Path) -> Root | None:
        """The innermost of the folders below which a path lies."""
        above = [root for root in self.roots if path.is_relative_to(root.path) and ".." not in path.parts]
        return max(above, key=lambda root: len(root.path.parts), default=None)

    @contextmanager
    def open(self, photo: Photo) -> Iterator[Source]:
        """Context: the file of a photograph. Raises ImageError if it is gone, or may not be shown."""
        root = self.root_of(photo.path)
        if root is None:
            raise ImageError(photo.path, NOT_SHOWN)
        with ExitStack() as stack:
            try:
                source = stack.enter_context(opened(photo, root))
            except (OSError, ValueError) as error:
                raise ImageError(photo.path, plain_reason(error)) from error
            yield source


@contextmanager
def opened(photo: Photo, root: Root) -> Iterator[Source]:
    """Context: the file of a photograph below a folder. Raises ImageError, OSError or ValueError."""
    inside, known = locate(photo.path), photo.stamp
    place = inside[0] if inside else photo.path
    if is_remote(place):
        size, modified = status_of(place)
        yield Source(photo, modified == known.mtime and (bool(inside) or size == known.size), None)
        return
    with open_below(place, root) as file:
        status = os.fstat(file.fileno())
        same = status.st_mtime_ns == known.mtime and (bool(inside) or status.st_size == known.size)
        yield Source(photo, same, None if inside else file)


@contextmanager
def open_below(path: Path, root: Root) -> Iterator[IO[bytes]]:
    """Context: a regular file that lies below a folder, wherever the links on the way lead.

    Raises ImageError, OSError or ValueError. Links out of the folder are followed only if it is indexed with them.
    """
    descriptor = os.open(path, FLAGS)  # without waiting for whoever writes into a pipe
    with os.fdopen(descriptor, "rb") as file:
        opened = os.fstat(descriptor)
        if not stat.S_ISREG(opened.st_mode):
            raise ImageError(path, "it is not a regular file")
        if not root.follow_links:
            real = path.resolve()
            found = real.lstat()
            if (found.st_dev, found.st_ino) != (opened.st_dev, opened.st_ino):
                raise ImageError(path, "it has just been changed")
            if not real.is_relative_to(root.path.resolve()):
                why = "it is a link that leads out of the indexed folder; see clipmatch index --follow-links"
                raise ImageError(path, why)
        yield file
