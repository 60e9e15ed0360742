"""Training on small drawn scenes: what learns, what stays, what a resumed run repeats."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipmatch import features
from clipmatch.checkpoint import Checkpoint, create_checkpoint, load_checkpoint, save_checkpoint
from clipmatch.concepts import Concepts
from clipmatch.config import DataConfig, ModelConfig, PreprocessConfig, TrainConfig
from clipmatch.data import Splits, load_captions, read_split, split_captions
from clipmatch.demo_train import learn_tokenizer
from clipmatch.embedder import load_model
from clipmatch.errors import ClipmatchError
from clipmatch.model import CLIPModel, Standardise, fold_standardisation
from clipmatch.objective import Objective
from clipmatch.optimization import (
    WeightAverage,
    build_optimizer,
    choose_attention,
    rate_at,
    standardise_input,
    unfreeze,
)
from clipmatch.preprocess import Transform
from clipmatch.runlog import read_history
from clipmatch.runtime import Precision
from clipmatch.scenes import generate
from clipmatch.sources import EpochBatches, LiveTexts, PairDataset
from clipmatch.teachers import ask_teachers
from clipmatch.trainer import Trainer
from clipmatch.training import resume, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data") / "scenes", n_train=48, n_dev=16, size=32, progress=False)


@pytest.fixture
def splits(folder):
    return split_captions(load_captions(folder))


@pytest.fixture
def tokenizer(splits):
    return learn_tokenizer(splits.train)


def tiny(tokenizer, **changes):
    vit = {"model_type": "vit", "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3}
    bert = {"model_type": "distilbert", "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 64, "dim": 32}
    return ModelConfig(
        image_tower={**vit, "num_attention_heads": 2, "intermediate_size": 64},
        text_tower={**bert, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
        **{"embed_dim": 32, "max_length": 40, **changes},
    )


def whole(out, **changes):
    base = {"epochs": 2, "batch_size": 16, "tune_image": "all", "tune_text": "all", "precision": "float32"}
    rates = {"rate_heads": 1e-3, "rate_image": 1e-3, "rate_text": 1e-3}
    return TrainConfig(out=str(out), **{**base, **rates, **changes})


@pytest.fixture
def trained_towers(tmp_path, tokenizer):
    """A checkpoint that counts as trained: it comes from a folder."""
    torch.manual_seed(0)
    checkpoint = Checkpoint(CLIPModel(tiny(tokenizer)), tokenizer, Transform(PreprocessConfig(size=32)))
    save_checkpoint(checkpoint, tmp_path / "towers")
    return tmp_path / "towers"


def weights(run, name="best"):
    return load_file(Path(run) / name / "model.safetensors")


def some_concepts(folder):
    """A file of three concepts for a tower 32 wide."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(3, 32)).astype(np.float32)
    names, kinds = [["moon"], ["star"], ["fish"]], [["thing in the sky"], ["thing in the sky"], []]
    Concepts(np.zeros(32, np.float32), directions, names, kinds).save(folder / "concepts.safetensors")
    return folder / "concepts.safetensors"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# What a run does


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chunk": 5},
        {"batch_size": 8, "hard_negatives": 0.5},
        {"loss": "sigmoid", "epochs": 200},
        {"loss": "hinge", "epochs": 200},
    ],
)
def test_training_learns_what_it_is_shown(splits, tokenizer, tmp_path, changes):
    """Measured on its own training pictures, a small model that learns puts most captions first."""
    torch.manual_seed(0)
    few = Splits(splits.train[:16], splits.train[:16], "the same pictures")
    rate = 3e-3
    rates = {"rate_heads": rate, "rate_image": rate, "rate_text": rate}
    settings = whole(tmp_path / "run", **{"epochs": 60, "evaluate_every": 1000, **rates, **changes})
    model = tiny(tokenizer, dropout=0.0, feature_dropout=0.0, image_pooling="mean", text_pooling="mean")
    result = train(few, settings, model, tokenizer=tokenizer, progress=False)
    assert result.finished
    assert result.dev["text_to_image"]["recall@1"] > 0.5  # chance: 1/16; some captions fit several pictures
    losses = [row["loss"] for row in result.history if row["kind"] == "step"]
    assert losses[-1] < 0.4 * losses[0]
    if settings.loss == "softmax":
        assert losses[0] > np.log(settings.batch_size)  # nothing known: no better than every pair as likely
        assert losses[-1] < 1.0


