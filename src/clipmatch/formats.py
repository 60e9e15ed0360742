"""What a reader of captions is, and the readers of those formats that have a line (or a CSV record) for each caption.

In: the path of a text file. Out: one `Entry` a caption, one `LineNote` a line that cannot be understood. Knows nothing
of images or folders, and judges no entry. A further format is one more function and one more `Reader`; `readers` lists
them all.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from clipmatch.errors import ClipmatchError
from clipmatch.remote import open_raw

IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name", "filepath", "path", "image_path", "file_path")
CAPTION_COLUMNS = ("caption", "text", "comment", "title", "sentence", "captions", "sentences", "raw", "description")
NUMBERED = re.compile(r"(caption|text|comment|sentence|description)[ _-]?\d+")  # caption_0, caption_1, ...
SPLIT_COLUMN = "split"
MAX_LINE = 1 << 20  # bytes; a longer one is no caption, and may be all of a file that is something else
MAX_DEPTH = 20  # lists in lists, in which captions are looked for
MAX_RECORD_LINES = 20  # a quoted field that is still open after so many lines is a stray quote


@dataclass(frozen=True)
class LineNote:
    """A line of a caption file (counted from 1) that was repaired or dropped, and why.

    unit: what is counted, where that isn't lines: "record", "sample", ...
    """

    line: int
    text: str
    unit: str = "line"

    @property
    def place(self) -> str:
        """As "line 3"."""
        return f"{self.unit} {self.line}"


@dataclass(frozen=True)
class Line:
    """A line without its end; `repair` says what was done to make it readable."""

    number: int
    text: str
    repair: str = ""


@dataclass(frozen=True, slots=True)  # there may be a million
class Entry:
    """One caption as a reader found it: not yet checked against rules or disk.

    line: where, counted from 1 in the reader's unit. split: the part that the file itself puts the image in.
    """

    line: int
    image: str
    caption: str
    repair: str = ""
    split: str = ""


@dataclass(frozen=True)
class Reader:
    """A caption format. `sniff` sees the path and the first few lines; `read` yields a `LineNote` for a lost line.

    unit: what it counts. images: where the images are, if the source says so itself (None: beside it, to be guessed).
    folders: whether a folder can be its source, and a pattern such as `{00..99}.tar`; the first lines are then [""].
    """

    name: str
    sniff: Callable[[Path, list[str]], bool]
    read: Callable[[Path], Iterator[Entry | LineNote]]
    unit: str = "line"
    images: Callable[[Path], Path | None] = lambda path: None
    folders: bool = False


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a UTF-8 text file, one at a time. Raises ClipmatchError for UTF-16, OSError if it can't be read."""
    with open_raw(path) as file:
        refuse_wide(path, file.read(4))
        file.seek(0)
        yield from lines_of(file)


def refuse_wide(path: Path, head: bytes) -> None:
    """Raise ClipmatchError for a file whose first bytes are those of a wide text."""
    if is_wide(head):
        raise ClipmatchError(f"{path} is in UTF-16 or UTF-32, or no text at all; save it as UTF-8.")


def is_wide(head: bytes) -> bool:
    """Whether these are the first bytes of a text of two or four bytes a character, as some spreadsheets write it."""
    return head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) or head[:4].count(0) > 1


def split_lines(raw: bytes) -> list[Line]:
    """Bytes -> lines, as `lines_of` has them."""
    return list(lines_of(io.BytesIO(raw)))


