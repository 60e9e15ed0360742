"""Float graphs -> graphs that hold their weights as bytes, and of convolutions compute on bytes.

In: ONNX files, and photographs that tell the scale of what flows between convolutions. Out: the same files, changed in
place. Knows nothing of training or model folders.

Letters: n pictures, s side in pixels, v words, h tower width, o and i output and input channels, k side of a kernel.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from clipmatch.errors import ClipmatchError
from clipmatch.preprocess import Transform

PAIR = 128  # 255 * 128 is the largest sum of two products of a byte and a weight that fits into 16 bits


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporter and quantiser advise their own developers; that is of no use to a person who exports."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def quantise_weights(path: Path) -> None:
    """Hold the large matrices of a float graph as bytes, in place.

    Word vectors have a scale for each row. The towers' matrices have one for each 64 numbers of a column, and what they
    are multiplied with is rounded row by row, so that no row depends on its neighbours in a batch. The heads stay
    float: they are small, and they may subtract a large mean, whose error would swamp the rest. (The exporter writes
    their products, of pooled rows, as Gemm, and those of the towers as MatMul.)
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(str(path))
    quantise_tables(model.graph)
    with quiet():
        quantiser = MatMulNBitsQuantizer(model, bits=8, block_size=64, is_symmetric=True, accuracy_level=4)
        quantiser.process()
    onnx.save(quantiser.model.model, str(path))


def quantise_convolutions(path: Path, pixels: NDArray[np.uint8], transform: Transform) -> None:
    """Make the convolutions of a graph compute on bytes, in place (Jacob et al. 2018).

    Their weights get a scale for each channel. What flows between them gets one scale a place, from its range over
    pixels [n, s, s, 3], which `transform` made. Raises ClipmatchError if there are no convolutions.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Pictures(CalibrationDataReader):  # type: ignore[misc]
        rest = iter(pixels)

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            picture = next(self.rest, None)
            return None if picture is None else {"pixels": picture[None]}

    if not any(node.op_type == "Conv" for node in onnx.load(str(path)).graph.node):
        raise ClipmatchError("The image tower has no convolutions; export without pictures.")
    with quiet():
        quant_pre_process(str(path), str(path), skip_symbolic_shape=True)
        graph, scale = onnx.load(str(path)).graph, byte_scale(transform)
        quantize_static(
            str(path),
            str(path),
            Pictures(),
            op_types_to_quantize=["Conv", "Add", "Clip"],
            nodes_to_exclude=head_nodes(graph),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"TensorQuantOverrides": {first_convolution(graph).input[0]: [scale]} if scale else {}},
        )
    model = onnx.load(str(path))
    limit_pairs(model.graph)
    if scale:
        take_bytes(model.graph)
    onnx.save(model, str(path))


def first_convolution(graph: onnx.GraphProto) -> onnx.NodeProto:
    """The one that sees the picture."""
    return next(node for node in graph.node if node.op_type == "Conv")


def byte_scale(transform: Transform) -> dict[str, NDArray[Any]] | None:
    """The scale and zero by which each byte stands for its own normalised value; None if a byte can't.

    It can where all channels have one mean, which is a grey level, and one deviation.
    """
    zeros = -transform.shift / transform.scale  # [3], in grey levels
    zero = np.rint(zeros)
    if np.ptp(transform.scale) > 0 or np.abs(zeros - zero[0]).max() > 1e-3 or not 0 <= zero[0] <= 255:
        return None
    return {"scale": np.array(transform.scale[0]), "zero_point": np.array(zero[0], np.uint8)}


def take_bytes(graph: onnx.GraphProto) -> None:
    """Let the first convolution of a graph that was quantised by `byte_scale` take the pixels as they are.

    To normalise and round them, only to get them back, takes a fifth of the time.
    """
    first = first_convolution(graph).input[0]
    source = next(node for node in graph.node if first in node.output)
    source.input[0] = next(node.output[0] for node in graph.node if node.op_type == "Transpose")
    prune(graph)


def limit_pairs(graph: onnx.GraphProto) -> None:
    """Make weights smaller where two products that are added could overflow, in place.

    Processors without an instruction for products of bytes (VNNI; most from before 2020) add each two of them in 16
    bits and cut off what is larger, and a picture's embedding would come out another there. So the weights of an output
    channel are rounded to fewer steps until no two neighbours can overflow; of depthwise convolutions none are added.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        parts = [maker[name].input for name in node.input[1:3]]  # of weights [o, i, k, k] and bias [o]
        weights = numpy_helper.to_array(tensors[parts[0][0]])
        if weights.shape[1] == 1:  # depthwise
            continue
        worst = largest_pair(weights)  # [o]
        shrink = np.where(worst > PAIR, (PAIR - 2) / np.maximum(worst, 1), 1.0)  # - 2: rounding adds up to half twice
        for (values, scale, *_), axes in zip(parts, (weights.ndim - 1, 0), strict=False):
            numbers = numpy_helper.to_array(tensors[values])
            smaller = np.rint(numbers * shrink.reshape(-1, *[1] * axes)).astype(numbers.dtype)
            scales = (numpy_helper.to_array(tensors[scale]) / shrink).astype(np.float32)
            tensors[values].CopyFrom(numpy_helper.from_array(smaller, values))
            tensors[scale].CopyFrom(numpy_helper.from_array(scales, scale))


