"""Generation from nothing in minutes, offline: a guide, a VQGAN and a prior for drawn scenes, and a sheet of pictures.

In: a folder and a seed. Out: that folder with scenes, models and `painted.png`. Uses the same functions as a run on
photographs; it is a small world whose pictures have known attributes, and says nothing of photographs.
"""

from __future__ import annotations

import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm import tqdm

from clipmatch.checkpoint import load_checkpoint
from clipmatch.data import Splits, load_captions, split_captions
from clipmatch.demo_train import SIZE, is_unfinished, small_settings, train_small
from clipmatch.embedder import TorchEmbedder
from clipmatch.errors import ClipmatchError
from clipmatch.generation.looptools import is_begun, is_finished
from clipmatch.generation.painter import REFINING, PaintConfig, Painter, load_painter
from clipmatch.generation.priortrain import train_prior
from clipmatch.generation.settings import GENERATOR, GUIDE, PriorTraining, VQConfig
from clipmatch.generation.vqtrain import train_vqgan
from clipmatch.modelfolder import CONFIG
from clipmatch.runlog import note
from clipmatch.scenes import generate

SCENES, RUN, PRIOR = "scenes", "run", "prior"  # folders; the run is that of the demo's training
SHEET = "painted.png"
PAINTED = 16  # pictures on the sheet: of the first held-out scenes
STOPPED = "The demo was stopped; the same command goes on where it was."
# The guide goes on from the run with pictures made worse: a model that has not seen such is fooled by what it guides.
GUIDE_SETTINGS: dict[str, Any] = {"epochs": 20, "evaluate_every": 20, "adversarial": 7.0}
# Seven to ten minutes, with the prior, on two cores of an AMD EPYC with AVX512-BF16; the demo prints its own.
VQ_SETTINGS = VQConfig(
    size=SIZE, channels=(64,), layers=1, codes=512, code_width=8, steps=6000, batch_size=4, rate=1.5e-3
)
PRIOR_SETTINGS = PriorTraining(width=128, layers=4, steps=4000, batch_size=24, rate=2e-3, captioned=0.85)


def run_generation_demo(out: Path, seed: int = 0) -> str:
    """Train what is not there yet, paint the sheet -> the text to print. Goes on with what was interrupted."""
    splits = prepare_scenes(out, seed)
    train_guide(out, splits, seed)
    began = time.perf_counter()
    train_generator(out, splits, seed)
    seconds = time.perf_counter() - began
    painter = load_painter(str(out / GUIDE), str(out / GENERATOR))
    prompts = [row.captions[0] for row in splits.dev[:PAINTED]]
    began = time.perf_counter()
    painted = paint_prompts(painter, prompts, seed, REFINING)
    each = (time.perf_counter() - began) / len(prompts)
    write_prompt_sheet(painted, prompts, out / SHEET)
    return "\n".join(
        [
            *(f"{number:2}. {prompt}" for number, prompt in enumerate(prompts, start=1)),
            "",
            f"{len(prompts)} pictures, seeds {seed} to {seed + len(prompts) - 1}, of the first held-out scenes: their "
            "contents occur in no training picture, and none was left out",
            f"time:      {seconds:.0f} s for VQGAN and prior (0 if they were there), {each:.2f} s a picture",
            f"sheet:     {out / SHEET}",
            f"generator: {out / GENERATOR}",
            f"more:      clipmatch evaluate-generation --out {out}",
        ]
    )


def prepare_scenes(out: Path, seed: int) -> Splits:
    """The scenes of the demo, drawn if they are not there."""
    return split_captions(load_captions(generate(out / SCENES, size=SIZE, seed=seed)))


def train_guide(out: Path, splits: Splits, seed: int) -> None:
    """Train the demo's model, then the guide on from it, as far as they are not there.

    Raises ClipmatchError when Ctrl-C stopped it.
    """
    steps: list[tuple[str, Path | None, dict[str, Any]]]
    steps = [(RUN, None, {}), (GUIDE, out / RUN / "best", GUIDE_SETTINGS)]
    for name, start, changes in steps:
        run = out / name
        there = (run / "best" / CONFIG).is_file() and not is_unfinished(run, small_settings(run, seed, **changes))
        if not there:
            note(f"the {'guide' if start else 'model'} of the scenes")
            if not train_small(run, splits, seed, start, **changes):
                raise ClipmatchError(STOPPED)


def train_generator(out: Path, splits: Splits, seed: int) -> None:
    """Train VQGAN and prior on the training scenes, as far as they are not there.

    Raises ClipmatchError when Ctrl-C stopped it.
    """
    folder, guide = out / GENERATOR, str(out / GUIDE)
    if not is_finished(folder, VQ_SETTINGS.steps):
        note("the autoencoder (VQGAN) of the scenes")
        settings = replace(VQ_SETTINGS, seed=seed)
        if not train_vqgan([row.path for row in splits.train], folder, settings, resume=is_begun(folder)):
            raise ClipmatchError(STOPPED)
    if not is_finished(folder / PRIOR, PRIOR_SETTINGS.steps):
        note("the prior, which paints its codes")
        embedder = TorchEmbedder(load_checkpoint(guide))
        chosen = replace(PRIOR_SETTINGS, seed=seed)
        begun = is_begun(folder / PRIOR)
        if not train_prior(splits.train, folder, embedder, folder / PRIOR, chosen, resume=begun):
            raise ClipmatchError(STOPPED)


def paint_prompts(painter: Painter, prompts: list[str], seed: int, steps: int, tries: int = 1) -> NDArray[np.uint8]:
    """Sentences -> pictures uint8 [n, s, s, 3] as `clipmatch generate` paints them, the seeds counted up; of several
    tries the one that the guide likes best.
    """
    pictures = []
    for number, prompt in enumerate(tqdm(prompts, desc="painting", unit="img", disable=len(prompts) == 1)):
        painted, _ = painter.paint(PaintConfig(prompt, tries, steps=steps, seed=seed + number))
        pictures.append(as_bytes(painted[0].picture[None]))
    return np.concatenate(pictures)


def as_bytes(pictures: torch.Tensor) -> NDArray[np.uint8]:
    """[n, 3, s, s] in 0..1 -> uint8 [n, s, s, 3]."""
    values: NDArray[np.uint8] = (pictures * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return values


def write_prompt_sheet(pictures: NDArray[np.uint8], prompts: list[str], path: Path, columns: int = 4) -> None:
    """Pictures uint8 [n, s, s, 3], enlarged, each above its prompt -> a PNG."""
    side, text, gap = 192, 58, 8
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        row, column = divmod(place, columns)
        left, top = gap + column * (side + gap), gap + row * (side + text + gap)
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (left, top))
        draw.multiline_text((left, top + side + 2), "\n".join(textwrap.wrap(prompt, 34)[:4]), fill="black")
    sheet.save(path)
