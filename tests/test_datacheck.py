"""Captioned photographs with every defect at a known place: each is found there, and nothing else is."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from captionfiles import embedded, karpathy, pack, picture, webdataset
from click.testing import CliRunner
from PIL import Image

from clipmatch.captionrules import MOST_WORDS, find_odd, find_repeated, find_shared, normal_caption, why_odd
from clipmatch.cli import main
from clipmatch.data import load_captions, split_captions
from clipmatch.datacheck import check_data
from clipmatch.datafix import write_clean
from clipmatch.datareport import report_text
from clipmatch.embedder import ImageEmbeddings
from clipmatch.errors import ClipmatchError
from clipmatch.formats import Entry
from clipmatch.mislabels import FEWEST, background, find_misfits, fits
from clipmatch.picturecheck import BITS, Look, find_hash, group_near, look

MANY_WORDS = "a dog " * 51 + "runs"
ODD = {  # line -> (caption, reason)
    2: ("Star", "one word"),
    3: ("1 2 3 .", "no letters"),
    4: ("<b>a star</b> at night", "markup or an address (<b>)"),
    5: ("a star from https://stars.org/1.jpg", "markup or an address (https://)"),
    6: ("a starrrrrr at night", "a character repeated (rrrrrr)"),
    7: ("a star star star star at night", "a word repeated (star)"),
    8: ("a " + " ".join(f"star{n}" for n in range(MOST_WORDS)), "101 words"),
    9: ("a caf\ufffd at night", "characters that are not UTF-8"),
}
COMMON = "a drawn picture of things"


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def copy(scenes, tmp_path):
    """A copy of the scenes: line 2 + 5 n is the first of the five captions of image n; 60 to train on, 20 for dev."""
    return shutil.copytree(scenes, tmp_path / "scenes")


@pytest.fixture
def broken(copy):
    """The same with defects. Whatever a test knows of them is said beside it."""
    file = copy / "captions.txt"
    lines = file.read_text().splitlines()
    for number, (caption, _) in ODD.items():  # images 0 and 1
        lines[number - 1] = lines[number - 1].split(",")[0] + "," + caption.replace("\ufffd", "\udce9")
    lines[11] = "no comma in this line"  # line 12, of image 2
    lines[12] = "train-00002.jpg,  "  # line 13
    lines[13] = "../train-00002.jpg,a star at night"  # line 14
    name, _, words = lines[16].partition(",")
    lines[17] = f"{name},{words.upper()} ."  # lines 17 and 18, of image 3: the same words
    for number in range(22, 22 + 5 * 10, 5):  # lines 22, 27, ... 67, of images 4 to 13
        lines[number - 1] = lines[number - 1].split(",")[0] + f",{COMMON}"
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    images = copy / "Images"
    (images / "train-00020.jpg").unlink()
    (images / "train-00021.jpg").write_text("no picture")
    whole = (images / "train-00022.jpg").read_bytes()
    (images / "train-00022.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    (images / "train-00023.jpg").write_bytes(b"")
    shutil.copy(images / "dev-00000.jpg", images / "train-00030.jpg")
    shutil.copy(images / "train-00031.jpg", images / "train-00032.jpg")
    with Image.open(images / "train-00033.jpg") as image:  # as another programme would save it
        image.resize((80, 80)).save(images / "dev-00001.jpg", quality=80)
    return copy


def five(image):
    """The lines of image n of the file."""
    return list(range(2 + 5 * image, 7 + 5 * image))


# The whole


def test_scenes_have_nothing_wrong(scenes):
    report = check_data(scenes, progress=False)
    assert set(report.counts.values()) == {0}
    assert report_text(report).endswith("\nfound: nothing wrong")


def test_every_defect_is_found_at_its_place_and_nothing_else(broken):
    pytest.importorskip("imagehash")
    found = json.loads(run("data", "check", broken, "--json").stdout)
    assert found["rows"] == 400
    assert [(note["line"], note["text"]) for note in found["repaired"]] == [(9, "replaced bytes that are not UTF-8")]
    assert [(note["line"], note["text"]) for note in found["dropped"]] == [
        (12, "no comma after the image name"),
        (13, "empty caption of train-00002.jpg"),
        (14, "the image name ../train-00002.jpg leaves the image folder"),
    ]
    assert {odd["line"]: (odd["caption"], odd["reason"]) for odd in found["odd"]} == ODD
    assert [odd["image"] for odd in found["odd"]] == ["train-00000.jpg"] * 5 + ["train-00001.jpg"] * 3
    assert [(one["image"], one["lines"]) for one in found["repeated"]] == [("train-00003.jpg", [17, 18])]
    (shared,) = found["shared"]
    assert (shared["caption"], shared["lines"]) == (COMMON, list(range(22, 72, 5)))
    assert shared["images"] == [f"train-{number:05}.jpg" for number in range(4, 14)]
    missing = {"image": "train-00020.jpg", "reason": "does not exist", "lines": five(20)}
    assert found["missing"] == [missing]
    assert [(bad["image"], bad["lines"]) for bad in found["unreadable"]] == [
        (f"train-{number:05}.jpg", five(number)) for number in (21, 22, 23)
    ]
    reasons = [bad["reason"] for bad in found["unreadable"]]
    assert reasons[0] == "it is not an image in a known format"
    assert "truncated" in reasons[1]
    assert reasons[2] == "the file is empty"
    assert found["exact"] == [
        {"images": ["train-00030.jpg", "dev-00000.jpg"], "splits": ["train", "dev"], "across": True},
        {"images": ["train-00031.jpg", "train-00032.jpg"], "splits": ["train", "train"], "across": False},
    ]
    near = {"images": ["train-00033.jpg", "dev-00001.jpg"], "splits": ["train", "dev"], "across": True}
    assert found["near"] == [near]
    splits = found["splits"]
    assert (splits["train"], splits["dev"], splits["neither"], splits["problem"]) == (59, 20, 0, None)
    assert found["per_image"] == {"min": 2, "median": 5, "max": 5, "counts": {"2": 1, "5": 79}}
    assert found["mislabelled"] is None
    assert found["counts"] == {
        "repaired": 1,
        "dropped": 3,
        "missing": 1,
        "unreadable": 3,
        "odd": 8,
        "repeated": 1,
        "shared": 1,
        "exact": 2,
        "near": 1,
        "mislabelled": 0,
        "across_splits": 2,
        "splits": 0,
    }


def test_the_keys_of_the_json_are_stable(scenes):
    values = json.loads(json.dumps(check_data(scenes, progress=False).to_json()))
    assert values["schema"] == 1
    assert list(values) == [
        "schema", "counts", "source", "format", "unit", "folder", "rows", "repaired", "dropped", "images", "missing",
        "unreadable", "per_image", "odd", "repeated", "shared", "splits", "exact", "near", "near_note", "mislabelled",
        "mislabelled_note",
    ]  # fmt: skip


def test_the_text_says_the_same_in_sections(broken):
    pytest.importorskip("imagehash")
    result = run("data", "check", broken)
    assert "rows: 400 read, 1 repaired, 3 dropped\n" in result.stdout
    assert "images: 80 named, 1 missing, 3 unreadable\n" in result.stdout
    assert "    train-00023.jpg: the file is empty (lines 117, 118, 119, 120, 121)\n" in result.stdout
    assert '    line 2: one word: "Star"\n' in result.stdout
    assert f'    "{COMMON}": 10 images, lines 22, 27, 32, 37, 42, …\n' in result.stdout
    assert "copies: 2 groups byte for byte, 1 near; 2 across train and dev\n" in result.stdout
    assert "    across train and dev: train-00030.jpg (train), dev-00000.jpg (dev)\n" in result.stdout
    assert "found: repaired 1, dropped 3, missing 1, " in result.stdout.splitlines()[-1]


def test_at_most_ten_examples_of_a_kind(copy):
    for number in range(12):
        (copy / "Images" / f"train-{number:05}.jpg").unlink()
    text = report_text(check_data(copy, progress=False))
    assert text.count(": does not exist (") == 10
    assert "train-00009.jpg: does not exist (lines 47, 48, 49, 50, 51)\n    and 2 more\n" in text


def test_an_image_in_both_split_files_is_said_and_the_check_goes_on(copy, tmp_path):
    names = (copy / "splits" / "train.txt").read_text()
    (tmp_path / "train.txt").write_text(names + "dev-00000.jpg\n")
    dev = copy / "splits" / "dev.txt"
    result = run("data", "check", copy, "--train-split", tmp_path / "train.txt", "--dev-split", dev)
    assert "splits: none. " in result.stdout
    assert "both list dev-00000.jpg (1 images in all)" in result.stdout
    assert result.stdout.endswith("found: unusable splits 1\n")


def test_without_the_library_one_sentence_says_so(broken, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    result = run("data", "check", broken)
    assert result.stdout.count("Near copies were not looked for") == 1
    assert 'pip install "clipmatch[data]"' in result.stdout
    assert "copies: 2 groups byte for byte, near ones not looked for; 1 across train and dev\n" in result.stdout


def test_what_stops_the_check_is_one_sentence(tmp_path):
    result = run("data", "check", tmp_path / "nowhere", code=1)
    assert result.stderr == f"Error: There is no caption file or folder {tmp_path / 'nowhere'}; check the path.\n"


# Captions


@pytest.mark.parametrize(
    "caption",
    [
        "A dog .",
        "a dog's bone",
        "Two dogs ... running !!!",
        "A man in a statefarm.com hat",
        "no no no , he said",
        "一只狗在草地上",
        "犬が走る",
        "5 < 6 dogs & cats",
        "a t-shirt",
        MANY_WORDS.replace("a dog " * 51, "one big dog and " * 20),
    ],
)
def test_captions_that_describe_something_are_not_odd(caption):
    assert why_odd(caption) is None


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("狗", "one word"),
        ("T-shirt !", "one word"),
        ("AT&amp;T shop", "markup or an address (&amp;)"),
        (MANY_WORDS, "103"),
    ],
)
def test_captions_that_describe_nothing_are_odd(caption, reason):
    assert why_odd(caption).startswith(reason)


def test_captions_are_compared_by_their_words():
    assert normal_caption(" A dog, running! ") == normal_caption("a DOG running .") == "a dog running"
    entries = [Entry(2, "a.jpg", "A dog ."), Entry(3, "a.jpg", "a dog"), Entry(4, "b.jpg", "A dog !")]
    assert [one.lines for one in find_repeated(entries)] == [[2, 3]]
    assert find_shared(entries) == find_odd(entries) == []
    nine, ten = ([Entry(line, f"{line}.jpg", "A dog .") for line in range(count)] for count in (9, 10))
    assert find_shared(nine) == []
    assert [len(one.images) for one in find_shared(ten)] == [10]


# Pictures


def flip(bits, *places):
    bits = bits.copy()
    bits[list(places)] ^= True
    return bits


def test_near_copies_differ_in_few_bits():
    first, second = np.arange(64) % 2 == 0, np.arange(64) < 32
    near = flip(first, *range(BITS))
    far = flip(first, *range(BITS + 1, 2 * BITS + 2))  # one bit too many from the first, more from the other
    assert group_near(np.array([first, second, near, far, second])) == [[0, 2], [1, 4]]
    between = flip(first, 0, 1, *range(BITS + 1, 2 * BITS - 1))  # 6 from the first, 5 from the far one
    assert group_near(np.array([first, second, near, far, between])) == [[0, 2, 3, 4]]


def test_near_copies_over_more_than_a_block_are_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr("clipmatch.picturecheck.BLOCK", 7)
    rng = np.random.default_rng(0)
    base = rng.random((12, 64)) < 0.5
    hashes = np.concatenate([base, [flip(row, *rng.choice(64, BITS, False)) for row in base[:5]]])
    apart = (hashes[:, None] != hashes[None]).sum(axis=2)
    pairs = [[int(one), int(other)] for one, other in zip(*np.nonzero(np.triu(apart <= BITS, 1)), strict=True)]
    assert pairs == [[place, 12 + place] for place in range(5)]
    assert group_near(hashes) == pairs


def test_flat_pictures_are_no_near_copies(tmp_path):
    pytest.importorskip("imagehash")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    assert look(tmp_path / "red.png", find_hash()).bits is None
    assert isinstance(look(tmp_path / "nowhere.png", None), Look)
    assert look(tmp_path / "nowhere.png", None).reason == "no such file or directory"


# Mislabelled captions


@pytest.fixture
def pairs():
    """100 pictures with 4 captions each, in 32 dimensions: a caption is its picture with half as much noise."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(100, 32))
    owners = np.repeat(np.arange(100), 4)
    texts = images[owners] + rng.normal(scale=0.5, size=(400, 32))
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts)]
    return unit[0].astype(np.float32), unit[1].astype(np.float32), owners


