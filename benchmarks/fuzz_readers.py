"""Everything that reads what others have written, given what no one would write: bytes that a fuzzer makes up.

    python benchmarks/fuzz_readers.py [ENTRY ...] [--seconds 60] [--json FILE]

Needs atheris (pip install atheris; Linux and macOS, Python 3.11 or later), whose mutations are led by the code that
they reach. An entry is a way in: a format of captions, a query, the settings of a model, and so on. Whatever the bytes,
it may take them, or raise `ClipmatchError`; a reader of captions has to account for every line or record, as a caption
or as one that was dropped. Anything else is a finding: another exception, a line that is lost, ten seconds, two
gigabytes. The tests run the same entries on the same seeds.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import FunctionType

import click
import numpy as np
from badimages import encoded, exif_of, scene
from common import machine, machine_line, table, write_json

from clipmatch import archive, captionrules, formats, records
from clipmatch.calibration import Calibration
from clipmatch.checkpoint import parse_preprocessing
from clipmatch.cli_photos import box, file_size, moment
from clipmatch.config import DataConfig, ModelConfig, PreprocessConfig, TrainConfig, from_json
from clipmatch.data import content_hash, load_captions, read_split, select_part, split_captions
from clipmatch.errors import ClipmatchError
from clipmatch.folders import expand
from clipmatch.generation.prompts import parse_prompts
from clipmatch.index import Index
from clipmatch.metadata import as_moment, caption_of, read_metadata, words_beside, xmp_words
from clipmatch.modelfolder import read_config
from clipmatch.preprocess import ImageError, load_image, open_photo
from clipmatch.query import concept_name, parse_query
from clipmatch.store import Filter, Store

LIMIT_SECONDS, LIMIT_MB = 10, 2048


@cache
def place() -> Path:
    """A folder with two pictures, for this process."""
    folder = Path(tempfile.mkdtemp(prefix="clipmatch-fuzz-"))
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(encoded(scene(), "JPEG"))
    return folder


def written(name: str, data: bytes) -> Path:
    """The bytes as a file."""
    path = place() / name
    path.write_bytes(data)
    return path


def text_of(data: bytes) -> str:
    """Any text, stray bytes of the command line and all."""
    return data.decode("utf-8", "surrogateescape")


# Captions -----------------------------------------------------------------------------------------------------------


def captions(kind: str | None, suffix: str, data: bytes) -> None:
    """Captions of a format, or of the one that is recognised; with all that comes after."""
    path = written(f"captions{suffix}", data)
    found = load_captions(path, None if suffix in (".tar", ".parquet") else place(), kind)
    told = {entry.line for entry in found.entries} | {note.line for note in found.dropped}
    lost = places_of(found.format, data) - told
    assert not lost, f"lost without a word: {sorted(lost)[:5]} of {found.format}"
    captionrules.find_odd(found.entries)
    captionrules.find_repeated(found.entries)
    content_hash(found.rows)
    for attempt in (lambda: split_captions(found), lambda: select_part(found, "train")):
        with sentences():
            attempt()


def places_of(kind: str, data: bytes) -> set[int]:
    """The lines or records that a file of a format has, counted in the simplest way; none where there is none."""
    if kind in ("json-list", "karpathy", "coco"):
        values = json.loads(data.decode("utf-8-sig", "replace"))
        part = {
            "json-list": lambda: values,
            "karpathy": lambda: values["images"],
            "coco": lambda: values["annotations"],
        }
        return set(range(1, len(part[kind]()) + 1))
    if kind in ("json-lines", "flickr8k-csv", "flickr8k-token", "flickr30k-csv"):
        lines = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").split("\n")
        filled = {number: line.removesuffix("\r") for number, line in enumerate(lines, 1) if line.strip()}
        if kind == "flickr8k-csv" and filled and formats.is_flickr8k_header(next(iter(filled.values()))):
            del filled[next(iter(filled))]
        return {n for n, line in filled.items() if kind != "flickr30k-csv" or not formats.flickr30k_delimiter(line)}
    return set()


def caption_fields(data: bytes) -> None:
    """What is made of a field of a table, and of a value in JSON."""
    formats.captions_of(formats.listed(text_of(data)))
    captionrules.why_odd(text_of(data))
    with sentences():
        formats.captions_of(records.load_json(written("field.json", data)))


def names(data: bytes) -> None:
    """Lists of names, and patterns of archives."""
    with sentences():
        read_split(written("names.txt", data))
    expand(text_of(data[:200]))


# What people type ---------------------------------------------------------------------------------------------------


def words(data: bytes) -> None:
    """A query, a prompt, a concept's name, and the values of filters; with what the store makes of them."""
    text = text_of(data)
    for parse in (parse_query, partial(parse_prompts, pictures=False), concept_name):
        with sentences():
            parsed = parse(text)
            if parse is parse_query:
                assert np.isfinite(parsed.weights).all()
    where: dict[str, object] = {"camera": text}
    for name, parse_value in (("after", moment), ("min_size", file_size), ("box", box)):
        try:
            where[name] = parse_value(None, None, text)
        except click.BadParameter:
            continue
    store().numbers(Filter(**where))
    store().named(text, 10)


