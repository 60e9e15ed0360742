"""The generator of the drawn scenes, measured beside its baselines.

In: the folder of a finished generation demo. Out: a table, its JSON, the judge and the attribute classifier that it
needed. Each row of the table is a set of pictures, one for each prompt: the first caption of each held-out scene.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from numpy.typing import NDArray

from clipmatch.checkpoint import load_checkpoint
from clipmatch.data import CaptionedImage
from clipmatch.embedder import TorchEmbedder
from clipmatch.errors import ClipmatchError
from clipmatch.generation.attributes import (
    STEPS,
    AttributeNet,
    accuracies,
    labels_of,
    load_attributes,
    named_in,
    read_attributes,
    train_attributes,
)
from clipmatch.generation.canvas import VQCanvas
from clipmatch.generation.demo_generate import (
    PRIOR,
    PRIOR_SETTINGS,
    SCENES,
    STOPPED,
    as_bytes,
    paint_prompts,
    prepare_scenes,
)
from clipmatch.generation.generation_evaluation import (
    Rows,
    closer_share,
    draw_others,
    interval,
    kernel_distance,
    nearest_distances,
    r_precision,
)
from clipmatch.generation.guide import Guide
from clipmatch.generation.judge import SCENES as JUDGE_SCENES
from clipmatch.generation.judge import make_judge
from clipmatch.generation.looptools import is_finished
from clipmatch.generation.painter import DRAFTS, REFINING, Painter
from clipmatch.generation.pixelstore import picture_batch
from clipmatch.generation.prior import Prior, load_prior
from clipmatch.generation.settings import GENERATOR, GUIDE
from clipmatch.generation.vqgan import load_vqgan, pictures_of, tokens_of
from clipmatch.preprocess import load_image
from clipmatch.scenes import Scene, read_scenes

Pictures = NDArray[np.uint8]
CHOICES = 100  # prompts that a picture is matched with
QUANTILE = 0.01  # of held-out real pictures, that are the nearest to a training picture
TRIES = 8  # of which the guide takes the best, in the row that says so
ATTRIBUTES = "attributes"  # folder of the classifier


@dataclass(frozen=True, eq=False)
class Space:
    """A way to tell how far pictures are apart: pictures -> rows, the training pictures' rows, and how far held-out
    real pictures are from the nearest of those.
    """

    rows_of: Callable[[Pictures], Rows]
    training: Rows
    held_out: Rows


@dataclass(frozen=True, eq=False)
class World:
    """What all rows share. dev: the held-out scenes; prompts: a caption of each; others: prompts to choose among;
    training: pictures; real: the judge's rows of pictures that nothing was trained on.
    """

    guide: TorchEmbedder
    judge: TorchEmbedder
    vqgan: VQModel
    net: AttributeNet
    dev: list[Scene]
    prompts: list[str]
    prompt_rows: dict[str, Rows]
    others: NDArray[np.int64]
    training: Pictures
    real: Rows
    spaces: dict[str, Space]


def evaluate_generation(out: Path, n: int = 200, guided: int = 100, seed: int = 0) -> dict[str, Any]:
    """Measure the demo in a folder on n prompts -> figures by row. Trains judge and classifier if they are not there.

    guided: prompts of the rows in which the guide has a hand, which take seconds a picture.
    Raises ClipmatchError when there is no finished demo or Ctrl-C stopped it.
    """
    if not is_finished(out / GENERATOR / PRIOR, PRIOR_SETTINGS.steps):
        raise ClipmatchError(f"{out} holds no finished generator; make one with: clipmatch demo --generate --out {out}")
    splits = prepare_scenes(out, seed)
    world, checks = prepare_world(out, splits.dev[:n], splits.train, seed)
    prior = load_prior(out / GENERATOR / PRIOR)
    real = read_pictures(splits.dev[:n])
    rows = {name: measure(world, paint) for name, paint in painters(world, prior, real, seed).items()}
    guided = min(guided, len(world.prompts))
    rows |= {name: measure(world, paint, guided) for name, paint in guided_painters(world, prior, seed).items()}
    return {"prompts": len(world.prompts), "choices": CHOICES, "chance": 1 / CHOICES, **checks, "rows": rows}


def prepare_world(
    out: Path, dev: Sequence[CaptionedImage], train: Sequence[CaptionedImage], seed: int
) -> tuple[World, dict[str, Any]]:
    """Models and pictures -> what the rows share, and how well judge and classifier do on real pictures."""
    judge_run, judge_splits = make_judge(out, seed)
    judge, guide = (TorchEmbedder(load_checkpoint(folder), "cpu") for folder in (judge_run, out / GUIDE))
    vqgan = load_vqgan(out / GENERATOR)
    scenes, judge_scenes = read_scenes(out / SCENES), read_scenes(out / JUDGE_SCENES)
    references = read_pictures(judge_splits.dev)
    net, figures = prepare_attributes(out, judge_splits.train, judge_splits.dev, references, judge_scenes, seed)
    prompts = [row.captions[0] for row in dev]
    # All pass through the autoencoder, whose smoothing would otherwise bring painted pictures nearer to one another.
    training, held_out = reconstruct(vqgan, read_pictures(train)), reconstruct(vqgan, references)
    world = World(
        guide,
        judge,
        vqgan,
        net,
        [scenes[row.path.name] for row in dev],
        prompts,
        {"guide": guide.embed_texts(prompts), "judge": judge.embed_texts(prompts)},
        draw_others(len(prompts), CHOICES, seed),
        training,
        embed(judge, references),
        {
            "pixels": space_of(lambda found: found.reshape(len(found), -1) / np.float32(255), training, held_out),
            "judge": space_of(lambda found: embed(judge, found), training, held_out),
        },
    )
    return world, {"attributes_of_held_out_real_pictures": figures}


def prepare_attributes(
    out: Path,
    train: Sequence[CaptionedImage],
    dev: Sequence[CaptionedImage],
    references: Pictures,
    scenes: dict[str, Scene],
    seed: int,
) -> tuple[AttributeNet, dict[str, float]]:
    """The attribute classifier, trained if it is not there, and its accuracy on real scenes that it has not seen."""
    folder = out / ATTRIBUTES
    labels = {
        part: np.stack([labels_of(scenes[row.path.name]) for row in rows])
        for part, rows in (("train", train), ("dev", dev))
    }
    if not is_finished(folder, STEPS):
        known, unknown = (read_pictures(train), labels["train"]), (references, labels["dev"])
        if not train_attributes(known, unknown, folder, seed, steps=STEPS):
            raise ClipmatchError(STOPPED)
    net = load_attributes(folder)
    return net, accuracies(read_attributes(net, references), labels["dev"], labels["dev"] >= 0)


def read_pictures(rows: Sequence[CaptionedImage]) -> Pictures:
    """Files -> uint8 [n, s, s, 3]."""
    return np.stack([np.asarray(load_image(row.path)) for row in rows])


def reconstruct(vqgan: VQModel, pictures: Pictures) -> Pictures:
    """Pictures uint8 [n, s, s, 3] -> as the autoencoder paints them."""
    parts = []
    for start in range(0, len(pictures), 100):
        rows = np.arange(start, min(start + 100, len(pictures)))
        parts.append(as_bytes(pictures_of(vqgan, tokens_of(vqgan, picture_batch(pictures, rows)))))
    return np.concatenate(parts)


# The rows


def painters(world: World, prior: Prior, real: Pictures, seed: int) -> dict[str, Callable[[int], Pictures]]:
    """Row -> what gives its pictures, one for each of the first k prompts. real: those of the prompts."""
    vqgan, rows = world.vqgan, torch.from_numpy(world.prompt_rows["guide"])
    training_rows = embed(world.guide, world.training)

    def unconditional(count: int) -> Pictures:
        parts = [as_bytes(pictures_of(vqgan, prior.paint(seed=seed + at, n=50))) for at in range(0, count, 50)]
        return np.concatenate(parts)[:count]

    def nearest(count: int) -> Pictures:
        found: Pictures = world.training[(world.prompt_rows["guide"][:count] @ training_rows.T).argmax(axis=1)]
        return found

    return {
        "real pictures": lambda count: real[:count],
        "their reconstructions (the ceiling)": lambda count: reconstruct(vqgan, real[:count]),
        "prior": lambda count: paint_rows(vqgan, prior, rows[:count], seed),
        "prior, prompts shuffled": lambda count: np.roll(paint_rows(vqgan, prior, rows[:count], seed), 1, axis=0),
        "prior, without prompts": unconditional,
        "nearest training picture by the guide": nearest,
    }


def paint_rows(vqgan: VQModel, prior: Prior, rows: torch.Tensor, seed: int) -> NDArray[np.uint8]:
    """Unit rows [n, d] -> what the prior paints, uint8 [n, s, s, 3]."""
    parts = [
        as_bytes(pictures_of(vqgan, prior.paint(rows[at : at + 50], seed=seed + at))) for at in range(0, len(rows), 50)
    ]
    return np.concatenate(parts)


def measure(world: World, paint: Callable[[int], Pictures], count: int | None = None) -> dict[str, Any]:
    """A row's pictures for the first `count` prompts (all, if not given) -> its figures."""
    count = count or len(world.prompts)
    began = time.perf_counter()
    pictures = paint(count)
    seconds = (time.perf_counter() - began) / count
    figures: dict[str, Any] = {"pictures": count, "seconds_per_picture": seconds}
    made = {}
    for name, model in (("judge", world.judge), ("guide", world.guide)):
        made[name] = embed(model, pictures)
        hits = r_precision(made[name], world.prompt_rows[name], world.others)
        figures[f"r_precision_{name}"] = float(hits.mean())
        figures[f"interval_{name}"] = interval(float(hits.mean()), count)
    labels = np.stack([labels_of(scene) for scene in world.dev[:count]])
    asked = np.stack([named_in(text, scene) for text, scene in zip(world.prompts, world.dev, strict=True)])[:count]
    figures["attributes"] = accuracies(read_attributes(world.net, pictures), labels, asked)
    figures["kernel_distance"] = kernel_distance(made["judge"], world.real)
    figures["closer_to_training"] = copied(world, pictures)
    return figures


