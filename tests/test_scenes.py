import random
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from clipmatch.data import load_captions, read_split, select_split
from clipmatch.drawing import COLOURS, GROUNDS
from clipmatch.errors import ClipmatchError
from clipmatch.scenes import (
    CONVERSE,
    GROUND_WORDS,
    RELATIONS,
    SHAPE_WORDS,
    SIZE_WORDS,
    Group,
    Scene,
    Thing,
    content_key,
    describe,
    generate,
    read_scenes,
    render,
    sample_scene,
    sample_splits,
)

SHAPE_OF = {word: shape for shape, nouns in SHAPE_WORDS.items() for pair in nouns for word in pair}
SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
COUNT_OF = {"a": 1, "an": 1, "one": 1, "two": 2, "a pair of": 2, "three": 3, "four": 4}
RELATION_OF = {word: relation for relation, words in RELATIONS.items() for word in words}
RELATION_OF |= {"at the top": "above", "at the bottom": "below", "on the left": "left of", "on the right": "right of"}
RELATION_OF |= {f"to {its} {side}": f"{side} of" for its in ("its", "their") for side in ("left", "right")}


def either(words):
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


MENTION = re.compile(
    rf"\b({either(COUNT_OF)}) (?:({either(SIZE_OF)}) )?(?:({either(COLOURS)}) )?({either(SHAPE_OF)})\b"
    rf"(?: in ({either(COLOURS)})\b)?"
)


@dataclass(frozen=True)
class Reading:
    """What a caption says: groups (size None if unsaid), where the first stands as seen from the second, the ground."""

    groups: tuple[Group, ...]
    relation: str | None
    ground: str | None

    def fits(self, scene):
        groups, relation = scene.groups, scene.relation
        turned = (groups, relation), (groups[::-1], CONVERSE.get(relation))
        return self.ground in (None, scene.background) and any(
            self.relation == relation
            and len(self.groups) == len(groups)
            and all(said in (group, replace(group, size=None)) for said, group in zip(self.groups, groups, strict=True))
            for groups, relation in turned
        )


def read(caption):
    """Parse a caption, independently of the templates that made it: by the order of groups and of relation words."""
    mentions = list(MENTION.finditer(caption))
    groups = tuple(Group(COUNT_OF[m[1]], SIZE_OF.get(m[2]), m[3] or m[5], SHAPE_OF[m[4]]) for m in mentions)
    grounds = [name for name, phrases in GROUND_WORDS.items() if re.search(rf"\b({either(phrases)})(?!\w)", caption)]
    assert len(grounds) <= 1, caption
    said = list(re.finditer(rf"\b({either(RELATION_OF)})\b", caption))
    relation = RELATION_OF[said[0][1]] if said else None
    if relation and len(said) == 1 and said[0].start() > mentions[1].end():
        relation = CONVERSE[relation]  # "B; A is left of it", "B with A above it": said of the second mention
    return Reading(groups, relation, grounds[0] if grounds else None)


def drawn(n, seed=1):
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(n)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("scenes") / "set", n_train=40, n_dev=10, seed=3, progress=False)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_caption_read_by_eye():
    assert read("two tiny blue hearts on sand with a fir in red to their left") == Reading(
        (Group(2, "small", "blue", "heart"), Group(1, None, "red", "tree")), "right of", "desert"
    )
    assert read("an orange disc under a pair of stars in pink").relation == "below"


def test_captions_agree_with_the_ground_truth():
    rng = random.Random(0)
    for scene in drawn(400):
        for caption in describe(scene, rng):
            assert read(caption).fits(scene), (caption, content_key(scene))


def test_a_caption_of_another_scene_does_not_fit():
    rng = random.Random(0)
    things = (Thing("star", "red", "big", (0.1, 0.3, 0.4, 0.6)), Thing("fish", "blue", "small", (0.6, 0.4, 0.8, 0.5)))
    scene = Scene("grass", things, "left of")
    others = (
        replace(scene, relation="right of"),
        replace(scene, things=(replace(things[0], colour="pink"), things[1])),
        replace(scene, things=(*things, things[1])),
    )
    for caption in describe(scene, rng, n=20):
        assert not any(read(caption).fits(other) for other in others), caption


