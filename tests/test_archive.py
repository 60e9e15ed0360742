"""Captions and pictures inside tar archives, whole and damaged."""

import gzip
import hashlib
import io
import json
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from captionfiles import add_images, captions_of, names, notes, pack, pack_rows, picture, webdataset, write
from click.testing import CliRunner

from clipmatch import archive
from clipmatch.cli import main
from clipmatch.config import DataConfig, PreprocessConfig, TrainConfig
from clipmatch.data import load_captions, read_split, select_part, shortest_names, split_captions
from clipmatch.embedder import read_batches
from clipmatch.errors import ClipmatchError
from clipmatch.features import content_keys
from clipmatch.preprocess import ImageError, Transform, load_image
from clipmatch.remote import absolute, open_raw
from clipmatch.training import train


def test_webdataset_by_file_folder_and_pattern(tmp_path):
    for shard in range(3):
        pack(tmp_path / f"{shard:05d}.tar", [("a.jpg", picture()), ("a.txt", f"Shard {shard} .".encode())])
    for source, shards in (("00001.tar", "1"), ("", "012"), ("{00000..00001}.tar", "01"), ("0000{0,2}.tar", "02")):
        found = load_captions(tmp_path / source)
        assert [row.captions for row in found.rows] == [(f"Shard {shard} .",) for shard in shards]
        assert [row.path for row in found.rows] == [tmp_path / f"0000{shard}.tar" / "a.jpg" for shard in shards]
    missing = load_captions(tmp_path / "{00002..00003}.tar")
    assert notes(missing.dropped) == [("sample 2", "00003.tar can't be read (No such file or directory)")]
    with pytest.raises(ClipmatchError, match="has no caption that can be read as webdataset"):
        load_captions(tmp_path / "{7..8}.tar")
    with pytest.raises(ClipmatchError, match=r"no caption file or folder .*7\.tar"):
        load_captions(tmp_path / "7.tar")


def test_patterns_say_what_is_wrong_with_them(tmp_path, monkeypatch):
    shard_of(tmp_path / "0.tar", 1)
    with pytest.raises(ClipmatchError, match=r"pattern .*\{0\.tar can't be understood"):
        load_captions(tmp_path / "{0.tar")
    with pytest.raises(ClipmatchError, match=r"no caption file or folder .*\{0,1\}\.txt"):
        load_captions(tmp_path / "{0,1}.txt")
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(ClipmatchError, match=r'need braceexpand; install it: pip install "clipmatch\[data\]"'):
        load_captions(tmp_path / "{0,1}.tar")
    assert len(load_captions(tmp_path / "0.tar").rows) == 1  # which needs none


def test_an_archive_of_other_caption_files_is_not_taken_for_them(tmp_path):
    path = pack(tmp_path / "Flickr8k_text.tar", [("Flickr8k.token.txt", b"a.jpg#0\tA dog .\n")])
    with pytest.raises(ClipmatchError, match=r"can be read as webdataset .*Flickr8k_text\.tar/Flickr8k has no picture"):
        load_captions(path)


def test_captions_of_samples_and_samples_that_lack_something(tmp_path):
    members = [
        ("./sub/one.jpg", picture(kind="JPEG")),  # as `tar cf x.tar .` writes names
        ("./sub/one.txt", "Un café .\r\n\r\nA coffee .".encode()),
        ("two.json", b'{"text": ["A cat .", "Two ears ."], "key": "two"}'),
        ("two.PNG", picture()),
        ("two.seg.png", picture("black")),
        ("three.jpg", picture()),
        ("four.txt", b"No picture ."),
        ("five.jpg", b""),
        ("five.txt", b"An empty picture ."),
        ("six.jpg", picture()),
        ("six.json", b'{"caption": "cut o'),
        ("seven.jpg", picture()),
        ("seven.txt", b" \n"),
        ("seven.json", b'{"caption": "From JSON ."}'),
        ("seven.txt", b"A second time ."),
        ("._seven.jpg", b"of a Mac"),
        ("nothing", b""),
    ]
    found = load_captions(pack(tmp_path / "x.tar", members))
    assert captions_of(found) == {
        "one.jpg": ["Un café .", "A coffee ."],
        "two.PNG": ["A cat .", "Two ears ."],
        "seven.jpg": ["From JSON ."],
    }
    assert found.rows[0].path == tmp_path / "x.tar" / "sub" / "one.jpg"
    assert notes(found.dropped) == [
        ("sample 3", "x.tar/three has no caption that can be read"),
        ("sample 4", "x.tar/four has no picture"),
        ("sample 5", "x.tar/five has no picture"),
        ("sample 6", "x.tar/six has no caption that can be read"),
    ]


def shard_of(path, count=4):
    members = [(f"{at}.{kind}", data) for at in range(count) for kind, data in (("png", picture()), ("txt", b"A ."))]
    return pack(path, members).read_bytes()


