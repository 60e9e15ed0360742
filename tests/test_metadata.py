"""Photographs made with what cameras, phones and editors write into them and beside them, and with nonsense."""

import os
import struct
import time
from datetime import datetime

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import IFDRational

from clipmatch.metadata import MAX_CAPTION, MAX_TEXT_FILE, MAX_XMP, words_beside
from clipmatch.photo import Metadata
from clipmatch.preprocess import ImageError, open_photo, read_header
from clipmatch.sidecars import sidecar_stamp

BASE, GPS = ExifTags.Base, ExifTags.GPS
ROME = {1: "N", 2: (41.0, 53.0, 24.5), 3: "E", 4: (12.0, 29.0, 32.0)}
VOID = IFDRational(0, 0)


def exif_of(main=(), inner=(), gps=()):
    """EXIF data: main part, Exif part and GPS part from (tag, value) pairs."""
    exif = Image.Exif()
    exif.update(dict(main))
    exif.get_ifd(ExifTags.IFD.Exif).update(dict(inner))
    exif.get_ifd(ExifTags.IFD.GPSInfo).update(dict(gps))
    return exif


def xmp_packet(description="", title="", words=()):
    """An XMP packet as Adobe's programs write it."""
    alternatives = "<dc:{0}><rdf:Alt><rdf:li xml:lang='x-default'>{1}</rdf:li></rdf:Alt></dc:{0}>"
    inside = alternatives.format("description", description) if description else ""
    inside += alternatives.format("title", title) if title else ""
    inside += f"<dc:subject><rdf:Bag>{''.join(f'<rdf:li>{word}</rdf:li>' for word in words)}</rdf:Bag></dc:subject>"
    return xmp_around(f"<rdf:Description rdf:about=''>{inside}</rdf:Description>")


def xmp_around(inside, before=""):
    return (
        f"<?xpacket begin='\ufeff' id='W5M0MpCehiHzreSzNTczkc9d'?>{before}<x:xmpmeta xmlns:x='adobe:ns:meta/'>"
        "<rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#' xmlns:dc='http://purl.org/dc/elements/1.1/'>"
        f"{inside}</rdf:RDF></x:xmpmeta><?xpacket end='w'?>"
    ).encode()


def iptc_block(*records):
    """A JPEG segment with IPTC records of (number in part 2, bytes)."""
    data = b"".join(struct.pack(">BBBH", 0x1C, 2, number, len(text)) + text for number, text in records)
    resource = b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0" + struct.pack(">I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"\xff\xed" + struct.pack(">H", len(resource) + 2) + resource


def save(path, exif=None, xmp=None, iptc=b"", size=(40, 30)):
    """A JPEG file with these metadata."""
    parts = {"exif": exif, "xmp": xmp}
    Image.new("RGB", size, "navy").save(path, **{name: part for name, part in parts.items() if part is not None})
    data = path.read_bytes()
    path.write_bytes(data[:2] + iptc + data[2:])
    return path


def writer(suffix, size):
    """A picture that can be saved in this format."""
    image = Image.new("RGB", size)
    return pytest.importorskip("pillow_heif").from_pillow(image) if suffix == "heic" else image


@pytest.fixture
def photo(tmp_path):
    """Metadata to put into a JPEG file -> what is read from it."""

    def read(**parts):
        return read_header(save(tmp_path / "photo.jpg", **parts))

    return read


def test_a_photograph_of_a_phone(tmp_path):
    main = {BASE.Make: "Apple", BASE.Model: "iPhone 12", BASE.Orientation: 6, BASE.DateTime: "2022:01:01 00:00:00"}
    exif = exif_of(main, {BASE.DateTimeOriginal: "2021:06:05 14:03:02"}, ROME)
    path = save(tmp_path / "photo.jpg", exif, xmp_packet("A fountain", words=("Rome", "water")), size=(400, 300))
    image, metadata = open_photo(path, min_size=100)
    assert image.size == (150, 200)
    assert (metadata.latitude, metadata.longitude) == pytest.approx((41.890139, 12.492222), abs=1e-6)
    expected = datetime(2021, 6, 5, 14, 3, 2), metadata.latitude, metadata.longitude, "Apple iPhone 12"
    assert metadata == Metadata(300, 400, *expected, "A fountain [Rome, water]") == read_header(path)