@cache
def store() -> Store:
    """An empty index."""
    return Store.open(place() / "index.sqlite", create=True)


# Settings -----------------------------------------------------------------------------------------------------------


def settings(data: bytes) -> None:
    """The JSON files of models and runs."""
    for name in ("config.json", "calibration.json"):
        written(name, data)
    with sentences():
        read_config(place())
    with sentences():
        Calibration.load(place(), "0" * 16)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    for kind in (PreprocessConfig, ModelConfig, DataConfig, TrainConfig):
        with sentences():
            from_json(kind, values)
    with suppress(ValueError, TypeError, AttributeError, OverflowError), sentences():  # its caller does
        parse_preprocessing(values)
    with suppress(ValueError, TypeError, KeyError, OverflowError), sentences():  # likewise
        Index(store(), Embedder).import_concepts(values)


class Embedder:
    """As much of a model as the import of concepts asks for."""

    fingerprint, dim = "0" * 16, 2


# Pictures -----------------------------------------------------------------------------------------------------------


def pictures(data: bytes) -> None:
    """Any bytes as a picture, by its content and by two names."""
    for name in ("picture.jpg", "picture.tif"):
        try:
            open_photo(written(name, data), 64)
        except ImageError as error:
            if not error.reason:
                raise AssertionError("a picture is refused without a reason") from error


def said_of_pictures(data: bytes) -> None:
    """EXIF data, XMP packets and side-cars."""
    for part in ({"exif": b"Exif\0\0" + data}, {"xmp": data}):
        if len(data) < 60_000:
            with io.BytesIO(encoded(scene(size=(8, 8)), "JPEG", **part)) as file, open_image(file) as image:
                read_metadata(place() / "none.jpg", image)
                load_image("none.jpg", 64, file.getvalue())
    written("a.txt", data)
    written("a.xmp", data)
    with open_image(place() / "a.jpg") as image:
        caption_of(image, image.getexif(), words_beside(place() / "a.jpg"))
    as_moment(text_of(data))
    with suppress(Exception):  # `attempt` is around it
        xmp_words(data)


def archives(data: bytes) -> None:
    """A tar archive."""
    path = written("pictures.tar", data)
    with suppress(OSError):
        for member in archive.contents(path).members:
            with suppress(OSError):
                archive.read_at(path, member.offset, member.size)


# All of it ----------------------------------------------------------------------------------------------------------


def sentences():
    """Within it a ClipmatchError is as good as an answer, if it is a sentence."""
    return suppress(ClipmatchError)


def open_image(file: object):
    """A picture, opened by Pillow."""
    from PIL import Image

    return Image.open(file)


