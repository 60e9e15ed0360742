"""Pictures in archives and tables and on object storage, with the captions that lie beside them there."""

import hashlib
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captionfiles import pack, picture
from colours import ColourEmbedder, paint

from clipmatch import remote
from clipmatch.comparison import is_unchanged
from clipmatch.crawl import Found
from clipmatch.errors import Failure
from clipmatch.index import Index, name_of
from clipmatch.ingest import ingest
from clipmatch.listing import AWAY, GONE, files_at, pictures_in, taken_once, with_sidecars
from clipmatch.metadata import words_beside
from clipmatch.photo import Stamp
from clipmatch.preprocess import read_header
from clipmatch.remote import absolute
from clipmatch.sidecars import has_sidecars, told_stamp

XMP = (
    b"<x:xmpmeta xmlns:x='adobe:ns:meta/' xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'"
    b" xmlns:dc='http://purl.org/dc/elements/1.1/'><rdf:RDF><rdf:Description dc:description='A sky'/></rdf:RDF>"
    b"</x:xmpmeta>"
)
MEMBERS = [
    ("0.png", picture("red")),
    ("0.txt", b"A rose .\nA tulip .\n"),
    ("sub/0.png", picture("lime")),
    ("sub/0.json", b'{"key": "0", "caption": ["Grass .", "A lawn ."]}'),
    ("sub/1.png", picture("blue")),
    ("sub/1.png.xmp", XMP),
    ("2.png", picture("red")),  # as 0.png, with a caption of its own
    ("2.json", b'{"caption": "A cherry ."}'),
    ("3.png", picture("white")),
    ("3.json", b"no JSON"),
    ("4.png", picture("black")),
]
CAPTIONS = {
    "0.png": "A rose . A tulip .",
    "sub/0.png": "Grass . A lawn .",
    "sub/1.png": "A sky",
    "2.png": "A cherry .",
    "3.png": None,
    "4.png": None,
}


@pytest.fixture
def index(tmp_path):
    with Index.open(tmp_path / "photos.sqlite", ColourEmbedder()) as opened:
        yield opened


def captions(index, folder):
    return {photo.path.relative_to(folder).as_posix(): photo.metadata.caption for photo in index}


def later(path):
    stamp = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(stamp, stamp))


def test_captions_in_a_tar_archive(index, tmp_path):
    shard = pack(tmp_path / "shard.tar", MEMBERS)
    assert str(index.update([shard], progress=False)).startswith("6 added, 0 moved, 0 changed, 0 unchanged, 0 removed")
    assert captions(index, shard) == CAPTIONS
    assert str(index.update(progress=False)).startswith("0 added, 0 moved, 0 changed, 6 unchanged, 0 removed, 0 failed")
    later(pack(shard, [*MEMBERS, ("4.txt", b"Night .")]))
    assert index.update(progress=False).changed == 6  # their time is the archive's
    assert captions(index, shard) == {**CAPTIONS, "4.png": "Night ."}


def test_of_pictures_without_side_cars_nothing_is_looked_for(tmp_path):
    found = {item.path.name: item.stamp.sidecar for item in pictures_in(pack(tmp_path / "shard.tar", MEMBERS))}
    assert [name for name, sidecar in found.items() if not sidecar] == ["4.png"]


def test_an_archive_that_was_damaged_keeps_what_was_known_of_it(index, tmp_path):
    shard = pack(tmp_path / "shard.tar", MEMBERS)
    index.update([shard], progress=False)
    shard.write_bytes(b"nothing")
    summary = index.update(progress=False)
    assert [failure.path for failure in summary.failures] == [shard]
    assert "damaged or cut off after 0 files" in summary.failures[0].reason
    assert captions(index, shard) == CAPTIONS
    assert list(pictures_in(tmp_path / "gone.tar")) == [Failure(tmp_path / "gone.tar", "no such file or directory")]