def test_a_picture_that_says_nothing(photo):
    assert photo() == Metadata(40, 30, None, None, None, None, None)


def test_only_the_header_is_read(tmp_path):
    path = save(tmp_path / "photo.jpg", exif_of({BASE.Model: "X100"}), size=(2000, 2000))
    path.write_bytes(path.read_bytes()[:1000])
    assert read_header(path) == Metadata(2000, 2000, camera="X100")
    with pytest.raises(ImageError, match="truncated"):
        open_photo(path)


# Size, time, place, camera


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "avif", "heic"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_upright_picture(tmp_path, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    writer(suffix, (64, 48)).save(path, exif=exif_of({BASE.Orientation: orientation}).tobytes())
    metadata = read_header(path)
    assert (metadata.width, metadata.height) == ((64, 48) if orientation < 5 else (48, 64))
    image, metadata = open_photo(path)
    assert image.size == (metadata.width, metadata.height)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2021:06:05 14:03:02", datetime(2021, 6, 5, 14, 3, 2)),
        ("2021:06:05 14:03:02\0\0", datetime(2021, 6, 5, 14, 3, 2)),
        ("2021-06-05T14:03:02+02:00", datetime(2021, 6, 5, 14, 3, 2)),
        ("2021:06:05 14:03", datetime(2021, 6, 5, 14, 3)),
        ("2021:06:05", datetime(2021, 6, 5)),
        ("2021:06:05   :  :  ", datetime(2021, 6, 5)),
        ("1936:05:01 00:00:00", datetime(1936, 5, 1)),
        ("0000:00:00 00:00:00", None),
        ("0001:01:01 00:00:00", None),
        ("    :  :     :  :  ", None),
        ("2021:02:30 14:03:02", None),
        ("2021:06:05 25:61:00", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_dates(photo, text, moment):
    assert photo(exif=exif_of(inner={BASE.DateTimeOriginal: text})).taken == moment


def test_the_first_sound_date_counts(photo):
    main, digitised = {BASE.DateTime: "2003:03:03 03:03:03"}, {BASE.DateTimeDigitized: "2002:02:02 02:02:02"}
    zero = {BASE.DateTimeOriginal: "0000:00:00 00:00:00"}
    taken = {BASE.DateTimeOriginal: "2001:01:01 01:01:01"}
    assert photo(exif=exif_of(main, digitised | taken)).taken.year == 2001
    assert photo(exif=exif_of(main, digitised | zero)).taken.year == 2002
    assert photo(exif=exif_of(main, zero)).taken.year == 2003
    assert photo(exif=exif_of(main | taken)).taken.year == 2001  # where RAW files have it


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({}, (41.890139, 12.492222)),
        ({1: "S", 3: "W"}, (-41.890139, -12.492222)),
        ({1: "s\0", 3: "w"}, (-41.890139, -12.492222)),
        ({2: (90.0, 0.0, 0.0)}, (90, 12.492222)),
        ({2: (0.0, 0.0, 0.0)}, (0, 12.492222)),
        ({2: (41.5, 0.0, 0.0)}, (41.5, 12.492222)),
        ({2: (0.0, 0.0, 0.0), 4: (0.0, 0.0, 0.0)}, None),
        ({2: (90.0, 1.0, 0.0)}, None),
        ({4: (181.0, 0.0, 0.0)}, None),
        ({2: (VOID, VOID, VOID)}, None),
        ({4: (12.0, 29.0, VOID)}, None),
        ({2: (41.0, 53.0)}, None),
        ({2: 41.0}, None),
        ({2: None}, None),
        ({1: None}, None),
        ({3: "N"}, None),
        ({3: ""}, None),
    ],
)
def test_places(photo, changes, place):
    gps = {tag: value for tag, value in (ROME | changes).items() if value is not None}
    metadata = photo(exif=exif_of({BASE.Model: "X100"}, gps=gps))
    assert metadata.camera == "X100"  # the rest is not lost
    if place is None:
        assert (metadata.latitude, metadata.longitude) == (None, None)
    else:
        assert (metadata.latitude, metadata.longitude) == pytest.approx(place, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "model", "camera"),
    [
        ("FUJIFILM", "X100V", "FUJIFILM X100V"),
        ("Canon", "Canon EOS 5D", "Canon EOS 5D"),
        ("NIKON CORPORATION", "NIKON D90", "NIKON D90"),
        ("EASTMAN KODAK COMPANY", "KODAK DX7590", "KODAK DX7590"),
        ("Canon\0\0", "  EOS\0 R5  \0", "Canon EOS R5"),
        ("Canon", None, "Canon"),
        (None, "X100V", "X100V"),
        ("\0\0", " ", None),
    ],
)
def test_cameras(photo, make, model, camera):
    parts = {BASE.Make: make, BASE.Model: model}
    assert photo(exif=exif_of({tag: text for tag, text in parts.items() if text})).camera == camera


