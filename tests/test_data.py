"""Caption files with the quirks of the real ones, and splits that leak nothing."""

import re
from pathlib import Path

import pytest

from clipmatch.data import CaptionedImage, content_hash, load_captions, read_split, select_split, split_captions
from clipmatch.errors import ClipmatchError

FLICKR8K = Path(__file__).parents[2] / "shared" / "flickr8k"
needs_flickr8k = pytest.mark.skipif(
    not (FLICKR8K / "captions.txt").exists(), reason=f"Flickr8k is not there ({FLICKR8K})"
)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def add_images(folder, *names):
    """Readers look whether an image is there and never into it, so an empty file will do."""
    for name in names:
        write(folder / name, b"")
    return folder


def captions_of(found):
    return {row.path.name: list(row.captions) for row in found.rows}


def notes(lines):
    return [(note.line, note.text) for note in lines]


# Formats


def test_flickr8k_csv_takes_csv_quotes_off_and_keeps_the_others(tmp_path):
    file = write(
        tmp_path / "captions.txt",
        "image,caption\n"
        "a.jpg,A dog , running .\n"
        'a.jpg,"A cat , asleep ."\n'
        'a.jpg,"A shirt that says "" ADHD "" ."\n'
        'a.jpg,A sign says "stop" .\n'
        'a.jpg,"Stop" said the "sign"\n',
    )
    add_images(tmp_path / "Images", "a.jpg")
    found = load_captions(file)
    assert found.format == "flickr8k-csv"
    assert captions_of(found) == {
        "a.jpg": [
            "A dog , running .",
            "A cat , asleep .",
            'A shirt that says " ADHD " .',
            'A sign says "stop" .',
            '"Stop" said the "sign"',
        ]
    }
    assert found.repaired == found.dropped == found.missing == ()
    assert found.rows[0].path == tmp_path / "Images" / "a.jpg"


def test_flickr8k_token_reports_the_image_that_does_not_exist(tmp_path):
    file = write(
        tmp_path / "Flickr8k.token.txt",
        "1.jpg#0\tA child .\n1.jpg#1\tA girl , going in .\n2258277193_586949ec62.jpg.1#0\tpeople waiting\n",
    )
    add_images(tmp_path / "Flicker8k_Dataset", "1.jpg", "2258277193_586949ec62.jpg")
    found = load_captions(file)
    assert found.format == "flickr8k-token"
    assert captions_of(found) == {"1.jpg": ["A child .", "A girl , going in ."]}
    assert found.missing == ("2258277193_586949ec62.jpg.1",)


def test_flickr30k_csv_repairs_the_row_without_its_second_bar(tmp_path):
    file = write(
        tmp_path / "results.csv",
        "image_name| comment_number| comment\n"
        '2199200615.jpg| 3| A dog | on "grass" .\n'
        "2199200615.jpg| 4   A dog runs across the grass .\n"
        '7.jpg| 0| "Hello" , he said .\n'
        "7.jpg| 1\n",
    )
    add_images(tmp_path / "flickr30k_images", "2199200615.jpg", "7.jpg")
    found = load_captions(file)
    assert found.format == "flickr30k-csv"
    assert captions_of(found) == {
        "2199200615.jpg": ['A dog | on "grass" .', "A dog runs across the grass ."],
        "7.jpg": ['"Hello" , he said .'],
    }
    assert notes(found.repaired) == [(3, "put in the missing second bar")]
    assert [note.line for note in found.dropped] == [5]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.csv", 'id,Caption,filename\n1,"Red, and\nround",a.jpg\n2,"Say ""hi""",b.jpg\n'),
        ("pairs.tsv", 'path\ttext\na.jpg\t"Red, and\nround"\nb.jpg\tSay "hi"\n'),
        ("pairs.csv", '"image_name";"sentence"\n"a.jpg";"Red, and\nround"\n"b.jpg";"Say ""hi"""\n'),
    ],
    ids=["csv", "tsv", "semicolon"],
)
def test_table_finds_its_columns_by_name(tmp_path, name, content):
    file = write(tmp_path / name, content)
    add_images(tmp_path, "a.jpg", "b.jpg")
    found = load_captions(file)
    assert found.format == "table"
    assert captions_of(found) == {"a.jpg": ["Red, and\nround"], "b.jpg": ['Say "hi"']}
    assert found.dropped == found.repaired == ()


