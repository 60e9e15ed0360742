"""A folder of bad pictures, and of good ones that look bad: what a collection holds after twenty years, and attacks.

In: an empty folder. Out: some 450 files in it, always the same but for the times that AVIF files hold, each with what
has to become of it. Made by script, so nothing of it need be kept. Knows nothing of what reads them.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

GOOD, BAD, EITHER = "good", "bad", "either"  # has to be embedded; has to be listed with a reason; one of the two
SIZE = (96, 72)
FORMATS = {"JPEG": ".jpg", "progressive": ".jpeg", "PNG": ".png", "WebP": ".webp", "GIF": ".gif", "TIFF": ".tif"}
FORMATS |= {"AVIF": ".avif"} if features.check("avif") else {}
OPTIONS: dict[str, dict[str, Any]] = {"progressive": {"progressive": True}, "TIFF": {"compression": "tiff_deflate"}}


@dataclass(frozen=True)
class Case:
    """A file of the corpus. kind: what is odd about it. fate: GOOD, BAD or EITHER."""

    path: Path
    kind: str
    fate: str


def make_corpus(folder: Path, bombs: bool = True) -> list[Case]:
    """Fill an empty folder -> its files, but for those that are no pictures by their names.

    bombs: with the pictures that are as large as is allowed, of which each takes seconds and more than a gigabyte.
    """
    cases: list[Case] = []
    for kind, make in KINDS.items():
        place = folder / kind.replace(" ", "_")
        place.mkdir(parents=True)
        cases += [Case(path, kind, fate) for path, fate in make(place)]
    if bombs:
        place = folder / "large"
        place.mkdir()
        cases += [Case(path, "large", fate) for path, fate in large(place)]
    return cases


Made = Iterator[tuple[Path, str]]


# The pictures that all is made of -----------------------------------------------------------------------------------


def scene(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture that no other seed gives: colours that flow, and a bright rectangle that tells which way is up."""
    rng = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    mix = rng.uniform(0, 255, (3, 3))
    pixels = across[..., None] * mix[0] + down[..., None] * mix[1] + mix[2] * np.sin(6 * across * down)[..., None]
    pixels[: size[1] // 4, : size[0] // 3] = rng.uniform(0, 255, 3)
    return Image.fromarray(np.uint8(np.clip(pixels, 0, 255)))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as a file of a kind in `FORMATS`."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if kind == "progressive" else kind, **{**OPTIONS.get(kind, {}), **options})
    return buffer.getvalue()


def put(path: Path, data: bytes, fate: str) -> tuple[Path, str]:
    """Write a file."""
    path.write_bytes(data)
    return path, fate


# Damage -------------------------------------------------------------------------------------------------------------


def plain(place: Path) -> Made:
    """One of each format, as it should be."""
    for seed, (kind, suffix) in enumerate(FORMATS.items()):
        yield put(place / f"{kind}{suffix}", encoded(scene(seed), kind), GOOD)


def truncated(place: Path) -> Made:
    """Each format cut off at every twentieth. Some decoders are content with the end missing."""
    for kind, suffix in FORMATS.items():
        data = encoded(scene(10), kind)
        for percent in range(5, 100, 5):
            yield put(place / f"{kind}_{percent:02d}{suffix}", data[: len(data) * percent // 100], EITHER)


def flipped(place: Path) -> Made:
    """Each format with 1 to 128 bits turned over, some of them in its head."""
    for kind, suffix in FORMATS.items():
        data = encoded(scene(11), kind)
        for seed in range(8):
            rng, bad = np.random.default_rng(seed), bytearray(data)
            end = len(data) if seed % 2 else min(200, len(data))
            for at in rng.integers(0, end, 1 << seed):
                bad[at] ^= 1 << rng.integers(8)
            yield put(place / f"{kind}_{seed}{suffix}", bytes(bad), EITHER)


def misnamed(place: Path) -> Made:
    """Each format under the suffix of each other; and files that are no pictures at all."""
    for seed, kind in enumerate(FORMATS):
        for suffix in sorted({".jpg", ".PNG", ".webp", ".gif", ".tif", ".bmp", ".avif"} - {FORMATS[kind]}):
            yield put(place / f"{kind}{suffix}", encoded(scene(20 + seed), kind), GOOD)
    noise = np.random.default_rng(0).bytes(5000)
    no_pictures = {
        "text": b"A dog on a beach.\n",
        "page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "drawing": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
        "document": b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n",
        "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (w) file\nshowpage\n",
        "archive": b"PK\x03\x04" + bytes(60),
        "noise": noise,
        "zeros": bytes(5000),
        "byte": b"\xff",
        "mark": b"\xff\xd8",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    }
    for name, data in no_pictures.items():
        yield put(place / f"{name}.jpg", data, BAD)
    for suffix in sorted({*FORMATS.values(), ".bmp"}):
        yield put(place / f"empty{suffix}", b"", BAD)


# Kinds of pixels ----------------------------------------------------------------------------------------------------


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file by hand. rows: compressed already. chunks: further ones, before the pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(chunk(*part) for part in chunks) + chunk(b"IDAT", rows)
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def deep_png() -> bytes:
    """48 bits a pixel, which Pillow reads and does not write."""
    values = np.asarray(scene(30), np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(*SIZE, 16, 2, zlib.compress(rows))


def modes(place: Path) -> Made:
    """Every mode that a file may have."""
    picture = scene(31)
    grey, clear = picture.convert("L"), picture.copy()
    clear.putalpha(Image.linear_gradient("L").resize(SIZE))
    palette = picture.quantize(16)
    wide = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "16bit.png": (wide, "PNG", {}),
        "16bit.tif": (wide, "TIFF", {}),
        "32bit.tif": (Image.fromarray(np.asarray(grey, np.int32) * 257), "TIFF", {}),
        "float.tif": (Image.fromarray(np.asarray(grey, np.float32) / 255), "TIFF", {}),
        "cmyk.jpg": (picture.convert("CMYK"), "JPEG", {}),
        "cmyk.tif": (picture.convert("CMYK"), "TIFF", {}),
        "lab.tif": (Image.merge("LAB", [grey, grey, grey]), "TIFF", {}),
        "ycbcr.tif": (picture.convert("YCbCr"), "TIFF", {}),
        "jpeg_inside.tif": (picture, "TIFF", {"compression": "jpeg"}),
        "lzw.tif": (picture, "TIFF", {"compression": "tiff_lzw"}),
        "palette.png": (palette, "PNG", {}),
        "palette_clear.png": (palette, "PNG", {"transparency": 3}),
        "palette_alpha.png": (palette, "PNG", {"transparency": bytes(range(0, 256, 16))}),
        "palette_4bit.png": (palette, "PNG", {"bits": 4}),
        "palette_clear.gif": (palette, "GIF", {"transparency": 3}),
        "colour_clear.png": (picture, "PNG", {"transparency": (255, 0, 0)}),
        "1bit.png": (grey.convert("1"), "PNG", {}),
        "1bit.tif": (grey.convert("1"), "TIFF", {"compression": "group4"}),
        "1bit.bmp": (grey.convert("1"), "BMP", {}),
        "grey.jpg": (grey, "JPEG", {}),
        "grey_alpha.png": (clear.convert("LA"), "PNG", {}),
        "alpha.png": (clear, "PNG", {}),
        "alpha.webp": (clear, "WebP", {}),
        "alpha.tif": (clear, "TIFF", {}),
        "palette.bmp": (palette, "BMP", {}),
        "colour.bmp": (picture, "BMP", {}),
        "lossless.webp": (picture, "WebP", {"lossless": True}),
    }
    for name, (image, kind, options) in made.items():
        yield put(place / name, encoded(image, kind, **options), GOOD)
    yield put(place / "48bit.png", deep_png(), GOOD)
    frames = [scene(seed) for seed in range(32, 36)]
    for kind, suffix in (("GIF", ".gif"), ("WebP", ".webp"), ("PNG", ".png"), ("TIFF", ".tif"), ("AVIF", ".avif")):
        if kind in FORMATS:
            data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
            yield put(place / f"animated{suffix}", data, GOOD)
    many = [scene(seed, (8, 8)) for seed in range(300)]
    yield put(place / "300_frames.gif", encoded(many[0], "GIF", save_all=True, append_images=many[1:]), GOOD)


def shapes(place: Path) -> Made:
    """Panoramas, pictures of few pixels, pictures of none."""
    for width, height in ((1, 1), (1, 2), (2, 1), (1, 900), (900, 1), (30000, 60), (60, 30000)):
        for kind in ("JPEG", "PNG"):
            picture = scene(40, (width, height)) if min(width, height) > 2 else Image.new("RGB", (width, height), "red")
            yield put(place / f"{width}x{height}{FORMATS[kind]}", encoded(picture, kind), GOOD)
    yield put(place / "0x0.png", png(0, 0, 8, 2, zlib.compress(b"")), BAD)
    yield put(place / "0x9.png", png(0, 9, 8, 2, zlib.compress(bytes(9))), BAD)
    yield put(place / "0x0.gif", resized_gif(0, 0, b""), BAD)
    yield put(place / "0x0.bmp", patched(encoded(scene(41), "BMP"), 18, "<ii", 0, 0), BAD)
    yield put(place / "0_high.jpg", patched_jpeg(SIZE[0], 0), BAD)
    yield put(place / "0x0.tif", patched_tiff(0, 0), BAD)


# Lies and bombs -----------------------------------------------------------------------------------------------------


def patched(data: bytes, at: int, form: str, *values: int) -> bytes:
    """A file with other numbers in one place."""
    return data[:at] + struct.pack(form, *values) + data[at + struct.calcsize(form) :]


def patched_jpeg(width: int, height: int, kind: str = "JPEG") -> bytes:
    """A JPEG file that says it has another size."""
    data = encoded(scene(42), kind)
    mark = data.index(b"\xff\xc2" if kind == "progressive" else b"\xff\xc0")
    return patched(data, mark + 5, ">HH", height, width)


def patched_tiff(width: int, height: int) -> bytes:
    """A TIFF file that says it has another size."""
    data = encoded(scene(42), "TIFF", compression="raw")
    start = struct.unpack_from("<I", data, 4)[0]
    for number in range(struct.unpack_from("<H", data, start)[0]):
        at = start + 2 + 12 * number
        tag = struct.unpack_from("<H", data, at)[0]
        if tag in (256, 257):
            data = patched(data, at + 2, "<HII", 4, 1, width if tag == 256 else height)
    return data


def resized_gif(width: int, height: int, data: bytes | None = None) -> bytes:
    """A GIF file whose screen has another size than its picture."""
    return patched(encoded(scene(42), "GIF"), 6, "<HH", width, height) if data is None else (
        b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
        + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x01\x44\x00;"
    )  # fmt: skip


def patched_webp(width: int, height: int) -> bytes:
    """A lossless WebP file that says it has another size: 14 bits each behind its mark."""
    data = encoded(scene(42), "WebP", lossless=True)
    at = data.index(b"VP8L") + 9
    bits = struct.unpack_from("<I", data, at)[0] & ~((1 << 28) - 1)
    return patched(data, at, "<I", bits | (width - 1) | (height - 1) << 14)


def scans(count: int, side: int) -> bytes:
    """A progressive JPEG file with so many scans, each of which says only that nothing changes in the whole picture."""
    tables = b"\xff\xdb" + struct.pack(">HB", 67, 0) + bytes([1] * 64)
    frame = b"\xff\xc2" + struct.pack(">HBHHBBBB", 11, 8, side, side, 1, 1, 0x11, 0)
    code = b"\xff\xc4" + struct.pack(">HB", 20, 0x10) + bytes([1] + [0] * 15) + b"\xe0"  # one code: 2^14 empty blocks
    blocks = (-(-side // 8)) ** 2
    runs = -(-blocks // 16384)
    bits = ("0" + "0" * 14) * runs  # a run of 2^14 + 0
    bits += "1" * (-len(bits) % 8)
    entropy = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 63, 0) + entropy
    return b"\xff\xd8" + tables + frame + code + scan * count + b"\xff\xd9"


def bombs(place: Path) -> Made:
    """Small files that say they are huge: the limit on pixels has to stop them before a byte of it is there."""
    yield put(place / "50000x50000.png", png(50000, 50000, 8, 2, zlib.compress(bytes(9))), BAD)
    yield put(place / "2147483647x1.png", png(2**31 - 1, 1, 1, 0, zlib.compress(bytes(9))), BAD)
    yield put(place / "65500x65500.jpg", patched_jpeg(65500, 65500), BAD)
    yield put(place / "65500x65500.jpeg", patched_jpeg(65500, 65500, "progressive"), BAD)
    yield put(place / "16383x16383.webp", patched_webp(16383, 16383), BAD)
    yield put(place / "65535x65535.gif", resized_gif(65535, 65535), BAD)
    yield put(place / "60000x60000.tif", patched_tiff(60000, 60000), BAD)
    yield put(place / "4294967295x4294967295.tif", patched_tiff(2**32 - 1, 2**32 - 1), BAD)
    yield put(place / "100000x100000.bmp", patched(encoded(scene(42), "BMP"), 18, "<ii", 100000, 100000), BAD)
    if "AVIF" in FORMATS:
        data = encoded(scene(42), "AVIF")
        yield put(place / "60000x60000.avif", patched(data, data.index(b"ispe") + 8, ">II", 60000, 60000), BAD)
    # within the limit, but the pixels are not there
    yield put(place / "12000x12000.png", png(12000, 12000, 8, 2, zlib.compress(bytes(9))), BAD)
    yield put(place / "12000x12000.jpg", patched_jpeg(12000, 12000), EITHER)
    yield put(place / "12000x12000.tif", patched_tiff(12000, 12000), BAD)
    yield put(place / "12000x12000.webp", patched_webp(12000, 12000), BAD)
    # what unfolds beside the pixels, or takes time instead of memory
    zeros = zlib.compress(bytes(100 << 20))
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in np.asarray(scene(43))))
    text = b"Comment\0\0" + zeros
    yield put(place / "words.png", png(*SIZE, 8, 2, rows, (b"zTXt", text)), EITHER)
    yield put(place / "profile.png", png(*SIZE, 8, 2, rows, (b"iCCP", b"sRGB\0\0" + zeros)), EITHER)
    yield put(place / "scans.jpg", scans(20000, 8192), BAD)
    yield put(place / "long.png", png(150_000_000, 1, 1, 0, zlib.compress(bytes(9))), BAD)
    yield put(place / "tall.png", png(1, 150_000_000, 1, 0, zlib.compress(bytes(9))), BAD)


def large(place: Path) -> Made:
    """True pictures of nearly as many pixels as are allowed, in small files."""
    side = 14000
    bits = zlib.compress((b"\0" + bytes(side // 8)) * side, 9)
    yield put(place / "1bit.png", png(side, side, 1, 0, bits), GOOD)
    alpha = zlib.compressobj(1)
    row = b"\0" + bytes([200, 30, 30, 128]) * side
    rows = b"".join([*(alpha.compress(row) for _ in range(side)), alpha.flush()])
    yield put(place / "alpha.png", png(side, side, 8, 6, rows), GOOD)
    deep = zlib.compressobj(1)
    row = b"\0" + b"\x40\x00" * side
    rows = b"".join([*(deep.compress(row) for _ in range(side)), deep.flush()])
    yield put(place / "16bit.png", png(side, side, 16, 0, rows), GOOD)
    yield put(place / "screen.gif", resized_gif(side, side), GOOD)
    yield put(place / "30000x5000.jpg", encoded(Image.new("RGB", (30000, 5000), "teal"), "JPEG"), GOOD)


# EXIF data and profiles ---------------------------------------------------------------------------------------------


def exif_of(entries: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    """EXIF data of one part, of (tag, type, count, value or place); following: where the next part is said to be."""
    parts = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + parts + struct.pack("<I", following)


def exif(place: Path) -> Made:
    """All eight orientations, and EXIF data that lead in circles or out of the file."""
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> what a camera held so makes of the scene
    picture = scene(50)
    for orientation in range(1, 9):
        data = Image.Exif()
        data[0x0112] = orientation
        seen = picture if orientation == 1 else picture.transpose(Image.Transpose(turns[orientation]))
        for kind in ("JPEG", "PNG", "WebP"):
            path = place / f"turned_{orientation}{FORMATS[kind]}"
            yield put(path, encoded(seen, kind, exif=data, **({"lossless": True} if kind == "WebP" else {})), GOOD)
    circles = {
        "itself": exif_of([(0x8769, 4, 1, 8), (0x8825, 4, 1, 8)], 8),
        "interop": exif_of([(0x8769, 4, 1, 8), (0xA005, 4, 1, 8)], 8),
        "maker": exif_of([(0x8769, 4, 1, 8), (0x927C, 7, 60, 8)], 8),
        "outside": exif_of([(0x8769, 4, 1, 2**32 - 1), (0x8825, 4, 1, 2**31)], 2**32 - 8),
        "counts": exif_of([(0x010E, 2, 2**32 - 1, 26), (0x0112, 3, 2**31, 8), (0x9003, 2, 2**30, 0)]),
        "orientation_0": exif_of([(0x0112, 3, 1, 0)]),
        "orientation_9": exif_of([(0x0112, 3, 1, 9)]),
        "orientation_text": exif_of([(0x0112, 2, 4, 0x00393939)]),
        "zero_by_zero": exif_of([(0x011A, 5, 1, 26), (0x8825, 4, 1, 8), (2, 5, 3, 26)]),
        "cut_off": exif_of([(0x0112, 3, 1, 6)])[:15],
        "no_header": b"Exif\0\0",
        "noise": b"Exif\0\0" + np.random.default_rng(1).bytes(3000),
    }
    for name, data in circles.items():
        yield put(place / f"{name}.jpg", encoded(scene(51), "JPEG", exif=data), GOOD)
    pages = encoded(scene(52), "TIFF", compression="raw")
    start = struct.unpack_from("<I", pages, 4)[0]
    end = start + 2 + 12 * struct.unpack_from("<H", pages, start)[0]
    yield put(place / "pages_in_a_circle.tif", patched(pages, end, "<I", start), GOOD)


def profiles(place: Path) -> Made:
    """Colour profiles that are none, or of another kind of pixels."""
    from PIL import ImageCms

    srgb, lab = (ImageCms.ImageCmsProfile(ImageCms.createProfile(kind)).tobytes() for kind in ("sRGB", "LAB"))
    found = {"srgb": srgb, "lab": lab, "noise": np.random.default_rng(2).bytes(3000), "cut_off": srgb[:200]}
    found |= {"one_byte": b"x", "large": bytes(700_000)}
    for name, profile in found.items():
        for kind in ("JPEG", "PNG", "WebP", "TIFF"):
            yield put(place / f"{name}{FORMATS[kind]}", encoded(scene(53), kind, icc_profile=profile), GOOD)
    yield put(place / "cmyk_srgb.jpg", encoded(scene(53).convert("CMYK"), "JPEG", icc_profile=srgb), GOOD)


# Names, and what is no file -----------------------------------------------------------------------------------------

NAMES = (
    b"line\nbreak.jpg", b"carriage\rreturn.jpg", b"tab\t.jpg", b"quote'.jpg", b'double".jpg', b"back\\slash.jpg",
    b"<b onclick=alert(1)>.jpg", b"&amp;.jpg", b"%s{0}$(id)`id`;.jpg", b"-rf.jpg", b"--help.jpg", b" space .jpg",
    b"dots...jpg", b"\x1b[31mred\x1b[2J.jpg", b"\x01\x7f.jpg", b"\xff\xfe.jpg", b"caf\xe9.jpg", b"\xed\xa0\x80.jpg",
    b"*?[a].jpg", b"#1?q=2&r=%2e.jpg", b"~.jpg", b"$HOME.jpg", b"a:b|c.jpg", b"CON.jpg", b"UPPER.JPG",
    "emoji_\U0001f415\u200d\U0001f9ba.jpg".encode(), "caf\u00e9.jpg".encode(), "cafe\u0301.jpg".encode(),
    "\u202egpj.exe.jpg".encode(), "\u2028line.jpg".encode(), "\ufeffmark.jpg".encode(), "犬.jpg".encode(),
    b"n" * 251 + b".jpg", "\u00e9".encode() * 125 + b"x.jpg",
)  # fmt: skip


def names(place: Path) -> Made:
    """Names that break lists, shells, pages and JSON. A file system that won't have one goes without it."""
    inside = (b"photos.tar", b"photos.parquet", b"photo.jpg", b"new\nline", b"bad\xff")
    for seed, name in enumerate([*NAMES, *(folder + b"/in it.jpg" for folder in inside)]):
        path = Path(os.fsdecode(os.fsencode(place) + b"/" + name))
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            yield put(path, encoded(scene(100 + seed), "JPEG"), GOOD)


def no_files(place: Path) -> Made:
    """Links in circles, pipes, sockets, devices; side-cars that are worse than their photographs."""
    good, _ = put(place / "good.jpg", encoded(scene(60), "JPEG"), GOOD)
    yield good, GOOD
    links = {"to_good.jpg": "good.jpg", "itself.jpg": "itself.jpg", "one.jpg": "two.jpg", "two.jpg": "one.jpg"}
    links |= {"nowhere.jpg": "not there.jpg", "endless.jpg": "/dev/zero", "nothing.jpg": "/dev/null"}
    for name, target in links.items():
        (place / name).symlink_to(target)
        yield place / name, GOOD if name == "to_good.jpg" else BAD
    (place / "folders").mkdir()
    (place / "folders" / "up").symlink_to("..")
    (place / "folders" / "circle").symlink_to("circle")
    os.mkfifo(place / "pipe.jpg")
    yield place / "pipe.jpg", BAD
    with socket.socket(socket.AF_UNIX) as server, near(place):
        server.bind("socket.png")
    yield place / "socket.png", BAD
    path, fate = put(place / "unreadable.jpg", encoded(scene(61), "JPEG"), EITHER)
    path.chmod(0)  # does not keep root out
    yield path, fate
    laughs = "".join(f'<!ENTITY a{n + 1} "{f"&a{n};" * 10}">' for n in range(9))
    cars: dict[str, bytes] = {
        "laughs": f'<!DOCTYPE x [<!ENTITY a0 "ha">{laughs}]><x>&a9;</x>'.encode(),
        "deep": b"<a>" * 100_000,
        "noise": np.random.default_rng(3).bytes(3000),
        "other_file": b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>',
        "huge": bytes(5 << 20),
    }
    for seed, (name, packet) in enumerate(cars.items()):
        (place / f"{name}.xmp").write_bytes(packet)
        (place / f"{name}.txt").write_bytes(packet)
        yield put(place / f"{name}.jpg", encoded(scene(70 + seed), "JPEG"), GOOD)
    os.mkfifo(place / "piped.txt")
    os.mkfifo(place / "piped.xmp")
    yield put(place / "piped.jpg", encoded(scene(80), "JPEG"), GOOD)


@contextlib.contextmanager
def near(place: Path) -> Iterator[None]:
    """Within it the folder is the working one: a socket's name may have but a hundred bytes."""
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


KINDS: dict[str, Callable[[Path], Made]] = {
    "plain": plain,
    "truncated": truncated,
    "bits flipped": flipped,
    "misnamed": misnamed,
    "modes": modes,
    "shapes": shapes,
    "bombs": bombs,
    "EXIF": exif,
    "profiles": profiles,
    "names": names,
    "no files": no_files,
}