def test_a_run_folder_holds_what_it_says(splits, tokenizer, tmp_path):
    run = tmp_path / "run"
    result = train(splits, whole(run), tiny(tokenizer), tokenizer=tokenizer, progress=False)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows].count("step") == 2 * (48 // 16)
    assert [row["step"] for row in rows if row["kind"] == "epoch"] == [3, 6]
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert result.model == run / "best"
    config = json.loads((run / "best" / "config.json").read_text())
    assert config["about"]["dev"] == result.dev
    assert config["about"]["trained_on"]["pictures"] == 48
    assert not list(run.rglob("*.pt")) + list(run.rglob("*.bin")) + list(run.rglob("*.pkl"))
    scale = [row["logit_scale"] for row in rows if row["kind"] == "step"]
    assert all(0 < value <= 100 for value in scale)


def script_looks(monkeypatch, *recalls):
    """What a run will see at each look at dev, instead of what is there."""
    looks = iter(recalls)

    def figures(self):
        recall = next(looks)
        return {d: {f"recall@{k}": recall for k in (1, 5, 10)} for d in ("text_to_image", "image_to_text")}

    monkeypatch.setattr(Trainer, "measure_dev", figures)


def test_the_best_model_is_kept_not_the_last(splits, tokenizer, tmp_path, monkeypatch):
    script_looks(monkeypatch, 0.2, 0.9, 0.4)
    result = train(splits, whole(tmp_path / "run", epochs=3), tiny(tokenizer), tokenizer=tokenizer, progress=False)
    assert result.dev["text_to_image"]["recall@1"] == 0.9
    assert load_checkpoint(tmp_path / "run").about["step"] == 6
    assert not same(weights(tmp_path / "run"), weights(tmp_path / "run", "last"))


@pytest.mark.parametrize(("looks", "best"), [((0.5, 0.3, 0.4), 0), ((0.5, 0.3, 0.6), 6)])
def test_the_model_that_training_began_with_counts_too(
    splits, trained_towers, tmp_path, monkeypatch, capsys, looks, best
):
    script_looks(monkeypatch, *looks)
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=2, batch_size=16, precision="float32")
    result = train(splits, settings, trained_towers, progress=False)
    assert result.dev["text_to_image"]["recall@1"] == max(looks)
    assert load_checkpoint(tmp_path / "run").about["step"] == best
    assert same(weights(tmp_path / "run"), load_file(trained_towers / "model.safetensors")) == (best == 0)
    assert ("training never beat it on dev" in capsys.readouterr().err) == (best == 0)


def test_a_guide_need_not_beat_the_model_that_it_began_with(splits, tokenizer, tmp_path, monkeypatch):
    script_looks(monkeypatch, 0.9, 0.2)
    start = train(splits, whole(tmp_path / "run", epochs=1), tiny(tokenizer), tokenizer=tokenizer, progress=False)
    settings = whole(tmp_path / "guide", epochs=1, adversarial=7.0)
    guide = train(splits, settings, start.model, progress=False)
    assert guide.dev["text_to_image"]["recall@1"] == 0.2
    assert same(weights(tmp_path / "guide"), weights(tmp_path / "guide", "last"))


def test_early_stopping(splits, tokenizer, tmp_path, monkeypatch):
    level = {d: {f"recall@{k}": 0.5 for k in (1, 5, 10)} for d in ("text_to_image", "image_to_text")}
    monkeypatch.setattr(Trainer, "measure_dev", lambda self: level)
    settings = whole(tmp_path / "run", epochs=10, patience=2)
    result = train(splits, settings, tiny(tokenizer), tokenizer=tokenizer, progress=False)
    assert [row["kind"] for row in result.history].count("epoch") == 3  # the first is the best, two are no better
    again = train(splits, settings, resume=True, progress=False)
    assert again.history == result.history  # nothing left to do


# Frozen towers and their cache


def test_heads_learn_while_the_towers_stay(splits, trained_towers, tmp_path):
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=3, batch_size=48, views=2, precision="float32")
    train(splits, settings, trained_towers, progress=False)
    before, after = load_file(trained_towers / "model.safetensors"), weights(tmp_path / "run", "last")
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (".backbone." in name or ".standardise." in name), name


def test_features_are_computed_once(splits, trained_towers, tmp_path, monkeypatch):
    settings = TrainConfig(out=str(tmp_path / "one"), epochs=1, batch_size=48, precision="float32")
    train(splits, settings, trained_towers, progress=False)
    monkeypatch.setattr(features.FeatureStore, "append", lambda *_: pytest.fail("computed again"))
    train(splits, replace(settings, out=str(tmp_path / "two")), trained_towers, progress=False)
    assert same(weights(tmp_path / "one", "last"), weights(tmp_path / "two", "last"))


def image_table(checkpoint, paths, **changes):
    exact = Precision(None, "float32")
    return features.image_features(
        checkpoint, paths, precision=exact, device=torch.device("cpu"), progress=False, **changes
    )


