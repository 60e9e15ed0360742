"""The formats of caption files: each a reader that turns a file into entries (image name, caption).

In: the path of a text file. Out: one `Entry` a caption, one `LineNote` a line that cannot be understood. Knows nothing
of images, folders or splits, and judges no entry. A further format is one more function and one more `Reader`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clipmatch.errors import ClipmatchError

IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name", "filepath", "path")
CAPTION_COLUMNS = ("caption", "text", "comment", "title", "sentence")
MAX_RECORD_LINES = 20  # a quoted field that is still open after so many lines is a stray quote


@dataclass(frozen=True)
class LineNote:
    """A line of a caption file (counted from 1) that was repaired or dropped, and why."""

    line: int
    text: str


@dataclass(frozen=True)
class Line:
    """A line without its end; `repair` says what was done to make it readable."""

    number: int
    text: str
    repair: str = ""


@dataclass(frozen=True)
class Entry:
    """One caption as a reader found it: not yet checked against rules or disk."""

    line: int
    image: str
    caption: str
    repair: str = ""


@dataclass(frozen=True)
class Reader:
    """A caption format. `sniff` sees the path and the first few lines; `read` yields a `LineNote` for a lost line."""

    name: str
    sniff: Callable[[Path, list[str]], bool]
    read: Callable[[Path], Iterator[Entry | LineNote]]


def read_lines(path: Path) -> list[Line]:
    """The lines of a UTF-8 text file."""
    return split_lines(path.read_bytes())


def split_lines(raw: bytes) -> list[Line]:
    """Bytes -> lines, with or without byte order mark, ended by LF or CRLF; bad bytes become U+FFFD."""
    lines = []
    # not str.splitlines, which would also cut a caption at U+2028 and the like
    for number, part in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        part = part.removesuffix(b"\r")
        try:
            lines.append(Line(number, part.decode("utf-8")))
        except UnicodeDecodeError:
            lines.append(Line(number, part.decode("utf-8", "replace"), "replaced bytes that are not UTF-8"))
    return lines


def both(first: str, second: str) -> str:
    """Two repairs of one line; the first may be none."""
    return f"{first}; {second}" if first else second


def body(path: Path, is_header: Callable[[str], bool]) -> list[Line]:
    """The lines that are not blank, without the header where there is one."""
    lines = [line for line in read_lines(path) if line.text.strip()]
    return lines[1:] if lines and is_header(lines[0].text) else lines


def read_flickr8k_csv(path: Path) -> Iterator[Entry | LineNote]:
    """Kaggle's Flickr8k `captions.txt`: `image,caption`, where a caption may hold bare commas and quotes."""
    for line in body(path, is_flickr8k_header):
        name, comma, caption = line.text.partition(",")
        if comma:
            yield Entry(line.number, name, unquote(caption.strip()), line.repair)
        else:
            yield LineNote(line.number, "no comma after the image name")


def is_flickr8k_header(text: str) -> bool:
    """Whether a line is the header of `captions.txt`."""
    return text.replace(" ", "").lower() == "image,caption"


def unquote(text: str) -> str:
    """Remove CSV quotes if they wrap the whole text with each inner quote doubled; otherwise quotes are literal."""
    wrapped = re.fullmatch(r'"((?:[^"]|"")*)"', text)
    return wrapped[1].replace('""', '"') if wrapped else text


TOKEN_LINE = re.compile(r"(?P<name>[^\t]+)#\d+\t(?P<caption>.*)", re.DOTALL)


def read_flickr8k_token(path: Path) -> Iterator[Entry | LineNote]:
    """The makers' `Flickr8k.token.txt` (and Flickr30k's `.token`): `name.jpg#0<TAB>caption`."""
    for line in read_lines(path):
        if match := TOKEN_LINE.fullmatch(line.text):
            yield Entry(line.number, match["name"], match["caption"], line.repair)
        elif line.text.strip():
            yield LineNote(line.number, "not of the form name#number<TAB>caption")


