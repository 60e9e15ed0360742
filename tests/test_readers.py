"""Every kind of captions: small files with the quirks of the real ones, each recognised as its own kind."""

import time

import pytest
from captionfiles import (
    add_images,
    captions_of,
    coco,
    flickr8k_csv,
    flickr8k_token,
    flickr30k_commas,
    flickr30k_csv,
    huggingface_csv,
    image_folder,
    json_lines,
    json_list,
    karpathy,
    names,
    notes,
    parquet,
    webdataset,
    write,
)

from clipmatch.data import load_captions, select_part, split_captions
from clipmatch.errors import ClipmatchError
from clipmatch.readers import READERS

KINDS = [
    (karpathy, "karpathy"),
    (coco, "coco"),
    (json_list, "json-list"),
    (json_lines, "json-lines"),
    (image_folder, "image-folder"),
    (webdataset, "webdataset"),
    (parquet, "parquet"),
    (flickr8k_csv, "flickr8k-csv"),
    (flickr8k_token, "flickr8k-token"),
    (flickr30k_csv, "flickr30k-csv"),
    (flickr30k_commas, "flickr30k-csv"),
    (huggingface_csv, "table"),
]


@pytest.mark.parametrize(("make", "kind"), KINDS, ids=[make.__name__ for make, _ in KINDS])
def test_each_is_recognised_as_its_own_kind_and_by_no_other_reader(tmp_path, make, kind):
    source = make(tmp_path)
    found = load_captions(source)
    assert found.format == kind
    assert found.repaired == found.dropped == found.missing == ()
    head = source.read_bytes()[: 1 << 14].decode("utf-8", "replace").split("\n") if source.is_file() else [""]
    takers = [reader.name for reader in READERS if reader.sniff(source, head)]
    assert takers in ([kind], [kind, "table"])  # the general reader comes last


def test_every_reader_has_a_file_here():
    assert {kind for _, kind in KINDS} == {reader.name for reader in READERS}


NAMED = [(make, kind) for make, kind in KINDS if make is not json_list]  # which has no usual name


@pytest.mark.parametrize(("make", "kind"), NAMED, ids=[make.__name__ for make, _ in NAMED])
def test_a_folder_that_holds_it_will_do(tmp_path, make, kind):
    make(tmp_path / "download" / "data")
    assert load_captions(tmp_path).format == kind


# Kaggle


def test_flickr30k_with_commas_keeps_those_of_captions_and_repairs_the_known_row(tmp_path):
    file = write(
        tmp_path / "captions.txt",
        "image_name,comment_number,comment\n"
        "7.jpg,0, Two men , one in a hat , talk .\n"
        '7.jpg,1," ""Stop"" , he says ."\n'
        "2199200615.jpg,3, A dog .\n"
        "2199200615.jpg,4   A dog runs across the grass .,\n",
    )
    add_images(tmp_path / "flickr30k_images", "7.jpg", "2199200615.jpg")
    found = load_captions(file)
    assert captions_of(found) == {
        "7.jpg": ["Two men , one in a hat , talk .", '"Stop" , he says .'],
        "2199200615.jpg": ["A dog .", "A dog runs across the grass ."],
    }
    assert notes(found.repaired) == [("line 5", "put in the missing second comma")]


def test_the_flickr8k_text_folder_with_its_official_splits(tmp_path):
    text = tmp_path / "flickr_data" / "Flickr_Data" / "Flickr_TextData"
    lines = [f"{name}.jpg#{number}\tA {name} .\n" for name in "abc" for number in range(5)]
    write(text / "Flickr8k.token.txt", "".join(lines))
    write(text / "Flickr8k.lemma.token.txt", "a.jpg#0\tdog\n")
    write(text / "ExpertAnnotations.txt", "a.jpg\tb.jpg#2\t1\t1\t1\n")
    write(text / "Flickr_8k.trainImages.txt", "a.jpg\n")
    write(text / "Flickr_8k.devImages.txt", "b.jpg\n")
    write(text / "Flickr_8k.testImages.txt", "c.jpg\n")
    add_images(tmp_path / "flickr_data" / "Flickr_Data" / "Images", "a.jpg", "b.jpg", "c.jpg")
    found = load_captions(tmp_path)
    assert (found.source.name, len(found.rows), found.dropped) == ("Flickr8k.token.txt", 3, ())
    splits = split_captions(found)
    assert (names(splits.train), names(splits.dev)) == (["a.jpg"], ["b.jpg"])


