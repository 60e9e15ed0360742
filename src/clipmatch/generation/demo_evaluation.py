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
from tqdm import tqdm

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
    load_world,
    paint_rows,
    prepare_scenes,
)
from clipmatch.generation.generation_evaluation import (
    closer_share,
    draw_others,
    interval,
    kernel_distance,
    nearest_distances,
    r_precision,
)
from clipmatch.generation.guide import Guide, Targets
from clipmatch.generation.judge import SCENES as JUDGE_SCENES
from clipmatch.generation.judge import make_judge
from clipmatch.generation.looptools import is_finished
from clipmatch.generation.optimise import GuidanceConfig, optimise
from clipmatch.generation.painter import REFINING
from clipmatch.generation.pixelstore import picture_batch
from clipmatch.generation.settings import GENERATOR
from clipmatch.generation.vqgan import pictures_of, tokens_of
from clipmatch.preprocess import load_image
from clipmatch.scenes import Scene, read_scenes

Pictures = NDArray[np.uint8]
CHOICES = 100  # prompts that a picture is matched with
QUANTILE = 0.01  # of held-out real pictures, that are the nearest to a training picture
CANDIDATES = 8  # of which the guide chooses, in the row that says so
ATTRIBUTES = "attributes"  # folder of the classifier


@dataclass(frozen=True, eq=False)
class World:
    """What all rows share. dev: the held-out scenes; prompts: a caption of each; others: prompts to choose among."""

    guide: TorchEmbedder
    judge: TorchEmbedder
    vqgan: VQModel
    net: AttributeNet
    dev: list[Scene]
    prompts: list[str]
    prompt_rows: dict[str, NDArray[np.float32]]
    others: NDArray[np.int64]
    training: Pictures
    held_out: Pictures
    references: Pictures


def evaluate_generation(out: Path, n: int = 500, guided: int = 100, seed: int = 0) -> dict[str, Any]:
    """Measure the demo in a folder on n prompts -> figures by row. Trains judge and classifier if they are not there.

    guided: prompts of the rows that optimise each picture by the guide, which take seconds a picture.
    Raises ClipmatchError when there is no finished demo or Ctrl-C stopped it.
    """
    if not is_finished(out / GENERATOR / PRIOR, PRIOR_SETTINGS.steps):
        raise ClipmatchError(f"{out} holds no finished generator; make one with: clipmatch demo --generate --out {out}")
    splits = prepare_scenes(out, seed)
    world, checks = prepare_world(out, splits.dev[:n], splits.train, seed)
    rows = {name: measure(world, paint) for name, paint in painters(out, world, seed).items()}
    rows |= {name: measure(world, paint, guided) for name, paint in guided_painters(out, world, seed).items()}
    return {"prompts": len(world.prompts), "choices": CHOICES, "chance": 1 / CHOICES, **checks, "rows": rows}


def prepare_world(
    out: Path, dev: Sequence[CaptionedImage], train: Sequence[CaptionedImage], seed: int
) -> tuple[World, dict[str, Any]]:
    """Models and pictures -> what the rows share, and how well judge and classifier do on real pictures."""
    judge_run, judge_splits = make_judge(out, seed)
    judge, (guide, vqgan, _) = TorchEmbedder(load_checkpoint(judge_run)), load_world(out)
    scenes, judge_scenes = read_scenes(out / SCENES), read_scenes(out / JUDGE_SCENES)
    references = read_pictures(judge_splits.dev)
    net, figures = prepare_attributes(out, judge_splits.train, judge_splits.dev, references, judge_scenes, seed)
    prompts = [row.captions[0] for row in dev]
    world = World(
        guide,
        judge,
        vqgan,
        net,
        [scenes[row.path.name] for row in dev],
        prompts,
        {"guide": guide.embed_texts(prompts), "judge": judge.embed_texts(prompts)},
        draw_others(len(prompts), CHOICES, seed),
        reconstruct(vqgan, read_pictures(train)),
        reconstruct(vqgan, references),
        references,
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


def painters(out: Path, world: World, seed: int) -> dict[str, Callable[[int], Pictures]]:
    """Row -> what gives its pictures, one for each of the first k prompts."""
    vqgan, (_, _, prior) = world.vqgan, load_world(out)
    rows = torch.from_numpy(world.prompt_rows["guide"])
    real = read_pictures(tuple(prepare_scenes(out, seed).dev[: len(world.prompts)]))
    training_rows = embed(world.guide, world.training)

    def best_of(count: int) -> Pictures:
        tries = np.stack([paint_rows(vqgan, prior, rows[:count], seed + 10_000 * k) for k in range(CANDIDATES)])
        scores = [(embed(world.guide, one) * world.prompt_rows["guide"][:count]).sum(axis=1) for one in tries]
        chosen: Pictures = tries[np.argmax(scores, axis=0), np.arange(count)]
        return chosen

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
        f"prior, best of {CANDIDATES} by the guide": best_of,
        "prior, prompts shuffled": lambda count: np.roll(paint_rows(vqgan, prior, rows[:count], seed), 1, axis=0),
        "prior, without prompts": unconditional,
        "nearest training picture by the guide": nearest,
    }


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
    figures["kernel_distance"] = kernel_distance(made["judge"], embed(world.judge, world.references))
    figures["closer_to_training"] = copied(world, pictures)
    return figures