def read_flickr30k_csv(path: Path) -> Iterator[Entry | LineNote]:
    """Kaggle's Flickr30k `results.csv`: `image_name| comment_number| comment`, quotes literal.

    One row of the real file lacks its second bar (`2199200615.jpg| 4   A dog runs ...`); that is repaired.
    """
    for line in body(path, is_flickr30k_header):
        name, _, rest = line.text.partition("|")
        if whole := re.fullmatch(r"\s*\d+\s*\|(.*)", rest, re.DOTALL):
            yield Entry(line.number, name, whole[1], line.repair)
        elif broken := re.fullmatch(r"\s*\d+\s+(\S.*)", rest, re.DOTALL):
            repair = both(line.repair, "put in the missing second bar")
            yield Entry(line.number, name, broken[1], repair)
        else:
            yield LineNote(line.number, "not of the form image_name| comment_number| comment")


def is_flickr30k_header(text: str) -> bool:
    """Whether a line is the header of `results.csv`."""
    return [part.strip() for part in text.split("|")] == ["image_name", "comment_number", "comment"]


def read_table(path: Path) -> Iterator[Entry | LineNote]:
    """Any CSV or TSV with a header that names an image column and a caption column.

    Surplus fields are commas that nobody quoted: they go back into the caption where that is the last column.
    """
    lines = read_lines(path)
    start = next((at for at, line in enumerate(lines) if line.text.strip()), 0)
    table = table_columns(lines[start].text)
    if table is None:
        raise ClipmatchError(
            f"{path} is not a table with an image and a caption column: its header needs one of "
            f"{', '.join(IMAGE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}."
        )
    delimiter, width, image, caption = table
    for line, fields in csv_records(lines[start + 1 :], delimiter):
        repair = line.repair
        if len(fields) > width and caption == width - 1:
            fields = line.text.split(delimiter, width - 1)
            repair = both(repair, "took the rest of the line as the caption")
        if len(fields) == width:
            yield Entry(line.number, fields[image], fields[caption], repair)
        else:
            yield LineNote(line.number, f"{len(fields)} fields where the header has {width}")


def table_columns(header: str) -> tuple[str, int, int, int] | None:
    """Header line -> delimiter, number of columns, index of the image column, index of the caption column."""
    for delimiter in "\t,;|":
        names = [unquote(name.strip()).strip().lower() for name in header.split(delimiter)]
        image = next((names.index(name) for name in IMAGE_COLUMNS if name in names), None)
        caption = next((names.index(name) for name in CAPTION_COLUMNS if name in names), None)
        if image is not None and caption is not None:
            return delimiter, len(names), image, caption
    return None


def csv_records(lines: list[Line], delimiter: str) -> Iterator[tuple[Line, list[str]]]:
    """Lines -> CSV records, each with its (first) line.

    Where the quotes make no sense as CSV, that one line is taken literally: read on by the csv module, a single stray
    quote would swallow the lines after it.
    """
    at = 0
    while at < len(lines):
        line, used = lines[at], 1
        ahead = (lines[near].text + "\n" for near in range(at, min(at + MAX_RECORD_LINES, len(lines))))
        reader = csv.reader(ahead, delimiter=delimiter, strict=True)
        try:
            fields = next(reader)
            used = reader.line_num
            repair = next((part.repair for part in lines[at : at + used] if part.repair), "")
        except csv.Error:
            fields = line.text.split(delimiter)
            repair = both(line.repair, "took its quotes literally")
        if line.text.strip():
            yield Line(line.number, line.text, repair), fields
        at += used


# The first that recognises a file reads it: the special cases come before the general one.
READERS = (
    Reader("flickr8k-csv", lambda path, head: path.suffix != ".csv" and is_flickr8k_header(head[0]), read_flickr8k_csv),
    Reader("flickr8k-token", lambda path, head: TOKEN_LINE.fullmatch(head[0]) is not None, read_flickr8k_token),
    Reader("flickr30k-csv", lambda path, head: is_flickr30k_header(head[0]), read_flickr30k_csv),
    Reader("table", lambda path, head: table_columns(head[0]) is not None, read_table),
)
