"""Queries, and what is found."""

import sys
from pathlib import Path

import numpy as np
import pytest
from colours import ColourEmbedder, paint
from PIL import Image

from clipmatch import search
from clipmatch.calibration import Bank, Calibration
from clipmatch.crawl import list_images
from clipmatch.duplicates import group_near
from clipmatch.embedder import ImageEmbeddings, load_model
from clipmatch.errors import ClipmatchError, Failure
from clipmatch.index import Index, find_matches
from clipmatch.photo import Metadata, Photo, Stamp
from clipmatch.preprocess import load_image
from clipmatch.query import Term, parse_query
from clipmatch.search import Matches, Request
from clipmatch.store import Filter, ModelName


def test_best_first(photos):
    matches = find_matches("red", ColourEmbedder(), photos)
    assert [match.path.name for match in matches[:2]] == ["red.png", "orange.png"]
    assert matches[0].path == photos / "red.png"
    assert matches[0].score == pytest.approx(1, abs=1e-4)
    assert matches[1].score == pytest.approx(255 / np.hypot(255, 100), abs=1e-4)
    assert [match.score for match in matches[2:]] == pytest.approx([0, 0], abs=1e-4)
    assert matches.query == "red"


def test_top_k(photos):
    assert len(find_matches("red", ColourEmbedder(), photos, top_k=2)) == 2
    assert len(find_matches("red", ColourEmbedder(), photos, top_k=99)) == 4


def test_a_list_of_files_or_one_file(photos):
    some = [photos / "orange.png", str(photos / "sub" / "blue.png")]
    assert [match.path.name for match in find_matches("red", ColourEmbedder(), some)] == ["orange.png", "blue.png"]
    assert [match.path.name for match in find_matches("blue", ColourEmbedder(), photos / "red.png")] == ["red.png"]


def test_failures_come_with_the_matches(photos):
    (photos / "bad.jpg").write_bytes(b"no picture at all")
    matches = find_matches("green", ColourEmbedder(), photos)
    assert matches[0].path.name == "green.png"
    assert matches.failures == [Failure(photos / "bad.jpg", "it is not an image in a known format")]


@pytest.mark.parametrize(
    ("query", "images", "top_k", "sentence"),
    [
        ("  ", "photos", 9, "The query is empty; type what the photograph shows"),
        ("red", "photos", 0, "top_k is 0; it starts at 1"),
        ("red", "nowhere", 9, "does not exist"),
        ("red", [], 9, "The list of images is empty"),
        ("red", ["gone.png", "gone.jpg"], 9, "None of the 2 images can be read; the first: does not exist"),
        ("red", ["gone.png"], 9, "gone.png does not exist"),
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
    monkeypatch.setattr("clipmatch.index.load_model", lambda name: {None: ColourEmbedder()}[name])
    monkeypatch.chdir(photos)
    assert [match.path for match in find_matches("red", top_k=1)] == [Path("red.png")]


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


# Queries of several parts


@pytest.fixture
def index(kind, photos, tmp_path):
    """The four pictures, indexed."""
    with Index.open(tmp_path / f"photos.{kind}", ColourEmbedder()) as opened:
        opened.update([photos], progress=False)
        yield opened


def names(matches):
    return [match.path.stem for match in matches]


def ask(index, query, **settings):
    return index.find(query, **{"duplicates": "show", **settings})


def test_a_query_as_it_is_read(photos):
    query = parse_query(["dog:2", "+", "at 10:30 in the night", photos / "red.png", f"{photos / 'orange.png'}:0.5"])
    assert query.terms == (
        Term("dog", None, 2.0),
        Term("at 10:30 in the night"),
        Term("", photos / "red.png"),
        Term("", photos / "orange.png", 0.5),
    )
    assert str(parse_query(["a dog", "snow"])) == "a dog + snow"


def test_times_and_ratios_are_no_weights():
    assert parse_query("a clock at 10:10").terms == (Term("a clock at 10:10"),)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([], "The query is empty"),
        (["+", " "], "The query is empty"),
        (["dog:0"], "The weight of 'dog' is 0; leave it out, or exclude it with --not"),
        ([Path("gone.jpg")], "The example gone.jpg does not exist; check its name"),
    ],
)
def test_queries_that_are_none(parts, sentence):
    with pytest.raises(ClipmatchError, match=sentence):
        parse_query(parts)


