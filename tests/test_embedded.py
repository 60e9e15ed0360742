"""The model that comes with clipmatch: what is in its folder, and that it answers without PyTorch."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from clipmatch.catalogue import list_models
from clipmatch.embedder import load_model
from clipmatch.modelfolder import EMBEDDED, find_folder
from clipmatch.training import absolute_name

ROOT = Path(__file__).parents[1]
LIMIT = 40e6  # bytes


@pytest.fixture(scope="module")
def model():
    return load_model()


def test_it_has_a_name_wherever_a_model_is_named(model, tmp_path, monkeypatch):
    """Also as a teacher, and to train from; a folder of that name is "./embedded"."""
    monkeypatch.chdir(tmp_path)
    named = load_model("embedded")
    assert (named.fingerprint, named.name) == (model.fingerprint, model.name)
    assert find_folder("embedded") == EMBEDDED
    assert absolute_name("embedded") == "embedded"  # a run that is resumed elsewhere finds it too
    shutil.copytree(EMBEDDED, tmp_path / "embedded")
    assert find_folder("./embedded") == Path("embedded")
    assert absolute_name("./embedded") == str(tmp_path / "embedded")


def test_the_folder_is_whole_and_small():
    sizes = {path.name: path.stat().st_size for path in EMBEDDED.iterdir()}
    files = {"image.onnx", "text.onnx", "tokenizer.json", "config.json", "calibration.json", "README.md"}
    assert sizes.keys() == files
    assert sum(sizes.values()) < LIMIT


def test_its_files_are_those_that_were_measured(model):
    """The fingerprint is a hash of the files: none was changed after the figures were taken."""
    from clipmatch.modelfolder import IMAGE_GRAPH, TEXT_GRAPH, TOKENIZER, fingerprint_of

    values = json.loads((EMBEDDED / "config.json").read_text())
    files = [EMBEDDED / name for name in (IMAGE_GRAPH, TEXT_GRAPH, TOKENIZER)]
    assert fingerprint_of(files, [values["model"], values["preprocess"]]) == model.fingerprint
    assert model.calibration.fingerprint == model.fingerprint


def test_the_card_and_the_list_of_models_say_the_same():
    (row,) = [row for row in list_models([]) if row.place == "clipmatch"]
    card = (EMBEDDED / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if "Flickr8k dev" in line and "text to image |" in line]
    shown = [float(value) for value in re.findall(r"\| ([\d.]+) \(", line)]
    assert shown == [round(100 * value, 1) for value in row.recall]
    assert row.recall >= (0.28, 0.60, 0.73)
    assert row.licence == "Apache-2.0"


def test_unit_rows_that_do_not_depend_on_their_neighbours(model):
    texts = ["a dog", "two children on a swing in the park", "x" * 500, ""]
    rows = model.embed_texts(texts)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    alone = np.concatenate([model.embed_texts([text]) for text in texts])
    np.testing.assert_allclose(rows, alone, atol=2e-3)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 260, 260, 3), dtype=np.uint8)
    one_by_one = np.concatenate([model.encode_pixels(pixels[[place]]) for place in range(3)])
    np.testing.assert_allclose(model.encode_pixels(pixels), one_by_one, atol=2e-3)


def test_meaning_beats_wording(model):
    dog, puppy, man = model.embed_texts(
        ["a dog runs on the beach", "a puppy is running along the shore", "a man runs on the stage"]
    )
    assert dog @ puppy > dog @ man + 0.2


def test_the_wheel_carries_it(tmp_path):
    """As the package is built for people, the model is inside, and the wheel is not much larger than it."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    command = [sys.executable, "-m", "pip", "wheel", *options, ROOT]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < LIMIT
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"clipmatch/embedded/{path.name}" for path in EMBEDDED.iterdir()} <= names
    assert "clipmatch/templates/search.html.j2" in names
