"""What a resumed run needs beside the weights to go on exactly, and when it is worth saving.

In: the parts of a run that change with its steps, and the plain values that tell where it stands. Out: the files that
lie beside the model in OUT/last, by name; the same parts as they were; whether a run is done. Knows nothing of batches,
losses or dev.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from clipmatch.adapters import adapter_state, restore_adapters
from clipmatch.atomic import aside
from clipmatch.errors import ClipmatchError
from clipmatch.optimization import WeightAverage, pack_optimizer, unpack_optimizer

STATE, OPTIMIZER, AVERAGE = "state.json", "optimizer.safetensors", "average.safetensors"
ADAPTERS, NEIGHBOURS = "adapters.safetensors", "neighbours.safetensors"
SAVE_EVERY = 60.0  # seconds between saves, so much is lost at most when a run is killed ...
SAVE_SHARE = 0.05  # ... unless saving would take more than this part of the time


@dataclass(frozen=True, eq=False)
class RunState:
    """The parts that change. average: None for a run without; adapted: whether towers learn by adapters."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    adapted: bool

    def pack(self, standing: dict[str, Any], neighbours: Tensor | None) -> dict[str, Any]:
        """-> the files. standing: plain values; neighbours: of the weights at the epoch's start, if they were mined."""
        tensors, numbers = pack_optimizer(self.optimizer)
        state = {**standing, "optimizer": numbers, "scaler": self.scaler.state_dict()}
        files: dict[str, Any] = {OPTIMIZER: tensors, STATE: state}
        if self.average:
            files[AVERAGE] = {name: value.cpu() for name, value in self.average.values.items()}
        if self.adapted:
            files[ADAPTERS] = adapter_state(self.model)
        if neighbours is not None:
            files[NEIGHBOURS] = {"neighbours": neighbours}
        return files

    def unpack(self, folder: Path, state: dict[str, Any]) -> Tensor | None:
        """Put back what `pack` gave -> the neighbours. state: the content of STATE."""
        unpack_optimizer(self.optimizer, load_file(folder / OPTIMIZER), state["optimizer"])
        if self.adapted:
            restore_adapters(self.model, load_file(folder / ADAPTERS))
        if self.average:
            for name, value in load_file(folder / AVERAGE).items():
                self.average.values[name].copy_(value)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if not (folder / NEIGHBOURS).is_file():
            return None
        neighbours: Tensor = load_file(folder / NEIGHBOURS)["neighbours"]
        return neighbours.clone()


def find_state(run: Path) -> dict[str, Any] | None:
    """Where a run stands, by its last save; None if there is none. Raises ClipmatchError if that is damaged.

    What has stepped aside is left behind by a save that was cut off in its last moment.
    """
    for folder in (run / "last", aside(run / "last")):
        try:
            state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
            state["step"], state["total"]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise damaged_run(run, f"{STATE} can't be read") from error
        return state
    return None


def is_finished(run: Path) -> bool:
    """Whether a run has taken its last step."""
    state = find_state(run)
    return state is not None and bool(state["step"] >= state["total"])


def damaged_run(run: Path, reason: str) -> ClipmatchError:
    """The sentence for a run that can't be gone on with."""
    return ClipmatchError(
        f"What {run / 'last'} holds is damaged ({reason}); start a new run, from the best model of this one: "
        f"--model {run / 'best'}"
    )


class SaveClock:
    """When to save again."""

    def __init__(self) -> None:
        self.saved, self.seconds = time.perf_counter(), 0.0  # the end of the last save, and how long it took

    def is_due(self) -> bool:
        """Whether enough would be lost by now, were the run killed, to pay for a save."""
        return time.perf_counter() - self.saved > max(SAVE_EVERY, self.seconds / SAVE_SHARE)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Context: a save."""
        began = time.perf_counter()
        yield
        self.saved = time.perf_counter()
        self.seconds = self.saved - began
