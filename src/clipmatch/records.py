"""The readers of captions in JSON: Karpathy's data sets, COCO, lists of records, and lines of records.

In: the path of a JSON file. Out: entries and notes, as `formats` describes them; what is counted are the file's
records from 1. Knows nothing of images or folders, and judges no entry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clipmatch.archive import read_bytes
from clipmatch.errors import ClipmatchError
from clipmatch.formats import SPLIT_COLUMN, Entry, LineNote, Reader, captions_of, find_columns, read_lines, refuse_wide

HEAD = 1 << 16  # bytes that tell the kind of a file: more than one record of any kind
MAX_JSON = 1 << 30  # bytes of a file that is read as a whole, which takes several times its size


def load_json(path: Path) -> Any:
    """A JSON file -> its value. Raises ClipmatchError that says where it is damaged, or that it is too large."""
    size = path.stat().st_size
    if size > MAX_JSON:
        raise ClipmatchError(
            f"{path} has {size:,} bytes, and JSON above {MAX_JSON:,} is not read in one piece; write it as JSON lines, "
            "an object a line."
        )
    data = read_bytes(path)
    refuse_wide(path, data[:4])
    try:
        return json.loads(data.decode("utf-8-sig", "replace"))
    except json.JSONDecodeError as error:
        raise ClipmatchError(
            f"{path} is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno} (character "
            f"{error.pos:,} of {len(error.doc):,}); copy or download it again."
        ) from None
    except RecursionError:
        raise ClipmatchError(f"{path} is nested too deeply to be a caption file; give another.") from None
    except ValueError:  # of Python's limit
        raise ClipmatchError(f"{path} has a number of thousands of digits, so no caption file; give another.") from None


def load_images(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """A JSON object with a list `images` -> the object and that list. Raises ClipmatchError for anything else."""
    data = load_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("images"), list):
        raise ClipmatchError(f"{path} has no list \"images\"; give a caption file of Karpathy's or COCO's form.")
    return data, data["images"]


# Karpathy


def read_karpathy(path: Path) -> Iterator[Entry | LineNote]:
    """Karpathy's `dataset_flickr8k.json`, `dataset_flickr30k.json`, `dataset_coco.json`: a record an image.

    Each has its split: train, restval, val or test. COCO's have a folder beside the file name.
    """
    _, images = load_images(path)
    for number, image in enumerate(images, 1):
        name = image_name(image, "filepath", "filename")
        if not name:
            yield LineNote(number, "no file name")
            continue
        captions = captions_of(image.get("sentences"))
        if not captions:
            yield LineNote(number, f"no caption of {name}")
        split = image.get(SPLIT_COLUMN)
        for caption in captions:
            yield Entry(number, name, caption, split=split if isinstance(split, str) else "")


def image_name(record: Any, *keys: str) -> str:
    """Those of these fields of an object that are text, as a path; "" if the last one, the name, is not there."""
    if not isinstance(record, dict) or not isinstance(record.get(keys[-1]), str):
        return ""
    return "/".join(record[key] for key in keys if isinstance(record.get(key), str) and record[key])


# COCO


def read_coco(path: Path) -> Iterator[Entry | LineNote]:
    """COCO's `captions_train2014.json` and the like: a record an annotation, joined to its image by `image_id`."""
    data, images = load_images(path)
    annotations = data.get("annotations")
    if not isinstance(annotations, list):
        raise ClipmatchError(
            f'{path} has no list "annotations", so no captions; give a file such as captions_val.json.'
        )
    names = {image["id"]: image_name(image, "file_name") for image in images if has_id(image)}
    bare = set(names)
    for number, annotation in enumerate(annotations, 1):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str):
            yield LineNote(number, "no caption")
            continue
        key = annotation.get("image_id")
        name = names.get(key) if isinstance(key, int | str) else None
        if name is None:
            yield LineNote(number, f"its image (id {key}) is not in the list of images")
            continue
        bare.discard(key)
        yield Entry(number, name, annotation["caption"])
    if bare:
        yield LineNote(len(annotations), f"{len(bare)} images have no caption, such as {names[next(iter(bare))]}")


def has_id(image: Any) -> bool:
    """Whether a record is an object with an id that annotations can name."""
    return isinstance(image, dict) and isinstance(image.get("id"), int | str)


# Records


def read_json_list(path: Path) -> Iterator[Entry | LineNote]:
    """A list of objects, each with an image and its caption(s): `[{"image": "a.jpg", "caption": ["A dog .", ...]}]`."""
    data = load_json(path)
    if not isinstance(data, list):
        raise ClipmatchError(f"{path} is not a JSON list of records; give another caption file or format.")
    yield from record_entries(enumerate(data, 1))


def read_json_lines(path: Path) -> Iterator[Entry | LineNote]:
    """An object a line, such as Hugging Face's `metadata.jsonl`: `{"file_name": "a.jpg", "text": "A dog ."}`."""
    for line in read_lines(path):
        if not line.text.strip():
            continue
        try:
            record = json.loads(line.text)
        except (ValueError, RecursionError):
            yield LineNote(line.number, "not valid JSON")
            continue
        yield from record_entries([(line.number, record)], line.repair)


def record_entries(records: Iterable[tuple[int, Any]], repair: str = "") -> Iterator[Entry | LineNote]:
    """Numbered objects -> entries; the fields are named as the columns of a table."""
    for number, record in records:
        keys = list(record) if isinstance(record, dict) else []
        columns = find_columns(keys)
        name = record[keys[columns.image]] if columns else None
        if columns is None or not isinstance(name, str):
            yield LineNote(number, "no image name or no caption")
            continue
        split = record[keys[columns.split]] if columns.split is not None else ""
        for caption in captions_of([record[keys[at]] for at in columns.captions]) or [""]:
            yield Entry(number, name, caption, repair, split if isinstance(split, str) else "")


# Kinds


def begins_with(path: Path, pattern: str) -> bool:
    """Whether the first bytes of a file match a regular expression."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(HEAD).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    return re.match(pattern, head, re.DOTALL) is not None


KARPATHY = r'\s*\{.*"(sentences|sentids)"\s*:'  # the first image comes at once, and its captions with it
COCO = r'\s*\{.*"(images|annotations)"\s*:\s*\['
JSON_LIST = r"\s*\[\s*\{"


def is_karpathy(path: Path, head: list[str]) -> bool:
    """Whether a file is a JSON object whose images hold sentences."""
    return begins_with(path, KARPATHY) and not is_json_lines(path, head)


def is_coco(path: Path, head: list[str]) -> bool:
    """Whether a file is a JSON object with the parts of COCO's."""
    return begins_with(path, COCO) and not is_karpathy(path, head) and not is_json_lines(path, head)


def is_json_lines(path: Path, head: list[str]) -> bool:
    """Whether the first line is an object of its own that names an image."""
    return record_of(head[0]) is not None


def record_of(line: str) -> dict[str, Any] | None:
    """A line -> the object it holds, if that has fields for an image and captions."""
    if not line.lstrip().startswith("{"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and find_columns(list(record)) else None


JSON_READERS = (
    Reader("karpathy", is_karpathy, read_karpathy, unit="record"),
    Reader("coco", is_coco, read_coco, unit="annotation"),
    Reader("json-list", lambda path, head: begins_with(path, JSON_LIST), read_json_list, unit="record"),
    Reader("json-lines", is_json_lines, read_json_lines),
)
