"""A captioned picture set that needs no download: drawn scenes, their captions and their ground truth.

In: a folder, how many scenes and a seed. Out: that folder in the layout of Kaggle's Flickr8k (`Images/`,
`captions.txt`), with `splits/` and, one JSON object a picture, what each picture shows (`scenes.jsonl`).
Knows nothing of models, tokenizers or metrics.

Scenes and captions follow from the seed alone on any machine; pixels also depend on the version of Pillow.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipmatch.drawing import COLOURS, GROUNDS, Box, aspect, draw_ground, draw_thing, edge_of, shade
from clipmatch.errors import ClipmatchError

VERSION = 1  # of drawing and wording: a folder of another version is not reused
MOST_SCENES = 200_000  # about a tenth of all that can be drawn, so that looking for an unused one stays quick
SINGLE_SHARE = 0.15  # scenes with one group: they need more of their caption to be told apart
MOST_ALONE = {"big": 3, "small": 4}  # things in the only group
MOST_BESIDE = {"big": 2, "small": 3}  # things in one group of two
EXTENT = {"big": (0.30, 0.36), "small": (0.18, 0.22)}  # of the picture; a wide gap, since the words promise one
OVERSAMPLING = 4  # drawn so many times larger, then averaged: smooth edges

RELATIONS = {  # the first word is the one stored; all of them are said
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
}
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SIDE = {"left of": "on the left", "right of": "on the right", "above": "at the top", "below": "at the bottom"}
SIZE_WORDS = {"big": ("big", "large", "huge"), "small": ("small", "little", "tiny")}
SHAPE_WORDS = {  # singular and plural; any of them may be said
    "circle": (("circle", "circles"), ("disc", "discs")),
    "square": (("square", "squares"),),
    "triangle": (("triangle", "triangles"),),
    "star": (("star", "stars"),),
    "heart": (("heart", "hearts"),),
    "ring": (("ring", "rings"), ("hoop", "hoops")),
    "moon": (("moon", "moons"), ("crescent", "crescents")),
    "fish": (("fish", "fish"),),
    "house": (("house", "houses"), ("cottage", "cottages")),
    "tree": (("tree", "trees"), ("fir", "firs")),
}
GROUND_WORDS = {
    "plain": ("on white", "on a plain white background", "on blank paper"),
    "night": ("at night", "in the night sky", "in the dark", "in a starry sky"),
    "grass": ("on grass", "on the grass", "on a lawn", "in a meadow"),
    "sea": ("at sea", "in the sea", "in the water", "among the waves"),
    "desert": ("in the desert", "on sand", "on the dunes"),
    "wall": ("on a brick wall", "against a wall", "in front of bricks"),
}
COUNT_WORDS = {2: ("two", "two", "a pair of"), 3: ("three",), 4: ("four",)}


@dataclass(frozen=True)
class Thing:
    """One drawn object; `box` is (left, top, right, bottom) in fractions of the picture, outline included."""

    shape: str
    colour: str
    size: str
    box: Box


@dataclass(frozen=True)
class Group:
    """Equal things that a caption names together: "three small green stars"."""

    count: int
    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Things of a group follow one another; `relation` (None where there is one group) says
    where the first group stands as seen from the second: a key of `RELATIONS`.
    """

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The one or two groups, in the order of `things`."""
        runs = groupby(self.things, key=lambda thing: (thing.size, thing.colour, thing.shape))
        return tuple(Group(len(list(run)), *kind) for kind, run in runs)


def content_key(scene: Scene) -> str:
    """What the scene shows, as one string: "grass: 1 big red circle | left of | 2 small blue star".

    Equal for two scenes that differ only in jitter or in which of their groups comes first.
    """
    names = [f"{group.count} {group.size} {group.colour} {group.shape}" for group in scene.groups]
    relation = scene.relation
    if relation in ("right of", "below"):
        names, relation = names[::-1], CONVERSE[relation]
    return f"{scene.background}: " + f" | {relation} | ".join(names)


# --- What there is to see


def sample_scene(rng: random.Random) -> Scene:
    """A random scene: background, one or two groups that differ in colour or shape, and a place for each thing."""
    background = rng.choice(list(GROUNDS))
    alone = rng.random() < SINGLE_SHARE
    groups = [_sample_group(rng, MOST_ALONE if alone else MOST_BESIDE)]
    relation = None if alone else rng.choice(list(RELATIONS))
    while not alone and len(groups) < 2:
        other = _sample_group(rng, MOST_BESIDE)
        if (other.colour, other.shape) != (groups[0].colour, groups[0].shape):  # else "the red star" means both
            groups.append(other)
    things: list[Thing] = []
    for group, region in zip(groups, _regions(rng, groups, relation), strict=True):
        boxes = _place(rng, group, region)
        things += [Thing(group.shape, group.colour, group.size, box) for box in boxes]
    return Scene(background, tuple(things), relation)


def _sample_group(rng: random.Random, most: dict[str, int]) -> Group:
    size = rng.choice(list(SIZE_WORDS))
    return Group(rng.randint(1, most[size]), size, rng.choice(list(COLOURS)), rng.choice(list(SHAPE_WORDS)))


def _regions(rng: random.Random, groups: list[Group], relation: str | None) -> list[Box]:
    """A part of the picture for each group. Lone things keep to the middle across the direction of the relation,
    so that what is left of something is not as much above it.
    """
    if relation is None:
        return [(0.03, 0.03, 0.97, 0.97)]
    cut = rng.uniform(0.48, 0.52)
    spans = [(0.02, cut - 0.015), (cut + 0.015, 0.98)]
    if relation in ("right of", "below"):
        spans.reverse()
    regions = []
    for group, (low, high) in zip(groups, spans, strict=True):
        edge = 0.18 if group.count == 1 else 0.03
        across = (low, edge, high, 1 - edge)
        regions.append(across if relation in ("left of", "right of") else (edge, low, 1 - edge, high))
    return regions


def _place(rng: random.Random, group: Group, region: Box) -> list[Box]:
    """Boxes inside the region that leave a gap between them; one scale for the group, a little jitter for each."""
    wide = math.sqrt(aspect(group.shape))
    left, top, right, bottom = region
    while True:  # a try seldom fails: the densest group fills a third of its region
        boxes: list[Box] = []
        for _ in range(40):
            extent = rng.uniform(*EXTENT[group.size])
            stretch = rng.uniform(0.97, 1.03)
            width, height = extent * wide * stretch, extent / wide / stretch
            x, y = rng.uniform(left, max(left, right - width)), rng.uniform(top, max(top, bottom - height))
            box = (round(x, 4), round(y, 4), round(x + width, 4), round(y + height, 4))
            if box[2] <= right and box[3] <= bottom and all(_apart(box, other) for other in boxes):
                boxes.append(box)
            if len(boxes) == group.count:
                return boxes


def _apart(a: Box, b: Box, gap: float = 0.02) -> bool:
    return a[2] + gap < b[0] or b[2] + gap < a[0] or a[3] + gap < b[1] or b[3] + gap < a[1]


def render(scene: Scene, size: int = 64, seed: int | str = 0) -> Image.Image:
    """The scene as an RGB picture of size x size pixels. The seed moves tilt, hue, texture and noise, and no box."""
    side = size * OVERSAMPLING
    image = draw_ground(scene.background, side, random.Random(f"{seed}/ground"))
    rng = random.Random(f"{seed}/things")
    fills: dict[tuple[str, str], tuple[int, int, int]] = {}  # one shade for all things of a group
    for thing in scene.things:
        fill = fills.setdefault((thing.colour, thing.shape), shade(COLOURS[thing.colour], rng))
        left, top, right, bottom = (edge * side for edge in thing.box)
        draw_thing(image, thing.shape, fill, edge_of(fill, scene.background), (left, top, right, bottom), rng)
    pixels = np.asarray(image.reduce(OVERSAMPLING), dtype=np.int16)  # [size, size, 3]
    # RandomState and not a Generator: only its streams are frozen across versions of numpy.
    noise = np.random.RandomState(random.Random(f"{seed}/noise").getrandbits(32)).randint(-4, 5, (size, size, 1))
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


# --- Words


def describe(scene: Scene, rng: random.Random, n: int = 5) -> tuple[str, ...]:
    """`n` differently worded captions. All name every group with its count, colour and shape, and the relation, from
    either side; some leave out a size or the background.
    """
    captions: dict[str, None] = {}
    for _ in range(100 + 20 * n):
        captions.setdefault(_caption(scene, rng))
        if len(captions) == n:
            return tuple(captions)
    raise ClipmatchError(f"A scene has no {n} different captions; ask for fewer (5 are usual).")


def _caption(scene: Scene, rng: random.Random) -> str:
    groups = list(scene.groups)
    sized = [rng.random() < 0.85 for _ in groups]
    ground = rng.choice(GROUND_WORDS[scene.background])
    if rng.random() < 0.12 and (len(groups) > 1 or all(sized)):  # one group without size and place fits too much
        ground = ""
    names = [_name(group, size, rng) for group, size in zip(groups, sized, strict=True)]
    if scene.relation is None:
        text = _word_one(groups[0], names[0], ground, rng)
    elif rng.random() < 0.5:
        text = _word_two(groups, names, scene.relation, ground, rng)
    else:
        text = _word_two(groups[::-1], names[::-1], CONVERSE[scene.relation], ground, rng)
    return re.sub(r"\s+(?=[,;])", "", " ".join(text.split())).strip(" ,")


def _name(group: Group, sized: bool, rng: random.Random) -> str:
    """Article or number, size, colour, shape: "a pair of tiny green stars"."""
    noun = rng.choice(SHAPE_WORDS[group.shape])[group.count > 1]
    size = rng.choice(SIZE_WORDS[group.size]) if sized else ""
    words = f"{size} {noun} in {group.colour}" if rng.random() < 0.12 else f"{size} {group.colour} {noun}"
    words = words.strip()
    if group.count > 1:
        return f"{rng.choice(COUNT_WORDS[group.count])} {words}"
    return f"one {words}" if rng.random() < 0.1 else f"{'an' if words.startswith('orange') else 'a'} {words}"


def _word_one(group: Group, name: str, ground: str, rng: random.Random) -> str:
    there = "there is" if group.count == 1 else "there are"
    forms = (
        f"{name} {ground}",
        f"{ground}, {name}",
        f"{there} {name} {ground}",
        f"{ground} {there} only {name}",
        f"a picture of {name} {ground}",
        f"nothing but {name} {ground}",
    )
    return rng.choice(forms)


def _word_two(groups: list[Group], names: list[str], relation: str, ground: str, rng: random.Random) -> str:
    """`relation` says where the first group stands as seen from the second."""
    (a, b), place = names, rng.choice(RELATIONS[relation])
    are = ["is" if group.count == 1 else "are" for group in groups]
    it, its = ("it", "its") if groups[1].count == 1 else ("them", "their")
    here, there = SIDE[relation], SIDE[CONVERSE[relation]]
    beside = f"to {its} {relation.split()[0]}" if relation in ("left of", "right of") else f"{place} {it}"
    forms = (
        f"{a} {place} {b} {ground}",
        f"{a} {place} {b} {ground}",
        f"{ground}, {a} {place} {b}",
        f"{ground} there {are[0]} {a} {place} {b}",
        f"{ground}, there {are[1]} {b}; {a} {are[0]} {place} {it}",
        f"{a} {here} and {b} {there} {ground}",
        f"{here} {a}, {there} {b}, {ground}",
        f"{b} {ground} with {a} {beside}",
        f"a picture of {a} {place} {b} {ground}",
    )
    return rng.choice(forms)


# --- The folder


def sample_splits(n_train: int, n_dev: int, seed: int = 0, skip: int = 0) -> tuple[list[Scene], list[Scene]]:
    """(train, dev) scenes, no two with the same `content_key`. Dev comes first from the seed's stream, so a larger
    training set keeps its dev scenes.

    skip: scenes of the stream that are left out first. With as many as another set has, the two share no content.
    """
    total = skip + n_train + n_dev
    if total > MOST_SCENES:
        raise ClipmatchError(f"{total} scenes are too many; ask for {MOST_SCENES} at most.")
    rng, scenes = random.Random(f"{seed}/scenes"), dict[str, Scene]()
    while len(scenes) < total:
        scene = sample_scene(rng)
        scenes.setdefault(content_key(scene), scene)
    ordered = list(scenes.values())[skip:]
    return ordered[n_dev:], ordered[:n_dev]


def generate(
    folder: str | Path,
    n_train: int = 8000,
    n_dev: int = 500,
    size: int = 64,
    seed: int = 0,
    progress: bool = True,
    skip: int = 0,
) -> Path:
    """Draw and describe a picture set into `folder`; returns it. Five captions a picture. skip: as for `sample_splits`.

    A complete set of the same settings is left as it is, an unfinished one is drawn afresh. Raises ClipmatchError
    where the folder holds anything else.
    """
    folder = Path(folder)
    settings = {"version": VERSION, "n_train": n_train, "n_dev": n_dev, "size": size, "seed": seed}
    if skip:
        settings["skip"] = skip
    if _claim(folder, settings):
        return folder
    train, dev = sample_splits(n_train, n_dev, seed, skip)
    named = [*zip(_names("train", n_train), train, strict=True), *zip(_names("dev", n_dev), dev, strict=True)]

    def save(row: tuple[str, Scene]) -> None:
        render(row[1], size, f"{seed}/{row[0]}").save(folder / "Images" / row[0], quality=95, subsampling=0)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a third faster: Pillow and the disk leave Python free meanwhile
        for _ in _progress(pool.map(save, named), len(named), progress):
            pass
    captions = ["image,caption"]
    for name, scene in named:
        captions += [f"{name},{caption}" for caption in describe(scene, random.Random(f"{seed}/{name}/words"))]
    _write_lines(folder / "captions.txt", captions)
    _write_lines(folder / "splits" / "train.txt", [name for name, _ in named[:n_train]])
    _write_lines(folder / "splits" / "dev.txt", [name for name, _ in named[n_train:]])
    _write_lines(folder / "scenes.jsonl", [json.dumps({"image": name, **asdict(scene)}) for name, scene in named])
    _write_lines(folder / "settings.json", [json.dumps(settings)])  # last: its presence says that all else is there
    return folder


def _claim(folder: Path, settings: dict[str, Any]) -> bool:
    """True: the set is there already. False: the folder is ours, cleared, and waits for pictures."""
    found = _finished_settings(folder)
    names = {*_names("train", settings["n_train"]), *_names("dev", settings["n_dev"])}
    if found == settings and names <= {path.name for path in (folder / "Images").glob("*")}:
        return True
    if folder.exists() and not _is_ours(folder):
        raise ClipmatchError(f"{folder} holds other files than a generated picture set; name a new or empty folder.")
    if found not in (None, settings):
        raise ClipmatchError(f"{folder} holds scenes of other settings, {found}; name another folder or delete it.")
    for name in ("settings.json", "captions.txt", "scenes.jsonl"):  # Images last: by them the folder is known as ours
        (folder / name).unlink(missing_ok=True)
    for name in ("splits", "Images"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("Images", "splits"):
        (folder / name).mkdir(parents=True)
    return False


def _finished_settings(folder: Path) -> Any:
    try:
        return json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or cut off while it was written
        return None


def _names(split: str, n: int) -> list[str]:
    return [f"{split}-{k:05d}.jpg" for k in range(n)]


def _is_ours(folder: Path) -> bool:
    """Whether nothing but generated files is in the folder. Names alone can't tell: Flickr8k has `Images/` too."""
    if not folder.is_dir():
        return False
    known = {"Images", "splits", "captions.txt", "scenes.jsonl", "settings.json"}
    entries = {path.name for path in folder.iterdir()}
    pictures = (folder / "Images").iterdir() if "Images" in entries else iter(())
    return (not entries or "Images" in entries) and entries <= known and all(map(_is_scene_file, pictures))


def _is_scene_file(path: Path) -> bool:
    return re.fullmatch(r"(train|dev)-\d+\.jpg", path.name) is not None


def _progress(steps: Iterable[None], total: int, shown: bool) -> Iterable[None]:
    if not shown:
        return steps
    from tqdm import tqdm

    bar: Iterable[None] = tqdm(steps, total=total, desc="Drawing scenes", unit="picture")
    return bar


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def read_scenes(folder: str | Path) -> dict[str, Scene]:
    """Image name -> what it shows, for a folder that `generate` wrote; in its order: train, then dev."""
    path = Path(folder) / "scenes.jsonl"
    if not path.is_file():
        raise ClipmatchError(f"{path} is missing: {folder} is no generated picture set; make one with generate().")
    scenes = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        things = tuple(Thing(**{**thing, "box": tuple(thing["box"])}) for thing in row["things"])
        scenes[row["image"]] = Scene(row["background"], things, row["relation"])
    return scenes
