"""The recipes in runs/ at toy size: the same commands on drawn scenes and tiny towers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script, *arguments):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [str(ROOT / "runs" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})


def test_heads_on_a_laptop(scenes, towers, tmp_path):
    options = ["--image-tower", towers / "vit-s14", "--text-tower", towers / "minilm"]
    done = run("tiny_cpu.sh", scenes, scenes / "Images", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert figures["images"] == 20  # the held-out part alone
    assert 0 <= figures["text_to_image"]["recall@1"] <= figures["text_to_image"]["recall@10"] <= 1


@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="runs/flickr8k.sh uses the environment of `make setup`")
def test_the_flickr8k_recipe(scenes, towers, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(towers, out / "towers")
    done = run("flickr8k.sh", scenes, out)
    assert done.returncode == 0, done.stderr
    figures = json.loads((out / "evaluation.json").read_text())
    assert (figures["images"], figures["captions"]) == (20, 100)
    assert (out / "evaluation.html").stat().st_size > 10_000
    config = json.loads((out / "tuned" / "best" / "config.json").read_text())
    assert config["model"]["image_pooling"] == "cls+mean"
    assert config["about"]["training"]["tune_text"] == "all"


@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="runs/flickr30k.sh uses the environment of `make setup`")
def test_the_flickr30k_recipe(scenes, towers, tmp_path):
    """Its second run tunes four blocks; the toy tower has three, so it goes as far as that sentence."""
    options = ["--image-tower", towers / "vit-s14", "--text-tower", towers / "minilm"]
    done = run("flickr30k.sh", scenes, tmp_path / "out", *options)
    assert "The tower has 3 blocks, fewer than the 4 to tune" in done.stderr
    assert (tmp_path / "out" / "heads" / "best" / "config.json").is_file()