def test_swapped_captions_are_found(pairs):
    images, texts, owners = pairs
    assert find_misfits(images, texts, owners) == []
    swapped = owners.copy()
    swapped[[3, 50, 222]] = owners[[222, 3, 50]]
    found = find_misfits(images, texts, swapped)
    assert {misfit.place for misfit in found} == {3, 50, 222}
    assert not any(misfit.picture for misfit in found)
    own = images @ texts[3]
    (third,) = (misfit for misfit in found if misfit.place == 3)
    assert third.cosine == pytest.approx(own[swapped[3]])
    assert third.better == pytest.approx((own > own[swapped[3]]).mean())


def test_a_caption_that_agrees_with_its_siblings_is_not_listed_alone(pairs):
    images, texts, owners = pairs
    said = np.zeros(32, np.float32)
    said[0] = 2  # something that all four say; the first says nothing else
    texts = texts.copy()
    texts[40:44] += said
    texts[40] = said - 0.3 * images[10]
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    low = fits(images, texts, owners)
    assert low.argmin() == 40
    assert find_misfits(images, texts, owners) == []
    alone = owners != 10
    alone[40] = True  # without them there is nothing to agree with
    places = np.flatnonzero(alone)
    assert [places[one.place] for one in find_misfits(images, texts[places], owners[places])] == [40]


