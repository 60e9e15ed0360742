"""The file of vectors: what is read of it is what was written, or it is made anew; and it is read sparingly."""

import subprocess
import sys

import numpy as np
import pytest
from colours import ColourEmbedder

from clipmatch import vectors
from clipmatch.index import Index
from clipmatch.search import Ranking
from clipmatch.vectors import DamagedVectors, Gallery, Rows, read_gallery, write_gallery

MARK = {"format": 2, "calibration": None, "content": "token"}
COUNT = 2 * vectors.BLOCK + 88  # the last block is not full


def unit_rows(count, dim, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(params=[8, 7])
def stored(request, tmp_path):
    """Rows, and the gallery of them in a file."""
    rows = unit_rows(COUNT, request.param)
    numbers = np.arange(COUNT, dtype=np.int64) * 3
    write_gallery(tmp_path / "file", Gallery(numbers, Rows(rows), rows[:, 0].copy()), MARK)
    return rows, read_gallery(tmp_path / "file", MARK)


def test_what_was_written_is_read(stored):
    rows, gallery = stored
    assert gallery.numbers.tolist() == list(range(0, 3 * COUNT, 3))
    assert gallery.background.tolist() == rows[:, 0].tolist()
    scattered = np.array([5, 599, 3, 4, 5, 0, 1, 2])
    for places in (slice(None), slice(10, 300), slice(590, 700), scattered, np.empty(0, np.int64)):
        assert np.array_equal(gallery.rows[places], rows[places])


def test_cosines_are_those_of_the_array(stored):
    """The first time read in blocks, then mapped; of parts that are few, many or in one piece."""
    rows, gallery = stored
    queries = unit_rows(3, rows.shape[1], seed=1)
    parts = (np.arange(COUNT), np.array([3]), np.arange(0, COUNT, 2), np.arange(100, 250), np.array([0, 599]))
    for _ in range(2):
        for places in parts:
            part = gallery.part(places)
            assert part.rows.cosines(queries[0]) == pytest.approx(rows[places] @ queries[0], abs=1e-6)
            assert part.rows.cosines(queries) == pytest.approx(rows[places] @ queries.T, abs=1e-6)
            assert np.array_equal(part.rows[np.array([0])], rows[places[:1]])
            assert part.part(np.array([0])).numbers.tolist() == [3 * places[0]]
        gallery.rows.cosines(queries[0])
        assert gallery.rows.compared


@pytest.mark.parametrize("place", [3, 520, 600 * 8 + 600, 600 * 16 + 600, 600 * 20 + 600, -1])
def test_one_wrong_bit_is_noticed_wherever_it_is(tmp_path, place):
    """In the header, the numbers, the checksums, the backgrounds, the first rows and the last."""
    path, rows = tmp_path / "file", unit_rows(600, 8)
    write_gallery(path, Gallery(np.arange(600), Rows(rows), rows[:, 0]), MARK)
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)
    gallery = read_gallery(path, MARK)
    if gallery is not None:
        row = len(rows) - 1 if place < 0 else (place - 512 - 600 * 20) // 32
        assert 0 <= row < 600
        others = np.delete(np.arange(600), row)
        assert np.array_equal(gallery.rows[others], rows[others])  # what is whole can be used
        with pytest.raises(DamagedVectors, match="file was damaged and is removed; ask again"):
            gallery.rows[np.array([row])]
        with pytest.raises(DamagedVectors):
            gallery.rows.cosines(rows[0])
        assert not path.exists()


def test_a_file_that_is_cut_off_while_it_is_open(stored, tmp_path):
    _, gallery = stored
    with (tmp_path / "file").open("r+b") as file:
        file.truncate(4000)
    with pytest.raises(DamagedVectors):
        gallery.rows.cosines(np.ones(gallery.rows.shape[1], np.float32))


def test_an_open_index_keeps_its_files_open_until_they_change(photos, tmp_path):
    model = ColourEmbedder()
    with Index.open(tmp_path / "photos.sqlite", model) as index:
        index.update([photos], progress=False)
        index.find("red")
        gallery = index.gallery()
        assert index.find("red")[0].path == photos / "red.png"
        assert index.gallery() is gallery
        path = tmp_path / "photos.sqlite.vectors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])  # under a process that has mapped it
        assert index.find("red")[0].path == photos / "red.png"
        assert path.read_bytes() == whole
        with Index.open(tmp_path / "photos.sqlite", model) as other:
            (photos / "red.png").unlink()
            other.update(progress=False)
        assert index.find("red")[0].path == photos / "orange.png"


READER = """
import resource, sys
import numpy as np
from pathlib import Path
from clipmatch.vectors import read_gallery
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
gallery = read_gallery(Path(sys.argv[1]), {"format": 2, "calibration": None, "content": "token"})
gallery.rows.cosines(np.ones(256, np.float32))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are in kilobytes there")
def test_asking_once_takes_little_memory(tmp_path):
    path, count = tmp_path / "file", 40_000
    rows = np.tile(unit_rows(1000, 256), (count // 1000, 1))
    write_gallery(path, Gallery(np.arange(count), Rows(rows), None), MARK)
    done = subprocess.run([sys.executable, "-c", READER, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10_000  # the rows are 41 megabytes


def test_the_best_are_those_of_a_full_sort():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, 200).astype(np.float32)
    confidences = rng.integers(0, 5, 200) / 4  # many ties
    among = rng.random(200) < 0.7
    for ranking in (Ranking(scores, None), Ranking(scores, confidences)):
        first = scores if ranking.confidences is None else confidences
        order = sorted(np.flatnonzero(among).tolist(), key=lambda place: (-first[place], -scores[place], place))
        for most in (1, 2, 50, 139, 200, 1000):
            assert ranking.best(most, among).tolist() == order[:most]
