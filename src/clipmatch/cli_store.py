"""The command that moves an index: store copy. Parse, call, print.

In: the words of the command line. Out: what was copied, on stdout; progress on stderr.
"""

from __future__ import annotations

import click

from clipmatch.errors import ClipmatchError
from clipmatch.output import printable


@click.group("store")
def store_group() -> None:
    """Move an index to another place, or to another kind of store."""


@store_group.command("copy")
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
def copy_command(source: str, target: str) -> None:
    """Copy the index FROM into TO: vectors, folders, failures and concepts; nothing is embedded anew.

    \b
        clipmatch store copy photos.sqlite s3://bucket/index
        clipmatch store copy s3://bucket/index photos.sqlite

    Each is an SQLite file; or, at an address or in a folder that ends in .lance, Lance tables. Photographs that TO has
    already are passed over, so that an interrupted copy goes on and a later one brings only what is new; those that
    FROM has no more leave TO.
    """  # noqa: D301 - click's mark for "do not wrap" is a real backspace
    from clipmatch.storage import open_store, place_of
    from clipmatch.transfer import copy_store

    if place_of(source) == place_of(target):
        raise ClipmatchError("FROM and TO are the same index; name another place.")
    with open_store(source) as old, open_store(target, create=True) as new:
        done = copy_store(old, new)
        click.echo(f"{done}; {len(new)} photographs in {printable(new.path)}")
