"""Every example of docs/data.md is read by the reader it is for, and the page names all readers."""

import re
from pathlib import Path

import pytest
from captionfiles import pack, picture, write

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
