"""Heads that learn on the towers of an ONNX model: what changes, what stays, and that the result searches by itself."""

import json
import shutil
import signal

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from conftest import tiny_config
from onnx import numpy_helper
from test_export import core_only

from clipmatch import features
from clipmatch.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from clipmatch.cli import main
from clipmatch.compact import load_heads
from clipmatch.config import PreprocessConfig, TrainConfig
from clipmatch.data import Splits, load_captions, split_captions
from clipmatch.embedder import OnnxEmbedder, load_model
from clipmatch.errors import ClipmatchError
from clipmatch.evaluation import evaluate
from clipmatch.export import ImageGraph, export_model, largest_difference
from clipmatch.model import CLIPModel
from clipmatch.modelfolder import EMBEDDED, IMAGE_GRAPH
from clipmatch.preprocess import Transform, load_image
from clipmatch.trainer import Trainer
from clipmatch.training import train

GRAPHS = ("image.onnx", "text.onnx")
POOLING = {
    "image_tower": {"model_type": "convnext", "hidden_sizes": [8, 32], "depths": [1, 1], "num_stages": 2},
    "image_pooling": "mean+max",
    "text_pooling": "mean",
}


@pytest.fixture(scope="module")
def source(vocabulary, tmp_path_factory):
    """A tiny model that pools as the embedded one does, in PyTorch; to be read only."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    torch.manual_seed(0)
    model = CLIPModel(tiny_config(vocabulary.vocab_size, **POOLING, dropout=0.0, feature_dropout=0.0))
    transform = Transform(PreprocessConfig(size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)))
    save_checkpoint(Checkpoint(model, vocabulary, transform, {"licence": "MIT", "dev": "of the source"}), folder)
    return folder


@pytest.fixture(scope="module")
def base(source, tmp_path_factory):
    """Its export; to be read only."""
    folder = tmp_path_factory.mktemp("base") / "onnx"
    export_model(source, folder)
    return folder


@pytest.fixture(scope="module")
def splits(scenes):
    return split_captions(load_captions(scenes))


def settings(out, **changes):
    values = {"epochs": 4, "batch_size": 20, "rate_heads": 3e-3, "precision": "float32", **changes}
    return TrainConfig(out=str(out), **values)


def pixels(count, side=32):
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def head_numbers(folder):
    """The numbers of a folder's heads, by name."""
    graphs = [onnx.load(str(folder / name)).graph for name in GRAPHS]
    tensors = [tensor for graph in graphs for tensor in graph.initializer if is_head(tensor.name)]
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}


def is_head(name):
    return name.startswith("model.") and ".backbone." not in name


# Reading and writing


def test_heads_and_towers_are_read_as_they_are(base, splits):
    checkpoint, embedder = load_heads(base), OnnxEmbedder(base)
    paths, texts = [row.path for row in splits.dev], ["a red star", "two trees at night", "x"]
    found, tokens = embedder.embed_images(paths), checkpoint.tokenizer(texts, padding=True, return_tensors="pt")
    decoded = np.stack([checkpoint.transform.pixels(load_image(path)) for path in paths])
    with torch.inference_mode():
        images = checkpoint.model.encode_image(torch.from_numpy(checkpoint.transform.normalise(decoded)))
        words = checkpoint.model.encode_text(**tokens)
    assert largest_difference(found.rows, images.numpy()) < 1e-6
    assert largest_difference(embedder.embed_texts(texts), words.numpy()) < 1e-6


def test_saved_unchanged_it_says_the_same(base, tmp_path):
    load_heads(base).save(tmp_path / "copy")
    before, after = OnnxEmbedder(base), OnnxEmbedder(tmp_path / "copy")
    np.testing.assert_array_equal(after.encode_pixels(pixels(3)), before.encode_pixels(pixels(3)))
    assert after.fingerprint == before.fingerprint == after.about["towers_of"]
    assert after.about["licence"] == "MIT"
    assert "dev" not in after.about


@pytest.fixture(scope="module")
def changed(base, tmp_path_factory):
    """A checkpoint with other heads than its folder, and the folder that it was saved to."""
    checkpoint, folder = load_heads(base), tmp_path_factory.mktemp("changed") / "onnx"
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in checkpoint.model.named_parameters():
            value.add_(torch.randn_like(value) * 0.1)
            assert ".backbone." not in name  # nothing there can learn
    checkpoint.save(folder)
    return checkpoint, folder


def test_only_the_heads_numbers_change(base, changed):
    for name in GRAPHS:
        old, new = (onnx.load(str(folder / name)).graph for folder in (base, changed[1]))
        assert [n.SerializeToString() for n in old.node] == [n.SerializeToString() for n in new.node]
        assert [tensor.name for tensor in old.initializer] == [tensor.name for tensor in new.initializer]
        for before, after in zip(old.initializer, new.initializer, strict=True):
            assert (before.SerializeToString() == after.SerializeToString()) != is_head(before.name), before.name


