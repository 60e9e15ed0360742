"""Files and folders written as a whole: readers, and whoever comes after a crash, see the old one or the new one.

In: where something goes. Out: a draft beside it to fill, which then takes its place. Knows nothing of what is written.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Context: write a draft, which then takes the place of the file; on an error nothing changes.

    The draft has a name of its own, so that several processes and threads may write the same file. Raises OSError.
    """
    draft = path.with_name(f".clipmatch-{uuid.uuid4().hex}")
    try:
        yield draft
        to_disk(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Context: fill a draft folder, which then takes the place of `folder`; on an error nothing changes.

    A folder can't be replaced in one system call everywhere, so the old one steps aside for a moment: whoever finds no
    folder after a crash looks at `aside`. Raises OSError.
    """
    draft, old = folder.with_name(f".{folder.name}.clipmatch-draft"), aside(folder)
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        for path in draft.iterdir():
            if path.is_file():  # those in folders below, thousands of small pictures, would take minutes
                to_disk(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        try:
            draft.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def aside(folder: Path) -> Path:
    """Where a folder lies while another takes its place: no name that a person would give."""
    return folder.with_name(f".{folder.name}.clipmatch-old")


def to_disk(path: Path) -> None:
    """Wait until the disk has a file's content: a power cut after a renaming could leave an empty file otherwise."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