def largest_pair(weights: NDArray[np.int8]) -> NDArray[np.int32]:
    """Weights [o, i, k, k] -> [o]: the largest sum of two neighbours of one sign, in either order of memory."""
    found = np.zeros(len(weights), np.int32)
    for order in (weights, np.moveaxis(weights, 1, -1)):  # channels first, channels last
        flat = order.reshape(len(weights), -1).astype(np.int32)
        for signed in (np.maximum(flat, 0), np.maximum(-flat, 0)):
            found = np.maximum(found, (signed[:, 1:] + signed[:, :-1]).max(axis=1, initial=0))
    return found


def prune(graph: onnx.GraphProto) -> None:
    """Take away nodes and numbers that no output needs."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    numbers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(numbers)


def head_nodes(graph: onnx.GraphProto) -> list[str]:
    """The names of a graph's nodes from the first products of the heads on: they stay float."""
    behind: set[str] = set()
    names = []
    for node in graph.node:
        if node.op_type == "Gemm" or behind.intersection(node.input):
            behind.update(node.output)
            names.append(node.name)
    return names


def quantise_tables(graph: onnx.GraphProto) -> None:
    """Replace each table [v, h] that rows are looked up in by int8 rows and a scale for each."""
    tables = {table.name: table for table in graph.initializer if len(table.dims) == 2}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" and not axis_of(node) else None
        if table is None or table.data_type != onnx.TensorProto.FLOAT:
            nodes.append(node)
            continue
        values = numpy_helper.to_array(table)
        scales = np.maximum(np.abs(values).max(axis=1, keepdims=True), 1e-12) / 127  # [v, 1]
        rounded = np.rint(values / scales).astype(np.int8)
        nodes += look_up(node, graph, rounded, scales.astype(np.float32))
    del graph.node[:]
    graph.node.extend(nodes)
    prune(graph)


def axis_of(node: onnx.NodeProto) -> int:
    """The axis that a Gather node looks along."""
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 0)


def look_up(
    node: onnx.NodeProto, graph: onnx.GraphProto, rows: NDArray[np.int8], scales: NDArray[np.float32]
) -> list[onnx.NodeProto]:
    """The nodes that do a Gather's work on int8 rows [v, h] with scales [v, 1], which are added to the graph."""
    name = node.output[0]
    graph.initializer.extend(
        [numpy_helper.from_array(rows, f"{name}_rows"), numpy_helper.from_array(scales, f"{name}_scales")]
    )
    make = onnx.helper.make_node
    return [
        make("Gather", [f"{name}_rows", node.input[1]], [f"{name}_int8"]),
        make("Cast", [f"{name}_int8"], [f"{name}_float"], to=onnx.TensorProto.FLOAT),
        make("Gather", [f"{name}_scales", node.input[1]], [f"{name}_scale"]),
        make("Mul", [f"{name}_float", f"{name}_scale"], [name]),
    ]
