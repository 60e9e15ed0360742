"""What the weights are asked for: a batch of pairs -> its loss, and the gradients of it.

In: a batch and the number of the step. Out: gradients, added to those that the weights have. Every random draw is a
function of PyTorch's seed and (seed, step). Knows nothing of optimisers, epochs or files.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from clipmatch.checkpoint import Checkpoint
from clipmatch.concepts import Concepts, load_concepts, made_up_features
from clipmatch.config import TrainConfig
from clipmatch.loss import contrastive_loss, distillation_loss, hinge_loss, siblings, sigmoid_loss
from clipmatch.modelfolder import LOGIT_BIAS
from clipmatch.ranks import Ranks
from clipmatch.runtime import Precision, seed_draws
from clipmatch.sources import Batch, PairDataset, mix_pairs
from clipmatch.teachers import Teachers

SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0  # SigLIP's start: at first nearly every answer is no, as it should be


class Objective:
    """The loss of a run: pairs, and beside them what teachers and concepts say."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        pairs: PairDataset,
        settings: TrainConfig,
        seed: int,
        precision: Precision,
        device: torch.device,
        teachers: Teachers | None,
        ranks: Ranks,
    ):
        self.checkpoint, self.model, self.pairs, self.settings = checkpoint, checkpoint.model, pairs, settings
        self.seed, self.precision, self.device, self.teachers = seed, precision, device, teachers
        self.ranks = ranks
        width = self.model.image_encoder.fc.in_features
        self.concepts = load_concepts(settings.concepts, width) if settings.concepts else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.dtype == torch.float16)
        self.logit_bias = start_sigmoid(checkpoint, device) if settings.loss == "sigmoid" else None

    # Gradients

    def backward(self, batch: Batch, step: int, count: int = 1) -> float:
        """Add the gradients of a batch's loss, divided by `count`, to the weights' -> the loss.

        In float16 they are scaled: `scaler` knows by how much.
        """
        if self.settings.mixup:
            batch = mix_pairs(batch, self.settings.mixup)
        if self.settings.adversarial:
            batch = replace(batch, images=self.made_worse(batch, self.settings.adversarial))
        if self.settings.chunk is not None and self.settings.chunk < len(batch.image_ids):
            return self.backward_in_chunks(batch, step, count, self.settings.chunk)
        loss = self.loss_of(batch, *self.embed(batch.images, batch.texts), step)
        self.scaler.scale(loss / count).backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def backward_in_chunks(self, batch: Batch, step: int, count: int, chunk: int) -> float:
        """The same with the activations of `chunk` pairs at a time (gradient caching, Gao et al. 2021): once without
        gradients, for the loss and what it asks of each vector; once more to pass that on to the weights. The last
        chunk passes once: its activations can stay until the loss is known.

        A seed for each chunk gives it the same dropout both times, on whatever device.
        """
        chunks = batch.split(chunk)
        *seeds, afterwards = torch.randint(1 << 62, (len(chunks) + 1,)).tolist()
        with torch.no_grad():
            parts = [self.embed_chunk(*pairs, seed) for pairs, seed in zip(chunks[:-1], seeds[:-1], strict=True)]
        kept = self.embed_chunk(*chunks[-1], seeds[-1])
        parts.append((kept[0].detach(), kept[1].detach(), kept[2].detach()))
        features, images, texts = (torch.cat(rows) for rows in zip(*parts, strict=True))
        images.requires_grad_()
        texts.requires_grad_()
        loss = self.loss_of(batch, features, images, texts, step)
        self.scaler.scale(loss / count).backward()  # type: ignore[no-untyped-call]
        assert images.grad is not None
        assert texts.grad is not None
        *asked, asked_last = zip(torch.split(images.grad, chunk), torch.split(texts.grad, chunk), strict=True)
        torch.autograd.backward(kept[1:], asked_last)
        del kept
        for pairs, seed, gradients in zip(chunks[:-1], seeds[:-1], asked, strict=True):
            _, *rows = self.embed_chunk(*pairs, seed)
            torch.autograd.backward(rows, gradients)
        seed_draws(afterwards, self.device)
        return loss.item()

    def made_worse(self, batch: Batch, most: float) -> Tensor:
        """Pictures uint8 [b, s, s, 3] -> float32, each changed by at most `most` (root mean square over its numbers, in
        levels of 255) so that the loss rises: one step up the gradient from a random start near by (Wong et al., Fast
        is better than free, ICLR 2020, with an l2 ball).

        What is nothing to the eye changes a model's mind, unless it has learnt from such pictures; then its gradients
        show what it sees (Santurkar et al., Image Synthesis with a Single (Robust) Classifier, NeurIPS 2019).
        """
        pictures = batch.images.to(self.device).float()
        length = most * math.sqrt(pictures[0].numel())
        start = torch.rand(len(pictures), 1, 1, 1, device=self.device) * length
        change = (start * unit_pictures(torch.randn_like(pictures))).requires_grad_()
        loss = self.pair_loss(
            *self.embed(pictures + change, batch.texts)[1:], siblings(batch.image_ids.to(self.device))
        )
        (slope,) = torch.autograd.grad(self.scaler.scale(loss), change)
        slope = slope.nan_to_num(0.0, 0.0, 0.0)  # float16 may have overflowed; the step itself then tells the scaler
        change = change.detach() + length * unit_pictures(slope)
        beyond = change.flatten(1).norm(dim=1).clamp(min=length) / length  # [b]
        worse: Tensor = pictures + change / beyond[:, None, None, None]
        return worse

    def embed_chunk(self, images: Tensor, texts: tuple[Tensor, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """`embed` with dropout that is a function of the seed."""
        seed_draws(seed, self.device)
        return self.embed(images, texts)

    # The loss

    def embed(self, images: Tensor, texts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """What sources have fetched -> pooled image features [b, h], unit vectors of images and of texts [b, d]."""
        with self.autocast():
            features = self.pairs.images.features(self.model, images.to(self.device))
            rows = self.model.project_image(features)
            return features, rows, self.pairs.texts.encode(self.model, tuple(value.to(self.device) for value in texts))

    def loss_of(self, batch: Batch, features: Tensor, images: Tensor, texts: Tensor, step: int) -> Tensor:
        """A batch, or this process's part of it, and what `embed` makes of that -> the loss of the whole."""
        images, texts = self.ranks.gather(images), self.ranks.gather(texts)
        image_ids = self.ranks.gather(batch.image_ids.to(self.device))
        # float32 outside autocast: logits of up to 100 lose their order in bfloat16
        excluded = siblings(image_ids)
        loss = self.pair_loss(images, texts, excluded)
        if self.teachers is not None:
            text_ids = self.ranks.gather(batch.text_ids.to(self.device))
            teaching = self.teachers.logits(image_ids.cpu(), text_ids.cpu()).to(self.device)
            taught = distillation_loss(images, texts, self.model.logit_scale, teaching, excluded)
            loss = torch.lerp(loss, taught, self.settings.teacher_weight)
        if self.concepts is None:
            return loss
        return loss + self.settings.concept_weight * self.concept_loss(
            self.concepts, self.ranks.gather(features.detach()), step
        )

    def pair_loss(self, images: Tensor, texts: Tensor, excluded: Tensor) -> Tensor:
        """Unit vectors [b, d] of pairs, and which are no negatives of each other -> the loss that was chosen."""
        if self.logit_bias is not None:
            return sigmoid_loss(images, texts, self.model.logit_scale, self.logit_bias, excluded)
        if self.settings.loss == "hinge":
            return hinge_loss(images, texts, excluded)
        return contrastive_loss(images, texts, self.model.logit_scale, excluded)

    def concept_loss(self, concepts: Concepts, features: Tensor, step: int) -> Tensor:
        """The loss of made-up pairs; features [b, h]: pooled features of the batch's pictures."""
        rng = np.random.default_rng([self.seed, step, 2])
        drawn = concepts.draw(self.settings.concept_batch, rng)
        made_up = made_up_features(concepts, drawn, features.float().cpu().numpy(), rng)
        tokens = self.checkpoint.tokenizer(
            drawn.sentences, padding=True, max_length=self.model.config.max_length, return_tensors="pt"
        )
        with self.autocast():
            images = self.model.project_image(torch.from_numpy(made_up).to(self.device))
            texts = self.model.encode_text(*(tokens[name].to(self.device) for name in ("input_ids", "attention_mask")))
        return self.pair_loss(images, texts, torch.from_numpy(drawn.excluded).to(self.device))

    def autocast(self) -> torch.autocast:
        """The context in which matrix products run in the chosen precision."""
        dtype = self.precision.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def why_not_finite(self, loss: float, step: int) -> str:
        """The sentence for a loss that is no number: the step and the likely cause."""
        broken = [name for name, value in self.model.named_parameters() if not torch.isfinite(value).all()]
        where = f"the weights of {broken[0]} had overflowed before it" if broken else "the weights were still finite"
        cause = "halve the learning rates" if self.precision.dtype is None else (
            "halve the learning rates, or train with --precision float32"
        )  # fmt: skip
        return f"The loss is {loss} at step {step + 1}; {where}. Likely too large a step: {cause}."


def unit_pictures(pictures: Tensor) -> Tensor:
    """Each of [b, s, s, 3] at length 1; what is all zeros stays so."""
    lengths = pictures.flatten(1).norm(dim=1).clamp(min=1e-12)  # [b]
    unit: Tensor = pictures / lengths[:, None, None, None]
    return unit


def start_sigmoid(checkpoint: Checkpoint, device: torch.device) -> nn.Parameter:
    """The bias of the sigmoid's logits. A model that has learnt one goes on with it; another begins anew, scale too.

    It is of the training alone: it changes no order of matches, so the model itself has none.
    """
    bias = checkpoint.about.get(LOGIT_BIAS)
    if bias is None:
        bias = SIGMOID_BIAS
        with torch.no_grad():
            checkpoint.model.log_logit_scale.fill_(math.log(SIGMOID_SCALE))
    return nn.Parameter(torch.tensor(bias, device=device))
