"""The whole way from a sentence to ranked pictures: prior, guidance, judge.

In: names of models, and a `PaintConfig`. Out: `Painted` pictures, the best first, with what is to be remembered of
each. Knows nothing of files that are written or of command lines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipmatch.embedder import BatchedEmbedder, load_model
from clipmatch.errors import ClipmatchError
from clipmatch.generation.biggan import PICKLED, biggan_canvas
from clipmatch.generation.canvas import Canvas, VQCanvas
from clipmatch.generation.guide import Guide, Targets, load_guide, rows_of
from clipmatch.generation.optimise import GuidanceConfig, Progress, most_liked, optimise, start
from clipmatch.generation.picture import to_image
from clipmatch.generation.prior import Prior, load_prior
from clipmatch.generation.prompts import Prompt, parse_prompts
from clipmatch.generation.vqgan import load_vqgan, vqgan_fingerprint
from clipmatch.hub import hub_error, looks_local, offline
from clipmatch.modelfolder import CONFIG
from clipmatch.preprocess import load_image

PRIOR = "prior"  # folder inside that of a generator
ALONE, REFINING = 200, 20  # steps of guidance, if not said otherwise: without a prior, and after it
DRAFTS = 8  # pictures by the prior of which guidance goes on with one


@dataclass(frozen=True)
class PaintConfig:
    """What to paint, and how.

    size: side in pixels; None for the generator's own. init: a picture to begin with, and strength in 0..1: how far
    guidance may go from it (or from what the prior painted). seed: of the first of n pictures; the others' follow.
    Raises ClipmatchError for a prompt that can't be understood.
    """

    prompt: str
    n: int = 1
    size: int | None = None
    steps: int | None = None  # of guidance; 0: what the prior paints, as it is; None: as many as are worth taking
    seed: int = 0
    init: Path | None = None
    strength: float = 1.0
    pictures: bool = True  # whether the prompt may name picture files: not when a stranger has written it

    def __post_init__(self) -> None:
        _ = self.prompts  # before anything large is loaded

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """What the prompt consists of."""
        return parse_prompts(self.prompt, self.pictures)


@dataclass(frozen=True, eq=False)
class Painted:
    """A picture [3, h, h] in 0..1, its score by the judge (by the guide if there is no other), its number among those
    that were asked for, and how it was made: name -> value.
    """

    picture: Tensor
    score: float
    number: int
    facts: dict[str, Any] = field(default_factory=dict)


class Painter:
    """A guide and a canvas, with a prior and a judge if there are any, loaded once for many paintings."""

    def __init__(
        self, guide: Guide, canvas: Canvas, prior: Prior | None = None, judge: BatchedEmbedder | None = None
    ) -> None:
        self.guide, self.canvas, self.prior, self.judge = guide, canvas, prior, judge

    def steps_of(self, config: PaintConfig) -> int:
        """Steps of guidance: those that are asked for, else as many as are worth taking."""
        if config.steps is not None:
            return config.steps
        return REFINING if self.prior is not None and config.init is None else ALONE

    def paint(
        self,
        config: PaintConfig,
        on_step: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> tuple[list[Painted], bool]:
        """-> the pictures, the best first, and whether they were stopped before the last step of the last of them.

        on_step, stop: as for `optimise`; stop is also asked before each picture but the first is begun. Raises
        ClipmatchError for a prompt, size or picture that can't be used, and for no steps where nothing paints first.
        """
        prompts, steps = config.prompts, self.steps_of(config)
        if not steps and self.prior is None and config.init is None:
            raise ClipmatchError("This generator has no prior, so 0 steps would paint nothing; give it some.")
        targets = self.guide.targets(prompts)
        latents = self.begin(config, targets, stop)
        guidance = GuidanceConfig(steps, config.seed, flip=not any(prompt.has_sides for prompt in prompts))
        done = optimise(self.canvas, self.guide, targets, latents, guidance, on_step, stop)
        scores = self.scores(done.pictures, prompts, done.scores)
        return self.rank(config, done.pictures, scores, done.steps), done.stopped or len(done.pictures) < config.n

    def rank(self, config: PaintConfig, pictures: Tensor, scores: list[float], steps: int) -> list[Painted]:
        """Pictures [n, 3, h, h] as they are after so many steps, and their scores -> the best first."""
        painted = [
            Painted(picture, score, number, self.facts(config, number, steps, score))
            for number, (picture, score) in enumerate(zip(pictures, scores, strict=True))
        ]
        return sorted(painted, key=lambda one: -one.score)

    def begin(self, config: PaintConfig, targets: Targets, stop: Callable[[], bool]) -> list[Tensor]:
        """The latents that guidance begins with: of the picture, of the prior, or random ones. If it is stopped, of
        those pictures alone that are begun: at least one.
        """
        size = config.size or self.canvas.side
        if config.init is not None:
            return self.canvas.from_picture(load_image(config.init), config.n, size, config.strength)
        if self.prior is None or not isinstance(self.canvas, VQCanvas):
            return start(self.canvas, self.guide, targets, config.n, size, config.seed, stop)
        side = math.isqrt(self.prior.config.tokens) * self.canvas.factor
        if config.size not in (None, side):
            raise ClipmatchError(f"The prior paints pictures of {side} pixels; leave out the size.")
        drafts = DRAFTS if self.steps_of(config) else 1
        tokens = list[Tensor]()
        for seed in range(config.seed, config.seed + config.n):
            if tokens and stop():
                break
            tokens.append(draft(self.prior, self.canvas, self.guide, targets, seed, drafts))
        return self.canvas.from_tokens(torch.cat(tokens), config.strength)

    def scores(self, pictures: Tensor, prompts: tuple[Prompt, ...], guide_scores: Tensor) -> list[float]:
        """Pictures [n, 3, h, h] -> by the judge their weighted cosines with the prompts; the guide's without one."""
        if self.judge is None:
            return [float(score) for score in guide_scores]
        rows, weights = rows_of(self.judge, prompts)
        pixels = np.stack([self.judge.transform.pixels(to_image(picture)) for picture in pictures])
        return [float(score) for score in self.judge.encode_pixels(pixels) @ rows.T @ weights]

    def facts(self, config: PaintConfig, number: int, steps: int, score: float) -> dict[str, Any]:
        """What is to be remembered of a picture."""
        from clipmatch import __version__

        facts = {
            "prompt": config.prompt,
            "seed": config.seed + number,
            "steps": steps,
            "planned steps": self.steps_of(
                config
            ),  # rates fall by these: a painting that was stopped is not one of fewer steps
            "guide": self.guide.fingerprint,
            "generator": f"{self.canvas.kind} {self.canvas.fingerprint}",
            **self.canvas.facts,
            "judge": (self.judge or self.guide).fingerprint,
            "score": f"{score:.4f}",
            "Software": f"clipmatch {__version__}",
        }
        if config.init is not None:
            facts["init"] = config.init.name
        elif self.prior is not None:
            facts["prior"] = self.prior.fingerprint
        if config.init is not None or self.prior is not None:
            facts["strength"] = config.strength
        return facts


