"""Peak memory of `clipmatch generate` with generators of the published sizes.

    python benchmarks/painting_memory.py [--json FILE] [--small]

Random weights of the published shapes: a VQGAN of taming-transformers' ImageNet model (f = 16) at 256 pixels and a
BigGAN-deep of 128, each guided by a ViT-B/32. The peak is that of the whole process, for one picture and for three.
"""

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from common import CLIPMATCH, machine, machine_line, run, table, write_json
from diffusers import VQModel
from safetensors.torch import save_file

from clipmatch.checkpoint import Checkpoint, save_checkpoint
from clipmatch.config import PreprocessConfig
from clipmatch.data import CaptionedImage
from clipmatch.demo_train import learn_tokenizer, small_model
from clipmatch.generation.biggan import BigGAN, BigGANConfig
from clipmatch.model import CLIPModel
from clipmatch.modelfolder import write_json as write_config
from clipmatch.preprocess import Transform

VIT_B32 = {
    "model_type": "vit",
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
PROMPT = "a red circle above a blue square"
STEPS = 2


def make_guide(folder, small):
    """A model of this package with a ViT-B/32 for its eyes."""
    tokenizer = learn_tokenizer([CaptionedImage(Path("a.png"), (PROMPT,))])
    config = small_model(tokenizer.vocab_size)
    if not small:
        config = replace(config, image_tower=VIT_B32)
    transform = Transform(PreprocessConfig(size=config.image_tower["image_size"]))
    save_checkpoint(Checkpoint(CLIPModel(config), tokenizer, transform), folder)


def make_vqgan(folder, small):
    """A VQModel of the shape of taming-transformers' ImageNet model of 1,024 codes."""
    widths = (32, 32) if small else (128, 128, 256, 256, 512)
    before = len(widths) - 1
    VQModel(
        down_block_types=("DownEncoderBlock2D",) * before + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * before,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=256,
        sample_size=32 if small else 256,
        num_vq_embeddings=1024,
        vq_embed_dim=256,
    ).save_pretrained(folder)


def make_biggan(folder, small):
    """A BigGAN-deep of 128 pixels."""
    config = BigGANConfig(channel_width=8) if small else BigGANConfig()
    folder.mkdir()
    save_file(BigGAN(config).state_dict(), folder / "model.safetensors")
    write_config(folder / "config.json", asdict(config))


def peak_of(folder, generator, pictures):
    """The peak, in MB, of the command that paints so many."""
    words = ["--guide", folder / "guide", "--generator", folder / generator, "--steps", STEPS, "--n", pictures]
    return run([CLIPMATCH, "generate", PROMPT, *words, "--out", folder / "painting.png"]).peak_mb


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it works")
    options = parser.parse_args()
    torch.manual_seed(0)
    kinds = {"VQGAN, 256 pixels": ("vqgan", make_vqgan), "BigGAN-deep, 128 pixels": ("biggan", make_biggan)}
    peaks = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_guide(folder / "guide", options.small)
        for name, (generator, make) in kinds.items():
            make(folder / generator, options.small)
            peaks[name] = {str(pictures): peak_of(folder, generator, pictures) for pictures in (1, 3)}
    on = machine("torch", "diffusers")
    print(machine_line(on))
    rows = [[name, *(f"{peak:,.0f} MB" for peak in found.values())] for name, found in peaks.items()]
    print(table(["generator", "one picture", "three pictures"], rows))
    write_json(options.json, {"machine": on, "steps": STEPS, "peak_mb": peaks})


if __name__ == "__main__":
    main()