Entry = Callable[[bytes], None]
TEXT_KINDS = {"flickr8k-csv": ".txt", "flickr8k-token": ".txt", "flickr30k-csv": ".csv", "table": ".csv"}
JSON_KINDS = {"json-lines": ".jsonl", "json-list": ".json", "karpathy": ".json", "coco": ".json"}
ENTRIES: dict[str, Entry] = {
    **{kind: partial(captions, kind, suffix) for kind, suffix in {**TEXT_KINDS, **JSON_KINDS}.items()},
    "any text": partial(captions, None, ".txt"),
    "any json": partial(captions, None, ".json"),
    "webdataset": partial(captions, "webdataset", ".tar"),
    "parquet": partial(captions, "parquet", ".parquet"),
    "fields": caption_fields,
    "names": names,
    "words": words,
    "settings": settings,
    "archives": archives,
    "said of pictures": said_of_pictures,
    "pictures": pictures,
}


def seeds(entry: str) -> list[bytes]:
    """Quirks of the real world to begin with: of the entry's own kind, and those that every text may have."""
    return [*OWN.get(entry, lambda: [])(), *(QUIRKS if entry not in ("pictures", "archives", "parquet") else [])]


QUIRKS = [
    b"", b"\n", b"\xef\xbb\xbf", b"\0", b"\0" * 600, b"\r", b"\xff\xfea\0", b"caf\xe9", b"\x1b[2J",
    b"\xed\xa0\x80",
    "image,caption\na.jpg,A dog .\n".encode("utf-16"), "image,caption\na.jpg,A dog .\n".encode("utf-32"),
    b"image,caption\ra.jpg,A dog .\r", b"image,caption\r\na.jpg,A dog , wet .\r\n", b"image,caption\na.jpg,caf\xe9 .\n",
    b"image_name| comment_number| comment\na.jpg| 0| A dog .\nb.jpg| 4   A dog runs .\n",
    b"image_name,comment_number,comment\na.jpg,0, A dog , wet .\nb.jpg,4   A dog runs .\n",
    b"image_name| comment_number| comment\na.jpg| 1 x" + b" " * 2000 + b"y|z\n",
    b"a.jpg#0\tA dog .\nb.jpg#1\tA cat .\n2258277193_586949ec62.jpg.1#0\tPeople .\n",
    b'file_name,text,split\na.jpg,"A dog, ""wet"" .",train\n'
    b'b.jpg,"A stray quote .,val\nb.jpg,"Two\nlines .",val\n',
    b"file_name\ttext\na.jpg\t[{[]: 1}]\n",
    b"file_name\ttext\na.jpg\t['A dog .', 'A wet dog .']\n", b'image;caption_0;caption_1\na.jpg;"[""A"", ""B""]";C\n',
    b"image,caption\n../a.jpg,A dog .\n/etc/passwd,A cat .\n"
    b"C:\\a.jpg,A cow .\n\\\\host\\a.jpg,A hen .\n a.jpg ,A fox .\n",
    b"image,caption\na\0.jpg,A dog .\na.jpg,\0\nb.jpg,\n,A cat .\n", b"image,caption\na.jpg," + b"x" * 70_000 + b"\n",
    b'{"image": "a.jpg", "caption": ["A dog .", ["A wet dog ."]]}\n{"image": "\\ud800.jpg", "caption": "\\udc80"}\n',
    b'{"file_name": "b.jpg", "text": "A cat ."}\n{"file_name": 1, "text": null}\n[]\nnull\n{"a": NaN}\n{',
    b'[{"image": "a.jpg", "caption": "A dog ."}, {"image": "b.jpg", "caption": ' + b"[" * 300 + b"]" * 300 + b"}]",
    b'[{"image": "a.jpg", "caption": "A dog .", "id": ' + b"9" * 5000 + b"}]", b"[" * 5000, b'{"a":' * 5000,
    b'{"images": [{"filename": "a.jpg", "filepath": ".", "split": "train", "sentences": [{"raw": "A dog ."}]},'
    b' {"filename": "b.jpg", "split": 1, "sentences": [{"tokens": []}]}, null, {"sentences": 3}]}',
    b'{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": "1", "file_name": "b.jpg"}, {"id": 2}], "annotations": ['
    b'{"image_id": 1, "caption": "A dog ."}, {"image_id": [], "caption": "A cat ."},'
    b' {"image_id": 3, "caption": 4}, 5]}',
]  # fmt: skip


