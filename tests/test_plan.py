"""The dry run: what it says is what the run would do, and nothing is written."""

import os

import pytest
from click.testing import CliRunner

from clipmatch.checkpoint import load_checkpoint
from clipmatch.cli import main
from clipmatch.config import TrainConfig
from clipmatch.data import load_captions, split_captions
from clipmatch.errors import ClipmatchError
from clipmatch.plan import Part, describe, in_words, plan_run
from clipmatch.training import train


def test_the_plan_is_what_the_run_does(scenes, model_folder, tmp_path):
    splits = split_captions(load_captions(scenes))  # 60 + 20
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=3, batch_size=16, accumulate=2, tune_text=1)
    plan = plan_run(splits, settings, model_folder)
    assert not (tmp_path / "run").exists()
    assert (plan.batch_size, plan.steps_per_epoch, plan.steps) == (16, 2, 6)
    assert min(plan.step_seconds, plan.look_seconds, plan.prepare_seconds) > 0
    assert plan.memory > 50e6  # PyTorch alone
    image, text, heads = plan.parts
    model = load_checkpoint(model_folder).model
    assert image.weights == sum(value.numel() for value in model.image_encoder.backbone.parameters())
    assert (image.learning, heads.learning) == (0, heads.weights)
    blocks = model.text_encoder.backbone.transformer.layer
    assert text.learning == sum(value.numel() for value in blocks[-1].parameters())
    history = train(splits, settings, model_folder, progress=False).history
    assert [row["step"] for row in history if row["kind"] == "step"][-1] == plan.steps


def test_from_the_command_line(scenes, model_folder, tmp_path):
    command = ["train", "--captions", scenes, "--model", model_folder, "--out", tmp_path / "run", "--dry-run"]
    result = CliRunner().invoke(main, [*map(str, command), "--lora", "2", "--tune-text", "all"])
    assert result.exit_code == 0, result.output
    heads = [line.split()[0] for line in result.stdout.splitlines()]
    assert heads == ["data", "learn", "learn", "learn", "steps", "device", "memory", "disk", "time"]
    assert "60 pictures to train on, 300 captions; 20 for dev" in result.stdout
    assert "1 an epoch, 30 in all; batches of 60" in result.stdout
    assert os.listdir(tmp_path) in ([], ["cache"])  # noqa: PTH208


@pytest.mark.parametrize("changes", [{"views": 3}, {"tune_image": 1}, {"tune_text": 1}], ids=str)
def test_the_cache_gets_as_large_as_the_plan_says(scenes, model_folder, tmp_path, own_cache, changes):
    """Views of each picture to train on, hidden states where a block learns, no captions where their tower does."""
    splits = split_captions(load_captions(scenes))
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=1, batch_size=30, **changes)
    plan = plan_run(splits, settings, model_folder)
    train(splits, settings, model_folder, progress=False)
    assert plan.cache == sum(file.stat().st_size for file in own_cache.rglob("rows.bin")) > 0
    assert f"disk    {plan.cache / 2**20:.1f} MB of features" in str(plan)


def test_nothing_is_cached_where_both_towers_learn(scenes, model_folder, tmp_path):
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=1, tune_image="all", tune_text="all")
    plan = plan_run(split_captions(load_captions(scenes)), settings, model_folder)
    assert plan.cache == 0
    assert "disk    no features are cached" in str(plan)


def test_a_tower_that_is_a_graph_has_no_weights_to_count():
    assert describe(Part("text tower", 0, 0, 5e-5)) == "learn   nothing of the text tower, which stays an ONNX graph"


def test_what_the_run_would_refuse(scenes, model_folder, tmp_path):
    splits = split_captions(load_captions(scenes))
    (tmp_path / "run" / "best").mkdir(parents=True)
    with pytest.raises(ClipmatchError, match="already holds a run"):
        plan_run(splits, TrainConfig(out=str(tmp_path / "run")), model_folder)


def test_times_in_words():
    assert [in_words(seconds) for seconds in (3.2, 89, 600, 5000, 9000)] == ["3 s", "89 s", "10 min", "83 min", "2.5 h"]


def test_fewer_batches_than_are_measured_between_looks_for_similar_pictures(scenes, model_folder, tmp_path):
    command = ["train", "--captions", scenes, "--model", model_folder, "--out", tmp_path / "run", "--dry-run"]
    command += ["--epochs", "1", "--batch-size", "64", "--hard-negatives", "0.5"]
    result = CliRunner().invoke(main, [str(word) for word in command], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert "steps   1 an epoch, 1 in all" in result.stdout
