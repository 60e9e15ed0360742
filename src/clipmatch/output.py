"""What a search does with its matches: print them, show them, put them on a page, copy them, link to them.

In: `Matches`, `OutputOptions`. Out: text, JSON, paths or pictures on stdout; a page; a folder of copies or links. Knows
nothing of models or indexes. Imports nothing slow before it is needed: every command brings this module.
"""

from __future__ import annotations

import filecmp
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipmatch.atomic import atomic_file
from clipmatch.errors import ClipmatchError
from clipmatch.remote import absolute, address_of, is_remote, open_raw

if TYPE_CHECKING:
    from PIL.Image import Image

    from clipmatch.errors import Failure
    from clipmatch.search import Match, Matches

Command = Callable[..., Any]

NO_LINK = "it is in an archive or on object storage; --copy-to copies it out"
LONGEST_NAME = 255  # bytes, on the usual file systems
THUMBNAIL = (320, 320)  # pixels at most, on a page
NO_PICTURES = (
    "No thumbnails: they need a terminal that shows pictures (by the kitty, iTerm2 or sixel protocol); "
    "--html FILE makes a page of them."
)


# Options ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputOptions:
    """What is to be done with matches: at most one way to print them, and files beside that.

    Without any, a table is printed. Raises ClipmatchError for two ways to print.
    """

    json: bool = False
    jsonl: bool = False
    paths: bool = False
    print0: bool = False
    thumbnails: bool = False
    html: Path | None = None
    copy_to: Path | None = None
    link_to: Path | None = None

    def __post_init__(self) -> None:
        ways = ("json", "jsonl", "paths", "print0", "thumbnails")
        given = [f"--{name}" for name in ways if getattr(self, name)]
        if len(given) > 1:
            listed = ", ".join(given[:-1]) + " and " + given[-1]
            raise ClipmatchError(f"{listed} are different ways to print the matches; give one of them.")


def output_options(command: Command) -> Command:
    """Options that say what is done with matches; the command gets them as `chosen`, one `OutputOptions`."""

    @functools.wraps(command)
    def with_chosen(*arguments: Any, **values: Any) -> Any:
        chosen = OutputOptions(**{field.name: values.pop(field.name) for field in fields(OutputOptions)})
        return command(*arguments, chosen=chosen, **values)

    place = click.Path(path_type=Path)
    for option in (
        click.option("--link-to", metavar="DIR", type=place, help="The same, with symbolic links."),
        click.option("--copy-to", metavar="DIR", type=place, help="Copy them to DIR, named by rank: 01_name.jpg."),
        click.option("--html", metavar="FILE", type=place, help="Write a page of them that needs no other file."),
        click.option("--thumbnails", is_flag=True, help="Show them: in kitty, iTerm2, or a terminal with sixels."),
        click.option("-0", "--print0", is_flag=True, help="Print paths, each ended by a zero byte, for xargs -0."),
        click.option("--paths", is_flag=True, help="Print paths alone, one a line, byte for byte."),
        click.option("--jsonl", is_flag=True, help="Print a JSON object a line."),
        click.option("--json", is_flag=True, help="Print a JSON list with all that is known of each."),
    ):
        with_chosen = option(with_chosen)
    return with_chosen


def write_matches(matches: Matches, chosen: OutputOptions, first: int = 1) -> list[Failure]:
    """Print matches, the best having the rank `first`, and make the files -> photographs that could not be copied.

    Raises ClipmatchError when a file can't be written; what is printed is out by then.
    """
    print_matches(matches, chosen, first)
    if chosen.html:
        write_gallery(matches, chosen.html, first)
    failures = place_matches(matches, chosen.copy_to, copy_file, first) if chosen.copy_to else []
    return failures + (place_matches(matches, chosen.link_to, link_file, first) if chosen.link_to else [])


# Printing -----------------------------------------------------------------------------------------------------------


def print_matches(matches: Sequence[Match], chosen: OutputOptions, first: int = 1) -> None:
    """Matches on stdout, in the way that was chosen."""
    if chosen.json:
        click.echo(as_json([match.row() for match in matches], indent=2))
    elif chosen.jsonl:
        for match in matches:
            click.echo(as_json(match.row()))
    elif chosen.paths or chosen.print0:
        end = b"\0" if chosen.print0 else b"\n"
        click.echo(b"".join(os.fsencode(address_of(match.path)) + end for match in matches), nl=False)
    elif chosen.thumbnails and matches:
        print_thumbnails(matches, first)
    elif matches:
        click.echo(match_table(matches, first))


