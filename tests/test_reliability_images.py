"""Bad pictures: the whole corpus through the real commands, and each thing that once went wrong with one of them."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from colours import ColourEmbedder, paint

from clipmatch import preprocess
from clipmatch.archive import read_bytes
from clipmatch.cli import main
from clipmatch.data import load_captions
from clipmatch.index import Index
from clipmatch.ingest import CHANGED, hash_files
from clipmatch.output import copy_file, place_matches
from clipmatch.preprocess import ImageError, load_image, open_photo
from clipmatch.search import Match

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import badimages  # noqa: E402


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The bad pictures, but for the largest."""
    folder = tmp_path_factory.mktemp("bad") / "corpus"
    return {case.path.relative_to(folder).as_posix(): case for case in badimages.make_corpus(folder, bombs=False)}


def test_no_command_loses_a_picture_or_its_nerve(tmp_path):
    script = ROOT / "benchmarks" / "reliability_images.py"
    options = ["--no-bombs", "--rounds", "index", "evaluate", "serve", "--json", str(tmp_path / "result.json")]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    rounds = json.loads((tmp_path / "result.json").read_text())["rounds"]
    assert {name: found["lost"] for name, found in rounds.items()} == {"index": {}, "evaluate": {}, "serve": {}}
    assert rounds["index"]["tried"] >= 450
    assert 16 <= rounds["index"]["kinds"]["while it changes"][0] <= 24  # of which eight come and go
    assert rounds["index"]["survived"] + rounds["index"]["listed"] == rounds["index"]["tried"]
    assert rounds["index"]["difference"] <= 1e-5
    assert max(found["peak_mb"] for found in rounds.values()) < 2000


# Files that are none


@pytest.mark.parametrize("name", ["pipe.jpg", "endless.jpg", "nothing.jpg", "socket.png"])
def test_what_is_no_regular_file_is_neither_waited_for_nor_read_without_end(corpus, name):
    path = corpus[f"no_files/{name}"].path
    assert [failure.reason for failure in hash_files([path])[1]] == ["it is not a regular file"]
    with pytest.raises(ImageError, match="it is not a regular file"):
        load_image(path)
    with pytest.raises(OSError, match="it is not a regular file"):
        read_bytes(path)


def test_a_pipe_in_the_place_of_a_match_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "photo.jpg")
    failures = place_matches([Match(tmp_path / "photo.jpg", 1.0)], tmp_path / "out", copy_file)
    assert [failure.reason for failure in failures] == ["it is not a regular file"]


def test_a_pipe_beside_a_picture_is_no_caption_and_not_waited_for(tmp_path):
    for name in ("a", "b"):
        paint(tmp_path / f"{name}.png", (255, 0, 0))
    (tmp_path / "a.txt").write_text("A dog .")
    os.mkfifo(tmp_path / "b.txt")
    found = load_captions(tmp_path, format="image-folder")
    assert [note.text for note in found.dropped] == ["b.txt can't be read (it is not a regular file)"]


# Files that change


class Restless(ColourEmbedder):
    """A model before whose eyes files change, once they have been read."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def embed_images(self, paths, progress=True, read=load_image):
        made = super().embed_images(paths, progress, read)
        self.change()
        return made


def other_time(path):
    """Make sure that a file's time differs."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: other_time(paint(path, (0, 0, 255))), CHANGED),
        (lambda path: path.open("ab").write(b"more"), CHANGED),
        (lambda path: path.unlink(), "no such file or directory"),
    ],
    ids=["replaced", "grown", "gone"],
)
def test_a_file_that_changes_while_it_is_read_is_taken_in_next_time(photos, tmp_path, change, reason):
    red, model = photos / "red.png", Restless(lambda: None)
    with Index.open(tmp_path / "index.sqlite", model) as index:
        model.change = lambda: change(red)
        summary = index.update([photos], progress=False)
        assert [(failure.path, failure.reason) for failure in summary.failures] == [(red, reason)]
        assert summary.added == 3
        model.change = lambda: None
        summary = index.update(progress=False)
        assert summary.failures == []
        assert summary.added == int(red.exists())
        if reason == CHANGED:
            assert index.store.rows_of([red])[red] == pytest.approx(ColourEmbedder().embed_images([red]).rows[0])


def test_copies_of_a_file_that_changes_do_not_get_its_new_vector(photos, tmp_path):
    red, copy = photos / "red.png", photos / "the same.png"
    copy.write_bytes(red.read_bytes())
    model = Restless(lambda: other_time(paint(red, (0, 0, 255))))
    with Index.open(tmp_path / "index.sqlite", model) as index:
        assert {failure.path for failure in index.update([photos], progress=False).failures} == {red, copy}
        model.change = lambda: None
        index.update(progress=False)
        rows = index.store.rows_of([red, copy])
    assert rows[copy] == pytest.approx([1, 0, 0], abs=0.01)
    assert rows[red] == pytest.approx([0, 0, 1], abs=0.01)


