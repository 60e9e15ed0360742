"""Weights of taming-transformers' VQGANs for `diffusers.VQModel`: a checkpoint file -> a folder.

In: a checkpoint file of its VQModel, such as the published ones for ImageNet (f = 16, with 1,024 or 16,384 codes). Out:
a folder that `load_vqgan` reads. Both programs compute the same; only names, the order of the decoder's levels and the
shape of attention's weights differ. Knows nothing of training. The original package is not needed.

Nothing of the file but tensors and plain values is read (`weights_only`), so it can run no code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor

from clipmatch.errors import ClipmatchError, reason_of

TRAINED_SIZE = 256  # pixels, of all published ones; a file does not say it
CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"  # the files mention it among the tensors
RENAMED = (  # applied in this order
    (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.(down|up)\.(\d+)\.attn\.(\d+)\.", r".\1_blocks.\2.attentions.\3."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


class Ignored:
    """Stands where a file mentions a class of its training program."""


def convert_taming(file: str | Path, out: str | Path) -> VQModel:
    """A checkpoint file -> the model, saved in the folder `out`. Raises ClipmatchError if it is of another kind."""
    weights = read_taming(Path(file))
    try:
        model = VQModel(**config_of(weights))
        model.load_state_dict(rename(weights))
    except (LookupError, RuntimeError, ValueError) as error:
        raise ClipmatchError(
            f"The file {file} is no VQGAN of taming-transformers as it was published ({reason_of(error)})."
        ) from error
    model.save_pretrained(out)
    return model


def read_taming(file: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint file by taming's names, without those of its losses."""
    try:
        with torch.serialization.safe_globals([(Ignored, CALLBACK)]):
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
        weights: dict[str, Tensor] = content.get("state_dict", content)
    except Exception as error:  # an unpickler has about ten kinds
        raise ClipmatchError(f"The file {file} can't be read as a checkpoint ({reason_of(error)}).") from error
    weights = {name: value for name, value in weights.items() if not name.startswith("loss.")}
    missing = {"encoder.conv_in.weight", "decoder.conv_out.weight", "quantize.embedding.weight"} - weights.keys()
    if missing:
        raise ClipmatchError(
            f"The file {file} is no VQGAN of taming-transformers with a plain codebook: it lacks {min(missing)}."
        )
    return weights


def config_of(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The shape of the model, from that of its weights -> keywords for `VQModel`."""
    levels = deepest(weights) + 1
    widths = [weights[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)]
    attending = [f"encoder.down.{level}.attn.0.q.weight" in weights for level in range(levels)]
    codes, code_width = weights["quantize.embedding.weight"].shape
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "down_block_types": tuple("AttnDownEncoderBlock2D" if there else "DownEncoderBlock2D" for there in attending),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if there else "UpDecoderBlock2D" for there in attending[::-1]),
        "block_out_channels": tuple(widths),
        "layers_per_block": sum(bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.bias", x)) for x in weights),
        "latent_channels": weights["encoder.conv_out.weight"].shape[0],
        "sample_size": TRAINED_SIZE,
        "num_vq_embeddings": codes,
        "vq_embed_dim": code_width,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
    }


def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Taming's names -> those of diffusers. Attention's weights [c, c, 1, 1] become [c, c]."""
    last = deepest(weights)
    renamed = {}
    for name, value in weights.items():
        # Taming counts the decoder's levels as the encoder's, diffusers in the order in which they are passed.
        name = re.sub(r"^decoder\.up\.(\d+)", lambda found: f"decoder.up.{last - int(found[1])}", name)
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        linear = ".attentions." in name and value.ndim == 4
        renamed[name] = value[:, :, 0, 0] if linear else value
    return renamed


def deepest(weights: dict[str, Tensor]) -> int:
    """The number of the encoder's last level."""
    found = (re.match(r"encoder\.down\.(\d+)\.", name) for name in weights)
    return max(int(match[1]) for match in found if match)