def match_table(matches: Sequence[Match], first: int = 1) -> str:
    """Matches as lines: rank, score, confidence if the model is calibrated, path, number of duplicates."""
    lines = [f"rank  {score_heading(matches[0])}path"]
    for rank, match in enumerate(matches, first):
        more = f"  +{len(match.duplicates)}" if match.duplicates else ""
        lines.append(f"{rank:4d}  {score_columns(match)}{printable(match.path)}{more}")
    return "\n".join(lines)


def score_heading(match: Match) -> str:
    """What stands over the `score_columns` of matches like this one."""
    return "score  " if match.confidence is None else "score  conf  "


def score_columns(match: Match) -> str:
    """The score, and the confidence if the model is calibrated, as columns of a table."""
    confidence = "" if match.confidence is None else f"{match.confidence:4.2f}  "
    return f"{match.score:5.3f}  {confidence}"


def printable(path: Any) -> str:
    """A path on one line: line breaks, control characters and stray bytes of a name as backslash escapes."""
    return one_line(address_of(path))


def one_line(text: str) -> str:
    """A text that may hold anything, fit for a terminal: a control character there could hide or forge lines."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def report_failures(failures: Sequence[Failure]) -> None:
    """Files that could not be used, by path and reason, on stderr; many that lack the same library in one line."""
    if not failures:
        return
    click.echo(f"{len(failures)} image{'s' * (len(failures) > 1)} could not be read:", err=True)
    lacking: dict[str, int] = {}
    for failure in failures:
        if "pip install" in failure.reason:
            lacking[failure.reason] = lacking.get(failure.reason, 0) + 1
        else:
            click.echo(f"  {printable(failure.path)}: {one_line(failure.reason)}", err=True)
    for reason, count in lacking.items():
        click.echo(f"  {count}: {reason}", err=True)


def as_json(rows: Any, indent: int | None = None) -> str:
    """Rows of matches as JSON, times in ISO 8601.

    A byte of a path that is not UTF-8 stands as a lone surrogate, U+DC80 to U+DCFF, which JSON escapes; in Python
    `os.fsencode` gives the byte back. --paths and --print0 print paths as they are.
    """
    return json.dumps(rows, indent=indent, default=datetime.isoformat)


def print_thumbnails(matches: Sequence[Match], first: int = 1) -> None:
    """The table with each photograph under its line; without them, and a sentence why, if the terminal shows none."""
    from clipmatch.preprocess import ImageError
    from clipmatch.terminal import encode, find_protocol, picture_box

    protocol, box = find_protocol(), picture_box()
    heading, *lines = match_table(matches, first).split("\n")
    click.echo(heading)
    for line, match in zip(lines, matches, strict=True):
        click.echo(line)
        if protocol is None:
            continue
        try:
            click.echo(encode(thumbnail(match.path, box), protocol))
        except ImageError as error:
            click.echo(f"      {printable(error.reason)}")
    if protocol is None:
        click.echo(NO_PICTURES, err=True)


def thumbnail(path: Path, box: tuple[int, int]) -> Image:
    """A picture, upright and whole, made small enough for a box. Raises ImageError when it can't be read."""
    from clipmatch.preprocess import load_image

    image = load_image(path, min_size=min(box))
    image.thumbnail(box)
    return image


# A page -------------------------------------------------------------------------------------------------------------


def write_gallery(matches: Matches, path: Path, first: int = 1) -> Path:
    """Write the photographs found as one HTML file that needs no other; each leads to its original on this computer.

    Raises ClipmatchError when it can't be written.
    """
    from clipmatch.report import render_page, write_page

    count = f"{len(matches)} photograph{'s' * (len(matches) != 1)}"
    lead = f"{count}, best first." if len(matches) > 1 else f"{count}."
    cards = [gallery_card(match) for match in matches]
    page = render_page("gallery.html.j2", title=matches.query, lead=lead, first=first, cards=cards)
    return write_page(path, page)


def gallery_card(match: Match) -> dict[str, Any]:
    """What the page shows of a match. A photograph that can't be read keeps its place, with the reason."""
    from clipmatch.report import score_text

    metadata = match.photo.metadata if match.photo else None
    name = printable(match.path.name)
    caption = metadata and metadata.caption
    return {
        "name": name,
        "href": match.path.absolute().as_uri(),
        "score": score_text(match),
        "caption": caption,
        "taken": metadata and metadata.taken,
        "camera": metadata and metadata.camera,
        "duplicates": [(printable(path), path.absolute().as_uri()) for path in match.duplicates],
        **picture_card(match.path, alt=caption or name),
    }


