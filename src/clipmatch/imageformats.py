"""Which files are pictures, and how those are opened that Pillow alone can't: HEIC and the RAW files of cameras.

In: the name of a file, or an open file. Out: a Pillow image whose pixels are not decoded yet, or the reason why there
can't be one. Knows nothing of captions, models or folders. A library is imported by the first file that needs it: a
query opens none.
"""

from __future__ import annotations

import importlib
import io
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
RAW_SUFFIXES = frozenset((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw"))
PILLOW_SUFFIXES = frozenset((".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
SUFFIXES = PILLOW_SUFFIXES | HEIF_SUFFIXES | RAW_SUFFIXES

HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"))
NEEDED = '{} pictures need {}, which is not installed: pip install "clipmatch[photos]"'
NEEDED_HEIF = NEEDED.format("HEIC", "pillow-heif")
NEEDED_RAW = NEEDED.format("RAW", "rawpy")
NEEDED_AVIF = "AVIF pictures need a Pillow that was built with AVIF: pip install --upgrade --force-reinstall pillow"
LACKING = frozenset((NEEDED_HEIF, NEEDED_RAW, NEEDED_AVIF))

ORIENTATION_TAG = 0x0112  # of EXIF
ORIENTATION = {0: 1, 3: 3, 5: 8, 6: 6}  # how LibRaw says which way up -> how EXIF does
RAW_SIZE = "raw_size"  # in `info` of an opened RAW file: width and height of the photograph, upright


def is_image_name(name: str) -> bool:
    """Whether a file name looks like a visible picture."""
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def missing_library(path: Path) -> str | None:
    """The reason why no file with this suffix can be opened here, always in the same words; None if it can."""
    suffix = path.suffix.lower()
    if suffix in HEIF_SUFFIXES and library("pillow_heif") is None:
        return NEEDED_HEIF
    if suffix in RAW_SUFFIXES and library("rawpy") is None:
        return NEEDED_RAW
    if suffix == ".avif":
        from PIL import features

        return None if features.check("avif") else NEEDED_AVIF
    return None


@cache
def library(name: str) -> ModuleType | None:
    """A library of the extra `photos`; None if it is not installed, or not for this system."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def is_heif(prefix: bytes) -> bool:
    """Whether the first 12 bytes are those of a HEIC or HEIF file (or of an AVIF file in its general container)."""
    return prefix[4:8] == b"ftyp" and prefix[8:12] in HEIF_BRANDS


def open_heif(file: IO[bytes]) -> Image.Image:
    """The main picture of a HEIC file, which is upright already. Raises ImportError with the reason.

    The class is called rather than registered: registering would change what Pillow opens in the whole process.
    """
    pillow_heif = library("pillow_heif")
    if pillow_heif is None:
        raise ImportError(NEEDED_HEIF)
    file.seek(0)
    image: Image.Image = pillow_heif.HeifImageFile(file, "")
    return image


def open_raw(file: IO[bytes]) -> Image.Image:
    """The largest preview in a RAW file, with the file's own EXIF data; without a preview, what the sensor saw.

    Raises ImportError or OSError with the reason.
    """
    rawpy = library("rawpy")
    if rawpy is None:
        raise ImportError(NEEDED_RAW)
    try:
        with rawpy.imread(file) as raw:
            sizes, image = raw.sizes, preview_of(rawpy, raw)  # in this order: developing at half size halves them
    except rawpy.LibRawError as error:
        said = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise OSError(f"it is a damaged or unsupported RAW file ({said})") from error
    on_its_side = sizes.flip in (5, 6)
    image.info[RAW_SIZE] = (sizes.height, sizes.width) if on_its_side else (sizes.width, sizes.height)
    take_exif(image, file)
    return image


def preview_of(rawpy: Any, raw: Any) -> Image.Image:
    """The preview, or the developed picture, whose EXIF orientation tells which way up it is."""
    from PIL import Image
    from PIL.JpegImagePlugin import JpegImageFile

    try:
        data = raw.extract_thumb().data  # the bytes of a JPEG file, or an array [h, w, 3]
    except (rawpy.LibRawNoThumbnailError, rawpy.LibRawUnsupportedThumbnailError):
        return Image.fromarray(raw.postprocess(use_camera_wb=True, half_size=True))  # upright
    image = JpegImageFile(io.BytesIO(data), "") if isinstance(data, bytes) else Image.fromarray(data)
    image.getexif().setdefault(ORIENTATION_TAG, ORIENTATION.get(raw.sizes.flip, 1))
    return image


def take_exif(image: Image.Image, file: IO[bytes]) -> None:
    """Give a preview, which often has but a part of them, the EXIF data of its file, if that is like a TIFF file.

    It keeps its orientation, since only some previews lie as the sensor did.
    """
    exif = image.getexif()
    orientation = exif.get(ORIENTATION_TAG, 1)
    try:
        file.seek(0)
        exif.load_from_fp(file)
    except Exception:  # not like a TIFF file, or damaged: what the preview has will do
        exif.load(image.info.get("exif", b""))
    exif[ORIENTATION_TAG] = orientation
