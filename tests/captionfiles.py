"""Small caption files with the quirks of the real ones, a function for each kind, and what tests of them share."""

import io
import json
import tarfile

import pyarrow as arrow
import pyarrow.parquet
from PIL import Image


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


def pack_rows(path, rows):
    """A shard of WebDataset with these captioned images: 0.jpg, 0.txt, 1.jpg, ..."""
    members = []
    for number, row in enumerate(rows):
        captions = "\n".join(row.captions).encode()
        members += [(f"{number}{row.path.suffix}", row.path.read_bytes()), (f"{number}.txt", captions)]
    return pack(path, members)


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


def embedded(path, images, **columns):
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    return put_table(path, image=arrow.array(images, kind), **columns)
