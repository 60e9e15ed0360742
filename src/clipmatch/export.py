"""A trained model -> an ONNX model folder that searches without PyTorch, compared with the original before it is kept.

In: a model folder, or a `Checkpoint`. Out: image.onnx, text.onnx, tokenizer.json and config.json, and how far their
embeddings are from PyTorch's. Knows nothing of training or searching.

    image.onnx  pixels uint8 [b, s, s, 3] -> embedding [b, d], features [b, h]
    text.onnx   input_ids, attention_mask int64 [b, t] -> embedding [b, d], features [b, h]

Where a tower of convolutions is averaged, image.onnx also has grid [b, p, d]: the embedding of each place alone.

Letters: b batch, s side in pixels, t tokens, d embedding width, h tower width, p places in the picture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnxscript import ir
from torch import Tensor, nn

from clipmatch.checkpoint import Checkpoint, load_checkpoint, model_draft, refuse_foreign
from clipmatch.config import to_json
from clipmatch.crawl import list_images
from clipmatch.embedder import BatchedEmbedder, OnnxEmbedder, TorchEmbedder, read_batches
from clipmatch.errors import ClipmatchError, reason_of
from clipmatch.model import fold_standardisation, last_hidden_state
from clipmatch.modelfolder import (
    CALIBRATION,
    CONFIG,
    IMAGE_GRAPH,
    LOG_SCALE,
    TEXT_GRAPH,
    TOKENIZER,
    config_values,
    fingerprint_of,
    write_json,
)
from clipmatch.preprocess import Transform
from clipmatch.quantisation import quantise_convolutions, quantise_weights, quiet
from clipmatch.tokenizer import Tokenizer

BOUND = 1e-4  # the largest 1 - cosine between PyTorch's embedding and the float graph's that is accepted
INT8_BOUND = 0.05
SCALING, CHECKING = 300, 20  # photographs that tell the scale of what flows between convolutions; that are compared
FILES = (IMAGE_GRAPH, TEXT_GRAPH, TOKENIZER)


@dataclass(frozen=True)
class Export:
    """A written ONNX model folder; differences: the largest 1 - cosine from PyTorch's embeddings, of "image" and
    "text".
    """

    folder: Path
    fingerprint: str
    differences: dict[str, float]


def export_model(model: str | Path, out: str | Path, int8: bool = False, pictures: str | Path | None = None) -> Export:
    """A model folder (or run, or hub repository of one) -> an ONNX model folder, in one step.

    int8: weights of a byte instead of four, for a quarter of the size. A tower of convolutions stays float unless
    `pictures`, a folder of photographs, tells the scale of what flows between them: then it computes on bytes.
    Raises ClipmatchError when a tower can't be expressed in ONNX, when embeddings differ by more than `BOUND`
    (`INT8_BOUND`) from PyTorch's on random sentences and on random pictures (or photographs of the folder, if one is
    given), or when `out` holds other files; nothing is written then.
    """
    checkpoint = load_checkpoint(model)
    scaling, checking = sample_pixels(pictures, checkpoint.transform) if pictures else (None, None)
    if checking is None:
        checking = random_pixels(checkpoint.transform.config.size)
    folder = Path(out).expanduser().resolve()
    refuse_foreign(folder, {CONFIG, CALIBRATION, *FILES})
    architecture, preprocess = to_json(checkpoint.model.architecture()), to_json(checkpoint.transform.config)
    about = {**checkpoint.about, LOG_SCALE: checkpoint.model.log_logit_scale.item()}
    with model_draft(folder) as draft:
        write_graphs(checkpoint, draft)
        checkpoint.tokenizer.save(draft / TOKENIZER)
        if int8:
            quantise_weights(draft / TEXT_GRAPH)
            quantise_weights(draft / IMAGE_GRAPH)
            if scaling is not None:
                quantise_convolutions(draft / IMAGE_GRAPH, scaling, checkpoint.transform)
        fingerprint = fingerprint_of([draft / name for name in FILES], [architecture, preprocess])
        write_json(draft / CONFIG, config_values(architecture, preprocess, about, fingerprint))
        differences = compare(TorchEmbedder(checkpoint, "cpu"), OnnxEmbedder(draft), checkpoint.tokenizer, checking)
        refuse_difference(differences, int8)
        about["exported_from"] = {
            "fingerprint": checkpoint.fingerprint,
            "numbers": "int8" if int8 else "float32",
            "largest_cosine_difference": differences,
        }
        write_json(draft / CONFIG, config_values(architecture, preprocess, about, fingerprint))
    return Export(folder, fingerprint, differences)


def refuse_difference(differences: dict[str, float], int8: bool) -> None:
    """Raise ClipmatchError for graphs whose embeddings are too far from PyTorch's."""
    bound = INT8_BOUND if int8 else BOUND
    if all(value <= bound for value in differences.values()):  # in these words NaN is refused too
        return
    raise ClipmatchError(
        f"The ONNX graphs differ from PyTorch (largest 1 - cosine: {differences['image']:.2g} for pictures, "
        f"{differences['text']:.2g} for texts; at most {bound:g} is accepted), so nothing was written"
        + ("; export without --int8." if int8 else ".")
    )


# Graphs


