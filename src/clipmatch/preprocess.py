"""Pictures -> tensors: the only place where that happens, for training and for search alike.

In: image files, PIL images, arrays, a `PreprocessConfig`. Out: RGB images, float32 pixel values. Knows nothing of
models or data sets.
Shapes: b images, s the side of the square in pixels, h and w the sides of a picture.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, update_wrapper
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from clipmatch.archive import open_file
from clipmatch.config import PreprocessConfig
from clipmatch.errors import ClipmatchError
from clipmatch.imageformats import RAW_SUFFIXES, is_heif, open_heif, open_raw
from clipmatch.metadata import Words, orientation_of, read_metadata
from clipmatch.patience import Turn, patiently
from clipmatch.photo import Metadata
from clipmatch.tokenizer import as_tensor

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 200_000_000  # 800 MB as Pillow keeps them; more is a mistake or an attack
MAX_SIDE = 300_000  # pixels: to make a longer one small takes gigabytes, though the picture may be a line
MAX_SCANS = 100  # of a progressive JPEG file, which has about ten; each takes time for all pixels, and but a few bytes
SCAN = re.compile(rb"\xff\xda\0(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")  # its length fits how many parts it is of
BLOCK = 1 << 20  # bytes looked at once
LARGE = 32_000_000  # pixels; of larger pictures a process decodes one at a time
BAND = 4_000_000  # pixels converted at once
large_turn = Turn()

Picture: TypeAlias = "Image.Image | npt.NDArray[np.uint8]"
Settings = ParamSpec("Settings")
Made = TypeVar("Made")

RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ClipmatchError):
    """An image file that cannot be used: its path and a short reason."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # both, so that it survives the way back from a worker process
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"Cannot read the image {self.path}: {self.reason}."


# Image files --------------------------------------------------------------------------------------------------------


def in_time(
    read: Callable[Concatenate[str | Path, Settings], Made],
) -> Callable[Concatenate[str | Path, Settings], Made]:
    """The same for a file that may hang, or its decoder: after `patience.LIMIT` seconds it is an `ImageError`."""

    def read_in_time(path: str | Path, /, *given: Settings.args, **named: Settings.kwargs) -> Made:
        try:
            return patiently(partial(read, path, *given, **named))
        except TimeoutError as error:
            raise ImageError(Path(path), plain_reason(error)) from error

    update_wrapper(read_in_time, read)
    return read_in_time


@in_time
def load_image(
    path: str | Path, min_size: int | None = None, data: bytes | None = None, most: int | None = None
) -> Image.Image:
    """Image file -> RGB image, upright, transparency on white, first frame of an animation. data: its bytes, if they
    are at hand. most: pixels that may be decoded, if that is less than `MAX_PIXELS`.

    With `min_size` a JPEG may be decoded at a half, a quarter or an eighth of its size, which is several times faster,
    and what has more than `LARGE` pixels is reduced, which takes less memory; neither side then falls below `min_size`.
    Of a RAW file it is the embedded preview. Whatever is wrong with the file, the one exception is `ImageError`.
    """
    with opened(Path(path), data) as image:
        return decoded(image, min_size, most)


@in_time
def open_photo(
    path: str | Path, min_size: int | None = None, beside: Words | None = None
) -> tuple[Image.Image, Metadata]:
    """`load_image` and `read_header` of a file that is opened once. Raises ImageError."""
    with opened(Path(path)) as image:
        if image.format == "PNG":  # whose EXIF data may come last: a look at them first would hide damaged pixels
            return decoded(image, min_size), read_metadata(Path(path), image, beside)
        metadata = read_metadata(Path(path), image, beside)  # first: a reduced picture has lost its size
        return decoded(image, min_size), metadata


@in_time
def read_header(path: str | Path, beside: Words | None = None) -> Metadata:
    """What an image file says about its picture, which is decoded only if need be (PNG). Raises ImageError.

    beside: the words outside the file (`metadata.words_beside`); None: side-cars are looked for, which takes time.
    """
    with opened(Path(path)) as image:
        return read_metadata(Path(path), image, beside)


