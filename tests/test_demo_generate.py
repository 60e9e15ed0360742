"""The generation demo in miniature: all of its steps, with models that have learnt next to nothing."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from clipmatch.cli import main
from clipmatch.data import load_captions, split_captions
from clipmatch.generation import demo_evaluation, demo_generate, judge
from clipmatch.generation.settings import PriorTraining, VQConfig
from clipmatch.scenes import content_key, sample_splits

VQ = VQConfig(size=32, channels=(8,), codes=16, code_width=4, steps=3, batch_size=8, precision="float32")
PRIOR = PriorTraining(width=24, layers=1, local_width=8, steps=3, batch_size=8, precision="float32")


@pytest.fixture
def world(scenes, model_folder, tmp_path, monkeypatch):
    """A demo's folder in which scenes and the model that the guide begins with are there already."""
    shutil.copytree(scenes, tmp_path / "demo" / "scenes")
    shutil.copytree(model_folder, tmp_path / "demo" / "run" / "best")
    monkeypatch.setattr(demo_generate, "VQ_SETTINGS", VQ)
    monkeypatch.setitem(demo_generate.GUIDE_SETTINGS, "epochs", 1)
    for module in (demo_generate, demo_evaluation):
        monkeypatch.setattr(module, "PRIOR_SETTINGS", PRIOR)
        monkeypatch.setattr(module, "prepare_scenes", lambda out, seed: split_captions(load_captions(out / "scenes")))
    return tmp_path / "demo"


def test_the_demo_trains_paints_and_goes_on(world):
    command = ["demo", "--generate", "--out", str(world)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    first = np.asarray(Image.open(world / "painted.png"))
    dev = split_captions(load_captions(world / "scenes")).dev
    assert all(row.captions[0] in done.stdout for row in dev[:16])
    assert json.loads((world / "guide" / "train.json").read_text())["settings"]["adversarial"] == 7
    log = (world / "generator" / "prior" / "log.jsonl").read_text()
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 0, again.output
    assert (world / "generator" / "prior" / "log.jsonl").read_text() == log  # nothing was trained anew
    assert np.array_equal(np.asarray(Image.open(world / "painted.png")), first)


def test_an_unfinished_demo_is_not_measured(world):
    done = CliRunner().invoke(main, ["evaluate-generation", "--out", str(world)])
    assert done.exit_code == 1
    assert "holds no finished generator" in done.output


def test_every_row_of_the_table_is_measured(world, monkeypatch):
    """With the guide as its own judge, twenty prompts and a classifier that guesses."""
    assert CliRunner().invoke(main, ["demo", "--generate", "--out", str(world)]).exit_code == 0
    splits = split_captions(load_captions(world / "scenes"))
    shutil.copytree(world / "scenes", world / "judge-scenes")
    monkeypatch.setattr(demo_evaluation, "make_judge", lambda out, seed: (out / "guide", splits))
    monkeypatch.setattr(demo_evaluation, "STEPS", 5)
    monkeypatch.setattr(demo_evaluation, "CHOICES", 20)
    monkeypatch.setattr(demo_evaluation, "REFINING", 2)
    figures = demo_evaluation.evaluate_generation(world, n=20, guided=2)
    rows = figures["rows"]
    assert rows["real pictures"]["r_precision_judge"] == rows["real pictures"]["r_precision_guide"]
    assert rows["real pictures"]["pictures"] == 20
    assert rows["prior, best of 8, then 2 steps of guidance (the default)"]["pictures"] == 2
    assert any(name.startswith("guidance without the prior, equal time") for name in rows)
    assert rows["their reconstructions (the ceiling)"]["closer_to_training"]["pixels"] <= 0.1
    nearest = rows["nearest training picture by the guide"]
    assert nearest["closer_to_training"] == {"pixels": 1.0, "judge": 1.0}
    assert json.loads(json.dumps(figures))["chance"] == 1 / 20
    table = demo_evaluation.table(figures)
    assert all(name in table for name in rows)


def test_a_finished_judge_is_not_trained_again(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "generate", lambda *_, **__: scenes)
    trained = []
    monkeypatch.setattr(judge, "train_small", lambda run, *_: trained.append(run) or True)
    for step, times in ((5, 1), (10, 1)):
        (tmp_path / "judge" / "last").mkdir(parents=True, exist_ok=True)
        (tmp_path / "judge" / "last" / "state.json").write_text(json.dumps({"step": step, "total": 10}))
        assert judge.make_judge(tmp_path)[0] == tmp_path / "judge"
        assert len(trained) == times


def test_the_judges_scenes_are_none_of_the_guides():
    guides = {content_key(scene) for part in sample_splits(300, 50) for scene in part}
    judges = {content_key(scene) for part in sample_splits(300, 100, skip=350) for scene in part}
    assert len(guides) == 350
    assert len(judges) == 400
    assert not guides & judges