def test_captions_of_a_scene_differ_and_use_either_direction():
    for scene in drawn(100):
        assert len(set(describe(scene, random.Random(0), n=8))) == 8
    things = (Thing("star", "red", "big", (0.1, 0.3, 0.4, 0.6)), Thing("fish", "blue", "small", (0.6, 0.4, 0.8, 0.5)))
    captions = describe(Scene("grass", things, "left of"), random.Random(0), n=40)
    readings = [read(caption) for caption in captions]
    assert {reading.relation for reading in readings} == {"left of", "right of"}
    assert {reading.ground for reading in readings} == {"grass", None}
    with pytest.raises(ClipmatchError, match="ask for fewer"):
        describe(Scene("grass", things[1:]), random.Random(0), n=1500)


def test_things_stand_where_the_relation_says():
    axis = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}  # y grows downwards
    seen = Counter()
    for scene in drawn(400):
        seen[scene.relation] += 1
        if scene.relation is None:
            continue
        along, sign = axis[scene.relation]
        first, second = scene.groups
        centres = [sign * (thing.box[along] + thing.box[along + 2]) / 2 for thing in scene.things]
        assert len(centres) == first.count + second.count
        assert max(centres[: first.count]) < min(centres[first.count :])
    assert min(seen[relation] for relation in (*RELATIONS, None)) > 30


def test_things_are_whole_and_apart():
    for scene in drawn(300):
        for k, thing in enumerate(scene.things):
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= 1
            assert 0 <= top < bottom <= 1
            for other in scene.things[:k]:
                assert right < other.box[0] or other.box[2] < left or bottom < other.box[1] or other.box[3] < top


@pytest.mark.parametrize("ground", GROUNDS)
def test_a_box_covers_its_thing_and_no_more(ground):
    side = 128
    for k, shape in enumerate(SHAPE_WORDS):
        thing = Thing(shape, list(COLOURS)[k % 8], "big", (0.3, 0.25, 0.62, 0.6))
        empty, full = (np.asarray(render(Scene(ground, t), side, seed=k), dtype=int) for t in ((), (thing,)))
        rows, columns = np.nonzero(np.abs(full - empty).max(axis=-1) > 12)
        edges = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / side
        assert np.all(edges[:2] >= np.array(thing.box[:2]) - 1 / side), shape
        assert np.all(edges[2:] <= np.array(thing.box[2:]) + 1 / side), shape
        assert np.abs(edges - thing.box).max() <= 3 / side, shape


def test_the_colour_in_the_picture_is_the_colour_in_the_record():
    for scene in drawn(60):
        pixels = np.asarray(render(replace(scene, background="plain"), 64, seed=5), dtype=float)
        for thing in scene.things:
            left, top, right, bottom = (round(edge * 64) for edge in thing.box)
            inside = pixels[top:bottom, left:right].reshape(-1, 1, 3)
            near = np.abs(inside - np.array(list(COLOURS.values()))).max(axis=-1)  # [pixels, colours]
            votes = near.argmin(axis=1)[near.min(axis=1) < 40]
            counts = Counter(list(COLOURS)[vote] for vote in votes)
            if thing.colour != "black":
                counts.pop("black", None)  # outlines
            assert counts.most_common(1)[0][0] == thing.colour


def test_no_two_renderings_are_equal_but_for_the_seed():
    scene = drawn(1)[0]
    first, again, other = (np.asarray(render(scene, 64, seed)) for seed in (1, 1, 2))
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_content_key_forgets_jitter_and_direction():
    star, fish = Thing("star", "red", "big", (0.1, 0.3, 0.4, 0.6)), Thing("fish", "blue", "small", (0.6, 0.4, 0.8, 0.5))
    scene = Scene("grass", (star, fish), "left of")
    assert content_key(scene) == "grass: 1 big red star | left of | 1 small blue fish"
    assert content_key(Scene("grass", (fish, star), "right of")) == content_key(scene)
    assert content_key(replace(scene, things=(replace(star, box=(0, 0, 0.3, 0.3)), fish))) == content_key(scene)
    for other in (
        replace(scene, relation="right of"),
        replace(scene, background="sea"),
        replace(scene, things=(star, replace(fish, size="big"))),
        replace(scene, things=(star, fish, fish)),
    ):
        assert content_key(other) != content_key(scene)


