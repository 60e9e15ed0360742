"""The autoencoder, and training one on pictures that a person could describe: stripes and plain colours."""

import contextlib
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from clipmatch.cli import main
from clipmatch.errors import ClipmatchError
from clipmatch.generation import looptools
from clipmatch.generation.settings import VQConfig
from clipmatch.generation.vqgan import (
    VQ_WEIGHTS,
    load_vqgan,
    nearest_codes,
    pictures_of,
    pixels_per_code,
    small_vqgan,
    tokens_of,
)
from clipmatch.generation.vqtrain import CodeAverage, perplexity, save_sheet, train_vqgan

TINY = {"channels": (8, 16), "codes": 16, "code_width": 4}
RED, OTHERS = (220, 30, 30), ((30, 160, 60), (40, 60, 220), (240, 240, 240))
FAST = VQConfig(size=16, batch_size=4, steps=6, precision="float32", device="cpu", **TINY)


@pytest.fixture
def pictures(tmp_path):
    """24 pictures, red on the left and one of three colours on the right."""
    (tmp_path / "pictures").mkdir()
    for number in range(24):
        picture = Image.new("RGB", (16, 16), RED)
        picture.paste(OTHERS[number % 3], (8, 0, 16, 16))
        picture.save(tmp_path / "pictures" / f"{number:02}.png")
    return tmp_path / "pictures"


@contextlib.contextmanager
def stopped_after(steps):
    """As if Ctrl-C came after so many steps."""
    left = iter([False] * steps)
    yield lambda: next(left, True)


def test_pictures_come_back_as_pictures():
    model = small_vqgan(32, **TINY).eval()
    assert pixels_per_code(model) == 8
    tokens = tokens_of(model, torch.zeros(2, 3, 32, 32))
    assert tokens.shape == (2, 16)
    painted = pictures_of(model, tokens)
    assert painted.shape == (2, 3, 32, 32)
    assert 0 <= painted.min() <= painted.max() <= 1


def test_a_folder_brings_the_same_model(tmp_path):
    model = small_vqgan(16, **TINY).eval()
    model.save_pretrained(tmp_path / "vq")
    tokens = torch.arange(4)[None]
    torch.testing.assert_close(pictures_of(load_vqgan(tmp_path / "vq"), tokens), pictures_of(model, tokens))


def test_the_nearest_code_is_found():
    model = small_vqgan(16, **{**TINY, "codes": 2, "code_width": 2})
    model.quantize.embedding.weight.data = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    latents = torch.tensor([[1.0, 9.0], [4.0, 6.0]]).view(1, 1, 2, 2).repeat(1, 2, 1, 1)
    latents[:, 1] = 0
    assert nearest_codes(model, latents).tolist() == [[0, 1, 0, 1]]


def test_what_is_no_vqgan_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ClipmatchError, match="holds no VQGAN"):
        load_vqgan(tmp_path)
    AutoencoderKL(norm_num_groups=8, block_out_channels=(8,)).save_pretrained(tmp_path / "kl")
    with pytest.raises(ClipmatchError, match="is a AutoencoderKL, not a VQModel"):
        load_vqgan(tmp_path / "kl")
    small_vqgan(16, **TINY).save_pretrained(tmp_path / "vq")
    (tmp_path / "vq" / VQ_WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(ClipmatchError, match="is damaged"):
        load_vqgan(tmp_path / "vq")


def test_perplexity_counts_codes_in_even_use():
    assert perplexity(torch.tensor([0, 1, 2, 3]), 16) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 7, 7]), 16) == pytest.approx(1)


def test_codes_go_to_the_mean_of_what_is_near_and_idle_ones_elsewhere():
    codes = torch.tensor([[0.0], [100.0]])
    rows = torch.tensor([[1.0], [3.0]])
    average = CodeAverage(codes)
    for _ in range(200):
        average.update(codes, rows, torch.tensor([0, 0]), torch.Generator().manual_seed(0))
    assert codes[0].item() == pytest.approx(2, abs=0.01)
    assert codes[1].item() in (1.0, 3.0)


