"""The commands for captioned photographs: data check, data show, data download. Parse, call, print.

In: the words of the command line. Out: answers on stdout, progress and warnings on stderr.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipmatch.download import SETS, download
from clipmatch.errors import ClipmatchError
from clipmatch.readers import READERS

if TYPE_CHECKING:
    from clipmatch.datafix import Fixed

Command = Callable[..., Any]
FORMATS = [reader.name for reader in READERS]


def data_options(command: Command) -> Command:
    """Options that say which captioned pictures."""
    for option in (
        click.option("--format", type=click.Choice(FORMATS), help="Kind of caption file; recognised if not given."),
        click.option(
            "--images", metavar="DIR", help="Folder of the pictures; searched beside the captions if not given."
        ),
    ):
        command = option(command)
    return command


@click.group("data")
def data_group() -> None:
    """Check, show or download captioned photographs."""


@data_group.command("check")
@click.argument("path", metavar="PATH")
@data_options
@click.option("--train-split", metavar="FILE", help="Image names to train on, one a line.")
@click.option("--dev-split", metavar="FILE", help="Held-out names. Without both: as clipmatch train divides.")
@click.option(
    "--model",
    metavar="NAME",
    help='Also look for captions of another picture, by this model; "embedded" is the one that comes with clipmatch.',
)
@click.option("--json", "as_json", is_flag=True, help="Print all that was found as JSON, not ten examples of each.")
@click.option("--fix", metavar="OUT", type=click.Path(path_type=Path), help="Write a clean caption file, OUT.csv.")
def check_command(
    path: str,
    images: str | None,
    format: str | None,
    train_split: str | None,
    dev_split: str | None,
    model: str | None,
    as_json: bool,
    fix: Path | None,
) -> None:
    """Say what is wrong with the captioned photographs of PATH, a caption file or the folder that holds it.

    Rows that were repaired or dropped, with their lines; images that are missing, can't be opened, or are there twice,
    above all in train and dev; captions that describe nothing, are repeated, or stand with many images.

    --fix leaves out what can't be used: rows that were dropped, odd captions, missing and unreadable images, and from
    train what dev has byte for byte. Near copies and captions that may be mislabelled stay: look at them. Nothing that
    is there is changed.

    The exit status is 0 whatever is found, and 1 if an error stops the check.
    """
    from clipmatch.data import load_captions
    from clipmatch.datacheck import check_data
    from clipmatch.datafix import check_free, write_clean
    from clipmatch.datareport import report_text
    from clipmatch.embedder import load_model

    if fix:  # rather now than after an hour
        check_free(fix)
    embedder = load_model(model) if model else None
    data = load_captions(path, images, format)
    report = check_data(data, train=train_split, dev=dev_split, model=embedder)
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else report_text(report))
    if fix:
        # of --json stdout holds nothing else
        click.echo(fixed_text(write_clean(data, report, fix, train_split, dev_split)), err=as_json)


def fixed_text(fixed: Fixed) -> str:
    """What was written, what was left out, and how to go on."""
    from clipmatch.datareport import plural

    left_out = ", ".join(f"{name} ({count:,})" for name, count in fixed.left_out.items() if count)
    files = ", ".join(map(str, (fixed.file, *fixed.splits)))
    wrote = f"wrote {files}: {plural(fixed.kept, 'caption')}; left out: {left_out or 'nothing'}"
    return "\n".join(["", wrote, *fixed.remarks, f"train: {fixed.command}"])


@data_group.command("show")
@click.argument("path", metavar="PATH")
@data_options
@click.option("-n", "--count", default=24, show_default=True, type=click.IntRange(1), help="How many images.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Which images are drawn.")
@click.option(
    "-o",
    "--out",
    default="sheet.html",
    show_default=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The page, HTML, which needs no other file.",
)
def show_command(path: str, images: str | None, format: str | None, count: int, seed: int, out: Path) -> None:
    """Write a page of images with all their captions, drawn at random from PATH.

    Images that can't be read keep their place, with the reason.
    """
    from clipmatch.contactsheet import write_contact_sheet
    from clipmatch.data import load_captions

    if out.suffix.lower() not in (".html", ".htm"):
        raise ClipmatchError(f"The page is HTML: name it .html (got {out}).")
    click.echo(f"page: {write_contact_sheet(load_captions(path, images, format), out, count, seed)}")


@data_group.command("download")
@click.argument("name", type=click.Choice(list(SETS)))
@click.option("--out", metavar="DIR", help="An empty folder for it; kagglehub's own place if not given.")
def download_command(name: str, out: str | None) -> None:
    """Download a set of captioned photographs from Kaggle.

    Prints where its captions and images are, and how to train on them. Flickr8k and Flickr30k are for research use.
    """
    from clipmatch.datacheck import image_folder

    found = download(name, out)
    folder = image_folder(found)
    click.echo(f"captions: {found.source}")
    click.echo(f"images:   {folder} ({len(found.rows):,})")
    captions, images = shlex.quote(str(found.source)), shlex.quote(str(folder))
    click.echo(f"train:    clipmatch train --captions {captions} --images {images} --out out/{name}")
