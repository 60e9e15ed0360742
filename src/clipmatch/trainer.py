"""The training loop: one run from its first or saved state to its end.

In: a checkpoint, splits and settings. Out: OUT/best/, OUT/last/ and a log. Every step depends only on the weights, the
optimiser's state and (seed, step), so that a resumed run continues exactly. Knows nothing of caption files.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from clipmatch.adapters import adapter_state, restore_adapters
from clipmatch.checkpoint import Checkpoint
from clipmatch.concepts import Concepts, load_concepts, made_up_features
from clipmatch.config import TrainConfig, to_json
from clipmatch.data import Splits, content_hash
from clipmatch.embedder import Failure, missing_files
from clipmatch.errors import ClipmatchError
from clipmatch.evaluation import measure
from clipmatch.loss import contrastive_loss, distillation_loss, siblings
from clipmatch.model import CLIPModel, Standardise
from clipmatch.modelfolder import find_folder
from clipmatch.optimization import (
    WeightAverage,
    build_optimizer,
    choose_attention,
    describe_parameters,
    pack_optimizer,
    rate_at,
    save_memory,
    standardise_input,
    unfreeze,
    unpack_optimizer,
)
from clipmatch.runlog import RunLog, note, read_history, stop_on_interrupt
from clipmatch.runtime import choose_device, choose_precision, reuse_memory, usable_cores
from clipmatch.sources import Batch, CachedImages, CachedTexts, EpochBatches, Sources
from clipmatch.teachers import Teachers, ask_teachers

STATE, OPTIMIZER, AVERAGE = "state.json", "optimizer.safetensors", "average.safetensors"
ADAPTERS = "adapters.safetensors"
SAVE_EVERY = 60.0  # seconds between saves of last/, so much is lost at most when a run is killed ...
SAVE_SHARE = 0.05  # ... unless saving would take more than this part of the time


@dataclass(frozen=True)
class Result:
    """What a run ended with. model: folder of the best model; dev: its figures; finished: False after Ctrl-C."""

    model: Path
    dev: dict[str, Any]
    history: list[dict[str, Any]]
    failures: list[Failure]
    finished: bool


class Trainer:
    """One run. Construct, then `run()`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        splits: Splits,
        settings: TrainConfig,
        state: dict[str, Any] | None,
        progress: bool,
    ):
        self.settings, self.splits, self.progress = settings, splits, progress
        self.train_hash, self.dev_hash = content_hash(splits.train), content_hash(splits.dev)
        self.out = Path(settings.out)
        self.seed = state.get("seed", settings.seed) if state else seed_of_draws(settings.seed, checkpoint.fingerprint)
        self.began_from = state.get("began_from", "") if state else checkpoint.fingerprint  # "": new heads
        reuse_memory()
        self.device = choose_device(settings.device)
        self.precision = choose_precision(self.device, settings.precision)
        note(f"device: {self.device}; {self.precision.reason}")
        self.checkpoint, self.model = checkpoint, checkpoint.model.to(self.device)
        image_blocks = unfreeze(self.model.image_encoder.backbone, settings.tune_image, settings.lora)
        unfreeze(self.model.text_encoder.backbone, settings.tune_text, settings.lora)
        refuse_frozen_random(checkpoint, settings)
        choose_attention(self.model.text_encoder.backbone, self.model.config.max_length, self.device)
        choose_attention(self.model.image_encoder.backbone, image_tokens(self.model), self.device)
        if settings.gradient_checkpointing:
            for encoder in (self.model.image_encoder, self.model.text_encoder):
                save_memory(encoder.backbone)
        self.failures = missing_files(splits.missing)
        sources = Sources(checkpoint, settings, self.seed, image_blocks, self.precision, self.device, progress)
        self.pairs, missing = sources.pairs(splits.train)
        self.dev, missing_dev = sources.dev_set(splits.dev)
        self.failures += missing + missing_dev
        if not checkpoint.fingerprint:  # fresh heads
            for source, encoder in (
                (self.pairs.images, self.model.image_encoder),
                (self.pairs.texts, self.model.text_encoder),
            ):
                if isinstance(source, CachedImages | CachedTexts) and source.table.rows.ndim == 2:
                    assert isinstance(encoder.standardise, Standardise)
                    standardise_input(encoder.standardise, source.sample())
        self.concepts = load_concepts_for(self.model, settings)
        self.teachers: Teachers | None = None
        if settings.teachers:
            self.teachers = ask_teachers(
                settings.teachers,
                splits.train,
                self.out,
                device=settings.device,
                precision=self.precision,
                progress=progress,
            )
        self.average = WeightAverage(self.model, settings.average) if settings.average else None
        self.optimizer = build_optimizer(self.model, settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.dtype == torch.float16)
        if len(splits.train) < settings.batch_size:
            note(f"batch size: {len(splits.train)}, for there are no more pictures")
        self.batch_size = min(settings.batch_size, len(splits.train))
        self.batches = max(1, len(splits.train) // self.batch_size)  # an epoch
        self.steps_per_epoch = math.ceil(self.batches / settings.accumulate)
        self.step = 0
        self.saved, self.save_seconds = time.perf_counter(), 0.0
        self.best: dict[str, Any] | None = None
        self.best_step = -1
        self.looks_since_best = 0
        self.history: list[dict[str, Any]] = []
        if state:
            self.restore(state)

    # The loop

    def loader(self) -> Any:
        """Batches from the current step on, fetched by worker processes where pictures are decoded."""
        settings = self.settings
        start = (self.step // self.steps_per_epoch) * self.batches
        start += (self.step % self.steps_per_epoch) * settings.accumulate
        sampler = EpochBatches(len(self.splits.train), self.batch_size, settings.epochs, self.seed, start)
        workers = settings.workers
        if workers is None:
            workers = min(8, max(1, usable_cores() // 2)) if self.pairs.images.decodes else 0
        return torch.utils.data.DataLoader(
            self.pairs, batch_sampler=sampler, num_workers=workers, collate_fn=itself, worker_init_fn=ignore_interrupt
        )

    def run(self) -> Result:
        """Train to the end, to early stopping or to Ctrl-C."""
        total = self.steps_per_epoch * self.settings.epochs
        finished, began = True, time.perf_counter()
        self.model.train()
        note(f"training: {describe_parameters(self.model)}; {self.settings.epochs} epochs, {total} steps")
        with RunLog(self.out, self.history) as log, stop_on_interrupt() as stop, self.bar(total) as bar:
            if self.step == 0 and self.best is None:
                self.save_last()  # from now on the run can be resumed
                if self.began_from:  # what is to be beaten
                    self.look_at_dev()
                    self.save_last()
            batches = iter(self.loader())
            while self.step < total and not stop() and not self.exhausted:
                figures = self.take_step(batches, total)
                log.step(figures)
                bar.update()
                bar.set_postfix(loss=f"{figures['loss']:.3f}", scale=f"{figures['logit_scale']:.1f}", refresh=False)
                if self.step % self.steps_per_epoch == 0:
                    seconds, began = time.perf_counter() - began, time.perf_counter()
                    self.end_epoch(log, seconds, last=self.step == total)
                if self.step == total or self.exhausted or self.save_is_due():
                    self.save_last()
            if self.exhausted:
                note(f"stopped early: no better dev recall in {self.settings.patience} looks")
            elif self.step < total:
                finished = False
                self.save_last()
                note(f"stopped at step {self.step} of {total}; the run in {self.out} can be resumed")
        if self.best is None:
            self.look_at_dev()
        assert self.best is not None
        if finished and self.best_step == 0:
            note("best/ is the model that this began with: training never beat it on dev")
        return Result(self.out / "best", self.best, self.history, unique(self.failures), finished)

    def take_step(self, batches: Iterator[Batch], total: int) -> dict[str, Any]:
        """One optimiser step over `accumulate` batches -> its figures."""
        settings, began = self.settings, time.perf_counter()
        # Dropout's randomness is a function of the step: a resumed run repeats it.
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        rate = rate_at(self.step, total, settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        left = self.batches - (self.step % self.steps_per_epoch) * settings.accumulate
        count = min(settings.accumulate, left)  # the last step of an epoch may have fewer
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum, pairs = 0.0, 0
        for _ in range(count):
            batch = next(batches)
            self.failures += batch.failures
            if len(batch.image_ids) < 2:
                continue  # nearly every picture of the batch is unreadable: there is nothing to tell apart
            loss = self.loss_of(batch)
            self.scaler.scale(loss / count).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.item() / count
            pairs += len(batch.image_ids)
        if not math.isfinite(loss_sum):
            raise ClipmatchError(self.why_not_finite(loss_sum))
        norm = self.descend() if pairs else 0.0
        self.step += 1
        return {
            "kind": "step",
            "step": self.step,
            "epoch": (self.step - 1) // self.steps_per_epoch,
            "loss": loss_sum,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": norm if math.isfinite(norm) else None,  # float16 skips such a step
            "logit_scale": float(self.model.logit_scale.detach()),
            "pairs_per_second": pairs / (time.perf_counter() - began),
        }

    def descend(self) -> float:
        """Clip the gradients and move the weights -> the gradients' norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update(self.step + 1)
        return norm

    def loss_of(self, batch: Batch) -> Tensor:
        """Forward pass of one batch -> loss."""
        with self.autocast():
            features = self.pairs.images.features(self.model, batch.images.to(self.device))
            images = self.model.project_image(features)
            texts = self.pairs.texts.encode(self.model, tuple(value.to(self.device) for value in batch.texts))
        # float32 outside autocast: logits of up to 100 lose their order in bfloat16
        excluded = siblings(batch.image_ids.to(self.device))
        loss = contrastive_loss(images, texts, self.model.logit_scale, excluded)
        if self.teachers is not None:
            teaching = self.teachers.logits(batch.image_ids, batch.text_ids).to(self.device)
            taught = distillation_loss(images, texts, self.model.logit_scale, teaching, excluded)
            loss = torch.lerp(loss, taught, self.settings.teacher_weight)
        if self.concepts is None:
            return loss
        return loss + self.settings.concept_weight * self.concept_loss(self.concepts, features)

    def concept_loss(self, concepts: Concepts, features: Tensor) -> Tensor:
        """The loss of made-up pairs; features [b, h]: pooled features of the batch's pictures."""
        rng = np.random.default_rng([self.seed, self.step, 2])
        drawn = concepts.draw(self.settings.concept_batch, rng)
        made_up = made_up_features(concepts, drawn, features.detach().float().cpu().numpy(), rng)
        tokens = self.checkpoint.tokenizer(
            drawn.sentences, padding=True, max_length=self.model.config.max_length, return_tensors="pt"
        )
        with self.autocast():
            images = self.model.project_image(torch.from_numpy(made_up).to(self.device))
            texts = self.model.encode_text(*(tokens[name].to(self.device) for name in ("input_ids", "attention_mask")))
        excluded = torch.from_numpy(drawn.excluded).to(self.device)
        return contrastive_loss(images, texts, self.model.logit_scale, excluded)

    def autocast(self) -> torch.autocast:
        """The context in which matrix products run in the chosen precision."""
        dtype = self.precision.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def why_not_finite(self, loss: float) -> str:
        """The sentence for a loss that is no number: the step and the likely cause."""
        broken = [name for name, value in self.model.named_parameters() if not torch.isfinite(value).all()]
        where = f"the weights of {broken[0]} had overflowed before it" if broken else "the weights were still finite"
        cause = "halve the learning rates" if self.precision.dtype is None else (
            "halve the learning rates, or train with --precision float32"
        )  # fmt: skip
        return f"The loss is {loss} at step {self.step + 1}; {where}. Likely too large a step: {cause}."

    # Dev, checkpoints

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.settings.patience is not None and self.looks_since_best >= self.settings.patience

    def end_epoch(self, log: RunLog, seconds: float, last: bool) -> None:
        """Measure on dev when it is due, and log."""
        epoch = self.step // self.steps_per_epoch
        losses = [row["loss"] for row in self.history if row["kind"] == "step" and row["epoch"] == epoch - 1]
        row: dict[str, Any] = {"kind": "epoch", "epoch": epoch - 1, "step": self.step}
        row |= {"train_loss": float(np.mean(losses)), "seconds": seconds}
        if last or epoch % self.settings.evaluate_every == 0:
            row["dev"] = self.look_at_dev()
        log.epoch(row)

    def look_at_dev(self) -> dict[str, Any]:
        """Recall on dev; a better one than ever is saved as best/."""
        with self.average.applied() if self.average else nullcontext():
            figures = self.measure_dev()
            note(dev_line(figures, self.step))
            if self.best is None or score(figures) > score(self.best):
                self.best, self.best_step, self.looks_since_best = figures, self.step, 0
                self.save("best", None)
            else:
                self.looks_since_best += 1
        return figures

    def measure_dev(self) -> dict[str, Any]:
        """Embed dev, without augmentation or dropout -> figures both ways."""
        self.model.eval()
        heads_alone = (
            self.settings.tune_image == self.settings.tune_text == "none"
        )  # cheap: in float32, like `evaluate`
        with torch.inference_mode(), nullcontext() if heads_alone else self.autocast():
            rows = self.dev.embed(self.model, self.device)
        self.model.train()
        self.failures += self.dev.failures
        return measure(*rows, bootstrap=False)

    def save_is_due(self) -> bool:
        """Whether enough would be lost by now, were the run killed, to pay for a save."""
        return time.perf_counter() - self.saved > max(SAVE_EVERY, self.save_seconds / SAVE_SHARE)

    def save_last(self) -> None:
        """Everything that a resumed run needs."""
        began = time.perf_counter()
        tensors, numbers = pack_optimizer(self.optimizer)
        state = {
            "split_hash": self.train_hash,
            "seed": self.seed,
            "began_from": self.began_from,
            "step": self.step,
            "total": self.steps_per_epoch * self.settings.epochs,
            "best": self.best,
            "best_step": self.best_step,
            "looks_since_best": self.looks_since_best,
            "history": len(self.history),
            "optimizer": numbers,
            "scaler": self.scaler.state_dict(),
        }
        extra = {OPTIMIZER: tensors, STATE: state}
        if self.average:
            extra[AVERAGE] = {name: value.cpu() for name, value in self.average.values.items()}
        if self.settings.lora:
            extra[ADAPTERS] = adapter_state(self.model)
        self.save("last", extra)
        self.saved = time.perf_counter()
        self.save_seconds = self.saved - began

    def save(self, name: str, extra: dict[str, Any] | None) -> None:
        """Write best/ or last/ as a model folder."""
        about = {
            **self.checkpoint.about,
            "trained_on": {
                "pictures": len(self.splits.train),
                "split_hash": self.train_hash,
                "dev_split_hash": self.dev_hash,
            },
            # without the paths of one machine
            "training": {**to_json(self.settings), "out": None, "concepts": None, "teachers": None},
            "taught_by": list(self.teachers.fingerprints) if self.teachers else [],
            "step": self.step,
            "dev": self.best,
        }
        replace(self.checkpoint, about=about).save(self.out / name, extra)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `save_last` was called."""
        from safetensors.torch import load_file

        if state["split_hash"] != self.train_hash:
            raise ClipmatchError(f"The run in {self.out} was trained on other pictures or captions; start a new one.")
        folder = find_folder(self.out / "last")
        unpack_optimizer(self.optimizer, load_file(folder / OPTIMIZER), state["optimizer"])
        if self.settings.lora:
            restore_adapters(self.model, load_file(folder / ADAPTERS))
        if self.average:
            for name, value in load_file(folder / AVERAGE).items():
                self.average.values[name].copy_(value)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.best_step = state["step"], state["best"], state.get("best_step", -1)
        self.looks_since_best = state["looks_since_best"]
        self.history = read_history(self.out)[: state["history"]]  # rows after the save are made anew
        note(f"resumed at step {self.step}")

    @contextmanager
    def bar(self, total: int) -> Iterator[Any]:
        """The progress bar, with throughput and ETA."""
        with tqdm(total=total, initial=self.step, desc="training", unit="step", disable=not self.progress) as bar:
            yield bar


# Parts that are functions of their arguments


def seed_of_draws(seed: int, fingerprint: str) -> int:
    """The seed of order, captions, views and dropout for a run that starts from the model with this fingerprint.

    With the run's own seed, one that goes on from the model of another would draw the very batches that the other has
    learnt by heart, and gain little. "": new heads.
    """
    if not fingerprint:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {fingerprint}".encode()).digest()[:4], "big")


def image_tokens(model: CLIPModel) -> int:
    """How many tokens the image tower attends over; a large number if its config does not say."""
    config: Any = model.image_encoder.backbone.config
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return (size // patch) ** 2 + 1 if isinstance(size, int) and isinstance(patch, int) else 1_000


def load_concepts_for(model: CLIPModel, settings: TrainConfig) -> Concepts | None:
    """The concepts that are to be learnt beside the pairs, if any."""
    return load_concepts(settings.concepts, model.image_encoder.fc.in_features) if settings.concepts else None


def refuse_frozen_random(checkpoint: Checkpoint, settings: TrainConfig) -> None:
    """Heads on a frozen random tower learn next to nothing: say so instead."""
    config = checkpoint.model.config
    if checkpoint.fingerprint:
        return  # loaded from a model folder: trained before
    for kind, tower, tune in (
        ("image", config.image_tower, settings.tune_image),
        ("text", config.text_tower, settings.tune_text),
    ):
        if isinstance(tower, dict) and tune != "all":
            raise ClipmatchError(f"The {kind} tower has no pretrained weights; train it whole (tune_{kind}='all').")


def score(figures: dict[str, Any]) -> float:
    """What "best" means: the sum of the text-to-image recalls, steadier than R@1 alone."""
    return float(sum(figures["text_to_image"][f"recall@{k}"] for k in (1, 5, 10)))


def dev_line(figures: dict[str, Any], step: int) -> str:
    """One line of dev figures."""
    parts = []
    for direction, label in (("text_to_image", "text->image"), ("image_to_text", "image->text")):
        recalls = "/".join(f"{100 * figures[direction][f'recall@{k}']:.1f}" for k in (1, 5, 10))
        parts.append(f"{label} R@1/5/10 {recalls}")
    return f"step {step}: dev " + ", ".join(parts)


def unique(failures: list[Failure]) -> list[Failure]:
    """Each failed file once, in order."""
    return list({failure.path: failure for failure in failures}.values())


def ignore_interrupt(worker: int) -> None:
    """A terminal sends Ctrl-C to the workers too; without them the step in flight could not end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def itself(value: Any) -> Any:
    """Batches come ready from the dataset: nothing to collate."""
    return value
