"""Several processes that train one model together, as `accelerate launch` or `torchrun` starts them.

In: what each process has made of its part of a batch. Out: what all of them have made, and gradients that are the same
everywhere. A process alone gets back what it gave. Knows nothing of models, data or files.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipmatch.errors import ClipmatchError
from clipmatch.runtime import choose_device

Answer = TypeVar("Answer")

PATIENCE = timedelta(hours=6)  # the first may fill caches for hours; that one has died, the others see at once


class Ranks:
    """One process among `count`, of which so many are `here`, on this machine; the first has the `number` 0.

    device: its own, None for the fastest.
    """

    def __init__(self, device: str | None = None):
        self.count, self.number, self.here = 1, 0, 1
        self.device = device
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            kind = (device or str(choose_device())).partition(":")[0]
            with meeting():  # without a CUDA device, accelerate would take each for alone unless it is told
                self._state = PartialState(cpu=kind in ("cpu", "mps"), timeout=PATIENCE)
            self.count, self.number = self._state.num_processes, self._state.process_index
            self.here = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
            self.device = str(self._state.device)
            atexit.register(leave)  # threads of the group that outlive Python would abort the process

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.number == 0

    # Taking turns, agreeing

    @contextmanager
    def first_first(self) -> Iterator[None]:
        """Context: the first process goes through it before the others, who find what it has made."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def wait(self) -> None:
        """Until all are here."""
        if self._state:
            with meeting():
                self._state.wait_for_everyone()

    def of_first(self, ask: Callable[[], Answer]) -> Answer:
        """What the first process answers, in all; what stops it stops all. The others do not ask."""
        if self.count == 1:
            return ask()
        reply: list[Any] = [None, None]
        if self.is_first:
            try:
                reply[0] = ask()
            except ClipmatchError as error:
                reply[1] = str(error)
        with meeting():
            dist.broadcast_object_list(reply, src=0)
        if reply[1] is not None:
            raise ClipmatchError(reply[1])
        return reply[0]  # type: ignore[no-any-return]

    def of_all(self, own: Answer) -> list[Answer]:
        """What each process has, in their order, in all."""
        found: list[Any] = [own] * self.count
        if self.count > 1:
            with meeting():
                dist.all_gather_object(found, own)
        return found

    def agree(self, facts: dict[str, Any]) -> None:
        """Raise ClipmatchError, in all, if one of these named facts is not the same everywhere."""
        held = self.of_all(facts)
        for name, value in held[0].items():
            others = [number for number, other in enumerate(held) if other[name] != value]
            if others:
                raise ClipmatchError(
                    f"Process {others[0]} of {self.count} has other {name} than process 0; give all machines the same "
                    "files and options."
                )

    def fewest(self, count: int) -> int:
        """The smallest of the counts that the processes have."""
        if self.count == 1:
            return count
        held = torch.tensor(count, device=self.device)
        with meeting():
            dist.all_reduce(held, dist.ReduceOp.MIN)
        return int(held)

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of the processes."""
        return self.fewest(int(not flag)) == 0

    # Tensors

    def share_weights(self, model: nn.Module) -> None:
        """Give all processes the weights of the first."""
        if self.count > 1:
            with meeting():
                for value in model.state_dict().values():
                    dist.broadcast(value, src=0)

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [b, ...] of each process, not all as many -> those of all, in the order of the processes.

        Gradients flow back to this process's own rows, `count` times as large, for `average_gradients` divides by it:
        every process has the loss of all rows, and passes on what it asks of its own.
        """
        if self.count == 1:
            return rows
        sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(self.count)]
        with meeting():
            dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
        longest = int(torch.stack(sizes).max())
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        held = [torch.empty_like(padded) for _ in range(self.count)]
        with meeting():
            dist.all_gather(held, padded)
        parts = [part[: int(size)] for part, size in zip(held, sizes, strict=True)]
        if rows.requires_grad:
            own = rows.clone()
            own.register_hook(lambda gradient: gradient * self.count)  # type: ignore[no-untyped-call]
            parts[self.number] = own
        return torch.cat(parts)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The mean of the processes' gradients, in all; with `gather`, the gradient of the loss over all rows."""
        if self.count == 1:
            return
        learning = list(parameters)
        for parameter in learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in learning if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        with meeting():
            dist.all_reduce(flat)
        flat /= self.count
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


@contextmanager
def meeting() -> Iterator[None]:
    """Context: all processes take part; what they say when one of them has gone is a ClipmatchError."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of a dozen texts, by backend and by what was under way
        first = str(error).strip().splitlines()[0][:200]
        raise ClipmatchError(
            "Another process of this run has ended or can't be reached; its own last line says why. Start all of them "
            f"again with --resume. ({first})"
        ) from error


def leave() -> None:
    """End the process group, if it is still there, and its threads.

    They end with the object that the group is, which frames of an error may hold in a cycle still.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()
