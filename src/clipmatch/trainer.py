"""The training loop: one run from its first or saved state to its end.

In: a checkpoint, splits and settings. Out: OUT/best/, OUT/last/ and a log. Every step depends only on the weights, the
optimiser's state and (seed, step), so that a resumed run continues exactly. Knows nothing of caption files or losses.
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
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from clipmatch.checkpoint import Checkpoint
from clipmatch.config import TrainConfig, to_json
from clipmatch.data import Splits, content_hash
from clipmatch.diagnosis import check_captions, check_epoch, check_features, check_rows
from clipmatch.embedder import missing_files
from clipmatch.errors import ClipmatchError, Failure, reason_of
from clipmatch.evaluation import measure
from clipmatch.mining import find_neighbours
from clipmatch.model import Standardise
from clipmatch.modelfolder import LOGIT_BIAS, find_folder
from clipmatch.objective import Objective
from clipmatch.optimization import (
    WeightAverage,
    build_optimizer,
    describe_parameters,
    prepare_towers,
    rate_at,
    refuse_frozen_random,
    standardise_input,
)
from clipmatch.ranks import Ranks
from clipmatch.runlog import RunLog, note, read_history, stop_on_interrupt
from clipmatch.runstate import RunState, SaveClock, damaged_run
from clipmatch.runtime import choose_device, choose_precision, reuse_memory, seed_draws, usable_cores
from clipmatch.sources import SAMPLE, Batch, CachedImages, CachedTexts, Sources, embed_pictures
from clipmatch.streaming import ShardRows, hash_of
from clipmatch.teachers import Teachers, ask_teachers


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
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks = ranks or Ranks(settings.device)
        progress = progress and ranks.is_first
        self.settings, self.splits, self.progress = settings, splits, progress
        self.train_hash, self.dev_hash = hash_of(splits.train), content_hash(splits.dev)
        self.out = Path(settings.out)
        self.seed = state.get("seed", settings.seed) if state else seed_of_draws(settings.seed, checkpoint.fingerprint)
        self.began_from = state.get("began_from", "") if state else checkpoint.fingerprint  # "": new heads
        reuse_memory()
        self.device = choose_device(ranks.device)
        self.precision = choose_precision(self.device, settings.precision)
        note(f"device: {self.device}; {self.precision.reason}")
        self.checkpoint, self.model = checkpoint, checkpoint.model.to(self.device)
        if not checkpoint.fingerprint:  # not loaded from a model folder, so not trained before
            refuse_frozen_random(self.model.config, settings)
        image_blocks = prepare_towers(self.model, settings, self.device, self.precision)
        ranks.agree(
            {
                "pictures or captions to train on": self.train_hash,
                "pictures or captions for dev": self.dev_hash,
                "weights to begin with": checkpoint.fingerprint,
                "settings": {**to_json(settings), "device": None, "out": None},
            }
        )
        self.failures = missing_files(splits.missing)
        sources = Sources(checkpoint, settings, self.seed, image_blocks, self.precision, self.device, progress)
        with ranks.first_first():  # it fills the caches
            self.pairs, missing = sources.pairs(splits.train)
            self.dev, missing_dev = sources.dev_set(splits.dev)
        self.failures += missing + missing_dev
        some = splits.train[:SAMPLE] if isinstance(splits.train, ShardRows) else splits.train
        self.findings = list(check_captions(some))  # that are not said yet
        for kind, source, encoder in (
            ("image", self.pairs.images, self.model.image_encoder),
            ("text", self.pairs.texts, self.model.text_encoder),
        ):
            if isinstance(source, CachedImages | CachedTexts) and source.table.rows.ndim == 2:
                self.findings += check_features(kind, source.sample())
                if not checkpoint.fingerprint:  # fresh heads
                    assert isinstance(encoder.standardise, Standardise)
                    standardise_input(encoder.standardise, source.sample())
        self.teachers: Teachers | None = None
        if settings.teachers:
            with ranks.first_first():
                self.teachers = ask_teachers(
                    settings.teachers,
                    splits.train,
                    self.out,
                    device=ranks.device,
                    precision=self.precision,
                    progress=progress,
                )
        self.objective = Objective(
            checkpoint, self.pairs, settings, self.seed, self.precision, self.device, self.teachers, ranks
        )
        self.scaler = self.objective.scaler
        self.average = WeightAverage(self.model, settings.average) if settings.average else None
        self.optimizer = build_optimizer(self.model, settings, self.objective.logit_bias)
        if len(splits.train) < settings.batch_size:
            note(f"batch size: {len(splits.train)}, for there are no more pictures")
        self.batch_size, self.batches, self.steps_per_epoch = shape_of_epoch(len(splits.train), settings)
        if ranks.count > 1:
            note(batch_line(self.batch_size, ranks.count))
        self.neighbours: torch.Tensor | None = None  # int32 [n, k], if hard negatives are mined
        self.step = 0
        self.state = RunState(self.model, self.optimizer, self.scaler, self.average, adapted=settings.lora > 0)
        self.clock = SaveClock()
        self.best: dict[str, Any] | None = None
        self.best_step = -1
        self.looks_since_best = 0
        self.history: list[dict[str, Any]] = []
        if state:
            self.restore(state)
        ranks.share_weights(self.model)

    # The loop

    def loader(self) -> Any:
        """Batches from the current step to the run's end or, where hard negatives are mined, to the epoch's; fetched by
        worker processes where pictures are decoded.
        """
        settings = self.settings
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if settings.hard_negatives and place == 0 and epoch % settings.mine_every == 0:
            self.neighbours = self.ranks.of_first(self.mine)
        sampler = self.pairs.batches(
            self.batch_size,
            settings.epochs if self.neighbours is None else epoch + 1,
            self.seed,
            epoch * self.batches + place * settings.accumulate,
            neighbours=None if self.neighbours is None else self.neighbours.numpy(),
            share=settings.hard_negatives,
            part=(self.ranks.number, self.ranks.count),
        )
        workers = settings.workers
        if workers is None:
            each = usable_cores() // 2 // self.ranks.here
            workers = min(8, max(1, each)) if self.pairs.images.decodes else 0
        return torch.utils.data.DataLoader(
            self.pairs, batch_sampler=sampler, num_workers=workers, collate_fn=itself, worker_init_fn=ignore_interrupt
        )

    def run(self) -> Result:
        """Train to the end, to early stopping or to Ctrl-C."""
        total = self.steps_per_epoch * self.settings.epochs
        finished, began = True, time.perf_counter()
        self.model.train()
        note(f"training: {describe_parameters(self.model)}; {self.settings.epochs} epochs, {total} steps")
        self.ranks.wait()  # all have read what the first may write now
        place = self.out if self.ranks.is_first else None
        with RunLog(place, self.history) as log, stop_on_interrupt() as stop, self.bar(total) as bar:
            if self.step == 0 and self.best is None:
                self.save_last(log)  # from now on the run can be resumed
                # What is to be beaten, unless recall is given for being harder to fool.
                if self.began_from and not self.settings.adversarial:
                    self.look_at_dev()
                    self.save_last(log)
            self.warn(log)
            batches = None
            while self.step < total and not self.ranks.any(stop()) and not self.exhausted:
                if batches is None or (self.settings.hard_negatives and self.step % self.steps_per_epoch == 0):
                    batches = iter(self.loader())
                figures = self.take_step(batches, total)
                log.step(figures)
                bar.update()
                bar.set_postfix(loss=f"{figures['loss']:.3f}", scale=f"{figures['logit_scale']:.1f}", refresh=False)
                if self.step % self.steps_per_epoch == 0:
                    seconds, began = time.perf_counter() - began, time.perf_counter()
                    self.end_epoch(log, seconds, last=self.step == total)
                if self.step == total or self.exhausted or self.clock.is_due():
                    self.save_last(log)
            if self.exhausted:
                note(f"stopped early: no better dev recall in {self.settings.patience} looks")
            elif self.step < total:
                finished = False
                self.save_last(log)
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
        seed_draws(self.seed * 1_000_003 + self.step + (self.ranks.number << 40), self.device)
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
            if self.ranks.fewest(len(batch.image_ids)) * self.ranks.count < 2:
                continue  # nearly every picture of the batch is unreadable: there is nothing to tell apart
            loss_sum += self.objective.backward(batch, self.step, count) / count
            pairs += len(batch.image_ids) * self.ranks.count
        if not math.isfinite(loss_sum):
            raise ClipmatchError(self.objective.why_not_finite(loss_sum, self.step))
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
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.ranks.average_gradients(parameters)
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update(self.step + 1)
        return norm

    def mine(self) -> torch.Tensor:
        """Which training pictures the model takes for similar, now: int32 [n, k]."""
        with self.measuring():
            rows, _, failures = embed_pictures(
                self.pairs.images, len(self.splits.train), self.model, self.device, self.progress
            )
        self.failures += failures
        return find_neighbours(rows)

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
        most = self.model.config.max_logit_scale
        self.findings += check_epoch(self.history, self.settings, self.batch_size, most)
        self.warn(log)

    def warn(self, log: RunLog) -> None:
        """Say what is likely wrong, each kind of it once in a run."""
        said = {row["name"] for row in self.history if row["kind"] == "warning"}
        for finding in self.findings:
            if finding.name not in said:
                said.add(finding.name)
                note(f"Warning: {finding.text}.")
                log.write({"kind": "warning", "step": self.step, "name": finding.name, "text": finding.text})
        self.findings = []

    def look_at_dev(self) -> dict[str, Any]:
        """Recall on dev; a better one than ever is saved as best/."""
        with self.average.applied() if self.average else nullcontext():
            figures = self.ranks.of_first(self.measure_dev)
            note(dev_line(figures, self.step))
            if self.best is None or score(figures) > score(self.best):
                self.best, self.best_step, self.looks_since_best = figures, self.step, 0
                self.save("best", None)
            else:
                self.looks_since_best += 1
        return figures

    def measure_dev(self) -> dict[str, Any]:
        """Embed dev, without augmentation or dropout -> figures both ways."""
        with self.measuring():
            rows = self.dev.embed(self.model, self.device)
        self.failures += self.dev.failures
        self.findings += check_rows(*rows[:2], self.step, self.steps_per_epoch * self.settings.epochs)
        return measure(*rows, bootstrap=False)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Context: the model as it is used, in float32 where that is cheap, like `evaluate`: for heads alone."""
        heads_alone = self.settings.tune_image == self.settings.tune_text == "none"
        self.model.eval()
        with torch.inference_mode(), nullcontext() if heads_alone else self.objective.autocast():
            yield
        self.model.train()

    def save_last(self, log: RunLog) -> None:
        """Everything that a resumed run needs."""
        log.to_disk()
        standing = {
            "split_hash": self.train_hash,
            "seed": self.seed,
            "began_from": self.began_from,
            "step": self.step,
            "total": self.steps_per_epoch * self.settings.epochs,
            "best": self.best,
            "best_step": self.best_step,
            "looks_since_best": self.looks_since_best,
            "history": len(self.history),
        }
        with self.clock.saving():
            self.save("last", self.state.pack(standing, self.neighbours))

    def save(self, name: str, extra: dict[str, Any] | None) -> None:
        """Write best/ or last/ as a model folder."""
        if not self.ranks.is_first:
            return
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
            LOGIT_BIAS: None if self.objective.logit_bias is None else self.objective.logit_bias.item(),
            "step": self.step,
            "dev": self.best,
        }
        replace(self.checkpoint, about=about).save(self.out / name, extra)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `save_last` was called."""
        if state["split_hash"] != self.train_hash:
            raise ClipmatchError(f"The run in {self.out} was trained on other pictures or captions; start a new one.")
        try:
            self.neighbours = self.state.unpack(find_folder(self.out / "last"), state)
        except (OSError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
            raise damaged_run(self.out, reason_of(error)) from error
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


def shape_of_epoch(pictures: int, settings: TrainConfig) -> tuple[int, int, int]:
    """How many pairs a batch has, and batches and steps an epoch."""
    size = min(settings.batch_size, pictures)
    batches = max(1, pictures // size)
    return size, batches, math.ceil(batches / settings.accumulate)


def seed_of_draws(seed: int, fingerprint: str) -> int:
    """The seed of order, captions, views and dropout for a run that starts from the model with this fingerprint.

    With the run's own seed, one that goes on from the model of another would draw the very batches that the other has
    learnt by heart, and gain little. "": new heads.
    """
    if not fingerprint:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {fingerprint}".encode()).digest()[:4], "big")


def score(figures: dict[str, Any]) -> float:
    """What "best" means: the sum of the text-to-image recalls, steadier than R@1 alone."""
    return float(sum(figures["text_to_image"][f"recall@{k}"] for k in (1, 5, 10)))


def batch_line(size: int, count: int) -> str:
    """How a batch is shared out, for the log. Raises ClipmatchError if it is too small."""
    if size < 2 * count:
        raise ClipmatchError(f"A batch of {size} is too small for {count} processes; give two pairs or more for each.")
    return (
        f"processes: {count}, each with {size / count:g} of a batch's {size} pairs, which all compete with each other; "
        "steps and learning rates are those of one process"
    )


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