def test_the_cache_knows_a_picture_by_content_and_survives_a_crash(splits, trained_towers, tmp_path):
    checkpoint = load_checkpoint(trained_towers)
    paths = [row.path for row in splits.train[:5]]
    table, failures = image_table(checkpoint, paths)
    assert table.places.tolist() == [[0, 1, 2, 3, 4]]
    assert failures == []
    store = next((features.cache_root()).glob("image-*"))
    good = (store / "rows.bin").read_bytes()
    with (store / "rows.bin").open("ab") as file:  # killed in the middle of a row ...
        file.write(b"\x00" * 7)
    with (store / "keys.txt").open("a") as file:  # ... or of a key
        file.write("half a k")
    copy = tmp_path / "another name.jpg"
    shutil.copy(paths[2], copy)
    again, _ = image_table(checkpoint, [copy, paths[0]])
    assert again.places.tolist() == [[2, 0]]
    assert (store / "rows.bin").read_bytes() == good
    expected = checkpoint.transform(images=Image.open(copy), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        row = checkpoint.model.image_encoder.features(expected)[0].numpy()
    np.testing.assert_allclose(again.rows[again.places[0, 0]], row, atol=2e-3)  # stored in half precision


def test_each_caption_has_its_own_features(trained_towers):
    """Whatever the order in which they are computed: long, short, empty, twice."""
    checkpoint, exact = load_checkpoint(trained_towers), Precision(None, "float32")
    texts = ["a red star above two blue houses on the grass", "a tree", "", "three fish", "a tree"]
    table = features.text_features(checkpoint, texts, precision=exact, device=torch.device("cpu"), progress=False)
    assert table.places[1] == table.places[4]
    for place, text in zip(table.places, texts, strict=True):
        with torch.inference_mode():
            row = checkpoint.model.text_encoder.features(**checkpoint.tokenizer([text], return_tensors="pt"))[0]
        np.testing.assert_allclose(table.rows[place], row.numpy(), atol=2e-3)


def test_other_weights_other_cache(splits, trained_towers):
    checkpoint = load_checkpoint(trained_towers)
    paths = [splits.train[0].path]
    image_table(checkpoint, paths)
    with torch.no_grad():
        checkpoint.model.image_encoder.backbone.layernorm.bias += 1
    image_table(checkpoint, paths)
    image_table(checkpoint, paths, last_blocks=1)
    assert len(list(features.cache_root().glob("image-*"))) == 3


def test_views_differ_and_are_the_same_each_time(splits, trained_towers, monkeypatch, tmp_path):
    checkpoint = load_checkpoint(trained_towers)
    paths = [row.path for row in splits.train[:2]]
    table, _ = image_table(checkpoint, paths, views=3)
    rows = table.rows[table.places].astype(np.float32)  # [views, n, h]
    assert len({row.tobytes() for row in rows.reshape(6, -1)}) == 6
    monkeypatch.setenv("CLIPMATCH_CACHE", str(tmp_path / "elsewhere"))
    fresh, _ = image_table(checkpoint, paths, views=3)
    np.testing.assert_array_equal(fresh.rows[fresh.places], table.rows[table.places])


def test_only_the_last_blocks_learn(splits, trained_towers, tmp_path):
    settings = TrainConfig(
        out=str(tmp_path / "run"), epochs=1, batch_size=16, tune_image=1, tune_text=1, rate_image=1e-3, rate_text=1e-3
    )
    train(splits, replace(settings, precision="float32"), trained_towers, progress=False)
    before, after = load_file(trained_towers / "model.safetensors"), weights(tmp_path / "run", "last")
    changed = {name for name, value in before.items() if ".backbone." in name and not torch.equal(value, after[name])}
    assert changed
    learns = ("image_encoder.backbone.layers.2.", "image_encoder.backbone.layernorm.")
    learns += ("text_encoder.backbone.transformer.layer.1.",)
    assert all(name.startswith(learns) for name in changed)
    assert any(name.startswith(learns[0]) for name in changed)
    assert any(name.startswith(learns[2]) for name in changed)


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_split_tower_gives_what_the_whole_gives(tokenizer, last):
    torch.manual_seed(1)
    encoder = CLIPModel(tiny(tokenizer, image_pooling="cls+mean")).eval().image_encoder
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        split = encoder.features_from(encoder.hidden_before(pixels, last), last)
        torch.testing.assert_close(split, encoder.features(pixels))


def test_a_split_convolutional_tower_gives_what_the_whole_gives(tokenizer):
    torch.manual_seed(1)
    lite = {"model_type": "efficientnet_lite", "image_size": 64}
    encoder = CLIPModel(replace(tiny(tokenizer), image_tower=lite, image_pooling="mean+max")).eval().image_encoder
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        hidden = encoder.hidden_before(pixels, 5)
        assert hidden.shape == (2, 112, 4, 4)  # five from the end begins the last stage but one, at a sixteenth
        torch.testing.assert_close(encoder.features_from(hidden, 5), encoder.features(pixels))
        assert encoder.features(pixels).shape == (2, 2560)


@pytest.mark.parametrize(
    ("tokens", "numbers", "chosen"),
    [(77, None, "eager"), (197, None, "sdpa"), (197, torch.bfloat16, "half"), (577, torch.bfloat16, "sdpa")],
)
def test_the_faster_attention_gives_the_same(tokenizer, tokens, numbers, chosen):
    backbone = CLIPModel(tiny(tokenizer)).image_encoder.backbone.eval()
    pixels = torch.randn(2, 3, 32, 32)
    before = backbone(pixels).last_hidden_state
    choose_attention(backbone, tokens, torch.device("cpu"), Precision(numbers, ""))
    assert backbone.config._attn_implementation == chosen
    torch.testing.assert_close(backbone(pixels).last_hidden_state, before)


def test_attention_in_half_precision_loses_no_more_than_that_of_transformers(tokenizer):
    backbone = CLIPModel(tiny(tokenizer)).image_encoder.backbone
    pixels = torch.randn(8, 3, 32, 32)

    def run(attention, numbers):
        choose_attention(backbone, 197, torch.device("cpu"), Precision(numbers, ""))
        backbone.set_attn_implementation(attention)
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=numbers is not None):
            states = backbone(pixels).last_hidden_state
        states.float().square().mean().backward()
        return torch.cat([states.detach().flatten(), *(weights.grad.flatten() for weights in backbone.parameters())])

    exact, theirs, ours = run("sdpa", None), run("eager", torch.bfloat16), run("half", torch.bfloat16)
    assert 0 < (ours - exact).norm() < 1.2 * (theirs - exact).norm()


def test_the_average_of_the_weights_by_hand():
    layer = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.0)
        average = WeightAverage(layer, 0.5)
        layer.weight.fill_(10.0)
        average.update(1)  # decay 1 / 10
        assert average.values["weight"].item() == pytest.approx(9.0)
        layer.weight.fill_(20.0)
        average.update(1000)  # decay 0.5
    with average.applied():
        assert layer.weight.item() == pytest.approx(14.5)
    assert layer.weight.item() == 20.0


def test_the_average_is_what_is_measured_and_kept(splits, trained_towers, tmp_path, monkeypatch):
    script_looks(monkeypatch, 0.1, 0.2)  # before, after
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=1, batch_size=16, average=0.99, precision="float32")
    train(splits, settings, trained_towers, progress=False)
    name = "image_encoder.fc.weight"
    average = load_file(tmp_path / "run" / "last" / "average.safetensors")
    assert torch.equal(weights(tmp_path / "run")[name], average[name])
    assert not torch.equal(weights(tmp_path / "run", "last")[name], average[name])