@pytest.mark.parametrize(
    ("end", "whole"),
    [
        (512 * 4 * 2 + 700, 2),  # inside the bytes of a picture
        (512 * 4 * 2 + 100, 2),  # inside a header
        (512 * 4 * 2, 2),  # between two members
        (512 * 4 * 2 + 512 * 2, 2),  # a picture without its text
        (512 * 4 * 4, 4),  # nothing but the end mark is lost
    ],
)
def test_an_archive_that_is_cut_off_gives_what_is_whole(tmp_path, end, whole):
    data = shard_of(tmp_path / "x.tar")
    assert len(picture()) < 512  # so that a member is a header and one block
    write(tmp_path / "x.tar", data[:end])
    found = load_captions(tmp_path / "x.tar")
    assert names(found.rows) == [f"{at}.png" for at in range(whole)]
    assert "damaged or cut off" in found.dropped[-1].text


def test_a_damaged_header_ends_an_archive_with_a_note_and_its_neighbours_are_read(tmp_path):
    data = bytearray(shard_of(tmp_path / "00.tar"))
    data[512 * 4 * 2 + 150 : 512 * 4 * 2 + 153] = b"XYZ"  # of the checksum
    write(tmp_path / "00.tar", bytes(data))
    shard_of(tmp_path / "01.tar", 1)
    write(tmp_path / "02.tar", b"no archive at all")
    write(tmp_path / "03.tar", b"")
    found = load_captions(tmp_path)
    assert [row.path.relative_to(tmp_path).as_posix() for row in found.rows] == [
        "00.tar/0.png",
        "00.tar/1.png",
        "01.tar/0.png",
    ]
    assert [note.text.split(" is ")[0] for note in found.dropped] == ["00.tar", "02.tar", "03.tar"]


def test_the_names_of_shards_tell_their_split(tmp_path):
    for part, count in (("train", 3), ("val", 1), ("test", 2)):
        shard_of(tmp_path / f"flickr-{part}-000.tar", count)
    splits = split_captions(load_captions(tmp_path))
    assert {row.path.parent.name for row in splits.train} == {"flickr-train-000.tar"}
    assert {row.path.parent.name for row in splits.dev} == {"flickr-val-000.tar"}
    written = shortest_names([row.path for row in splits.train + splits.dev])
    assert written[0] == "flickr-train-000.tar/0.png"  # 0.png alone would be an image of dev too
    dev = select_part(load_captions(tmp_path), write(tmp_path / "dev.txt", "\n".join(written[3:])))
    assert [row.path for row in dev.rows] == [row.path for row in splits.dev]


def test_pictures_are_read_out_of_an_archive_in_threads_and_processes(tmp_path):
    colours = ["red", "lime", "blue", "black"]
    members = [(f"{name}.{kind}", data) for name in colours for kind, data in (("png", picture(name)), ("txt", b"A ."))]
    found = load_captions(pack(tmp_path / "x.tar", [*members, ("bad.png", b"no picture"), ("bad.txt", b"B .")]))
    paths = [row.path for row in found.rows]
    assert load_image(paths[2]).getpixel((0, 0)) == (0, 0, 255)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        pixels = [image.getpixel((0, 0)) for image in pool.map(load_image, paths[:4])]
    assert pixels == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]
    (batch,) = read_batches(paths, Transform(PreprocessConfig(size=8)))
    assert batch.paths == paths[:4]
    assert [(failure.path, failure.reason) for failure in batch.failures] == [
        (paths[4], "it is not an image in a known format")
    ]


def test_the_feature_cache_knows_pictures_in_archives_by_their_bytes(tmp_path):
    data = picture()
    member = load_captions(pack(tmp_path / "x.tar", [("a.png", data), ("a.txt", b"A .")])).rows[0].path
    plain = write(tmp_path / "plain.png", data)
    (one, other, absent), failures = content_keys([member, plain, member.with_name("b.png")])
    assert one == other != ""
    assert absent == ""
    assert [failure.reason for failure in failures] == ["No such file or directory"]


def test_paths_into_archives_are_told_from_others(tmp_path):
    shard_of(tmp_path / "x.tar", 1)
    folder = add_images(tmp_path / "folder.tar", "a.jpg")  # a folder may be called so
    assert archive.locate(folder / "a.jpg") is None
    assert archive.is_file(folder / "a.jpg")
    assert archive.is_file(tmp_path / "x.tar")
    assert archive.locate(tmp_path / "x.tar" / "s" / "0.png") == (tmp_path / "x.tar", "s/0.png")
    assert archive.is_file(tmp_path / "x.tar" / "0.png")
    assert not archive.is_file(tmp_path / "x.tar" / "9.png")
    assert not archive.is_file(tmp_path / "absent.tar" / "0.png")
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "x.tar" / "9.png")


