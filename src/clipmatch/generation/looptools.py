"""A training loop that can be stopped and gone on with: the same weights as if it had never been stopped.

In: something that learns by numbered steps. Out: its steps taken, with progress, a log, saves, an answer to Ctrl-C.
Knows nothing of what is learnt. Every step must depend on nothing but the learner's parts and its number.

    OUT/last/      state.json, the parts and their optimisers: what a resumed run needs
    OUT/log.jsonl
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from clipmatch.atomic import aside
from clipmatch.checkpoint import model_draft
from clipmatch.errors import ClipmatchError
from clipmatch.modelfolder import write_json
from clipmatch.optimization import pack_optimizer, rate_at, unpack_optimizer
from clipmatch.runlog import RunLog, note, one_run, read_history, stop_on_interrupt
from clipmatch.runstate import STATE, SaveClock

LAST = "last"


class Learner(Protocol):
    """What learns. parts: all that changes with the steps, by name; optimizers: whose peak rates stand in "peak"."""

    parts: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]

    def step(self, number: int) -> dict[str, float]:
        """Take a step -> its figures, "loss" among them."""
        ...

    def look(self, number: int) -> dict[str, Any]:
        """Measure, after that many steps, and leave samples -> figures."""
        ...


def run_steps(
    learner: Learner,
    out: Path,
    total: int,
    settings: dict[str, Any],
    *,
    resume: bool = False,
    look_every: int = 500,
    warmup: float = 0.05,
    progress: bool = True,
) -> bool:
    """Take the steps that are left, rates rising and then falling by a cosine -> whether all are done; no after Ctrl-C.

    settings: what the run was asked for, kept for `read_state`. Raises ClipmatchError if `out` holds another run, or
    none to resume, or the loss is not finite.
    """
    if not resume:
        refuse_begun(out)
    done = restore(learner, out) if resume else 0
    history = [row for row in read_history(out) if row["step"] <= done] if resume else []
    clock, losses = SaveClock(), list[float]()
    bar = tqdm(total=total, initial=done, unit="step", desc="training", disable=not progress)
    with one_run(out), RunLog(out, history) as log, stop_on_interrupt() as stop, bar:
        if not resume:
            save(learner, out, 0, settings)
        while done < total and not stop():
            set_rates(learner, rate_at(done, total, warmup))
            figures = learner.step(done)
            if not math.isfinite(figures["loss"]):
                raise ClipmatchError(f"The loss is not finite at step {done}; go on with a lower --rate.")
            done += 1
            losses.append(figures["loss"])
            bar.update()
            bar.set_postfix(loss=f"{figures['loss']:.3f}", refresh=False)
            if done % look_every == 0 or done == total:
                row = {"kind": "look", "step": done, **figures, "loss": sum(losses) / len(losses)}
                log.write(row | learner.look(done))
                note(sentence(log.history[-1]))
                losses.clear()
            if done == total or clock.is_due():
                with clock.saving():
                    log.to_disk()
                    save(learner, out, done, settings)
    if done < total:
        save(learner, out, done, settings)
        note(f"stopped at step {done} of {total}; the run in {out} can be resumed")
    return done == total


def set_rates(learner: Learner, factor: float) -> None:
    """Put each optimiser's rate at a part of its peak."""
    for optimizer in learner.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def sentence(row: dict[str, Any]) -> str:
    """Figures as a line for people."""
    figures = (f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float))
    return f"step {row['step']}: {', '.join(figures)}"


def adamw(module: nn.Module, rate: float, decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.99)) -> Any:
    """AdamW over what learns in a module; no decay on norms and biases."""
    learning = [value for value in module.parameters() if value.requires_grad]
    groups = [
        {"params": [value for value in learning if value.ndim >= 2], "weight_decay": decay},
        {"params": [value for value in learning if value.ndim < 2], "weight_decay": 0.0},
    ]
    fused = learning[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW([{**group, "peak": rate, "lr": rate} for group in groups], betas=betas, fused=fused)


# Saving


def save(learner: Learner, out: Path, done: int, settings: dict[str, Any]) -> None:
    """Write OUT/last, all of it or nothing."""
    with model_draft(out / LAST) as folder:
        numbers = {}
        for name, part in learner.parts.items():
            save_file({key: value.contiguous() for key, value in part.state_dict().items()}, folder / weights_of(name))
        for name, optimizer in learner.optimizers.items():
            tensors, numbers[name] = pack_optimizer(optimizer)
            save_file(tensors, folder / optimizer_of(name))
        write_json(folder / STATE, {"step": done, "settings": settings, "optimizers": numbers})


def restore(learner: Learner, out: Path) -> int:
    """Put the learner where OUT/last says -> the steps done. Raises ClipmatchError if that can't be done."""
    state, folder = read_state(out), last_save(out)
    try:
        for name, part in learner.parts.items():
            part.load_state_dict(load_file(folder / weights_of(name)))
        for name, optimizer in learner.optimizers.items():
            unpack_optimizer(optimizer, load_file(folder / optimizer_of(name)), state["optimizers"][name])
        return int(state["step"])
    except (OSError, LookupError, RuntimeError, ValueError, SafetensorError) as error:
        raise ClipmatchError(f"The run in {out} is damaged; start anew with another --out.") from error


def read_state(out: Path) -> dict[str, Any]:
    """OUT/last/state.json. Raises ClipmatchError if there is none."""
    try:
        state: dict[str, Any] = json.loads((last_save(out) / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ClipmatchError(f"{out} holds no run to resume; start one without --resume.") from None
    return state


def is_finished(out: Path, total: int) -> bool:
    """Whether a run lies there that has taken all its steps."""
    return is_begun(out) and int(read_state(out)["step"]) == total


def is_begun(out: Path) -> bool:
    """Whether a run lies there, finished or not."""
    return (last_save(out) / STATE).is_file()


def refuse_begun(out: Path) -> None:
    """Raise ClipmatchError if a run lies there, which a new one would write over."""
    if is_begun(out):
        raise ClipmatchError(f"{out} already holds a run; go on with it by --resume, or choose another --out.")


def last_save(out: Path) -> Path:
    """OUT/last; or what has stepped aside, if a save was cut off in its last moment."""
    return next((folder for folder in (out / LAST, aside(out / LAST)) if (folder / STATE).is_file()), out / LAST)


def weights_of(name: str) -> str:
    """The file of a part."""
    return f"{name}.safetensors"


def optimizer_of(name: str) -> str:
    """The file of an optimiser."""
    return f"{name}.optimizer.safetensors"


def generator_for(seed: int, step: int) -> torch.Generator:
    """The random numbers of a step: the same ones when a resumed run comes to it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)