def test_concepts_are_learnt_beside_the_pictures(splits, trained_towers, tmp_path, monkeypatch):
    settings = TrainConfig(
        out=str(tmp_path / "run"), epochs=40, batch_size=16, concepts=str(some_concepts(tmp_path)), concept_weight=3.0,
        concept_batch=3, evaluate_every=40, rate_heads=3e-3, rate_text=1e-3, tune_text="all", precision="float32",
    )  # fmt: skip
    losses, concept_loss = [], Objective.concept_loss

    def recorded(self, *inputs):
        loss = concept_loss(self, *inputs)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(Objective, "concept_loss", recorded)
    train(splits, settings, trained_towers, progress=False)
    assert len(losses) == 120
    assert np.mean(losses[:20]) > 1  # three sentences for three pictures: log 3 is a guess
    assert np.mean(losses[-20:]) < 0.6


def run_of_heads(out, **changes):
    return TrainConfig(**{"out": str(out), "epochs": 30, "batch_size": 24, "evaluate_every": 30, "rate_heads": 3e-3,
                          "precision": "float32", **changes})  # fmt: skip


def test_a_teacher_passes_on_what_it_likes(splits, trained_towers, tmp_path):
    """A student that hears only its teacher ends with the teacher's cosines between pictures and captions."""
    train(splits, whole(tmp_path / "run", epochs=4), trained_towers, progress=False)
    (tmp_path / "run" / "last").rename(tmp_path / "teacher")
    alone = train(splits, run_of_heads(tmp_path / "alone"), trained_towers, progress=False)
    settings = run_of_heads(tmp_path / "taught", teachers=(str(tmp_path / "teacher"),), teacher_weight=1.0)
    taught = train(splits, settings, trained_towers, progress=False)

    def liking(name):
        model = load_model(name)
        rows = splits.train
        images = model.embed_images([row.path for row in rows], progress=False).rows
        return (images @ model.embed_texts([row.captions[0] for row in rows]).T).ravel()

    teacher = liking(tmp_path / "teacher")
    of_alone, of_taught = (np.corrcoef(teacher, liking(run.model.with_name("last")))[0, 1] for run in (alone, taught))
    assert of_taught > of_alone + 0.1
    about = json.loads((tmp_path / "taught" / "best" / "config.json").read_text())["about"]
    assert about["taught_by"] == [load_model(tmp_path / "teacher").fingerprint]
    assert about["training"]["teachers"] is None  # a path of this machine


def test_teachers_speak_with_one_voice(splits, trained_towers, tmp_path):
    """One teacher's logits are its cosines times its own logit scale, softened by 1.25; a second counts half."""
    model, rows = load_model(trained_towers), splits.train[:3]
    settings = {"device": None, "precision": Precision(None, ""), "progress": False}
    one = ask_teachers([str(trained_towers)], rows, tmp_path, **settings)
    ids = torch.tensor([1, 0]), torch.tensor([0, 1])
    images = model.embed_images([rows[1].path, rows[0].path]).rows
    expected = model.logit_scale / 1.25 * images @ model.embed_texts(rows[0].captions[:2]).T
    np.testing.assert_allclose(one.logits(*ids), expected, atol=0.02)
    two = ask_teachers([str(trained_towers)] * 2, rows, tmp_path, **settings)
    np.testing.assert_allclose(two.logits(*ids), 1.5 * expected, atol=0.03)


def test_a_teacher_that_is_not_there(splits, trained_towers, tmp_path):
    settings = run_of_heads(tmp_path / "run", teachers=(str(tmp_path / "nobody"),))
    with pytest.raises(ClipmatchError, match="nobody does not exist"):
        train(splits, settings, trained_towers, progress=False)


def test_a_second_run_draws_other_batches(splits, trained_towers, tmp_path, monkeypatch):
    """A run that starts from another's model does not meet the pairs again that the other has learnt by heart."""
    drawn = {}
    backward = Objective.backward

    def watched(self, batch, *rest):
        drawn.setdefault(Path(self.settings.out).name, []).append(tuple(batch.text_ids.tolist()))
        return backward(self, batch, *rest)

    monkeypatch.setattr(Objective, "backward", watched)
    for name, start in (("first", trained_towers), ("same", trained_towers), ("second", tmp_path / "first" / "last")):
        train(splits, run_of_heads(tmp_path / name, epochs=2), start, progress=False)
    assert drawn["first"] == drawn["same"]
    assert not set(drawn["first"]) & set(drawn["second"])


# Low-rank updates


def test_adapters_learn_while_the_weights_stay(splits, trained_towers, tmp_path):
    """Of the text tower and the last block of the image tower, linear layers alone change, by matrices of rank 2."""
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=2, batch_size=16, tune_image=1, tune_text="all", lora=2)
    settings = replace(settings, rate_image=1e-2, rate_text=1e-2, rate_heads=1e-2, evaluate_every=2)
    train(splits, settings, trained_towers, progress=False)
    before, after = load_file(trained_towers / "model.safetensors"), weights(tmp_path / "run", "last")
    assert before.keys() == after.keys()
    towers = [name for name in before if ".backbone." in name]
    changed = {name for name in towers if not torch.equal(before[name], after[name])}
    ranks = {int(torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5)) for name in changed}
    assert ranks == {2}
    expected = {name for name in towers if "text_encoder" in name or ".layers.2." in name or ".layer.2." in name}
    assert changed == {
        name
        for name in expected
        if name.endswith(".weight") and "norm" not in name.lower() and "embeddings" not in name
    }


