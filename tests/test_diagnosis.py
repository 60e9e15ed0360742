"""What a run says of itself when something is wrong, and that it is silent otherwise."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config

from clipmatch.config import TrainConfig
from clipmatch.data import CaptionedImage, Splits, load_captions, split_captions
from clipmatch.diagnosis import check_captions, check_epoch, check_features, check_rows, mean_cosine
from clipmatch.training import open_checkpoint, train

PLAIN = TrainConfig(out="run")


def run_of(losses, scales=(14.0,), norms=(1.0,), recalls=()):
    """The log of a run with ten steps an epoch; what is given once holds for all epochs."""
    history = []
    for epoch, loss in enumerate(losses):
        scale, norm = (values[min(epoch, len(values) - 1)] for values in (scales, norms))
        for step in range(1, 11):
            lost = step <= 10 * norm[0] if isinstance(norm, tuple) else False
            row = {"kind": "step", "epoch": epoch, "step": 10 * epoch + step, "loss": loss, "logit_scale": scale}
            history.append({**row, "gradient_norm": None if lost else 1.0})
        history.append({"kind": "epoch", "epoch": epoch, "step": 10 * epoch + 10, "train_loss": loss})
        if recalls:
            history[-1]["dev"] = {"text_to_image": {"recall@10": recalls[epoch]}}
    return history


def names(history, settings=PLAIN, batch_size=100):
    return [finding.name for finding in check_epoch(history, settings, batch_size, 100.0)]


def test_a_healthy_run_is_silent():
    assert (
        names(run_of([4.0, 3.0, 2.0, 1.5, 1.2], scales=(14, 16, 20, 30, 40), recalls=(0.1, 0.3, 0.4, 0.39, 0.41))) == []
    )


def test_a_loss_of_guessing():
    """log 100 is 4.61; the first epoch may still be warming up."""
    assert names(run_of([4.6])) == []
    assert names(run_of([4.6, 4.55])) == ["chance"]
    assert names(run_of([4.6, 4.3])) == []
    assert names(run_of([4.6, 4.55]), replace(PLAIN, teachers=("somebody",))) == []  # its loss is another
    text = check_epoch(run_of([4.6, 4.55]), PLAIN, 100, 100.0)[0].text
    assert "the loss, 4.55, is still that of guessing among 100 pairs (4.61)" in text


@pytest.mark.parametrize(("losses", "epochs", "found"), [
    ([4.7, 4.6], 1, ["chance"]),
    ([4.7, 4.6], 10, []),  # half of it was warm-up, a twentieth of ten epochs
    ([4.7, 4.0], 1, []),
])  # fmt: skip
def test_a_single_epoch_of_many_steps_is_judged_by_its_second_half(losses, epochs, found):
    halves = [loss for loss in losses for _ in range(300)]
    rows = {"kind": "step", "epoch": 0, "logit_scale": 14.0, "gradient_norm": 1.0}
    history = [{**rows, "step": number, "loss": loss} for number, loss in enumerate(halves, 1)]
    history.append({"kind": "epoch", "epoch": 0, "step": 600, "train_loss": sum(losses) / 2})
    assert names(history, replace(PLAIN, epochs=epochs)) == found
    assert names(history[:400] + history[-1:], replace(PLAIN, epochs=epochs)) == []


def test_a_temperature_at_its_end():
    assert names(run_of([3.0, 2.0], scales=(14, 100))) == ["scale-at-ceiling"]
    assert names(run_of([3.0, 2.0], scales=(14, 99))) == []
    assert names(run_of([3.0, 2.9], scales=(14, 1.5))) == ["scale-sunk"]


def test_learning_by_heart():
    losses = [3.0, 2.5, 2.0, 1.5]
    assert names(run_of(losses, recalls=(0.50, 0.49, 0.47, 0.46))) == ["overfitting"]
    assert names(run_of(losses, recalls=(0.50, 0.499, 0.498, 0.497))) == []  # within chance
    assert names(run_of(losses, recalls=(0.50, 0.47, 0.48, 0.46))) == []
    assert names(run_of([3.0, 2.5, 2.6, 1.5], recalls=(0.50, 0.49, 0.47, 0.46))) == []


def test_steps_that_float16_could_not_take():
    assert names(run_of([3.0, 2.0], norms=((0.3,),))) == ["skipped-steps"]
    assert names(run_of([3.0, 2.0], norms=((0.1,),))) == []


def test_rows_that_are_all_alike():
    spread = np.eye(8, dtype=np.float32)
    alike = np.tile(spread[:1], (8, 1)) + 0.01 * spread
    alike /= np.linalg.norm(alike, axis=1, keepdims=True)
    assert mean_cosine(spread) == pytest.approx(0)
    assert mean_cosine(alike) == pytest.approx((alike @ alike.T)[~np.eye(8, dtype=bool)].mean(), abs=1e-6)
    assert [finding.name for finding in check_rows(spread, alike, 100, 100)] == ["collapsed-captions"]
    assert [finding.name for finding in check_rows(alike, spread, 100, 100)] == ["collapsed-pictures"]
    assert list(check_rows(spread, spread, 100, 100)) == []
    assert list(check_rows(alike, alike, 19, 50)) == []
    assert list(check_rows(alike, alike, 99, 500)) == []


def test_pictures_without_a_caption_of_their_own():
    def rows(*captions):
        return [CaptionedImage(Path(f"{number}.jpg"), texts) for number, texts in enumerate(captions)]

    assert list(check_captions(rows(("a",), ("b",), ("c", "a"), ("d",), ("e",), ("f",)))) == []  # one of six
    [finding] = check_captions(rows(("a",), ("a",), ("c", "a"), ("d",)))
    assert finding.text.startswith("50 % of the pictures have only captions that other pictures have too")


def test_a_tower_that_sees_no_difference():
    values = np.random.default_rng(0).normal(size=(50, 8))
    assert list(check_features("image", values)) == []
    [finding] = check_features("image", np.tile(values[:1], (50, 1)))
    assert finding.name == "dead-image-tower"
    assert "--tune-image all" in finding.text


def test_a_run_warns_once_and_keeps_it_in_its_log(scenes, model_folder, tmp_path, capsys):
    """A tower of zeros gives the same features, and the same vector, for every picture."""
    checkpoint = open_checkpoint(model_folder)
    with torch.no_grad():
        for value in checkpoint.model.image_encoder.backbone.parameters():
            value.zero_()
    splits = split_captions(load_captions(scenes))
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=10, batch_size=20, precision="float32")
    train(splits, settings, checkpoint, progress=False)
    said = capsys.readouterr().err
    assert said.count("Warning: the image tower gives the same for everything") == 1
    assert said.count("Warning: all pictures are embedded alike (mean cosine 1.00)") == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    kinds = [row["name"] for row in rows if row["kind"] == "warning"]
    assert {"dead-image-tower", "collapsed-pictures"} <= set(kinds)
    assert len(kinds) == len(set(kinds))


def test_a_run_that_learns_does_not_warn(scenes, vocabulary, tmp_path, capsys):
    torch.manual_seed(0)
    pooling = {"image_pooling": "mean", "text_pooling": "mean"}
    model = tiny_config(vocabulary.vocab_size, dropout=0.0, feature_dropout=0.0, **pooling)
    few = split_captions(load_captions(scenes)).train[:16]
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=60, batch_size=16, tune_image="all", tune_text="all")
    settings = replace(settings, rate_heads=3e-3, rate_image=3e-3, rate_text=3e-3, evaluate_every=20)
    train(Splits(few, few, "the same pictures"), settings, model, tokenizer=vocabulary, progress=False)
    assert "Warning" not in capsys.readouterr().err
