"""The command that gives a collection away: export-gallery. Parse, call, print.

In: the words of the command line. Out: what was made, on stdout; progress and warnings on stderr.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from clipmatch.cli_photos import filter_of, filter_options, index_option
from clipmatch.output import printable, report_failures


@click.command("export-gallery")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@index_option
@filter_options
@click.option(
    "--size",
    type=click.IntRange(64, 4096),
    default=640,
    show_default=True,
    help="Pixels of the longer side of the pictures.",
)
@click.option("--full", is_flag=True, help="Also pictures of 2048 pixels, to be looked at one by one.")
@click.option(
    "--runtime",
    metavar="DIR",
    help="Where npm pack has put the JavaScript libraries; they are fetched once and kept, if not given.",
)
def export_gallery_command(folder: Path, index_file: str | None, **options: Any) -> None:
    """Make a folder of photographs that anybody can search, in a browser alone.

    DIR gets small copies of the photographs of the index (options choose which), without the places and other data that
    cameras put into files, and a page that searches them: index.html, to be opened by a double click or put on any web
    server. Nothing that is typed there leaves the browser. Captions and dates are in it. An earlier export in DIR is
    replaced.

    The libraries that run the model in a browser come from npm, which must be installed, the first time.
    """
    from clipmatch.album import export_gallery
    from clipmatch.index import Index

    where = filter_of(options)
    with Index.open(index_file, create=False) as index:
        made = export_gallery(index, folder, where, **options)
    report_failures(made.failures)
    many = f"{made.count:,} photograph{'s' * (made.count != 1)}"
    click.echo(f"{many}, {made.size / 1e6:.1f} MB: {printable(folder / 'index.html')}")
    serve = f"python -m http.server -d {shlex.quote(printable(folder))}"
    click.echo(f"Open it in a browser; or let others in your network do so: {serve}", err=True)