def test_split_is_by_content_and_the_gallery_has_no_twins():
    train, dev = sample_splits(3000, 500, seed=0)
    keys = {content_key(scene) for scene in dev}
    assert (len(train), len(dev), len(keys)) == (3000, 500, 500)
    assert not keys & {content_key(scene) for scene in train}
    assert sample_splits(20, 500, seed=0)[1] == dev  # the gallery stays while the training set grows
    assert sample_splits(20, 500, seed=1)[1] != dev
    with pytest.raises(ClipmatchError, match="too many"):
        sample_splits(10**9, 0)


def test_captions_pick_out_their_scene_in_the_gallery():
    _, dev = sample_splits(0, 500, seed=0)
    rng = random.Random(0)
    candidates = [sum(map(read(caption).fits, dev)) for scene in dev for caption in describe(scene, rng, n=2)]
    assert min(candidates) == 1
    assert np.mean([1 / n for n in candidates]) > 0.93  # upper bound of text-to-image R@1


def test_same_seed_same_folder(folder, tmp_path):
    again = generate(tmp_path / "again", n_train=40, n_dev=10, seed=3, progress=False)
    other = generate(tmp_path / "other", n_train=40, n_dev=10, seed=4, progress=False)
    assert contents(again) == contents(folder)
    assert contents(other).keys() == contents(folder).keys()
    assert contents(other) != contents(folder)


def test_scenes_of_a_seed_are_the_same_on_any_machine():
    scene = sample_splits(1, 1, seed=3)[0][0]
    assert content_key(scene) == "sea: 1 big black triangle | left of | 1 big purple ring"
    assert scene.things[0].box == (0.055, 0.4318, 0.4124, 0.7432)
    assert describe(scene, random.Random(0), n=1) == ("a large purple hoop to the right of a large black triangle",)


def test_record_and_captions_belong_to_the_picture(folder):
    scenes = read_scenes(folder)
    train, dev = sample_splits(40, 10, seed=3)
    assert list(scenes.values()) == [*train, *dev]
    captions = load_captions(folder)
    assert not captions.repaired
    assert not captions.dropped
    assert not captions.missing
    assert len(captions.rows) == 50
    for row in captions.rows:
        assert len(row.captions) == 5
        assert all(read(caption).fits(scenes[row.path.name]) for caption in row.captions)


def test_split_files_select_the_rows(folder):
    rows = load_captions(folder).rows
    names = [read_split(folder / "splits" / f"{name}.txt") for name in ("train", "dev")]
    assert [len(set(split)) for split in names] == [40, 10]
    assert not set(names[0]) & set(names[1])
    assert [row.path.name for row in select_split(rows, folder / "splits" / "dev.txt")] == names[1]


def test_a_finished_folder_is_left_alone(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "captions.txt").write_text("untouched")
    (copy / "notes.txt").write_text("mine")
    generate(copy, n_train=40, n_dev=10, seed=3, progress=False)
    assert (copy / "captions.txt").read_text() == "untouched"


@pytest.mark.parametrize("loss", ["settings.json", "Images/dev-00003.jpg"])
def test_a_half_written_folder_is_rebuilt(folder, tmp_path, loss):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / loss).unlink()
    (copy / "captions.txt").write_text("image,cap")
    (copy / "Images" / "train-99999.jpg").write_text("of an earlier, larger set")
    generate(copy, n_train=40, n_dev=10, seed=3, progress=False)
    assert contents(copy) == contents(folder)


def test_other_peoples_files_are_not_touched(folder, tmp_path):
    flickr = tmp_path / "flickr"
    (flickr / "Images").mkdir(parents=True)
    (flickr / "Images" / "1000268201_693b08cb0e.jpg").write_text("photograph")
    (flickr / "captions.txt").write_text("image,caption\n")
    before = contents(flickr)
    with pytest.raises(ClipmatchError, match="new or empty folder"):
        generate(flickr, n_train=4, n_dev=2, progress=False)
    assert contents(flickr) == before
    with pytest.raises(ClipmatchError, match="other settings"):
        generate(folder, n_train=41, n_dev=10, seed=3, progress=False)
    with pytest.raises(ClipmatchError, match="no generated picture set"):
        read_scenes(flickr)