def test_captions_in_a_table_with_pictures(index, tmp_path):
    table, images = tmp_path / "rows.parquet", [picture("red"), picture("lime"), picture("red")]
    pq.write_table(pa.table({"image": images, "Caption": [["A rose .", "A tulip ."], [], ["A cherry ."]]}), table)
    index.update([table], progress=False)
    expected = {"00000000": "A rose . A tulip .", "00000001": None, "00000002": "A cherry ."}
    assert captions(index, table) == expected
    assert index.update(progress=False).unchanged == 3
    numbered = {f"caption_{number}": [text] * 3 for number, text in enumerate(("One .", "Two ."))}
    pq.write_table(pa.table({"image": images, **numbered}), table)
    later(table)
    assert index.update(progress=False).changed == 3
    assert set(captions(index, table).values()) == {"One . Two ."}


@pytest.fixture
def named(tmp_path):
    """A table of paths, a row for each caption, beside the pictures: one with a text file."""
    folder = tmp_path / "named"
    for colour in ("red", "lime", "blue"):
        paint(folder / f"{colour}.png", colour)
    (folder / "red.txt").write_text("Beside it .")
    paths = ["red.png", "lime.png", "lime.png", "blue.png", "gone.png"]
    texts = ["In the table .", "Grass .", "A lawn .", None, "Nothing ."]
    pq.write_table(pa.table({"file_name": paths, "text": texts}), folder / "table.parquet")
    return folder


def test_captions_in_a_table_of_paths(index, named):
    summary = index.update([named / "table.parquet"], progress=False)
    assert (summary.added, summary.failures) == (3, [Failure(named / "gone.png", GONE)])
    expected = {"red.png": "Beside it .", "lime.png": "Grass . A lawn .", "blue.png": None}
    assert captions(index, named) == expected
    assert index.update(progress=False).unchanged == 3


def test_pictures_that_a_table_names_may_go(index, named):
    table = named / "table.parquet"
    index.update([table], progress=False)
    (named / "lime.png").unlink()
    summary = index.update(progress=False)
    assert (summary.unchanged, summary.removed) == (2, 1)
    assert summary.failures == [Failure(named / name, GONE) for name in ("lime.png", "gone.png")]
    assert captions(index, named).keys() == {"red.png", "blue.png"}


def test_a_damaged_picture_that_a_table_names_is_read_once_and_forgotten_when_it_goes(index, tmp_path):
    elsewhere, table = tmp_path / "elsewhere", tmp_path / "tables" / "table.parquet"
    paint(elsewhere / "red.png", "red")
    (elsewhere / "bad.png").write_bytes(b"no picture")
    table.parent.mkdir()
    pq.write_table(pa.table({"path": [str(elsewhere / name) for name in ("red.png", "bad.png")]}), table)
    first = index.update([table], progress=False)
    again = index.update(progress=False)
    assert (first.added, again.unchanged, again.failures) == (1, 1, first.failures)
    assert [failure.path for failure in index.store.failures()] == [elsewhere / "bad.png"]
    (elsewhere / "bad.png").write_bytes((elsewhere / "red.png").read_bytes())
    (elsewhere / "bad.png").write_bytes(b"still none, but another")
    assert [failure.path for failure in index.update(progress=False).failures] == [elsewhere / "bad.png"]
    (elsewhere / "bad.png").unlink()
    assert index.update(progress=False).failures == [Failure(elsewhere / "bad.png", GONE)]
    assert index.store.failures() == []