@pytest.mark.parametrize(
    "field",
    ['"[""A dog ."", ""It\'s wet .""]"', '"[\'A dog .\', ""It\'s wet .""]"'],
    ids=["json", "python"],
)
def test_a_table_may_hold_lists_of_captions_and_a_split(tmp_path, field):
    text = f'raw,sentids,split,filename,img_id\n{field},"[0, 1]",train,a.jpg,0\n"[""A cat .""]","[2]",test,b.jpg,1\n'
    file = write(tmp_path / "flickr_annotations_30k.csv", text)
    add_images(tmp_path, "a.jpg", "b.jpg")
    found = load_captions(file)
    assert captions_of(found) == {"a.jpg": ["A dog .", "It's wet ."], "b.jpg": ["A cat ."]}
    assert [row.split for row in found.rows] == ["train", "test"]


def test_a_table_may_have_numbered_caption_columns_and_brackets_that_are_no_list(tmp_path):
    file = write(tmp_path / "x.csv", "image,caption_0,caption_1\na.jpg,A dog .,\nb.jpg,[sic] A cat .,A pet .\n")
    add_images(tmp_path, "a.jpg", "b.jpg")
    assert captions_of(load_captions(file)) == {"a.jpg": ["A dog ."], "b.jpg": ["[sic] A cat .", "A pet ."]}


# Karpathy


def test_karpathys_splits_are_used_and_test_is_in_neither_part(tmp_path):
    found = load_captions(karpathy(tmp_path))
    assert captions_of(found)["a.jpg"] == ["A dog .", "A wet dog ."]
    splits = split_captions(found)
    assert (names(splits.train), names(splits.dev)) == (["a.jpg", "b.jpg"], ["c.jpg"])
    assert splits.origin == "the caption file's own splits; 1 images of its other parts in neither"
    assert names(select_part(found, "test").rows) == ["d.jpg"]
    assert names(select_part(found, "val").rows) == ["c.jpg"]
    with pytest.raises(ClipmatchError, match=r"Cannot read nowhere\.txt"):
        select_part(found, "nowhere.txt")


def test_split_files_that_are_given_go_before_karpathys(tmp_path):
    train, dev = write(tmp_path / "t.txt", "d.jpg\n"), write(tmp_path / "d.txt", "a.jpg\n")
    splits = split_captions(load_captions(karpathy(tmp_path)), train=train, dev=dev)
    assert (names(splits.train), names(splits.dev)) == (["d.jpg"], ["a.jpg"])


