"""Train a VQGAN on any pictures.

In: a folder of pictures and a `VQConfig`. Out: a folder of `diffusers.VQModel` (config.json and weights), the run's
state in `last/`, log.jsonl, and sheets of held-out pictures above their reconstructions in `samples/`. Knows nothing of
captions or prompts.

Letters: b pictures, s side in pixels, k codes of c numbers, y side of the grid of codes, m = b * y * y rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from clipmatch.config import from_json, to_json
from clipmatch.crawl import list_images
from clipmatch.errors import ClipmatchError
from clipmatch.generation.looptools import adamw, generator_for, read_state, refuse_begun, run_steps
from clipmatch.generation.perceptual import FeatureDistance, PatchDiscriminator, load_distance
from clipmatch.generation.pixelstore import PIXELS, batch_rows, decode_pictures, open_pixels, picture_batch
from clipmatch.generation.settings import VQConfig
from clipmatch.generation.vqgan import decode_latents, load_vqgan, nearest_codes, pixels_per_code, small_vqgan
from clipmatch.runlog import note
from clipmatch.runtime import choose_device, choose_precision, reuse_memory, seed_everything
from clipmatch.training import absolute_name

HELD_OUT = 0.02  # of the pictures, for the figures and the sheets; 256 at most
SHEET = 8  # pictures on a sheet
DEV_BATCH = 32
FREE = 0.3  # of a new model's steps, in which latents are not rounded: codes found too soon know mean colours alone
CODE_DECAY = 0.95  # of the codes' moving averages
DEAD = 0.1  # a code used less than this part of the mean is put elsewhere


def train_vqgan(
    pictures: str | Path | list[Path],
    out: str | Path,
    config: VQConfig | None = None,
    *,
    model: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> bool:
    """Train a VQGAN into the folder `out` -> whether it is finished; False after Ctrl-C.

    pictures: a folder, or files. model: a VQGAN (folder or hub name) to go on from instead of a new one. resume: go on
    with the run in `out`, with its own settings. The losses are those of VQGAN (Esser et al., CVPR 2021); codes move to
    the mean of what is near them (van den Oord et al. 2017) and those that nothing is near begin anew elsewhere
    (Dhariwal et al. 2020). Raises ClipmatchError when there is nothing to learn from, or `out` does not fit.
    """
    out = Path(out)
    if resume:
        saved = read_state(out)["settings"]
        config, model = from_json(VQConfig, saved["config"]), saved["model"]
    else:
        refuse_begun(out)
    config = config or VQConfig()
    config = replace(config, perceptual=config.perceptual and absolute_name(config.perceptual))
    seed_everything(config.seed)
    reuse_memory()
    vqgan = load_vqgan(model).requires_grad_(True) if model else new_vqgan(config)
    if config.size % pixels_per_code(vqgan):
        raise ClipmatchError(f"The VQGAN {model} needs a --size that is a multiple of {pixels_per_code(vqgan)}.")
    # What can't be had is told before pictures are read.
    choose_precision(choose_device(config.device), config.precision)
    distance = load_distance(config.perceptual) if config.perceptual else None
    if not resume or not (out / PIXELS).is_file():  # what a failed start has left may be of other pictures
        paths = list_images(pictures) if isinstance(pictures, str | Path) else pictures
        decode_pictures(paths, config.size, out / PIXELS, progress)
    learner = VQLearner(vqgan, open_pixels(out / PIXELS, config.size), config, out, distance, new=model is None)
    note(
        f"training: {sum(value.numel() for value in vqgan.parameters()) / 1e6:.1f} million weights, "
        f"{config.size // pixels_per_code(vqgan)} x {config.size // pixels_per_code(vqgan)} codes a picture; "
        f"{len(learner.train)} pictures, {len(learner.dev)} held out; {learner.precision.reason}"
    )
    settings = {"config": to_json(config), "model": model}
    every = max(1, config.steps // 10)
    finished = run_steps(learner, out, config.steps, settings, resume=resume, look_every=every, progress=progress)
    vqgan.save_pretrained(out)
    return finished


def new_vqgan(config: VQConfig) -> VQModel:
    """A VQGAN of the settings' shape, with random weights."""
    shape = {name: getattr(config, name) for name in ("size", "channels", "layers", "patch", "codes", "code_width")}
    return small_vqgan(**shape)


