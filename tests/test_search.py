"""The remembered vectors and the search over them."""

import os
import shutil
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipmatch.calibration import Bank, Calibration
from clipmatch.embedder import Failure, ImageEmbeddings, load_model
from clipmatch.errors import ClipmatchError
from clipmatch.index import embed_remembered, list_images, store_path
from clipmatch.search import Match, Matches, find_matches

COLOURS = {"red": 0, "green": 1, "blue": 2}


class ColourEmbedder:
    """An embedder whose vectors can be read: the share of red, green and blue. Counts the files it was given."""

    dim = 3

    def __init__(self, fingerprint="colours"):
        self.fingerprint = fingerprint
        self.seen = []

    def embed_images(self, paths, progress=True):
        rows, good, failures = [], [], []
        for path in paths:
            self.seen.append(path)
            try:
                row = np.asarray(Image.open(path).convert("RGB"), np.float32)[0, 0]
            except OSError:
                failures.append(Failure(path, "broken"))
                continue
            rows.append(row / np.linalg.norm(row))
            good.append(path)
        return ImageEmbeddings(np.array(rows, np.float32).reshape(-1, 3), good, failures)

    def embed_texts(self, texts, progress=False):
        return np.array([np.eye(3)[COLOURS[text]] for text in texts], np.float32)


def paint(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path, format="PNG")
    return path


@pytest.fixture
def photos(tmp_path):
    """red.png, sub/green.png, sub/blue.png, and an orange one that is a little green."""
    folder = tmp_path / "photos"
    paint(folder / "red.png", (255, 0, 0))
    paint(folder / "orange.png", (255, 100, 0))
    paint(folder / "sub" / "green.png", (0, 255, 0))
    paint(folder / "sub" / "blue.png", (0, 0, 255))
    return folder


# Which files


def test_pictures_of_a_folder_in_order(photos):
    (photos / "notes.txt").write_text("no picture")
    paint(photos / ".hidden.png", "red")
    paint(photos / ".thumbnails" / "red.png", "red")
    shutil.copy(photos / "red.png", photos / "UPPER.PNG")
    found = [str(path.relative_to(photos)) for path in list_images(photos)]
    assert found == ["UPPER.PNG", "orange.png", "red.png", "sub/blue.png", "sub/green.png"]


def test_a_file_stands_for_itself(photos):
    assert list_images(photos / "red.png") == [photos / "red.png"]


def test_folders_without_pictures(tmp_path):
    with pytest.raises(ClipmatchError, match="nowhere does not exist; check its name"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClipmatchError, match=r"empty holds no pictures \(.bmp, .gif, .jpeg"):
        list_images(tmp_path / "empty")


# What is remembered


def test_a_picture_is_embedded_once(photos, own_cache):
    embedder, paths = ColourEmbedder(), list_images(photos)
    first = embed_remembered(embedder, paths)
    assert embedder.seen == paths
    second = embed_remembered(embedder, paths)
    assert embedder.seen == paths
    assert second.paths == paths
    assert np.array_equal(first.rows, second.rows)
    assert store_path() == own_cache / "vectors.sqlite"
    assert store_path().is_file()


def test_only_new_and_changed_pictures_are_embedded(photos):
    embedder = ColourEmbedder()
    embed_remembered(embedder, list_images(photos))
    embedder.seen.clear()
    new, changed = paint(photos / "new.png", (0, 0, 255)), paint(photos / "red.png", (0, 255, 0))
    os.utime(changed, ns=(time.time_ns() + 10**9,) * 2)  # also where the clock is coarse and the size the same
    found = embed_remembered(embedder, list_images(photos))
    assert sorted(embedder.seen) == [new, changed]
    assert found.rows[found.paths.index(changed)].tolist() == [0, 1, 0]
    assert found.paths == list_images(photos)


def test_a_picture_that_is_gone_is_gone(photos):
    embedder = ColourEmbedder()
    embed_remembered(embedder, list_images(photos))
    (photos / "red.png").unlink()
    assert photos / "red.png" not in embed_remembered(embedder, list_images(photos)).paths
    asked = embed_remembered(embedder, [photos / "red.png"])
    assert asked.paths == []
    assert [failure.path for failure in asked.failures] == [photos / "red.png"]


