"""BigGAN-deep: noise and a class -> a picture, with the published weights.

In: a folder with the weights as the PyTorch conversions of DeepMind's release have them (config.json and
pytorch_model.bin or model.safetensors; 128, 256 or 512 pixels), then noise and class vectors. Out: pictures. Knows
nothing of prompts or models that judge.

The generator is that of Brock et al., "Large Scale GAN Training for High Fidelity Natural Image Synthesis" (ICLR 2019):
noise and the class's vector, side by side, set scale and shift of every batch norm. Weights were normalised by their
largest singular value; here they are divided by it once, when they are read.

Letters: b pictures, l layers that take a condition, z numbers of noise, e of a class's vector, v both together;
c channels, h side of a feature map, m classes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from clipmatch.errors import ClipmatchError, reason_of
from clipmatch.modelfolder import CONFIG, WEIGHTS, fingerprint_of
from clipmatch.trust import check_folder

PICKLED = "pytorch_model.bin"  # of which nothing but tensors is read
FAR = 2.0  # noise beyond it was never drawn for a published sample
SURE = 8.0  # logit of the class that a painting begins with, above the others' mean: most of the weight of 1,000


@dataclass(frozen=True)
class BigGANConfig:
    """config.json of the published models; the defaults are those of 128 pixels."""

    output_dim: int = 128  # side of a picture
    z_dim: int = 128  # z
    class_embed_dim: int = 128  # e
    channel_width: int = 128
    num_classes: int = 1000  # m
    # of each block: whether it doubles the side; channels in and out, in channel widths
    layers: tuple[tuple[bool, int, int], ...] = (
        (False, 16, 16),
        (True, 16, 16),
        (False, 16, 16),
        (True, 16, 8),
        (False, 8, 8),
        (True, 8, 4),
        (False, 4, 4),
        (True, 4, 2),
        (False, 2, 2),
        (True, 2, 1),
    )
    attention_layer_position: int = 8  # in front of this block
    eps: float = 1e-4  # in batch norms
    n_stats: int = 51  # truncations from 0 to 1 for which batch norms know means and variances

    @property
    def condition(self) -> int:
        """Width v of a condition."""
        return self.z_dim + self.class_embed_dim


class StoredStatistics(nn.Module):
    """The means and variances of a batch norm, for truncations evenly spaced from 0 to 1."""

    running_means: Tensor  # [n_stats, c]
    running_vars: Tensor

    def __init__(self, channels: int, config: BigGANConfig):
        super().__init__()
        self.eps = config.eps
        self.register_buffer("running_means", torch.zeros(config.n_stats, channels))
        self.register_buffer("running_vars", torch.ones(config.n_stats, channels))

    def standardise(self, maps: Tensor, truncation: float) -> Tensor:
        """Feature maps [b, c, h, h] -> the same less the mean, over the spread; between two truncations, in between."""
        place = truncation * (len(self.running_means) - 1)
        low, part = min(int(place), len(self.running_means) - 2), place - min(int(place), len(self.running_means) - 2)
        mean = torch.lerp(self.running_means[low], self.running_means[low + 1], part)
        variance = torch.lerp(self.running_vars[low], self.running_vars[low + 1], part)
        return (maps - spread(mean)) / spread((variance + self.eps).sqrt())


class ConditionalNorm(StoredStatistics):
    """A batch norm whose scale and shift are linear in the condition."""

    def __init__(self, channels: int, config: BigGANConfig):
        super().__init__(channels, config)
        self.scale = nn.Linear(config.condition, channels, bias=False)
        self.offset = nn.Linear(config.condition, channels, bias=False)

    def forward(self, maps: Tensor, condition: Tensor, truncation: float) -> Tensor:
        """Feature maps [b, c, h, h], condition [b, v] -> [b, c, h, h]."""
        scale, offset = spread(1 + self.scale(condition)), spread(self.offset(condition))
        return self.standardise(maps, truncation) * scale + offset


class PlainNorm(StoredStatistics):
    """A batch norm with a scale and a shift of its own."""

    def __init__(self, channels: int, config: BigGANConfig):
        super().__init__(channels, config)
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, maps: Tensor, truncation: float) -> Tensor:
        """[b, c, h, h] -> [b, c, h, h]."""
        return self.standardise(maps, truncation) * spread(self.weight) + spread(self.bias)


def spread(values: Tensor) -> Tensor:
    """[c] or [b, c] -> [..., c, 1, 1], to be applied to feature maps."""
    return values[..., None, None]


class Block(nn.Module):
    """A residual block: four convolutions, narrow in between; the way around drops channels and copies pixels."""

    def __init__(self, doubles: bool, before: int, after: int, config: BigGANConfig):
        super().__init__()
        self.doubles, self.after = doubles, after
        narrow = before // 4
        self.bn_0, self.conv_0 = ConditionalNorm(before, config), nn.Conv2d(before, narrow, 1)
        self.bn_1, self.conv_1 = ConditionalNorm(narrow, config), nn.Conv2d(narrow, narrow, 3, padding=1)
        self.bn_2, self.conv_2 = ConditionalNorm(narrow, config), nn.Conv2d(narrow, narrow, 3, padding=1)
        self.bn_3, self.conv_3 = ConditionalNorm(narrow, config), nn.Conv2d(narrow, after, 1)

    def forward(self, maps: Tensor, condition: Tensor, truncation: float) -> Tensor:
        """[b, c, h, h], condition [b, v] -> [b, after, h, h], or twice the side."""
        inner = self.conv_0(self.bn_0(maps, condition, truncation).relu())
        inner = self.doubled(self.bn_1(inner, condition, truncation).relu())
        inner = self.conv_1(inner)
        inner = self.conv_2(self.bn_2(inner, condition, truncation).relu())
        inner = self.conv_3(self.bn_3(inner, condition, truncation).relu())
        around: Tensor = inner + self.doubled(maps[:, : self.after])
        return around

    def doubled(self, maps: Tensor) -> Tensor:
        """Each pixel four times, [b, c, 2 h, 2 h], in a block that doubles the side."""
        return nn.functional.interpolate(maps, scale_factor=2, mode="nearest") if self.doubles else maps


class SelfAttention(nn.Module):
    """Places look at places of a map of half the side (Zhang et al., Self-Attention GAN, ICML 2019)."""

    def __init__(self, channels: int):
        super().__init__()
        self.snconv1x1_theta = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.snconv1x1_phi = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.snconv1x1_g = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.snconv1x1_o_conv = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Tensor) -> Tensor:
        """[b, c, h, h] -> [b, c, h, h]."""
        query = self.snconv1x1_theta(maps).flatten(2)  # [b, c/8, h*h]
        key, value = (
            nn.functional.max_pool2d(layer(maps), 2).flatten(2) for layer in (self.snconv1x1_phi, self.snconv1x1_g)
        )  # [b, c/8 or c/2, h*h/4]
        weights = (query.transpose(1, 2) @ key).softmax(dim=-1)  # [b, h*h, h*h/4]
        seen = (value @ weights.transpose(1, 2)).unflatten(2, maps.shape[2:])  # [b, c/2, h, h]
        attended: Tensor = maps + self.gamma * self.snconv1x1_o_conv(seen)
        return attended


class Generator(nn.Module):
    """Conditions -> pictures."""

    def __init__(self, config: BigGANConfig):
        super().__init__()
        width = config.channel_width
        self.gen_z = nn.Linear(config.condition, 4 * 4 * config.layers[0][1] * width)
        self.layers = nn.ModuleList()
        for number, (doubles, before, after) in enumerate(config.layers):
            if number == config.attention_layer_position:
                self.layers.append(SelfAttention(before * width))
            self.layers.append(Block(doubles, before * width, after * width, config))
        self.bn = PlainNorm(config.layers[-1][2] * width, config)
        self.conv_to_rgb = nn.Conv2d(config.layers[-1][2] * width, 3, 3, padding=1)

    def forward(self, conditions: Tensor, truncation: float) -> Tensor:
        """[b, l, v], one for the first map and one for each block -> pictures [b, 3, h, h] in -1..1."""
        each = iter(conditions.unbind(dim=1))
        maps = self.gen_z(next(each)).unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)  # [b, c, 4, 4]
        for layer in self.layers:
            maps = layer(maps, next(each), truncation) if isinstance(layer, Block) else layer(maps)
        pictures: Tensor = self.conv_to_rgb(self.bn(maps, truncation).relu()).tanh()
        return pictures


class BigGAN(nn.Module):
    """Noise [b, l, z] and weights of classes [b, l, m], one for each of l layers -> pictures [b, 3, h, h] in -1..1."""

    def __init__(self, config: BigGANConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.Linear(config.num_classes, config.class_embed_dim, bias=False)
        self.generator = Generator(config)

    def forward(self, noise: Tensor, classes: Tensor, truncation: float) -> Tensor:
        """Paint. truncation in 0..1: whose statistics the batch norms take; noise is to be scaled by it before."""
        conditions = torch.cat([noise, self.embeddings(classes)], dim=-1)  # [b, l, v]
        pictures: Tensor = self.generator(conditions, truncation)
        return pictures


# Reading the weights


def load_biggan(folder: Path) -> BigGAN:
    """A folder with config.json and weights -> the generator, in eval mode. No code of a pickle is run.

    Raises ClipmatchError when a file is missing, damaged, or not of such a model.
    """
    check_folder(folder)
    try:
        config = parse_config(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        with torch.device("meta"):  # nothing is drawn that the weights replace at once
            model = BigGAN(config)
        model.load_state_dict(folded(read_weights(folder)), assign=True)
    except Exception as error:  # safetensors, PyTorch and its reader of old files have about ten kinds
        raise ClipmatchError(
            f"The folder {folder} holds no BigGAN-deep that can be read ({reason_of(error)}); copy it again, with "
            f"{CONFIG} and {WEIGHTS} or {PICKLED}."
        ) from error
    return model.eval()


def parse_config(values: dict[str, Any]) -> BigGANConfig:
    """config.json -> BigGANConfig. Raises ValueError, TypeError or KeyError for that of another model."""
    values = {field.name: values[field.name] for field in fields(BigGANConfig)}
    layers = tuple((bool(doubles), int(before), int(after)) for doubles, before, after in values.pop("layers"))
    return BigGANConfig(layers=layers, **values)


def weights_of(folder: Path) -> Path:
    """The file with the weights."""
    return folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder / PICKLED


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, by their published names."""
    path = weights_of(folder)
    if path.name == WEIGHTS:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def folded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors -> those of `BigGAN`: each matrix over its largest singular value, of which the left and right
    vectors are stored with it; of the last layer, whose other channels nobody looks at, red, green and blue.
    """
    plain = {name: value for name, value in state.items() if not name.endswith(("_orig", "_u", "_v"))}
    for name in [name for name in state if name.endswith(".weight_orig")]:
        stem = name.removesuffix("_orig")
        left, right = state[f"{stem}_u"], state[f"{stem}_v"]
        plain[stem] = state[name] / (left @ (state[name].flatten(1) @ right))
    for name in ("generator.conv_to_rgb.weight", "generator.conv_to_rgb.bias"):
        plain[name] = plain[name][:3].clone()
    return plain


# Painting with it


class BigGANCanvas:
    """A canvas of noise [n, l, z] and logits of classes [n, l, m], a row for each layer.

    Rows of their own for each layer let a painting take the outline of one class and the texture of another; a mixture
    of classes (softmax) stays between what the generator has learnt. truncation in (0, 1]: less gives plainer pictures.
    """

    kind = "BigGAN"
    tries = 16  # it begins with a class; one of a thousand would seldom be near

    def __init__(
        self, model: BigGAN, fingerprint: str = "", device: torch.device | None = None, truncation: float = 1.0
    ):
        self.device = device or torch.device("cpu")
        self.model = model.to(self.device).requires_grad_(False)
        self.fingerprint, self.truncation, self.side = fingerprint, truncation, model.config.output_dim
        self.facts = {"truncation": truncation}
        self.rates = [0.05, 0.3]

    def start(self, n: int, size: int, seed: int) -> list[Tensor]:
        """Noise and one class for each picture, the same in all layers. Raises ClipmatchError for another size."""
        if size != self.side:
            raise ClipmatchError(f"This BigGAN paints pictures of {self.side} pixels; leave out the size.")
        config = self.model.config
        generator = torch.Generator().manual_seed(seed)
        noise = torch.nn.init.trunc_normal_(torch.empty(n, 1, config.z_dim), a=-FAR, b=FAR, generator=generator)
        logits = torch.randn(n, 1, config.num_classes, generator=generator)
        chosen = torch.randint(config.num_classes, (n, 1, 1), generator=generator)
        logits.scatter_(2, chosen, SURE + math.log(config.num_classes / 1000))
        rows = 1 + len(config.layers)  # l
        return [latent.repeat(1, rows, 1).to(self.device) for latent in (noise, logits)]

    def from_picture(self, image: Image.Image, n: int, size: int, strength: float) -> list[Tensor]:
        """Raises ClipmatchError: there is no way back from a picture."""
        raise ClipmatchError(
            "A BigGAN can't begin with a picture; begin with a VQGAN's, or name the picture in the prompt."
        )

    def paint(self, latents: list[Tensor]) -> Tensor:
        """[n, l, z] and [n, l, m] -> pictures [n, 3, h, h] in 0..1."""
        noise, logits = latents
        pictures: Tensor = self.model(noise * self.truncation, logits.softmax(dim=-1), self.truncation)
        return pictures / 2 + 0.5

    def settle(self, latents: list[Tensor]) -> None:
        """No noise beyond what was drawn in training's samples."""
        latents[0].clamp_(-FAR, FAR)


def biggan_canvas(folder: Path, device: torch.device, truncation: float) -> BigGANCanvas:
    """A folder as for `load_biggan` -> a canvas."""
    model = load_biggan(folder)
    return BigGANCanvas(model, fingerprint_of([weights_of(folder)], None), device, truncation)
