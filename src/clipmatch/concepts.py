"""What an image tower's classifier knows without any picture: words, and where in feature space each belongs.

In: a file of terms and directions. Out: made-up pooled features and the sentence for each, as pairs to learn from
beside captioned pictures. They keep a model that is trained on a narrow set of photographs open to everything that its
tower was trained to tell apart. Knows nothing of models or losses.

A row of a classifier's last layer points to where the features of its class lie. A training picture's features,
half way to the average picture and moved along that row, stand in for a picture of the class; its names and those of
the kinds above it (a tabby is a cat) stand in for a caption.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clipmatch.errors import ClipmatchError

TEMPLATES = (
    "{}",
    "a {}",
    "a photo of a {}",
    "a picture of the {}",
    "{}s",
    "a close-up of a {}",
    "a {} in a photograph",
    "there is a {}",
)
OWN_NAME = 0.6  # how often a concept goes by a name of its own rather than by that of a kind above it
STRENGTH = (1.0, 4.0)  # how far along a direction, in the file's units
KEPT = 0.5  # of what makes a training picture differ from the average one


@dataclass(frozen=True, eq=False)
class ConceptBatch:
    """directions [k, h], already of random strength; k sentences; excluded [k, k]: sentence j fits concept i too, so it
    is no negative of it.
    """

    directions: NDArray[np.float32]
    sentences: list[str]
    excluded: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Concepts:
    """centre [h]: the average picture's features; directions [n, h]; names and kinds: for each concept its own names
    and those of the kinds above it.
    """

    centre: NDArray[np.float32]
    directions: NDArray[np.float32]
    names: list[list[str]]
    kinds: list[list[str]]

    def draw(self, count: int, rng: np.random.Generator) -> ConceptBatch:
        """`count` different concepts (all, if there are fewer), each with a sentence."""
        chosen = rng.permutation(len(self.names))[:count]
        terms = [self.draw_term(int(concept), rng) for concept in chosen]
        sentences = [TEMPLATES[rng.integers(len(TEMPLATES))].format(term) for term in terms]
        known = [{*self.names[concept], *self.kinds[concept]} for concept in chosen]
        excluded = np.array([[term in words for term in terms] for words in known])
        np.fill_diagonal(excluded, False)
        strength = rng.uniform(*STRENGTH, size=(len(chosen), 1)).astype(np.float32)
        return ConceptBatch(self.directions[chosen] * strength, sentences, excluded)

    def draw_term(self, concept: int, rng: np.random.Generator) -> str:
        """A name of the concept, or of a kind that it belongs to."""
        names, kinds = self.names[concept], self.kinds[concept]
        words = names if not kinds or rng.random() < OWN_NAME else kinds
        return words[rng.integers(len(words))]

    def save(self, path: Path) -> None:
        """Write one safetensors file, the words in its header."""
        tensors = {"centre": self.centre, "directions": self.directions}
        # Row by row: the library writes the bytes of an array as they lie in memory, and not all lie so.
        rows = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
        save_file(rows, path, {"words": json.dumps([self.names, self.kinds])})


def load_concepts(path: str | Path, width: int) -> Concepts:
    """Read a file that `Concepts.save` wrote. Raises ClipmatchError if it can't be read or its vectors are not `width`
    wide, the width of the model's pooled image features.
    """
    try:
        with safe_open(path, "numpy") as file:
            names, kinds = json.loads(file.metadata()["words"])
            concepts = Concepts(file.get_tensor("centre"), file.get_tensor("directions"), names, kinds)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ClipmatchError(f"The concept file {path} can't be read ({error}); make it again.") from error
    if concepts.directions.shape != (len(names), width):
        raise ClipmatchError(
            f"The concept file {path} was made for features of {concepts.directions.shape[1]} numbers, the model's "
            f"have {width}; make one for this image tower and pooling."
        )
    return concepts


def made_up_features(
    concepts: Concepts, batch: ConceptBatch, pictures: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Features of pictures that could show the batch's concepts [k, h]; pictures [b, h]: those of real ones."""
    scenes: Sequence[int] = rng.integers(len(pictures), size=len(batch.sentences)).tolist()
    features: NDArray[np.float32] = concepts.centre + KEPT * (pictures[scenes] - concepts.centre) + batch.directions
    return features
