"""Which weights learn, how fast, and how the optimiser's state is kept.

In: a model and the settings. Out: an optimiser with a peak rate for each part; its state as named tensors, so that no
pickle is needed. Knows nothing of data or logs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from clipmatch.adapters import add_adapters
from clipmatch.config import ModelConfig, TrainConfig
from clipmatch.errors import ClipmatchError
from clipmatch.model import CLIPModel, Standardise, blocks_of, trained_part
from clipmatch.runtime import Precision

HALF_ATTENTION = "half"  # the name by which transformers knows half_attention
NARROWEST = 0.02  # of the spread of all features, added to that of each


def refuse_frozen_random(config: ModelConfig, settings: TrainConfig) -> None:
    """Heads of a new model on a frozen random tower learn next to nothing: say so instead."""
    for kind, tower, tune in (
        ("image", config.image_tower, settings.tune_image),
        ("text", config.text_tower, settings.tune_text),
    ):
        if isinstance(tower, dict) and tune != "all":
            raise ClipmatchError(f"The {kind} tower has no pretrained weights; train it whole (tune_{kind}='all').")


def prepare_towers(model: CLIPModel, settings: TrainConfig, device: torch.device, precision: Precision) -> int:
    """Set which weights of the towers learn and how they compute -> how many of the image tower's last blocks learn (0:
    none, or all).
    """
    image, text = model.image_encoder.backbone, model.text_encoder.backbone
    image_blocks = unfreeze(image, settings.tune_image, settings.lora)
    unfreeze(text, settings.tune_text, settings.lora)
    for backbone, tokens in ((image, image_tokens(model)), (text, model.config.max_length)):
        choose_attention(backbone, tokens, device, precision)
        if settings.gradient_checkpointing:
            save_memory(backbone)
    return image_blocks


def unfreeze(backbone: nn.Module, tune: int | str, lora: int = 0) -> int:
    """Set which weights of a tower learn, or with `lora` updates of that rank -> how many of its last blocks learn (0:
    none, or all).
    """
    if tune != "none" and not any(True for _ in backbone.parameters()):
        raise ClipmatchError("The towers of this model are ONNX graphs and stay; leave out --tune-image, --tune-text.")
    backbone.requires_grad_(tune == "all")
    if isinstance(tune, str):
        if lora and tune == "all":
            add_adapters(backbone, [backbone], lora)
        return 0
    blocks = blocks_of(backbone)
    if tune > len(blocks):
        raise ClipmatchError(f"The tower has {len(blocks)} blocks, fewer than the {tune} to tune; give all.")
    parts = trained_part(backbone, tune)
    for part in parts:
        part.requires_grad_(True)
    if lora:
        add_adapters(backbone, parts, lora)
    return tune


def choose_attention(backbone: nn.Module, tokens: int, device: torch.device, precision: Precision) -> None:
    """Short sequences learn faster on a CPU with plain attention, for the backward pass of PyTorch's fused kernel is
    slow there: about twice in float32, until at some 200 tokens the memory that it saves makes up for it. In bfloat16
    it takes a quarter of a step at 200 tokens; but what plain attention keeps grows with the square of their number.
    That of a ViT stays in bfloat16 throughout, which is half of what transformers' plain attention takes there.
    """
    half = precision.dtype is torch.bfloat16
    most = 260 if half else 128  # 16 x 16 patches and what stands before them
    if device.type != "cpu" or tokens > most or not hasattr(backbone, "set_attn_implementation"):
        return
    vit = backbone.config.model_type == "vit"  # type: ignore[union-attr]
    if half and vit:
        AttentionInterface.register(HALF_ATTENTION, half_attention)
        AttentionMaskInterface.register(HALF_ATTENTION, eager_mask)
    backbone.set_attn_implementation(HALF_ATTENTION if half and vit else "eager")  # type: ignore[operator]


def half_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of query, key and value [n, heads, tokens, h] -> ([n, tokens, heads, h], weights [n, heads, tokens,
    tokens]), all in their own precision.

    Autocast would turn the scores, the largest of all arrays here, to float32 for the softmax and back. The kernel adds
    up in float32 whatever it is given, and the query, not the scores, is scaled.
    """
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.matmul(query * scaling, key.transpose(2, 3))
        if attention_mask is not None:
            scores = scores + attention_mask.to(scores.dtype)
        weights = functional.dropout(scores.softmax(dim=-1), dropout, module.training)
        return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def image_tokens(model: CLIPModel) -> int:
    """How many tokens the image tower attends over; a large number if its config does not say."""
    config: Any = model.image_encoder.backbone.config
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return (size // patch) ** 2 + 1 if isinstance(size, int) and isinstance(patch, int) else 1_000


@torch.no_grad()
def standardise_input(layer: Standardise, rows: NDArray[Any]) -> None:
    """Set the mean and spread by which features are standardised: those of rows [n, h].

    It puts every new head at the same, well-conditioned start (data-dependent initialisation, Krähenbühl et al. 2016).
    """
    values = torch.from_numpy(np.asarray(rows, np.float32))
    layer.mean.copy_(values.mean(dim=0))
    spread = values.std(dim=0) + NARROWEST * values.std()  # a feature that hardly varies is not blown up
    layer.spread.copy_(spread.clamp(min=1e-6))  # nor is a tower that gives the same for everything


def save_memory(backbone: nn.Module) -> None:
    """Keep no activations inside blocks that learn; compute them again on the way back (Chen et al. 2016)."""
    if not any(parameter.requires_grad for parameter in backbone.parameters()):
        return
    # transformers renamed the method in version 5
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable()  # type: ignore[operator]


def describe_parameters(model: CLIPModel) -> str:
    """How many weights learn, for the log."""
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"{learning / 1e6:.2f} of {total / 1e6:.2f} million weights"


def build_optimizer(
    model: CLIPModel, settings: TrainConfig, logit_bias: nn.Parameter | None = None
) -> torch.optim.AdamW:
    """AdamW with a peak rate for each tower and the heads; no decay on norms, biases and the logit scale.

    logit_bias: of the loss rather than the model; it learns as the heads do.
    """
    rates = {"image": settings.rate_image, "text": settings.rate_text, "heads": settings.rate_heads}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in [*model.named_parameters(), ("logit_bias", logit_bias)]:
        if parameter is not None and parameter.requires_grad:
            part = name.split("_")[0] if ".backbone." in name else "heads"
            members.setdefault((part, parameter.ndim >= 2), []).append(parameter)
    groups = [
        {"params": parameters, "peak": rates[part], "lr": 0.0, "weight_decay": settings.weight_decay * decays}
        for (part, decays), parameters in sorted(members.items())
    ]
    fused = model.log_logit_scale.device.type in ("cpu", "cuda")  # one pass over the weights rather than ten
    return torch.optim.AdamW(groups, fused=fused)


class WeightAverage:
    """An exponential moving average of the weights that learn (Polyak and Juditsky 1992): steadier than the last ones.

    Its decay rises to `decay` over the first steps, so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.learning = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.values = {name: value.detach().clone() for name, value in self.learning.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step (1, 2, ...)."""
        decay = min(self.decay, step / (step + 9))
        for name, value in self.learning.items():
            self.values[name].lerp_(value, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context: the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the average."""
        for name, value in self.learning.items():
            current = value.clone()
            value.copy_(self.values[name])
            self.values[name].copy_(current)


def rate_at(step: int, total: int, warmup: float) -> float:
    """The learning rate's factor at a step: linear rise, then a cosine to zero (Loshchilov and Hutter 2017)."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Optimiser state -> named tensors and numbers, so that no pickle is needed."""
    tensors, numbers = {}, {}
    for number, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value.detach().cpu().contiguous()
            else:
                numbers[f"{number}.{name}"] = value
    return tensors, numbers


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
    """The reverse of `pack_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers.items()]:
        number, name = key.split(".", 1)
        # A copy: the file stays mapped otherwise, and some systems do not let a mapped file be replaced.
        state.setdefault(int(number), {})[name] = value.clone() if isinstance(value, Tensor) else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