# Caption


def test_the_order_of_the_sources_of_a_caption(tmp_path):
    path = tmp_path / "photo.jpg"
    exif = exif_of({BASE.ImageDescription: "from EXIF"})
    sources = {"exif": exif, "iptc": iptc_block((120, b"from IPTC")), "xmp": xmp_packet(title="from XMP")}
    (tmp_path / "photo.xmp").write_bytes(xmp_packet("from photo.xmp"))
    (tmp_path / "photo.jpg.xmp").write_bytes(xmp_packet("from photo.jpg.xmp"))
    (tmp_path / "photo.json").write_text('{"key": "0", "caption": "from photo.json"}')
    (tmp_path / "photo.txt").write_text("from photo.txt")
    seen = []
    for gone in ("photo.txt", "photo.json", "photo.jpg.xmp", "photo.xmp"):
        seen.append(read_header(save(path, **sources), words_beside(path, "from a table")).caption)
        (tmp_path / gone).unlink()
    seen.append(read_header(save(path, **sources), words_beside(path, "from a table")).caption)
    while sources:
        seen.append(read_header(save(path, **sources)).caption)
        sources.popitem()
    names = ("photo.txt", "photo.json", "photo.jpg.xmp", "photo.xmp", "a table", "XMP", "IPTC", "EXIF")
    assert seen == [f"from {name}" for name in names]


def test_keywords_stand_behind_the_caption_each_once(photo, tmp_path):
    words = iptc_block((25, b"cake"), (120, b"Grandma's birthday"), (25, b"Rome"), (25, b"cake"))
    assert photo(iptc=words).caption == "Grandma's birthday [cake, Rome]"
    assert photo(iptc=iptc_block((25, b"cake"))).caption == "cake"
    assert photo(iptc=words, xmp=xmp_packet(words=("a", "b"))).caption == "Grandma's birthday [a, b]"
    assert photo(xmp=xmp_packet("A dog", "IMG 1")).caption == "A dog"
    (tmp_path / "photo.txt").write_text("two\n dogs\n")
    assert photo(iptc=words).caption == "two dogs [cake, Rome]"


@pytest.mark.parametrize(
    "inside",
    [
        "<rdf:Description dc:description='A dog'/>",
        "<rdf:Description><dc:description>\n A dog </dc:description></rdf:Description>",
        "<rdf:Description><dc:description><rdf:Alt><rdf:li/><rdf:li>A dog</rdf:li></rdf:Alt></dc:description>"
        "</rdf:Description>",
        "<rdf:Description xmlns:y='other'><y:description>no</y:description></rdf:Description>"
        "<rdf:Description><dc:title><rdf:Alt><rdf:li>A dog</rdf:li></rdf:Alt></dc:title></rdf:Description>",
    ],
)
def test_the_ways_to_write_a_description_in_xmp(photo, inside):
    assert photo(xmp=xmp_around(inside) + b" " * 50 + b"\0").caption == "A dog"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif", "heic"])
