"""Each photograph is embedded once: a small SQLite file that remembers vectors.

In: paths and an embedder. Out: unit rows for them, computed only where the file is new or changed. Knows nothing of
queries.

A row belongs to (model fingerprint, path, size, modification time), so another model's vectors are never mixed in and
a changed file is embedded again.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from clipmatch.embedder import Embedder, Failure, ImageEmbeddings
from clipmatch.errors import ClipmatchError
from clipmatch.runtime import cache_folder

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp"))
SCHEMA = 1
CHUNK = 256  # files between two commits: what an interruption can cost


def list_images(folder: str | Path) -> list[Path]:
    """All picture files below a folder, hidden ones left out, sorted; a file stands for itself.

    Raises ClipmatchError when the folder does not exist or holds no picture.
    """
    root = Path(folder).expanduser()
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ClipmatchError(f"The image folder {root} does not exist; check its name.")
    found = []
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in sorted(files) if is_image_name(name)]
    if not found:
        raise ClipmatchError(f"The folder {root} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    return found


def is_image_name(name: str) -> bool:
    """Whether a file name looks like a visible picture."""
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def embed_remembered(embedder: Embedder, paths: Sequence[Path], progress: bool = True) -> ImageEmbeddings:
    """Paths -> unit rows [n, d] in the order of `paths`; files seen before cost one `stat` each."""
    with open_store() as store:
        stamps = {path: stamp_of(path) for path in paths}
        known = recall(store, embedder.fingerprint, stamps)
        new = [path for path in paths if path not in known]
        failures: list[Failure] = []
        with tqdm(total=len(new), desc="images", unit="img", disable=not progress or len(new) < CHUNK) as bar:
            for start in range(0, len(new), CHUNK):
                chunk = new[start : start + CHUNK]
                done = embedder.embed_images(chunk, progress=progress and len(new) < CHUNK)
                failures += done.failures
                fresh = dict(zip(done.paths, done.rows, strict=True))
                remember(store, embedder.fingerprint, stamps, fresh)
                known.update(fresh)
                bar.update(len(chunk))
    good = [path for path in paths if path in known]
    rows = np.stack([known[path] for path in good]) if good else np.zeros((0, embedder.dim), np.float32)
    return ImageEmbeddings(rows, good, failures)


def stamp_of(path: Path) -> tuple[int, int]:
    """(size, modification time in ns); (-1, -1) for a file that can't be looked at."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return (-1, -1)
    return (status.st_size, status.st_mtime_ns)


def store_path() -> Path:
    """CLIPMATCH_CACHE/vectors.sqlite, or the same in the system's place for caches."""
    return cache_folder() / "vectors.sqlite"


@contextmanager
def open_store() -> Iterator[sqlite3.Connection]:
    """The store, made if need be. Raises ClipmatchError when it can't be used or comes from a newer version."""
    path = store_path()
    mend = "delete it, or set CLIPMATCH_CACHE to another folder."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClipmatchError(f"The cache folder {path.parent} can't be made ({error.strerror}); {mend}") from error
    try:
        with closing(sqlite3.connect(path, timeout=30)) as store:
            prepare(store, path)
            yield store
    except sqlite3.Error as error:
        raise ClipmatchError(f"The vector cache {path} can't be used ({error}); {mend}") from error


def prepare(store: sqlite3.Connection, path: Path) -> None:
    """Check the version, make the table."""
    store.execute("PRAGMA journal_mode=WAL")
    if store.execute("PRAGMA user_version").fetchone()[0] > SCHEMA:
        raise ClipmatchError(f"The vector cache {path} is from a newer clipmatch; upgrade, or delete that file.")
    store.execute(
        "CREATE TABLE IF NOT EXISTS vectors (model TEXT, path TEXT, size INTEGER, mtime INTEGER, row BLOB,"
        " PRIMARY KEY (model, path)) WITHOUT ROWID"
    )
    store.execute(f"PRAGMA user_version={SCHEMA}")


def key_of(path: Path) -> str:
    """The absolute path as text that SQLite can hold, whatever bytes the name has."""
    return os.fsencode(path.absolute()).decode("utf-8", "backslashreplace")


def recall(
    store: sqlite3.Connection, model: str, stamps: dict[Path, tuple[int, int]]
) -> dict[Path, NDArray[np.float32]]:
    """The vectors of those files that have not changed since."""
    known = {}
    for path, (size, mtime) in stamps.items():
        found = store.execute(
            "SELECT row FROM vectors WHERE model=? AND path=? AND size=? AND mtime=?",
            (model, key_of(path), size, mtime),
        ).fetchone()
        if found:
            known[path] = np.frombuffer(found[0], np.float32)
    return known


def remember(
    store: sqlite3.Connection,
    model: str,
    stamps: dict[Path, tuple[int, int]],
    fresh: dict[Path, NDArray[np.float32]],
) -> None:
    """Store vectors, in one transaction."""
    with store:
        store.executemany(
            "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?, ?)",
            [(model, key_of(path), *stamps[path], row.astype(np.float32).tobytes()) for path, row in fresh.items()],
        )
