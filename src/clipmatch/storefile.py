"""An index's SQLite file: opened, brought to today's tables, shared with other processes, and its errors in a sentence.

In: a path. Out: a connection to a file that is known to be an index; contexts of who writes and of what goes wrong.
Knows nothing of photographs.

From its version on an older clipmatch knows that it can't read a file, and from NEEDS which one can.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clipmatch.atomic import new_draft
from clipmatch.errors import ClipmatchError, newer, own_version, unwritable

# Each entry takes a file from the version of its place to the next; a released one is never edited.
UPGRADES = (
    """
    CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
    CREATE TABLE roots (path BLOB PRIMARY KEY, exclude TEXT, follow_links INTEGER) WITHOUT ROWID;
    CREATE TABLE photos (
        id INTEGER PRIMARY KEY, path BLOB UNIQUE NOT NULL, name TEXT, digest BLOB NOT NULL,
        size INTEGER, mtime INTEGER, sidecar INTEGER, width INTEGER, height INTEGER, taken TEXT,
        latitude REAL, longitude REAL, camera TEXT, caption TEXT, picture_hash INTEGER
    );
    CREATE INDEX photos_by_content ON photos (digest);
    CREATE TABLE vectors (model TEXT NOT NULL, digest BLOB NOT NULL, row BLOB NOT NULL);
    CREATE UNIQUE INDEX vectors_by_content ON vectors (model, digest);
    CREATE TABLE failures (
        path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER, sidecar INTEGER, reason TEXT
    ) WITHOUT ROWID;
    CREATE VIRTUAL TABLE words USING fts5 (
        name, caption, content='photos', content_rowid='id', tokenize='unicode61 remove_diacritics 2'
    );
    CREATE TRIGGER words_added AFTER INSERT ON photos BEGIN
        INSERT INTO words (rowid, name, caption) VALUES (new.id, new.name, new.caption);
    END;
    CREATE TRIGGER words_removed AFTER DELETE ON photos BEGIN
        INSERT INTO words (words, rowid, name, caption) VALUES ('delete', old.id, old.name, old.caption);
    END;
    CREATE TRIGGER words_changed AFTER UPDATE ON photos BEGIN
        INSERT INTO words (words, rowid, name, caption) VALUES ('delete', old.id, old.name, old.caption);
        INSERT INTO words (rowid, name, caption) VALUES (new.id, new.name, new.caption);
    END;
    """,
    """
    CREATE TABLE concepts (
        name TEXT PRIMARY KEY COLLATE NOCASE, model TEXT NOT NULL, row BLOB NOT NULL,
        examples TEXT NOT NULL, others TEXT NOT NULL, precision REAL
    ) WITHOUT ROWID;
    """,
)
WORD_TABLES = ("words_data", "words_idx", "words_docsize", "words_config")  # SQLite's own, of the table `words`
NEEDS = "needs"  # in `about`: the version of clipmatch that brought the file to its version, and so can read it
PATIENCE = 30  # seconds that a transaction waits for another process's
SOON = 0.5  # seconds that what is good but not needed waits
SHARED = 1 << 15  # bytes of the file by which SQLite's readers and writers know of each other, at least
FULL, LOCKED = "disk is full", "database is locked"  # as SQLite says it


def open_file(path: Path) -> tuple[sqlite3.Connection, OSError | None]:
    """A connection to the index in a file, new or brought to today's version, and what keeps it from being written.

    Raises ClipmatchError when it is damaged, of something else, or from a newer clipmatch.
    """
    with reading_errors(path):
        connection, obstacle = connect(path)
    try:
        with reading_errors(path):
            connection.execute("PRAGMA cell_size_check = ON")  # damage is told before it is followed
            check_schema(connection, path)
            upgrade(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection, obstacle


def empty_log(connection: sqlite3.Connection) -> None:
    """Take what lies in the write-ahead log into the file, as far as nobody reads the older state at this moment.

    Then the file alone is the index. While others have it open the log would stay beside it, and if another index was
    put in the file's place, belong to that by its name.
    """
    with suppress(sqlite3.Error):
        connection.execute(f"PRAGMA busy_timeout = {round(1000 * SOON)}")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    with suppress(sqlite3.Error):
        connection.execute(f"PRAGMA busy_timeout = {1000 * PATIENCE}")


def connect(path: Path) -> tuple[sqlite3.Connection, OSError | None]:
    """A connection to an index file; where nothing can be written beside it, one that only reads, and why.

    There SQLite can't make the small file by which readers and writers know of each other. Where no writer has left
    anything, none is there, so it may take the index for one that does not change.
    """
    connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)  # transactions: see `writing`
    try:
        connection.execute("PRAGMA synchronous = FULL")  # what is committed survives a power cut
        connection.execute("PRAGMA user_version")  # the first look into it
        return connection, None
    except sqlite3.OperationalError:
        connection.close()
        obstacle = obstacle_in(path.parent)
        if obstacle is None:
            raise
    if not path.is_file() or not path.stat().st_size:
        raise unwritable(f"The index {path}", obstacle)
    log = path.with_name(f"{path.name}-wal")
    if log.is_file() and log.stat().st_size:
        raise ClipmatchError(
            f"The index {path} has yet to take in what lies in {log.name}, and nothing can be written there "
            f"({obstacle.strerror}); make that possible, or copy both to another folder."
        )
    return sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True, isolation_level=None), obstacle


def obstacle_in(folder: Path) -> OSError | None:
    """What keeps a small file from being written in a folder; None if nothing does."""
    try:
        with new_draft(folder) as draft:
            draft.write_bytes(bytes(SHARED))
    except OSError as error:
        return error
    return None


def check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Raise ClipmatchError if the file holds tables, views or triggers of somebody else: those act when it is read or
    written.
    """
    if not 0 < version_of(connection) <= len(UPGRADES):
        return  # empty, of something else, or of a newer clipmatch, as will be told
    own = {statement.strip().rstrip(";") for step in UPGRADES for statement in statements(step)}
    for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master"):
        of_sqlite = kind == "table" and (name in WORD_TABLES or name.startswith("sqlite_"))
        if not (sql is None or sql in own or of_sqlite):
            raise ClipmatchError(f"The file {path} holds a {kind} {name!r} that no index has; don't use it.")