def test_a_stray_quote_in_a_table_does_not_swallow_the_lines_after_it(tmp_path):
    file = write(
        tmp_path / "captions.tsv", 'file_name\tcaption\na.jpg\t"A dog\nb.jpg\tA cat\nb.jpg\t"Miaow" , it says\n'
    )
    add_images(tmp_path, "a.jpg", "b.jpg")
    found = load_captions(file)
    assert captions_of(found) == {"a.jpg": ['"A dog'], "b.jpg": ["A cat", '"Miaow" , it says']}
    assert notes(found.repaired) == [(2, "took its quotes literally"), (4, "took its quotes literally")]


def test_commas_that_nobody_quoted_stay_in_the_last_column(tmp_path):
    file = write(tmp_path / "captions.csv", 'image,caption\na.jpg,A dog, "wet", runs\nb.jpg\n')
    add_images(tmp_path, "a.jpg", "b.jpg")
    found = load_captions(file)
    assert captions_of(found) == {"a.jpg": ['A dog, "wet", runs']}
    assert notes(found.repaired) == [(2, "took the rest of the line as the caption")]
    assert notes(found.dropped) == [(3, "1 fields where the header has 2")]


def test_bom_crlf_blank_lines_bad_bytes_and_empty_captions(tmp_path):
    file = write(
        tmp_path / "captions.txt",
        b"\xef\xbb\xbfimage,caption\r\n\r\nb.jpg,A caf\xe9 .\r\nb.jpg,Line\xe2\x80\xa8separator\r\na.jpg,\r\nb\r\n"
        b'a.jpg,""\r\na.jpg,Fine .\r\n  \r\nb.jpg,Last',
    )
    add_images(tmp_path, "a.jpg", "b.jpg")
    found = load_captions(file)
    # images in order of first appearance; U+2028 ends no line
    assert list(captions_of(found).items()) == [
        ("b.jpg", ["A caf\ufffd .", "Line\u2028separator", "Last"]),
        ("a.jpg", ["Fine ."]),
    ]
    assert notes(found.repaired) == [(3, "replaced bytes that are not UTF-8")]
    assert notes(found.dropped) == [
        (5, "empty caption of a.jpg"),
        (6, "no comma after the image name"),
        (7, "empty caption of a.jpg"),
    ]


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.jpg", "x/../../a.jpg", "..\\a.jpg", "C:\\a.jpg", " /a.jpg"])
def test_names_that_leave_the_image_folder_are_dropped(tmp_path, name):
    file = write(tmp_path / "in" / "captions.txt", f"image,caption\n{name},Bad\na.jpg,Good\n")
    add_images(tmp_path, "a.jpg")
    add_images(tmp_path / "in", "a.jpg")
    found = load_captions(file, images=tmp_path / "in")
    assert captions_of(found) == {"a.jpg": ["Good"]}
    (note,) = found.dropped
    assert (note.line, note.text.endswith("leaves the image folder")) == (2, True)


def test_one_image_under_two_spellings_is_one_image(tmp_path):
    file = write(tmp_path / "captions.txt", "image,caption\nsub/a.jpg,One\n./sub\\a.jpg,Two\n")
    add_images(tmp_path / "sub", "a.jpg")
    assert captions_of(load_captions(file)) == {"a.jpg": ["One", "Two"]}


def test_an_impossible_file_name_is_missing_and_no_crash(tmp_path):
    long = "x" * 300 + ".jpg"
    file = write(tmp_path / "captions.txt", f"image,caption\n{long},Long\nnul\0.jpg,Nul\na.jpg,Good\n")
    add_images(tmp_path, "a.jpg")
    assert load_captions(file).missing == (long, "nul\0.jpg")


