"""What a photograph's file says about it: size, time, place, camera and caption.

In: a path and its opened image, which need not be decoded. Out: `Metadata`. Files in archives and on object storage are
read as those on disk. Knows nothing of models or stores.

Nothing here raises: cameras, phones and programs write all kinds of nonsense, and a field that can't be made sense of
is None. The parsers are imported where a photograph needs them: a query does not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from clipmatch.archive import read_small
from clipmatch.formats import captions_of
from clipmatch.imageformats import ORIENTATION_TAG, RAW_SIZE
from clipmatch.photo import Metadata
from clipmatch.remote import is_remote
from clipmatch.sidecars import sidecar_names

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element  # nosec B405

    from PIL import Image

T = TypeVar("T")
Words: TypeAlias = "tuple[str | None, list[str]]"  # a caption and keywords

MAX_TEXT_FILE = 1 << 16  # bytes; longer ones are no captions
MAX_XMP = 1 << 22  # bytes; editors put their masks and history into it
MAX_CAPTION = 10_000  # characters

FIRST_YEAR = 1826  # of the oldest photograph; a year 1 is a program's zero
DATE = re.compile(r"(\d{4})[:/.-](\d\d?)[:/.-](\d\d?)(?:[ T]+(\d\d?):(\d\d?)(?::(\d\d?))?)?")

# EXIF's numbers; Pillow has names for them, but every query would wait for Pillow
DESCRIPTION, MAKE, MODEL = 0x010E, 0x010F, 0x0110
DATE_TAGS = (0x9003, 0x9004, 0x0132)  # taken, digitised, changed
EXIF_PART, GPS_PART = 0x8769, 0x8825
LATITUDE_LETTER, LATITUDE, LONGITUDE_LETTER, LONGITUDE = 1, 2, 3, 4

XMP_TAG = 0x02BC  # where TIFF-like files keep it
DC = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
IPTC_CAPTION, IPTC_KEYWORDS = (2, 120), (2, 25)

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufeff]+")
CAMERA_DEFAULT = re.compile(  # what cameras and programs write in place of a description
    r"((olympus|(konica )?minolta|kodak|pentax|samsung|sanyo|casio|polaroid|vivitar) )?digital (still )?camera"
    r"|sony ?dsc|dcim\\.*|exif_jpeg_.*|<digimax.*|default|my beautiful picture|image ?description|created with gimp",
    re.IGNORECASE,
)


def read_metadata(path: Path, image: Image.Image, beside: Words | None = None) -> Metadata:
    """What the file says, and what is said of it; `image` is opened and not decoded at a reduced size. Never raises.

    beside: the words outside the file (`words_beside`); None: side-cars are looked for here.
    """
    exif = attempt(image.getexif) or no_exif()
    latitude, longitude = attempt(lambda: position_of(exif)) or (None, None)
    camera = attempt(lambda: camera_of(exif))
    words = (attempt(lambda: words_beside(path)) or (None, [])) if beside is None else beside
    caption = attempt(lambda: caption_of(image, exif, words))
    return Metadata(*upright_size(image), attempt(lambda: taken_of(exif)), latitude, longitude, camera, caption)


def no_exif() -> Image.Exif:
    """EXIF data without any."""
    from PIL.Image import Exif

    return Exif()


def attempt(read: Callable[[], T]) -> T | None:
    """What `read` returns, or None: damaged metadata make Pillow raise about a dozen unrelated kinds."""
    try:
        return read()
    except Exception:
        return None


# Size, time, place, camera


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height once the picture is upright; of a RAW file those of the photograph, not of its preview."""
    size = image.info.get(RAW_SIZE)
    if isinstance(size, tuple):  # a text of that name in a PNG file is a string
        return size
    width, height = image.size
    if orientation_of(image) < 5 or image.format == "TIFF":  # of a TIFF file Pillow has turned it already
        return width, height
    return height, width


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) if there is none or its data are damaged: the picture itself may be sound."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:
        return 1


