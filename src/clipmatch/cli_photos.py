"""The commands for a photo collection: index, find, duplicates. Parse, call, print.

In: the words of the command line. Out: answers on stdout, progress and warnings on stderr.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipmatch.errors import ClipmatchError
from clipmatch.modelfolder import EMBEDDED, TEXT_GRAPH
from clipmatch.output import OutputOptions, output_options, printable, report_failures, write_matches
from clipmatch.session import open_ahead

if TYPE_CHECKING:
    from clipmatch.embedder import Embedder
    from clipmatch.index import Index
    from clipmatch.photo import Photo
    from clipmatch.query import Query
    from clipmatch.search import Matches, Request
    from clipmatch.store import Filter

Command = Callable[..., Any]


def model_option(command: Command) -> Command:
    """The option that names a model to search or measure with."""
    text = 'Model folder, training run or hub name of a CLIP; "embedded", which comes with clipmatch, if not given.'
    return click.option("--model", metavar="NAME", help=text)(command)


def index_option(command: Command) -> Command:
    """The option that names an index."""
    text = (
        "An SQLite file; at an address (s3://bucket/index) or in a folder that ends in .lance, Lance tables. "
        "CLIPMATCH_INDEX, or a file in your data folder, if not given."
    )
    return click.option("--index", "--store", "index_file", metavar="PLACE", help=text)(command)


@click.command("index")
@click.argument("folders", nargs=-1, metavar="[DIR]...")
@index_option
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help='Leave out names or paths that fit, such as "*.gif"; remembered with the folder until given anew ("": none).',
)
@click.option(
    "--follow-links/--no-follow-links",
    default=None,
    help="Enter folders that links lead to, or do not (at first); remembered.",
)
@click.option("--watch", is_flag=True, help="Stay, and follow changes as they happen, until Ctrl-C.")
@click.option("--remove", is_flag=True, help="Forget the folders instead; their files stay as they are.")
@click.option(
    "--reembed", is_flag=True, help="Change the index over to --model; the old vectors answer until it is done."
)
@click.option("--status", is_flag=True, help="Only say what is in the index.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="ray: on many machines, from object storage (s3://...), .tar and .parquet files too, into Lance tables.",
)
@click.option("--address", metavar="HOST:PORT", help="Ray cluster; one is started here for this run, if not given.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Of the Ray cluster; as many as it has room for.")
@model_option
@click.option("--device", help="cpu, cuda, cuda:1, mps; the fastest if not given.")
def index_command(
    folders: tuple[str, ...],
    index_file: str | None,
    exclude: tuple[str, ...],
    follow_links: bool | None,
    watch: bool,
    remove: bool,
    reembed: bool,
    status: bool,
    engine: str,
    address: str | None,
    workers: int | None,
    model: str | None,
    device: str | None,
) -> None:
    """Index the photographs in each DIR, or bring the index up to date with the folders that it knows.

    Only what is new or changed is looked at; a moved file keeps what is known of it. Ctrl-C stops at any moment, and
    the next run goes on. Afterwards: clipmatch find "two dogs in the snow"
    """
    from clipmatch.embedder import load_model
    from clipmatch.index import Index, check_folders
    from clipmatch.remote import absolute

    chosen = [f"--{name}" for name, given in (("remove", remove), ("reembed", reembed), ("status", status)) if given]
    if len(chosen) > 1 or (chosen and watch):
        raise ClipmatchError(
            f"{' and '.join([*chosen, *['--watch'] * watch])} can't be done at once; give one of them."
        )
    if (status or reembed) and folders:
        raise ClipmatchError(f"{chosen[0]} is about the whole index; leave out the folders.")
    if remove and not folders:
        raise ClipmatchError("--remove needs the folders that are to be forgotten.")
    if (exclude or follow_links is not None) and not folders:
        raise ClipmatchError("--exclude and --follow-links belong to folders; name the folders too.")
    if engine == "ray":
        if chosen or watch or follow_links is not None:
            raise ClipmatchError("--engine ray only brings an index up to date; leave out what does something else.")
        index_by_ray(folders, index_file, exclude, model, device, address, workers)
        return
    if address or workers:
        raise ClipmatchError("--address and --workers are of a Ray cluster; give --engine ray too.")
    if not chosen:
        check_folders(folders)
    embedder = load_model(model, device) if model or device else None
    with Index.open(index_file, None if reembed else embedder, create=bool(folders) and not chosen) as index:
        if status:
            click.echo(status_text(index))
        elif remove:
            for folder in folders:
                click.echo(f"forgot {index.remove(folder)} photographs of {printable(folder)}")
                for root in index.store.roots():
                    if absolute(folder).is_relative_to(root.path):
                        click.echo(
                            f"It lies in {printable(root.path)}, which the index keeps up with: the next run brings it "
                            f"back, unless you name that folder with --exclude {printable(absolute(folder).name)}.",
                            err=True,
                        )
        elif reembed:
            summary = index.reembed(embedder)
            report_failures(summary.failures)
            click.echo(f"{summary.changed} photographs embedded anew; {len(index)} in the index")
        else:
            report_update(index, folders, exclude or None, follow_links)
            if watch:
                follow(index)


def index_by_ray(
    folders: Sequence[str],
    place: str | None,
    exclude: Sequence[str],
    model: str | None,
    device: str | None,
    address: str | None,
    workers: int | None,
) -> None:
    """Bring an index up to date on a Ray cluster, and say what has changed."""
    from clipmatch.storage import default_index, open_store, place_of

    try:
        from clipmatch.distributed import update
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("clipmatch"):
            raise
        raise ClipmatchError(
            f'--engine ray needs {error.name}; install it with: pip install "clipmatch[distributed]"'
        ) from error
    store = place_of(place or default_index())
    summary = update(store, folders, exclude, model=model, device=device, address=address, workers=workers)
    report_failures(summary.failures)
    with open_store(store) as done:
        click.echo(f"{summary}; {len(done)} photographs in the index")


def report_update(
    index: Index,
    folders: Sequence[str] = (),
    exclude: Sequence[str] | None = None,
    follow_links: bool | None = None,
) -> None:
    """Bring the index up to date, and say what has changed."""
    summary = index.update(folders, exclude, follow_links)
    report_failures(summary.failures)
    click.echo(f"{summary}; {len(index)} photographs in the index")
    if not summary.derived:
        click.echo('With so many, pip install "clipmatch[scale]" makes queries quicker.', err=True)


def follow(index: Index) -> None:
    """Update the index whenever something changes below its folders, until Ctrl-C."""
    try:
        from watchfiles import watch
    except ModuleNotFoundError as error:
        raise ClipmatchError('--watch needs watchfiles; install it with: pip install "clipmatch[photos]"') from error
    roots = index.store.roots()
    click.echo(f"watching {', '.join(printable(root.path) for root in roots)}; Ctrl-C ends it", err=True)
    for _ in watch(*(root.path for root in roots), raise_interrupt=False):
        report_update(index)


def status_text(index: Index) -> str:
    """What is in an index, in a few lines."""
    model = index.store.model
    lines = [f"index        {printable(index.store.path)}"]
    lines.append(
        f"model        {model.name or 'the one that comes with clipmatch'}" if model else "model        none yet"
    )
    lines.append(f"photographs  {len(index)}")
    for root in index.store.roots():
        without = f" without {', '.join(map(printable, root.exclude))}" if root.exclude else ""
        lines.append(f"folder       {printable(root.path)}{without}{', links followed' * root.follow_links}")
    lines += [f"failed       {printable(failure.path)}: {failure.reason}" for failure in index.store.failures()]
    return "\n".join(lines)


# Which photographs


def moment(context: click.Context, option: click.Parameter, value: str | None) -> datetime | None:
    """2023, 2023-06, 2023-06-15 or 2023-06-15T12:30 -> its first moment."""
    if value is None:
        return None
    for form in ("%Y", "%Y-%m", "%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M"):
        try:
            return datetime.strptime(value, form)
        except ValueError:
            continue
    raise click.BadParameter(f"{value!r} is no date; write it as 2023, 2023-06 or 2023-06-15.")


def file_size(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """500k, 2M, 1.5G -> bytes."""
    if value is None:
        return None
    if not (match := re.fullmatch(r"(\d{1,18}(?:\.\d+)?)([kKMG]?)B?", value)):
        raise click.BadParameter(f"{value!r} is no size; write it as 500k, 2M or 1.5G.")
    return round(float(match[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]])


def box(context: click.Context, option: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """SOUTH,WEST,NORTH,EAST in degrees."""
    if value is None:
        return None
    try:
        south, west, north, east = (float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter("give four numbers: SOUTH,WEST,NORTH,EAST in degrees.") from None
    if not (-90 <= south <= north <= 90 and -180 <= west <= 180 and -180 <= east <= 180):
        raise click.BadParameter("south must not lie north of north, and no number may leave the globe.")
    return south, west, north, east


def filter_options(command: Command) -> Command:
    """Options that say which photographs take part."""
    for option in (
        click.option("--box", callback=box, metavar="S,W,N,E", help="Taken in this box of latitudes and longitudes."),
        click.option("--has-caption", is_flag=True, help="With a caption, in the file or beside it."),
        click.option("--min-side", type=click.IntRange(1), metavar="PIXELS", help="The shorter side at least."),
        click.option("--min-size", callback=file_size, metavar="SIZE", help="Of the file: 500k, 2M."),
        click.option("--camera", metavar="NAME", help="Part of the camera's name."),
        click.option("--before", callback=moment, metavar="DATE", help="Taken before it: 2023, 2023-06, 2023-06-15."),
        click.option("--after", callback=moment, metavar="DATE", help="Taken at its first moment or later."),
        click.option(
            "--folder", "folders", multiple=True, metavar="DIR", help="In this folder of the index; repeatable."
        ),
    ):
        command = option(command)
    return command


def filter_of(options: dict[str, Any]) -> Filter:
    """Take the filter's options out of all options."""
    from clipmatch.remote import absolute
    from clipmatch.store import Filter

    names = ("after", "before", "camera", "min_side", "min_size", "has_caption", "box")
    folders = tuple(absolute(folder) for folder in options.pop("folders"))
    return Filter(folders=folders, **{name: options.pop(name) for name in names})