def test_an_example_finds_itself_and_what_is_like_it(index, photos):
    found = ask(index, photos / "red.png")
    assert names(found)[:2] == ["red", "orange"]
    assert found[0].score == pytest.approx(1, abs=1e-5)


def test_an_example_that_is_no_picture(index, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture at all")
    with pytest.raises(ClipmatchError, match=r"The example .*bad.png can't be read: it is not an image"):
        ask(index, tmp_path / "bad.png")


def test_sentences_are_added_up_with_their_weights(index):
    """Orange is (255, 100, 0): nearest to red and a little green; with much green, green wins."""
    assert names(ask(index, ["red:10", "green:4"]))[0] == "orange"
    assert names(ask(index, ["red", "green:3"]))[0] == "green"


def test_a_sentence_and_an_example(index, photos):
    """Half blue, half like red: each of the two is a standard deviation or more above the others."""
    found = ask(index, ["blue", photos / "red.png"])
    assert set(names(found)[:3]) == {"blue", "red", "orange"}
    assert names(ask(index, ["blue:5", photos / "red.png"]))[0] == "blue"
    assert names(ask(index, ["blue", f"{photos / 'red.png'}:5"]))[0] == "red"
    assert found[0].confidence is None


def test_pages_go_on_where_the_last_ended(index):
    whole = names(ask(index, "red"))
    assert names(ask(index, "red", top_k=3)) + names(ask(index, "red", top_k=3, page=2)) == whole
    assert ask(index, "red", top_k=3, page=3) == []


def test_diverse_matches_differ(tmp_path):
    """Three reds, then others: the second match is no second red."""
    for number, green in enumerate((0, 1, 2)):
        paint(tmp_path / "d" / f"red{number}.png", (255, green, 0))
    paint(tmp_path / "d" / "orange.png", (255, 120, 0))
    paint(tmp_path / "d" / "blue.png", (0, 0, 255))
    with Index.open(tmp_path / "d.sqlite", ColourEmbedder()) as index:
        index.update([tmp_path / "d"], progress=False)
        assert names(ask(index, "red", top_k=2)) == ["red0", "red1"]
        first, second = names(ask(index, "red", top_k=2, diverse=True))
        assert first == "red0"
        assert second in ("orange", "blue")


def drawn(path, seed, size=(96, 96), quality=90):
    """A picture of random blocks, the same for the same seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(path, quality=quality)
    return path


@pytest.fixture
def copies(tmp_path):
    """One picture in three sizes and qualities, and two others."""
    for name, size, quality in (("large", (300, 300), 95), ("small", (96, 96), 90), ("poor", (96, 96), 30)):
        drawn(tmp_path / "c" / f"{name}.jpg", 1, size, quality)
    drawn(tmp_path / "c" / "other.jpg", 2)
    drawn(tmp_path / "c" / "third.jpg", 3)

    class SameToAll(ColourEmbedder):
        """Sees no difference at all, so that only the hashes tell."""

        def embed_images(self, paths, progress=True, read=load_image):
            found = super().embed_images(paths, progress, read)
            return ImageEmbeddings(np.tile(np.eye(3, dtype=np.float32)[0], (len(found.paths), 1)), found.paths, [])

    with Index.open(tmp_path / "c.sqlite", SameToAll()) as opened:
        opened.update([tmp_path / "c"], progress=False)
        yield opened


def test_near_duplicates_are_stacked_hidden_or_shown(copies):
    stacked = copies.find("red")
    assert len(stacked) == 3
    (stack,) = [match for match in stacked if match.duplicates]
    assert {stack.path.stem, *(path.stem for path in stack.duplicates)} == {"large", "small", "poor"}
    assert len(copies.find("red", duplicates="show")) == 5
    hidden = copies.find("red", duplicates="hide")
    assert len(hidden) == 3
    assert not any(match.duplicates for match in hidden)


@pytest.fixture
def burst(tmp_path):
    """Forty near-red pictures, nearer and nearer to red; the first thirty look the same but for their colour."""
    noise = np.random.default_rng(0)
    with Index.open(tmp_path / "burst.sqlite", ColourEmbedder()) as opened:
        opened.store.bind(ModelName("colours", 3))
        photos, rows = [], {}
        for number in range(40):
            picture = 0 if number < 30 else int(noise.integers(1 << 63))
            path = Path(f"/burst/{number:02d}.jpg")
            photos.append(Photo(path, f"{number:064x}", Stamp(1, 1, 0), Metadata(width=8, height=8), picture))
            row = np.array([1, number / 100, number % 7 / 50], np.float32)
            rows[photos[-1].digest] = row / np.linalg.norm(row)
        opened.store.upsert(photos, "colours", rows, {})
        yield opened


def test_a_long_burst_leaves_room_for_others(burst):
    """With two matches to a page, the thirty of the burst are more than what is looked at first."""
    first = burst.find("red", top_k=2)
    assert (names(first)[0], len(first[0].duplicates)) == ("00", 29)
    assert len(first) == 2


@pytest.mark.parametrize("diverse", [False, True])
@pytest.mark.parametrize("duplicates", ["show", "stack", "hide"])
def test_pages_of_any_size_go_on_where_the_last_has_ended(burst, duplicates, diverse):
    settings = {"duplicates": duplicates, "diverse": diverse}
    whole = names(burst.find("red", top_k=40, **settings))
    assert len(whole) == len(set(whole)) == (40 if duplicates == "show" else 11)
    for size in (1, 3, 7):
        pages = [burst.find("red", top_k=size, page=page, **settings) for page in range(1, 42)]
        assert [name for page in pages for name in names(page)] == whole


def test_near_duplicates_are_grouped_the_same_in_blocks_of_any_size(monkeypatch):
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.repeat(np.arange(10), 6))
    rows = rng.normal(size=(10, 64)).astype(np.float32)[kinds]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    hashes = rng.integers(0, 1 << 63, 10).astype(np.uint64)[kinds]
    expected = sorted(np.flatnonzero(kinds == kind).tolist() for kind in range(10))
    for size in (4, 7, 2048):
        monkeypatch.setattr("clipmatch.duplicates.BLOCK", size)
        assert sorted(sorted(group) for group in group_near(rows, hashes)) == expected


def test_near_duplicates_are_listed_largest_first(copies):
    (group,) = copies.duplicates()
    assert next(photo.path.stem for photo in group) == "large"
    assert {photo.path.stem for photo in group} == {"large", "small", "poor"}


def test_more_like_a_match(index):
    first = ask(index, "green")
    assert names(ask(index, [index.more_like(first, 1).terms[0].image]))[0] == "green"
    with pytest.raises(ClipmatchError, match="There is no match 9 to look for more like it; there are 4"):
        index.more_like(first, 9)


def test_more_like_a_photograph_that_is_out_of_reach(index, photos):
    first = ask(index, "green")
    first[0].path.rename(photos.parent / "unplugged.png")
    index.embedder.seen.clear()
    assert names(index.answer(index.more_like(first, 1), Request(duplicates="show"))) == names(first)
    assert index.embedder.seen == []


def test_confidence_of_an_example(index):
    axes = np.eye(3, dtype=np.float16)
    index.embedder.calibration = Calibration((0.0, 10.0, -10.0, 0.0), 0.99, Bank(axes[:1], axes[2:]), "colours")
    with pytest.raises(ClipmatchError, match="Confidence is known for sentences only"):
        ask(index, next(iter(index)).path, min_confidence=0.5)


# Very many photographs


@pytest.fixture
def large(tmp_path, monkeypatch):
    """An index of 400 rows that counts as very large: photograph N has its own direction, a little noisy."""
    pytest.importorskip("faiss")
    monkeypatch.setattr("clipmatch.approximate.LEAST", 100)
    monkeypatch.setattr("clipmatch.approximate.FEW", 10)
    monkeypatch.setattr("clipmatch.search.CANDIDATES", 20)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    class Numbered(ColourEmbedder):
        dim = 16

        def embed_texts(self, texts, progress=False):
            return np.stack([rows[int(text.removeprefix("photo "))] for text in texts])

    with Index.open(tmp_path / "large.sqlite", Numbered("numbered")) as index:
        index.store.bind(ModelName("numbered", 16))
        photos = [
            Photo(
                Path(f"/photos/{number}.jpg"),
                f"{number:064x}",
                Stamp(number, 1, 0),
                Metadata(width=8, height=8),
                number,
            )
            for number in range(400)
        ]
        index.store.upsert(photos, "numbered", {photo.digest: rows[at] for at, photo in enumerate(photos)}, {})
        assert index.derive()
        yield index


def test_a_very_large_gallery_is_searched_among_candidates(large, monkeypatch):
    looked_at = []
    narrow, compare = search.rank_narrowed, search.rank
    monkeypatch.setattr(
        "clipmatch.search.rank_narrowed", lambda *given: looked_at.append(len(given[0].gallery)) or narrow(*given)
    )
    monkeypatch.setattr("clipmatch.search.rank", lambda *given: looked_at.append(len(given[0])) or compare(*given))
    settings = {"top_k": 2, "duplicates": "show"}
    for number in (0, 123, 399):
        assert large.find(f"photo {number}", **settings)[0].path == Path(f"/photos/{number}.jpg")
    assert looked_at == [20, 20, 20]
    found = large.find("photo 5", **settings)
    assert (found.searched, found[0].score) == (400, pytest.approx(1, abs=1e-5))
    where = Filter(folders=(Path("/photos/7.jpg"), Path("/photos/8.jpg")))
    assert [match.path.name for match in large.find("photo 8", where=where, **settings)] == ["8.jpg", "7.jpg"]
    assert looked_at[-1] == 2  # so few are compared exactly
    assert large.find("photo 8", where=Filter(min_size=8), **settings)[0].path.name == "8.jpg"
    assert looked_at[-1] == 20
    assert large.find("photo 5", hybrid=True, top_k=40, duplicates="show")[0].path == Path("/photos/5.jpg")


@pytest.mark.parametrize(
    "least", [0, 4, 200, 370, 392, 400], ids=["all", "nearly all", "half", "few", "very few", "none"]
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_candidates_give_what_comparing_all_rows_gives(large, monkeypatch, least, calibrated):
    """Order, scores and confidences; with a filter too."""
    monkeypatch.setattr("clipmatch.approximate.PROBES", 30)  # of 80
    bank = np.random.default_rng(1).normal(size=(200, 16))
    bank = (bank / np.linalg.norm(bank, axis=1, keepdims=True)).astype(np.float16)
    if calibrated:
        large.embedder.calibration = Calibration((0.0, 8.0, -4.0, 0.0), 0.99, Bank(bank, bank), "numbered")
    large.derive()
    ask = {"top_k": 5, "where": Filter(min_size=least), "duplicates": "show"}
    queries = [f"photo {number}" for number in range(0, 400, 7)]
    quick = [large.find(query, **ask) for query in queries]
    assert large._open().near
    monkeypatch.setattr("clipmatch.approximate.LEAST", 1000)
    with Index.open(large.store.path, large.embedder) as index:
        slow = [index.find(query, **ask) for query in queries]
        assert not index._open().near
    assert [found.searched for found in quick] == [400 - least] * len(queries)
    common = 0
    for found, right in zip(quick, slow, strict=True):
        known = {match.path: match for match in right}
        assert len(found) == len(right)
        for match in found:
            if match.path in known:
                common += 1
                assert match.score == pytest.approx(known[match.path].score, abs=1e-6)  # compared exactly
                if calibrated:
                    assert match.confidence == pytest.approx(known[match.path].confidence, rel=0.02)
    assert common >= 0.98 * sum(map(len, slow))


def test_the_approximate_index_may_be_lost_stale_or_damaged(large, monkeypatch):
    [path] = large.store.path.parent.glob("large.sqlite.*.ivf")
    whole = path.read_bytes()
    path.write_bytes(b"no index")
    assert large.find("photo 3")[0].path == Path("/photos/3.jpg")
    path.unlink()
    assert large.find("photo 3")[0].path == Path("/photos/3.jpg")
    assert large.derive()
    assert path.read_bytes() == whole
    large.store.delete([Path("/photos/3.jpg")])
    assert large.find("photo 3")[0].path != Path("/photos/3.jpg")
    assert large.derive()
    assert len(list(path.parent.glob("large.sqlite.*.ivf"))) == 1
    assert not path.exists()
    large.store.delete([Path("/photos/4.jpg")])
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert not large.derive()
    assert large.find("photo 5")[0].path == Path("/photos/5.jpg")