def test_a_model_with_adapters_answers_as_it_is_saved(trained_towers, tmp_path):
    checkpoint = load_checkpoint(trained_towers)
    model = checkpoint.model
    assert unfreeze(model.image_encoder.backbone, "all", lora=3) == 0
    learning = [name for name, value in model.image_encoder.named_parameters() if value.requires_grad]
    assert learning
    assert all(".lora_" in name for name in learning if "backbone" in name)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05)
    pixels = torch.rand(2, 3, 32, 32)
    rows = model.eval().encode_image(pixels)
    checkpoint.save(tmp_path / "merged")
    plain = load_checkpoint(tmp_path / "merged").model
    assert not [name for name in plain.state_dict() if "lora" in name]
    assert torch.allclose(plain.encode_image(pixels), rows, atol=1e-5)
    assert not torch.allclose(load_checkpoint(trained_towers).model.encode_image(pixels), rows, atol=1e-2)


def test_adapters_with_less_memory_give_the_same_run(splits, trained_towers, tmp_path):
    settings = TrainConfig(out=str(tmp_path / "plain"), epochs=1, batch_size=16, tune_text="all", lora=2)
    settings = replace(settings, rate_text=1e-2, precision="float32")
    train(splits, settings, trained_towers, progress=False)
    thrifty = replace(settings, out=str(tmp_path / "thrifty"), gradient_checkpointing=True)
    train(splits, thrifty, trained_towers, progress=False)
    one, other = weights(tmp_path / "plain", "last"), weights(tmp_path / "thrifty", "last")
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_a_tower_without_linear_layers_has_nothing_to_adapt():
    with pytest.raises(ClipmatchError, match="Sequential has no linear layers that LoRA could update"):
        unfreeze(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), "all", lora=2)


# Stopping and going on


