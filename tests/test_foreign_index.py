"""Indexes from strangers: what they hold is data, and what makes no sense is told in a sentence."""

import sqlite3

import numpy as np
import pytest

from clipmatch.errors import ClipmatchError
from clipmatch.index import Index


@pytest.fixture
def sent(photos, model_folder, tmp_path):
    """An index that somebody has made -> its file, and a way to do to it what only its maker can."""
    path = tmp_path / "sent.sqlite"
    with Index.open(path, model_folder) as index:
        index.update([photos], progress=False)
    (tmp_path / "sent.sqlite.vectors").unlink()

    def alter(*statements):
        with sqlite3.connect(path) as database:
            for statement in statements:
                database.execute(*([statement] if isinstance(statement, str) else statement))
        database.close()

    return path, alter


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER extra AFTER INSERT ON about BEGIN DELETE FROM photos; END",
        "CREATE VIEW extra AS SELECT 1",
        "CREATE VIRTUAL TABLE extra USING fts5(a)",
        "CREATE TABLE extra (a CHECK (abs(a)))",
        "CREATE INDEX extra ON photos (abs(size))",
    ],
)
def test_what_would_act_is_refused(sent, statement):
    path, alter = sent
    Index.open(path).close()
    alter(statement)
    with pytest.raises(ClipmatchError, match=r"holds a .* 'extra' that no index has"):
        Index.open(path)


@pytest.mark.parametrize("name", ["words_added", "words_data"])  # ours, and that of a table of SQLite's own
def test_a_trigger_of_ours_that_does_something_else(sent, name):
    path, alter = sent
    alter(
        f"DROP TRIGGER IF EXISTS {name}",
        f"CREATE TRIGGER {name} AFTER INSERT ON photos BEGIN DELETE FROM roots; END",
    )
    with pytest.raises(ClipmatchError, match=name):
        Index.open(path)


def test_a_view_in_the_place_of_a_table(sent):
    """It would never end."""
    path, alter = sent
    alter(
        "ALTER TABLE about RENAME TO kept",
        "CREATE VIEW about AS WITH RECURSIVE n(name, value) AS (SELECT 'a', 1 UNION ALL SELECT 'b', value + 1 FROM n)"
        " SELECT name, value FROM n",
    )
    with pytest.raises(ClipmatchError, match=r"holds a view 'about'|holds a table 'kept'"):
        Index.open(path)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE photos SET mtime = 'yesterday'",
        "UPDATE photos SET mtime = 1e300",
        "UPDATE photos SET width = 'wide'",
        "UPDATE photos SET digest = 'none'",
        "UPDATE photos SET taken = 'never'",
        "UPDATE photos SET path = 7 WHERE id = 1",
        "UPDATE vectors SET row = x'00'",
        ("UPDATE vectors SET row = ?", (np.full(16, np.nan, "<f4").tobytes(),)),
        "UPDATE about SET value = '[]' WHERE name = 'model'",
        "UPDATE about SET value = '{' WHERE name = 'model'",
        "UPDATE about SET value = replace(value, '16', '1000000000000') WHERE name = 'model'",
        "UPDATE roots SET exclude = '{'",
    ],
)
def test_values_that_make_no_sense(sent, statement, model_folder):
    path, alter = sent
    alter(statement)

    def use():
        with Index.open(path, model_folder) as index:
            index.store.roots()
            index.find("red", top_k=4)
            list(index)

    with pytest.raises(ClipmatchError, match="is damaged"):
        use()