def test_xmp_in_every_format_that_has_it(tmp_path, suffix):
    packet, extra = xmp_packet("Ein Hund in Köln", words=("犬",)), {}
    if suffix == "png":
        extra["pnginfo"] = PngInfo()
        extra["pnginfo"].add_itxt("XML:com.adobe.xmp", packet.decode())
    elif suffix == "tif":
        extra["tiffinfo"] = {700: packet}
    else:
        extra["xmp"] = packet
    writer(suffix, (64, 48)).save(tmp_path / f"a.{suffix}", **extra)
    assert read_header(tmp_path / f"a.{suffix}").caption == "Ein Hund in Köln [犬]"


def test_iptc_in_a_tiff_file(tmp_path):
    record = struct.pack(">BBBH", 0x1C, 2, 120, 5) + b"A dog"
    Image.new("RGB", (64, 48)).save(tmp_path / "a.tif", tiffinfo={33723: record})
    assert read_header(tmp_path / "a.tif").caption == "A dog"


@pytest.mark.parametrize(
    "text",
    [
        "OLYMPUS DIGITAL CAMERA         ",
        "SONY DSC",
        "KONICA MINOLTA DIGITAL CAMERA",
        "DCIM\\100MEDIA\\DJI_0001.JPG",
        "Exif_JPEG_PICTURE",
        "  \0",
    ],
)
def test_what_cameras_write_by_themselves_is_no_caption(photo, text):
    assert photo(exif=exif_of({BASE.ImageDescription: text})).caption is None
    assert photo(xmp=xmp_packet(text.strip(" \0")), iptc=iptc_block((120, text.encode()))).caption is None
    both = photo(xmp=xmp_packet(text.strip(" \0")), exif=exif_of({BASE.ImageDescription: "My digital camera"}))
    assert both.caption == "My digital camera"


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_encodings(photo, tmp_path, coding):
    text = "Café à Köln"
    assert photo(iptc=iptc_block((120, text.encode(coding)))).caption == text
    if coding in ("utf-8", "latin-1"):
        assert photo(exif=exif_of({BASE.ImageDescription: text.encode(coding)})).caption == text
    (tmp_path / "photo.txt").write_bytes(f"{text}\r\n".encode(coding))
    assert photo().caption == text


def test_a_long_caption_is_cut_and_holds_no_control_characters(photo):
    assert photo(xmp=xmp_packet("dog " * 10_000)).caption == ("dog " * 10_000)[:MAX_CAPTION]
    assert photo(iptc=iptc_block((120, b"a\x1b[31m\rdog\n"))).caption == "a [31m dog"


# Damage


@pytest.mark.parametrize("kind", ["absent", "binary", "huge", "folder", "empty", "pipe", "forbidden"])
@pytest.mark.parametrize("name", ["photo.txt", "photo.xmp", "photo.jpg.xmp"])
def test_an_unusable_sidecar_is_passed_over(photo, tmp_path, kind, name):
    path = tmp_path / name
    limit = MAX_TEXT_FILE if name.endswith("txt") else MAX_XMP
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        if os.name == "nt":
            pytest.skip("no pipes here")
        os.mkfifo(path)
    elif kind != "absent":
        content = {
            "binary": bytes(range(256)),
            "huge": xmp_packet("no") + b" " * limit,
            "empty": b"",
            "forbidden": b"x",
        }
        path.write_bytes(content[kind])
        if kind == "forbidden":
            path.chmod(0)
            if os.access(path, os.R_OK):
                pytest.skip("nothing is forbidden to this user")
    assert photo(xmp=xmp_packet("A dog")).caption == "A dog"


