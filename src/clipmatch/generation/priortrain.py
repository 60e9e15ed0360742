"""Train a prior on captioned pictures, or on pictures alone.

In: rows of pictures and captions, a VQGAN, a guide, a `PriorConfig` in the making. Out: a folder with the prior
(config.json, model.safetensors), the run's state in `last/`, log.jsonl, and sheets of held-out prompts in `samples/`.
Knows nothing of how the VQGAN and the guide learnt.

A guide puts a caption near to its pictures, but not where they are (the modality gap). So the prior learns from both:
from captions as they are, and from pictures' own rows with noise, which stand in for captions that nobody wrote (as in
LAFITE, Zhou et al., CVPR 2022, and CapDec, Nukrai et al., EMNLP 2022). Without captions the noise alone must do.

Letters: b pictures, t tokens, k codes, d embedding width, m captions in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from clipmatch.config import from_json, to_json
from clipmatch.data import CaptionedImage
from clipmatch.embedder import BatchedEmbedder
from clipmatch.errors import ClipmatchError
from clipmatch.generation.looptools import adamw, generator_for, read_state, refuse_begun, run_steps
from clipmatch.generation.pixelstore import PIXELS, batch_rows, decode_pictures, open_pixels, picture_batch
from clipmatch.generation.prior import Prior, PriorConfig, save_prior
from clipmatch.generation.settings import PriorTraining
from clipmatch.generation.vqgan import load_vqgan, pictures_of, pixels_per_code, tokens_of, vqgan_fingerprint
from clipmatch.generation.vqtrain import save_sheet
from clipmatch.runlog import note
from clipmatch.runtime import choose_device, choose_precision, reuse_memory, seed_everything

HELD_OUT = 0.02  # of the pictures, for the figures and the sheets; 256 at most
SHEET = 8  # prompts on a sheet
DEV_DRAWS = 1 << 40  # the number of a step that no run comes to: its random numbers are for held-out pictures
ROWS = "rows.safetensors"  # what is computed once: tokens, embeddings


@dataclass(frozen=True, eq=False)
class PriorData:
    """tokens [n, t]; pictures [n, d]: the guide's rows; captions [m, d], those of picture i from first[i] on up to
    first[i + 1].
    """

    tokens: Tensor
    pictures: Tensor
    captions: Tensor
    first: Tensor


def train_prior(
    rows: Sequence[CaptionedImage],
    vqgan: str | Path,
    guide: BatchedEmbedder,
    out: str | Path,
    settings: PriorTraining | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> bool:
    """Train a prior into the folder `out` -> whether it is finished; False after Ctrl-C.

    rows: pictures with their captions, which may be empty. vqgan: folder or hub name. resume: go on with the run in
    `out`, with its own settings. Raises ClipmatchError when there is nothing to learn from, or `out` does not fit.
    """
    out = Path(out)
    if resume:
        saved = read_state(out)["settings"]
        settings = from_json(PriorTraining, saved["training"])
        for name, fingerprint in (("guide", guide.fingerprint), ("vqgan", vqgan_fingerprint(vqgan))):
            if saved.get(name, fingerprint) != fingerprint:
                raise ClipmatchError(f"The run in {out} began with another {name} ({saved[name]}); name that one.")
    else:
        refuse_begun(out)
    settings = settings or PriorTraining()
    seed_everything(settings.seed)
    reuse_memory()
    # What can't be had is told before pictures are read.
    choose_precision(choose_device(settings.device), settings.precision)
    codes = load_vqgan(vqgan)
    shape = {name: getattr(settings, name) for name in ("width", "local_width", "layers", "heads")}
    book = codes.quantize.embedding.weight
    config = PriorConfig(
        tokens=(int(codes.config.sample_size) // pixels_per_code(codes)) ** 2,
        codes=len(book),
        code_width=book.shape[1],
        embed_dim=guide.dim,
        guide=guide.fingerprint,
        vqgan=vqgan_fingerprint(vqgan),
        **shape,
    )
    if not resume or not (out / ROWS).is_file():  # what a failed start has left may be of other models
        write_rows(rows, codes, guide, out, progress)
    data = PriorData(**load_file(out / ROWS))
    learner = PriorLearner(Prior(config, book), codes, data, settings, out)
    note(
        f"training: {sum(value.numel() for value in learner.prior.parameters()) / 1e6:.1f} million weights; "
        f"{len(learner.train)} pictures with {len(data.captions)} captions, {len(learner.dev)} pictures held out; "
        f"{learner.precision.reason}"
    )
    every = max(1, settings.steps // 10)
    saved = {"training": to_json(settings), "guide": guide.fingerprint, "vqgan": config.vqgan}
    finished = run_steps(learner, out, settings.steps, saved, resume=resume, look_every=every, progress=progress)
    save_prior(learner.prior, out)
    return finished


def write_rows(
    rows: Sequence[CaptionedImage], model: VQModel, guide: BatchedEmbedder, out: Path, progress: bool
) -> None:
    """Compute what training reads: each picture's tokens and embedding, each caption's embedding."""
    size = int(model.config.sample_size)
    good = decode_pictures([row.path for row in rows], size, out / PIXELS, progress)
    pixels = open_pixels(out / PIXELS, size)
    parts = tqdm(range(0, len(good), 64), desc="codes", unit="batch", disable=not progress)
    tokens = [tokens_of(model, picture_batch(pixels, np.arange(at, min(at + 64, len(good))))) for at in parts]
    captions = {row.path: row.captions for row in rows}
    texts = [caption for path in good for caption in captions[path]]
    counts = [len(captions[path]) for path in good]
    embedded = guide.embed_images(good, progress)
    if len(embedded.paths) != len(good):
        raise ClipmatchError(f"The picture {embedded.failures[0].path} could be read once and then not; try again.")
    values = {
        "tokens": torch.cat(tokens),
        "pictures": torch.from_numpy(embedded.rows),
        "captions": torch.from_numpy(guide.embed_texts(texts, progress)),
        "first": torch.tensor([0, *np.cumsum(counts)]),
    }
    save_file(values, out / ROWS)
    (out / PIXELS).unlink()


class PriorLearner:
    """A prior and what it learns from; see `run_steps`."""

    def __init__(self, prior: Prior, codes: Any, data: PriorData, settings: PriorTraining, out: Path):
        self.settings, self.data, self.codes, self.out = settings, data, codes, out
        self.device = choose_device(settings.device)
        self.precision = choose_precision(self.device, settings.precision)
        self.prior = prior.to(self.device).train()
        self.parts: dict[str, nn.Module] = {"prior": prior}
        self.optimizers: dict[str, Any] = {"prior": adamw(prior, settings.rate, settings.weight_decay)}
        order = np.random.default_rng(settings.seed).permutation(len(data.tokens))
        held = min(256, max(1, round(HELD_OUT * len(order)))) if len(order) > 1 else 0
        self.dev, self.train = np.sort(order[:held]), order[held:]

    def step(self, number: int) -> dict[str, float]:
        """One batch, each picture masked to a random degree and with a random one of its prompts -> its loss."""
        settings, draws = self.settings, generator_for(self.settings.seed, number)
        rows = torch.from_numpy(self.train[batch_rows(len(self.train), settings.batch_size, number, settings.seed)])
        embeddings = self.prompts(rows, draws).to(self.device)
        dropped = torch.rand(len(rows), generator=draws) < settings.unprompted
        embeddings = torch.where(dropped[:, None].to(self.device), self.prior.nothing, embeddings)
        loss = self.loss(rows, embeddings, draws)
        optimizer = self.optimizers["prior"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.prior.parameters(), 1.0)
        optimizer.step()
        return {"loss": float(loss.detach())}

    def prompts(self, rows: Tensor, draws: torch.Generator) -> Tensor:
        """Numbers of pictures [b] -> unit rows [b, d]: of one of their captions, or their own with noise."""
        data, settings = self.data, self.settings
        counts = data.first[rows + 1] - data.first[rows]  # [b]
        chosen = (torch.rand(len(rows), generator=draws) * counts).long()
        own = data.pictures[rows]
        noise = nn.functional.normalize(torch.randn(own.shape, generator=draws), dim=1)
        length = settings.noise * torch.rand((len(rows), 1), generator=draws)
        noisy = nn.functional.normalize(own + noise * length, dim=1)
        captioned = (torch.rand(len(rows), generator=draws) < settings.captioned) & (counts > 0)
        if not len(data.captions):
            return noisy
        captions = data.captions[(data.first[rows] + chosen).clamp(max=len(data.captions) - 1)]
        return torch.where(captioned[:, None], captions, noisy)

    def loss(self, rows: Tensor, embeddings: Tensor, draws: torch.Generator) -> Tensor:
        """Numbers of pictures [b], prompts [b, d] -> cross-entropy of the masked tokens, as many as a cosine says."""
        tokens = self.data.tokens[rows].to(self.device)  # [b, t]
        shares = torch.cos(math.pi / 2 * torch.rand((len(rows), 1), generator=draws))
        hidden = torch.rand(tokens.shape, generator=draws)
        masked = (hidden < shares) | (hidden == hidden.amin(dim=1, keepdim=True))  # at least one
        masked = masked.to(self.device)
        with torch.autocast(self.device.type, self.precision.dtype, enabled=self.precision.dtype is not None):
            logits = self.prior(tokens.masked_fill(masked, self.prior.mask), embeddings)[masked]
        return nn.functional.cross_entropy(logits.float(), tokens[masked])

    @torch.no_grad()
    def look(self, number: int) -> dict[str, Any]:
        """The loss of held-out pictures, and a sheet: real pictures above, painted from their prompts below."""
        if not len(self.dev):
            return {}
        self.prior.eval()
        rows = torch.from_numpy(self.dev)
        prompts = self.prompts(rows, generator_for(self.settings.seed, DEV_DRAWS))
        loss = self.loss(rows, prompts.to(self.device), generator_for(self.settings.seed, DEV_DRAWS + 1))
        painted = self.prior.paint(prompts[:SHEET].to(self.device)).cpu()
        self.prior.train()
        pictures = pictures_of(self.codes, torch.cat([self.data.tokens[rows[:SHEET]], painted]))
        save_sheet(pictures, self.out / "samples" / f"step-{number:06}.png", columns=len(painted))
        return {"dev_loss": float(loss)}