def taken_of(exif: Image.Exif) -> datetime | None:
    """When the photograph was taken, else digitised, else changed. RAW files may keep the first in the main part."""
    inner = attempt(lambda: exif.get_ifd(EXIF_PART)) or {}
    found = (as_moment(part.get(tag)) for tag in DATE_TAGS for part in (inner, exif))
    return next((moment for moment in found if moment), None)


def as_moment(value: Any) -> datetime | None:
    """The text "2021:06:05 14:03:02", or one nearly like it, -> datetime; without a time of day, midnight."""
    parts = DATE.match(as_text(value) or "")
    if parts is None:
        return None
    year, month, day, hour, minute, second = (int(part or 0) for part in parts.groups())
    return attempt(lambda: datetime(year, month, day, hour, minute, second)) if year >= FIRST_YEAR else None


def position_of(exif: Image.Exif) -> tuple[float, float] | None:
    """Latitude and longitude in degrees. Exactly 0, 0 is what a receiver without a fix writes."""
    gps = exif.get_ifd(GPS_PART)
    latitude = as_degrees(gps.get(LATITUDE), gps.get(LATITUDE_LETTER), "NS", 90)
    longitude = as_degrees(gps.get(LONGITUDE), gps.get(LONGITUDE_LETTER), "EW", 180)
    if latitude is None or longitude is None or latitude == longitude == 0:
        return None
    return latitude, longitude


def as_degrees(value: Any, reference: Any, letters: str, limit: int) -> float | None:
    """Degrees, minutes and seconds, and the letter of a hemisphere (the second of `letters` is negative)."""
    degrees, minutes, seconds = (float(part) for part in value)  # 0/0 is NaN
    total = degrees + minutes / 60 + seconds / 3600
    letter = (as_text(reference) or "?")[0].upper()
    if letter not in letters or min(degrees, minutes, seconds) < 0 or not total <= limit:
        return None
    return math.copysign(total, -1 if letter == letters[1] else 1)


def camera_of(exif: Image.Exif) -> str | None:
    """Make and model; the model alone if it names the make ("NIKON CORPORATION" and "NIKON D90")."""
    make, model = as_text(exif.get(MAKE)), as_text(exif.get(MODEL))
    if not make or not model:
        return make or model
    own, maker = model.casefold(), make.casefold()
    return model if own.startswith(maker) or own.split()[0] in maker.split() else f"{make} {model}"


# Caption


def caption_of(image: Image.Image, exif: Image.Exif, beside: Words) -> str | None:
    """The words that people gave to a photograph, in one line, keywords in brackets: "Grandma's birthday [cake, Rome]".

    The caption is the first of: that beside the file, the description or title that is embedded as XMP, the IPTC
    caption, the EXIF description. What cameras write there by themselves is passed over. Keywords count, because
    tagging is how most people caption; they are those of the first XMP or IPTC part that has any.
    """
    caption, keywords = beside
    sources: tuple[Callable[[], Words], ...] = (
        lambda: xmp_words(image.info.get("xmp") or exif.get(XMP_TAG)),
        lambda: iptc_words(image),
        lambda: (own_words([exif.get(DESCRIPTION)]), []),
    )
    for source in sources:
        words, tags = attempt(source) or (None, [])
        caption, keywords = caption or words, keywords or tags
    brackets = ", ".join(dict.fromkeys(keywords))  # each once, in order
    if caption and brackets:
        return f"{caption} [{brackets}]"[:MAX_CAPTION]
    return (caption or brackets)[:MAX_CAPTION] or None


def xmp_words(data: bytes | str | None) -> Words:
    """An XMP packet -> its description or title, and its keywords."""
    if not data or len(data) > MAX_XMP:
        return None, []
    from defusedxml.ElementTree import fromstring  # its bombs are errors

    root = fromstring(data.strip(b" \n\r\t\0") if isinstance(data, bytes) else data)
    caption = own_words(dublin_core(root, "description")) or own_words(dublin_core(root, "title"))
    return caption, texts(dublin_core(root, "subject"))


