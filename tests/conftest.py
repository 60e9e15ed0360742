"""What several tests share: a few drawn scenes, a model small enough to build in a blink, a cache of their own."""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may lean on the network
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="clipmatch-tests-")  # what belongs to a person stays untouched

if "PYTEST_XDIST_WORKER" in os.environ:  # files side by side: threads of one for all cores would hold up the other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import tokenizers
import torch
from colours import paint
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast, ViTConfig, ViTModel

from clipmatch.checkpoint import Checkpoint, save_checkpoint
from clipmatch.config import ModelConfig, PreprocessConfig
from clipmatch.data import load_captions
from clipmatch.demo_train import learn_tokenizer
from clipmatch.model import CLIPModel
from clipmatch.preprocess import Transform
from clipmatch.scenes import generate
from clipmatch.tokenizer import Tokenizer

torch.set_num_threads(1)  # models this small lose more by sharing out their work than they gain


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Each test has a cache of its own, and so do the programs that it starts."""
    monkeypatch.setenv("CLIPMATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["sqlite", "lance"])
def kind(request):
    """The suffix of an index: what holds of one kind of store holds of the other."""
    if request.param == "lance":
        pytest.importorskip("lancedb", reason="the extra `distributed` is not installed; make test-cluster has it")
    return request.param


@pytest.fixture
def photos(tmp_path):
    """red.png, sub/green.png, sub/blue.png, and an orange one that is a little green."""
    folder = tmp_path / "photos"
    paint(folder / "red.png", (255, 0, 0))
    paint(folder / "orange.png", (255, 100, 0))
    paint(folder / "sub" / "green.png", (0, 255, 0))
    paint(folder / "sub" / "blue.png", (0, 0, 255))
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder of 60 + 20 captioned scenes, 32 x 32 pixels; to be read only."""
    return generate(tmp_path_factory.mktemp("data") / "scenes", n_train=60, n_dev=20, size=32, progress=False)


@pytest.fixture(scope="session")
def vocabulary(scenes):
    """A tokenizer of the scenes' words."""
    return learn_tokenizer(load_captions(scenes).rows)


def tiny_config(vocab_size, **changes):
    """Two towers, 32 wide: 50,000 weights in all."""
    vit = {"model_type": "vit", "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2}
    bert = {"model_type": "distilbert", "vocab_size": vocab_size, "max_position_embeddings": 64, "dim": 32}
    towers = {
        "image_tower": {**vit, "num_attention_heads": 2, "intermediate_size": 64},
        "text_tower": {**bert, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    }
    return ModelConfig(**{**towers, "embed_dim": 16, "max_length": 40, **changes})


@pytest.fixture
def tiny(vocabulary):
    """A tiny model with random weights (always the same) and what belongs to it, in eval mode."""
    torch.manual_seed(0)
    model = CLIPModel(tiny_config(vocabulary.vocab_size)).eval()
    own = Tokenizer(tokenizers.Tokenizer.from_str(vocabulary.backend.to_str()))  # a test may add words to it
    return Checkpoint(model, own, Transform(PreprocessConfig(size=32)))


@pytest.fixture(scope="session")
def model_folder(vocabulary, tmp_path_factory):
    """The tiny model, saved; to be read only."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    model = CLIPModel(tiny_config(vocabulary.vocab_size))
    save_checkpoint(Checkpoint(model, vocabulary, Transform(PreprocessConfig(size=32))), folder)
    return folder


@pytest.fixture
def sure(tiny, tmp_path):
    """A model without dropout, in a folder: two processes draw other dropout than one."""
    config = replace(tiny.model.config, dropout=0.0, feature_dropout=0.0)
    for tower, names in (
        (config.image_tower, ("hidden_dropout_prob", "attention_probs_dropout_prob")),
        (config.text_tower, ("dropout", "attention_dropout")),
    ):
        tower.update(dict.fromkeys(names, 0.0))
    torch.manual_seed(0)
    checkpoint = Checkpoint(CLIPModel(config), tiny.tokenizer, Transform(PreprocessConfig(size=32)))
    save_checkpoint(checkpoint, tmp_path / "sure")
    return tmp_path / "sure"


@pytest.fixture(scope="session")
def vqgan(tmp_path_factory):
    """A folder of a tiny VQGAN with random weights, as diffusers saves it; to be read only."""
    from diffusers import VQModel

    folder = tmp_path_factory.mktemp("generators") / "vqgan"
    torch.manual_seed(0)
    model = VQModel(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=32,
        sample_size=16,
    )
    torch.nn.init.normal_(model.quantize.embedding.weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def towers(vocabulary, tmp_path_factory):
    """A vision and a text tower as Hugging Face folders, as the hub would deliver them."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    ViTModel(ViTConfig(num_hidden_layers=3, **sizes), add_pooling_layer=False).save_pretrained(folder / "vit-s14")
    (folder / "vit-s14" / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 32}}')
    text = DistilBertConfig(vocab_size=vocabulary.vocab_size, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    DistilBertModel(text).save_pretrained(folder / "minilm")
    vocabulary.save(folder / "tokenizer.json")
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder / "minilm")
    return folder


CORE = """\
import sys
sys.modules.update(torch=None, matplotlib=None, skimage=None)  # importing one of them fails, as if it were not there
from clipmatch.cli import main
main()
"""


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """`clipmatch demo`, run once without PyTorch -> (its folder, what it printed)."""
    place = tmp_path_factory.mktemp("visitor")
    environment = {**os.environ, "CLIPMATCH_CACHE": str(place / "cache")}
    command = [sys.executable, "-c", CORE, "demo"]
    done = subprocess.run(command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return place / "clipmatch-demo", done.stdout


@pytest.fixture(scope="session")
def training_demo(tmp_path_factory):
    """`clipmatch demo --train`, run in full once -> (its folder, what it printed)."""
    place = tmp_path_factory.mktemp("newcomer")
    environment = {**os.environ, "CLIPMATCH_CACHE": str(place / "cache")}
    command = [sys.executable, "-m", "clipmatch.cli", "demo", "--train"]
    done = subprocess.run(command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return place / "clipmatch-demo", done.stdout


@pytest.fixture(scope="session")
def embedded():
    """The model that comes with clipmatch."""
    from clipmatch.embedder import load_model

    return load_model()


@pytest.fixture(scope="session")
def album(embedded, tmp_path_factory):
    """A small collection and its index, for tests of the server and the page; to be read only."""
    from album import make_album

    return make_album(tmp_path_factory.mktemp("album"), embedded)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """The folder with the JavaScript libraries of an exported gallery, fetched once; skips where npm can't fetch."""
    from clipmatch.album import RUNTIME, WORDS
    from clipmatch.errors import ClipmatchError
    from clipmatch.npm import fetch

    folder = tmp_path_factory.mktemp("npm")
    for package in (RUNTIME, WORDS):
        try:
            (folder / package.archive).write_bytes(fetch(package))
        except ClipmatchError as error:
            pytest.skip(str(error))
    return folder
