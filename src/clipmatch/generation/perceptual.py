"""What a VQGAN is judged by beside its pixels: features of a frozen image tower, and a discriminator of patches.

In: pictures [b, 3, s, s] in -1..1, painted and real. Out: losses. Knows nothing of codes or training loops.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipmatch.checkpoint import load_checkpoint, load_preprocessing
from clipmatch.config import PreprocessConfig
from clipmatch.model import as_tokens, build_backbone
from clipmatch.modelfolder import CONFIG, FORMAT, find_local, hub_config, is_hub_name, kind_of


class FeatureDistance(nn.Module):
    """How differently a frozen tower sees two pictures, over all its layers: the mean squared difference of unit hidden
    states (LPIPS without learnt weights; Zhang et al., CVPR 2018).
    """

    mean: Tensor  # [3, 1, 1]
    std: Tensor

    def __init__(self, backbone: nn.Module, preprocess: PreprocessConfig):
        super().__init__()
        self.backbone, self.size = backbone.eval().requires_grad_(False), preprocess.size
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(preprocess, name)).view(3, 1, 1))

    def features(self, pictures: Tensor) -> list[Tensor]:
        """[b, 3, s, s] in -1..1 -> unit hidden states [b, t, h] of each layer."""
        if pictures.shape[-1] != self.size:
            pictures = nn.functional.interpolate(pictures, size=self.size, mode="bilinear", antialias=True)
        values = (pictures / 2 + 0.5 - self.mean) / self.std
        output: Any = self.backbone(pixel_values=values, output_hidden_states=True)
        return [nn.functional.normalize(as_tokens(hidden), dim=-1) for hidden in output.hidden_states[1:]]

    def forward(self, painted: Tensor, real: Tensor) -> Tensor:
        """Two batches [b, 3, s, s] -> their mean distance."""
        with torch.no_grad():
            wanted = self.features(real)
        pairs = zip(self.features(painted), wanted, strict=True)
        layers = [(mine - other).square().sum(dim=-1).mean() for mine, other in pairs]
        return torch.stack(layers).mean()


def load_distance(name: str | Path) -> FeatureDistance:
    """A model of ours (folder, run, hub name) or an image tower of the hub (name or folder) -> the distance by it.

    Raises ClipmatchError if there is no such model, or it has no PyTorch weights.
    """
    local = find_local(name)
    config = local / CONFIG if local else hub_config(str(name)) if is_hub_name(name) else None
    if config and kind_of(config) != FORMAT:
        return FeatureDistance(build_backbone(str(name)), load_preprocessing(str(name)))
    checkpoint = load_checkpoint(name)
    return FeatureDistance(checkpoint.model.image_encoder.backbone, checkpoint.transform.config)


class PatchDiscriminator(nn.Module):
    """Tells real patches of pictures from painted ones (Isola et al., CVPR 2017), by the hinge loss."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        """[b, 3, s, s] -> how real each patch looks [b, 1, s / 8, s / 8]."""
        scores: Tensor = self.layers(pictures)
        return scores

    def fooled(self, painted: Tensor) -> Tensor:
        """The painter's loss; the discriminator does not learn from it."""
        self.requires_grad_(False)
        loss: Tensor = -self(painted).mean()
        self.requires_grad_(True)
        return loss

    def told_apart(self, real: Tensor, painted: Tensor) -> Tensor:
        """The discriminator's own loss."""
        relu = nn.functional.relu
        loss: Tensor = (relu(1 - self(real)).mean() + relu(1 + self(painted)).mean()) / 2
        return loss