def test_backgrounds_are_those_of_all_cosines(pairs):
    images, texts, _ = pairs
    cosines = (texts @ images.T).astype(np.float64)
    mean, spread = background(texts, images)
    assert mean == pytest.approx(cosines.mean(axis=1), abs=1e-6)
    assert spread == pytest.approx(cosines.std(axis=1), abs=1e-5)


def test_a_picture_that_none_of_its_captions_fits_is_found(pairs):
    images, texts, owners = pairs
    images = images.copy()
    images[7] = -images[7]
    found = find_misfits(images, texts, owners)
    assert {misfit.place for misfit in found} == {28, 29, 30, 31}
    assert all(misfit.picture for misfit in found)


def test_too_few_pictures_tell_nothing(pairs, copy):
    images, texts, owners = pairs
    few = owners < FEWEST - 1
    assert find_misfits(images[: FEWEST - 1], -texts[few], owners[few]) == []
    for image in (copy / "Images").glob("train-000[1-4]?.jpg"):
        image.unlink()
    report = check_data(copy, model=Oracle(copy), progress=False)
    assert report.mislabelled is None
    assert report.mislabelled_note == f"Mislabelled captions can't be told among 40 images; that takes {FEWEST}."


class Oracle:
    """A model that knows which captions the scenes came with."""

    def __init__(self, folder):
        owners = {entry.caption: entry.image for entry in load_captions(folder).entries}
        rows = np.random.default_rng(0).normal(size=(80, 32)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        names = sorted(set(owners.values()))
        self.image = dict(zip(names, rows, strict=True))
        self.text = {caption: self.image[owner] for caption, owner in owners.items()}

    def embed_images(self, paths, progress=True):
        paths = [path for path in paths if path.name != "train-00005.jpg"]  # a model may fail where a check does not
        return ImageEmbeddings(np.array([self.image[path.name] for path in paths]), paths, [])

    def embed_texts(self, texts, progress=False):
        noise = np.random.default_rng(1).normal(scale=0.1, size=(len(texts), 32))
        rows = np.array([self.text[text] for text in texts]) + noise
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_mislabelled_captions_are_listed_with_their_lines(copy):
    model = Oracle(copy)
    file = copy / "captions.txt"
    lines = file.read_text().splitlines()
    lines[19] = lines[19].partition(",")[0] + ",star"  # odd, and named as that: no model is asked
    one, other = lines[10].partition(","), lines[99].partition(",")  # lines 11 and 100
    lines[10], lines[99] = f"{one[0]},{other[2]}", f"{other[0]},{one[2]}"
    file.write_text("\n".join(lines))
    report = check_data(copy, model=model, progress=False)
    assert sorted((found.line, found.image, found.caption) for found in report.mislabelled) == [
        (11, one[0], other[2]),
        (100, other[0], one[2]),
    ]
    text = report_text(report)
    assert "mislabelled, perhaps: 2 captions, 0 images\n" in text
    assert f"    line 11: {one[0]}: " in text
    assert "images that none of their captions fits" not in text


def test_an_image_with_another_ones_captions_is_listed_as_a_whole(copy):
    model = Oracle(copy)
    file = copy / "captions.txt"
    text = file.read_text()
    for one, other in (("08.jpg", "x.jpg"), ("10.jpg", "08.jpg"), ("x.jpg", "10.jpg")):
        text = text.replace(f"train-000{one}", f"train-000{other}")
    file.write_text(text)
    report = check_data(copy, model=model, progress=False)
    assert {found.image for found in report.mislabelled} == {"train-00008.jpg", "train-00010.jpg"}
    assert all(found.picture for found in report.mislabelled)
    text = report_text(report)
    assert "mislabelled, perhaps: 0 captions, 2 images\n" in text
    assert f"    train-00010.jpg (lines {', '.join(map(str, five(8)))})\n" in text


def test_the_model_is_named_on_the_command_line(scenes):
    result = run("data", "check", scenes, "--model", "embedded", "--json")
    assert isinstance(json.loads(result.stdout)["mislabelled"], list)
    assert "nosuch" in run("data", "check", scenes, "--model", "nosuch/model/here", code=1).stderr


# A clean copy


def test_the_clean_copy_has_all_that_is_good_and_nothing_else(broken, tmp_path):
    before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    out = tmp_path / "clean" / "captions.csv"
    result = run("data", "check", broken, "--fix", out)
    bad_images = {f"train-{number:05}.jpg" for number in (20, 21, 22, 23, 30)}
    entries = load_captions(broken).entries
    expected = [
        (entry.image, entry.caption) for entry in entries if entry.image not in bad_images and entry.line not in ODD
    ]
    clean = load_captions(out, broken / "Images")
    assert clean.format == "table"
    assert [(entry.image, entry.caption) for entry in clean.entries] == expected
    assert clean.repaired == clean.dropped == clean.missing == ()
    splits = split_captions(clean, tmp_path / "clean" / "captions.train.txt", tmp_path / "clean" / "captions.dev.txt")
    dev = {row.path.name for row in splits.dev}
    assert dev == {f"dev-{number:05}.jpg" for number in range(20)}
    # gone: image 0 with all its captions, and the bad ones
    assert {row.path.name for row in splits.train} == {f"train-{number:05}.jpg" for number in range(1, 60)} - bad_images
    words = (
        "left out: lines that were dropped (3), captions of missing images (5), captions of unreadable images (15), "
    )
    assert words + "captions of images that dev has too (5), odd captions (8)" in result.stdout
    command = result.stdout.splitlines()[-1]
    assert command.startswith(f"train: clipmatch train --captions {out} --images {broken / 'Images'} --train-split ")
    assert {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()} == before
    again = check_data(out, broken / "Images", train=out.with_suffix(".train.txt"), dev=out.with_suffix(".dev.txt"))
    still = {name for name, count in again.counts.items() if count}
    assert still - {"near"} == {"repeated", "shared", "exact", *(["across_splits"] if again.near else [])}


def test_quotes_and_commas_survive(tmp_path):
    captions = ['A sign says "stop", he said', '"Quoted"', "semi; colon\ttab", "two\nlines", "=1+1 is two"]
    table = "\n".join(['a.png,"' + caption.replace('"', '""') + '"' for caption in captions])
    (tmp_path / "captions.csv").write_text(f"image,caption\n{table}\n")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    data = load_captions(tmp_path / "captions.csv", tmp_path)
    assert [entry.caption for entry in data.entries] == captions
    fixed = write_clean(data, check_data(data, progress=False), tmp_path / "clean.csv")
    clean = [entry.caption for entry in load_captions(fixed.file, tmp_path).entries]
    assert clean == [captions[0], "semi; colon tab", "two lines", captions[4]]


def test_nothing_is_overwritten(copy, tmp_path):
    out = tmp_path / "clean.csv"
    out.write_text("mine")
    assert "is there already and is not overwritten" in run("data", "check", copy, "--fix", out, code=1).stderr
    assert out.read_text() == "mine"
    (tmp_path / "other.dev.txt").write_text("mine")
    assert "other.dev.txt is there" in run("data", "check", copy, "--fix", tmp_path / "other.csv", code=1).stderr
    assert not (tmp_path / "other.csv").exists()
    assert "name it .csv" in run("data", "check", copy, "--fix", tmp_path / "clean.txt", code=1).stderr


def test_a_hash_divides_the_clean_copy_as_before(copy, tmp_path):
    shutil.rmtree(copy / "splits")
    result = run("data", "check", copy, "--json", "--fix", tmp_path / "clean.csv")
    assert json.loads(result.stdout)["splits"]["origin"].startswith("split by hash")  # stdout is JSON alone
    assert "left out: nothing\n" in result.stderr
    assert [path.name for path in tmp_path.glob("clean*")] == ["clean.csv"]


def test_nothing_worth_keeping_is_an_error(tmp_path):
    (tmp_path / "captions.csv").write_text("image,caption\na.png,dog\n")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    data = load_captions(tmp_path / "captions.csv", tmp_path)
    with pytest.raises(ClipmatchError, match=r"Nothing of .* is worth keeping"):
        write_clean(data, check_data(data, progress=False), tmp_path / "clean.csv")


def test_the_clean_copy_of_archives_is_read_from_them(scenes, tmp_path):
    """Parts told by the names of shards, and test, which no split file lists, are told by a column."""
    images = sorted((scenes / "Images").iterdir())
    for number, part in enumerate(("train", "val", "test")):
        pictures = [path.read_bytes() for path in images[4 * number : 4 * number + 4]]
        samples = {f"{place}.jpg": data for place, data in enumerate(pictures)}
        samples |= {f"{place}.txt": b"a star at night\na star and the moon" for place in range(4)}
        samples["4.txt"] = b"a star without a picture"
        pack(tmp_path / "shards" / f"{part}-000.tar", samples.items())
    out = tmp_path / "clean.csv"
    result = run("data", "check", tmp_path / "shards", "--fix", out)
    assert "24 captions; left out: samples that were dropped (3)" in result.stdout
    clean = load_captions(out, tmp_path / "shards")
    before = load_captions(tmp_path / "shards")
    assert clean.rows == before.rows
    assert [row.split for row in clean.rows] == ["test"] * 4 + ["train"] * 4 + ["dev"] * 4
    splits = split_captions(clean, out.with_suffix(".train.txt"), out.with_suffix(".dev.txt"))
    assert {row.path.parent.name for row in splits.dev} == {"val-000.tar"}
    assert [row.path for row in split_captions(clean).dev] == [row.path for row in splits.dev]


def test_the_clean_copy_of_parquet_says_where_its_pictures_are(tmp_path, own_cache):
    pictures = [{"bytes": picture(colour), "path": f"{colour}.png"} for colour in ("red", "blue", "lime")]
    file = embedded(tmp_path / "data.parquet", pictures, caption=[["A red dog ."], ["A blue dog .", "dog"], None])
    result = run("data", "check", file, "--fix", tmp_path / "clean.csv")
    assert "2 captions; left out: rows that were dropped (1), odd captions (1)" in result.stdout
    folder = next((own_cache / "unpacked").glob("data-*/")).absolute()
    assert f"The pictures lie in the folder for caches, {folder}; keep it, or a copy." in result.stdout
    assert f"--images {folder} " in result.stdout.splitlines()[-1]
    rows = load_captions(tmp_path / "clean.csv", folder).rows
    assert [(row.path.name, row.captions) for row in rows] == [
        ("red.png", ("A red dog .",)),
        ("blue.png", ("A blue dog .",)),
    ]


def test_what_no_text_file_holds_is_left_out_of_it(tmp_path):
    """Names that are not UTF-8, and half characters, which JSON can spell."""
    for name in (b"a.png", b"b\xff.png", b"c\nd.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / os.fsdecode(name))
        (tmp_path / os.fsdecode(name)).with_suffix(".txt").write_text("A dog .")
    result = run("data", "check", tmp_path, "--fix", tmp_path / "clean" / "out.csv")
    assert "1 caption; left out: captions of images with names that no text file holds (2)" in result.stdout
    records = tmp_path / "half.json"
    records.write_text('[{"image": "a.png", "caption": ["A \\ud83d dog .", "A cat ."]}]')
    report = check_data(records, tmp_path, progress=False)
    assert [(one.caption, one.reason) for one in report.odd] == [("A \ufffd dog .", "characters that are not UTF-8")]


def test_a_division_that_can_not_be_carried_over_is_said(copy, tmp_path):
    both = copy / "splits" / "train.txt"
    both.write_text(both.read_text() + "dev-00000.jpg\n")
    result = run("data", "check", copy, "--fix", tmp_path / "clean.csv")
    assert "\nNo split files were written. " in result.stdout
    assert "both list dev-00000.jpg" in result.stdout
    assert not (tmp_path / "clean.train.txt").exists()


# A contact sheet


def test_the_sheet_shows_captions_and_keeps_the_place_of_bad_images(broken, tmp_path):
    out = tmp_path / "sheet.html"
    assert run("data", "show", broken, "-n", 80, "-o", out).stdout == f"page: {out}\n"
    page = out.read_text()
    assert page.count('<figure class="panel">') == 80
    assert page.count("<img ") == 76
    assert "80 of 80 images, drawn with seed 0." in page
    for reason in ("no such file or directory", "it is not an image in a known format", "the file is empty"):
        assert page.count(reason) == 1
    assert "&lt;b&gt;a star&lt;/b&gt; at night" in page
    assert "5 captions" in page


def test_the_seed_chooses(copy, tmp_path):
    def names(seed):
        run("data", "show", copy, "-n", 6, "--seed", seed, "-o", tmp_path / "sheet.html")
        return [line for line in (tmp_path / "sheet.html").read_text().splitlines() if 'class="name"' in line]

    first = names(0)
    assert len(first) == 6
    assert names(0) == first != names(1)
    assert "name it .html" in run("data", "show", copy, "-o", tmp_path / "sheet.png", code=1).stderr


# Downloads


def kaggle_layout(root, name):
    """A folder as Kaggle delivers it."""
    if name == "flickr8k":
        captions, images = root / "captions.txt", root / "Images"
        text = "image,caption\n1.jpg,A dog runs .\n"
    else:
        inner = root / "flickr30k_images"
        captions, images = inner / "results.csv", inner / "flickr30k_images"
        text = "image_name| comment_number| comment\n1.jpg| 0| A dog runs .\n"
    images.mkdir(parents=True)
    captions.write_text(text)
    Image.new("RGB", (9, 9)).save(images / "1.jpg")
    return captions, images


@pytest.mark.parametrize(
    ("name", "handle"), [("flickr8k", "adityajn105/flickr8k"), ("flickr30k", "hsankesara/flickr-image-dataset")]
)
def test_a_download_says_where_it_is_and_how_to_go_on(name, handle, tmp_path, monkeypatch):
    kagglehub = pytest.importorskip("kagglehub")
    asked = []

    def dataset_download(handle, output_dir=None):
        asked.append((handle, output_dir))
        kaggle_layout(tmp_path / "cached", name)
        return str(tmp_path / "cached")

    monkeypatch.setattr(kagglehub, "dataset_download", dataset_download)
    lines = run("data", "download", name).stdout.splitlines()
    captions = next((tmp_path / "cached").rglob("captions.txt" if name == "flickr8k" else "results.csv"))
    images = next((tmp_path / "cached").rglob("1.jpg")).parent
    assert asked == [(handle, None)]
    assert lines[0] == f"captions: {captions}"
    assert lines[1] == f"images:   {images} (1)"
    assert lines[2] == f"train:    clipmatch train --captions {captions} --images {images} --out out/{name}"
    shutil.rmtree(tmp_path / "cached")
    run("data", "download", name, "--out", tmp_path / "mine")
    assert asked[1] == (handle, str(tmp_path / "mine"))


def failures():
    """What the library raises -> what the user reads."""
    requests = pytest.importorskip("requests")
    exceptions = pytest.importorskip("kagglehub.exceptions")

    def refused(status):
        response = requests.Response()
        response.status_code = status
        return exceptions.KaggleApiHTTPError(f"{status} Client Error.", response=response)

    return [
        (refused(401), "hand out adityajn105/flickr8k (401): make an API token"),
        (refused(403), "hand out adityajn105/flickr8k (403): make an API token"),
        (exceptions.UnauthenticatedError(), "hand out adityajn105/flickr8k: make an API token"),
        (exceptions.CredentialError("bad"), "hand out adityajn105/flickr8k: make an API token"),
        (refused(404), "Kaggle has no data set adityajn105/flickr8k any more"),
        (refused(500), "failed (500 Client Error)"),
        (requests.ConnectionError("no name"), "Kaggle can't be reached"),
        (requests.Timeout("slow"), "Kaggle can't be reached"),
        (exceptions.DataCorruptionError("bad\nsum."), "failed (bad sum)"),
        (FileExistsError("output_dir is not empty"), "name an empty folder"),
    ]


def test_each_failure_of_a_download_is_one_sentence(monkeypatch, tmp_path):
    kagglehub = pytest.importorskip("kagglehub")
    for error, words in failures():

        def dataset_download(handle, output_dir=None, error=error):
            raise error

        monkeypatch.setattr(kagglehub, "dataset_download", dataset_download)
        result = run("data", "download", "flickr8k", "--out", tmp_path, code=1)
        assert words in result.stderr
        assert result.stderr.count("\n") == 1


def test_without_kagglehub_a_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    assert 'pip install "clipmatch[data]"' in run("data", "download", "flickr8k", code=1).stderr


# Captions of other kinds


def test_records_are_not_called_lines(tmp_path):
    report = check_data(karpathy(tmp_path), progress=False)
    assert report.unit == "record"
    assert "line" not in report_text(report).replace("mislabelled", "")


def test_a_record_with_five_bad_captions_is_named_once(tmp_path):
    records = [
        {"image": "gone.png", "caption": ["A dog .", "A cat .", "a dog"]},
        {"image": "a.png", "caption": "A hen ."},
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    report = check_data(tmp_path / "records.json", tmp_path, progress=False)
    assert [image.lines for image in report.missing] == [[1]]
    text = report_text(report)
    assert "gone.png: does not exist (record 1)" in text
    assert 'record 1: gone.png: "A dog ."' in text


def test_an_archive_is_checked_without_unpacking(tmp_path):
    report = check_data(webdataset(tmp_path), progress=False)
    assert report.format == "webdataset"
    assert report.images > 0
    assert report.unreadable == []
    assert "found: " in report_text(report)