LAUGHS = (
    "<!DOCTYPE a [<!ENTITY a '"
    + "ha" * 100
    + "'>"
    + "".join(f"<!ENTITY {chr(98 + i)} '{f'&{chr(97 + i)};' * 10}'>" for i in range(9))
)


@pytest.mark.parametrize(
    "packet",
    [
        xmp_around("<rdf:Description dc:description='&j;'/>", LAUGHS + "]>"),
        xmp_around(
            "<rdf:Description><dc:description>&x;</dc:description></rdf:Description>",
            "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/hostname'>]>",
        ),
        xmp_around("<rdf:Description dc:description='&x;'/>", "<!DOCTYPE a [<!ENTITY x 'no entity belongs in XMP'>]>"),
        xmp_around("<a>" * 9000 + "</a>" * 9000),
        xmp_around("<rdf:Description"),
        xmp_packet("A dog")[:-100],
        xmp_packet("A dog").replace(b"A dog", b"A \xff\xfe dog"),
        b"\0" * 100,
        b"<?xml version='1.0' encoding='no-such'?><a/>",
    ],
)
def test_bombs_and_broken_xmp(photo, tmp_path, packet):
    start = time.perf_counter()
    exif = exif_of({BASE.ImageDescription: "A dog"})
    assert photo(xmp=packet, exif=exif).caption == "A dog"
    (tmp_path / "photo.xmp").write_bytes(packet)
    assert photo(exif=exif).caption == "A dog"
    assert time.perf_counter() - start < 5


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_no_damage_to_metadata_costs_the_picture(tmp_path):
    main = {BASE.Make: "Acme", BASE.Model: "One", BASE.ImageDescription: "A dog by the sea"}
    exif = exif_of(main, {BASE.DateTimeOriginal: "2021:06:05 14:03:02"}, ROME)
    xmp, iptc = xmp_packet("A dog", words=("a",)), iptc_block((120, b"A"), (25, b"b"))
    path = save(tmp_path / "photo.jpg", exif, xmp, iptc)
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    for part in (exif.tobytes(), xmp, iptc[4:]):
        start = sound.index(part)
        for _ in range(200):
            data = bytearray(sound)
            for at in rng.integers(start, start + len(part), 3):
                data[at] = rng.integers(0, 256)
            path.write_bytes(data)
            image, metadata = open_photo(path)
            assert image.size in ((40, 30), (30, 40))
            assert isinstance(metadata.caption, str | None)


# Side-car stamps


def test_the_stamp_tells_when_a_sidecar_comes_changes_and_goes(tmp_path):
    path, text = tmp_path / "photo.jpg", tmp_path / "photo.txt"
    stamps = [sidecar_stamp(path)]
    assert stamps == [0]
    for sidecar in (text, tmp_path / "photo.json", tmp_path / "photo.xmp", tmp_path / "photo.jpg.xmp"):
        sidecar.write_text("a dog")
        os.utime(sidecar, ns=(10**18, 10**18))
        stamps.append(sidecar_stamp(path))
    os.utime(text, ns=(10**18, 10**18 + 1))
    stamps.append(sidecar_stamp(path))
    text.unlink()
    stamps.append(sidecar_stamp(path))
    assert len(set(stamps)) == len(stamps)
    assert all(0 <= stamp < 1 << 63 for stamp in stamps)
    assert sidecar_stamp(path) == stamps[-1]


def test_with_the_names_in_the_folder_the_disk_is_looked_at_for_sidecars_only(tmp_path):
    path = tmp_path / "photo.jpg"
    (tmp_path / "photo.xmp").write_text("a dog")
    assert sidecar_stamp(path, {"photo.jpg"}) == 0
    assert sidecar_stamp(path, {"photo.jpg", "photo.xmp"}) == sidecar_stamp(path) != 0
    assert sidecar_stamp(path, {"photo.jpg", "photo.txt"}) == 0  # it has gone since the folder was listed