# Asking


@click.command("find")
@click.argument("query", nargs=-1, required=True, metavar="QUERY...")
@model_option
@click.option("--images", multiple=True, metavar="DIR", help="Search this folder instead of the index; repeatable.")
@index_option
@click.option("-k", "--top-k", default=9, show_default=True, help="How many matches.")
@click.option("--page", default=1, show_default=True, help="2 for the next -k matches, and so on.")
@click.option(
    "--not", "exclude", multiple=True, metavar="TEXT", help="Leave out photographs that show this; repeatable."
)
@click.option(
    "--min-confidence",
    type=click.FloatRange(0, 1),
    help="Leave out matches that are less probably what is meant; where many would do, 0.1 is much.",
)
@click.option("--hybrid", is_flag=True, help="Words of captions and file names count too.")
@click.option("--diverse", is_flag=True, help="Prefer matches that differ from each other.")
@click.option("--more-like", type=int, metavar="N", help="Find what is like match N of the query.")
@click.option(
    "--duplicates",
    type=click.Choice(["show", "stack", "hide"]),
    default="stack",
    show_default=True,
    help="Near-duplicates: each for itself, counted behind the best of them, or left out.",
)
@filter_options
@output_options
@click.option("--device", help="cpu, cuda, cuda:1, mps; the fastest if not given.")
def find_command(query: tuple[str, ...], chosen: OutputOptions, **options: Any) -> None:
    """Find the photographs that match QUERY, best first.

    \b
        clipmatch find "two dogs in the snow"
        clipmatch find photo.jpg                      like this photograph
        clipmatch find "at night" + photo.jpg         both at once
        clipmatch find "dog:2" "snow" --not "person"  weights; what must not be shown

    Asks the index that clipmatch index has made, or with --images a folder, whose photographs are remembered, so that
    the next query is quick. A calibrated model says how probable it is that a photograph is the one described (the
    column "conf").
    """  # noqa: D301 - click's mark for "do not wrap" is a real backspace
    if not options["model"]:
        open_ahead(EMBEDDED / TEXT_GRAPH)  # nearly every index is of that model, and most queries have words
    from clipmatch.embedder import load_model
    from clipmatch.query import parse_query
    from clipmatch.search import Request, need_calibration

    where, images, more_like = filter_of(options), options.pop("images"), options.pop("more_like")
    model, device, file = options.pop("model"), options.pop("device"), options.pop("index_file")
    if images and (file or where.folders):
        other = "--index searches an index" if file else "--folder chooses from the index"
        raise ClipmatchError(f"--images searches folders and {other}; give one of them.")
    asked, request = parse_query(query), Request(where=where, **options)
    embedder = load_model(model, device) if images or model or device else None
    if embedder:  # rather now than after an hour of embedding
        need_calibration(getattr(embedder, "calibration", None), asked, request)
    with opened(images, file, embedder) as index:
        matches = answer(index, asked, within(request, images), more_like)
    if images:
        shorten(matches, images)
    report_failures(write_matches(matches, chosen, first=1 + (request.page - 1) * request.top_k))
    explain(matches, request)


