"""The vector-quantised autoencoder: pictures <-> a grid of codes, by `diffusers.VQModel`.

In: a folder or hub name of such a model, pictures [b, 3, h, h] in -1..1, or the numbers of codes. Out: the model, the
numbers, the pictures. Knows nothing of training, prompts or guides.

Letters: b pictures, h side in pixels; k codes of c numbers each, y side of the grid of codes, f = h / y.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor, nn

from clipmatch.errors import ClipmatchError, reason_of
from clipmatch.hub import hub_error, local_or_name, looks_local, offline
from clipmatch.modelfolder import CONFIG, fingerprint_of
from clipmatch.trust import check_folder

KIND = "VQModel"  # in a folder's config.json
VQ_WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_vqgan(name: str | Path) -> VQModel:
    """A folder or hub name of a `diffusers.VQModel` -> the model, frozen, in eval mode.

    Of a hub repository that holds several models, add the folder: OWNER/MODEL/FOLDER ("amused/amused-256/vqvae").
    Weights come from safetensors files only. Raises ClipmatchError when there is no such model.
    """
    source, within = local_or_name(str(name)), dict[str, Any]()
    local = Path(source).is_dir() or looks_local(source)
    if not local and source.count("/") == 2:
        source, folder = source.rsplit("/", 1)
        within = {"subfolder": folder}
    if local and not (Path(source) / CONFIG).is_file():
        raise ClipmatchError(f"{name} holds no VQGAN (it has no {CONFIG}); train one with: clipmatch train-vqgan")
    if local:
        check_folder(Path(source))
    try:
        within |= {"local_files_only": local or offline()}
        config: dict[str, Any] = VQModel.load_config(source, **within)
        if config.get("_class_name") != KIND:
            raise ClipmatchError(f"The model {name} is a {config.get('_class_name')}, not a {KIND}; name another.")
        model = VQModel.from_pretrained(source, use_safetensors=True, low_cpu_mem_usage=False, **within)
    except ClipmatchError:
        raise
    except Exception as error:  # diffusers, safetensors and the hub have no common base
        if local:
            reason = reason_of(error)
            raise ClipmatchError(f"The VQGAN in {name} is damaged ({reason}); copy or train it again.") from error
        raise hub_error(str(name), error) from error
    frozen: VQModel = work_in_pixels(model).eval().requires_grad_(False)
    return frozen


def small_vqgan(
    size: int = 64,
    channels: tuple[int, ...] = (64, 128),
    layers: int = 1,
    patch: int = 4,
    codes: int = 1024,
    code_width: int = 16,
) -> VQModel:
    """A new VQGAN with random weights, small enough to learn in minutes on a CPU; f = patch * 2 ** (len(channels) - 1).

    patch: side of the squares of pixels that become the channels of its first layer. A convolution at full size costs
    most and learns least.
    """
    count = len(channels)
    model = VQModel(
        in_channels=3 * patch**2,
        out_channels=3 * patch**2,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=channels[-1],
        sample_size=size,
        num_vq_embeddings=codes,
        norm_num_groups=8,
        vq_embed_dim=code_width,
    )
    return work_in_pixels(model)


def work_in_pixels(model: VQModel) -> VQModel:
    """Let a model whose channels are squares of pixels take and give pictures; any other stays as it is.

    As hooks, so that the weights keep their names and the folder is one of diffusers.
    """
    side = patch_of(model)
    if side > 1:
        model.encoder.register_forward_pre_hook(lambda _, given: (nn.functional.pixel_unshuffle(given[0], side),))
        model.decoder.register_forward_hook(lambda *passed: nn.functional.pixel_shuffle(passed[-1], side))
    return model


def patch_of(model: VQModel) -> int:
    """The side of the squares of pixels that a model takes as channels: 1 for one of three channels."""
    return math.isqrt(int(model.config.in_channels) // 3)


def pixels_per_code(model: VQModel) -> int:
    """How many pixels, along a side, a code stands for: f."""
    return patch_of(model) << (len(model.config.block_out_channels) - 1)


def nearest_codes(model: VQModel, latents: Tensor) -> Tensor:
    """Latents [b, c, y, y] -> the numbers of the nearest codes [b, y * y], row by row."""
    rows = latents.float().permute(0, 2, 3, 1).flatten(0, 2)  # [b * y * y, c]
    codes = model.quantize.embedding.weight.float()  # [k, c]
    # What each row has in common with all distances is left out: the order stays.
    distances = codes.square().sum(dim=1) - 2 * rows @ codes.T  # [b * y * y, k]
    nearest: Tensor = distances.argmin(dim=1).view(len(latents), -1)
    return nearest


@torch.no_grad()
def tokens_of(model: VQModel, pixels: Tensor) -> Tensor:
    """Pictures [b, 3, h, h] in -1..1 -> numbers of codes [b, y * y], row by row."""
    return nearest_codes(model, model.encode(pixels).latents)


@torch.no_grad()
def pictures_of(model: VQModel, tokens: Tensor) -> Tensor:
    """Numbers of codes [b, y * y] -> pictures [b, 3, h, h] in 0..1."""
    side = round(tokens.shape[1] ** 0.5)
    latents = model.quantize.embedding(tokens).transpose(1, 2).unflatten(2, (side, side))  # [b, c, y, y]
    return (decode_latents(model, latents).float() / 2 + 0.5).clamp(0, 1)


def decode_latents(model: VQModel, latents: Tensor) -> Tensor:
    """Latents [b, c, y, y] -> pictures [b, 3, h, h] in -1..1, as they are: none is put in the place of a code.

    (`VQModel.decode` would do that or, by some configs, take them for numbers of codes.)
    """
    guide = latents if model.config.norm_type == "spatial" else None
    pictures: Tensor = model.decoder(model.post_quant_conv(latents), guide)
    return pictures


def vqgan_fingerprint(folder: str | Path) -> str:
    """16 hex digits that change with the weights."""
    return fingerprint_of(sorted(Path(folder).glob("*.safetensors")), None)