def draft(prior: Prior, canvas: VQCanvas, guide: Guide, targets: Targets, seed: int, count: int) -> Tensor:
    """Codes [1, t] of a picture by the prior: of so many that which the guide likes best.

    A gradient leads to what pleases the guide alone; a choice among what the prior has painted does so less.
    """
    mixed = torch.nn.functional.normalize(targets.weights @ targets.rows, dim=0)  # [d]
    tokens = prior.paint(mixed.expand(count, -1).to(guide.device), seed=seed * count)  # [count, t]
    best = most_liked(canvas, guide, targets, canvas.from_tokens(tokens)) if count > 1 else 0
    return tokens[best : best + 1]


# Loading


def load_painter(
    guide: str, generator: str, judge: str | None = None, device: str | None = None, truncation: float = 1.0
) -> Painter:
    """Names of models -> a painter.

    guide: as for `load_guide`. generator: a folder or hub name of a VQGAN (diffusers' VQModel) or BigGAN-deep; a prior
    inside it is loaded too. judge: as for `load_model`. truncation: of a BigGAN.
    Raises ClipmatchError if one of them can't be loaded, or the prior was made for another guide.
    """
    eyes = load_guide(guide, device)
    folder = find_generator(generator)
    if kind_of_generator(generator, folder / CONFIG) == "BigGAN":
        return Painter(eyes, biggan_canvas(folder, eyes.device, truncation), judge=judge_of(judge))
    canvas = VQCanvas(load_vqgan(folder), vqgan_fingerprint(folder), eyes.device)
    return Painter(eyes, canvas, prior_of(folder, eyes, canvas), judge_of(judge))


