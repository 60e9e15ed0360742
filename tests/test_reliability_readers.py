"""Bad captions and settings: every reader on real-world quirks and on what a generator makes of them."""

import os
import sys
import tracemalloc
from pathlib import Path

import pytest
from captionfiles import add_images, notes, write
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipmatch.cli import main
from clipmatch.config import ModelConfig, PreprocessConfig, TrainConfig, from_json
from clipmatch.data import load_captions, read_split
from clipmatch.errors import ClipmatchError
from clipmatch.folders import expand
from clipmatch.formats import MAX_LINE, Line, captions_of, read_lines, split_lines
from clipmatch.generation.prompts import parse_prompts
from clipmatch.query import parse_query
from clipmatch.records import load_json
from clipmatch.store import Filter, Store

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import fuzz_readers

PIECES = [
    *(b"\0", b"\n", b"\r", b'"', b"'", b",", b"\t", b"|", b"#", b"[", b"]", b"{", b"}", b":", b"\\", b"\xff", b"\xc3"),
    *(
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"a.jpg",
        b"image",
        b"caption",
        b"../",
        b"9" * 30,
        b"NaN",
        b"null",
        b"\\ud800",
        b"-",
    ),
    *("\u2028".encode(), "\U0001f415".encode(), b"1e999", b" " * 50, b"[" * 30),
]


@st.composite
def damaged(draw, seeds):
    """A seed in which some pieces were put in, taken out or repeated; or anything at all."""
    data = draw(st.one_of(st.sampled_from(seeds), st.binary(max_size=200)))
    for _ in range(draw(st.integers(0, 5))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 20))
        piece = draw(st.one_of(st.sampled_from(PIECES), st.just(data[at : at + length]), st.just(b"")))
        data = data[:at] + piece + data[at + draw(st.sampled_from((0, 0, length))) :]
    return data


@pytest.mark.parametrize("entry", fuzz_readers.ENTRIES)
def test_the_quirks_of_the_real_world_are_told_in_a_sentence_or_counted(entry):
    for data in fuzz_readers.seeds(entry):
        fuzz_readers.run(entry, data)