def test_the_graphs_say_what_pytorch_says(source, base, changed):
    """Embeddings, features and the grid, against the model as a whole in PyTorch with the same heads."""
    checkpoint, folder = changed
    whole = load_checkpoint(source)
    with torch.no_grad():
        for name, value in whole.model.state_dict().items():
            if ".backbone." not in name and ".standardise." not in name:
                value.copy_(checkpoint.model.state_dict()[name])
        expected = ImageGraph(whole)(torch.from_numpy(pixels(3)))
    graph = OnnxEmbedder(folder)
    for name, rows in zip(("embedding", "features", "grid"), expected, strict=True):
        np.testing.assert_allclose(graph.run_image(pixels(3), name), rows.numpy(), atol=1e-4)
    np.testing.assert_array_equal(
        graph.run_image(pixels(3), "features"), OnnxEmbedder(base).run_image(pixels(3), "features")
    )
    texts = ["a red star", "two trees at night"]
    features = graph.run_text(texts, "features")
    np.testing.assert_array_equal(features, OnnxEmbedder(base).run_text(texts, "features"))
    with torch.inference_mode():
        rows = whole.model.project_text(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(graph.embed_texts(texts), rows, atol=1e-5)


def test_a_head_that_is_not_plain_is_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    graph = onnx.load(str(base / IMAGE_GRAPH))
    first = next(node for node in graph.graph.node if node.op_type == "Gemm")
    next(value for value in first.attribute if value.name == "alpha").f = 1.5  # a factor that PyTorch's head lacks
    onnx.save(graph, str(folder / IMAGE_GRAPH))
    with pytest.raises(ClipmatchError, match=r"other embeddings as an ONNX graph than in PyTorch .* export it again"):
        load_heads(folder).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    renamed = (base / IMAGE_GRAPH).read_bytes().replace(b"image_encoder.fc.bias", b"image_encoder.fc.tilt")
    (folder / IMAGE_GRAPH).write_bytes(renamed)
    with pytest.raises(ClipmatchError, match=r"image.onnx has no head .* \(no model.image_encoder.fc.bias\); export"):
        load_heads(folder)


# Training


@pytest.fixture(scope="module")
def trained(base, splits, tmp_path_factory):
    """A run on the training pictures, measured on them: a small model that learns puts more captions first."""
    run = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPMATCH_CACHE", str(run.parent / "cache"))
        shown = Splits(splits.train, splits.train, "the same pictures")
        return train(
            shown, settings(run, epochs=60, rate_heads=1e-2, evaluate_every=20), load_heads(base), progress=False
        )


def test_training_learns_what_it_is_shown(trained, base, splits):
    before = evaluate(OnnxEmbedder(base), splits.train).to_json()["text_to_image"]["recall@5"]
    after = trained.dev["text_to_image"]["recall@5"]
    assert before < 0.2  # random heads: chance is 5 of 60
    assert after > before + 0.2


def test_the_figures_are_those_that_evaluate_finds(trained, splits):
    figures = evaluate(OnnxEmbedder(trained.model), splits.train).to_json()
    for direction in ("text_to_image", "image_to_text"):
        for k in (1, 5, 10):
            assert figures[direction][f"recall@{k}"] == pytest.approx(
                trained.dev[direction][f"recall@{k}"],
                abs=10 / 300,  # training reads features of 16 bits: near ties fall either way
            )


def test_searching_the_result_needs_no_pytorch(trained, scenes):
    assert {path.name for path in trained.model.iterdir()} == {*GRAPHS, "tokenizer.json", "config.json"}
    done = core_only("find", "a red star", "--model", trained.model.parent, "--images", scenes / "Images", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 9


def test_the_start_is_kept_if_nothing_beats_it(base, splits, tmp_path, monkeypatch):
    looks = iter([0.5, 0.4, 0.3])

    def figures(self):
        recall = next(looks)
        return {way: {f"recall@{k}": recall for k in (1, 5, 10)} for way in ("text_to_image", "image_to_text")}

    monkeypatch.setattr(Trainer, "measure_dev", figures)
    result = train(splits, settings(tmp_path / "run", epochs=2), load_heads(base), progress=False)
    assert OnnxEmbedder(result.model).fingerprint == OnnxEmbedder(base).fingerprint
    assert OnnxEmbedder(tmp_path / "run" / "last").fingerprint != OnnxEmbedder(base).fingerprint


def test_the_best_model_searches_while_the_run_goes_on(base, splits, tmp_path, monkeypatch):
    take_step, seen = Trainer.take_step, []

    def watched(self, batches, total):
        seen.append(load_model(self.out).encode_strings(["a red star"]).shape)
        return take_step(self, batches, total)

    monkeypatch.setattr(Trainer, "take_step", watched)
    train(splits, settings(tmp_path / "run", epochs=2), load_heads(base), progress=False)
    assert seen == [(1, 16)] * 6


@pytest.mark.parametrize(("kill_at", "loss"), [(1, "softmax"), (6, "softmax"), (8, "softmax"), (8, "sigmoid")])
def test_a_resumed_run_ends_with_the_same_model(base, splits, tmp_path, monkeypatch, kill_at, loss):
    train(splits, settings(tmp_path / "unbroken", views=2, loss=loss), load_heads(base), progress=False)
    take_step = Trainer.take_step

    def interrupted(self, batches, total):
        figures = take_step(self, batches, total)
        if self.step == kill_at:
            signal.raise_signal(signal.SIGINT)
        return figures

    broken = settings(tmp_path / "broken", views=2, loss=loss)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", interrupted)
        assert not train(splits, broken, load_heads(base), progress=False).finished
    monkeypatch.setattr(features.FeatureStore, "append", lambda *_: pytest.fail("features were computed again"))
    assert train(splits, broken, resume=True, progress=False).finished
    for name in ("best", "last"):
        first, second = (
            json.loads((tmp_path / run / name / "config.json").read_text()) for run in ("unbroken", "broken")
        )
        assert first == second  # the logit scale and a hash of the graphs are in it


def test_training_goes_on_from_a_trained_model_on_the_same_features(base, splits, tmp_path, monkeypatch):
    train(splits, settings(tmp_path / "first"), load_heads(base), progress=False)
    monkeypatch.setattr(features.FeatureStore, "append", lambda *_: pytest.fail("features were computed again"))
    result = train(splits, settings(tmp_path / "second"), tmp_path / "first", progress=False)
    about = OnnxEmbedder(result.model).about
    assert about["towers_of"] == OnnxEmbedder(base).fingerprint
    start = json.loads((tmp_path / "first" / "best" / "config.json").read_text())["about"]["log_logit_scale"]
    steps = [row for row in result.history if row["kind"] == "step"]
    assert steps[0]["logit_scale"] == pytest.approx(np.exp(start), abs=0.1)
    assert start != pytest.approx(np.log(1 / 0.07), abs=1e-6)  # it has learnt


@pytest.mark.parametrize("tune", [{"tune_text": "all"}, {"tune_image": "all"}, {"tune_image": 1}])
def test_the_towers_can_not_be_tuned(base, splits, tmp_path, tune):
    with pytest.raises(ClipmatchError, match="towers of this model are ONNX graphs and stay; leave out --tune-image"):
        train(splits, settings(tmp_path / "run", **tune), base, progress=False)


def test_settings_for_learning_towers_do_no_harm(base, splits, tmp_path):
    idle = settings(tmp_path / "run", epochs=1, gradient_checkpointing=True, average=0.9)
    assert train(splits, idle, base, progress=False).finished


# The command


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def embedded(base, monkeypatch):
    """The tiny model in place of the one that comes with clipmatch."""
    monkeypatch.setattr("clipmatch.embedder.EMBEDDED", base)


def test_from_captions_to_answers(embedded, scenes, tmp_path):
    out = tmp_path / "run"
    run("train", "--towers", "compact", "--captions", scenes, "--epochs", 1, "--out", out)
    result = run("evaluate", "--model", out, "--captions", scenes, "--split", out / "splits" / "dev.txt", "--json", "-")
    assert json.loads(result.stdout)["images"] == 20
    found = run("find", "a red star", "--model", out, "--images", scenes / "Images", "-k", 3, "--paths")
    assert len(found.stdout.splitlines()) == 3
    assert "Error: The model in" in run("export", out, "--out", tmp_path / "onnx", code=1).stderr
    assert run("train", "--resume", "--out", out).stdout.startswith("best model: ")
    run("train", "--model", out, "--captions", scenes, "--epochs", 1, "--out", tmp_path / "more")


@pytest.mark.parametrize(
    "idle", ["--model x", "--image-tower x", "--text-pooling mean", "--max-length 20", "--dropout 0.2"]
)
def test_options_that_would_change_nothing_are_refused(embedded, scenes, tmp_path, idle):
    result = run("train", "--towers", "compact", "--captions", scenes, "--out", tmp_path, *idle.split(), code=1)
    assert result.stderr == (
        "Error: --towers compact brings a model with its own architecture, so "
        f"{idle.split()[0]} would change nothing; leave it out.\n"
    )


def test_without_an_embedded_model_it_says_so(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("clipmatch.embedder.EMBEDDED", tmp_path)
    result = run("train", "--towers", "compact", "--captions", scenes, "--out", tmp_path / "run", code=1)
    assert "lacks the embedded model" in result.stderr


def test_the_model_that_comes_with_clipmatch_learns_to_know_scenes(scenes, tmp_path):
    """It has never seen drawings; a few dozen of them take it far."""
    splits, start = split_captions(load_captions(scenes)), load_heads()
    result = train(splits, TrainConfig(str(tmp_path / "run"), batch_size=20), start, progress=False)
    before, after = (evaluate(OnnxEmbedder(folder), splits.dev) for folder in (EMBEDDED, result.model))
    recalls = [figures.to_json()["text_to_image"]["recall@1"] for figures in (before, after)]
    assert recalls[1] == pytest.approx(result.dev["text_to_image"]["recall@1"], abs=0.011)  # one caption of 100
    assert recalls[1] > recalls[0] + 0.2