def test_format_can_be_forced_and_an_unknown_one_lists_the_known(tmp_path):
    file = write(tmp_path / "captions.txt", "image,caption\na.jpg,One , two\n")
    add_images(tmp_path, "a.jpg")
    assert load_captions(file, format="table").format == "table"
    known = "webdataset, image-folder, parquet, karpathy, coco, json-list, json-lines, flickr8k-csv, flickr8k-token"
    with pytest.raises(ClipmatchError, match=f"'yaml'; known: {known}, flickr30k-csv, table"):
        load_captions(file, format="yaml")
    with pytest.raises(ClipmatchError, match="dropped lines: 2; the first was line 1: not of the form"):
        load_captions(file, format="flickr8k-token")


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        ("", None, "is empty"),
        ("", "table", "is empty"),
        ("just a sentence\n", None, "is not recognised .* known: webdataset"),
        ("name,words\na.jpg,A dog\n", "table", "header needs one of image, image_name"),
        ("image,caption\n", None, "has no caption"),
        ("image,caption\na.jpg,\n", None, "dropped lines: 1; the first was line 2: empty caption of a.jpg"),
    ],
)
def test_a_file_without_captions_says_why(tmp_path, content, format, message):
    file = write(tmp_path / "captions.txt", content)
    with pytest.raises(ClipmatchError, match=message):
        load_captions(file, format=format)


# Folders


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("captions.txt", "Images"),
        ("captions.txt", "."),
        ("archive/captions.txt", "archive/images"),
        ("flickr30k_images/results.csv", "flickr30k_images/flickr30k_images"),
        ("archive/flickr30k_images/results.csv", "archive/flickr30k_images/flickr30k_images"),
        ("Flickr8k_text/Flickr8k.token.txt", "Flickr8k_Dataset/Flicker8k_Dataset"),
    ],
)
def test_a_folder_as_it_comes_from_kaggle(tmp_path, file, images):
    content = {
        "results.csv": "image_name| comment_number| comment\na.jpg| 0| A\n",
        "Flickr8k.token.txt": "a.jpg#0\tA\n",
    }
    write(tmp_path / file, content.get(Path(file).name, "image,caption\na.jpg,A\n"))
    add_images(tmp_path / images, "a.jpg")
    found = load_captions(tmp_path)
    assert found.source == tmp_path / file
    assert found.rows[0].path == tmp_path / images / "a.jpg"


def test_the_shallowest_file_wins_and_two_equals_are_an_error(tmp_path):
    add_images(tmp_path / "x", "a.jpg")
    deep = write(tmp_path / "x" / "y" / "captions.txt", "image,caption\na.jpg,Deep\n")
    near = write(tmp_path / "x" / "captions.txt", "image,caption\na.jpg,Near\n")
    assert load_captions(tmp_path).source == near
    near.unlink()
    assert load_captions(tmp_path, images=tmp_path / "x").source == deep
    write(tmp_path / "x" / "z" / "results.csv", "")
    with pytest.raises(ClipmatchError, match=r"more than one caption file .*captions\.txt.*results\.csv"):
        load_captions(tmp_path)


def test_the_image_folder_is_the_one_that_holds_the_images(tmp_path):
    file = write(tmp_path / "captions.txt", "image,caption\na.jpg,A\n")
    add_images(tmp_path / "Images", "other.jpg")
    add_images(tmp_path, "a.jpg")
    assert load_captions(file).rows[0].path == tmp_path / "a.jpg"


def test_nothing_there_says_what_was_looked_for(tmp_path):
    with pytest.raises(ClipmatchError, match=r"looked for captions\.txt, results\.csv"):
        load_captions(tmp_path)
    with pytest.raises(ClipmatchError, match="no caption file or folder"):
        load_captions(tmp_path / "absent")
    file = write(tmp_path / "captions.txt", "image,caption\na.jpg,A\nb.jpg,B\n")
    (tmp_path / "Images").mkdir()
    tried = re.escape(str(tmp_path / "Images" / "a.jpg"))
    with pytest.raises(ClipmatchError, match=f"None of the 2 images .*tried {tried}"):
        load_captions(file)
    with pytest.raises(ClipmatchError, match="nowhere does not exist"):
        load_captions(file, images=tmp_path / "nowhere")


# Splits


def made_up(folder, count, skip=()):
    """A caption set of `count` images with two captions each, without those whose number is in `skip`."""
    names = [f"{number}.jpg" for number in range(count) if number not in skip]
    lines = [f"{name},{word} {name}\n" for name in names for word in ("first", "second")]
    file = write(folder / "captions.txt", "image,caption\n" + "".join(lines))
    add_images(folder, *names)
    return load_captions(file)


