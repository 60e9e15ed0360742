"""Weights of taming-transformers: the published layouts by name and shape, and a small model by its numbers."""

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from clipmatch.cli import main
from clipmatch.errors import ClipmatchError
from clipmatch.generation import taming
from clipmatch.generation.taming import config_of, convert_taming, rename
from clipmatch.generation.vqgan import VQModel, load_vqgan, pixels_per_code


def norm(width, groups):
    return nn.GroupNorm(groups, width, eps=1e-6)


class Residual(nn.Module):
    """Taming's ResnetBlock, restated."""

    def __init__(self, before, after, groups):
        super().__init__()
        self.norm1, self.conv1 = norm(before, groups), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = norm(after, groups), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x):
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = self.conv2(nn.functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Taming's AttnBlock: one head over all places, by convolutions of one pixel."""

    def __init__(self, width, groups):
        super().__init__()
        self.norm = norm(width, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(dim=2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Resample(nn.Module):
    """Taming's Downsample (a pixel of padding on the right and below) or Upsample (nearest)."""

    def __init__(self, width, up):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=int(up))

    def forward(self, x):
        x = nn.functional.interpolate(x, scale_factor=2.0) if self.up else nn.functional.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Level(nn.Module):
    def __init__(self, before, after, layers, attends, resample, groups):
        super().__init__()
        self.block = nn.ModuleList(Residual(before if n == 0 else after, after, groups) for n in range(layers))
        self.attn = nn.ModuleList(Attention(after, groups) for _ in range(layers if attends else 0))
        if resample:
            setattr(self, resample, Resample(after, resample == "upsample"))
        self.resample = resample

    def forward(self, x):
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        return getattr(self, self.resample)(x) if self.resample else x


class Middle(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.block_1, self.attn_1 = Residual(width, width, groups), Attention(width, groups)
        self.block_2 = Residual(width, width, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Half(nn.Module):
    """Taming's Encoder, or its Decoder, whose levels are numbered as the encoder's and passed from the last on."""

    def __init__(self, widths, layers, z, decodes, groups):
        super().__init__()
        last, self.decodes = len(widths) - 1, decodes
        before = widths[-1] if decodes else widths[0]
        self.conv_in = nn.Conv2d(z if decodes else 3, before, 3, padding=1)
        levels = {}
        for number in range(last, -1, -1) if decodes else range(last + 1):
            resample = ("upsample" if number > 0 else None) if decodes else ("downsample" if number < last else None)
            levels[number] = Level(before, widths[number], layers + decodes, number == last, resample, groups)
            before = widths[number]
        self.up = self.down = None
        setattr(self, "up" if decodes else "down", nn.ModuleList(levels[number] for number in range(last + 1)))
        self.mid, self.norm_out = Middle(widths[-1], groups), norm(before, groups)
        self.conv_out = nn.Conv2d(before, 3 if decodes else z, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        if self.decodes:
            x = self.mid(x)
            for level in reversed(self.up):
                x = level(x)
        else:
            for level in self.down:
                x = level(x)
            x = self.mid(x)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


class Taming(nn.Module):
    """Taming's VQModel with a plain codebook."""

    def __init__(self, widths, layers, z, codes, groups=32):
        super().__init__()
        self.encoder, self.decoder = Half(widths, layers, z, 0, groups), Half(widths, layers, z, 1, groups)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(codes, z)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, z, 1), nn.Conv2d(z, z, 1)

    def forward(self, x):
        z = self.quant_conv(self.encoder(x))
        rows = z.permute(0, 2, 3, 1)
        nearest = torch.cdist(rows.flatten(0, 2), self.quantize.embedding.weight).argmin(dim=1)
        found = self.quantize.embedding(nearest).view_as(rows).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(found))


@pytest.mark.parametrize("codes", [1024, 16384])
def test_the_published_layouts_fit_to_the_last_name(codes):
    with torch.device("meta"):
        theirs = Taming((128, 128, 256, 256, 512), 2, 256, codes).state_dict()
        assert theirs["encoder.down.4.attn.1.proj_out.weight"].shape == (512, 512, 1, 1)
        ours = VQModel(**config_of(theirs))
    renamed = rename(theirs)
    expected = {name: value.shape for name, value in ours.state_dict().items()}
    assert {name: value.shape for name, value in renamed.items()} == expected
    assert pixels_per_code(ours) == 16
    assert ours.quantize.embedding.weight.shape == (codes, 256)


def test_a_converted_model_paints_what_the_original_paints(tmp_path):
    torch.manual_seed(0)
    theirs = Taming((32, 64), 1, 8, 32).eval()
    losses = {"loss.discriminator.weight": torch.zeros(3)}
    torch.save({"state_dict": theirs.state_dict() | losses, "epoch": 3}, tmp_path / "last.ckpt")
    done = CliRunner().invoke(main, ["convert-vqgan", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "vq")])
    assert done.exit_code == 0, done.output
    assert "32 codes, 2 pixels a code" in done.output
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(load_vqgan(tmp_path / "vq")(pictures).sample, theirs(pictures), atol=1e-5, rtol=1e-4)


def test_files_that_mention_their_training_program_are_read(tmp_path, monkeypatch):
    """A class among the checkpoint's plain values is named, never run."""
    monkeypatch.setattr(taming, "CALLBACK", f"{__name__}.Remembered")
    theirs = Taming((32, 64), 1, 8, 32)
    torch.save({"state_dict": theirs.state_dict(), "callbacks": {Remembered: {"best": 1.0}}}, tmp_path / "last.ckpt")
    assert convert_taming(tmp_path / "last.ckpt", tmp_path / "vq").config.num_vq_embeddings == 32


class Remembered:
    pass


def test_other_files_are_refused_in_a_sentence(tmp_path):
    (tmp_path / "text.ckpt").write_text("no weights")
    with pytest.raises(ClipmatchError, match="can't be read as a checkpoint"):
        convert_taming(tmp_path / "text.ckpt", tmp_path / "vq")
    weights = Taming((32, 64), 1, 8, 32).state_dict()
    weights["quantize.embed.weight"] = weights.pop("quantize.embedding.weight")
    torch.save({"state_dict": weights}, tmp_path / "gumbel.ckpt")
    with pytest.raises(ClipmatchError, match=r"lacks quantize\.embedding\.weight"):
        convert_taming(tmp_path / "gumbel.ckpt", tmp_path / "vq")
    more = {**Taming((32, 64), 1, 8, 32).state_dict(), "colorize": torch.zeros(3)}
    torch.save({"state_dict": more}, tmp_path / "more.ckpt")
    with pytest.raises(ClipmatchError, match="no VQGAN of taming-transformers as it was published"):
        convert_taming(tmp_path / "more.ckpt", tmp_path / "vq")