def test_models_do_not_share_vectors(photos):
    one, other = ColourEmbedder("one"), ColourEmbedder("other")
    embed_remembered(one, list_images(photos))
    embed_remembered(other, list_images(photos))
    assert len(other.seen) == 4
    one.seen.clear()
    embed_remembered(one, list_images(photos))
    assert one.seen == []


def test_a_bad_picture_is_reported_each_time_and_costs_no_other(photos):
    embedder, bad = ColourEmbedder(), photos / "bad.png"
    bad.write_bytes(b"not a picture")
    for _ in range(2):
        found = embed_remembered(embedder, list_images(photos))
        assert [failure.path for failure in found.failures] == [bad]
        assert len(found.paths) == 4
    assert embedder.seen.count(bad) == 2


def test_an_interruption_keeps_what_was_done(photos, monkeypatch):
    monkeypatch.setattr("clipmatch.index.CHUNK", 2)
    embedder, paths = ColourEmbedder(), list_images(photos)
    calls = []

    def interrupted(chunk, progress=True):
        calls.append(chunk)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ColourEmbedder.embed_images(embedder, chunk)

    embedder.embed_images = interrupted
    with pytest.raises(KeyboardInterrupt):
        embed_remembered(embedder, paths)
    del embedder.embed_images
    embedder.seen.clear()
    embed_remembered(embedder, paths)
    assert embedder.seen == paths[2:]


@pytest.mark.parametrize("name", [b"caf\xe9.png", b'it\'s "quoted".png', b"two\nlines.png", "Ω ☃.png".encode()])
def test_awkward_names(tmp_path, name):
    folder = os.fsencode(tmp_path / "odd")
    os.mkdir(folder)  # noqa: PTH102 - a name of bytes
    try:
        with open(os.path.join(folder, name), "wb") as file:  # noqa: PTH118, PTH123
            Image.new("RGB", (8, 8), "red").save(file, format="PNG")
    except OSError:
        pytest.skip("this file system takes no such name")
    embedder = ColourEmbedder()
    for _ in range(2):
        (match,) = find_matches("red", embedder, tmp_path / "odd")
        assert os.fsencode(match.path) == os.path.join(folder, name)  # noqa: PTH118
    assert len(embedder.seen) == 1


def test_two_names_that_differ_in_a_stray_byte_are_two_files(tmp_path):
    names = [os.fsdecode(b"a\xe9.png"), "a\\xe9.png"]
    try:
        paint(tmp_path / "p" / names[0], (255, 0, 0))
    except OSError:
        pytest.skip("this file system takes no such name")
    paint(tmp_path / "p" / names[1], (0, 0, 255))
    for path in list_images(tmp_path / "p"):
        os.utime(path, ns=(0, 0))  # the same time and, nearly always, the same size
    embedder = ColourEmbedder()
    for _ in range(2):
        scores = {match.path.name: round(match.score) for match in find_matches("red", embedder, tmp_path / "p")}
        assert scores == {names[0]: 1, names[1]: 0}