def test_karpathys_coco_names_its_folders(tmp_path):
    sentences = [{"raw": "A man ."}]
    image = {"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "sentences": sentences}
    file = write(tmp_path / "annotations" / "dataset_coco.json", {"images": [{**image, "cocoid": 1, "split": "test"}]})
    add_images(tmp_path / "val2014", "COCO_val2014_000000391895.jpg")
    found = load_captions(file)
    assert found.rows[0].path == tmp_path / "val2014" / "COCO_val2014_000000391895.jpg"
    with pytest.raises(ClipmatchError, match=r"no train part \(0 images of dev, 1 of test\)"):
        split_captions(found)


def test_odd_records_of_karpathy_are_notes(tmp_path):
    good = {"filename": "a.jpg", "sentences": [{"raw": "A dog ."}], "split": "train"}
    odd = [{"filename": "b.jpg", "sentences": []}, {"sentences": [{"raw": "A cat ."}]}, "text", {"filename": 3}]
    file = write(tmp_path / "dataset_x.json", {"images": [good, *odd]})
    add_images(tmp_path, "a.jpg")
    assert notes(load_captions(file).dropped) == [
        ("record 2", "no caption of b.jpg"),
        ("record 3", "no file name"),
        ("record 4", "no file name"),
        ("record 5", "no file name"),
    ]


# COCO


@pytest.mark.parametrize("indent", [None, 2], ids=["one line", "many lines"])
def test_coco_joins_by_id_and_finds_the_folder_of_its_year(tmp_path, indent):
    found = load_captions(coco(tmp_path, indent))
    assert captions_of(found) == {
        "COCO_train2014_000000000025.jpg": ["A giraffe ."],
        "COCO_train2014_000000000009.jpg": ["A bowl .", "Food in\na bowl ."],
    }
    assert found.rows[0].path.parent == tmp_path / "train2014"


def test_coco_of_2017_with_odd_annotations(tmp_path):
    images = [{"file_name": f"{number:012d}.jpg", "id": number} for number in (139, 285, 632)]
    annotations = [
        {"image_id": 139, "id": 1, "caption": "A room ."},
        {"image_id": 1, "id": 2, "caption": "Lost ."},
        {"image_id": 285, "id": 3},
        {"image_id": [], "id": 4, "caption": "Odd ."},
        {"image_id": 285, "id": 5, "caption": "  "},
        "text",
        *({"image_id": 285, "id": 6 + more, "caption": f"Bear {more} ."} for more in range(7)),
    ]
    data = {"images": images, "annotations": annotations}
    file = write(tmp_path / "coco" / "annotations" / "captions_val2017.json", data)
    add_images(tmp_path / "coco" / "val2017", "000000000139.jpg", "000000000285.jpg")
    add_images(tmp_path / "coco" / "train2017", "000000000009.jpg")
    found = load_captions(file)
    assert [len(row.captions) for row in found.rows] == [1, 7]
    assert notes(found.dropped) == [
        ("annotation 2", "its image (id 1) is not in the list of images"),
        ("annotation 3", "no caption"),
        ("annotation 4", "its image (id []) is not in the list of images"),
        ("annotation 5", "empty caption of 000000000285.jpg"),
        ("annotation 6", "no caption"),
        ("annotation 13", "1 images have no caption, such as 000000000632.jpg"),
    ]


def test_a_folder_with_two_files_of_coco_wants_one_named(tmp_path):
    file = coco(tmp_path)
    write(file.with_name("captions_val2014.json"), file.read_bytes())
    with pytest.raises(ClipmatchError, match=r"more than one caption file .*captions_train2014.*captions_val2014"):
        load_captions(tmp_path)


def test_other_files_of_coco_say_that_they_have_no_captions(tmp_path):
    data = {"images": [{"file_name": "a.jpg", "id": 1}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}
    with pytest.raises(ClipmatchError, match=r"has no caption .*\(dropped annotations: 2; the first was annotation 1"):
        load_captions(write(tmp_path / "instances_val2017.json", data))
    with pytest.raises(ClipmatchError, match='no list "annotations"'):
        load_captions(write(tmp_path / "image_info_test2017.json", {"images": data["images"]}))


def test_600_000_captions_of_coco_are_read_in_seconds(tmp_path):
    images = [{"file_name": f"{number:012d}.jpg", "id": number} for number in range(120_000)]
    annotations = [
        {"image_id": number % 120_000, "id": number, "caption": f"A picture of the thing number {number} ."}
        for number in range(600_000)
    ]
    file = write(tmp_path / "captions_train2017.json", {"images": images, "annotations": annotations})
    reader = next(reader for reader in READERS if reader.name == "coco")
    began = time.process_time()
    assert sum(1 for _ in reader.read(file)) == 600_000
    assert time.process_time() - began < 30  # about 3; quadratic work would take hours


@pytest.mark.parametrize("damage", [slice(None, -40), slice(100, None)], ids=["cut off", "without its beginning"])
def test_damaged_json_says_where(tmp_path, damage):
    file = coco(tmp_path)
    text = file.read_text()[damage]
    file.write_text(text)
    with pytest.raises(
        ClipmatchError, match=rf"not valid JSON: .* in line 1, column \d+ \(character [\d,]+ of {len(text)}\)"
    ):
        load_captions(file, format="coco")


def test_json_of_another_form_is_no_crash(tmp_path):
    for content in ("[" * 100_000, "3", "{}", '{"images": 3}', "[1, 2]", '["a", {"image": "a.jpg"}]', "[]"):
        for format in ("karpathy", "coco", "json-list", "json-lines"):
            with pytest.raises(ClipmatchError):
                load_captions(write(tmp_path / "x.json", content), format=format)


# Records


def test_lists_of_records_and_lines_of_records(tmp_path):
    expected = {"a.jpg": ["A dog ."], "b.jpg": ["A cat .", "Two ears ."]}
    assert captions_of(load_captions(json_list(tmp_path / "x"))) == expected
    assert captions_of(load_captions(json_lines(tmp_path / "y"))) == expected


def test_damaged_lines_of_records_are_notes(tmp_path):
    lines = ['{"image": "a.jpg", "caption_0": "A dog .", "caption_1": "Wet ."}', '{"image": "a.jpg"', '"x"', "", "[1]"]
    lines += ['{"image": 3, "caption": "A"}', '{"image": "a.jpg", "caption": null}', '{"url": "a.jpg"}']
    add_images(tmp_path, "a.jpg")
    found = load_captions(write(tmp_path / "x.jsonl", "\n".join(lines)))
    assert captions_of(found) == {"a.jpg": ["A dog .", "Wet ."]}
    assert notes(found.dropped) == [
        ("line 2", "not valid JSON"),
        ("line 3", "no image name or no caption"),
        ("line 5", "no image name or no caption"),
        ("line 6", "no image name or no caption"),
        ("line 7", "empty caption of a.jpg"),
        ("line 8", "no image name or no caption"),
    ]


def test_folders_called_train_and_test_are_splits_if_all_are(tmp_path):
    text = "file_name,text\ntrain/1.jpg,A\nval/1.jpg,B\ntest/1.jpg,C\n"
    add_images(tmp_path, "train/1.jpg", "val/1.jpg", "test/1.jpg", "bus/1.jpg")
    splits = split_captions(load_captions(write(tmp_path / "metadata.csv", text)))
    assert [row.path.parent.name for row in splits.train + splits.dev] == ["train", "val"]
    vehicles = load_captions(write(tmp_path / "metadata.csv", text + "bus/1.jpg,D\n"))
    assert {row.split for row in vehicles.rows} == {""}


def test_a_train_part_alone_gives_some_of_its_images_to_dev(tmp_path):
    lines = [f"{number}.jpg,A,{'test' if number < 10 else 'train'}\n" for number in range(100)]
    add_images(tmp_path, *(f"{number}.jpg" for number in range(100)))
    found = load_captions(write(tmp_path / "x.csv", "image,caption,split\n" + "".join(lines)))
    splits = split_captions(found, dev_fraction=0.3)
    assert len(splits.train) + len(splits.dev) == 90
    assert not {f"{number}.jpg" for number in range(10)}.intersection(names(splits.train) + names(splits.dev))
    assert splits.origin.startswith("the caption file's own train part, split by hash")


def test_an_image_that_is_said_to_be_in_two_parts_stays_out_of_training(tmp_path):
    file = write(tmp_path / "x.csv", "image,caption,split\na.jpg,A,train\na.jpg,B,test\na.jpg,C,train\nb.jpg,D,dev\n")
    add_images(tmp_path, "a.jpg", "b.jpg")
    assert [row.split for row in load_captions(file).rows] == ["test", "dev"]


# Folders


def test_an_image_folder_counts_what_has_no_partner(tmp_path):
    folder = image_folder(tmp_path)
    add_images(folder, "c.webp", ".hidden.jpg", "d.jpg")
    write(folder / "README.txt", "About")
    write(folder / "d.txt", "\n  \n")
    found = load_captions(folder)
    assert captions_of(found) == {"a.jpg": ["A dog .", "A wet dog ."], "b.png": ["A cat ."]}
    assert found.rows[1].path == folder / "sub" / "b.png"
    assert notes(found.dropped) == [
        ("file 1", "README.txt has no picture"),
        ("file 3", "c.webp has no captions"),
        ("file 4", "d.txt holds no caption"),
    ]
    with pytest.raises(ClipmatchError, match="brings its images with it"):
        load_captions(folder, images=tmp_path)


def test_a_folder_of_pictures_alone_holds_no_captions(tmp_path):
    with pytest.raises(ClipmatchError, match="holds no captions: looked for"):
        load_captions(add_images(tmp_path, "a.jpg"))