def dublin_core(root: Element, name: str) -> Iterator[str | None]:
    """The texts of a property, which is an attribute, plain text, or a list of one text for each language or word."""
    for description in root.iter(f"{RDF}Description"):
        yield description.get(DC + name)
        for node in description.iterfind(DC + name):
            yield node.text
            yield from (item.text for item in node.iter(f"{RDF}li"))


def iptc_words(image: Image.Image) -> Words:
    """The IPTC caption and keywords of a JPEG or TIFF file."""
    from PIL.ImageFile import ImageFile
    from PIL.IptcImagePlugin import getiptcinfo

    if not isinstance(image, ImageFile):
        return None, []
    block: dict[tuple[int, int], Any] = getiptcinfo(image) or {}
    return own_words(as_list(block.get(IPTC_CAPTION))), texts(as_list(block.get(IPTC_KEYWORDS)))


def as_list(value: Any) -> list[Any]:
    """A record that is repeated comes as a list, one that isn't by itself."""
    return value if isinstance(value, list) else [value]


def own_words(values: Iterable[Any]) -> str | None:
    """The first text that a person may have written."""
    return next((text for text in texts(values) if not CAMERA_DEFAULT.fullmatch(text)), None)


def texts(values: Iterable[Any]) -> list[str]:
    """Those values that are text and not empty."""
    return [text for text in map(as_text, values) if text]


def as_text(value: Any) -> str | None:
    """A text or the bytes of one -> one line without control characters; None for what is empty or no text."""
    if isinstance(value, str):
        value = attempt(lambda: value.encode("latin-1").decode()) or value  # Pillow takes UTF-8 in EXIF for Latin-1
    if isinstance(value, bytes):
        value = decode(value)
    return " ".join(CONTROL.sub(" ", value).split()) or None if isinstance(value, str) else None


def decode(data: bytes) -> str:
    """UTF-8, UTF-16 with its mark, or else Latin-1, where every byte is a character."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    return attempt(lambda: data.decode("utf-8-sig")) or data.decode("latin-1")


# Side-cars


def words_beside(path: Path | None, told: str | None = None) -> Words:
    """The caption and keywords outside a photograph's file.

    The caption is the first of: the text file or JSON file of the same name (photo.txt, photo.json, as beside training
    pictures), the description or title in an XMP side-car (photo.jpg.xmp or photo.xmp), and `told`, that of a table.
    path: None where nothing lies beside it. Raises OSError if object storage doesn't give a side-car now.
    """
    caption: str | None = None
    keywords: list[str] = []
    if path is not None:
        text, record, *packets = (path.with_name(name) for name in sidecar_names(path.name))
        caption = unless_absent(text_file, text) or unless_absent(json_file, record)
        for packet in packets:
            words, tags = unless_absent(xmp_file, packet) or (None, [])
            caption, keywords = caption or words, keywords or tags
    return caption or as_text(told), keywords


def unless_absent(read: Callable[[Path], T], path: Path) -> T | None:
    """What `read` makes of a side-car; None if there is none, or it can't be made sense of.

    Raises OSError if object storage doesn't give it now; what can't be read on a disk stays so.
    """
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        if is_remote(path):
            raise
    except Exception:  # damaged in whatever way
        return None
    return None


def xmp_file(path: Path) -> Words:
    """Of an XMP side-car. Raises OSError if there is none."""
    return xmp_words(read_small(path, MAX_XMP))


def text_file(path: Path) -> str | None:
    """The text of a small text file; None if it is empty or none. Raises OSError if there is none."""
    data = read_small(path, MAX_TEXT_FILE)
    text = decode(data) if data else ""
    return None if "\0" in text else as_text(text)  # a NUL: it is no text


def json_file(path: Path) -> str | None:
    """The captions in a small JSON file. Raises OSError if there is none, ValueError for no JSON."""
    record = json.loads(read_small(path, MAX_TEXT_FILE) or b"null")
    return as_text(" ".join(captions_of(record))) if isinstance(record, dict) else None