def embed(model: TorchEmbedder, pictures: Pictures) -> NDArray[np.float32]:
    """Pictures uint8 [n, s, s, 3] -> unit rows [n, d]."""
    return np.concatenate([model.encode_pixels(pictures[at : at + 250]) for at in range(0, len(pictures), 250)])


def copied(world: World, pictures: Pictures) -> dict[str, float]:
    """The share of pictures that are closer to a training picture than held-out real pictures are, by two distances.

    "Closer" is: nearer to its nearest training picture than the nearest hundredth (`QUANTILE`) of the held-out real
    ones is to theirs; so pictures that nobody copied give 1 %. Distances are of pixels, and of the judge's rows. All
    pictures have passed through the autoencoder first, whose smoothing would otherwise bring the painted ones closer.
    """
    spaces: dict[str, Callable[[Pictures], NDArray[np.float32]]] = {
        "pixels": lambda found: found.reshape(len(found), -1).astype(np.float32) / np.float32(255),
        "judge": lambda found: embed(world.judge, found),
    }
    shares = {}
    for name, rows_of in spaces.items():
        training = rows_of(world.training)
        samples, held_out = (nearest_distances(rows_of(found), training) for found in (pictures, world.held_out))
        shares[name] = closer_share(samples, held_out, QUANTILE)
    return shares


def guided_painters(out: Path, world: World, seed: int) -> dict[str, Callable[[int], Pictures]]:
    """The rows that change each picture step by step as the guide likes: after the prior, and alone in equal time."""
    guide, canvas, (_, _, prior) = Guide(world.guide), VQCanvas(world.vqgan), load_world(out)
    rows = torch.from_numpy(world.prompt_rows["guide"])  # [n, d]

    def painted(place: int) -> torch.Tensor:
        return prior.paint(rows[place : place + 1], seed=seed + place)

    def alone(place: int) -> list[torch.Tensor]:
        return canvas.start(1, canvas.side, seed + place)

    def after_prior(place: int) -> list[torch.Tensor]:
        return canvas.from_tokens(painted(place))

    def refine(place: int, begin: Callable[[int], list[torch.Tensor]], steps: int) -> torch.Tensor:
        targets = Targets(rows[place : place + 1], torch.ones(1))
        config = GuidanceConfig(steps, seed + place, flip=False)  # captions tell left from right
        return optimise(canvas, guide, targets, begin(place), config).pictures

    def guided(begin: Callable[[int], list[torch.Tensor]], steps: int) -> Callable[[int], Pictures]:
        return lambda count: np.concatenate(
            [as_bytes(refine(place, begin, steps)) for place in tqdm(range(count), desc="guidance", unit="img")]
        )

    whole = seconds_of(lambda: refine(0, after_prior, REFINING))
    fixed = seconds_of(lambda: refine(0, alone, 1))
    step = (seconds_of(lambda: refine(0, alone, 6)) - fixed) / 5
    equal = max(1, round((whole - fixed) / step) + 1)
    return {
        f"prior, then {REFINING} steps of guidance (the default)": guided(after_prior, REFINING),
        f"guidance without the prior, equal time ({equal} step{'s' * (equal > 1)})": guided(alone, equal),
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
