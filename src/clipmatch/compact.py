"""Heads that learn on the towers of an ONNX model, such as the one that comes with clipmatch.

In: a model folder with image.onnx and text.onnx. Out: a checkpoint to train: its towers are the graphs as far as their
pooled features, frozen, its heads are PyTorch's. Saved, it is an ONNX model folder again: the same graphs with other
numbers in their heads. Knows nothing of losses or steps.

Letters: b batch, s side in pixels, t tokens, h tower width, d embedding width, k samples.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.utils import Extractor
from torch import Tensor, nn

from clipmatch.checkpoint import Checkpoint, model_config, model_draft, refuse_foreign, write_extra
from clipmatch.config import to_json
from clipmatch.embedder import OnnxEmbedder, embedded_folder
from clipmatch.errors import ClipmatchError
from clipmatch.export import BOUND, FILES, largest_difference, random_pixels, random_texts
from clipmatch.model import CLIPModel
from clipmatch.modelfolder import (
    CALIBRATION,
    CONFIG,
    IMAGE_GRAPH,
    LOG_SCALE,
    LOGIT_BIAS,
    TEXT_GRAPH,
    TOKENIZER,
    config_values,
    find_folder,
    fingerprint_of,
    read_config,
    write_json,
)
from clipmatch.preprocess import Transform
from clipmatch.session import open_session, output_shape

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

HEADS = {  # the weights behind the pooled features, in each graph
    IMAGE_GRAPH: ("image_encoder.fc.", "image_projection."),
    TEXT_GRAPH: ("text_encoder.fc.", "text_projection."),
}
PREFIX = "model."  # of their names in the graphs
BASE = "towers_of"  # the fingerprint of the model that the towers were first read from
KEPT = ("licence", LOG_SCALE, LOGIT_BIAS, BASE)  # of what config.json says: the figures are of other heads


@dataclass(frozen=True, eq=False)
class OnnxCheckpoint(Checkpoint):
    """A checkpoint whose towers are ONNX graphs. graphs: by file name; samples: features [k, h] from each, to compare
    the heads on; architecture: the "model" part of config.json.
    """

    graphs: dict[str, onnx.ModelProto] = field(default_factory=dict)
    samples: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    architecture: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path, extra: dict[str, Any] | None = None) -> str:
        """Write an ONNX model folder with the heads as they are now, in one step. Returns the fingerprint.

        Raises ClipmatchError when the folder can't be written or a graph does not give what PyTorch's heads give.
        """
        folder = Path(folder).expanduser().resolve()
        refuse_foreign(folder, {CONFIG, CALIBRATION, *FILES, *(extra or {})})
        preprocess = to_json(self.transform.config)
        about = {**self.about, LOG_SCALE: self.model.log_logit_scale.item()}
        with model_draft(folder) as draft:
            for name, graph in self.graphs.items():
                write_head(graph, head_of(self.model, name))
                compare_head(graph, self.samples[name], self.project(name, self.samples[name]))
                onnx.save(graph, str(draft / name))
            self.tokenizer.save(draft / TOKENIZER)
            fingerprint = fingerprint_of([draft / name for name in FILES], [self.architecture, preprocess])
            write_json(draft / CONFIG, config_values(self.architecture, preprocess, about, fingerprint))
            write_extra(draft, extra or {})
        return fingerprint

    def project(self, name: str, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features [k, h] of one side -> unit rows [k, d], by PyTorch, without dropout."""
        project = self.model.project_image if name == IMAGE_GRAPH else self.model.project_text
        training, device = self.model.training, self.model.log_logit_scale.device
        self.model.eval()
        with torch.inference_mode():
            rows: NDArray[np.float32] = project(torch.from_numpy(features).to(device)).cpu().numpy()
        self.model.train(training)
        return rows


def load_heads(folder: str | Path | None = None) -> OnnxCheckpoint:
    """An ONNX model folder, by default the one that comes with clipmatch -> its heads, to be trained on its towers.

        train(DataConfig("captions.txt", "Images"), TrainConfig(out="out/mine"), load_heads())

    gives a model folder out/mine/best that searches without PyTorch. The towers stay as they are, bit for bit.
    Raises ClipmatchError when the folder is damaged, its heads are not of the form that `clipmatch export` writes, or
    this installation has no model of its own.
    """
    embedder = OnnxEmbedder(find_folder(folder) if folder else embedded_folder())
    graphs = {name: onnx.load(str(embedder.folder / name), load_external_data=False) for name in HEADS}
    architecture = read_config(embedder.folder)["model"]
    # What a tower gives is pooled already: its only "token", to be taken as it is.
    config = replace(model_config(architecture), image_pooling="cls", text_pooling="cls")
    image = ImageTower(open_session(embedder.folder / IMAGE_GRAPH), digest_of(graphs[IMAGE_GRAPH]), embedder.transform)
    text = TextTower(embedder.text_session, digest_of(graphs[TEXT_GRAPH]))
    model = CLIPModel(config, (image, text)).eval()
    with torch.no_grad():
        for name, graph in graphs.items():
            read_head(graph, head_of(model, name), embedder.folder / name)
        model.log_logit_scale.fill_(math.log(embedder.logit_scale))
    about = {BASE: embedder.fingerprint, **{key: embedder.about[key] for key in KEPT if key in embedder.about}}
    samples = {
        IMAGE_GRAPH: embedder.run_image(random_pixels(embedder.transform.config.size), "features"),
        TEXT_GRAPH: embedder.run_text(random_texts(embedder.tokenizer), "features"),
    }
    return OnnxCheckpoint(
        model, embedder.tokenizer, embedder.transform, about, embedder.fingerprint, graphs, samples, architecture
    )