def embed(model: TorchEmbedder, pictures: Pictures) -> Rows:
    """Pictures uint8 [n, s, s, 3] -> unit rows [n, d]."""
    return np.concatenate([model.encode_pixels(pictures[at : at + 250]) for at in range(0, len(pictures), 250)])


def copied(world: World, pictures: Pictures) -> dict[str, float]:
    """The share of pictures that are closer to a training picture than held-out real pictures are, in each space.

    "Closer" is: nearer to its nearest training picture than the nearest hundredth (`QUANTILE`) of the held-out real
    ones is to theirs; so pictures that nobody copied give 1 %.
    """
    return {
        name: closer_share(nearest_distances(space.rows_of(pictures), space.training), space.held_out, QUANTILE)
        for name, space in world.spaces.items()
    }


def space_of(rows_of: Callable[[Pictures], Rows], training: Pictures, held_out: Pictures) -> Space:
    """A space, with what is always the same in it computed once."""
    known = rows_of(training)
    return Space(rows_of, known, nearest_distances(rows_of(held_out), known))


def guided_painters(world: World, prior: Prior, seed: int) -> dict[str, Callable[[int], Pictures]]:
    """The rows that a guide has a hand in, as `clipmatch generate` paints them one by one: it ranks what the prior has
    painted, refines it, and paints alone in equal time.
    """
    guide, canvas = Guide(world.guide), VQCanvas(world.vqgan)
    after_prior, alone = Painter(guide, canvas, prior), Painter(guide, canvas)

    def painted(painter: Painter, steps: int, tries: int = 1) -> Callable[[int], Pictures]:
        return lambda count: paint_prompts(painter, world.prompts[:count], seed, steps, tries)

    def seconds(painter: Painter, steps: int) -> float:
        return seconds_of(lambda: paint_prompts(painter, world.prompts[:1], seed, steps))

    fixed = seconds(alone, 1)
    step = (seconds(alone, 6) - fixed) / 5
    equal = max(1, round((seconds(after_prior, REFINING) - fixed) / step) + 1)
    return {
        f"prior, best of {TRIES} by the guide": painted(after_prior, 0, TRIES),
        f"prior, best of {DRAFTS}, then {REFINING} steps of guidance (the default)": painted(after_prior, REFINING),
        f"guidance without the prior, equal time ({equal} step{'s' * (equal > 1)})": painted(alone, equal),
    }


