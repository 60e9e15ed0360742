"""The tables of a Lance database: opened once, read at their latest version or all at one, written in whole versions.

In: the place of a database, names of tables, conditions in SQL. Out: rows. Every table that is opened is of the form
that it has in an index; LanceDB's errors become one sentence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa

from clipmatch.errors import ClipmatchError, reason_of
from clipmatch.lancerows import among, check_form, check_values, strange
from clipmatch.sanity import making_sense

PART = 10_000  # values in one condition


class LanceTables:
    """The tables of one database. path: its folder or address."""

    def __init__(self, path: Path | str):
        self.path = path
        with reading_errors(path):
            self._db = lancedb.connect(str(path), storage_options=storage_options(str(path)))
        self._open: dict[str, Any] = {}
        self._within = 0  # snapshots

    def close(self) -> None:
        """Let go of the tables."""
        self._open.clear()

    def names(self) -> list[str]:
        """Of the tables that there are."""
        with reading_errors(self.path):
            found: list[str] = self._db.list_tables().tables
        return found

    def about(self, name: str) -> dict[bytes, bytes]:
        """What a table says of itself, whatever its form."""
        with reading_errors(self.path):
            return self._db.open_table(name).schema.metadata or {}

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read within is of one version, whatever is written meanwhile."""
        if not self._within:
            for name in list(self._open):
                self.table(name)
        self._within += 1
        try:
            yield
        finally:
            self._within -= 1

    def table(self, name: str) -> Any:
        """A table, at its latest version unless it is within a snapshot; None if there is none."""
        with reading_errors(self.path):
            table = self._open.get(name)
            if table is not None:
                if not self._within:
                    table.checkout_latest()
                return table
            try:
                return self._keep(name, self._db.open_table(name))
            except (ValueError, FileNotFoundError) as error:
                if "not found" not in str(error):
                    raise
                return None

    def _keep(self, name: str, table: Any) -> Any:
        """A table that was opened just now. Raises ClipmatchError unless it is of the form that it has in an index."""
        schema = table.schema
        if more := strange(schema):
            raise ClipmatchError(f"The index {self.path} holds {more[0]!r}, which no index has; don't use it.")
        with making_sense(self.path):
            check_form(name, schema)
        self._open[name] = table
        return table

    def create(self, name: str, schema: pa.Schema, data: Any = None, replace: bool = False) -> None:
        """Make a table, of some rows if they are given; one that is there stays unless it is to be replaced."""
        with reading_errors(self.path):
            how = {"mode": "overwrite"} if replace else {"exist_ok": True}
            self._db.create_table(name, data=data, schema=schema, **how)
        self.reopen(name)

    def remove(self, name: str) -> None:
        """Remove a table, if it is there."""
        if self.table(name) is not None:
            with reading_errors(self.path):
                self._db.drop_table(name)
            self.reopen(name)

    def reopen(self, name: str) -> None:
        """Open a table anew when it is next asked for: its form has changed."""
        self._open.pop(name, None)

    def read(self, name: str, columns: Sequence[str], condition: str = "") -> pa.Table:
        """The rows of a table that fulfil a condition; none where there is no table."""
        table = self.table(name)
        if table is None:
            return pa.table({column: [] for column in columns})
        with reading_errors(self.path):
            question = table.search().select(list(columns)).limit(None)
            rows = (question.where(condition) if condition else question).to_arrow()
        with making_sense(self.path):
            check_values(rows)
        return rows

    def rows(self, name: str, columns: Sequence[str], condition: str = "") -> list[dict[str, Any]]:
        """The same, by names of columns."""
        with making_sense(self.path):  # days that no calendar has
            found: list[dict[str, Any]] = self.read(name, columns, condition).to_pylist()
        return found

    def found(self, column: str, values: Iterable[int | str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The photographs where a column has one of some values."""
        for part in in_parts(values):
            yield from self.rows("photos", columns, among(column, part))

    def merge(self, name: str, key: str, rows: pa.Table) -> None:
        """Put rows in the place of those with the same keys, or beside them."""
        if len(rows):
            table = self.table(name)
            with reading_errors(self.path):
                table.merge_insert(key).when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def drop(self, name: str, condition: str) -> int:
        """Remove the rows that fulfil a condition -> their number; no version is made if there are none."""
        table = self.table(name)
        if table is None:
            return 0
        with reading_errors(self.path):
            count = int(table.count_rows(condition))
            if count:
                table.delete(condition)
            return count

    def sql(self, name: str, question: str) -> list[tuple[Any, ...]]:
        """What SQL says of a table, which it calls `dataset`."""
        with reading_errors(self.path):
            batches = self.table(name).to_lance().sql(question).build().to_batch_records()
            return [
                tuple(row) for batch in batches for row in zip(*(c.to_pylist() for c in batch.columns), strict=True)
            ]


def in_parts(values: Iterable[Any]) -> Iterator[list[Any]]:
    """Values, as many at a time as a condition takes."""
    left = iter(values)
    while part := list(islice(left, PART)):
        yield part


def storage_options(address: str) -> dict[str, str]:
    """What object storage needs beyond the usual environment variables, which are read anyway: an endpoint of http://
    is meant.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if not address.startswith("s3://") or not endpoint:
        return {}
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}


@contextmanager
def reading_errors(path: Path | str) -> Iterator[None]:
    """Lance's errors, in one sentence."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, pa.ArrowException) as error:
        raise ClipmatchError(f"The index {path} can't be used now ({reason_of(error)}).") from error