class CodeAverage(nn.Module):
    """Codes as moving averages of the rows nearest to them. used [k]: rows a step; sums [k, c]: of those rows."""

    used: Tensor
    sums: Tensor

    def __init__(self, codes: Tensor):
        super().__init__()
        self.register_buffer("used", torch.ones(len(codes)))
        self.register_buffer("sums", codes.detach().clone())

    def begin(self, codes: Tensor, rows: Tensor, generator: torch.Generator) -> None:
        """Put all codes [k, c] on rows [m, c] drawn at random."""
        self.used.zero_()
        self.sums.zero_()
        self.update(codes, rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device), generator)

    @torch.no_grad()
    def update(self, codes: Tensor, rows: Tensor, nearest: Tensor, generator: torch.Generator) -> None:
        """Move codes [k, c], in place, by rows [m, c] and the number of the code that each is nearest to [m].

        A code that hardly any row is near takes the place of a row drawn at random.
        """
        used = torch.bincount(nearest, minlength=len(codes)).float()  # [k]
        self.used.lerp_(used, 1 - CODE_DECAY)
        self.sums.lerp_(torch.zeros_like(codes).index_add_(0, nearest, rows), 1 - CODE_DECAY)
        fair = len(rows) / len(codes)
        dead = (self.used < DEAD * fair).nonzero().flatten()
        places = rows[torch.randint(len(rows), (len(dead),), generator=generator).to(rows.device)]
        self.used[dead] = fair
        self.sums[dead] = places * fair
        codes.copy_(self.sums / self.used[:, None])


