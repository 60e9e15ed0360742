"""Everything that the README shows is run: its commands in order, its Python, its sample search."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clipmatch.scenes import read_scenes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def place(scenes, towers, tmp_path_factory):
    """A folder like a reader's: captions.txt, Images, Pictures, and the default towers in the hub's cache."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(scenes, folder, dirs_exist_ok=True)
    shutil.copytree(scenes / "Images", folder / "Pictures")
    for name, tower in (("google--vit-base-patch16-224", "vit-s14"), ("distilbert-base-uncased", "minilm")):
        cached = folder / "hf" / "hub" / f"models--{name}"
        shutil.copytree(towers / tower, cached / "snapshots" / "0123")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0123")
    return folder


def run(command, place):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(place / "hf"),
        "HF_HUB_OFFLINE": "1",
        "CLIPMATCH_CACHE": str(place / "cache"),
    }
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


def test_commands_and_python_in_order(place):
    commands = [line for block in blocks("sh") for line in block.strip().splitlines() if line.startswith("clipmatch ")]
    assert len(commands) >= 4
    for command in commands:
        done = run(shlex.split(command), place)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (place / "figures.json").is_file()
    assert (place / "card.html").is_file()
    for code in blocks("python"):
        done = run([sys.executable, "-c", code], place)
        assert done.returncode == 0, done.stderr


def test_the_verbs_of_make_exist():
    rules = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z]+)", README)) <= rules


def test_the_sample_search_is_real(training_demo):
    """Scores differ a little between processors; what the pictures show does not."""
    folder, _ = training_demo
    shown = blocks("console")[0].strip().splitlines()
    command, sample = shown[0].removeprefix("$ "), shown[1:]
    done = run(shlex.split(command), folder.parent)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.strip().splitlines()
    assert printed[0] == sample[0]
    assert len(printed) == len(sample)
    scenes = read_scenes(folder / "scenes")
    for answers in (printed[1:], sample[1:]):
        found = [scenes[Path(line.split()[-1]).name] for line in answers]
        assert any(scene.background == "sea" and is_two_big_black_fish(scene) for scene in found)


def is_two_big_black_fish(scene):
    return any((g.count, g.size, g.colour, g.shape) == (2, "big", "black", "fish") for g in scene.groups)