@pytest.mark.parametrize("away", ["the files", "the folder", "the place of a disk"])
def test_pictures_that_are_gone_all_at_once_stay_and_are_told_of(index, tmp_path, away):
    """As a folder that has vanished; those that the table names elsewhere are not concerned."""
    disk, table = tmp_path / "disk", tmp_path / "table.parquet"
    pictures = [paint(disk / f"{colour}.png", colour) for colour in ("red", "blue")]
    here = [paint(tmp_path / "here" / f"{colour}.png", colour) for colour in ("lime", "white")]
    pq.write_table(pa.table({"path": [str(path) for path in (*pictures, *here)]}), table)
    index.update([table], progress=False)
    unplugged = disk.rename(tmp_path / "unplugged")
    here[0].unlink()
    if away == "the files":
        paint(disk / "other.png", "black")
    elif away == "the place of a disk":
        disk.mkdir()
    summary = index.update(progress=False)
    assert (summary.unchanged, summary.removed) == (1, 1)
    assert summary.failures == [*(Failure(path, AWAY) for path in pictures), Failure(here[0], GONE)]
    assert {photo.path for photo in index} == {*pictures, here[1]}
    if disk.exists():
        shutil.rmtree(disk)
    unplugged.rename(disk)
    assert str(index.update(progress=False)) == "0 added, 0 moved, 0 changed, 3 unchanged, 0 removed, 1 failed"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_pictures_that_are_listed_and_named_by_a_table(index, named, order):
    """Whichever is seen last, a caption of the table stays, and what lies beside the picture goes before it."""
    expected = {"red.png": "Beside it .", "lime.png": "Grass . A lawn .", "blue.png": None}
    sources = [named / "table.parquet", named]
    for _ in range(2):
        for at in order:
            index.update([sources[at]], progress=False)
    assert captions(index, named) == expected
    assert [index.update([source], progress=False).changed for source in sources] == [0, 0]
    (named / "red.txt").unlink()
    for _ in range(2):
        for at in order:
            index.update([sources[at]], progress=False)
    assert captions(index, named) == {**expected, "red.png": "In the table ."}


@pytest.mark.parametrize("roots", [("table.parquet",), ("table.parquet", "."), (".", "table.parquet")])
def test_captions_follow_table_and_side_cars(index, named, roots):
    """What is taken away is noticed as well, and a side-car without words leaves those of the table."""
    table, sources = named / "table.parquet", [named / root for root in roots]
    (named / "blue.xmp").write_text("<x/>")
    paths = ["red.png", "lime.png", "blue.png"]

    def updated(*texts):
        pq.write_table(pa.table({"file_name": paths, "text": pa.array(texts, pa.string())}), table)
        index.update(sources, progress=False)
        assert (index.update(sources, progress=False).unchanged, index.update(progress=False).unchanged) == (3, 3)
        return [captions(index, named)[path] for path in paths]

    assert updated("Red .", "Lime .", "Blue .") == ["Beside it .", "Lime .", "Blue ."]
    (named / "red.txt").unlink()
    assert updated("Red .", None, "Sky .") == ["Red .", None, "Sky ."]


def test_a_picture_that_is_listed_and_named_is_one():
    """As on object storage, where a table doesn't know what lies beside the picture; in either order."""
    path = absolute("s3://bucket/a.png")
    listed = Found(path, Stamp(1, 2, 5 << 40))
    told = Found(path, Stamp(1, 2, told_stamp("A .", None)), "A .")
    both = Found(path, Stamp(1, 2, told_stamp("A .", 5 << 40)), "A .")
    assert taken_once([listed, told]) == taken_once([told, listed]) == [both]
    assert with_sidecars(told, listed.stamp) == both
    assert all(is_unchanged(item.stamp, both.stamp) for item in (listed, told, both))
    assert not is_unchanged(told.stamp, listed.stamp)  # it has something to say
    assert not is_unchanged(listed.stamp, told.stamp)
    assert is_unchanged(Stamp(1, 2), told.stamp)
    assert not is_unchanged(Stamp(1, 2, told_stamp(None, None)), both.stamp)  # its caption was taken away
    assert has_sidecars(both.stamp.sidecar)
    assert not has_sidecars(told.stamp.sidecar)