def picture_card(path: Path, alt: str) -> dict[str, Any]:
    """The picture of a card, which lies inside the page, or the reason why it can't be read."""
    from clipmatch.preprocess import ImageError
    from clipmatch.report import data_uri

    try:
        image = thumbnail(path, THUMBNAIL)
    except ImageError as error:
        return {"picture": None, "reason": error.reason}
    return {"picture": {"uri": data_uri(image), "width": image.width, "height": image.height}, "alt": alt}


# Copies and links ---------------------------------------------------------------------------------------------------


def place_matches(
    matches: Sequence[Match], folder: Path, place: Callable[[Path, Path], None], first: int = 1
) -> list[Failure]:
    """Copy or link each match into a folder, which is made -> photographs that can't be read.

    Never overwrites; what an earlier run has placed is left as it is. Raises ClipmatchError when a file is in the way
    or can't be written.
    """
    from clipmatch.archive import locate, read_bytes
    from clipmatch.errors import Failure
    from clipmatch.preprocess import plain_reason

    failures = []
    make_folder(folder)
    for source, target in targets(matches, folder, first):
        ordinary, data = not is_remote(source) and locate(source) is None, b""
        if place is link_file and not ordinary:
            failures.append(Failure(source, NO_LINK))
            continue
        try:
            if ordinary:
                open_raw(source).close()
            else:
                data = read_bytes(source)
        except OSError as error:
            failures.append(Failure(source, plain_reason(error)))
            continue
        try:
            if ordinary:
                place(source, target)
            else:
                write_copy(data, target)
        except OSError as error:
            raise ClipmatchError(
                f"{printable(target)} can't be made: {plain_reason(error)}; choose another folder."
            ) from error
    return failures


def targets(matches: Sequence[Match], folder: Path, first: int) -> Iterator[tuple[Path, Path]]:
    """Each match with its place in the folder: 01_name.jpg, so that they are sorted and no two are the same."""
    digits = max(2, len(str(first + len(matches) - 1)))
    for rank, match in enumerate(matches, first):
        yield absolute(match.path), folder / short_name(f"{rank:0{digits}d}_{match.path.stem}", match.path.suffix)


def short_name(stem: str, suffix: str) -> str:
    """A file name of at most `LONGEST_NAME` bytes, without the end of its stem if need be."""
    while len(os.fsencode(stem + suffix)) > LONGEST_NAME:
        stem = stem[:-1]
    return stem + suffix


def make_folder(folder: Path) -> None:
    """Make a folder if it is not there. Raises ClipmatchError if that is impossible."""
    from clipmatch.preprocess import plain_reason

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ClipmatchError(f"{printable(folder)} is a file; name a folder.") from error
    except OSError as error:
        raise ClipmatchError(
            f"The folder {printable(folder)} can't be made: {plain_reason(error)}; choose another."
        ) from error


def copy_file(source: Path, target: Path) -> None:
    """Copy contents and times, unless it is done already. Raises ClipmatchError if another file is in the way."""
    if os.path.lexists(target):
        if target.is_symlink() or not filecmp.cmp(source, target, shallow=False):
            raise in_the_way(target)
        return
    with atomic_file(target, replace=False) as draft:  # half a copy would be in the way of the next try
        shutil.copyfile(source, draft)
        status = source.stat()
        os.utime(draft, ns=(status.st_atime_ns, status.st_mtime_ns))


def write_copy(data: bytes, target: Path) -> None:
    """The same of a picture in an archive or on object storage, which has been read."""
    if os.path.lexists(target):
        if target.is_symlink() or target.read_bytes() != data:
            raise in_the_way(target)
        return
    with atomic_file(target, replace=False) as draft:
        draft.write_bytes(data)


def link_file(source: Path, target: Path) -> None:
    """Make a symbolic link, unless it is there. Raises ClipmatchError if links or this one can't be made."""
    if os.path.lexists(target):
        if not target.is_symlink() or target.readlink() != source:
            raise in_the_way(target)
        return
    try:
        target.symlink_to(source)
    except (OSError, NotImplementedError) as error:
        from clipmatch.preprocess import plain_reason

        raise ClipmatchError(
            f"The link {printable(target)} can't be made: {plain_reason(error)}; --copy-to makes copies instead."
        ) from error


def in_the_way(target: Path) -> ClipmatchError:
    """The error for a name that something else has."""
    return ClipmatchError(f"{printable(target)} is there already and is something else; choose another folder.")