def lines_of(file: IO[bytes]) -> Iterator[Line]:
    """A file -> its lines, with or without byte order mark, ended by LF or CRLF; bad bytes become U+FFFD.

    What a line has beyond `MAX_LINE` is passed over.
    """
    # not str.splitlines, which would also cut a caption at U+2028 and the like
    number, part = 0, file.readline(MAX_LINE)
    part = part.removeprefix(b"\xef\xbb\xbf")
    while part:
        number += 1
        repair = "" if part.endswith(b"\n") or not skip_line(file) else f"cut off after {MAX_LINE:,} bytes"
        part = part.removesuffix(b"\n").removesuffix(b"\r")
        try:
            yield Line(number, part.decode("utf-8"), repair)
        except UnicodeDecodeError:
            repair = both(repair, "replaced bytes that are not UTF-8")
            yield Line(number, part.decode("utf-8", "replace"), repair)
        part = file.readline(MAX_LINE)


def skip_line(file: IO[bytes]) -> bool:
    """Go to the next line -> whether there was more of this one than its end."""
    more, part = False, file.readline(MAX_LINE)
    while part:
        more |= part not in (b"\n", b"\r\n")
        if part.endswith(b"\n"):
            break
        part = file.readline(MAX_LINE)
    return more


def both(first: str, second: str) -> str:
    """Two repairs of one line; the first may be none."""
    return f"{first}; {second}" if first else second


def body(path: Path, is_header: Callable[[str], bool]) -> Iterator[Line]:
    """The lines that are not blank, without the header where there is one."""
    lines = (line for line in read_lines(path) if line.text.strip())
    for place, line in enumerate(lines):
        if place or not is_header(line.text):
            yield line


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
    """Kaggle's Flickr30k: `results.csv` with `image_name| comment_number| comment`, or `captions.txt` with commas.

    Captions hold bare delimiters and quotes. One row of the real file lacks its second delimiter (`2199200615.jpg| 4
    A dog runs ...`, in some copies with it at the end instead); that is repaired.
    """
    delimiter = "|"
    for line in read_lines(path):
        if header := flickr30k_delimiter(line.text):
            delimiter = header
            continue
        name, _, rest = line.text.partition(delimiter)
        bar = re.escape(delimiter)
        if broken := re.fullmatch(rf"\s*\d+\s+([^\s{bar}].*)", rest, re.DOTALL):
            caption = broken[1].rstrip().removesuffix(delimiter).rstrip()
            yield Entry(line.number, name, caption, both(line.repair, f"put in the missing second {NAMES[delimiter]}"))
        elif whole := re.fullmatch(rf"\s*\d+\s*{bar}(.*)", rest, re.DOTALL):
            yield Entry(line.number, name, unquote(whole[1].strip()) if delimiter == "," else whole[1], line.repair)
        elif line.text.strip():
            yield LineNote(line.number, f"not of the form image_name{delimiter} comment_number{delimiter} comment")


NAMES = {"|": "bar", ",": "comma"}


def flickr30k_delimiter(text: str) -> str | None:
    """The delimiter of the header of `results.csv`; None if the line is another."""
    columns = ["image_name", "comment_number", "comment"]
    return next((mark for mark in NAMES if [part.strip() for part in text.split(mark)] == columns), None)


@dataclass(frozen=True)
class Columns:
    """Where a table has what: places of the image, the captions and the split (None: no such column)."""

    image: int
    captions: tuple[int, ...]
    split: int | None
    width: int


def read_table(path: Path) -> Iterator[Entry | LineNote]:
    """Any CSV or TSV with a header that names an image column and one or more caption columns.

    Surplus fields are commas that nobody quoted: they go back into the caption where that is the last column. A field
    may hold a list of captions, as JSON or Python writes it.
    """
    lines = read_lines(path)
    table = table_columns(next((line.text for line in lines if line.text.strip()), ""))
    if table is None:
        raise ClipmatchError(
            f"{path} is not a table with an image and a caption column: its header needs one of "
            f"{', '.join(IMAGE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}."
        )
    delimiter, columns = table
    width = columns.width
    for line, fields in csv_records(lines, delimiter):
        repair = line.repair
        if len(fields) > width and columns.captions == (width - 1,):
            fields = line.text.split(delimiter, width - 1)
            repair = both(repair, "took the rest of the line as the caption")
        if len(fields) != width:
            yield LineNote(line.number, f"{len(fields)} fields where the header has {width}")
            continue
        split = fields[columns.split].strip() if columns.split is not None else ""
        for caption in captions_of([listed(fields[at]) for at in columns.captions]) or [""]:
            yield Entry(line.number, fields[columns.image], caption, repair, split)