@contextmanager
def opened(images: Sequence[str], file: str | None, embedder: Embedder | None) -> Iterator[Index]:
    """The index that is asked: that of --images, brought up to date, or the one that was made before."""
    from clipmatch.index import Index, open_folders
    from clipmatch.storage import default_index, exists

    if images:
        with open_folders(images, embedder) as (index, summary):
            report_failures(summary.failures)
            yield index
        return
    if not file and not exists(default_index()):
        raise ClipmatchError(
            "There is no index yet: make one with clipmatch index DIR, or search a folder with --images DIR."
        )
    with Index.open(file, embedder, create=False) as index:
        yield index


def within(request: Request, images: Sequence[str]) -> Request:
    """The request, in these folders alone; in all if there are none."""
    from clipmatch.remote import absolute

    folders = tuple(absolute(folder) for folder in images)
    return replace(request, where=replace(request.where, folders=folders)) if images else request


def answer(index: Index, asked: Query, request: Request, more_like: int | None) -> Matches:
    """The matches of the query, or of what is like one of them."""
    if more_like is None:
        return index.answer(asked, request)
    first = index.answer(asked, replace(request, page=1, top_k=max(more_like, 1)))
    return index.answer(index.more_like(first, more_like), replace(request, min_confidence=None))


def shorten(matches: Matches, images: Sequence[str]) -> None:
    """Show paths as the folders were written."""
    from clipmatch.index import spoken
    from clipmatch.remote import absolute

    spoken(matches, {absolute(folder): Path(folder) for folder in images})