# Towers


@dataclass(frozen=True)
class GraphConfig:
    """What a tower says of itself. graph: SHA-256 of its graph, heads left out: it decides what the features are."""

    hidden_size: int
    graph: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class OnnxTower(nn.Module):
    """A graph as a frozen backbone: what it gives is the pooled features, as a single hidden state [b, 1, h]."""

    def __init__(self, session: InferenceSession, digest: str):
        super().__init__()
        self.session = session
        self.config = GraphConfig(output_shape(session, "features")[0], digest)

    def run(self, device: torch.device, **inputs: NDArray[Any]) -> SimpleNamespace:
        """The graph's inputs by name -> features, on a device."""
        rows = torch.from_numpy(self.session.run(["features"], inputs)[0]).to(device)  # [b, h]
        return SimpleNamespace(last_hidden_state=rows[:, None])


class ImageTower(OnnxTower):
    """The image graph."""

    def __init__(self, session: InferenceSession, digest: str, transform: Transform):
        super().__init__(session, digest)
        self.transform = transform

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        """Normalised pixels [b, 3, s, s], which the graph wants as they were before -> features."""
        values = pixel_values.permute(0, 2, 3, 1).cpu().numpy()  # [b, s, s, 3]
        pixels = np.rint((values - self.transform.shift) / self.transform.scale).clip(0, 255).astype(np.uint8)
        return self.run(pixel_values.device, pixels=pixels)


class TextTower(OnnxTower):
    """The text graph."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """Ids and mask [b, t] -> features."""
        ids, mask = input_ids.cpu().numpy(), attention_mask.cpu().numpy()
        return self.run(input_ids.device, input_ids=ids, attention_mask=mask)


# Heads


def head_of(model: CLIPModel, graph: str) -> dict[str, Tensor]:
    """The weights of a model that belong to the head in a graph, by their names there."""
    return {PREFIX + name: value for name, value in model.state_dict().items() if name.startswith(HEADS[graph])}


def digest_of(graph: onnx.ModelProto) -> str:
    """SHA-256 of a graph without its head's numbers, so that features are found again when those have changed."""
    bare = onnx.ModelProto()
    bare.CopyFrom(graph)
    heads = tuple(PREFIX + part for parts in HEADS.values() for part in parts)
    for tensor in bare.graph.initializer:
        if tensor.name.startswith(heads):
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name))
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def read_head(graph: onnx.ModelProto, head: dict[str, Tensor], path: Path) -> None:
    """Fill a head with a graph's numbers. Raises ClipmatchError when they are not there as plain float32."""
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    for name, value in head.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT or tuple(tensor.dims) != tuple(value.shape):
            raise ClipmatchError(f"{path} has no head that can be trained (no {name}); export the model again.")
        value.copy_(torch.from_numpy(numpy_helper.to_array(tensor).copy()))


def write_head(graph: onnx.ModelProto, head: dict[str, Tensor]) -> None:
    """Put a head's numbers into a graph."""
    for tensor in graph.graph.initializer:
        if tensor.name in head:
            tensor.CopyFrom(numpy_helper.from_array(head[tensor.name].detach().cpu().numpy(), tensor.name))


def compare_head(graph: onnx.ModelProto, features: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Raise ClipmatchError unless a graph makes the expected embeddings [k, d] of features [k, h]."""
    from onnxruntime import InferenceSession

    inputs = blank_inputs(graph, len(features))  # they say how large the batch is
    head = Extractor(graph).extract_model([*inputs, "features"], ["embedding"])
    session = InferenceSession(head.SerializeToString(), providers=["CPUExecutionProvider"])
    difference = largest_difference(expected, session.run(["embedding"], {**inputs, "features": features})[0])
    if not difference <= BOUND:  # in these words NaN is refused too
        raise ClipmatchError(
            f"A head gives other embeddings as an ONNX graph than in PyTorch (largest 1 - cosine {difference:.2g}, at "
            f"most {BOUND:g} is accepted), so this model can't be trained; export it again."
        )


def blank_inputs(graph: onnx.ModelProto, count: int) -> dict[str, NDArray[Any]]:
    """Zeros for a graph's inputs: `count` rows, other free axes of length one."""
    blanks = {}
    for value in graph.graph.input:
        kind = value.type.tensor_type
        sizes = [axis.dim_value or 1 for axis in kind.shape.dim[1:]]
        blanks[value.name] = np.zeros((count, *sizes), onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return blanks
