"""The prior: what it paints follows from embedding and seed, and what it learns from two kinds of pictures."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from clipmatch.cli import main
from clipmatch.data import load_captions
from clipmatch.embedder import load_model
from clipmatch.errors import ClipmatchError
from clipmatch.generation import looptools
from clipmatch.generation.prior import Prior, PriorConfig, load_prior, save_prior
from clipmatch.generation.priortrain import ROWS, PriorData, PriorLearner, train_prior
from clipmatch.generation.settings import PriorTraining
from clipmatch.generation.vqgan import small_vqgan
from clipmatch.modelfolder import WEIGHTS

SMALL = {"width": 32, "local_width": 16, "layers": 2}
SHAPE = {**SMALL, "heads": 2}
FAST = PriorTraining(steps=6, batch_size=8, precision="float32", device="cpu", **SMALL)


@pytest.fixture
def prior():
    torch.manual_seed(0)
    return Prior(PriorConfig(tokens=16, codes=10, code_width=3, embed_dim=4, **SHAPE), torch.randn(10, 3)).eval()


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq")
    torch.manual_seed(0)
    small_vqgan(32, channels=(8, 16), codes=16, code_width=4).save_pretrained(folder)
    return folder


def unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows), dim=1)


def test_the_seed_and_the_embedding_decide_the_picture(prior):
    rows = unit([1.0, 0, 0, 0], [0, 1.0, 0, 0])
    painted = prior.paint(rows, seed=5)
    assert painted.shape == (2, 16)
    assert 0 <= painted.min() <= painted.max() < 10
    assert torch.equal(painted, prior.paint(rows, seed=5))
    assert not torch.equal(painted, prior.paint(rows, seed=6))


def test_a_picture_does_not_depend_on_those_painted_along_with_it(prior):
    rows = unit([1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0])
    together = prior.paint(rows, seed=5)
    assert torch.equal(together[2:], prior.paint(rows[2:], seed=7))


@pytest.mark.parametrize("steps", [1, 3, 12, 40])
def test_every_token_is_painted_in_however_many_steps(prior, steps):
    assert prior.paint(unit([1.0, 0, 0, 0]), steps=steps).max() < prior.mask
    assert prior.paint(n=2, steps=steps).shape == (2, 16)


def test_guidance_moves_logits_away_from_those_of_no_prompt(prior):
    tokens, rows = torch.full((1, 16), prior.mask), unit([1.0, 0, 0, 0])
    with torch.no_grad():
        plain, empty = prior(tokens, rows), prior(tokens, prior.nothing[None])
        torch.testing.assert_close(prior.guided(tokens, rows, 2.0), plain + 2 * (plain - empty))
        torch.testing.assert_close(prior.guided(tokens, rows, 0.0), plain)


def test_it_learns_which_picture_belongs_to_which_prompt(tmp_path):
    """Two kinds of pictures: all tokens 3, with captions near (1, 0), and all tokens 7, with captions near (0, 1)."""
    torch.manual_seed(0)
    kinds = torch.arange(40) % 2
    captions = unit([1.0, 0.0], [0.0, 1.0])[kinds]
    data = PriorData(torch.where(kinds == 0, 3, 7)[:, None].repeat(1, 4), -captions, captions, torch.arange(41))
    prior = Prior(PriorConfig(tokens=4, codes=10, code_width=3, embed_dim=2, **SHAPE), torch.randn(10, 3))
    settings = PriorTraining(steps=200, batch_size=16, precision="float32", device="cpu", rate=3e-3, **SMALL)
    learner = PriorLearner(prior, small_vqgan(16, channels=(8, 16), codes=10, code_width=4), data, settings, tmp_path)
    looptools.run_steps(learner, tmp_path, 200, {}, look_every=200, progress=False)
    painted = prior.eval().paint(unit([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]))
    assert painted.tolist() == [[3] * 4, [7] * 4, [3] * 4, [7] * 4]  # the last two: by pictures' own rows


def test_noise_only_moves_pictures_and_only_so_far(tmp_path, vqgan, prior):
    own, captions = unit([1.0, 0, 0, 0]).repeat(40, 1), unit([0, 1.0, 0, 0]).repeat(40, 1)
    data = PriorData(torch.zeros(40, 16, dtype=torch.long), own, captions, torch.arange(41))
    learner = PriorLearner(prior, None, data, PriorTraining(noise=0.5, captioned=0.5, **SMALL), tmp_path)
    rows = learner.prompts(torch.arange(40), torch.Generator().manual_seed(0))
    asked = rows[:, 1] == 1
    assert 5 < asked.sum() < 35
    cosines = rows[~asked] @ own[0]
    assert cosines.min() >= np.sqrt(1 - 0.5**2) - 1e-6  # the angle is at most that whose sine is the noise
    assert cosines.std() > 0.001


def test_a_folder_brings_the_same_prior(prior, tmp_path):
    save_prior(prior, tmp_path / "prior")
    rows = unit([1.0, 0, 0, 0])
    assert torch.equal(load_prior(tmp_path / "prior").paint(rows), prior.paint(rows))
    with pytest.raises(ClipmatchError, match="holds no prior"):
        load_prior(tmp_path)


def test_codes_that_mean_the_same_begin_with_logits_that_are_alike():
    torch.manual_seed(0)
    book = torch.randn(10, 3)
    book[1] = book[0]
    prior = Prior(PriorConfig(tokens=16, codes=10, code_width=3, embed_dim=4, **SHAPE), book).eval()
    prior.head.weight.data.zero_()
    prior.head.bias.data.zero_()
    with torch.no_grad():
        logits = prior(torch.full((1, 16), prior.mask), unit([1.0, 0, 0, 0]))
    torch.testing.assert_close(logits[..., 0], logits[..., 1])
    assert (logits[..., 0] - logits[..., 2]).abs().min() > 0


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(scenes, model_folder, vqgan, tmp_path, monkeypatch):
    rows, guide = load_captions(scenes).rows[:20], load_model(model_folder)
    assert train_prior(rows, vqgan, guide, tmp_path / "whole", FAST, progress=False)
    left = iter([False] * 3)
    with monkeypatch.context() as patch:
        patch.setattr(looptools, "stop_on_interrupt", lambda: contextlib.nullcontext(lambda: next(left, True)))
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "rows.safetensors").write_bytes(b"of a start that failed")
        assert not train_prior(rows, vqgan, guide, tmp_path / "broken", FAST, progress=False)
    with pytest.raises(ClipmatchError, match="began with another guide"):
        train_prior(rows, vqgan, load_model("embedded"), tmp_path / "broken", resume=True, progress=False)
    assert train_prior(rows, vqgan, guide, tmp_path / "broken", resume=True, progress=False)
    whole, broken = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert (tmp_path / "whole" / "samples" / "step-000006.png").is_file()


def test_the_command_trains_inside_the_generators_folder(scenes, model_folder, vqgan, tmp_path):
    generator = tmp_path / "generator"
    shutil.copytree(vqgan, generator)
    words = ["train-prior", "--captions", str(scenes), "--generator", str(generator), "--guide", str(model_folder)]
    done = CliRunner().invoke(main, [*words, "--steps", "2", "--width", "24", "--layers", "1", "--batch-size", "4"])
    assert done.exit_code == 0, done.output
    assert "60 pictures" not in done.output  # dev scenes are learnt from too unless a split is named
    config = load_prior(generator / "prior").config
    assert (config.tokens, config.codes, config.width) == (16, 16, 24)
    assert json.loads((generator / "prior" / "log.jsonl").read_text().splitlines()[-1])["dev_loss"] > 0


def test_the_heads_follow_from_the_width():
    heads = {24: 1, 128: 4, 192: 6, 250: 5, 256: 8, 512: 16}
    assert {width: PriorTraining(width=width).heads for width in heads} == heads


@pytest.mark.parametrize(
    ("option", "said"), [(("--seed", "-1"), "seed must lie in 0.."), (("--device", "cuda:9"), "can't be used here")]
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_encoded(photos, vqgan, tmp_path, option, said):
    words = ["train-prior", "--captions", str(photos), "--generator", str(vqgan), "--guide", "embedded"]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "prior"), *option])
    assert done.exit_code == 1
    assert said in done.output
    assert not (tmp_path / "prior").exists()


def test_codes_that_do_not_fit_are_told_before_pictures_are_read(model_folder, tmp_path):
    small_vqgan(24, channels=(8, 16), codes=16, code_width=4).save_pretrained(tmp_path / "vq")  # 3 x 3 codes
    with pytest.raises(ClipmatchError, match=r"an even number of codes \(got 3\)"):
        train_prior((), tmp_path / "vq", load_model(model_folder), tmp_path / "prior", FAST, progress=False)


def test_a_run_is_not_written_over(scenes, model_folder, vqgan, tmp_path):
    rows, guide = load_captions(scenes).rows[:3], load_model(model_folder)
    settings = PriorTraining(**{**FAST.__dict__, "steps": 1})
    assert train_prior(rows, vqgan, guide, tmp_path / "prior", settings, progress=False)
    kept = (tmp_path / "prior" / ROWS).read_bytes()
    with pytest.raises(ClipmatchError, match="already holds a run"):
        train_prior(rows[:2], vqgan, guide, tmp_path / "prior", settings, progress=False)
    assert (tmp_path / "prior" / ROWS).read_bytes() == kept


def test_pictures_without_captions_are_enough(photos, model_folder, vqgan, tmp_path):
    words = ["train-prior", "--captions", str(photos), "--generator", str(vqgan), "--guide", str(model_folder)]
    words += ["--out", str(tmp_path / "prior"), "--steps", "2", "--width", "24", "--layers", "1", "--batch-size", "2"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "learns from its pictures alone" in done.output
