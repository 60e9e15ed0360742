"""Captions in Parquet files, and pictures that are unpacked from them."""

import sys

import pytest
from captionfiles import add_images, embedded, names, notes, parquet, picture, put_table, webdataset, write

from clipmatch.data import load_captions
from clipmatch.errors import ClipmatchError


def test_parquet_with_paths_and_a_split(tmp_path):
    add_images(tmp_path / "images", "a.jpg", "b.jpg")
    file = put_table(
        tmp_path / "data.parquet",
        image_path=["a.jpg", "b.jpg", None, "c.jpg"],
        caption=["A dog .", None, "Lost .", "Gone ."],
        split=["train", "test", "train", "train"],
    )
    found = load_captions(file)
    assert [(row.path, row.captions, row.split) for row in found.rows] == [
        (tmp_path / "images" / "a.jpg", ("A dog .",), "train")
    ]
    assert notes(found.dropped) == [("row 2", "empty caption of b.jpg"), ("row 3", "no image")]
    assert found.missing == ("c.jpg",)


def test_pictures_inside_parquet_are_unpacked_once(tmp_path, own_cache):
    red, blue, lime = picture("red"), picture("blue"), picture("lime")
    file = embedded(
        tmp_path / "train-00000-of-00001.parquet",
        [
            {"bytes": red, "path": "a.png"},
            {"bytes": red, "path": "a.png"},  # a row a caption
            {"bytes": blue, "path": "../../a.png"},  # another picture of the same name
            {"bytes": lime, "path": "12:30 .png "},  # no name for every system
            {"bytes": picture("black"), "path": None},
            {"bytes": None, "path": "b.png"},
            None,
        ],
        caption=["A dog .", "A wet dog .", "A cat .", "A hen .", "A crow .", "Lost .", "Lost too ."],
    )
    found = load_captions(file)
    assert [row.captions for row in found.rows] == [
        ("A dog .", "A wet dog ."),
        ("A cat .",),
        ("A hen .",),
        ("A crow .",),
    ]
    assert found.rows[0].path.name == "a.png"
    assert [row.path.read_bytes() for row in found.rows] == [red, blue, lime, picture("black")]
    assert {row.path.parent.parent for row in found.rows} == {own_cache / "unpacked"}
    assert all(row.path.suffix == ".png" for row in found.rows)
    assert notes(found.dropped) == [("row 6", "no image"), ("row 7", "no image")]
    times = [row.path.stat().st_mtime_ns for row in found.rows]
    assert load_captions(file).rows == found.rows
    assert [row.path.stat().st_mtime_ns for row in found.rows] == times  # not a second time


@pytest.mark.parametrize("damage", ["gone", "short", "unfinished"])
def test_an_incomplete_unpacking_is_made_good(tmp_path, own_cache, damage):
    file = embedded(tmp_path / "x.parquet", [{"bytes": picture(), "path": "a.png"}], text=[["A dog .", "Wet ."]])
    path = load_captions(file).rows[0].path
    if damage == "gone":
        path.unlink()
    elif damage == "short":
        path.write_bytes(b"cut")
    else:
        path.parent.rename(path.parent.with_name(f"{path.parent.name}.partial"))
    (row,) = load_captions(file).rows
    assert (row.path, row.path.read_bytes(), row.captions) == (path, picture(), ("A dog .", "Wet ."))


def test_parquet_shards_by_folder_and_pattern_with_splits_in_their_names(tmp_path):
    data = tmp_path / "data"
    for part, colour in (("train", "red"), ("validation", "blue"), ("test", "lime")):
        images = [{"bytes": picture(colour), "path": f"{part}.png"}]
        embedded(data / f"{part}-00000-of-00001.parquet", images, caption_0=["A ."], caption_1=["B ."])
    found = load_captions(tmp_path)
    assert [(row.path.name, row.split) for row in found.rows] == [
        ("test.png", "test"),
        ("train.png", "train"),
        ("validation.png", "dev"),
    ]
    assert found.rows[0].captions == ("A .", "B .")
    pattern = load_captions(data / "{train,test}-00000-of-00001.parquet")
    assert names(pattern.rows) == ["train.png", "test.png"]


def test_other_files_of_a_data_set_on_the_hub_are_not_taken_for_captions(tmp_path):
    parquet(tmp_path / "data")
    write(tmp_path / "dataset_infos.json", "{}")
    write(tmp_path / "README.md", "---\nlicense: mit\n---\n")
    assert load_captions(tmp_path).source == tmp_path / "data"


def test_the_table_that_img2dataset_writes_beside_an_archive_is_not_read(tmp_path):
    webdataset(tmp_path)
    put_table(tmp_path / "00000.parquet", url=["http://a/b"], caption=["A dog ."], key=["000"])
    found = load_captions(tmp_path)
    assert (found.format, len(found.rows)) == ("webdataset", 2)


def test_a_place_that_can_not_be_written_is_one_sentence(tmp_path, own_cache):
    write(own_cache, "a file where the folder should be")
    file = embedded(tmp_path / "x.parquet", [{"bytes": picture(), "path": "a.png"}], text=["A dog ."])
    with pytest.raises(ClipmatchError, match=r"can't be unpacked into .*cache.unpacked.* CLIPMATCH_CACHE"):
        load_captions(file)


def test_without_its_library_the_extra_is_named(tmp_path, monkeypatch):
    file = parquet(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ClipmatchError, match=r'need pyarrow; install it: pip install "clipmatch\[data\]"'):
        load_captions(file)


def test_parquet_that_is_damaged_or_lacks_a_column(tmp_path):
    file = parquet(tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ClipmatchError, match=r"train\.parquet is not a whole Parquet file"):
        load_captions(file)
    embedded(file, [{"bytes": picture(), "path": "a.png"}], text=["A dog ."])
    data = bytearray(file.read_bytes())
    data[4:40] = bytes(36)  # the header of the first page; the footer is whole
    file.write_bytes(bytes(data))
    with pytest.raises(ClipmatchError, match=r"train\.parquet is not a whole Parquet file"):
        load_captions(file)
    with pytest.raises(ClipmatchError, match=r"needs an image column .*; it has url, alt"):
        load_captions(put_table(tmp_path / "x.parquet", url=["a"], alt=["b"]))
    with pytest.raises(ClipmatchError, match=r"holds no \.parquet file"):
        load_captions(add_images(tmp_path / "empty", "a.jpg"), format="parquet")


def test_a_picture_under_two_names_or_in_two_parts_is_said_to_be_one(tmp_path):
    """It becomes one image of the part that is farther from training; without a word, a leak would be hidden."""
    red, blue = picture("red"), picture("blue")
    rows = [{"bytes": red, "path": "a.png"}, {"bytes": red, "path": "a.png"}, {"bytes": red, "path": "b.png"}]
    embedded(tmp_path / "train-0.parquet", [*rows, {"bytes": blue, "path": "c.png"}], caption=["A dog .", *"BCD"])
    embedded(tmp_path / "validation-0.parquet", [{"bytes": blue, "path": "c.png"}], caption=[["A cat .", "A hen ."]])
    found = load_captions(tmp_path)
    assert [(row.captions, row.split) for row in found.rows] == [
        (("A dog .", "B", "C"), "train"),
        (("D", "A cat .", "A hen ."), "dev"),
    ]
    assert notes(found.repaired) == [
        ("row 3", "the picture of row 1 again: one image"),
        ("row 5", "the picture of row 4 again: one image, though of train and validation"),
    ]
