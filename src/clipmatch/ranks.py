"""Several processes that train one model together, as `accelerate launch` or `torchrun` starts them.

In: what each process has made of its part of a batch. Out: what all of them have made, and gradients that are the same
everywhere. A process alone gets back what it gave. Knows nothing of models, data or files.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipmatch.errors import ClipmatchError

Answer = TypeVar("Answer")


class Ranks:
    """One process among `count`, the first having the `number` 0. device: its own, None for the fastest."""

    def __init__(self, device: str | None = None):
        self.count, self.number = 1, 0
        self.device = device
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=device == "cpu")
            self.count, self.number = self._state.num_processes, self._state.process_index
            self.device = str(self._state.device)
            atexit.register(leave)  # threads of the group that outlive Python would abort the process

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.number == 0

    # Taking turns, agreeing

    def first_first(self) -> AbstractContextManager[None]:
        """Context: the first process goes through it before the others, who find what it has made."""
        return self._state.main_process_first() if self._state else nullcontext()  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Until all are here."""
        if self._state:
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
        dist.broadcast_object_list(reply, src=0)
        if reply[1] is not None:
            raise ClipmatchError(reply[1])
        return reply[0]  # type: ignore[no-any-return]

    def fewest(self, count: int) -> int:
        """The smallest of the counts that the processes have."""
        if self.count == 1:
            return count
        held = torch.tensor(count, device=self.device)
        dist.all_reduce(held, dist.ReduceOp.MIN)
        return int(held)

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of the processes."""
        return self.fewest(int(not flag)) == 0

    # Tensors

    def share_weights(self, model: nn.Module) -> None:
        """Give all processes the weights of the first."""
        if self.count > 1:
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
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
        longest = int(torch.stack(sizes).max())
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        held = [torch.empty_like(padded) for _ in range(self.count)]
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
        dist.all_reduce(flat)
        flat /= self.count
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def leave() -> None:
    """End the process group, if it is still there."""
    if dist.is_initialized():
        dist.destroy_process_group()