def find_generator(name: str) -> Path:
    """The local folder of a generator: itself, or the hub's copy of it. Raises ClipmatchError when there is none."""
    folder = Path(name).expanduser()
    if (folder / CONFIG).is_file():
        return folder
    if folder.is_dir() or looks_local(name) or name.count("/") not in (1, 2):
        raise ClipmatchError(
            f"{name} is no folder of a generator (it has no {CONFIG}); name one, or one of the hub: OWNER/MODEL, or "
            "OWNER/MODEL/FOLDER for a part of a pipeline."
        )
    kind_of_generator(name, fetch(name, [CONFIG]) / CONFIG)  # before hundreds of megabytes are fetched
    return fetch(name, [CONFIG, "*.safetensors", PICKLED])


def fetch(name: str, patterns: list[str]) -> Path:
    """Files of a hub repository, or of a folder in it (OWNER/MODEL/FOLDER) -> the local folder that has them."""
    from huggingface_hub import snapshot_download

    owner, model, *inside = name.split("/")
    prefix = "".join(f"{part}/" for part in inside)
    wanted = [prefix + pattern for pattern in patterns]
    try:
        return Path(snapshot_download(f"{owner}/{model}", allow_patterns=wanted, local_files_only=offline())) / prefix
    except Exception as error:  # the hub's errors and those of its HTTP library have no common base
        raise hub_error(name, error) from error


def kind_of_generator(name: str, config: Path) -> str:
    """A config.json -> "VQGAN" or "BigGAN". Raises ClipmatchError for anything else."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        if values.get("_class_name") == "VQModel":
            return "VQGAN"
        if "attention_layer_position" in values:
            return "BigGAN"
    except (OSError, ValueError, AttributeError):
        pass
    raise ClipmatchError(
        f"{name} is neither a VQGAN (a VQModel of diffusers) nor a BigGAN-deep; name the folder of one of them."
    )


def prior_of(folder: Path, guide: Guide, canvas: Canvas) -> Prior | None:
    """The prior that lies inside a generator's folder, if there is one.

    Raises ClipmatchError if it knows the embeddings of another guide, or the codes of another generator.
    """
    if not (folder / PRIOR / CONFIG).is_file():
        return None
    prior = load_prior(folder / PRIOR)
    if prior.config.guide != guide.fingerprint:
        raise ClipmatchError(
            f"The prior in {folder} was trained for another guide ({prior.config.guide}); name that one, or train it "
            "anew by: clipmatch train-prior"
        )
    if prior.config.vqgan != canvas.fingerprint:
        raise ClipmatchError(
            f"The prior in {folder} was trained for another VQGAN; train it anew by: clipmatch train-prior"
        )
    return prior.to(guide.device)


def judge_of(name: str | None) -> BatchedEmbedder | None:
    """The model that ranks, if one is named."""
    return load_model(name) if name else None
