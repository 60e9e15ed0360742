"""Every example of docs/data.md is read by the reader it is for, and the page names all readers."""

import io
import random
import re
import shlex
from pathlib import Path

import pytest
from captionfiles import pack, picture, write
from click.testing import CliRunner
from PIL import Image, ImageDraw

from clipmatch.cli import main
from clipmatch.data import load_captions
from clipmatch.readers import READERS

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
BLOCKS = [
    (kind, info, text)
    for kind, section in SECTIONS.items()
    for info, text in re.findall(r"^```(\S[^\n]*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
]
CAPTIONS = {("A dog , running .", "A wet dog ."), ("A cat asleep .",)}
IMAGES = (
    *("dog.jpg", "cat.jpg", "cat.png", "images/dog.jpg", "images/cat.jpg"),
    *("val2017/000000000139.jpg", "val2017/000000000285.jpg"),
)


def test_the_page_names_every_reader():
    names = [reader.name for reader in READERS]
    assert sorted(re.findall(r"^\| `(\w[a-z0-9-]+)` \|", PAGE, re.MULTILINE)) == sorted(names)
    assert set(names) <= {kind for kind, _, _ in BLOCKS}


@pytest.mark.parametrize(("kind", "info", "text"), BLOCKS, ids=[f"{kind} {info}" for kind, info, _ in BLOCKS])
def test_each_example_is_read(tmp_path, monkeypatch, kind, info, text):
    monkeypatch.chdir(tmp_path)
    for name in IMAGES:
        write(tmp_path / name, picture("red" if "dog" in name else "blue"))
    language, _, name = info.partition(" ")
    if name:
        source = write(tmp_path / name, text)
    elif language == "console":
        source = from_session(tmp_path, text)
    else:
        exec(text, {})
        (source,) = tmp_path.glob("*.parquet")
    found = load_captions(source)
    assert found.format == kind
    assert {row.captions for row in found.rows} == CAPTIONS
    assert found.dropped == ()


def from_session(folder, text):
    """A listing of files, then what is in those of text -> the folder or archive that it shows."""
    listing, *shown = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)+)", text, re.MULTILINE)
    words = listing[0].split()
    contents = {command.split()[-1]: output for command, output in shown}
    files = {name: contents[name].encode() if name in contents else picture() for name in listing[1].splitlines()}
    if words[0] == "tar":
        return pack(folder / words[-1], files.items())
    for name, data in files.items():
        write(folder / name, data)
    return folder / words[1]


def test_the_check_of_a_broken_folder_says_what_is_shown(tmp_path, monkeypatch):
    (text,) = re.findall(r"^## What a check says$.*?^```console\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    session = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)+)", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    given = [(command.split()[1], output) for command, output in session if command.startswith("cat photos/")]
    for name, output in given:
        write(tmp_path / name, output)
    dog = circles("dog")
    whole = {
        "dog": dog,
        "dog copy": dog,
        "dog small": dog.resize((120, 80)),
        "cat": circles("cat"),
        "boat": circles("boat"),
    }
    for name, image in whole.items():
        write(tmp_path / f"photos/Images/{name}.jpg", jpeg(image))
    half = jpeg(circles("half"))
    write(tmp_path / "photos/Images/half.jpg", half[: len(half) // 2])
    write(tmp_path / "photos/Images/empty.jpg", b"")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    for command, output in session[len(given) :]:
        if command.startswith("cat "):
            assert Path(command.split()[1]).read_text() == output
        else:
            asked, _, last = command.partition(" | tail -n ")
            done = CliRunner().invoke(main, shlex.split(asked)[1:], catch_exceptions=False)
            assert done.exit_code == 0
            lines = done.stdout.splitlines(keepends=True)
            found = "".join(lines[-int(last) :] if last else lines)
            assert re.sub(r"\d+ bytes", "7 bytes", found) == output  # how many depends on the library
    assert {path: path.read_bytes() for path in before} == before


def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def circles(name):
    """A picture of its own for each name."""
    chosen = random.Random(name)
    image = Image.new("RGB", (180, 120), tuple(chosen.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        left, top = chosen.randrange(150), chosen.randrange(90)
        box = (left, top, left + chosen.randrange(15, 80), top + chosen.randrange(15, 60))
        draw.ellipse(box, fill=tuple(chosen.randrange(256) for _ in range(3)))
    return image