def test_a_vqgan_learns_from_a_folder(pictures, tmp_path):
    out = tmp_path / "vq"
    out.mkdir()
    (out / "pixels.bin").write_bytes(bytes(16 * 16 * 3 * 5))  # of a start that failed: other pictures
    config = VQConfig(**{**FAST.__dict__, "channels": (32,), "steps": 200, "batch_size": 8, "rate": 2e-3})
    assert train_vqgan(pictures, out, config, progress=False)
    looks = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert looks[-1]["dev_psnr"] > looks[0]["dev_psnr"] + 5  # decibels
    assert 1 <= looks[-1]["dev_codes_used"] <= 16
    assert (out / "samples" / "step-000200.png").is_file()
    model, first = load_vqgan(out), np.asarray(Image.open(pictures / "00.png"))
    pixels = torch.tensor(first).permute(2, 0, 1)[None] / 127.5 - 1
    painted = pictures_of(model, tokens_of(model, pixels))[0] * 255
    assert painted[:, :, :8].mean(dim=(1, 2)).tolist() == pytest.approx(RED, abs=30)
    assert painted[:, :, 8:].mean(dim=(1, 2)).tolist() == pytest.approx(OTHERS[0], abs=30)


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(pictures, tmp_path, monkeypatch):
    config = VQConfig(**{**FAST.__dict__, "adversarial": 0.1})
    assert train_vqgan(pictures, tmp_path / "whole", config, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(looptools, "stop_on_interrupt", lambda: stopped_after(3))
        assert not train_vqgan(pictures, tmp_path / "broken", config, progress=False)
    with pytest.raises(ClipmatchError, match="already holds a run"):
        train_vqgan(pictures, tmp_path / "broken", config, progress=False)
    assert train_vqgan(pictures, tmp_path / "broken", resume=True, progress=False)
    whole, broken = (load_file(tmp_path / name / VQ_WEIGHTS) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"device": "cuda:9"}, "can't be used here"), ({"perceptual": "nowhere/at/all"}, "nowhere/at/all")],
)
def test_what_cannot_be_had_is_told_before_pictures_are_read(pictures, tmp_path, changes, said):
    with pytest.raises(ClipmatchError, match=said):
        train_vqgan(pictures, tmp_path / "vq", VQConfig(**{**FAST.__dict__, **changes}), progress=False)
    assert not (tmp_path / "vq" / "pixels.bin").exists()


def test_the_look_of_a_model_counts_too(pictures, tmp_path, model_folder):
    config = VQConfig(**{**FAST.__dict__, "steps": 2, "perceptual": str(model_folder)})
    assert train_vqgan(pictures, tmp_path / "vq", config, progress=False)
    look = json.loads((tmp_path / "vq" / "log.jsonl").read_text().splitlines()[-1])
    assert look["perceptual"] > 0


def test_training_goes_on_from_another_vqgan_and_past_a_damaged_picture(pictures, tmp_path, capsys):
    model = small_vqgan(16, **TINY)
    model.save_pretrained(tmp_path / "first")
    (pictures / "broken.png").write_bytes(b"no picture")
    config = VQConfig(**{**FAST.__dict__, "steps": 1, "rate": 1e-9})
    assert train_vqgan(pictures, tmp_path / "vq", config, model=str(tmp_path / "first"), progress=False)
    assert "1 pictures can't be read" in capsys.readouterr().err
    name = "decoder.conv_out.weight"
    before, after = (load_file(tmp_path / place / VQ_WEIGHTS)[name] for place in ("first", "vq"))
    torch.testing.assert_close(before, after, atol=1e-6, rtol=0)


def test_a_sheet_shows_its_pictures_in_order(tmp_path):
    pictures = torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    save_sheet(pictures, tmp_path / "a" / "sheet.png", columns=2)
    sheet = np.asarray(Image.open(tmp_path / "a" / "sheet.png"))
    assert sheet.shape == (10, 10, 3)
    assert (sheet[0, 0], sheet[0, 9], sheet[9, 0], sheet[9, 9])[0].tolist() == [0, 0, 0]
    assert sheet[9, 0].tolist() == [128, 128, 128]


def test_the_command_says_what_is_wrong(tmp_path):
    run = CliRunner().invoke
    (tmp_path / "empty").mkdir()
    done = run(main, ["train-vqgan", str(tmp_path / "empty"), "--out", str(tmp_path / "vq")])
    assert done.exit_code == 1
    assert "holds no pictures" in done.output
    done = run(main, ["train-vqgan", str(tmp_path), "--out", str(tmp_path / "vq"), "--size", "30"])
    assert done.exit_code == 1
    assert "multiple of 8 pixels" in done.output
    done = run(main, ["train-vqgan", str(tmp_path), "--out", str(tmp_path / "vq"), "--resume", "--steps", "5"])
    assert done.exit_code == 1
    assert "--steps would change nothing" in done.output