class VQLearner:
    """A VQGAN and what it learns by; see `run_steps`. new: whether it has not been trained before."""

    def __init__(
        self,
        model: VQModel,
        pixels: NDArray[np.uint8],
        config: VQConfig,
        out: Path,
        distance: FeatureDistance | None = None,
        new: bool = True,
    ):
        self.free = round(FREE * config.steps) if new else 0  # steps
        self.config, self.pixels, self.out = config, pixels, out
        self.device = choose_device(config.device)
        self.precision = choose_precision(self.device, config.precision)
        self.model = model.to(self.device).train()
        self.codes = model.quantize.embedding.weight.requires_grad_(False)  # they move by averages, not by gradients
        self.average = CodeAverage(self.codes).to(self.device)
        self.distance = distance.to(self.device) if distance else None
        order = np.random.default_rng(config.seed).permutation(len(pixels))
        held = min(256, max(1, round(HELD_OUT * len(pixels)))) if len(pixels) > 1 else 0
        self.dev, self.train = np.sort(order[:held]), order[held:]
        self.parts: dict[str, nn.Module] = {"vqgan": model, "average": self.average}
        self.optimizers: dict[str, Any] = {"vqgan": adamw(model, config.rate)}
        self.critic: PatchDiscriminator | None = None
        if config.adversarial:
            self.critic = PatchDiscriminator().to(self.device)
            self.parts["critic"] = self.critic
            self.optimizers["critic"] = adamw(self.critic, config.rate / 2, betas=(0.5, 0.9))

    def step(self, number: int) -> dict[str, float]:
        """One batch -> its losses."""
        config, draws = self.config, generator_for(self.config.seed, number)
        rows = self.train[batch_rows(len(self.train), config.batch_size, number, config.seed)]
        pictures = self.batch(rows)
        if config.flip:
            mirrored = torch.rand(len(pictures), generator=draws) < 0.5
            pictures[mirrored] = pictures[mirrored].flip(-1)
        with self.autocast():
            latents = self.model.encode(pictures).latents.float()  # [b, c, y, y]
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)  # [m, c]
        nearest, losses = None, {}
        if number >= self.free:
            if number == self.free > 0:
                self.average.begin(self.codes, flat.detach(), draws)
            nearest = nearest_codes(self.model, latents.detach())  # [b, y * y]
            found = self.codes[nearest].transpose(1, 2).view_as(latents)
            losses["commitment"] = nn.functional.mse_loss(latents, found) * config.commitment
            latents = latents + (found - latents).detach()  # the gradient passes as if nothing had been rounded
        with self.autocast():
            painted = decode_latents(self.model, latents).float()
        losses["pixels"] = (painted - pictures).abs().mean()
        if self.distance:
            with self.autocast():
                losses["perceptual"] = self.distance(painted, pictures) * config.perceptual_weight
        if self.critic and number >= config.steps // 3:
            losses["adversarial"] = self.critic.fooled(painted) * config.adversarial
        loss = torch.stack(list(losses.values())).sum()
        self.descend("vqgan", loss)
        if self.critic and number >= config.steps // 3:
            self.descend("critic", self.critic.told_apart(pictures, painted.detach()))
        if nearest is not None:
            self.average.update(self.codes, flat.detach(), nearest.flatten(), draws)
        return {"loss": float(loss.detach()), **{name: float(value.detach()) for name, value in losses.items()}}

    def descend(self, name: str, loss: Tensor) -> None:
        """A step of one of the optimisers."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([value for group in optimizer.param_groups for value in group["params"]], 1.0)
        optimizer.step()

    def batch(self, rows: NDArray[np.int64]) -> Tensor:
        """Numbers of pictures -> [b, 3, s, s] in -1..1."""
        pictures = picture_batch(self.pixels, rows).to(self.device)
        return pictures.to(memory_format=torch.channels_last)

    def autocast(self) -> Any:
        """Context: computing in the run's number type."""
        return torch.autocast(self.device.type, self.precision.dtype, enabled=self.precision.dtype is not None)

    @torch.no_grad()
    def look(self, number: int) -> dict[str, Any]:
        """Figures of the held-out pictures, and a sheet of some: the pictures above, their reconstructions below."""
        tokens, errors, sheet = [], [], Tensor()
        self.model.eval()
        for start in range(0, len(self.dev), DEV_BATCH):
            pictures = self.batch(self.dev[start : start + DEV_BATCH])
            latents = self.model.encode(pictures).latents
            tokens.append(nearest_codes(self.model, latents))
            found = self.codes[tokens[-1]].transpose(1, 2).view_as(latents)
            painted = decode_latents(self.model, latents if number <= self.free else found).clamp(-1, 1)
            errors.append((painted - pictures).square().mean(dim=(1, 2, 3)) / 4)  # of values in 0..1
            if not start:
                sheet = torch.cat([pictures[:SHEET], painted[:SHEET]])
        self.model.train()
        if not tokens:  # a single picture
            return {}
        used = torch.cat(tokens)
        save_sheet(sheet / 2 + 0.5, self.out / "samples" / f"step-{number:06}.png", columns=len(sheet) // 2)
        return {
            "dev_psnr": float(-10 * torch.cat(errors).mean().log10()),  # decibels
            "dev_perplexity": perplexity(used, len(self.codes)),
            "dev_codes_used": int((torch.bincount(used.flatten()) > 0).sum()),
        }


def perplexity(tokens: Tensor, codes: int) -> float:
    """Numbers of codes, any shape -> exp of the entropy of their use: between 1 and `codes`."""
    shares = torch.bincount(tokens.flatten(), minlength=codes) / tokens.numel()
    return float(torch.special.entr(shares).sum().exp())


def save_sheet(pictures: Tensor, path: Path, columns: int) -> None:
    """Pictures [n, 3, s, s] in 0..1, row by row -> one PNG with a narrow white gap between them."""
    count, _, height, width = pictures.shape
    gap = 2
    sheet = np.full(((height + gap) * -(-count // columns) - gap, (width + gap) * columns - gap, 3), 255, np.uint8)
    values = (pictures.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for place, picture in enumerate(values):
        row, column = divmod(place, columns)
        top, left = row * (height + gap), column * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