def names(rows):
    return {row.path.name for row in rows}


def test_a_dropped_row_moves_no_other_image(tmp_path):
    whole = split_captions(made_up(tmp_path / "whole", 300))
    less = split_captions(made_up(tmp_path / "less", 300, skip=(0, 7, 150)))
    gone = {"0.jpg", "7.jpg", "150.jpg"}
    assert names(less.train) == names(whole.train) - gone
    assert names(less.dev) == names(whole.dev) - gone
    assert not names(whole.train) & names(whole.dev)
    assert len(whole.train) + len(whole.dev) == 300
    assert 15 <= len(whole.dev) <= 45  # 30 expected, standard deviation 5
    assert whole.origin == "split by hash of the image name, 10 % to dev, seed 0"


def test_the_seed_changes_the_split_and_repeats_it(tmp_path):
    found = made_up(tmp_path, 100)
    assert split_captions(found, seed=1) == split_captions(found, seed=1)
    assert split_captions(found, seed=1).dev != split_captions(found, seed=2).dev


def test_given_files_go_before_official_ones_and_those_before_chance(tmp_path):
    found = made_up(tmp_path, 6)
    write(tmp_path / "Flickr_8k.trainImages.txt", "0.jpg\n1.jpg\n2.jpg\n")
    write(tmp_path / "Flickr_8k.devImages.txt", "3.jpg\n")
    official = split_captions(found)
    assert (names(official.train), names(official.dev)) == ({"0.jpg", "1.jpg", "2.jpg"}, {"3.jpg"})
    assert official.origin.startswith("official split files Flickr_8k.trainImages.txt and")
    train, dev = write(tmp_path / "t.txt", "4.jpg\r\n\r\n5\r\n"), write(tmp_path / "d.txt", "0.jpg\nunknown.jpg\n")
    given = split_captions(found, train=train, dev=dev)
    assert (names(given.train), names(given.dev)) == ({"4.jpg", "5.jpg"}, {"0.jpg"})
    assert given.origin == f"split files {train} and {dev}"
    with pytest.raises(ClipmatchError, match="give both, or neither"):
        split_captions(found, train=train)


@pytest.mark.parametrize("spelling", ["1.jpg", "1"])
def test_an_image_in_both_files_is_refused(tmp_path, spelling):
    train, dev = write(tmp_path / "t.txt", "0.jpg\n1.jpg\n"), write(tmp_path / "d.txt", f"{spelling}\n2.jpg\n")
    with pytest.raises(ClipmatchError, match=r"both list 1\.jpg \(1 images"):
        split_captions(made_up(tmp_path, 3), train=train, dev=dev)


def test_a_part_must_not_be_empty(tmp_path):
    with pytest.raises(ClipmatchError, match="none of the 1 images falls into"):
        split_captions(made_up(tmp_path, 1))
    with pytest.raises(ClipmatchError, match="between 0 and 1"):
        split_captions(made_up(tmp_path, 1), dev_fraction=0)


def test_select_split_tells_folders_apart_and_wants_a_match(tmp_path):
    rows = [CaptionedImage(Path(f"data/{folder}/1.jpg"), ("A",)) for folder in ("x", "y")]
    assert select_split(rows, write(tmp_path / "one.txt", "y/1.jpg\n")) == (rows[1],)
    assert select_split(rows, write(tmp_path / "two.txt", "1.jpg\n")) == tuple(rows)
    with pytest.raises(ClipmatchError, match=r"None of the 1 images .* among the 2"):
        select_split(rows, write(tmp_path / "none.txt", "11.jpg\n"))


def test_read_split(tmp_path):
    assert read_split(write(tmp_path / "s.txt", b"\xef\xbb\xbfb.jpg\r\n\r\n a.jpg \r\n")) == ["b.jpg", "a.jpg"]
    with pytest.raises(ClipmatchError, match="lists no image"):
        read_split(write(tmp_path / "s.txt", "\n\n"))
    with pytest.raises(ClipmatchError, match=r"Cannot read .*No such file"):
        read_split(tmp_path / "absent.txt")