def seconds_of(work: Callable[[], Any], times: int = 3) -> float:
    """How long it takes: the shortest of some tries, after one that nobody counts."""
    work()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def table(figures: dict[str, Any]) -> str:
    """The figures of `evaluate_generation` as text."""
    lines = [
        f"{figures['prompts']} held-out prompts, each among {figures['choices']}: chance {figures['chance']:.0%}. "
        "R@1: R-precision by judge and guide; exact: all named attributes are right; attr: the mean over attributes; "
        "kernel: kernel distance on the judge's features, not FID; copied: nearer to a training picture than all but "
        f"{QUANTILE:.0%} of held-out real ones (pixels, judge); s: a picture.",
        "",
        f"{'':54}{'n':>4}  R@1 judge (95 %)     guide  exact  attr   kernel   copied        s",
    ]
    for name, row in figures["rows"].items():
        low, high = row["interval_judge"]
        parts = [value for key, value in row["attributes"].items() if key != "all"]
        lines.append(
            f"{name:54}{row['pictures']:>4}  {row['r_precision_judge']:6.1%} ({low:.0%} to {high:.0%})"
            f"{row['r_precision_guide']:9.1%} {row['attributes']['all']:6.1%} {np.mean(parts):5.1%} "
            f"{row['kernel_distance']:8.4f}  {row['closer_to_training']['pixels']:5.1%} "
            f"{row['closer_to_training']['judge']:5.1%} {row['seconds_per_picture']:6.2f}"
        )
    checked = figures["attributes_of_held_out_real_pictures"]
    lines += [
        "",
        "The attribute classifier on held-out real pictures: " + ", ".join(f"{a} {b:.1%}" for a, b in checked.items()),
    ]
    return "\n".join(lines)