@pytest.mark.parametrize("entry", fuzz_readers.ENTRIES)
def test_whatever_is_made_of_them_is_too(entry):
    @settings(max_examples=80, deadline=2000, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(damaged(fuzz_readers.seeds(entry)))
    def check(data):
        fuzz_readers.run(entry, data)

    check()


@pytest.mark.parametrize("entry", ["flickr8k-csv", "json-lines", "json-list", "karpathy"])
def test_a_line_that_is_lost_would_be_noticed(entry, monkeypatch):
    good = next(data for data in fuzz_readers.seeds(entry) if is_read(entry, data))
    found = load_captions(
        fuzz_readers.written(f"again{fuzz_readers.TEXT_KINDS.get(entry, '.json')}", good), None, entry
    )
    poorer = found.__class__(**{**vars(found), "entries": found.entries[:0], "dropped": ()})
    monkeypatch.setattr(fuzz_readers, "load_captions", lambda *arguments: poorer)
    with pytest.raises(AssertionError, match="lost without a word"):
        fuzz_readers.run(entry, good)


def is_read(entry, data):
    """Whether a seed holds captions of that kind."""
    try:
        return bool(load_captions(fuzz_readers.written("seed.txt", data), fuzz_readers.place(), entry).rows)
    except ClipmatchError:
        return False


# Each thing that once went wrong


def one_sentence(read):
    """What the error says, which has to be one line."""
    with pytest.raises(ClipmatchError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_number_of_thousands_of_digits(tmp_path):
    digits = "9" * 5000
    path = write(tmp_path / "a.json", f'[{{"image": "a.jpg", "caption": "A dog .", "id": {digits}}}]')
    assert "thousands of digits" in one_sentence(lambda: load_captions(path, tmp_path))
    add_images(tmp_path, "a.jpg")
    lines = f'{{"image": "a.jpg", "caption": "A dog ."}}\n{{"image": "a.jpg", "caption": "B", "id": {digits}}}\n'
    found = load_captions(write(tmp_path / "a.jsonl", lines), tmp_path)
    assert notes(found.dropped) == [("line 2", "not valid JSON")]


@pytest.mark.parametrize("depth", [30, 900])
def test_captions_in_lists_in_lists(tmp_path, depth):
    value = "[" * depth + '"A dog ."' + "]" * depth
    lines = f'{{"image": "a.jpg", "caption": "A cat ."}}\n{{"image": "a.jpg", "caption": {value}}}\n'
    add_images(tmp_path, "a.jpg")
    found = load_captions(write(tmp_path / "a.jsonl", lines), tmp_path)
    assert notes(found.dropped) == [("line 2", "empty caption of a.jpg")]
    assert captions_of([[[["A dog ."]]]]) == ["A dog ."]


def test_spaces_do_not_take_time_by_their_third_power(tmp_path):
    add_images(tmp_path, "a.jpg")
    row = "a.jpg| 1 A dog" + " " * 20_000 + "runs |  "
    found = load_captions(write(tmp_path / "results.csv", f"image_name| comment_number| comment\n{row}\n"), tmp_path)
    assert found.rows[0].captions == ("A dog" + " " * 20_000 + "runs",)
    assert notes(found.repaired) == [("line 2", "put in the missing second bar")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_text_says_so(tmp_path, encoding):
    path = write(tmp_path / "captions.txt", "image,caption\na.jpg,A dog .\n".encode(encoding))
    assert "save it as UTF-8" in one_sentence(lambda: load_captions(path, tmp_path))
    assert "save it as UTF-8" in one_sentence(lambda: read_split(path))
    assert "save it as UTF-8" in one_sentence(lambda: load_json(path))


def test_a_line_without_end_takes_no_memory_and_is_counted(tmp_path):
    add_images(tmp_path, "a.jpg", "b.jpg")
    path = tmp_path / "captions.txt"
    with path.open("wb") as file:
        file.write(b"image,caption\na.jpg,A dog .")
        file.seek(1 << 29, os.SEEK_CUR)  # half a gigabyte of zero bytes, of which the disk keeps nothing
        file.write(b"\nb.jpg,A cat .\n")
    tracemalloc.start()
    found = load_captions(path, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * MAX_LINE
    assert notes(found.repaired) == [("line 2", f"cut off after {MAX_LINE:,} bytes")]
    assert [row.path.name for row in found.rows] == ["a.jpg", "b.jpg"]


def test_lines_as_they_always_were(tmp_path):
    raw = b"\xef\xbb\xbfone\r\n\ntw\xffo\nthree\xe2\x80\xa8"
    whole = [Line(1, "one"), Line(2, ""), Line(3, "tw\ufffdo", "replaced bytes that are not UTF-8")]
    assert split_lines(raw) == [*whole, Line(4, "three\u2028")]
    assert list(read_lines(write(tmp_path / "a.txt", raw))) == split_lines(raw)
    longest = b"x" * MAX_LINE
    for end in (b"", b"\n", b"\r\n"):
        assert [line.repair for line in split_lines(longest + end + b"y" * bool(end))] == [""] * (1 + bool(end))
    assert split_lines(longest + b"y\nz") == [Line(1, "x" * MAX_LINE, "cut off after 1,048,576 bytes"), Line(2, "z")]


def test_a_text_that_is_too_long_or_wide_is_dropped_with_a_note(tmp_path):
    add_images(tmp_path, "a.png", "b.png", "c.png")
    write(tmp_path / "a.txt", "A dog .")
    write(tmp_path / "b.txt", b"x" * (MAX_LINE + 1))
    write(tmp_path / "c.txt", "A cat .".encode("utf-16"))
    found = load_captions(tmp_path, format="image-folder")
    assert [note.text for note in found.dropped] == [
        "b.txt is longer than 1,048,576 bytes, so its captions were not read",
        "c.txt is in UTF-16 or UTF-32, so its captions were not read",
    ]


def test_json_that_is_too_large_to_be_read_at_once(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.write(b'[{"image": "a.jpg"')
        file.truncate((1 << 30) + 1)
    assert "write it as JSON lines" in one_sentence(lambda: load_captions(path, tmp_path))


@pytest.mark.parametrize("pattern", ["{0..9999999}.tar", "{a,b}{1..99999999999}.tar", "{0..9999}{0..999}.tar"])
def test_a_pattern_of_too_many_archives(pattern):
    assert "a digit too many" in one_sentence(lambda: expand(pattern))
    assert len(expand("{00000..00003}-{a,b}.tar")) == 8


def test_weights_beyond_reason():
    for weight in ("9" * 400, "1001"):
        assert "others would count for nothing" in one_sentence(lambda weight=weight: parse_query(f"dog:{weight}"))
        assert "others would count for nothing" in one_sentence(
            lambda weight=weight: parse_prompts(f"a dog:-{weight}|a")
        )
    assert parse_query("dog:1000").terms[0].weight == 1000


def test_sizes_beyond_what_a_store_can_hold(tmp_path):
    with Store.open(tmp_path / "index.sqlite", create=True) as store:
        assert store.numbers(Filter(min_size=10**30, min_side=10**30)).tolist() == []
    result = CliRunner().invoke(main, ["find", "dog", "--min-size", "9" * 400 + "G"])
    assert result.exit_code == 2
    assert "is no size" in result.stderr


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (PreprocessConfig, []),
        (PreprocessConfig, {"size": "224"}),
        (PreprocessConfig, {"mean": 5}),
        (ModelConfig, {"embed_dim": [1]}),
        (TrainConfig, {"out": "x", "epochs": "two"}),
        (TrainConfig, {}),
    ],
)
def test_settings_of_the_wrong_kind(kind, values):
    assert kind.__name__ in one_sentence(lambda: from_json(kind, values))


@pytest.mark.parametrize("values", [b"[" * 5000, b'{"schema": 1, "concepts": [{"name": 1}]}', b"{}", b"\xff", b"null"])
def test_concepts_that_are_none(tmp_path, album, values):
    path = write(tmp_path / "concepts.json", values)
    result = CliRunner().invoke(main, ["concepts", "--index", str(album.index), "import", str(path)])
    assert result.exit_code == 1
    assert "holds no concepts of clipmatch" in result.stderr


@pytest.mark.parametrize("values", [b"[" * 5000, b"\xff", b"[]", b'{"format": "clipmatch", "schema": "two"}'])
def test_a_model_whose_settings_are_none(tmp_path, values):
    write(tmp_path / "model" / "config.json", values)
    result = CliRunner().invoke(main, ["find", "dog", "--images", str(tmp_path), "--model", str(tmp_path / "model")])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1, result.stderr
