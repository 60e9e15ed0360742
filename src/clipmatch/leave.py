"""Which folders a person has indexed on this computer, for each index: those its server may show files of.

In: the place of an index, folders. Out: the folders that were given to it here. An index that somebody else has made
may name any folder; that this is not enough to show what lies there is the purpose of this file. Knows nothing of
photographs.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from clipmatch.atomic import atomic_file

MOST = 1000  # indexes that are remembered: those of tests and trials are never heard of again


def give(index: Path | str, folders: Iterable[Path]) -> None:
    """Remember that a person has put these folders into an index."""
    new, name = {str(folder) for folder in folders}, name_of(index)
    if new <= read().get(name, set()):
        return
    from filelock import FileLock

    with contextlib.suppress(OSError):  # a home that can't be written: the server will say that it needs leave
        file().parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file()}.lock"):
            known = read()
            new |= known.pop(name, set())
            known[name] = new  # the latest last
            values = {name: sorted(known[name]) for name in list(known)[-MOST:]}
            with atomic_file(file()) as draft:
                draft.write_text(json.dumps(values, indent=1))


def given(index: Path | str) -> frozenset[Path]:
    """The folders that were put into an index here."""
    return frozenset(map(Path, read().get(name_of(index), ())))


def name_of(index: Path | str) -> str:
    """The place of an index, the same by whatever way it was named."""
    return index if isinstance(index, str) else os.path.realpath(index)


def read() -> dict[str, set[str]]:
    """All that is remembered; nothing if the file is not there or damaged."""
    try:
        values = json.loads(file().read_text(encoding="utf-8"))
        return {str(name): set(map(str, listed)) for name, listed in values.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def file() -> Path:
    """Where it is remembered."""
    from platformdirs import user_data_path

    return user_data_path("clipmatch") / "folders.json"