def test_a_store_that_is_damaged_or_newer(photos, own_cache):
    own_cache.mkdir()
    (own_cache / "vectors.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(ClipmatchError, match=r"vectors.sqlite can't be used .*; delete it, or set CLIPMATCH_CACHE"):
        find_matches("red", ColourEmbedder(), photos)
    (own_cache / "vectors.sqlite").unlink()
    with sqlite3.connect(own_cache / "vectors.sqlite") as store:
        store.execute("PRAGMA user_version=99")
    store.close()
    with pytest.raises(ClipmatchError, match=r"is from a newer clipmatch; upgrade, or delete that file"):
        find_matches("red", ColourEmbedder(), photos)


def test_a_store_damaged_inside(photos, own_cache):
    find_matches("red", ColourEmbedder(), photos)
    path = own_cache / "vectors.sqlite"
    with sqlite3.connect(path) as store:
        store.execute("DROP TABLE vectors")
        store.execute("CREATE TABLE vectors (something TEXT)")
    store.close()
    with pytest.raises(ClipmatchError, match=r"vectors.sqlite can't be used .*; delete it"):
        find_matches("red", ColourEmbedder(), photos)


def test_a_cache_folder_that_can_not_be_made(photos, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIPMATCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ClipmatchError, match=r"can't be made \(.*\); .*set CLIPMATCH_CACHE"):
        find_matches("red", ColourEmbedder(), photos)


# Searching


def test_best_first(photos):
    matches = find_matches("red", ColourEmbedder(), photos)
    assert [match.path.name for match in matches[:2]] == ["red.png", "orange.png"]
    assert matches[0] == Match(photos / "red.png", 1.0)
    assert matches[1].score == pytest.approx(255 / np.hypot(255, 100))
    assert [match.score for match in matches[2:]] == [0, 0]
    assert matches.query == "red"


def test_top_k(photos):
    assert len(find_matches("red", ColourEmbedder(), photos, top_k=2)) == 2
    assert len(find_matches("red", ColourEmbedder(), photos, top_k=99)) == 4


def test_a_list_of_files_or_one_file(photos):
    some = [photos / "orange.png", str(photos / "sub" / "blue.png")]
    assert [match.path.name for match in find_matches("red", ColourEmbedder(), some)] == ["orange.png", "blue.png"]
    assert [match.path.name for match in find_matches("blue", ColourEmbedder(), photos / "red.png")] == ["red.png"]


def test_failures_come_with_the_matches(photos):
    (photos / "bad.jpg").write_bytes(b"x")
    matches = find_matches("green", ColourEmbedder(), photos)
    assert matches[0].path.name == "green.png"
    assert matches.failures == [Failure(photos / "bad.jpg", "broken")]


@pytest.mark.parametrize(
    ("query", "images", "top_k", "sentence"),
    [
        ("  ", "photos", 9, "The query is empty; type what the photograph shows"),
        ("red", "photos", 0, "top_k is 0; ask for at least one match"),
        ("red", "nowhere", 9, "does not exist"),
        ("red", [], 9, "The list of images is empty"),
        ("red", ["gone.png"], 9, "None of the 1 images can be read; the first: broken"),
    ],
)
def test_searches_that_can_not_work(photos, monkeypatch, query, images, top_k, sentence):
    monkeypatch.chdir(photos.parent)
    with pytest.raises(ClipmatchError, match=sentence):
        find_matches(query, ColourEmbedder(), images, top_k)


def test_with_a_model_folder(model_folder, scenes):
    matches = find_matches("a red circle", model_folder, scenes / "Images", top_k=3)
    embedder = load_model(model_folder, device="cpu")
    everything = embedder.embed_images(list_images(scenes / "Images"))
    scores = everything.rows @ embedder.embed_texts(["a red circle"])[0]
    assert [match.score for match in matches] == pytest.approx(sorted(scores.tolist(), reverse=True)[:3], abs=1e-5)


def test_without_a_model_and_a_folder(photos, monkeypatch):
    """The model that comes with the package, the pictures that are here."""
    monkeypatch.setattr("clipmatch.search.load_model", lambda name: {None: ColourEmbedder()}[name])
    monkeypatch.chdir(photos)
    assert find_matches("red", top_k=1) == [Match(Path("red.png"), 1.0)]


def test_matches_show_themselves_in_a_notebook(photos):
    matches = find_matches("red", ColourEmbedder(), photos, top_k=2)
    assert matches._repr_png_().startswith(b"\x89PNG")
    assert Matches("red", [])._repr_png_() is None


def test_an_image_that_is_near_to_everything_comes_later(tmp_path):
    """Purple has a little more of red than orange has, but it is also near to the bank's caption, blue."""
    paint(tmp_path / "two" / "orange.png", (255, 160, 0))
    paint(tmp_path / "two" / "purple.png", (255, 0, 150))
    model = ColourEmbedder()
    by_cosine = find_matches("red", model, tmp_path / "two")
    assert [match.path.stem for match in by_cosine] == ["purple", "orange"]
    axes = np.eye(3, dtype=np.float16)
    model.calibration = Calibration((0.0, 10.0, -10.0, 0.0), 0.99, Bank(axes[:1], axes[2:]), "colours")
    found = find_matches("red", model, tmp_path / "two")
    assert [match.path.stem for match in found] == ["orange", "purple"]
    assert found[0].score < found[1].score
    assert found[0].confidence > 0.9 > 0.1 > found[1].confidence
