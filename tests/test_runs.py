"""The recipes in runs/ at toy size: the same commands on drawn scenes and tiny towers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from clipmatch.concepts import Concepts
from clipmatch.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel
from clipmatch.embedder import load_model

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


@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="runs/embedded.sh uses the environment of `make setup`")
def test_the_recipe_of_the_embedded_model(scenes, towers, tmp_path):
    out = tmp_path / "out"
    for place in (out, out / "flickr8k"):
        shutil.copytree(towers, place / "towers")
    torch.manual_seed(0)
    lite2 = out / "towers" / "lite2"
    EfficientNetLiteModel(EfficientNetLiteConfig(width=0.5, depth=0.5, image_size=64)).save_pretrained(lite2)
    (lite2 / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 64}}')
    directions = np.random.default_rng(0).normal(size=(3, 2560)).astype(np.float32)
    Concepts(np.zeros(2560, np.float32), directions, [["cat"], ["cup"], ["bus"]], [[], [], []]).save(
        out / "concepts.safetensors"
    )
    done = run("embedded.sh", scenes, out)
    assert done.returncode == 0, done.stderr
    about = json.loads((out / "model" / "config.json").read_text())["about"]
    teachers = [out / "tuned", out / "flickr8k" / "tuned"]
    assert about["taught_by"] == [load_model(folder).fingerprint for folder in teachers]
    assert about["exported_from"]["numbers"] == "int8"
    assert {path.name for path in (out / "model").iterdir()} == {
        "config.json",
        "image.onnx",
        "text.onnx",
        "tokenizer.json",
    }
    rows = load_model(out / "model").embed_images(sorted((scenes / "Images").iterdir())[:3], progress=False).rows
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 1, 1], abs=1e-5)


@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="runs/flickr30k.sh uses the environment of `make setup`")
def test_the_flickr30k_recipe(scenes, towers, tmp_path):
    """Its second run tunes four blocks; the toy tower has three, so it goes as far as that sentence."""
    options = ["--image-tower", towers / "vit-s14", "--text-tower", towers / "minilm"]
    done = run("flickr30k.sh", scenes, tmp_path / "out", *options)
    assert "The tower has 3 blocks, fewer than the 4 to tune" in done.stderr
    assert (tmp_path / "out" / "heads" / "best" / "config.json").is_file()