def upgrade(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the file to today's version. Raises ClipmatchError for one of something else, or from a newer clipmatch."""
    version, about = version_of(connection), "SELECT value FROM about WHERE name = ?"
    if version > len(UPGRADES):
        needs = None
        with suppress(sqlite3.DatabaseError):  # it may keep that elsewhere
            needs = next((value for (value,) in connection.execute(about, (NEEDS,))), None)
        raise newer(f"The index {path}", needs)
    if version == len(UPGRADES):
        connection.execute(about, ("content",))  # a database that has these numbers by chance lacks this table
        return
    if not version and connection.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise ClipmatchError(f"The file {path} is a database of something else, no index; name another.")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("BEGIN IMMEDIATE")
    with all_or_nothing(connection):  # not executescript, which would commit after each step
        for step in UPGRADES[version:]:
            for statement in statements(step):
                connection.execute(statement)
        connection.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (NEEDS, own_version()))
        connection.execute(f"PRAGMA user_version = {len(UPGRADES)}")


def version_of(connection: sqlite3.Connection) -> int:
    """How many of `UPGRADES` the file has had."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def statements(script: str) -> Iterator[str]:
    """The statements of an SQL script, triggers in one piece."""
    text = ""
    for line in script.splitlines(keepends=True):
        text += line
        if sqlite3.complete_statement(text):
            yield text
            text = ""


# Who writes, and what goes wrong


@contextmanager
def all_or_nothing(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what is done within; on an error, that of the commit too, as on a full disk, undo it."""
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # of some errors SQLite itself has undone it
            connection.execute("ROLLBACK")
        raise


@contextmanager
def one_writer(path: Path, wait: bool) -> Iterator[None]:
    """For as long as one process writes an index: no other does."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise ClipmatchError(f"Another clipmatch is writing the index {path}; try again later.") from None
        import click

        click.echo(f"Another clipmatch is writing the index {path}; waiting for it.", err=True)
        lock.acquire()
    except OSError as error:
        raise unwritable(f"The index {path}", error, "name one in a folder of yours with --index") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """SQLite's errors, in one sentence."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if LOCKED in str(error):
            raise ClipmatchError(
                f"Another program has held the index {path} for {PATIENCE} seconds; end that, and try again."
            ) from error
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if FULL in str(error) else None
        if obstacle := full or obstacle_in(path.parent):
            raise unwritable(f"The index {path}", obstacle) from error
        raise ClipmatchError(f"The index {path} can't be used now ({error}).") from error
    except sqlite3.DatabaseError as error:
        raise ClipmatchError(
            f"The index {path} is damaged ({error}); delete it and index the folders again."
        ) from error
