"""The figures of generation on arrays that a reader can check, and what a drawn scene shows."""

import numpy as np
import pytest

from clipmatch.data import load_captions
from clipmatch.errors import ClipmatchError
from clipmatch.generation.attributes import (
    ABSENT,
    CHOICES,
    accuracies,
    labels_of,
    load_attributes,
    named_in,
    read_attributes,
    train_attributes,
)
from clipmatch.generation.generation_evaluation import (
    closer_share,
    draw_others,
    interval,
    kernel_distance,
    nearest_distances,
    r_precision,
)
from clipmatch.preprocess import load_image
from clipmatch.scenes import Scene, Thing, read_scenes

EYE = np.eye(4, dtype=np.float32)
BOX = (0.1, 0.1, 0.4, 0.4)


def scene(relation, *things, background="grass"):
    return Scene(background, tuple(Thing(shape, colour, size, BOX) for size, colour, shape in things), relation)


def test_others_are_never_the_prompt_itself_and_never_twice():
    others = draw_others(20, 10, seed=0)
    assert others.shape == (20, 9)
    for own, row in enumerate(others):
        assert own not in row
        assert len(set(row)) == 9
    assert (others != draw_others(20, 10, seed=1)).any()
    with pytest.raises(ClipmatchError, match="there are 5"):
        draw_others(5, 10, seed=0)


def test_a_picture_counts_if_it_is_nearest_to_its_own_prompt():
    others = draw_others(4, 4, seed=0)
    assert r_precision(EYE, EYE, others).tolist() == [True] * 4
    assert r_precision(EYE[[1, 0, 2, 3]], EYE, others).tolist() == [False, False, True, True]
    assert r_precision(EYE[:2], EYE, others).tolist() == [True, True]


def test_ties_are_misses_and_what_is_not_finite_is_refused():
    others = draw_others(4, 4, seed=0)
    same = np.ones((4, 4), np.float32)
    assert not r_precision(same, same, others).any()
    with pytest.raises(ClipmatchError, match="not finite"):
        r_precision(same * np.nan, same, others)


def test_wilsons_interval():
    low, high = interval(0.5, 100)
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)


def test_the_kernel_distance_equals_its_definition():
    rng = np.random.default_rng(0)
    a, b = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (rng.normal(size=(5, 3)), rng.normal(size=(4, 3)))
    )
    k = lambda x, y: (x @ y + 1) ** 3  # noqa: E731
    within_a = np.mean([k(a[i], a[j]) for i in range(5) for j in range(5) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(4) for j in range(4) if i != j])
    across = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(
        within_a + within_b - 2 * across, abs=1e-5
    )


def test_the_kernel_distance_tells_other_pictures_from_more_of_the_same():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(600, 8))
    rows[:, 0] += 2
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    assert abs(kernel_distance(rows[:300], rows[300:])) < 0.02
    assert kernel_distance(rows[:300], np.roll(rows[300:], 1, axis=1)) > 0.5


def test_the_nearest_training_picture():
    pictures = np.array([[0.0, 0.0], [10.0, 0.0]], np.float32)
    training = np.array([[3.0, 4.0], [10.0, 1.0], [50.0, 50.0]], np.float32)
    assert nearest_distances(pictures, training).tolist() == pytest.approx([5.0, 1.0])


def test_copies_are_closer_than_real_pictures_are():
    held_out = np.arange(1, 101, dtype=np.float32)
    assert closer_share(np.zeros(10, np.float32), held_out, 0.01) == 1.0
    assert closer_share(held_out, held_out, 0.05) == 0.05
    assert closer_share(held_out + 100, held_out, 0.05) == 0.0


def test_a_scene_has_one_set_of_labels_however_it_is_told():
    star, fish = ("big", "red", "star"), ("small", "blue", "fish")
    told = labels_of(scene("left of", star, fish, fish))
    assert told.tolist() == labels_of(scene("right of", fish, fish, star)).tolist()
    assert told.tolist() != labels_of(scene("left of", fish, fish, star)).tolist()
    named = {name: CHOICES[name][label] for name, label in zip(CHOICES, told, strict=True)}
    assert named == {
        "background": "grass",
        "layout": "left of",
        **{"count 1": 1, "size 1": "big", "colour 1": "red", "shape 1": "star"},
        **{"count 2": 2, "size 2": "small", "colour 2": "blue", "shape 2": "fish"},
    }
    assert (labels_of(scene(None, star))[-4:] == ABSENT).all()


def test_only_what_the_caption_names_is_asked_for():
    shown = scene("above", ("big", "red", "star"), ("small", "blue", "fish"))
    names = np.array(list(CHOICES))
    assert set(names[~named_in("a large red star above a blue fish", shown)]) == {"background", "size 2"}
    assert named_in("on the grass, a tiny fish in blue under a big red star", shown).all()


def test_exact_means_that_all_that_was_asked_for_is_right():
    labels = np.zeros((2, len(CHOICES)), int)
    read = labels.copy()
    read[1, 0] = 1
    asked = np.ones(labels.shape, bool)
    figures = accuracies(read, labels, asked)
    assert (figures["background"], figures["layout"], figures["all"]) == (0.5, 1.0, 0.5)
    asked[1, 0] = False
    assert accuracies(read, labels, asked)["all"] == 1.0


def test_a_classifier_learns_what_real_scenes_show(scenes, tmp_path):
    rows, shown = load_captions(scenes).rows[:24], read_scenes(scenes)
    pixels = np.stack([np.asarray(load_image(row.path)) for row in rows])
    labels = np.stack([labels_of(shown[row.path.name]) for row in rows])
    assert train_attributes((pixels, labels), (pixels, labels), tmp_path / "net", progress=False, steps=60)
    figures = accuracies(read_attributes(load_attributes(tmp_path / "net"), pixels), labels, labels >= 0)
    assert figures["background"] > 0.9  # of pictures that it has learnt from; by chance 1 / 6
