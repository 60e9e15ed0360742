"""What can be learnt of, and made from, an 8-bit ONNX graph: the same graph in float32, the work that it does.

In: an ONNX file. Out: another, or counts. Knows nothing of models or pictures.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper


def write_float(source: Path, target: Path) -> None:
    """The graph with float32 weights, that computes on float32: bytes are turned into floats once, here.

    Where values were rounded to bytes they were also cut off at the ends, which is how an activation such as ReLU6 is
    kept in an 8-bit graph; there it becomes a Clip again.
    """
    model = onnx.load(str(source))
    graph = model.graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    rounded = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    nodes, names = [], {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            continue
        if node.op_type == "DequantizeLinear" and node.input[0] in values:
            values[node.output[0]] = dequantised(node, values)
        elif node.op_type == "DequantizeLinear" and node.input[0] in rounded:
            before = rounded[node.input[0]]
            scale, zero = values[before.input[1]], values[before.input[2]]
            kept = names.get(before.input[0], before.input[0])
            if zero == 0:  # nothing below: an activation
                ends = {f"{before.output[0]}_{end}": np.float32(at * scale) for end, at in (("low", 0), ("high", 255))}
                values.update({name: np.array(at) for name, at in ends.items()})
                nodes.append(onnx.helper.make_node("Clip", [kept, *ends], [node.output[0]]))
            else:
                names[node.output[0]] = kept
        else:
            node.input[:] = [names.get(name, name) for name in node.input]
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items() if name in used)
    onnx.checker.check_model(model)
    onnx.save(model, str(target))


def dequantised(node: onnx.NodeProto, values: dict[str, np.ndarray]) -> np.ndarray:
    """What a DequantizeLinear makes of a constant."""
    whole, scale, *zero = (values[name] for name in node.input)
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    shape = [-1 if place == axis else 1 for place in range(whole.ndim)] if scale.ndim and whole.ndim else []
    shift = zero[0].astype(np.int32).reshape(shape) if zero else 0
    return ((whole.astype(np.int32) - shift) * scale.reshape(shape)).astype(np.float32)


def work(source: Path, output: str, batch: int) -> dict[str, float]:
    """What a picture costs on the way to `output`: multiply-adds, and megabytes that are read and written.

    Of convolutions and matrix products alone, each reading its input and writing its output once, as bytes where the
    graph is of bytes; the weights are read once for a `batch` of pictures.
    """
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(source))).graph
    shapes = {value.name: sizes(value) for value in [*graph.value_info, *graph.input, *graph.output]}
    shapes.update({tensor.name: tuple(tensor.dims) for tensor in graph.initializer})
    made_by = {name: node for node in graph.node for name in node.output}
    multiply_adds = megabytes = 0.0
    for node in needed(graph, output, made_by):
        if node.op_type not in ("Conv", "Gemm"):
            continue
        weights = shapes[node.input[1]]
        turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        summed = math.prod(weights[1:] if node.op_type == "Conv" or turned else weights[:1])
        multiply_adds += math.prod(shapes[node.output[0]]) * summed
        small = node.input[1] in made_by and made_by[node.input[1]].op_type == "DequantizeLinear"
        numbers = math.prod(shapes[node.input[0]]) + math.prod(shapes[node.output[0]]) + math.prod(weights) / batch
        megabytes += numbers * (1 if small else 4) / 1e6
    return {"multiply_adds": multiply_adds, "megabytes": megabytes}


def sizes(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """A value's shape; lengths that are not fixed, the batch, are 1."""
    return tuple(axis.dim_value or 1 for axis in value.type.tensor_type.shape.dim)


def needed(graph: onnx.GraphProto, output: str, made_by: dict[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes on the way to an output, in order."""
    wanted, waiting = set(), [output]
    while waiting:
        name = waiting.pop()
        if name in made_by and name not in wanted:
            wanted.update(made_by[name].output)
            waiting += made_by[name].input
    return [node for node in graph.node if wanted.intersection(node.output)]
