"""Files and folders written as a whole: readers, and whoever comes after a crash, see the old one or the new one.

In: where something goes. Out: a draft beside it to fill, which then takes its place. Knows nothing of what is written.

What is there after a power cut is what the disk was told to keep, in that order: first the draft's content, then, by
its folder, that it has taken its place. Only then is anything old removed.

A draft is locked while it is written, and a lock goes with its process. So a draft without one is nobody's: whoever
writes beside it next removes it. Where the system or the disk knows no such locks, drafts are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

DRAFT = ".clipmatch-"  # begins the names of drafts of files
MANY = 200  # files of a folder from which on one call for the whole disk is quicker than one for each


@contextmanager
def atomic_file(path: Path, replace: bool = True) -> Iterator[Path]:
    """Context: write a draft, which then takes the place of the file; on an error nothing changes.

    The draft has a name of its own, so that several processes and threads may write the same file. Without `replace`
    what is there stays, and FileExistsError is raised. Raises OSError.
    """
    if replace and path.is_symlink():  # the link stays
        path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # a terminal, or a pipe: there is nothing to take the place of
        yield path
        return
    remove_drafts(path.parent)
    try:
        with new_draft(path.parent) as draft:
            yield draft
            to_disk(draft)
            if replace:
                draft.replace(path)
            else:
                put_new(draft, path)
            folder_to_disk(path.parent)
    except OSError as error:
        if DRAFT in str(error.filename):  # of the name that it would have had the caller knows
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Context: fill a draft folder, which then takes the place of `folder`; on an error nothing changes.

    A folder can't be replaced in one system call everywhere, so the old one steps aside for a moment: whoever finds no
    folder after a crash looks at `aside`. Raises OSError, also when another process is writing the same folder.
    """
    old = aside(folder)
    with draft_folder(folder) as draft:
        yield draft
        all_to_disk(draft)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        try:
            draft.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        folder_to_disk(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def aside(folder: Path) -> Path:
    """Where a folder lies while another takes its place: no name that a person would give."""
    return folder.with_name(f".{folder.name}.clipmatch-old")


# Drafts, and whose they are


@contextmanager
def new_draft(folder: Path) -> Iterator[Path]:
    """Context: an empty file in a folder, this process's own; afterwards it is gone, if it has not been moved."""
    while True:
        draft = folder / f"{DRAFT}{uuid.uuid4().hex}"
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if lock(descriptor) and not os.fstat(descriptor).st_nlink:  # another process took it for nobody's just then
            os.close(descriptor)
            continue
        break
    if fcntl is None:  # an open file could not be moved
        os.close(descriptor)
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)
        if fcntl is not None:
            unlock(descriptor)


@contextmanager
def draft_folder(folder: Path) -> Iterator[Path]:
    """Context: an empty folder beside `folder`, this process's own; afterwards it is gone, if it has not been moved."""
    draft, descriptor = locked_folder(folder)
    if descriptor is None:  # nobody can be kept out, so each has its own
        draft = draft.with_name(f"{draft.name}-{uuid.uuid4().hex}")
        draft.mkdir(parents=True)
    try:
        for path in draft.iterdir():  # what was left behind by one that was killed
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield draft
    finally:
        if descriptor is None or is_still(draft, descriptor):  # not moved into place
            shutil.rmtree(draft, ignore_errors=True)
        if descriptor is not None:
            unlock(descriptor)


def locked_folder(folder: Path) -> tuple[Path, int | None]:
    """The name of the draft of a folder, and the draft itself, open and locked; None, and no draft, where there are no
    locks. Raises OSError if another process holds it.
    """
    draft = folder.with_name(f".{folder.name}.clipmatch-draft")
    if fcntl is None:  # Windows opens no folders
        return draft, None
    while True:
        draft.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_RDONLY)
        held = lock(descriptor, wait=False)
        if held and is_still(draft, descriptor):
            return draft, descriptor
        os.close(descriptor)
        if held is None:
            with contextlib.suppress(OSError):  # of another process
                draft.rmdir()
            return draft, None
        if not held:
            raise OSError(errno.EBUSY, "another process is writing it", str(folder))
        # else the other one has just put it in its place


def remove_drafts(folder: Path) -> None:
    """Remove the drafts of files in a folder that no process holds any more."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        left = [entry.path for entry in entries if re.fullmatch(f"{re.escape(DRAFT)}[0-9a-f]{{32}}", entry.name)]
        for path in left:
            with contextlib.suppress(OSError):  # another process may be doing the same
                descriptor = os.open(path, os.O_RDWR)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    Path(path).unlink()
                finally:
                    os.close(descriptor)


def lock(descriptor: int, wait: bool = True) -> bool | None:
    """Lock an open file or folder -> False if another process holds it; None where there are no locks, of this system
    or on that disk.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def unlock(descriptor: int) -> None:
    """Let go of it, also for processes that were forked meanwhile."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_still(path: Path, descriptor: int) -> bool:
    """Whether what is open lies there."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def put_new(draft: Path, path: Path) -> None:
    """Give a file its name, unless that is taken. Raises FileExistsError."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # a disk without links
        if path.exists() or path.is_symlink():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        draft.replace(path)


# What is on the disk


def to_disk(path: Path) -> None:
    """Wait until the disk has a file's content: a power cut after a renaming could leave an empty file otherwise."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def folder_to_disk(folder: Path) -> None:
    """Wait until the disk has what a folder lists: a power cut could undo a renaming otherwise."""
    with contextlib.suppress(OSError):  # systems and disks where a folder is no file
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def all_to_disk(folder: Path) -> None:
    """Wait until the disk has a folder with all that lies below it."""
    inside = [path for path in folder.rglob("*") if not path.is_symlink()]
    if len(inside) > MANY and hasattr(os, "sync"):
        os.sync()
        return
    for path in [*inside, folder]:
        folder_to_disk(path) if path.is_dir() else to_disk(path)