def table_columns(header: str) -> tuple[str, Columns] | None:
    """Header line -> its delimiter, and where it has what."""
    for delimiter in "\t,;|":
        names = [unquote(name.strip()).strip() for name in header.split(delimiter)]
        if columns := find_columns(names):
            return delimiter, columns
    return None


def find_columns(names: Sequence[str]) -> Columns | None:
    """The columns of that name in any case, the usual names first; None without an image or a caption column."""
    lower = [name.lower() for name in names]
    image = next((lower.index(name) for name in IMAGE_COLUMNS if name in lower), None)
    captions = caption_columns(lower)
    if image is None or not captions:
        return None
    return Columns(image, captions, lower.index(SPLIT_COLUMN) if SPLIT_COLUMN in lower else None, len(names))


def caption_columns(lower: Sequence[str]) -> tuple[int, ...]:
    """Where captions are, by names in small letters: the first of the usual names, else all that are numbered."""
    captions = tuple(lower.index(name) for name in CAPTION_COLUMNS if name in lower)[:1]
    return captions or tuple(at for at, name in enumerate(lower) if NUMBERED.fullmatch(name))


def captions_of(value: Any, depth: int = 0) -> list[str]:
    """The captions in a field: a string, or any nesting of lists of strings or of objects with a caption's key."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if depth > MAX_DEPTH:
        return []
    if isinstance(value, dict):
        found = (captions_of(value[key], depth + 1) for key in ("raw", *CAPTION_COLUMNS) if key in value)
        return next((captions for captions in found if captions), [])
    if isinstance(value, list | tuple):
        return [caption for inner in value for caption in captions_of(inner, depth + 1)]
    return []


def listed(field: str) -> Any:
    """A field that holds a list, `["A dog .", "A wet dog ."]` in JSON or Python -> that list; else the field."""
    if not field.lstrip().startswith("["):
        return field
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a backslash that Python would not have written
                value = parse(field.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return value
    return field


def csv_records(lines: Iterable[Line], delimiter: str) -> Iterator[tuple[Line, list[str]]]:
    """Lines -> CSV records, each with its (first) line.

    Where the quotes make no sense as CSV, that one line is taken literally: read on by the csv module, a single stray
    quote would swallow the lines after it.
    """
    left = iter(lines)
    ahead = deque(islice(left, MAX_RECORD_LINES))
    while ahead:
        line, used = ahead[0], 1
        reader = csv.reader((near.text + "\n" for near in ahead), delimiter=delimiter, strict=True)
        try:
            fields = next(reader)
            used = reader.line_num
            repair = next((part.repair for part in islice(ahead, used) if part.repair), "")
        except csv.Error:
            fields = line.text.split(delimiter)
            repair = both(line.repair, "took its quotes literally")
        if line.text.strip():
            yield Line(line.number, line.text, repair), fields
        for _ in range(used):
            ahead.popleft()
        ahead.extend(islice(left, used))


# The first that recognises a file reads it: the special cases come before the general one.
LINE_READERS = (
    Reader("flickr8k-csv", lambda path, head: path.suffix != ".csv" and is_flickr8k_header(head[0]), read_flickr8k_csv),
    Reader("flickr8k-token", lambda path, head: TOKEN_LINE.fullmatch(head[0]) is not None, read_flickr8k_token),
    Reader("flickr30k-csv", lambda path, head: flickr30k_delimiter(head[0]) is not None, read_flickr30k_csv),
    Reader("table", lambda path, head: table_columns(head[0]) is not None, read_table),
)
