"""clipModel.py at the root: the names and calls of the original module, offline."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizerFast

import clipmatch

ROOT = Path(__file__).parents[1]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "run", "##ning"]
NO_NETWORK = """
import socket
def refuse(*_, **__):
    raise AssertionError("a socket was opened")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
"""


def run(program, home, **environment):
    """A program in the root folder with a hub cache of its own -> what it printed."""
    variables = {**os.environ, "HF_HOME": str(home), **environment}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def home(tmp_path):
    """A hub cache that holds the tokenizer of distilbert-base-uncased, with nine words."""
    folder = tmp_path / "hub" / "models--distilbert-base-uncased"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "distilbert", "vocab_size": len(WORDS)}))
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("".join(f"{word}\n" for word in WORDS))
    BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(tmp_path / "words")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "words" / name, snapshot / name)
    shutil.copy(vocabulary, snapshot / "vocab.txt")
    return tmp_path


@pytest.mark.parametrize("offline", ["1", "0"])  # 0: the program is to find out by itself
def test_the_tokenizer_call_works_as_written(home, offline):
    program = (
        "from clipModel import tokenizer\n"
        "texts = ['A dog running', 'a cat']\n"
        "out = tokenizer(texts, padding='max_length', truncation=True, max_length=64, return_tensors='pt')\n"
        "print(out['input_ids'].shape, out['attention_mask'].shape, out['input_ids'].dtype)\n"
        "print(out['input_ids'][:, :7].tolist(), out['attention_mask'].sum(1).tolist())\n"
    )
    first, second = run(NO_NETWORK + program, home, HF_HUB_OFFLINE=offline).splitlines()
    assert first == "torch.Size([2, 64]) torch.Size([2, 64]) torch.int64"
    assert second == "[[2, 5, 6, 7, 8, 3, 0], [2, 5, 1, 3, 0, 0, 0]] [6, 4]"


def test_importing_and_transforming_need_no_network_and_load_no_weights(tmp_path):
    program = (
        "import sys, numpy\n"
        "from clipModel import CLIPModel, ImageEncoder, ProjectionHead, TextEncoder, tokenizer, transform\n"
        "from PIL import Image\n"
        "values = transform(images=Image.new('RGB', (40, 30), 'white'))['pixel_values'][0]\n"
        "print(values.shape, values.dtype, float(values.min()), float(values.max()))\n"
        "print('transformers.models.vit.modeling_vit' in sys.modules)\n"
    )
    assert run(NO_NETWORK + program, tmp_path, HF_HUB_OFFLINE="0").splitlines() == [
        "(3, 224, 224) float32 1.0 1.0",
        "False",
    ]


def test_the_names_are_those_of_the_package(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import clipModel

    for name in ("CLIPModel", "ImageEncoder", "ProjectionHead", "TextEncoder"):
        assert getattr(clipModel, name) is getattr(clipmatch, name)
    values = clipModel.transform(images=Image.new("RGB", (4, 4), "black"))["pixel_values"][0]
    assert np.array_equal(values, np.full((3, 224, 224), -1, np.float32))
    assert torch.from_numpy(values).shape == (3, 224, 224)


def test_a_vocabulary_that_can_not_be_had_is_one_sentence(tmp_path):
    program = "import clipModel\ntry: clipModel.tokenizer('a dog')\nexcept Exception as error: print(error)\n"
    text = run(program, tmp_path, HF_HUB_OFFLINE="1")
    assert "The hub model 'distilbert-base-uncased' can't be reached and is not in the local cache" in text
    assert text.count("\n") == 1