def tar_seeds() -> Iterator[bytes]:
    """Archives: whole, cut off, and with names and sizes that lie."""
    import tarfile

    for name in ("a.jpg", "../a.jpg", "a" * 200 + ".jpg"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for member, data in ((name, b"x" * 10), ("a.txt", b"A dog ."), ("a.json", b'{"caption": ["A dog ."]}')):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        data = buffer.getvalue()[:4096]
        yield from (data, data[:700], data.replace(b"00000000012", b"77777777777"))


def parquet_seeds() -> list[bytes]:
    """Tables, whole and cut off."""
    import pyarrow as arrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    rows = {"image": ["a.jpg", "b.jpg", None], "caption": [["A dog ."], ["A cat ."], None]}
    arrow.parquet.write_table(arrow.table(rows), buffer)
    return [buffer.getvalue(), buffer.getvalue()[:-20]]


OWN: dict[str, Callable[[], list[bytes]]] = {
    "webdataset": lambda: list(tar_seeds()),
    "archives": lambda: list(tar_seeds()),
    "parquet": parquet_seeds,
    "pictures": lambda: [
        encoded(scene(size=(16, 16)), kind) for kind in ("JPEG", "progressive", "PNG", "WebP", "GIF", "TIFF")
    ],
    "names": lambda: [b"a.jpg\nb.jpg\n", b"{00..03}.tar", b"{a,b}{1..99999999999}.tar", b"{{{", b"{..}", b"{1..3..0}"],
    "words": lambda: [
        b"two dogs in the snow", b"dog:2", b"@rex on a beach", b"dog:" + b"9" * 400, b"2023-06", b"9" * 400 + b"G",
        b"2M", b"9999999999G", b"46,7,47,8", b"nan,0,inf,1", b"1e400,0,1,1", b"a bus | blur:-0.5",
        b"~nobody/x.jpg", b'"',
    ],
    "said of pictures": lambda: [
        exif_of([(0x8769, 4, 1, 8), (0x8825, 4, 1, 8)], 8)[6:], exif_of([(0x0112, 3, 1, 6)])[6:],
        b"2021:06:05 14:03:02", b"9999:99:99 99:99:99", b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
        b'<!DOCTYPE x [<!ENTITY a "&a;">]><x>&a;</x>',
    ],
    "settings": lambda: [
        json.dumps(value).encode()
        for value in (
            {"format": "clipmatch", "schema": 1, "model": {}, "preprocess": {}, "fingerprint": "0" * 16},
            {"format": "clipmatch", "schema": "1", "model": [], "preprocess": 1, "fingerprint": None},
            {"size": 224, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}, {"size": "224"}, {"mean": 5},
            {"size": 1e400}, {"embed_dim": "2"}, {"captions": "x", "dev_fraction": "a"},
            {"out": "x", "epochs": [1], "tune_image": {}},
            {"schema": 1, "concepts": [{"name": "a", "model": "0" * 16, "row": [0, 1], "examples": [], "others": [],
                                        "precision": None}]},
            {"schema": 1, "concepts": [{"name": 1, "model": 2, "row": [[]]}]}, [], 3, {"size": {"height": None}},
            {"schema": 1, "fingerprint": "0" * 16, "weights": [1, 1, 1, 1], "alike": 1, "dim": 0, "split_hash": "",
             "figures": {}, "bank": {"pictures": "", "captions": ""}},
        )
    ],
}  # fmt: skip


# The fuzzer ---------------------------------------------------------------------------------------------------------


def run(entry: str, data: bytes) -> None:
    """An entry on some bytes: an answer or a sentence, and nothing else."""
    with sentences():
        ENTRIES[entry](data)


def functions_of(*beginnings: str) -> Iterator[FunctionType]:
    """The functions and methods of the modules whose names begin so, of those that are imported."""
    for name, module in list(sys.modules.items()):
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == name]
        methods = [value for kind in own if isinstance(kind, type) for value in vars(kind).values()]
        if name.startswith(beginnings):
            yield from (value for value in [*own, *methods] if isinstance(value, FunctionType))


