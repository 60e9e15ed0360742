"""Paint by guidance: latents that a generator turns into pictures are changed until a guide sees what was asked for.

In: a canvas, a guide, targets, latents. Out: the best pictures on the way. Knows nothing of files and command lines.

Pictures don't depend on one another: each has its own random numbers, made from its own seed, and passes alone through
the generator and the guide. So the third of five is the same, bit for bit, as the only one of its seed, and memory is
that of one picture whatever their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clipmatch.generation.canvas import Canvas
from clipmatch.generation.guide import Guide, Targets

JUDGE_EVERY = 10  # steps between looks at which pictures are the best so far
LAST_RATE = 0.1  # at the end, as a part of the first one: large steps find a thing, small ones finish it


@dataclass(frozen=True)
class GuidanceConfig:
    """How to paint. seed: of the first picture; the others' follow."""

    steps: int = 200
    seed: int = 0
    views: int = 16  # of a picture in each step
    flip: bool = True  # whether views are mirrored: not when the prompt tells left from right


@dataclass(frozen=True, eq=False)
class Progress:
    """Where a painting stands. step: done so far. pictures [n, 3, h, h]: as they are now; best: the best so far, and
    its scores [n]. All in 0..1, on the CPU.
    """

    step: int
    pictures: Tensor
    best: Tensor
    scores: Tensor


@dataclass(frozen=True, eq=False)
class Painting:
    """pictures [n, 3, h, h] in 0..1 and their scores [n] by the guide; after how many steps, and whether it was stopped
    before all were done.
    """

    pictures: Tensor
    scores: Tensor
    steps: int
    stopped: bool


def start(
    canvas: Canvas,
    guide: Guide,
    targets: Targets,
    n: int,
    size: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
) -> list[Tensor]:
    """Latents, each [n, ...], for random pictures: for each the one that the guide likes best of the canvas's tries.

    stop: asked before each but the first; if it says yes there are no more.
    """
    chosen = list[list[Tensor]]()
    for number in range(n):
        if chosen and stop():
            break
        latents = canvas.start(canvas.tries, size, seed + number)
        if canvas.tries > 1:
            best = most_liked(canvas, guide, targets, latents)
            latents = [latent[best : best + 1] for latent in latents]
        chosen.append(latents)
    return [torch.cat(parts) for parts in zip(*chosen, strict=True)]


@torch.no_grad()
def most_liked(canvas: Canvas, guide: Guide, targets: Targets, latents: list[Tensor]) -> int:
    """Latents, each [k, ...] -> the number, in 0..k - 1, of the picture that the guide likes best at a glance."""
    parts = zip(*(latent[:, None] for latent in latents), strict=True)
    scores = [float(guide.score(canvas.paint(list(part)), targets, count=0)) for part in parts]
    return scores.index(max(scores))


def optimise(
    canvas: Canvas,
    guide: Guide,
    targets: Targets,
    latents: list[Tensor],
    config: GuidanceConfig = GuidanceConfig(),
    on_step: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Painting:
    """Latents, each [n, ...] -> the pictures that were the best on the way, the start among them.

    Adam on the latents, on the loss of random views (`Guide.loss`); every tenth step the pictures are judged on fixed
    ones (`Guide.score`), and so are the last ones. on_step: called with the start and after each step. stop: asked
    before each step.
    """
    latents = [latent.detach().clone().requires_grad_() for latent in latents]
    groups = [{"params": [latent], "lr": rate} for latent, rate in zip(latents, canvas.rates, strict=True)]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: falling_rate(step / max(1, config.steps)))
    generators = [torch.Generator().manual_seed(config.seed + number) for number in range(len(latents[0]))]
    best, done = Best(), 0
    while done < config.steps and not stop():
        adam.zero_grad()
        painted = []
        for number, generator in enumerate(generators):
            picture = canvas.paint([latent[number : number + 1] for latent in latents])
            guide.loss(picture, targets, generator, config.views, config.flip).backward()  # type: ignore[no-untyped-call]
            painted.append(picture.detach().cpu())
        pictures = torch.cat(painted)
        if done % JUDGE_EVERY == 0:
            best.judge(pictures, guide, targets)
        if on_step:
            on_step(Progress(done, pictures, best.pictures, best.scores))
        adam.step()
        schedule.step()
        with torch.no_grad():
            canvas.settle(latents)
        done += 1
    pictures = paint(canvas, latents)
    best.judge(pictures, guide, targets)
    if on_step:
        on_step(Progress(done, pictures, best.pictures, best.scores))
    return Painting(best.pictures, best.scores, done, stopped=done < config.steps)


class Best:
    """The best picture so far of each painting."""

    def __init__(self) -> None:
        self.pictures = self.scores = torch.empty(0)

    def judge(self, pictures: Tensor, guide: Guide, targets: Targets) -> None:
        """Keep the pictures [n, 3, h, h] that are better than what is kept."""
        scores = guide.score(pictures.to(guide.device), targets).cpu()
        if not len(self.scores):
            self.pictures, self.scores = pictures, scores
        better = scores > self.scores
        self.scores = torch.where(better, scores, self.scores)
        self.pictures = torch.where(better[:, None, None, None], pictures, self.pictures)


@torch.no_grad()
def paint(canvas: Canvas, latents: list[Tensor]) -> Tensor:
    """Latents, each [n, ...] -> pictures [n, 3, h, h] on the CPU, painted one after another."""
    parts = zip(*(latent[:, None] for latent in latents), strict=True)
    return torch.cat([canvas.paint(list(part)).cpu() for part in parts])


def falling_rate(share: float) -> float:
    """The part of the first rate that is left when that share of the steps is done: a cosine."""
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * share)) / 2