class ImageGraph(nn.Module):
    """What image.onnx computes, normalisation included."""

    scale: Tensor  # [3, 1, 1]
    shift: Tensor

    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        self.model = checkpoint.model
        self.register_buffer("scale", torch.from_numpy(checkpoint.transform.scale).view(3, 1, 1))
        self.register_buffer("shift", torch.from_numpy(checkpoint.transform.shift).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """uint8 [b, s, s, 3] -> embedding [b, d], features [b, h], and if there is one grid [b, p, d]."""
        encoder = self.model.image_encoder
        values = pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift  # [b, 3, s, s]
        hidden = last_hidden_state(encoder.backbone(pixel_values=values), encoder.backbone)  # [b, t, h]
        features = encoder.pool(hidden)
        outputs = (self.model.project_image(features), features)
        return (*outputs, self.model.project_places(hidden)) if self.model.has_places else outputs


class TextGraph(nn.Module):
    """What text.onnx computes."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        self.model = checkpoint.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask [b, t] -> embedding [b, d], features [b, h]."""
        features = self.model.text_encoder.features(input_ids, attention_mask)
        return self.model.project_text(features), features


def write_graphs(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the two float graphs, image.onnx and text.onnx. Raises ClipmatchError for a tower that ONNX can't express.

    The examples have two rows: PyTorch takes an axis of length one for a constant.
    """
    model = checkpoint.model.cpu().eval()
    for encoder in (model.image_encoder, model.text_encoder):
        fold_standardisation(encoder)
    side, tokens = checkpoint.transform.config.size, min(8, model.config.max_length)
    image = ImageGraph(checkpoint)
    outputs = ["embedding", "features", *(["grid"] if checkpoint.model.has_places else [])]
    pixels = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    with plain_attention(model.image_encoder.backbone):
        write_graph(folder / IMAGE_GRAPH, image, {"pixels": pixels}, {0: "batch"}, outputs)
    ids = torch.zeros(2, tokens, dtype=torch.int64)
    with plain_attention(model.text_encoder.backbone):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        write_graph(folder / TEXT_GRAPH, TextGraph(checkpoint), inputs, {0: "batch", 1: "tokens"}, outputs[:2])


def write_graph(
    path: Path, module: nn.Module, inputs: dict[str, Tensor], dynamic: dict[int, str], outputs: list[str]
) -> None:
    """Write a module as an ONNX file; inputs are named and shaped as the examples, `dynamic` axes are of any length."""
    try:
        with quiet():
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes=tuple(dynamic for _ in inputs),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        # Where in whose Python files each node came from is of no use, and larger than a small graph.
        ir.passes.common.ClearMetadataAndDocStringPass()(program.model)
        ir.passes.common.NameFixPass()(program.model)  # a node of the graph may be called "embedding" as our output is
        ir.save(program.model, path)
    except (ClipmatchError, OSError):
        raise
    except Exception as error:  # the exporter has many kinds, and so has each tower
        reason = reason_of(error.__cause__ or error)
        raise ClipmatchError(f"This model can't be written as {path.name}: {reason}") from error


@contextlib.contextmanager
def plain_attention(backbone: Any) -> Iterator[None]:
    """Attention as products and a softmax, which ONNX has, instead of one of PyTorch's fused kernels."""
    before = getattr(backbone.config, "_attn_implementation", None)
    if before is None or not hasattr(backbone, "set_attn_implementation"):
        yield
        return
    backbone.set_attn_implementation("eager")
    try:
        yield
    finally:
        backbone.set_attn_implementation(before)


# Comparing


def sample_pixels(folder: str | Path, transform: Transform) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Photographs spread over a folder -> pixels [n, s, s, 3] to find scales with, and others to compare on.

    Raises ClipmatchError if no more than `CHECKING` can be read.
    """
    paths = list_images(folder)
    spread = paths[:: max(1, len(paths) // (SCALING + CHECKING))][: SCALING + CHECKING]
    batches = [batch.pixels for batch in read_batches(spread, transform) if batch.paths]
    pixels = np.concatenate(batches) if batches else np.empty(0, np.uint8)
    if len(pixels) <= CHECKING:
        raise ClipmatchError(
            f"{folder} has too few readable photographs ({len(pixels)}); more than {CHECKING} are needed."
        )
    return pixels[CHECKING:], pixels[:CHECKING]


def compare(
    original: BatchedEmbedder, copy: BatchedEmbedder, tokenizer: Tokenizer, pixels: NDArray[np.uint8]
) -> dict[str, float]:
    """The largest 1 - cosine between the two models' embeddings of pictures ("image") and random texts ("text").

    The copy gets the first one alone and the others together, so that both shapes of a batch are seen to work.
    """
    texts = random_texts(tokenizer)
    images = np.concatenate([copy.encode_pixels(pixels[:1]), copy.encode_pixels(pixels[1:])])
    words = np.concatenate([copy.encode_strings(texts[:1]), copy.encode_strings(texts[1:])])
    return {
        "image": largest_difference(original.encode_pixels(pixels), images),
        "text": largest_difference(original.encode_strings(texts), words),
    }


def largest_difference(rows: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    """Unit rows [n, d] twice -> the largest 1 - cosine; NaN if a number is none."""
    cosines = (rows.astype(np.float64) * others.astype(np.float64)).sum(axis=1)
    return float(np.max(np.abs(1 - cosines)))


def random_pixels(side: int) -> NDArray[np.uint8]:
    """Always the same pictures, uint8 [6, s, s, 3]: noise, coarse to fine."""
    rng = np.random.default_rng(0)
    pictures = []
    for cells in (1, 2, 4, 16, side, side):
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        places = np.arange(side) * cells // side
        pictures.append(noise[places][:, places])
    return np.stack(pictures)


def random_texts(tokenizer: Tokenizer) -> list[str]:
    """Always the same sentences for a tokenizer: its own words, 1 to 100 of them (more than many models read)."""
    rng = np.random.default_rng(0)
    words = sorted(word for word in tokenizer.backend.get_vocab() if word.isalpha()) or ["a"]
    return [" ".join(rng.choice(words, count)) for count in (1, 2, 3, 5, 8, 12, 20, 100)]
