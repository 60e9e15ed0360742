"""Real image files of every awkward kind, and tokens against the reference implementation."""

import contextlib
import io
import itertools
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from clipmatch.config import PreprocessConfig
from clipmatch.errors import ClipmatchError
from clipmatch.imageformats import NEEDED_AVIF, RAW_SUFFIXES, SUFFIXES, library, missing_library
from clipmatch.photo import Metadata
from clipmatch.preprocess import (
    MAX_PIXELS,
    ImageError,
    Transform,
    load_image,
    open_photo,
    random_box,
    read_header,
)
from clipmatch.tokenizer import Tokenizer

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def scene(width=80, height=48):
    """Red on the left, blue on the right, a green strip along the top: no two of its eight orientations look alike."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    image.paste(GREEN, (0, 0, width, height // 4))
    return image


def photo(width=80, height=48, seed=0):
    """Smooth random colours, so that a JPEG of it is of some length and a resize has something to average."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def difference(image, expected):
    """The mean difference of two pictures of one size, in grey levels."""
    assert np.shape(image) == np.shape(expected)
    return np.abs(np.asarray(image, dtype=float) - np.asarray(expected, dtype=float)).mean()


def png_header(width, height):
    """The beginning of a PNG file that claims to be this large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64))


def stored(image, orientation):
    """What the camera stores, so that turning it by the EXIF orientation gives the image."""
    undone = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.rotate(180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.rotate(90, expand=True),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.rotate(-90, expand=True),
    }
    return undone[orientation](image)


# Loading


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_come_out_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    stored(scene(), orientation).save(path, exif=exif, quality=95)
    loaded = load_image(path)
    assert difference(loaded, scene()) < 8
    # a picture that was turned must not be turned again
    pixels = Transform(PreprocessConfig(size=8)).pixels
    assert np.array_equal(pixels(loaded), pixels(Image.open(path)))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_data_do_not_cost_the_picture(tmp_path):
    scene().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage", quality=95)
    assert difference(load_image(tmp_path / "a.jpg"), scene()) < 8


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 0), WHITE),
        ("LA", (0, 51), (204, 204, 204)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, WHITE),
        ("1", 0, (0, 0, 0)),
    ],
)
def test_transparency_is_on_white(tmp_path, mode, colour, expected):
    Image.new(mode, (4, 3), colour).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert (loaded.mode, loaded.size, loaded.getpixel((1, 1))) == ("RGB", (4, 3), expected)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palettes_with_and_without_a_transparent_colour(tmp_path, suffix):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    image.save(tmp_path / f"plain.{suffix}")
    image.save(tmp_path / f"clear.{suffix}", transparency=1)
    for name, right in (("plain", BLUE), ("clear", WHITE)):
        loaded = load_image(tmp_path / f"{name}.{suffix}")
        assert (loaded.getpixel((0, 0)), loaded.getpixel((1, 0))) == (RED, right)


def test_transparent_modes_that_no_file_has():
    pixels = Transform(PreprocessConfig(size=1)).pixels
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 51))
    palette = Image.new("P", (1, 1))
    palette.putpalette([0, 0, 0])
    palette.putalpha(51)
    assert palette.mode == "PA"
    for image in (half.convert("RGBa"), half.convert("LA").convert("La"), palette):
        assert pixels(image).tolist() == [[[204, 204, 204]]], image.mode


def test_cmyk_jpeg_keeps_its_colour(tmp_path):
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    Image.new("CMYK", (64, 64), (255, 255, 0, 51)).save(tmp_path / "blue.jpg", quality=95)
    for min_size in (None, 16):
        assert difference(load_image(tmp_path / "red.jpg", min_size).resize((1, 1)), [[RED]]) < 4
        assert difference(load_image(tmp_path / "blue.jpg", min_size).resize((1, 1)), [[(0, 0, 204)]]) < 4


def test_ycck_jpeg_keeps_its_colour(tmp_path):
    # Pillow writes no YCCK: put YCbCr values into the four channels (inverted, as Adobe stores them) and say so in the
    # Adobe marker, whose last byte is 0 for CMYK and 2 for YCCK.
    y, cb, cr = Image.new("RGB", (64, 64), (0, 255, 255)).convert("YCbCr").getpixel((0, 0))
    buffer = io.BytesIO()
    Image.new("CMYK", (64, 64), (255 - y, 255 - cb, 255 - cr, 0)).save(buffer, "JPEG", quality=95, subsampling=0)
    data = bytearray(buffer.getvalue())
    data[data.index(b"Adobe") + 11] = 2
    (tmp_path / "red.jpg").write_bytes(data)
    for min_size in (None, 16):
        assert difference(load_image(tmp_path / "red.jpg", min_size).resize((1, 1)), [[RED]]) < 4


@pytest.mark.parametrize(
    ("values", "dtype", "suffix"),
    [
        ([0, 257 * 100, 65535], "<u2", "png"),
        ([0, 257 * 100, 65535], "<u2", "tif"),
        ([0, 257 * 100, 65535], ">u2", "tif"),
        ([0, 257 * 100, 65535], "<i4", "tif"),
        ([-1, 257 * 100, 70000], "<i4", "tif"),
        ([0.0, 100 / 255, 1.0], "<f4", "tif"),
        ([0.0, 100.0, 255.0], "<f4", "tif"),
        ([0.0, 257 * 100.0, 65535.0], "<f4", "tif"),
        ([float("nan"), 1000.0 * 100, 1000.0 * 255], "<f4", "tif"),
    ],
)
def test_deep_greys_are_scaled_and_not_cut_off(tmp_path, values, dtype, suffix):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(np.array([values], dtype=dtype)).save(path)
    assert np.asarray(load_image(path))[0].tolist() == [[0, 0, 0], [100, 100, 100], [255, 255, 255]]


def test_big_endian_sixteen_bits(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 65535\n" + struct.pack(">3H", 0, 257 * 100, 65535))
    assert np.asarray(load_image(tmp_path / "a.pgm"))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert difference(load_image(tmp_path / f"a.{suffix}"), frames[0]) < 4


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(("width", "height"), [(640, 480), (479, 1000), (449, 2000), (224, 224), (100, 900)])
def test_reduced_decoding_stays_above_the_size_asked_for(tmp_path, width, height, mode):
    photo(width, height).convert(mode).save(tmp_path / "a.jpg", quality=90)
    full, small = load_image(tmp_path / "a.jpg"), load_image(tmp_path / "a.jpg", min_size=224)
    assert full.size == (width, height)
    assert min(small.size) >= min(224, width, height)
    assert difference(small.resize((50, 50)), full.resize((50, 50))) < 3


def test_reduced_decoding_reduces_and_turns(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(1600, 1000).rotate(90, expand=True).save(tmp_path / "a.jpg", exif=exif, quality=95)
    loaded = load_image(tmp_path / "a.jpg", min_size=224)
    assert loaded.size == (400, 250)
    assert difference(loaded, scene(400, 250)) < 8


def broken(tmp_path, kind):
    """A path that cannot be loaded, by kind."""
    path = tmp_path / "file.jpg"
    jpeg, png = io.BytesIO(), io.BytesIO()
    photo(200, 200).save(jpeg, "JPEG")
    photo(200, 200).save(png, "PNG")
    content = {
        "truncated JPEG": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "truncated PNG": png.getvalue()[: len(png.getvalue()) // 2],
        "JPEG header": jpeg.getvalue()[:3],
        "PNG header": png.getvalue()[:20],
        "text": b"This is no image.\n",
        "empty": b"",
        "bomb": png_header(20_001, 10_000),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in content:
        path.write_bytes(content[kind])
    return path


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated JPEG", "image file is truncated"),
        ("truncated PNG", "truncated"),
        ("JPEG header", ""),
        ("PNG header", ""),
        ("text", "not an image in a known format"),
        ("empty", "the file is empty"),
        ("absent", "no such file"),
        ("folder", "it is a folder"),
        pytest.param("pipe", "not a regular file", marks=pytest.mark.skipif(os.name == "nt", reason="no pipes here")),
        ("bomb", "20001 x 10000 pixels are more than the limit of 200 million"),
        ("EPS", "not an image in a known format"),
    ],
)
def test_a_broken_file_is_an_image_error_with_a_reason(tmp_path, kind, reason):
    path = broken(tmp_path, kind)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert reason in caught.value.reason
    assert (caught.value.path, str(caught.value)) == (path, f"Cannot read the image {path}: {caught.value.reason}.")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_no_damage_gives_another_exception(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png", "gif", "tif", "webp", "bmp", "ico", "tga", "jp2", "ppm", "pcx"):
        buffer = io.BytesIO()
        photo(32, 32).save(buffer, Image.registered_extensions()[f".{suffix}"])
        for _ in range(25):
            data = bytearray(buffer.getvalue())
            for at in rng.integers(0, min(len(data), 200), 6):
                data[at] = rng.integers(0, 256)
            path = tmp_path / f"a.{suffix}"
            path.write_bytes(data[: rng.integers(1, len(data) + 1)])
            with contextlib.suppress(ImageError):
                assert load_image(path).mode == "RGB"


@pytest.mark.filterwarnings("error")
def test_a_large_picture_below_the_limit_gives_no_warning_and_leaves_pillow_alone(tmp_path):
    assert Image.MAX_IMAGE_PIXELS * 2 < MAX_PIXELS
    path = tmp_path / "large.png"
    path.write_bytes(png_header(19_000, 10_000))  # Image.open refuses this size, and warns at half of it
    limit = Image.MAX_IMAGE_PIXELS
    filters = list(warnings.filters)
    with pytest.raises(ImageError) as error:
        load_image(path)
    assert "limit" not in error.value.reason  # it gets as far as the missing pixels
    assert (Image.MAX_IMAGE_PIXELS, warnings.filters) == (limit, filters)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "avif"])
def test_a_photo_is_its_image_and_its_header(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    photo(640, 480).save(path)
    for min_size in (None, 100):
        image, metadata = open_photo(path, min_size)
        assert difference(image, load_image(path, min_size)) == 0
        assert metadata == read_header(path) == Metadata(640, 480)


@pytest.mark.parametrize("kind", ["truncated PNG", "truncated JPEG", "text", "absent"])
def test_a_photo_of_a_broken_file_is_an_image_error(tmp_path, kind):
    with pytest.raises(ImageError) as expected:
        load_image(broken(tmp_path, kind))
    with pytest.raises(ImageError) as actual:
        open_photo(tmp_path / "file.jpg")  # reading a PNG's metadata decodes it: what has failed then must fail again
    assert str(actual.value) == str(expected.value)


# HEIC and RAW


def heic(path, image, **extra):
    """Write a HEIC file by the library that also reads it, without telling Pillow of it."""
    pytest.importorskip("pillow_heif").from_pillow(image).save(path, quality=95, **extra)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_comes_out_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x0110] = orientation, "Phone"
    path = heic(tmp_path / "a.heic", stored(scene(), orientation), exif=exif.tobytes())
    image, metadata = open_photo(path, min_size=16)
    assert difference(image, scene()) < 20  # colours are stored at half the resolution; turned wrongly it is above 80
    assert metadata == Metadata(80, 48, camera="Phone")
    assert "HEIF" not in Image.OPEN  # Pillow itself is left alone


def test_the_kind_of_a_heic_file_is_told_by_its_content(tmp_path):
    assert load_image(heic(tmp_path / "a.heic", scene()).rename(tmp_path / "a.jpg")).size == (80, 48)
    scene().save(tmp_path / "b.jpg")
    assert load_image((tmp_path / "b.jpg").rename(tmp_path / "b.heic")).size == (80, 48)


def test_a_damaged_heic_file_is_an_image_error(tmp_path):
    path = heic(tmp_path / "a.heic", photo(300, 200))
    sound = path.read_bytes()
    for length in range(1, len(sound), len(sound) // 20):
        path.write_bytes(sound[:length])
        with pytest.raises(ImageError):
            load_image(path)


def directory(start, tags):
    """The bytes of a TIFF directory at this offset, from {tag: (struct's letter of its values, values)}."""
    kinds = {"s": 2, "B": 1, "H": 3, "I": 4}
    rows, values = b"", b""
    beyond = start + 2 + 12 * len(tags) + 4
    for tag, (letter, value) in sorted(tags.items()):
        data = value if letter == "s" else struct.pack(f"<{len(value)}{letter}", *value)
        place = struct.pack("<I", beyond + len(values)) if len(data) > 4 else data.ljust(4, b"\0")
        values += data + b"\0" * (len(data) % 2) if len(data) > 4 else b""
        rows += struct.pack("<HHI", tag, kinds[letter], len(data) // struct.calcsize(letter)) + place
    return struct.pack("<H", len(tags)) + rows + bytes(4) + values


def write_raw(path, preview, orientation, kind, xmp=b"<none/>"):
    """A small DNG file, as a camera would write it: a grey sensor of 320 x 192, and a preview of some kind or none.

    kind: "JPEG", "bitmap", "none", or "not TIFF": the beginning that Olympus gives to its files.
    """
    sensor = np.full((192, 320), 3000, "<u2").tobytes()
    layout = {256: ("I", [320]), 257: ("I", [192]), 258: ("H", [16]), 259: ("H", [1]), 262: ("H", [32803])}
    layout |= {277: ("H", [1]), 278: ("I", [192]), 279: ("I", [len(sensor)]), 33421: ("H", [2, 2])}
    layout |= {254: ("I", [0]), 33422: ("B", [0, 1, 1, 2])}
    camera = {271: ("s", b"Acme\0"), 272: ("s", b"Acme Raw\0"), 306: ("s", b"2021:06:05 14:03:02\0")}
    camera |= {274: ("H", [orientation]), 700: ("B", xmp), 50706: ("B", [1, 4, 0, 0]), 50708: ("s", b"Acme Raw\0")}
    if kind == "none":
        end = 8 + len(directory(8, camera | layout | {273: ("I", [0])}))
        path.write_bytes(b"II*\0\x08\0\0\0" + directory(8, camera | layout | {273: ("I", [end])}) + sensor)
        return path
    width, height = preview.size
    buffer = io.BytesIO()
    preview.save(buffer, "JPEG", quality=95, **({"exif": preview.getexif()} if preview.getexif() else {}))
    jpeg = buffer.getvalue()[:2] + buffer.getvalue()[20:]  # without the JFIF part: cameras begin with EXIF
    data = preview.tobytes() if kind == "bitmap" else jpeg + b"\0" * (len(jpeg) % 2)
    camera |= {254: ("I", [1]), 256: ("I", [width]), 257: ("I", [height]), 258: ("H", [8, 8, 8]), 278: ("I", [height])}
    camera |= {259: ("H", [1 if kind == "bitmap" else 7]), 262: ("H", [2 if kind == "bitmap" else 6])}
    camera |= {277: ("H", [3]), 279: ("I", [len(data)])}
    begin = 8 + len(directory(8, camera | {273: ("I", [0]), 330: ("I", [0])}))
    below = begin + len(data)
    end = below + len(directory(below, layout | {273: ("I", [0])}))
    head = b"IIRO\x08\0\0\0" if kind == "not TIFF" else b"II*\0\x08\0\0\0"
    first = directory(8, camera | {273: ("I", [begin]), 330: ("I", [below])})
    path.write_bytes(head + first + data + directory(below, layout | {273: ("I", [end])}) + sensor)
    return path


@pytest.mark.parametrize("kind", ["JPEG", "bitmap", "not TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_preview_of_a_raw_file_comes_out_upright(tmp_path, kind, orientation):
    pytest.importorskip("rawpy")
    preview = stored(scene(160, 96), orientation)
    path = write_raw(tmp_path / "a.ORF", preview, orientation, kind)
    image, metadata = open_photo(path)
    assert difference(image, scene(160, 96)) < 8
    size = (320, 192) if orientation in (1, 3) else (192, 320)  # of the photograph, not of its preview
    assert metadata == Metadata(*size, datetime(2021, 6, 5, 14, 3, 2), camera="Acme Raw")
    assert difference(load_image(path), image) == 0


def test_the_preview_of_a_raw_file_is_decoded_at_a_reduced_size(tmp_path):
    pytest.importorskip("rawpy")
    path = write_raw(tmp_path / "a.dng", photo(1600, 1000), 1, "JPEG")
    assert (load_image(path).size, load_image(path, min_size=224).size) == ((1600, 1000), (400, 250))


def test_a_raw_file_that_is_not_like_tiff_has_the_exif_data_of_its_preview(tmp_path):
    pytest.importorskip("rawpy")
    preview = scene()
    preview.getexif()[0x0110] = "One"
    preview.getexif().get_ifd(0x8769)[0x9003] = "2020:02:02 20:20:20"
    metadata = read_header(write_raw(tmp_path / "a.raf", preview, 1, "not TIFF"))
    assert (metadata.camera, metadata.taken) == ("One", datetime(2020, 2, 2, 20, 20, 20))


def test_the_words_in_a_raw_file(tmp_path):
    pytest.importorskip("rawpy")
    packet = (
        b"<rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#' xmlns:dc='http://purl.org/dc/elements/1.1/'>"
        b"<rdf:Description dc:description='A dog' dc:subject='sea'/></rdf:RDF>"
    )
    path = write_raw(tmp_path / "a.dng", scene(), 1, "JPEG", packet)
    assert read_header(path).caption == "A dog [sea]"
    (tmp_path / "a.txt").write_text("A cat")
    assert read_header(path).caption == "A cat [sea]"


def test_a_raw_file_without_a_preview_is_developed(tmp_path):
    pytest.importorskip("rawpy")
    image, metadata = open_photo(write_raw(tmp_path / "a.dng", None, 6, "none"))
    assert (image.mode, image.size) == ("RGB", (96, 160))
    assert (metadata.width, metadata.height, metadata.camera) == (192, 320, "Acme Raw")


def test_a_damaged_raw_file_is_an_image_error(tmp_path):
    pytest.importorskip("rawpy")
    sound = write_raw(tmp_path / "a.nef", photo(300, 200), 1, "JPEG").read_bytes()
    for length in (9, 100, 400):
        (tmp_path / "a.nef").write_bytes(sound[:length])
        with pytest.raises(ImageError, match=r"it is a damaged or unsupported RAW file \([A-Z][a-z]"):
            load_image(tmp_path / "a.nef")


@pytest.mark.parametrize(
    ("name", "package", "kind"),
    [("a.heic", "pillow_heif", "HEIC"), ("a.HIF", "pillow_heif", "HEIC"), ("a.DNG", "rawpy", "RAW")],
)
def test_without_its_library_a_file_says_what_to_install(tmp_path, monkeypatch, name, package, kind):
    path = tmp_path / name
    if kind == "HEIC":
        heic(path, scene())
    else:
        write_raw(path, scene(), 1, "JPEG")  # which Pillow would open, as the preview that it begins with
        assert Image.open(path).size == (80, 48)
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails, as if it were not there
    library.cache_clear()
    try:
        reason = missing_library(path)
        with pytest.raises(ImageError) as error:
            load_image(path)
    finally:
        library.cache_clear()
    expected = (
        f'{kind} pictures need {package.replace("_", "-")}, which is not installed: pip install "clipmatch[photos]"'
    )
    assert reason == error.value.reason == expected


def test_which_files_are_pictures_and_which_of_them_can_be_opened(monkeypatch):
    assert {".jpg", ".png", ".gif", ".tif", ".webp", ".bmp", ".avif", ".heic", ".cr3"} < SUFFIXES
    assert {".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw"} == RAW_SUFFIXES
    assert [missing_library(Path(f"a{suffix}")) for suffix in (".jpg", ".AVIF", ".txt")] == [None] * 3
    monkeypatch.setattr("PIL.features.check", lambda feature: feature != "avif")
    assert missing_library(Path("a.avif")) == NEEDED_AVIF


# Transform


def test_stretch_takes_in_the_whole_picture_and_crop_the_middle():
    image = scene(90, 30)
    stretched = Transform(PreprocessConfig(size=30)).pixels(image)
    assert (tuple(stretched[20, 0]), tuple(stretched[20, 29]), tuple(stretched[0, 15])) == (RED, BLUE, GREEN)
    cropped = Transform(PreprocessConfig(size=30, fit="crop")).pixels(image)
    assert np.array_equal(cropped, np.asarray(image)[:, 30:60])


def test_crop_is_resize_then_centre_crop_but_for_the_rim():
    image = photo(120, 60)
    cropped = Transform(PreprocessConfig(size=30, fit="crop", resample="bicubic")).pixels(image)
    plain = image.resize((60, 30), Image.Resampling.BICUBIC).crop((15, 0, 45, 30))
    assert difference(cropped[:, 2:-2], np.asarray(plain)[:, 2:-2]) < 0.1


@pytest.mark.parametrize("fit", ["stretch", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_extreme_shapes(fit, size):
    pixels = Transform(PreprocessConfig(size=16, fit=fit)).pixels(Image.new("RGB", size, RED))
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    assert (pixels == RED).all()


def test_normalise_by_hand():
    config = PreprocessConfig(size=1, mean=(0.5, 0.0, 0.2), std=(0.5, 1.0, 0.1))
    transform = Transform(config)
    values = transform.normalise(np.array([[[[255, 51, 51]]]], dtype=np.uint8))
    assert (values.shape, values.dtype) == ((1, 3, 1, 1), np.float32)
    np.testing.assert_allclose(values[0, :, 0, 0], [1.0, 0.2, 0.0], atol=1e-6)
    assert transform.normalise(np.zeros((5, 2, 7, 7, 3), np.uint8)).shape == (5, 2, 3, 7, 7)


def test_a_tensor_is_normalised_like_an_array():
    transform = Transform(PreprocessConfig(size=4, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28)))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 3), np.uint8)
    found = transform.normalise_tensor(torch.from_numpy(pixels))
    assert found.is_contiguous()
    assert np.array_equal(found.numpy(), transform.normalise(pixels))


def test_the_transform_is_that_of_the_vit_it_is_named_after():
    transformers = pytest.importorskip("transformers")
    reference = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)()
    for image in (photo(500, 375), photo(100, 333, seed=1)):
        expected = np.asarray(reference(images=image)["pixel_values"][0])
        actual = Transform(PreprocessConfig())(images=image)["pixel_values"][0]
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_one_or_many_pictures_as_list_array_or_tensor():
    torch = pytest.importorskip("torch")
    transform = Transform(PreprocessConfig(size=8))
    one, two = photo(20, 10), photo(10, 20, seed=1)
    values = transform(images=[one, two])["pixel_values"]
    assert [(value.shape, value.dtype) for value in values] == [((3, 8, 8), np.float32)] * 2
    assert np.array_equal(transform(images=one)["pixel_values"][0], values[0])
    assert np.array_equal(transform(images=[one, two], return_tensors="np")["pixel_values"], np.stack(values))
    tensor = transform(images=two, return_tensors="pt")["pixel_values"]
    assert torch.equal(tensor, torch.from_numpy(values[1][None]))
    assert transform(images=[], return_tensors="np")["pixel_values"].shape == (0, 3, 8, 8)
    with pytest.raises(ClipmatchError, match="got 'tf'"):
        transform(images=one, return_tensors="tf")


def test_arrays_are_pictures_too():
    transform = Transform(PreprocessConfig(size=8))
    image = photo(20, 10)
    expected = transform.pixels(image)
    assert np.array_equal(transform.pixels(np.asarray(image)), expected)
    assert np.array_equal(transform.pixels(np.asarray(image.convert("RGBA"))), expected)
    grey = np.full((5, 5), 9, np.uint8)
    assert np.array_equal(transform.pixels(grey), transform.pixels(grey[:, :, None]))
    batch = np.stack([np.asarray(image)] * 3)
    assert transform(images=batch, return_tensors="np")["pixel_values"].shape == (3, 3, 8, 8)
    for wrong in (np.zeros((3, 10, 20), np.uint8), np.zeros((10, 20, 3), np.float32)):
        with pytest.raises(ClipmatchError, match="must be uint8 with height, width and channels"):
            transform.pixels(wrong)


def test_augment_repeats_with_its_seed_and_varies_without():
    transform, image = Transform(PreprocessConfig(size=16)), photo(60, 40)
    views = [transform.augment(image, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert {(view.size, view.mode) for view in views} == {((16, 16), "RGB")}
    assert difference(views[0], views[1]) == 0
    assert difference(views[0], views[2]) > 1


def test_augment_mirrors_half_of_the_time_or_never():
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[:, :, 0] = np.arange(100) * 2  # darker on the left
    transform, rng = Transform(PreprocessConfig(size=100)), np.random.default_rng(0)
    for _ in range(50):
        view = np.asarray(transform.augment(ramp, rng, scale=(0.6, 1.0), flip=False), dtype=float)
        assert view[:, -1, 0].mean() > view[:, 0, 0].mean()
    flipped = [np.asarray(transform.augment(ramp, rng), dtype=float)[:, [0, -1], 0].mean(axis=0) for _ in range(100)]
    assert 30 <= sum(left > right for left, right in flipped) <= 70


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_augment_of_extreme_shapes(size):
    rng = np.random.default_rng(0)
    assert Transform(PreprocessConfig(size=8)).augment(Image.new("RGB", size), rng).size == (8, 8)


def test_random_box_keeps_area_aspect_and_bounds():
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = random_box((120, 100), rng, (0.6, 1.0))
        width, height = right - left, bottom - top
        assert 0 <= left < right <= 120
        assert 0 <= top < bottom <= 100
        assert 0.6 - 1e-9 <= width * height / 12_000 <= 1
        assert 3 / 4 - 1e-9 <= width / height <= 4 / 3 + 1e-9 or (width, height) == (120, 100)


# Tokenizer


TEXTS = [
    "",
    "a dog",
    "A brown dog runs across the grass .",
    "two dogs , one ball ; a café 🐕 !",
    "dog " * 5000,
    "zzz qqq",
]


@pytest.fixture(scope="module")
def backend():
    """A small WordPiece tokenizer of the BERT kind."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[PAD]", "[CLS]", "[SEP]"])
    tokenizer.train_from_iterator(["a brown dog runs across the grass", "two dogs , one ball", "a cafe"], trainer)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return tokenizer


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
def test_it_agrees_with_transformers(backend):
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer = Tokenizer(backend)
    for padding, truncation, max_length in itertools.product(("max_length", True, False), (True, False), (5, 64)):
        settings = {"padding": padding, "truncation": truncation, "max_length": max_length}
        expected, actual = reference(TEXTS, **settings), tokenizer(TEXTS, **settings)
        assert actual["input_ids"] == expected["input_ids"], settings
        assert actual["attention_mask"] == expected["attention_mask"], settings
        assert tokenizer(TEXTS[1], **settings)["input_ids"] == reference(TEXTS[1], **settings)["input_ids"]


def test_shapes_types_and_special_tokens(backend):
    torch = pytest.importorskip("torch")
    tokenizer = Tokenizer(backend)
    cls, sep, pad = (backend.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    out = tokenizer(TEXTS, max_length=7, return_tensors="np")
    assert {name: (value.shape, value.dtype) for name, value in out.items()} == {
        "input_ids": ((6, 7), np.int64),
        "attention_mask": ((6, 7), np.int64),
    }
    assert out["input_ids"][0].tolist() == [cls, sep, pad, pad, pad, pad, pad]
    assert out["attention_mask"][0].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert (out["input_ids"][4][0], out["input_ids"][4][-1]) == (cls, sep)  # cut, and still closed
    assert out["attention_mask"][4].all()
    tensors = tokenizer(TEXTS, max_length=7, return_tensors="pt")
    assert tensors["input_ids"].dtype == torch.int64
    assert np.array_equal(tensors["input_ids"].numpy(), out["input_ids"])
    assert tokenizer("a dog", return_tensors="np")["input_ids"].shape == (1, 64)
    assert tokenizer([], return_tensors="np")["input_ids"].shape == (0, 64)
    assert tokenizer([], padding=True, return_tensors="np")["input_ids"].shape == (0, 0)


def test_calls_do_not_disturb_one_another(backend):
    tokenizer = Tokenizer(backend)
    settings = [
        {"padding": padding, "truncation": truncation, "max_length": length}
        for padding, truncation, length in itertools.product(("max_length", True, False), (True, False), (4, 9))
    ]
    expected = [tokenizer(TEXTS[:4], **each) for each in settings]
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(lambda each: tokenizer(TEXTS[:4], **each), settings * 10))
    assert actual == expected * 10


def test_a_file_with_its_own_padding_and_truncation(backend, tmp_path):
    own = tokenizers.Tokenizer.from_str(backend.to_str())
    own.enable_padding(pad_id=3, pad_token="[SEP]", length=10)
    own.enable_truncation(3)
    Tokenizer(own).save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert loaded.backend.to_str() == own.to_str()
    assert (loaded.pad_id, loaded.vocab_size) == (3, backend.get_vocab_size())
    assert Tokenizer(backend).pad_id == 1
    assert (
        loaded("a brown dog", padding=False)["input_ids"]
        == Tokenizer(backend)("a brown dog", padding=False)["input_ids"]
    )
    again = pickle.loads(pickle.dumps(loaded))
    assert again(TEXTS) == loaded(TEXTS)


def test_problems_are_told(backend, tmp_path):
    tokenizer = Tokenizer(backend)
    with pytest.raises(ClipmatchError, match="different lengths"):
        tokenizer(TEXTS[:3], padding=False, return_tensors="np")
    with pytest.raises(ClipmatchError, match="must exceed the 2 special tokens"):
        tokenizer("a dog", max_length=2)
    with pytest.raises(ClipmatchError, match="must be a string"):
        tokenizer(["a dog", None])
    with pytest.raises(ClipmatchError, match="padding must be"):
        tokenizer("a dog", padding="left")
    with pytest.raises(ClipmatchError, match="Cannot read the tokenizer"):
        Tokenizer.from_file(tmp_path / "absent.json")
    assert tokenizer("dog \udcff", padding=False) == tokenizer("dog ?", padding=False)


def test_importing_needs_no_torch():
    code = "import sys, clipmatch.preprocess, clipmatch.data; print({'torch', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
