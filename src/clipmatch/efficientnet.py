"""EfficientNet-Lite as a Hugging Face backbone: a small convolutional image tower for CPUs and int8.

In: pixels [b, 3, s, s]. Out: feature maps [b, 1280, s / 32, s / 32] as `last_hidden_state`. Knows nothing of texts or
heads. Importing it makes `{"model_type": "efficientnet_lite", ...}` a tower like any other.

EfficientNet (Tan and Le 2019) without squeeze-and-excitation and with ReLU6, which makes it exact in eight bits
(github.com/tensorflow/tpu, efficientnet/lite). Batch norms are folded into the convolutions: as a pretrained tower it
has no statistics to learn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu6
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# Blocks of a stage, kernel size, stride of its first block, expansion, channels out: the same for all sizes but scaled.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM = 32  # channels
WIDTH = 1280  # channels of the last layer


class EfficientNetLiteConfig(PretrainedConfig):  # type: ignore[misc]
    """Lite0: 1.0, 1.0, 224 pixels; Lite1: 1.0, 1.1, 240; Lite2: 1.1, 1.2, 260."""

    model_type = "efficientnet_lite"

    def __init__(self, width: float = 1.0, depth: float = 1.0, image_size: int = 224, **values: Any):
        super().__init__(**values)
        self.width, self.depth, self.image_size = width, depth, image_size
        self.hidden_size = WIDTH


class SameConv(nn.Conv2d):
    """A convolution that gives input size / stride, rounded up, with TensorFlow's padding: the odd row at the end."""

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, y, x] -> [b, c', y / stride, x / stride]."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        sides = []
        for size in (x.shape[-1], x.shape[-2]):
            missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            sides += [missing // 2, missing - missing // 2]
        return super().forward(pad(x, sides) if any(sides) else x)


class InvertedBottleneck(nn.Module):
    """Widen, filter each channel, narrow; added to the input where shapes allow (Sandler et al. 2018)."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = before * expansion
        self.expand = SameConv(before, wide, 1) if expansion > 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, after, 1)
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, y, x] -> [b, c', y / stride, x / stride]."""
        wide = x if self.expand is None else relu6(self.expand(x))
        narrow: Tensor = self.project(relu6(self.depthwise(wide)))
        return x + narrow if self.residual else narrow


class EfficientNetLiteModel(PreTrainedModel):  # type: ignore[misc]
    """The backbone: stem, blocks, a last 1x1 convolution."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    _no_split_modules = ("InvertedBottleneck",)

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.embeddings = nn.Sequential(SameConv(3, STEM, 3, 2), nn.ReLU6())
        self.layers = nn.ModuleList(make_blocks(config))
        self.head = nn.Sequential(SameConv(round_channels(STAGES[-1][-1], config.width), WIDTH, 1), nn.ReLU6())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Pixels [b, 3, s, s] -> last_hidden_state [b, 1280, s / 32, s / 32], values 0..6."""
        x = self.embeddings(pixel_values)
        for block in self.layers:
            x = block(x)
        return BaseModelOutput(last_hidden_state=self.head(x))


def make_blocks(config: EfficientNetLiteConfig) -> list[InvertedBottleneck]:
    """All blocks in order; the Lite family scales neither the stem nor the depth of the first and last stage."""
    blocks, before = [], STEM
    for number, (repeats, kernel, stride, expansion, channels) in enumerate(STAGES):
        after = round_channels(channels, config.width)
        inner = number not in (0, len(STAGES) - 1)
        for place in range(math.ceil(repeats * config.depth) if inner else repeats):
            blocks.append(InvertedBottleneck(before, after, kernel, stride if place == 0 else 1, expansion))
            before = after
    return blocks


def round_channels(channels: int, width: float) -> int:
    """Scaled to the nearest multiple of 8, at most a tenth below the exact value."""
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


@torch.no_grad()
def fold_batch_norm(weight: Tensor, norm: dict[str, Tensor], epsilon: float) -> tuple[Tensor, Tensor]:
    """A convolution's weight [c', c, k, k] and the batch norm after it -> weight and bias of one convolution."""
    scale = norm["weight"] / torch.sqrt(norm["running_var"] + epsilon)
    return weight * scale[:, None, None, None], norm["bias"] - norm["running_mean"] * scale


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)