def test_captions_on_object_storage_cost_no_requests_where_there_are_none(tmp_path, monkeypatch):
    """One of fsspec's file systems, in memory; object storage itself is in test_lance_cluster.py."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for name, data in [*MEMBERS, ("shard.tar", pack(tmp_path / "shard.tar", MEMBERS).read_bytes())]:
        memory.pipe_file(f"/captions/photos/{name}", data)
    folder = absolute("fsspec+memory://captions/photos")
    asked = []
    status = remote.status_of
    monkeypatch.setattr("clipmatch.listing.status_of", lambda path: asked.append(path) or status(path))
    found = by_name(files_at(folder), folder)
    assert asked == []
    assert found.keys() == {*CAPTIONS, "shard.tar"}
    assert [name for name, item in found.items() if not item.stamp.sidecar] == ["4.png", "shard.tar"]
    pictures = {name: item for name, item in found.items() if name in CAPTIONS}
    beside = {name: item.path if has_sidecars(item.stamp.sidecar) else None for name, item in pictures.items()}
    read = {name: read_header(item.path, words_beside(beside[name])) for name, item in pictures.items()}
    assert {name: header.caption for name, header in read.items()} == CAPTIONS
    inside = by_name(pictures_in(folder / "shard.tar"), folder / "shard.tar")
    assert {name: read_header(item.path).caption for name, item in inside.items()} == CAPTIONS
    assert [item.stamp for item in files_at(folder / "0.png")] == [found["0.png"].stamp]
    memory.pipe_file("/captions/photos/4.txt", b"Night .")
    again = by_name(files_at(folder), folder)
    assert [name for name, item in again.items() if item != found[name]] == ["4.png"]


def test_a_caption_that_object_storage_does_not_give_comes_with_the_next_update(index, monkeypatch):
    """Of a picture that is embedded, and of its copy."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for name in "ab":
        memory.pipe_file(f"/busy/{name}.png", picture("red"))
        memory.pipe_file(f"/busy/{name}.txt", b"A rose .")
    files = list(files_at(absolute("fsspec+memory://busy")))
    index.store.bind(name_of(index.embedder))

    def taken():
        list(ingest(index.store, index.embedder, files, progress=False))
        known = {photo.path: photo.stamp for photo in index}
        unchanged = [is_unchanged(item.stamp, known[item.path]) for item in files]
        return [photo.metadata.caption for photo in index], unchanged

    def busy(path, limit):
        raise OSError("slow down")

    with monkeypatch.context() as patch:
        patch.setattr("clipmatch.metadata.read_small", busy)
        assert taken() == ([None, None], [False, False])
    assert taken() == (["A rose ."] * 2, [True, True])


def by_name(items, folder):
    return {item.path.relative_to(folder).as_posix(): item for item in items}


def test_an_archive_that_is_not_looked_into_keeps_its_pictures(index, tmp_path):
    """One machine reads archives that are named; a folder with one in it says nothing of what is inside."""
    shard = pack(tmp_path / "photos" / "shard.tar", MEMBERS)
    paint(tmp_path / "photos" / "lime.png", "lime")
    index.update([shard], progress=False)
    assert str(index.update([tmp_path / "photos"], progress=False)).startswith("1 added, 0 moved, 0 changed, 0 unch")
    assert len(index) == 7
    shard.unlink()
    assert index.update([tmp_path / "photos"], progress=False).removed == 6


def test_members_stay_in_their_archive(index, tmp_path):
    secret = paint(tmp_path / "secret.png", "red")
    names = (str(secret), "../secret.png", "..", "sub/../../a.png")
    shard = pack(tmp_path / "shard.tar", [(name, picture("blue")) for name in names])
    inside = sorted(item.path.relative_to(shard).as_posix() for item in pictures_in(shard))
    assert inside == sorted([str(secret)[1:], "secret.png", "sub/a.png"])
    assert index.update([shard], progress=False).added == 3
    assert {photo.digest for photo in index} == {hashlib.sha256(picture("blue")).hexdigest()}


def test_rows_of_a_table_that_name_nothing_are_listed(index, named):
    paths = ["https://example.com/a.jpg", "nul\0.png", None, "lime.png"]
    pq.write_table(pa.table({"url": pa.array(paths).dictionary_encode()}), named / "table.parquet")
    summary = index.update([named / "table.parquet"], progress=False)
    assert (summary.added, len(summary.failures)) == (1, 2)
    assert captions(index, named) == {"lime.png": None}


def test_a_table_of_bytes_that_are_no_text_is_a_failure(index, tmp_path):
    """As writers make them that don't look at what they write."""
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"image": [picture("red")], "caption": broken}), tmp_path / "rows.parquet")
    shard = pack(tmp_path / "shard.tar", MEMBERS)
    summary = index.update([tmp_path / "rows.parquet", shard], progress=False)
    assert summary.added == 6
    assert [failure.path.name for failure in summary.failures] == ["rows.parquet"]
