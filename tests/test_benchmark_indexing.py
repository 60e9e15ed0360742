"""The benchmarks of indexing and of a first query, at a tiny size, so that they can't rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import common  # noqa: E402
import graphs  # noqa: E402
import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import peers  # noqa: E402

from clipmatch.embedder import embedded_folder  # noqa: E402


def measured(tmp_path, script, *options):
    """What a benchmark writes, and what it prints."""
    command = [sys.executable, ROOT / "benchmarks" / script, *options, "--json", tmp_path / "result.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "result.json").read_text()), done.stdout


def test_indexing(scenes, tmp_path):
    options = ["--files", "6", "--rounds", "1", "--no-rclip", "--sizes", "as they are", "4 megapixels"]
    result, printed = measured(tmp_path, "indexing.py", "--data", scenes, *options)
    small, large = result["sets"]["as they are"], result["sets"]["4 megapixels"]
    assert small["mean_megapixels"] == pytest.approx(32 * 32 / 1e6)
    assert large["mean_megapixels"] == pytest.approx(4, rel=0.01)
    rates = small["files_per_second"]
    assert small["ours_to"]["bare, each"] == rates["clipmatch index"][0] / rates["bare, each"][0]
    for found in (small, large):
        assert found["files"] == 6
        assert found["difference"]["one by one"] < 1e-5
    assert set(result["weights"]["pictures_per_second"]) == {"8 bits", "float32"}
    assert "rclip | not installed" in printed


def test_cold_query(scenes, tmp_path):
    result, printed = measured(
        tmp_path, "cold_query.py", "--data", scenes, "--rows", "60", "--rounds", "1", "--no-peers"
    )
    assert set(result["seconds"]) == {"floor", "clipmatch find"}
    assert result["ours_to"]["floor"] == result["seconds"]["clipmatch find"][0] / result["seconds"]["floor"][0]
    assert 30 < result["peak_mb"]["floor"] < 500
    assert "| transformers | not installed |" in printed


def test_where_the_time_goes(scenes, tmp_path):
    result, printed = measured(tmp_path, "indexing_profile.py", "--data", scenes, "--files", "4", "--rounds", "1")
    small, large = (found["milliseconds"] for found in result["sets"].values())
    assert large["decode"] > small["decode"] > 0
    found = result["shares"]
    assert found["share"]["bytes"] == found["used"]["bytes"] / found["limit"]["bytes"]
    assert "share of the limit" in printed


def test_the_work_of_a_convolution_and_a_product(tmp_path):
    """[1, 3, 4, 4] by 5 kernels of 3 x 2 x 2 -> [1, 5, 3, 3]: 45 numbers of 12 products; then 45 by 45 x 7."""
    make = graphs.onnx.helper
    weights = {"kernel": np.ones((5, 3, 2, 2), np.float32), "matrix": np.ones((45, 7), np.float32)}
    shapes = {"pixels": [1, 3, 4, 4], "embedding": [1, 7]}
    ends = [make.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()]
    nodes = [
        make.make_node("Conv", ["pixels", "kernel"], ["grid"]),
        make.make_node("Flatten", ["grid"], ["flat"]),
        make.make_node("Gemm", ["flat", "matrix"], ["embedding"]),
    ]
    tensors = [graphs.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = make.make_graph(nodes, "small", ends[:1], ends[1:], tensors)
    graphs.onnx.save(make.make_model(graph), tmp_path / "small.onnx")
    numbers = (48 + 45 + 60 / 2) + (45 + 7 + 315 / 2)
    found = graphs.work(tmp_path / "small.onnx", "embedding", batch=2)
    assert found == {"multiply_adds": 45 * 12 + 7 * 45, "megabytes": pytest.approx(4 * numbers / 1e6)}


def test_the_float_graph_computes_what_the_bytes_do(tmp_path):
    source, target = embedded_folder() / "image.onnx", tmp_path / "float.onnx"
    graphs.write_float(source, target)
    side = onnxruntime.InferenceSession(source).get_inputs()[0].shape[1]
    smooth = np.linspace(0, 255, side).astype(np.uint8)
    pixels = np.broadcast_to(smooth[:, None], (1, side, side, 3))
    rows = [onnxruntime.InferenceSession(path).run(["embedding"], {"pixels": pixels})[0] for path in (source, target)]
    assert float(np.sum(rows[0] * rows[1])) > 0.9
    assert not any("Quantize" in node.op_type for node in graphs.onnx.load(target).graph.node)


def test_a_model_for_rclip(tmp_path):
    peers.write_rclip_model(tmp_path, layers=1)
    for name, value in (("visual", np.zeros((3, 3, 256, 256), np.float32)), ("textual", np.full((3, 77), 49407))):
        session = onnxruntime.InferenceSession(tmp_path / peers.MODEL / f"{name}.onnx")
        assert session.run(["output"], {"input": value})[0].shape == (3, 512)
    merges = peers.made_up_merges().split("\n")
    assert len(set(merges)) == 1 + 49408 - 2 * 256 - 2  # a heading; bytes, bytes that end a word, two marks


def test_the_peak_of_a_process_is_its_own():
    ballast = bytearray(300_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])  # held by this process, which starts the other
    small = common.run([sys.executable, "-c", "print('here')"])
    large = common.run([sys.executable, "-c", "bytearray(b'x') * 100_000_000"])
    assert small.stdout == "here\n"
    assert small.peak_mb < 100
    assert 100 < large.peak_mb < 200
    assert 0 < small.seconds < 10


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"ended with 1: .*wrong"):
        common.run([sys.executable, "-c", "import sys; sys.exit('wrong')"])