def test_a_file_that_grows_as_fast_as_it_is_read_is_hashed_to_where_it_ended(tmp_path, monkeypatch):
    path = tmp_path / "grows.jpg"
    path.write_bytes(b"x" * 100)

    class Growing(io.FileIO):
        def read(self, count=-1):
            with path.open("ab") as file:
                file.write(b"y" * 20)
            return super().read(count)

    monkeypatch.setattr("clipmatch.archive.READ", 10)
    monkeypatch.setattr("clipmatch.archive.open_file", Growing)
    assert hash_files([path]) == ({path: hashlib.sha256(b"x" * 100).hexdigest()}, [])


# Damage and bombs


def test_a_damaged_png_is_told_when_its_header_is_read_too(corpus):
    path = corpus["bits_flipped/PNG_0.png"].path
    for read in (load_image, open_photo):
        with pytest.raises(ImageError, match="broken data stream"):
            read(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bombs/50000x50000.png", "50000 x 50000 pixels are more than the limit of 200 million"),
        ("bombs/long.png", "of 150000000 x 1 pixels one side is longer than the limit of 300,000"),
        ("bombs/tall.png", "of 1 x 150000000 pixels one side is longer than the limit of 300,000"),
        ("bombs/scans.jpg", "its 20,000 scans are more than the limit of 100"),
        ("misnamed/byte.jpg", "it is not an image in a known format"),
    ],
)
def test_a_bomb_is_refused_with_a_clear_reason(corpus, name, reason):
    with pytest.raises(ImageError) as caught:
        load_image(corpus[name].path)
    assert caught.value.reason == reason


def test_a_progressive_picture_has_few_scans_whatever_lies_in_it(tmp_path):
    data = badimages.encoded(badimages.scene(), "progressive")
    with (tmp_path / "a.jpg").open("w+b") as file:
        file.write(data + b"\xff\xda" * 5000)  # as in a film behind it
        file.seek(7)
        assert 5 < preprocess.count_scans(file) < 20
        assert file.tell() == 7
    assert load_image(tmp_path / "a.jpg").size == badimages.SIZE


def test_bands_are_as_good_as_the_whole(corpus, monkeypatch):
    cases = [case for name, case in corpus.items() if name.startswith(("modes/", "EXIF/turned"))]
    whole = [np.asarray(load_image(case.path)) for case in cases]
    monkeypatch.setattr(preprocess, "BAND", 96 * 7)
    for case, pixels in zip(cases, whole, strict=True):
        assert np.array_equal(np.asarray(load_image(case.path)), pixels), case.path.name


def test_a_large_picture_is_reduced_to_no_less_than_what_is_asked_for(corpus, monkeypatch):
    path = corpus["modes/alpha.png"].path
    whole = load_image(path, 10)
    monkeypatch.setattr(preprocess, "LARGE", 1000)
    monkeypatch.setattr(preprocess, "BAND", 96 * 7)
    reduced = load_image(path, 10)
    assert (whole.size, reduced.size) == ((96, 72), (32, 24))
    assert np.array_equal(np.asarray(reduced), np.asarray(whole.reduce(3)))
    assert load_image(path).size == (96, 72)


def test_turned_pictures_are_the_same_picture(corpus):
    upright = np.asarray(load_image(corpus["EXIF/turned_1.png"].path))
    for orientation in range(2, 9):
        assert np.array_equal(np.asarray(load_image(corpus[f"EXIF/turned_{orientation}.png"].path)), upright)


# Names


def test_a_name_as_long_as_may_be_is_shortened_in_a_folder_of_copies(corpus, tmp_path):
    long = [case.path for case in corpus.values() if len(os.fsencode(case.path.name)) > 250]
    assert len(long) == 2
    assert place_matches([Match(path, 1.0) for path in long], tmp_path / "out", copy_file) == []
    copies = sorted((tmp_path / "out").iterdir())
    assert [path.read_bytes() for path in copies] == [path.read_bytes() for path in long]
    assert [path.suffix for path in copies] == [".jpg", ".jpg"]


def test_names_with_spaces_and_backslashes_are_found_as_they_are_written(tmp_path):
    for name in (" space .jpg", "back\\slash.jpg"):
        (tmp_path / name).write_bytes(b"x")
    lines = [json.dumps({"image": name, "caption": "A dog ."}) for name in (" space .jpg", "back\\slash.jpg")]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    found = load_captions(tmp_path / "captions.jsonl", tmp_path)
    assert [row.path.name for row in found.rows] == [" space .jpg", "back\\slash.jpg"]
    assert found.missing == ()


def test_what_a_caption_file_says_cannot_play_with_the_terminal(tmp_path):
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": "\x1b[2J\n.jpg", "caption": "A dog ."}))
    result = CliRunner().invoke(main, ["evaluate", "--captions", str(tmp_path / "captions.jsonl")])
    assert result.exit_code == 1
    assert "\x1b" not in result.stderr
    assert result.stderr.count("\n") == 1
    assert "\\x1b[2J\\n.jpg" in result.stderr


def test_every_kind_of_name_is_stored_and_listed_safely(corpus, tmp_path):
    folder = next(iter(corpus.values())).path.parents[1] / "names"
    with Index.open(tmp_path / "index.sqlite", ColourEmbedder()) as index:
        index.update([folder], progress=False)
        assert {photo.path for photo in index} == {case.path for case in corpus.values() if case.kind == "names"}
