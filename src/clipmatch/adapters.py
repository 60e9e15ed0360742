"""Low-rank adapters: a tower learns small updates of its linear layers, while its own weights stay as they are.

In: a backbone and the parts of it that are to learn. Out: the backbone with adapters inside, and its state as if there
were none, so that a model folder stays plain. Knows nothing of training or files.

LoRA (Hu et al. 2021), by peft. It saves the memory of gradients and of the optimiser's state, and holds back a large
tower that would learn a small data set by heart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clipmatch.errors import ClipmatchError

SCALE = 2  # of an update, times the rank: LoRA's alpha as it is usually chosen
NAME = "default"  # peft's, of the only adapter


def add_adapters(backbone: nn.Module, parts: Iterable[nn.Module], rank: int) -> None:
    """Let the linear layers of some parts of a backbone learn updates of this rank, and nothing else of it.

    Raises ClipmatchError when the parts have no linear layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    inside = {id(module) for part in parts for module in part.modules()}
    linear = [
        name for name, module in backbone.named_modules() if isinstance(module, nn.Linear) and id(module) in inside
    ]
    if not linear:
        raise ClipmatchError(
            f"{type(backbone).__name__} has no linear layers that LoRA could update; leave out --lora."
        )
    backbone.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=linear), backbone)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


@torch.no_grad()
def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with each adapter's update added to its layer: that of a model without adapters."""
    state = dict(model.state_dict())
    for name, layer in adapted_layers(model).items():
        for key in [key for key in state if key.startswith(f"{name}.")]:
            value = state.pop(key)
            if key.startswith(f"{name}.base_layer."):
                state[key.replace(".base_layer.", ".")] = value
        state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight(NAME)
    return state


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What `plain_state` adds up, apart: added up, it could not be told apart again to the last bit."""
    names = adapted_layers(model)
    state = model.state_dict()
    return {key: value.cpu() for key, value in state.items() if any(key.startswith(f"{name}.") for name in names)}


def restore_adapters(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put the tensors of `adapter_state` back."""
    missing, unknown = model.load_state_dict(state, strict=False)
    if unknown or {key for key in missing if ".lora_" in key}:
        raise ClipmatchError("The saved adapters do not fit the model; start a new run.")
