"""Every kind of captions: small files with the quirks of the real ones, each recognised as its own kind."""

import io
import json
import pickle
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet
import pytest
from PIL import Image

from clipmatch import archive
from clipmatch.config import PreprocessConfig
from clipmatch.data import load_captions, select_part, shortest_names, split_captions
from clipmatch.embedder import read_batches
from clipmatch.errors import ClipmatchError
from clipmatch.features import content_keys
from clipmatch.preprocess import ImageError, Transform, load_image
from clipmatch.readers import READERS


def picture(colour="red", kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, kind)
    return buffer.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def add_images(folder, *names):
    """Readers look whether an image is there and never into it, so an empty file will do."""
    for name in names:
        write(folder / name, b"")
    return folder


def pack(path, members):
    """A tar archive of (name, bytes) in this order; names may repeat."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def put_table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrow.parquet.write_table(arrow.table(columns), path)
    return path


def captions_of(found):
    return {row.path.name: list(row.captions) for row in found.rows}


def notes(lines):
    return [(note.place, note.text) for note in lines]


def names(rows):
    return [row.path.name for row in rows]


# Each kind once: what it is called, and a file of it


def karpathy(folder):
    def image(name, split, *captions, **more):
        sentences = [{"tokens": text.lower().split(), "raw": text, "sentid": 0} for text in captions]
        return {"sentids": [0], "imgid": 0, "sentences": sentences, "split": split, "filename": name, **more}

    images = [
        image("a.jpg", "train", "A dog .", " A wet dog .\n"),
        image("b.jpg", "restval", "A cat ."),
        image("c.jpg", "val", "A cow ."),
        image("d.jpg", "test", "A hen ."),
    ]
    add_images(folder / "Images", "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    return write(folder / "dataset_flickr8k.json", {"images": images, "dataset": "flickr8k"})


def coco(folder, indent=None):
    data = {
        "info": {"description": "COCO 2014 Dataset", "year": 2014},
        "images": [
            {"license": 5, "file_name": "COCO_train2014_000000000009.jpg", "height": 480, "width": 640, "id": 9},
            {"license": 5, "file_name": "COCO_train2014_000000000025.jpg", "height": 480, "width": 640, "id": 25},
        ],
        "licenses": [{"id": 5, "name": "Attribution"}],
        "annotations": [
            {"image_id": 25, "id": 1, "caption": "A giraffe ."},
            {"image_id": 9, "id": 2, "caption": "A bowl ."},
            {"image_id": 9, "id": 3, "caption": "Food in\na bowl . "},
        ],
    }
    folder_2014 = folder / "train2014"
    add_images(folder_2014, "COCO_train2014_000000000009.jpg", "COCO_train2014_000000000025.jpg")
    add_images(folder / "val2014", "COCO_val2014_000000000042.jpg")
    return write(folder / "annotations" / "captions_train2014.json", json.dumps(data, indent=indent))


def json_list(folder):
    add_images(folder, "images/a.jpg", "images/b.jpg")
    records = [
        {"image": "images/a.jpg", "caption": "A dog .", "image_id": 0},
        {"image": "images/b.jpg", "caption": ["A cat .", "Two ears ."], "image_id": 1},
    ]
    return write(folder / "flickr30k_train.json", records)


def json_lines(folder):
    add_images(folder, "a.jpg", "sub/b.jpg")
    lines = [{"file_name": "a.jpg", "text": "A dog ."}, {"file_name": "sub/b.jpg", "text": ["A cat .", "Two ears ."]}]
    return write(folder / "metadata.jsonl", "\n".join(map(json.dumps, lines)))


def image_folder(folder):
    add_images(folder, "a.jpg", "sub/b.png")
    write(folder / "a.txt", "A dog .\n\nA wet dog .\n")
    write(folder / "sub" / "b.txt", "A cat .")
    return folder


def webdataset(folder):
    members = [("000.png", picture()), ("000.txt", b"A dog .\nA wet dog ."), ("001.png", picture("blue"))]
    return pack(folder / "00000.tar", [*members, ("001.json", b'{"caption": "A cat .", "url": "http://a/b"}')])


def parquet(folder):
    add_images(folder, "a.jpg", "b.jpg")
    columns = {"file_name": ["a.jpg", "b.jpg"], "caption": [["A dog .", "A wet dog ."], ["A cat ."]]}
    return put_table(folder / "train.parquet", **columns)


def flickr8k_csv(folder):
    add_images(folder, "a.jpg")
    return write(folder / "captions.txt", "image,caption\na.jpg,A dog , wet .\n")


def flickr8k_token(folder):
    add_images(folder, "a.jpg")
    return write(folder / "Flickr8k.token.txt", "a.jpg#0\tA dog .\na.jpg#1\tA wet dog .\n")


def flickr30k_csv(folder):
    add_images(folder, "a.jpg")
    return write(folder / "results.csv", "image_name| comment_number| comment\na.jpg| 0| A dog .\n")


def flickr30k_commas(folder):
    add_images(folder, "a.jpg")
    return write(folder / "captions.txt", "image_name,comment_number,comment\na.jpg,0, A dog , wet .\n")


def huggingface_csv(folder):
    add_images(folder, "a.jpg")
    return write(folder / "metadata.csv", "file_name,text\na.jpg,A dog\n")


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


@pytest.mark.parametrize(("make", "kind"), KINDS, ids=[make.__name__ for make, _ in KINDS])
def test_a_folder_that_holds_it_will_do(tmp_path, make, kind):
    make(tmp_path / "download" / "data")
    if make is json_list:  # may be called anything
        pytest.skip("a list of records has no usual name")
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


# Archives


def test_webdataset_by_file_folder_and_pattern(tmp_path):
    for shard in range(3):
        pack(tmp_path / f"{shard:05d}.tar", [("a.jpg", picture()), ("a.txt", f"Shard {shard} .".encode())])
    for source, shards in (("00001.tar", "1"), ("", "012"), ("{00000..00001}.tar", "01"), ("0000{0,2}.tar", "02")):
        found = load_captions(tmp_path / source)
        assert [row.captions for row in found.rows] == [(f"Shard {shard} .",) for shard in shards]
        assert [row.path for row in found.rows] == [tmp_path / f"0000{shard}.tar" / "a.jpg" for shard in shards]
    missing = load_captions(tmp_path / "{00002..00003}.tar")
    assert notes(missing.dropped) == [("sample 2", "00003.tar can't be read (No such file or directory)")]
    with pytest.raises(ClipmatchError, match="has no caption that can be read as webdataset"):
        load_captions(tmp_path / "{7..8}.tar")
    with pytest.raises(ClipmatchError, match=r"no caption file or folder .*7\.tar"):
        load_captions(tmp_path / "7.tar")


def test_captions_of_samples_and_samples_that_lack_something(tmp_path):
    members = [
        ("./sub/one.jpg", picture(kind="JPEG")),  # as `tar cf x.tar .` writes names
        ("./sub/one.txt", "Un café .\r\n\r\nA coffee .".encode()),
        ("two.json", b'{"text": ["A cat .", "Two ears ."], "key": "two"}'),
        ("two.PNG", picture()),
        ("two.seg.png", picture("black")),
        ("three.jpg", picture()),
        ("four.txt", b"No picture ."),
        ("five.jpg", b""),
        ("five.txt", b"An empty picture ."),
        ("six.jpg", picture()),
        ("six.json", b'{"caption": "cut o'),
        ("seven.jpg", picture()),
        ("seven.txt", b" \n"),
        ("seven.json", b'{"caption": "From JSON ."}'),
        ("seven.txt", b"A second time ."),
        ("._seven.jpg", b"of a Mac"),
        ("nothing", b""),
    ]
    found = load_captions(pack(tmp_path / "x.tar", members))
    assert captions_of(found) == {
        "one.jpg": ["Un café .", "A coffee ."],
        "two.PNG": ["A cat .", "Two ears ."],
        "seven.jpg": ["From JSON ."],
    }
    assert found.rows[0].path == tmp_path / "x.tar" / "sub" / "one.jpg"
    assert notes(found.dropped) == [
        ("sample 3", "x.tar/three has no caption that can be read"),
        ("sample 4", "x.tar/four has no picture"),
        ("sample 5", "x.tar/five has no picture"),
        ("sample 6", "x.tar/six has no caption that can be read"),
    ]


def shard_of(path, count=4):
    members = [(f"{at}.{kind}", data) for at in range(count) for kind, data in (("png", picture()), ("txt", b"A ."))]
    return pack(path, members).read_bytes()


@pytest.mark.parametrize(
    ("end", "whole"),
    [
        (512 * 4 * 2 + 700, 2),  # inside the bytes of a picture
        (512 * 4 * 2 + 100, 2),  # inside a header
        (512 * 4 * 2, 2),  # between two members
        (512 * 4 * 2 + 512 * 2, 2),  # a picture without its text
        (512 * 4 * 4, 4),  # nothing but the end mark is lost
    ],
)
def test_an_archive_that_is_cut_off_gives_what_is_whole(tmp_path, end, whole):
    data = shard_of(tmp_path / "x.tar")
    assert len(picture()) < 512  # so that a member is a header and one block
    write(tmp_path / "x.tar", data[:end])
    found = load_captions(tmp_path / "x.tar")
    assert names(found.rows) == [f"{at}.png" for at in range(whole)]
    assert "damaged or cut off" in found.dropped[-1].text


def test_a_damaged_header_ends_an_archive_with_a_note_and_its_neighbours_are_read(tmp_path):
    data = bytearray(shard_of(tmp_path / "00.tar"))
    data[512 * 4 * 2 + 150 : 512 * 4 * 2 + 153] = b"XYZ"  # of the checksum
    write(tmp_path / "00.tar", bytes(data))
    shard_of(tmp_path / "01.tar", 1)
    write(tmp_path / "02.tar", b"no archive at all")
    write(tmp_path / "03.tar", b"")
    found = load_captions(tmp_path)
    assert [row.path.relative_to(tmp_path).as_posix() for row in found.rows] == [
        "00.tar/0.png",
        "00.tar/1.png",
        "01.tar/0.png",
    ]
    assert [note.text.split(" is ")[0] for note in found.dropped] == ["00.tar", "02.tar", "03.tar"]


def test_the_names_of_shards_tell_their_split(tmp_path):
    for part, count in (("train", 3), ("val", 1), ("test", 2)):
        shard_of(tmp_path / f"flickr-{part}-000.tar", count)
    splits = split_captions(load_captions(tmp_path))
    assert {row.path.parent.name for row in splits.train} == {"flickr-train-000.tar"}
    assert {row.path.parent.name for row in splits.dev} == {"flickr-val-000.tar"}
    written = shortest_names([row.path for row in splits.train + splits.dev])
    assert written[0] == "flickr-train-000.tar/0.png"  # 0.png alone would be an image of dev too
    dev = select_part(load_captions(tmp_path), write(tmp_path / "dev.txt", "\n".join(written[3:])))
    assert [row.path for row in dev.rows] == [row.path for row in splits.dev]


def test_pictures_are_read_out_of_an_archive_in_threads_and_processes(tmp_path):
    colours = ["red", "lime", "blue", "black"]
    members = [(f"{name}.{kind}", data) for name in colours for kind, data in (("png", picture(name)), ("txt", b"A ."))]
    found = load_captions(pack(tmp_path / "x.tar", [*members, ("bad.png", b"no picture"), ("bad.txt", b"B .")]))
    paths = [row.path for row in found.rows]
    assert load_image(paths[2]).getpixel((0, 0)) == (0, 0, 255)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        pixels = [image.getpixel((0, 0)) for image in pool.map(load_image, paths[:4])]
    assert pixels == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]
    (batch,) = read_batches(paths, Transform(PreprocessConfig(size=8)))
    assert batch.paths == paths[:4]
    assert [(failure.path, failure.reason) for failure in batch.failures] == [
        (paths[4], "it is not an image in a known format")
    ]


def test_the_feature_cache_knows_pictures_in_archives_by_their_bytes(tmp_path):
    data = picture()
    member = load_captions(pack(tmp_path / "x.tar", [("a.png", data), ("a.txt", b"A .")])).rows[0].path
    plain = write(tmp_path / "plain.png", data)
    (one, other, absent), failures = content_keys([member, plain, member.with_name("b.png")])
    assert one == other != ""
    assert absent == ""
    assert [failure.reason for failure in failures] == ["No such file or directory"]


def test_paths_into_archives_are_told_from_others(tmp_path):
    shard_of(tmp_path / "x.tar", 1)
    folder = add_images(tmp_path / "folder.tar", "a.jpg")  # a folder may be called so
    assert archive.locate(folder / "a.jpg") is None
    assert archive.is_file(folder / "a.jpg")
    assert archive.is_file(tmp_path / "x.tar")
    assert archive.locate(tmp_path / "x.tar" / "s" / "0.png") == (tmp_path / "x.tar", "s/0.png")
    assert archive.is_file(tmp_path / "x.tar" / "0.png")
    assert not archive.is_file(tmp_path / "x.tar" / "9.png")
    assert not archive.is_file(tmp_path / "absent.tar" / "0.png")
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "x.tar" / "9.png")


def test_an_archive_that_changes_is_looked_through_again(tmp_path):
    path = tmp_path / "x.tar"
    shard_of(path, 1)
    assert not archive.is_file(path / "2.png")
    shard_of(path, 3)
    assert archive.is_file(path / "2.png")
    path.write_bytes(path.read_bytes()[:550])
    with pytest.raises(ImageError):
        load_image(path / "0.png")


# Parquet


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


def embedded(path, images, **columns):
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    return put_table(path, image=arrow.array(images, kind), **columns)


def test_pictures_inside_parquet_are_unpacked_once(tmp_path, own_cache):
    red, blue, lime = picture("red"), picture("blue"), picture("lime")
    file = embedded(
        tmp_path / "train-00000-of-00001.parquet",
        [
            {"bytes": red, "path": "a.png"},
            {"bytes": red, "path": "a.png"},  # a row a caption
            {"bytes": blue, "path": "../../a.png"},  # another picture of the same name
            {"bytes": lime, "path": None},
            {"bytes": None, "path": "b.png"},
            None,
        ],
        caption=["A dog .", "A wet dog .", "A cat .", "A hen .", "Lost .", "Lost too ."],
    )
    found = load_captions(file)
    assert [row.captions for row in found.rows] == [("A dog .", "A wet dog ."), ("A cat .",), ("A hen .",)]
    assert found.rows[0].path.name == "a.png"
    assert [row.path.read_bytes() for row in found.rows] == [red, blue, lime]
    assert {row.path.parent.parent for row in found.rows} == {own_cache / "unpacked"}
    assert all(row.path.suffix == ".png" for row in found.rows)
    assert notes(found.dropped) == [("row 5", "no image"), ("row 6", "no image")]
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


def test_parquet_that_is_damaged_or_lacks_a_column(tmp_path):
    file = parquet(tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ClipmatchError, match=r"train\.parquet is not a whole Parquet file"):
        load_captions(file)
    with pytest.raises(ClipmatchError, match=r"needs an image column .*; it has url, alt"):
        load_captions(put_table(tmp_path / "x.parquet", url=["a"], alt=["b"]))
    with pytest.raises(ClipmatchError, match=r"holds no \.parquet file"):
        load_captions(add_images(tmp_path / "empty", "a.jpg"), format="parquet")


def test_rows_travel_to_worker_processes(tmp_path):
    row = load_captions(webdataset(tmp_path)).rows[0]
    assert pickle.loads(pickle.dumps(row)) == row
    assert isinstance(row.path, Path)
