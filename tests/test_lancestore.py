"""The store of very large collections, in Lance tables; what it has in common with SQLite is in test_index.py."""

import multiprocessing
import os
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from colours import SLOW, ColourEmbedder, paint

lancedb = pytest.importorskip("lancedb", reason="the extra `distributed` is not installed; make test-cluster has it")

from clipmatch import lancerows, lancestore, storage
from clipmatch.calibration import Bank, Calibration
from clipmatch.cli import main
from clipmatch.errors import ClipmatchError, own_version
from clipmatch.index import Index
from clipmatch.lancesearch import LanceCollection
from clipmatch.lancestore import LanceStore
from clipmatch.photo import Metadata, Photo, Stamp
from clipmatch.store import Filter, ModelName, Root, Store
from clipmatch.transfer import copy_store

DIM = 16


def photos_of(numbers, **metadata):
    return [
        Photo(
            Path(f"/photos/{number}.jpg"),
            f"{number:064x}",
            Stamp(number, 1, 0),
            Metadata(width=8, height=8, **metadata),
            number,
        )
        for number in numbers
    ]


def rows_for(photos):
    rows = np.random.default_rng(0).normal(size=(1000, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return {photo.digest: rows[int(photo.digest, 16)] for photo in photos}


class Numbered(ColourEmbedder):
    """Photograph N has its own direction, and is what "photo N" asks for."""

    dim = DIM

    def embed_texts(self, texts, progress=False):
        known = rows_for(photos_of(range(1000)))
        return np.stack([known[f"{int(text.removeprefix('photo ')):064x}"] for text in texts])


@pytest.fixture
def store(tmp_path):
    with LanceStore.open(tmp_path / "photos.lance", create=True) as opened:
        opened.bind(ModelName("numbered", DIM))
        yield opened


def fill(store, numbers, **metadata):
    photos = photos_of(numbers, **metadata)
    store.upsert(photos, "numbered", rows_for(photos), {})


# Places


@pytest.mark.parametrize(
    ("place", "lance"),
    [
        ("photos.sqlite", False),
        ("photos.lance", True),
        (Path("/a/photos.lance"), True),
        ("s3://bucket/index", True),
        ("gs://bucket/index.sqlite", True),
        ("lance", False),
    ],
)
def test_which_store_a_name_means(place, lance):
    assert storage.is_lance(place) is lance


def test_no_index_and_something_else(tmp_path):
    with pytest.raises(ClipmatchError, match=r"There is no index .*nowhere\.lance; make it with: clipmatch index"):
        Index.open(tmp_path / "nowhere.lance", create=False)
    assert not (tmp_path / "nowhere.lance").exists()
    (tmp_path / "empty.lance").mkdir()
    with pytest.raises(ClipmatchError, match="There is no index"):
        Index.open(tmp_path / "empty.lance", create=False)
    lancedb.connect(str(tmp_path / "foreign.lance")).create_table("dogs", [{"name": "rex"}])
    with pytest.raises(ClipmatchError, match="database of something else"):
        Index.open(tmp_path / "foreign.lance")


def test_an_index_from_a_newer_clipmatch(store, monkeypatch):
    monkeypatch.setattr(lancestore, "VERSION", b"0")
    with pytest.raises(ClipmatchError, match="from a newer clipmatch"):
        LanceStore.open(store.path)


def test_a_newer_one_says_which_version_it_takes(store, monkeypatch):
    monkeypatch.setattr(lancestore, "VERSION", b"0")
    monkeypatch.setattr("clipmatch.errors.own_version", lambda: "0.0.1")
    with pytest.raises(ClipmatchError, match=f"and this is 0.0.1; it takes {own_version()} or later"):
        LanceStore.open(store.path)


def test_a_change_to_another_model_that_was_killed_at_its_end_is_completed(store, monkeypatch):
    """The rows are those of the new model already; what finds photographs by words is not there yet."""
    fill(store, range(10), caption="a dog")
    store.upsert([], "other", rows_for(photos_of(range(10))), {})
    with monkeypatch.context() as patch:
        patch.setattr(LanceStore, "_make_indexes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.bind(ModelName("other", DIM))
    with LanceStore.open(store.path) as again:
        assert (again.model.fingerprint, len(again)) == ("other", 10)
        again.tidy()
        assert len(again.named("dog", 20)) == 10
        assert "staged" not in again.tables.names()


def interrupted(store):
    raise KeyboardInterrupt


def test_a_table_that_is_damaged(store):
    fill(store, range(10))
    for file in (store.path / "photos.lance" / "data").iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(ClipmatchError, match=r"photos\.lance can't be used now \("):
        list(LanceStore.open(store.path).photos())


def test_without_the_packages(tmp_path):
    """One sentence that says what to install."""
    code = "import sys; sys.modules.update(lancedb=None); from clipmatch.cli import main; main()"
    command = [sys.executable, "-c", code, "find", "a cat", "--store", "s3://bucket/index"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = "The index s3://bucket/index is of Lance tables, which need lancedb"
    assert done.stderr.splitlines() == [f'Error: {said}: pip install "clipmatch[distributed]"']


# Numbers and rows


def test_a_photograph_is_what_was_stored(store):
    photo = Photo(
        Path(os.fsdecode(b"/p/it's a d\xf6g \xe2\x98\x83.jpg")),
        "ab" * 32,
        Stamp(1, -5, 3),
        Metadata(4, 3, datetime(1999, 12, 31, 23, 59, 59, 999999), 1.5, -2.5, "N'K", "dög 'n' cat"),
        (1 << 64) - 1,
    )
    store.upsert([photo], "numbered", {photo.digest: np.eye(DIM, dtype=np.float32)[0]}, {})
    number = store.number(photo.path)
    assert 0 <= number < 1 << 53
    assert store.photo(number) == photo
    assert store.hashes(np.array([number])).tolist() == [(1 << 64) - 1]
    assert list(store.numbers(Filter(folders=(photo.path,), camera="n'k"))) == [number]
    with pytest.raises(KeyError):
        store.photo(number + 1)


def test_photographs_whose_paths_have_the_same_hash(store, monkeypatch):
    monkeypatch.setattr(lancestore, "number_of", lambda path: 7)
    fill(store, range(2))
    fill(store, range(3))
    paths = [Path(f"/photos/{number}.jpg") for number in range(3)]
    numbers = [store.number(path) for path in paths]
    assert sorted(numbers) == [7, 8, 9]
    assert [photo.path for photo in store.photos_of(numbers)] == paths
    store.delete([paths[0]])
    fill(store, [1])  # it keeps its own, though the first is free again
    assert [store.number(path) for path in paths] == [None, *numbers[1:]]
    assert len(store) == 2


def test_what_passes_is_counted_and_the_newest_come_first(store):
    fill(store, range(5))
    fill(store, range(5, 8), taken=datetime(2020, 5, 1), caption="a dog")
    assert store.count(Filter(has_caption=True)) == 3
    assert store.count(Filter(before=datetime(2020, 5, 1))) == 0
    first = store.newest(Filter(), 3)
    assert {store.photo(number).path.stem for number in first} == {"5", "6", "7"}
    assert first == sorted(first, reverse=True)
    assert len(store.newest(Filter(), 10, skip=3)) == 5
    tally = store.tally()
    assert (tally["photos"], tally["bytes"], tally["captions"]) == (8, sum(range(8)), 3)
    assert (tally["years"], tally["formats"]) == ([("2020", 3)], [("jpg", 8)])


# Versions


def test_another_process_is_seen_at_once_but_not_within_a_snapshot(store):
    fill(store, range(3))
    with LanceStore.open(store.path) as other, store.snapshot():
        assert len(store) == 3
        fill(other, range(5))
        assert len(store) == 3
        content = store.content
    assert len(store) == 5
    assert store.content != content


def write_some(path, start):
    with LanceStore.open(path) as store:
        for first in range(start, start + 40, 10):
            fill(store, range(first, first + 20))


def test_several_writers_at_once_lose_nothing_and_double_nothing(store):
    """Four processes, each half of whose photographs another one writes too."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_some, args=(store.path, 20 * number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert sorted(int(photo.path.stem) for _, photo in store.photos()) == list(range(110))


def stored(place):
    try:
        with LanceStore.open(place) as store:
            return {photo.path for _, photo in store.photos()}
    except ClipmatchError:  # not made yet
        return set()


def test_killed_at_any_moment_it_goes_on(tmp_path):
    """Killed without warning three times: what was committed is there, whole, and the next run does the rest alone."""
    place = tmp_path / "photos.lance"
    paths = {paint(tmp_path / "many" / f"{number:02d}.png", (100 + number, 0, 0)) for number in range(80)}
    known = set()
    for pause in (0, 0.05, 0.1):
        process = subprocess.Popen([sys.executable, "-c", SLOW, place, tmp_path / "many"], cwd=Path(__file__).parent)
        try:
            while len(before := stored(place)) < len(known) + 4:
                assert process.poll() is None
                time.sleep(0.02)
            time.sleep(pause)
        finally:
            process.kill()
            process.wait()
        with LanceStore.open(place) as store:
            found, rows = stored(place), store.vectors()[2]
            assert known < before <= found < paths
            assert (len(store), len(rows)) == (len(found), len(found))
            np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        known = found
    model = ColourEmbedder()
    with Index.open(place, model) as index:
        said = f"{80 - len(known)} added, 0 moved, 0 changed, {len(known)} unchanged, 0 removed, 0 failed"
        assert str(index.update(progress=False)) == said
        assert len(model.seen) == 80 - len(known)
        assert sorted(photo.path for photo in index) == sorted(paths)
        assert len(index.find("red", top_k=100, duplicates="show")) == 80


@pytest.mark.filterwarnings("ignore:optimize")
def test_old_versions_do_not_pile_up(store, monkeypatch):
    monkeypatch.setattr(lancestore, "KEPT", timedelta(0))
    data = store.path / "photos.lance" / "data"
    for _ in range(10):
        fill(store, range(500))
    assert len(list(data.iterdir())) == 10
    store.tidy()
    assert len(list(data.iterdir())) == 1
    content = store.content
    store.tidy()
    assert store.content == content  # nothing to do, so what is derived stays good
    store.delete([Path("/photos/0.jpg")])
    store.upsert([], "numbered", {}, {Path("/photos/broken.jpg"): (Stamp(1, 2), "why not")})
    store.tidy()
    assert [len(store.tables.table(name).list_versions()) for name in ("photos", "failures")] == [1, 1]
    assert len(store) == 499


# Very many photographs


@pytest.fixture
def large(store, monkeypatch):
    """400 photographs that count as very many."""
    for name, value in (("LEAST", 100), ("FEW", 10)):
        monkeypatch.setattr(f"clipmatch.approximate.{name}", value)
    monkeypatch.setattr("clipmatch.search.CANDIDATES", 20)
    fill(store, range(400))
    with Index.open(store.path, Numbered("numbered")) as index:
        assert index.derive()
        yield index


@pytest.mark.parametrize(("least", "calibrated"), [(0, True), (4, False), (200, True), (370, False), (392, True)])
def test_candidates_give_what_comparing_all_rows_gives(large, monkeypatch, least, calibrated):
    bank = np.random.default_rng(1).normal(size=(200, DIM))
    bank = (bank / np.linalg.norm(bank, axis=1, keepdims=True)).astype(np.float16)
    if calibrated:
        large.embedder.calibration = Calibration((0.0, 8.0, -4.0, 0.0), 0.99, Bank(bank, bank), "numbered")
    ask = {"top_k": 5, "where": Filter(min_size=least), "duplicates": "show"}
    queries = [f"photo {number}" for number in range(0, 400, 7)]
    quick = [large.find(query, **ask) for query in queries]
    assert isinstance(large._open(), LanceCollection)
    monkeypatch.setattr("clipmatch.approximate.LEAST", 1000)
    with Index.open(large.store.path, large.embedder) as index:
        slow = [index.find(query, **ask) for query in queries]
    assert [found.searched for found in quick] == [400 - least] * len(queries)
    common = 0
    for found, right in zip(quick, slow, strict=True):
        known = {match.path: match for match in right}
        assert len(found) == len(right)
        for match in found:
            if match.path in known:
                common += 1
                assert match.score == pytest.approx(known[match.path].score, abs=1e-6)
                if calibrated:
                    assert match.confidence == pytest.approx(known[match.path].confidence, rel=0.02)
    assert common >= 0.98 * sum(map(len, slow))


def test_other_questions_to_very_many(large):
    store = large.store
    assert any(index.columns == ["vector"] for index in store.tables.table("photos").list_indices())
    with pytest.raises(ClipmatchError, match=r"400 photographs, more than the 100 that .* --folder"):
        large.duplicates()
    groups = large.duplicates(Filter(min_size=350))
    assert [sorted(photo.path.stem for photo in group) for group in groups] == [["351", "373"]]
    found = large.find("photo 5", hybrid=True, top_k=40, duplicates="show")
    assert found[0].path == Path("/photos/5.jpg")
    likes = large.refine(None, [Path("/photos/9.jpg")], [Path("/photos/1.jpg")], found_request())
    assert likes[0].path == Path("/photos/9.jpg")
    fill(store, range(400, 500))  # not in the index of vectors yet
    assert large.find("photo 444")[0].path == Path("/photos/444.jpg")
    store.delete([Path("/photos/444.jpg")])
    assert large.find("photo 444")[0].path != Path("/photos/444.jpg")


def found_request():
    from clipmatch.search import Request

    return Request(top_k=3)


# Both stores


QUESTIONS = (
    {"query": "a cat"},
    {"query": "a vehicle", "hybrid": True},
    {"query": "a cup of coffee", "exclude": "a cat"},
    {"query": "a dog", "diverse": True, "duplicates": "show"},
    {"query": "a cat", "where": Filter(after=datetime(2020, 1, 1))},
    {"query": "a landscape", "where": Filter(has_caption=True), "top_k": 3},
    {"query": "a landscape", "where": Filter(min_side=400), "min_confidence": 0.01},
)


def answers(index):
    """For each question the paths, and their scores and confidences."""
    found = [index.find(**question) for question in QUESTIONS]
    paths = [([match.path for match in matches], matches.searched, matches.vetoed) for matches in found]
    return paths, [number for matches in found for match in matches for number in (match.score, match.confidence)]


def test_both_stores_give_the_same_answers_and_a_copy_is_whole(album, embedded, tmp_path):
    there, back = tmp_path / "there.lance", tmp_path / "back.sqlite"
    with Index.open(album.index, embedded, create=False) as first:
        paths, numbers = answers(first)
        photos, groups = set(first), {frozenset(group) for group in first.duplicates()}
        place, concepts, broken = first.store.path, first.store.concepts(), first.store.broken()
        roots = first.store.roots()
    for source, target in ((place, there), (there, back)):
        done = CliRunner().invoke(main, ["store", "copy", str(source), str(target)])
        assert done.stdout == (
            f"{len(photos)} copied, 0 unchanged, 0 removed; {len(photos)} photographs in {target}\n"
        ), done.output
        with Index.open(target, embedded, create=False) as index:
            found = answers(index)
            assert found == (paths, pytest.approx(numbers, abs=1e-6))
            assert set(index) == photos
            assert {frozenset(group) for group in index.duplicates()} == groups
            assert (index.store.broken(), index.store.roots()) == (broken, roots)
            assert index.store.concepts().keys() == concepts.keys()
    again = CliRunner().invoke(main, ["store", "copy", str(there), str(back)])
    assert again.stdout.startswith(f"0 copied, {len(photos)} unchanged, 0 removed")


def test_a_copy_follows_its_source_and_refuses_another_model(store, tmp_path):
    fill(store, range(5))
    store.add_root(Root(Path("/photos"), ("*.gif",), True))
    with Store.open(tmp_path / "copy.sqlite", create=True) as copy:
        copy_store(store, copy, progress=False)
        failed = {Path("/photos/bad.jpg"): (Stamp(1, 2, 0), "damaged")}
        copy.upsert([], store.model.fingerprint, {}, failed)
        assert copy.broken() == failed
        store.delete([Path("/photos/4.jpg")])
        fill(store, [7])
        assert str(copy_store(store, copy, progress=False)) == "1 copied, 4 unchanged, 1 removed"
        assert copy.roots() == store.roots()
        assert copy.broken() == store.broken() == {}
    with Store.open(tmp_path / "other.sqlite", create=True) as other:
        with pytest.raises(ClipmatchError, match="is empty; there is nothing to copy"):
            copy_store(other, store)
        other.bind(ModelName("another", DIM))
        with pytest.raises(ClipmatchError, match="holds the vectors of another model"):
            copy_store(store, other)


def test_the_commands_of_a_collection(photos, tmp_path):
    place = str(tmp_path / "photos.lance")

    def run(*arguments):
        done = CliRunner().invoke(main, [*arguments, "--store", place])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert run("index", str(photos)).startswith("4 added")
    assert "red.png" in run("find", "something red", "-k", "4", "--paths")
    assert run("teach", "@rot", str(photos / "red.png"), str(photos / "orange.png")).startswith("@rot: 2 examples")
    assert run("concepts").startswith("@rot")
    assert len(run("find", "@rot", "-k", "2", "--paths", "--duplicates", "show").split()) == 2
    assert f"index        {place}" in run("index", "--status")
    assert run("duplicates") is not None
    assert run("index", "--remove", str(photos / "sub")).startswith("forgot 2 photographs")


def test_a_path_has_one_number_everywhere():
    assert lancerows.number_of(Path("/photos/1.jpg")) == 5499141375972921