@pytest.mark.parametrize("kill_at", [1, 3, 5])
@pytest.mark.parametrize("kind", ["whole", "cached", "averaged", "taught", "lora", "mined", "sigmoid", "mixed"])
def test_a_resumed_run_ends_with_the_same_weights(
    splits, tokenizer, trained_towers, tmp_path, monkeypatch, kind, kill_at
):
    if kind == "whole":  # augmented, accumulated
        settings = whole(tmp_path / "unbroken", epochs=3, batch_size=8, accumulate=2, augment=True, workers=0)
        start = {"model": tiny(tokenizer), "tokenizer": tokenizer}
    else:
        settings = TrainConfig(out=str(tmp_path / "unbroken"), epochs=3, batch_size=16, views=2, precision="float32")
        start = {"model": trained_towers}
    if kind == "averaged":
        settings = replace(settings, average=0.9, concepts=str(some_concepts(tmp_path)), concept_batch=2)
    if kind == "taught":
        settings = replace(settings, teachers=(str(trained_towers), str(trained_towers)))
    if kind == "lora":
        settings = replace(settings, tune_image=1, tune_text="all", lora=2, average=0.9)
    if kind == "mined":  # the second epoch has the neighbours of the first
        settings = replace(settings, hard_negatives=0.5, mine_every=2, batch_size=8, accumulate=2, rate_heads=0.03)
    if kind == "sigmoid":
        settings = replace(settings, loss="sigmoid", chunk=5, average=0.9)
    if kind == "mixed":
        settings = replace(settings, loss="hinge", mixup=0.4)
    train(splits, settings, **start, progress=False)

    take_step = Trainer.take_step

    def interrupted(self, batches, total):
        figures = take_step(self, batches, total)
        if self.step == kill_at:
            signal.raise_signal(signal.SIGINT)
        return figures

    broken = replace(settings, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", interrupted)
        assert not train(splits, broken, **start, progress=False).finished
    result = train(splits, broken, resume=True, progress=False)
    assert result.finished
    for name in ("last", "best"):
        assert same(weights(tmp_path / "unbroken", name), weights(tmp_path / "broken", name))
    steps = [row["step"] for row in result.history if row["kind"] == "step"]
    assert steps == list(range(1, 10))


def test_neighbours_are_looked_for_when_it_is_their_turn(splits, trained_towers, tmp_path, monkeypatch):
    """With the weights of that moment, over all pictures; and the batches are made of them."""
    mined, mine, orders, order = [], Trainer.mine, {}, EpochBatches.order

    def watched(self):
        mined.append((self.step, mine(self)))
        return mined[-1][1]

    def watched_order(self, epoch):
        orders[epoch] = order(self, epoch)
        return orders[epoch]

    monkeypatch.setattr(Trainer, "mine", watched)
    monkeypatch.setattr(EpochBatches, "order", watched_order)
    settings = run_of_heads(
        tmp_path / "run", epochs=3, batch_size=16, hard_negatives=0.5, mine_every=2, rate_heads=0.03
    )
    assert train(splits, settings, trained_towers, progress=False).finished
    assert [step for step, _ in mined] == [0, 6]
    (_, before), (_, after) = mined
    assert before.shape == after.shape == (48, 16)
    assert not torch.equal(before, after)  # it has learnt to see otherwise
    for epoch, neighbours in ((0, before), (1, before), (2, after)):
        batch = orders[epoch][:16].tolist()
        assert set(batch[8:]) <= {other for item in batch[:8] for other in neighbours[item].tolist()}


def test_neighbours_of_pictures_that_are_read_each_time(folder, tokenizer, tmp_path):
    """Worker processes fetch them; one that can't be read is nobody's trouble."""
    shutil.copytree(folder, tmp_path / "data")
    splits = split_captions(load_captions(tmp_path / "data"))
    splits.train[3].path.write_bytes(b"no picture")
    settings = whole(tmp_path / "run", hard_negatives=0.25, augment=True, workers=1)
    result = train(splits, settings, tiny(tokenizer), tokenizer=tokenizer, progress=False)
    assert result.finished
    assert [failure.path for failure in result.failures] == [splits.train[3].path]


def test_a_model_trained_with_the_sigmoid_keeps_its_bias_beside_the_weights(splits, trained_towers, tmp_path):
    def about(run):
        return json.loads((tmp_path / run / "last" / "config.json").read_text())["about"]["logit_bias"]

    settings = run_of_heads(tmp_path / "first", epochs=2, loss="sigmoid")
    steps = [row for row in train(splits, settings, trained_towers, progress=False).history if row["kind"] == "step"]
    assert steps[0]["logit_scale"] == pytest.approx(10, abs=0.1)
    assert about("first") != -10  # it has learnt
    assert weights(tmp_path / "first").keys() == load_file(trained_towers / "model.safetensors").keys()
    settings = run_of_heads(tmp_path / "second", epochs=1, loss="sigmoid", rate_heads=1e-9)
    train(splits, settings, tmp_path / "first" / "last", progress=False)
    assert about("second") == pytest.approx(about("first"), abs=1e-6)
    train(splits, run_of_heads(tmp_path / "third", epochs=1), tmp_path / "second" / "last", progress=False)
    assert about("third") is None


@pytest.mark.parametrize("options", [[], ["--tune-image", "all", "--augment", "--workers", "2"]])
def test_resume_from_the_command_line_after_ctrl_c(folder, trained_towers, tmp_path, options):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "clipmatch.cli", "train", "--out", str(run)]
    first = [*command, "--captions", str(folder), "--model", str(trained_towers), "--epochs", "100000", *options]
    first += ["--batch-size", "16"]
    with subprocess.Popen(first, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        for _ in range(600):
            if (run / "log.jsonl").exists() and (run / "log.jsonl").stat().st_size > 1000:
                break
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors
    stopped = json.loads((run / "last" / "state.json").read_text())["step"]
    plan = json.loads((run / "train.json").read_text())
    plan["settings"]["epochs"] = stopped // 3 + 2  # so that the resumed run ends soon
    (run / "train.json").write_text(json.dumps(plan))
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {stopped}" in done.stderr
    assert "best model" in done.stdout


EAGER = """\
import sys
from clipmatch import runstate
runstate.SAVE_EVERY, runstate.SAVE_SHARE = 0.0, 1e9  # a save after each step, so that kills hit saves too
from clipmatch.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "options",
    [
        ["--views", "2", "--average", "0.9"],
        ["--tune-image", "1", "--tune-text", "1"],
        ["--tune-image", "all", "--tune-text", "all", "--augment", "--workers", "2", "--accumulate", "2"],
    ],
    ids=["cached", "last-blocks", "whole-with-workers"],
)
def test_killed_at_any_moment_it_ends_with_the_same_weights(folder, trained_towers, tmp_path, options):
    """`kill -9`, again and again, wherever it hits: a step, a save, a look at dev, the log."""
    rng = np.random.default_rng(len(options))
    command = [sys.executable, "-c", EAGER, "train"]
    first = ["--captions", str(folder), "--model", str(trained_towers), "--precision", "float32", *options]
    first += ["--batch-size", "16", "--epochs", "4"]

    def start(run, resumed):
        arguments = [*command, "--out", str(tmp_path / run), *(["--resume"] if resumed else first)]
        with (tmp_path / f"{run}.txt").open("a") as said:
            return subprocess.Popen(arguments, stdout=said, stderr=said, start_new_session=True)

    assert start("unbroken", False).wait(300) == 0
    log, state = tmp_path / "broken" / "log.jsonl", tmp_path / "broken" / "last" / "state.json"
    kills = []
    while len(kills) < 3:
        process = start("broken", bool(kills))
        wait_for_news(process, log, state)
        time.sleep(float(rng.uniform(0, 0.15)))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills.append(len(log.read_text().splitlines()))
    assert kills, "it was never killed before its end"
    assert start("broken", True).wait(300) == 0
    assert "Traceback" not in (tmp_path / "broken.txt").read_text()
    for name in ("last", "best"):
        assert same(weights(tmp_path / "unbroken", name), weights(tmp_path / "broken", name))
    losses = [
        [(row["step"], row["loss"]) for row in read_history(tmp_path / run) if row["kind"] == "step"]
        for run in ("unbroken", "broken")
    ]
    assert losses[0] == losses[1]


def wait_for_news(process, log, state):
    """Until a run has logged something and can be resumed, or has ended."""
    size, end = log.stat().st_size if log.exists() else 0, time.monotonic() + 300
    while process.poll() is None and not (state.exists() and log.exists() and log.stat().st_size > size):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_before_its_first_look_at_dev_it_can_be_resumed(splits, trained_towers, tmp_path, monkeypatch):
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=1, batch_size=16)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "measure_dev", raising(MemoryError()))
        with pytest.raises(MemoryError):
            train(splits, settings, trained_towers, progress=False)
    result = train(splits, settings, resume=True, progress=False)
    assert result.finished
    whole = train(splits, replace(settings, out=str(tmp_path / "whole")), trained_towers, progress=False)
    assert same(weights(tmp_path / "run", "last"), weights(tmp_path / "whole", "last"))
    assert result.dev == whole.dev


def raising(error):
    def fail(*_):
        raise error

    return fail


def test_a_log_that_ends_within_a_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "dev": {"a": 1}')
    assert read_history(tmp_path) == [{"step": 1}]


def test_a_new_run_never_overwrites_an_old_one(splits, trained_towers, tmp_path):
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=1, batch_size=48)
    train(splits, settings, trained_towers, progress=False)
    before = weights(tmp_path / "run")
    with pytest.raises(ClipmatchError, match="already holds a run"):
        train(splits, settings, trained_towers, progress=False)
    assert same(before, weights(tmp_path / "run"))


def test_a_run_is_not_resumed_on_other_data(splits, trained_towers, tmp_path):
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=1, batch_size=16)
    train(splits, settings, trained_towers, progress=False)
    fewer = Splits(splits.train[:32], splits.dev, "fewer")
    with pytest.raises(ClipmatchError, match="other pictures"):
        train(fewer, settings, resume=True, progress=False)


def test_a_resumed_run_of_the_last_blocks_finds_its_features(splits, trained_towers, tmp_path, monkeypatch):
    """The tuned blocks differ after the save; what was cached lies below them."""
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=1, batch_size=16, tune_image=1, rate_image=1e-2)
    train(splits, settings, trained_towers, progress=False)
    monkeypatch.setattr(features.FeatureStore, "append", lambda *_: pytest.fail("computed again"))
    assert train(splits, settings, resume=True, progress=False).finished


def test_resume_works_from_any_folder(folder, trained_towers, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=1, batch_size=16)
    train(DataConfig(captions=folder.name), settings, trained_towers, progress=False)
    monkeypatch.chdir(tmp_path)
    assert resume(tmp_path / "run", progress=False).finished


def test_the_run_says_which_picture_was_in_which_part(splits, trained_towers, tmp_path):
    train(splits, TrainConfig(out=str(tmp_path / "run"), epochs=1, batch_size=16), trained_towers, progress=False)
    assert read_split(tmp_path / "run" / "splits" / "train.txt") == [row.path.name for row in splits.train]
    assert read_split(tmp_path / "run" / "splits" / "dev.txt") == [row.path.name for row in splits.dev]


def test_nothing_to_resume(splits, tmp_path):
    with pytest.raises(ClipmatchError, match="no run to resume"):
        resume(tmp_path / "empty")
    with pytest.raises(ClipmatchError, match="no run to resume"):
        train(splits, TrainConfig(out=str(tmp_path / "empty")), resume=True)


# What goes wrong


def test_frozen_random_towers_are_refused(splits, tokenizer, tmp_path):
    with pytest.raises(ClipmatchError, match="no pretrained weights"):
        train(splits, TrainConfig(out=str(tmp_path / "run")), tiny(tokenizer), tokenizer=tokenizer, progress=False)


def test_more_blocks_than_there_are(splits, trained_towers, tmp_path):
    with pytest.raises(ClipmatchError, match="3 blocks"):
        train(splits, TrainConfig(out=str(tmp_path / "run"), tune_image=9), trained_towers, progress=False)


def test_a_loss_that_is_no_number_names_step_and_cause(splits, tokenizer, tmp_path):
    settings = whole(tmp_path / "run", rate_heads=1e30, rate_text=1e30, epochs=5, warmup=0.0)
    with pytest.raises(ClipmatchError, match=r"loss is (nan|inf) at step \d+.*halve the learning rates"):
        train(splits, settings, tiny(tokenizer), tokenizer=tokenizer, progress=False)


@pytest.mark.parametrize("kind", ["whole", "cached"])
def test_one_bad_picture_never_ends_a_run(folder, tokenizer, trained_towers, tmp_path, kind):
    shutil.copytree(folder, tmp_path / "data")
    rows = load_captions(tmp_path / "data")
    splits = split_captions(rows)
    bad = [splits.train[3].path, splits.dev[2].path]
    for path in bad:
        path.write_bytes(path.read_bytes()[:200])
    if kind == "whole":
        settings, start = whole(tmp_path / "run", epochs=1), {"model": tiny(tokenizer), "tokenizer": tokenizer}
    else:
        settings, start = TrainConfig(out=str(tmp_path / "run"), epochs=1, batch_size=16), {"model": trained_towers}
    result = train(splits, settings, **start, progress=False)
    assert result.finished
    assert {failure.path for failure in result.failures} == set(bad)
    assert all(failure.reason for failure in result.failures)


def test_missing_pictures_and_copies_of_a_bad_one_are_all_reported(folder, trained_towers, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    names = [row.path for row in split_captions(load_captions(tmp_path / "data")).train[:4]]
    names[0].unlink()
    names[1].write_bytes(b"no picture")
    names[2].write_bytes(b"no picture")
    splits = split_captions(load_captions(tmp_path / "data"))
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=1, batch_size=16)
    result = train(splits, settings, trained_towers, progress=False)
    assert {failure.path.name for failure in result.failures} == {path.name for path in names[:3]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"workers": -1},
        {"clip_norm": 0.0},
        {"rate_heads": -1.0},
        {"augment": True},
        {"tune_image": "all", "views": 3},
        {"batch_size": 1},
        {"tune_text": "some"},
        {"lora": 4},
        {"lora": -1, "tune_text": "all"},
        {"loss": "cosine"},
        {"chunk": 0},
        {"hard_negatives": 1.0},
        {"mixup": -0.1},
        {"mixup": 0.2, "tune_text": "all"},
        {"mixup": 0.2, "tune_image": 2},
        {"mixup": 0.2, "teachers": ("somebody",)},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ClipmatchError, match="Bad setting"):
        TrainConfig(out="unused", **wrong)


def test_a_batch_larger_than_the_data_becomes_the_data(splits, trained_towers, tmp_path, capsys):
    result = train(
        splits, TrainConfig(out=str(tmp_path / "run"), epochs=1, batch_size=999), trained_towers, progress=False
    )
    assert result.finished
    assert "batch size: 48" in capsys.readouterr().err


# Parts


def test_learning_rate_by_hand():
    factors = [rate_at(step, total=12, warmup=1 / 6) for step in range(12)]
    assert factors[:3] == [0.5, 1.0, 1.0]  # two steps of rise, then the top of the cosine
    assert factors[7] == pytest.approx(0.5)  # half of the ten remaining steps
    assert factors[11] == pytest.approx(0.5 * (1 + np.cos(np.pi * 0.9)))


def test_decay_and_rates_by_part(tokenizer):
    model = CLIPModel(tiny(tokenizer))
    settings = whole("unused", rate_heads=3.0, rate_image=1.0, rate_text=2.0, weight_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["peak"], group["weight_decay"])
        for group in build_optimizer(model, settings).param_groups
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    assert found["log_logit_scale"] == (3.0, 0.0)
    assert found["image_encoder.fc.weight"] == (3.0, 0.5)
    assert found["image_encoder.fc.bias"] == (3.0, 0.0)
    assert found["image_projection.norm.weight"] == (3.0, 0.0)
    assert found["image_encoder.backbone.layers.0.mlp.fc1.weight"] == (1.0, 0.5)
    assert found["text_encoder.backbone.embeddings.LayerNorm.weight"] == (2.0, 0.0)


def test_features_are_standardised_by_what_a_sample_of_them_says():
    """Each has mean 0 and, but for a constant one, nearly spread 1, whatever its own scale."""
    layer = Standardise(4)
    rows = np.random.default_rng(0).normal([5, -3, 0, 7], [0.5, 10, 1, 0], (1000, 4)).astype(np.float32)
    assert torch.equal(layer(torch.tensor(rows)), torch.tensor(rows))  # not set yet
    standardise_input(layer, rows)
    ready = layer(torch.tensor(rows))
    torch.testing.assert_close(ready.mean(dim=0), torch.zeros(4), atol=1e-3, rtol=0)
    assert ready.std(dim=0).tolist() == pytest.approx([0.8, 1, 0.9, 0], abs=0.1)


def test_features_that_are_all_the_same_stay_finite():
    layer = Standardise(2)
    standardise_input(layer, np.zeros((10, 2), np.float32))
    assert layer(torch.zeros(3, 2)).tolist() == [[0, 0]] * 3


def test_a_standardised_head_is_a_plain_one_with_other_numbers(tokenizer):
    """So an exported graph has one layer less, and its head is as it always was."""
    model = CLIPModel(tiny(tokenizer)).eval()
    rows = np.random.default_rng(0).normal(3, 2, (50, 32)).astype(np.float32)
    standardise_input(model.text_encoder.standardise, rows)
    before = model.project_text(torch.tensor(rows))
    fold_standardisation(model.text_encoder)
    torch.testing.assert_close(model.project_text(torch.tensor(rows)), before, atol=1e-5, rtol=1e-5)


def test_model_folders_without_standardisation_still_load(tokenizer):
    model = CLIPModel(tiny(tokenizer))
    weights = {name: value for name, value in model.state_dict().items() if ".standardise." not in name}
    assert len(weights) == len(model.state_dict()) - 4
    model.load_state_dict(weights)


def test_epochs_cover_every_picture_once_and_continue_anywhere():
    batches = list(EpochBatches(count=10, batch_size=3, epochs=2, seed=0))
    assert len(batches) == 6
    for epoch in (0, 1):
        items = [item for batch in batches for e, item in batch if e == epoch]
        assert len(items) == len(set(items)) == 9  # the short last batch is dropped
    assert [b for b in batches if b[0][0] == 0] != [[(0, i) for _, i in b] for b in batches if b[0][0] == 1]
    assert list(EpochBatches(count=10, batch_size=3, epochs=2, seed=0, start=4)) == batches[4:]


def test_captions_are_drawn_from_the_picture_s_own_and_vary():
    pairs = PairDataset(None, None, np.array([0, 5, 7]), seed=0)
    assert {pairs.draw_caption(epoch, 0) for epoch in range(50)} == {0, 1, 2, 3, 4}
    assert {pairs.draw_caption(epoch, 1) for epoch in range(50)} == {5, 6}


def test_texts_are_cut_to_the_longest_of_the_batch(tokenizer):
    texts = LiveTexts(["a red star", "a red star above a blue circle at night"], tokenizer, max_length=40)
    ids, mask = texts.fetch([0])
    assert ids.shape == (1, 5)  # [CLS] a red star [SEP]
    assert mask.sum() == 5
    ids, mask = texts.fetch([0, 1])
    assert mask.sum(dim=1).tolist() == [5, ids.shape[1]]


def test_gradient_checkpointing_gives_the_same_run(splits, tokenizer, tmp_path):
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        settings = whole(tmp_path / name, epochs=1, gradient_checkpointing=checkpointing)
        train(splits, settings, tiny(tokenizer), tokenizer=tokenizer, progress=False)
    plain, checkpointed = weights(tmp_path / "plain", "last"), weights(tmp_path / "checkpointed", "last")
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value)


def test_a_tower_config_takes_a_tokenizer_or_says_so(tokenizer):
    with pytest.raises(ClipmatchError, match="has no tokenizer"):
        create_checkpoint(tiny(tokenizer))
    assert create_checkpoint(tiny(tokenizer), tokenizer).transform.config.size == 32