def explain(matches: Matches, request: Request) -> None:
    """What was left out, and why nothing may be left, on stderr."""
    if matches.vetoed:
        many = "s" * (matches.vetoed > 1)
        click.echo(f"{matches.vetoed} photograph{many} left out for what they show (--not).", err=True)
    if matches:
        return
    if not matches.searched:
        click.echo("No photograph passes the filters." if request.where else "The index is empty.", err=True)
    elif request.page == 1 and matches.best and matches.best.confidence is not None:
        click.echo(
            f"No photograph seems to show {matches.query!r}: the best has a confidence of "
            f"{matches.best.confidence:.2f}; a lower --min-confidence shows it.",
            err=True,
        )
    else:
        click.echo("No more matches." if request.page > 1 else "No photograph is left.", err=True)


@click.command("duplicates")
@index_option
@filter_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of groups.")
def duplicates_command(index_file: str | None, as_json: bool, **options: Any) -> None:
    """List near-duplicates in the index: copies, re-saved and resized ones, shots of one burst.

    Groups of paths, the largest picture of each first, with a blank line between groups. Nothing is deleted.
    """
    from clipmatch.index import Index

    with Index.open(index_file, create=False) as index:
        groups = index.duplicates(filter_of(options))
    if as_json:
        click.echo(json.dumps([[str(photo.path) for photo in group] for group in groups], indent=2))
    else:
        blocks = ["\n".join(map(describe, group)) for group in groups]
        click.echo("\n\n".join(blocks)) if blocks else click.echo("No near-duplicates.", err=True)


def describe(photo: Photo) -> str:
    """A photograph in a line."""
    size = f"{photo.metadata.width} x {photo.metadata.height}"
    return f"{size:>13}  {photo.stamp.size / 1e6:6.1f} MB  {printable(photo.path)}"