def decoded(image: Image.Image, min_size: int | None, most: int | None = None) -> Image.Image:
    """An opened image -> RGB, as `load_image` describes."""
    if min_size:
        image.draft(None, (min_size, min_size))  # mode None: a CMYK file drafted to RGB comes out wrong
    if most and image.width * image.height > most:
        raise ValueError(too_many(image, most))
    if image.width * image.height <= LARGE:
        return to_rgb(image)
    with large_turn:
        return to_rgb(image, max(1, min(image.size) // (2 * min_size)) if min_size else 1)


@contextmanager
def opened(path: Path, data: bytes | None = None) -> Iterator[Image.Image]:
    """An image file of which the header has been read. Whatever goes wrong with it inside, it is an `ImageError`."""
    try:
        with open_file(path) if data is None else io.BytesIO(data) as file:
            if not file.seek(0, io.SEEK_END):
                raise ImageError(path, "the file is empty")
            file.seek(0)
            yield open_image(path, file)
    except ImageError:
        raise
    except Exception as error:  # decoders raise about a dozen unrelated kinds on damaged files
        raise ImageError(path, plain_reason(error)) from error


def open_image(path: Path, file: IO[bytes]) -> Image.Image:
    """Read the header of an image file, and hold it to `MAX_PIXELS`, `MAX_SIDE` and `MAX_SCANS`.

    RAW files are told by their names: Pillow would take most of them for the TIFF file of their thumbnail.
    """
    image = open_raw(file) if path.suffix.lower() in RAW_SUFFIXES else open_by_content(path, file)
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(path, too_many(image, MAX_PIXELS))
    if max(image.size) > MAX_SIDE:
        size = f"{image.width} x {image.height} pixels"
        raise ImageError(path, f"of {size} one side is longer than the limit of {MAX_SIDE:,}")
    if image.info.get("progressive") and (scans := count_scans(file)) > MAX_SCANS:
        raise ImageError(path, f"its {scans:,} scans are more than the limit of {MAX_SCANS}")
    return image


def too_many(image: Image.Image, most: int) -> str:
    """The reason for not decoding a picture of more pixels than that."""
    return f"{image.width} x {image.height} pixels are more than the limit of {most // 1_000_000} million"


def count_scans(file: IO[bytes]) -> int:
    """How many scans a JPEG file has. Its file may be read on from where it was."""
    place, count, end = file.tell(), 0, b""
    file.seek(0)
    while block := file.read(BLOCK):
        count += len(SCAN.findall(end + block))
        end = block[-4:]  # one byte less than a mark has
    file.seek(place)
    return count


def open_by_content(path: Path, file: IO[bytes]) -> Image.Image:
    """As `Image.open`, for HEIC too.

    `Image.open` has a limit of its own, with a warning at half of it. Neither can be turned off for this call alone:
    both the limit and Python's warning filters belong to the whole process with all its threads.
    """
    Image.preinit()  # first, so that the common formats are tried first
    Image.init()
    prefix, reason = file.read(16), "it is not an image in a known format"
    for name in tuple(Image.ID):
        if name == "EPS":  # a program, which Pillow would run in Ghostscript
            continue
        factory, accept = Image.OPEN[name]
        accepted: bool | str = False
        try:
            accepted = accept is None or accept(prefix)
            if not accepted or isinstance(accepted, str):  # a string: known, but this Pillow was built without it
                reason = accepted or reason
                continue
            file.seek(0)
            image = factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:  # "not mine after all"
            if accepted and accept is not None:
                reason = f"it is a damaged or unsupported {name} file ({plain_reason(error)})"
            continue
        return image
    if is_heif(prefix):  # after Pillow's: AVIF files can begin in the same way
        return open_heif(file)
    raise ImageError(path, reason)


def plain_reason(error: Exception) -> str:
    """An exception of a decoder or of the operating system, in a few words."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    text = str(error).strip().rstrip(".")
    return text.splitlines()[0] if text else type(error).__name__


# Pictures -----------------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image, factor: int = 1) -> Image.Image:
    """Image of any mode -> RGB, upright by its EXIF orientation, transparency on white.

    factor: how many pixels across and down become one, their mean.
    """
    image.load()  # before the look at the orientation: a TIFF file is turned by its decoder
    orientation = orientation_of(image)
    if factor > 1 or image.mode != "RGB" or image.has_transparency_data:
        image = converted(image, factor)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
        image.info = {}  # the copied EXIF data would turn it a second time
    return image


def converted(image: Image.Image, factor: int) -> Image.Image:
    """Image of any mode -> RGB, as it lies. In bands of some rows: on the way a pixel may take 20 bytes and more."""
    white = white_of(image)
    result = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for band in bands(image, factor):
        rgb = opaque(image if band == (0, 0, *image.size) else image.crop(band), white)
        result.paste(rgb.reduce(factor) if factor > 1 else rgb, (0, band[1] // factor))
    return result


def bands(image: Image.Image, factor: int = 1) -> Iterator[tuple[int, int, int, int]]:
    """The boxes of rows that make up an image, of at most `BAND` pixels; their heights are multiples of `factor`."""
    height = max(1, BAND // image.width // factor) * factor
    for top in range(0, image.height, height):
        yield 0, top, image.width, min(top + height, image.height)


def opaque(image: Image.Image, white: float) -> Image.Image:
    """Image of any mode -> RGB, transparency on white. white: the value of white in deep greys."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(eight_bits(np.asarray(image), white)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # has no direct way to RGBA
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def white_of(image: Image.Image) -> float:
    """The value of white in deep greys; that of 16 bits, but in floating point (mode F) none is agreed on.

    There it is 1, 255 or 65535, whichever is the least that the values keep to.
    """
    if image.mode != "F":
        return 65535.0
    most = max(float(np.nan_to_num(np.asarray(image.crop(band)), nan=0.0).max()) for band in bands(image))
    return next((top for top in (1.0, 255.0, 65535.0) if most <= top), most)


def eight_bits(values: npt.NDArray[Any], white: float) -> npt.NDArray[np.uint8]:
    """Grey values of 16 bits or floating point [h, w] -> uint8 [h, w], scaled and not cut off."""
    grey = np.nan_to_num(values.astype(np.float32), nan=0.0)
    bright: npt.NDArray[np.float32] = np.clip(grey / white, 0, 1)
    return np.rint(bright * 255).astype(np.uint8)


class Transform:
    """Picture -> pixel values of a square of `config.size`, as a Hugging Face image processor would return them."""

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config
        self.scale = (1 / (255 * np.array(config.std))).astype(np.float32)  # [3]
        self.shift = (-np.array(config.mean) / np.array(config.std)).astype(np.float32)  # [3]

    def __call__(self, images: Picture | Sequence[Picture], return_tensors: str | None = None) -> dict[str, Any]:
        """One picture or several -> {"pixel_values": float32}.

        Without `return_tensors` a list of arrays [3, s, s], with "np" or "pt" an array or tensor [b, 3, s, s].
        A picture is a PIL image of any mode or a uint8 array [h, w, 3] (or [h, w], or [h, w, 4]).
        """
        single = isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
        pictures: Sequence[Any] = [images] if single else images  # type: ignore[list-item,assignment]
        side = self.config.size
        square = np.array([self.pixels(picture) for picture in pictures], dtype=np.uint8)
        values = self.normalise(square.reshape(-1, side, side, 3))  # [b, s, s, 3] -> [b, 3, s, s]
        return {"pixel_values": list(values) if return_tensors is None else as_tensor(values, return_tensors)}

    def pixels(self, image: Picture) -> npt.NDArray[np.uint8]:
        """Picture -> uint8 [s, s, 3]: made square and resized, not normalised."""
        picture = to_rgb(as_picture(image))
        side, (width, height) = self.config.size, picture.size
        box = (0.0, 0.0, float(width), float(height))
        if self.config.fit == "crop":
            # The centre is cut out before it is resized: the other way round, a picture of 1 x 10000 pixels would
            # need gigabytes on the way.
            short = min(width, height)
            left, top = (width - short) / 2, (height - short) / 2
            box = (left, top, left + short, top + short)
        picture = picture.resize((side, side), RESAMPLE[self.config.resample], box)
        return np.asarray(picture, dtype=np.uint8)  # [s, s, 3]

    def normalise(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 [..., s, s, 3] -> float32 [..., 3, s, s] with (value / 255 - mean) / std."""
        values = pixels.astype(np.float32) * self.scale + self.shift  # [..., s, s, 3]
        return np.ascontiguousarray(np.moveaxis(values, -1, -3), dtype=np.float32)  # [..., 3, s, s]

    def normalise_tensor(self, pixels: torch.Tensor) -> torch.Tensor:
        """The same of a tensor, to the last bit, on the device where it lies."""
        import torch

        values = pixels.movedim(-1, -3).contiguous().float()  # [..., 3, s, s]
        scale, shift = (
            torch.from_numpy(factor).to(values.device)[:, None, None] for factor in (self.scale, self.shift)
        )
        return values.mul_(scale).add_(shift)

    def augment(
        self,
        image: Picture,
        rng: np.random.Generator,
        scale: tuple[float, float] = (0.6, 1.0),
        flip: bool = True,
    ) -> Image.Image:
        """Picture -> another view of it for training, RGB, s x s.

        A random part (a fraction of the area within `scale`, aspect ratio 3/4 to 4/3) is resized to the square,
        mirrored half of the time, and its brightness, contrast and colour are changed by up to a fifth. Mirroring
        makes captions with "left of" wrong: `flip=False` for data that has them.
        """
        picture = to_rgb(as_picture(image))
        side = self.config.size
        box = random_box(picture.size, rng, scale)
        picture = picture.resize((side, side), RESAMPLE[self.config.resample], box)
        if flip and rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            picture = enhance(picture).enhance(rng.uniform(0.8, 1.2))
        return picture


def as_picture(image: Picture) -> Image.Image:
    """PIL image as it is; uint8 array [h, w, 3], [h, w, 4], [h, w, 1] or [h, w] -> PIL image."""
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise ClipmatchError(
            f"An image array must be uint8 with height, width and channels in that order "
            f"(got {array.dtype} {list(array.shape)})."
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def random_box(
    size: tuple[int, int], rng: np.random.Generator, scale: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a random part of a picture; after ten parts that do not fit, the whole picture.

    The sampling is that of Inception (Szegedy et al. 2014, "Going deeper with convolutions").
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, min(left + w, width), min(top + h, height)
    return 0.0, 0.0, float(width), float(height)