def test_content_hash_depends_on_names_and_captions_only():
    a, b = CaptionedImage(Path("x/a.jpg"), ("One", "Two")), CaptionedImage(Path("x/b.jpg"), ("Three",))
    expected = content_hash([a, b])
    assert re.fullmatch("[0-9a-f]{16}", expected)
    assert content_hash([b, a]) == expected
    assert content_hash([CaptionedImage(Path("elsewhere/a.jpg"), ("Two", "One")), b]) == expected
    assert content_hash([CaptionedImage(Path("x/a.jpg"), ("One", "Two!")), b]) != expected
    assert content_hash([CaptionedImage(Path("x/c.jpg"), ("One", "Two")), b]) != expected
    assert content_hash([a]) != expected


@needs_flickr8k
def test_the_real_flickr8k():
    found = load_captions(FLICKR8K)
    assert (found.format, len(found.rows)) == ("flickr8k-csv", 7091)
    assert {len(row.captions) for row in found.rows} == {5}
    assert found.repaired == found.dropped == found.missing == ()
    assert not any(caption.startswith('"') and caption.endswith('"') for row in found.rows for caption in row.captions)
    splits = split_captions(found)
    assert (len(splits.train), len(splits.dev)) == (6000, 1000)
    assert not names(splits.train) & names(splits.dev)


def test_whole_paths_are_names_below_the_image_folder(tmp_path):
    """As open_clip's CSV has them, by tabs; also where the folder is given by another way that leads there."""
    folder = tmp_path / "photos"
    add_images(folder / "sub", "a.jpg", "b.jpg")
    add_images(tmp_path / "elsewhere", "c.jpg")
    lines = [f"{folder / 'sub' / name}\tA dog ." for name in ("a.jpg", "b.jpg")]
    file = write(
        tmp_path / "train.csv", "\n".join(["filepath\ttitle", *lines, f"{tmp_path}/elsewhere/c.jpg\tA cat .", ""])
    )
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    for given in (folder, tmp_path / "elsewhere" / ".." / "photos", tmp_path / "link"):
        found = load_captions(file, images=given)
        assert [entry.image for entry in found.entries] == ["sub/a.jpg", "sub/b.jpg"]
        assert (len(found.rows), found.missing) == (2, ())
        assert notes(found.dropped) == [(4, f"the image name {tmp_path}/elsewhere/c.jpg leaves the image folder")]


def test_whole_paths_say_themselves_where_the_images_are(tmp_path):
    """Without --images: their common folder, so that parts in folders are still seen, and missing ones are missing."""
    add_images(tmp_path / "photos" / "train", "a.jpg", "b.jpg")
    add_images(tmp_path / "photos" / "val", "c.jpg")
    names = ["train/a.jpg", "train/b.jpg", "val/c.jpg", "val/gone.jpg"]
    lines = [f"{tmp_path}/photos/{name},A dog ." for name in names]
    found = load_captions(write(tmp_path / "in" / "captions.csv", "\n".join(["filepath,title", *lines, ""])))
    assert [entry.image for entry in found.entries] == names
    assert found.missing == ("val/gone.jpg",)
    assert [row.split for row in found.rows] == ["train", "train", "dev"]
    listed = write(tmp_path / "dev.txt", f"{tmp_path}/photos/val/c.jpg\n")
    assert [row.path.name for row in select_split(found.rows, listed)] == ["c.jpg"]


def test_whole_paths_of_another_machine(tmp_path):
    file = write(
        tmp_path / "captions.csv", "filepath,title\n/no/such/place/a.jpg,A dog .\n/no/such/place/b.jpg,A cat .\n"
    )
    with pytest.raises(ClipmatchError, match="The image folder /no/such/place does not exist; give the folder that"):
        load_captions(file)
    with pytest.raises(ClipmatchError, match=r"line 2: the image name /no/such/place/a.jpg leaves .* give names below"):
        load_captions(file, images=tmp_path)


def test_a_stray_whole_path_is_dropped(tmp_path):
    add_images(tmp_path, "a.jpg", "b.jpg")
    found = load_captions(write(tmp_path / "captions.txt", "image,caption\n/etc/passwd,Bad\na.jpg,Good\nb.jpg,Good\n"))
    assert captions_of(found) == {"a.jpg": ["Good"], "b.jpg": ["Good"]}
    assert notes(found.dropped) == [(2, "the image name /etc/passwd leaves the image folder")]
