"""Concepts: made-up features and sentences from a classifier's directions."""

import numpy as np
import pytest

from clipmatch.concepts import TEMPLATES, Concepts, load_concepts, made_up_features
from clipmatch.errors import ClipmatchError

PETS = ("tabby", "husky", "beagle")


@pytest.fixture
def pets():
    """Three concepts with a direction each; two of them are dogs."""
    kinds = [["cat"], ["dog"], ["dog"]]
    return Concepts(np.full(4, 10, np.float32), np.eye(3, 4, dtype=np.float32), [[name] for name in PETS], kinds)


def drawn_names(drawn):
    return [PETS[int(direction.argmax())] for direction in drawn.directions]


def test_a_sentence_names_its_concept_or_the_kind_above(pets):
    seen = set()
    for seed in range(60):
        drawn = pets.draw(3, np.random.default_rng(seed))
        seen |= set(zip(drawn_names(drawn), drawn.sentences, strict=True))
    terms = {"tabby": ("tabby", "cat"), "husky": ("husky", "dog"), "beagle": ("beagle", "dog")}
    allowed = {(name, form.format(term)) for name in PETS for term in terms[name] for form in TEMPLATES}
    assert seen <= allowed
    assert len(seen) > len(allowed) / 2


def test_what_fits_another_concept_is_no_negative_of_it(pets):
    for seed in range(20):
        drawn = pets.draw(3, np.random.default_rng(seed))
        for i, name in enumerate(drawn_names(drawn)):
            for j, sentence in enumerate(drawn.sentences):
                fits = i != j and "dog" in sentence and name in ("husky", "beagle")
                assert drawn.excluded[i, j] == fits


def test_made_up_features_by_hand(pets):
    drawn = pets.draw(1, np.random.default_rng(0))
    pictures = np.array([[12, 10, 10, 14]], np.float32)
    made_up = made_up_features(pets, drawn, pictures, np.random.default_rng(0))
    halfway = np.array([[11, 10, 10, 12]])  # from the centre to the picture
    np.testing.assert_allclose(made_up, halfway + drawn.directions)
    assert 1 <= drawn.directions.max() <= 4


def test_a_file_brings_back_what_was_saved(pets, tmp_path):
    pets.save(tmp_path / "pets")
    back = load_concepts(tmp_path / "pets", 4)
    assert (back.names, back.kinds) == (pets.names, pets.kinds)
    np.testing.assert_array_equal(back.directions, pets.directions)
    np.testing.assert_array_equal(back.centre, pets.centre)


def test_a_file_for_another_tower_is_refused(pets, tmp_path):
    pets.save(tmp_path / "pets")
    with pytest.raises(ClipmatchError, match="features of 4 numbers, the model's have 384"):
        load_concepts(tmp_path / "pets", 384)


@pytest.mark.parametrize("content", [None, b"", b"no safetensors file"])
def test_a_damaged_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ClipmatchError, match="bad can't be read"):
        load_concepts(tmp_path / "bad", 4)


def test_directions_that_lie_column_by_column_in_memory_are_read_as_they_were(tmp_path):
    directions = np.arange(6, dtype=np.float32).reshape(3, 2).T  # [2, 3], a view of its transpose
    Concepts(np.zeros(3, np.float32), directions, [["a"], ["b"]], [[], []]).save(tmp_path / "c.safetensors")
    assert load_concepts(tmp_path / "c.safetensors", 3).directions.tolist() == [[0, 2, 4], [1, 3, 5]]