def test_an_archive_that_changes_is_looked_through_again(tmp_path):
    path = tmp_path / "x.tar"
    shard_of(path, 1)
    assert not archive.is_file(path / "2.png")
    shard_of(path, 3)
    assert archive.is_file(path / "2.png")
    path.write_bytes(path.read_bytes()[:550])
    with pytest.raises(ImageError):
        load_image(path / "0.png")


def test_rows_travel_to_worker_processes(tmp_path):
    row = load_captions(webdataset(tmp_path)).rows[0]
    assert pickle.loads(pickle.dumps(row)) == row
    assert isinstance(row.path, Path)


@pytest.fixture
def shards(scenes, tmp_path):
    """Scenes in three archives, a part each; the names of their members begin anew in each. -> a pattern"""
    splits = split_captions(load_captions(scenes))
    for part, rows in (("train", splits.train[:24]), ("val", splits.dev[:12]), ("test", splits.dev[12:])):
        pack_rows(tmp_path / "shards" / f"{part}.tar", rows)
    return tmp_path / "shards" / "{train,val,test}.tar"


@pytest.mark.parametrize("tune", ["none", "all"], ids=["cached features", "worker process"])
def test_a_model_learns_from_archives(shards, model_folder, tmp_path, tune):
    workers = {"workers": 1} if tune == "all" else {}
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=1, batch_size=8, tune_image=tune, **workers)
    result = train(DataConfig(str(shards)), settings, model_folder, progress=False)
    assert (result.finished, result.failures) == (True, [])
    written = [read_split(tmp_path / "run" / "splits" / f"{part}.txt") for part in ("train", "dev")]
    assert [len(part) for part in written] == [24, 12]
    assert not set(written[0]).intersection(written[1])


def test_a_model_is_measured_on_the_test_part_of_archives(shards, model_folder, tmp_path):
    options = ["--model", str(model_folder), "--captions", str(shards), "--device", "cpu"]
    done = CliRunner().invoke(main, ["evaluate", *options, "--split", "test", "--json", "-"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert (figures["images"], figures["failures"]) == (8, [])
    other = CliRunner().invoke(main, ["evaluate", *options, "--split", "tset", "--json", "-"])
    assert other.stderr == "Error: Cannot read tset: No such file or directory.\n"


def test_a_compressed_archive_is_said_to_be_one(tmp_path):
    shard_of(tmp_path / "plain.tar")
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress((tmp_path / "plain.tar").read_bytes()))
    with pytest.raises(ClipmatchError, match=r"packed.tar is compressed by gzip; unpack it first"):
        load_captions(packed)
    with pytest.raises(ClipmatchError, match=r"packed.tar.gz is compressed by gzip; unpack it, and give what is insid"):
        load_captions(packed.rename(tmp_path / "packed.tar.gz"))


def test_headers_on_object_storage_are_read_many_at_once(tmp_path, monkeypatch):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    shard = pack(tmp_path / "x.tar", [(f"{number}.png", picture("red")) for number in range(100)])
    memory.pipe_file("/headers/x.tar", shard.read_bytes())
    reads = []

    class Counting(io.RawIOBase):
        """A file of Arrow, each read of which is a request."""

        def __init__(self, path):
            self.file = open_raw(path)

        def readable(self):
            return True

        def seekable(self):
            return True

        def seek(self, offset, whence=0):
            return self.file.seek(offset, whence)

        def tell(self):
            return self.file.tell()

        def readinto(self, buffer):
            reads.append(len(buffer))
            return self.file.readinto(buffer)

    monkeypatch.setattr(archive, "open_raw", Counting)
    assert len(archive.contents(absolute("fsspec+memory://headers/x.tar")).members) == 100
    assert 0 < len(reads) < 20


def test_a_picture_on_object_storage_is_fetched_once_for_both_of_its_readers(tmp_path, monkeypatch):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    shard = pack(tmp_path / "x.tar", [("0.png", picture("red"))])
    memory.pipe_file("/once/x.tar", shard.read_bytes())
    memory.pipe_file("/once/0.png", picture("red"))
    fetched = []
    monkeypatch.setattr(archive, "read_now", lambda path, read=archive.read_now: fetched.append(path) or read(path))
    for path in (absolute("fsspec+memory://once/x.tar") / "0.png", absolute("fsspec+memory://once/0.png")):
        assert archive.digest_of(path) == hashlib.sha256(picture("red")).hexdigest()
        assert load_image(path).getpixel((0, 0)) == (255, 0, 0)
        assert fetched.count(path) == 1


def test_what_was_read_of_object_storage_before_is_not_hashed(tmp_path):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    path = absolute("fsspec+memory://stale/a.png")
    for colour in ("red", "blue"):
        memory.pipe_file("/stale/a.png", picture(colour))
        load_image(path)
        assert archive.digest_of(path) == hashlib.sha256(picture(colour)).hexdigest()