def fuzz(entry: str, arguments: list[str]) -> None:
    """Within a process of its own: atheris ends it."""
    import atheris

    for function in functions_of("clipmatch.", "PIL."):
        atheris.instrument_func(function)
    if entry not in ("webdataset", "archives"):  # atheris ends the process over a pattern of tarfile's
        atheris.enabled_hooks.add("RegEx")
    atheris.Setup([sys.argv[0], *arguments], lambda data: run(entry, data))
    atheris.Fuzz()


def measure(entry: str, seconds: int) -> dict[str, object]:
    """Fuzz an entry for so long -> executions, and what was found."""
    with tempfile.TemporaryDirectory() as folder:
        start, corpus = Path(folder) / "seeds", Path(folder) / "corpus"
        start.mkdir(), corpus.mkdir()
        for number, data in enumerate(seeds(entry)):
            (start / f"{number:03d}").write_bytes(data)
        options = [f"-max_total_time={seconds}", f"-timeout={LIMIT_SECONDS}", f"-rss_limit_mb={LIMIT_MB}", "-seed=1"]
        options += ["-print_final_stats=1", "-max_len=100000", f"-artifact_prefix={folder}/", str(corpus), str(start)]
        command = [sys.executable, __file__, "--inside", entry, "--", *options]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, check=False, timeout=seconds + 120)
        said = done.stderr.decode("utf-8", "replace")
        found = [path.read_bytes() for path in Path(folder).glob("*-*") if path.is_file()]
    count = re.search(r"number_of_executed_units:\s+(\d+)", said)
    reached = re.findall(r"cov: (\d+)", said)
    return {
        "executions": int(count[1]) if count else 0,
        "seconds": time.perf_counter() - began,
        "edges": int(reached[-1]) if reached else 0,
        "findings": [{"input": repr(data[:300]), "said": said[-3000:]} for data in found],
        "ended": done.returncode,
    }


def main() -> None:
    if "--inside" in sys.argv:
        at = sys.argv.index("--inside")
        fuzz(sys.argv[at + 1], sys.argv[at + 3 :])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", metavar="ENTRY", help=f"of: {', '.join(ENTRIES)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if unknown := set(options.entries) - ENTRIES.keys():
        parser.error(f"there is no entry {min(unknown)}; there are {', '.join(ENTRIES)}")
    try:
        import atheris  # noqa: F401
    except ModuleNotFoundError:
        raise SystemExit("The fuzzer is not installed: pip install atheris") from None
    result = {"machine": machine("atheris", "clipmatch", "pillow", "pyarrow"), "entries": {}}
    for entry in options.entries or ENTRIES:
        result["entries"][entry] = found = measure(entry, options.seconds)
        print(f"{entry}: {found['executions']:,} executions, {len(found['findings'])} findings", file=sys.stderr)
        write_json(options.json, result)
    print(machine_line(result["machine"]))
    rows = [(name, f"{found['executions']:,}", round(found["seconds"]), found["edges"], len(found["findings"]))
            for name, found in result["entries"].items()]  # fmt: skip
    print(table(["entry", "executions", "seconds", "edges", "findings"], rows))
    for name, found in result["entries"].items():
        for finding in found["findings"]:
            print(f"\n{name}: {finding['input']}\n{finding['said']}")


if __name__ == "__main__":
    main()
