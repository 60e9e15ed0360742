"""The benchmarks of training and evaluation run at a tiny size, so that they can't rot."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def bench(script, out, *options):
    command = [sys.executable, BENCHMARKS / script, *options, "--rounds", "1", "--json", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_evaluation_memory(tmp_path):
    found, printed = bench("evaluation_memory.py", tmp_path / "out.json", "--pictures", 100)
    assert found["ranks_that_differ"] == 0
    assert "all 600 ranks equal those of the sorted matrix" in printed
    ours, obvious = found["ways"]["clipmatch"], found["ways"]["whole matrix, sorted"]
    assert ours["text_to_image"] == obvious["text_to_image"]
    assert ours["peak_mb"] > 0
    assert ("clip_benchmark" in found["ways"]) == bool(find_spec("clip_benchmark"))
    if find_spec("clip_benchmark"):  # of two copies it finds one, which counts against ours
        peer = found["ways"]["clip_benchmark"]
        assert peer["image_to_text"] == pytest.approx(ours["image_to_text"])
        assert ours["text_to_image"][0] <= peer["text_to_image"][0] <= ours["text_to_image"][0] + 0.02


def test_gradient_cache(tmp_path):
    picture = tmp_path / "plot.png"
    found, _ = bench("gradient_cache.py", tmp_path / "out.json", "--batch", 64, "--chunks", 8, "--plot", picture)
    whole, chunked = found["rows"]
    assert (whole["chunk"], chunked["chunk"]) == (None, 8)
    for figure in ("loss", "gradient_norm"):
        assert chunked[figure] == pytest.approx(whole[figure], rel=1e-3)
    assert whole["times_as_long"] == whole["share_of_memory"] == 1
    assert whole["peak_mb"] > whole["step_mb"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 200_000


def test_training_speed(tmp_path):
    """Of one task, beside what this interpreter has; the picture tower is too small for a ratio to mean anything."""
    options = ["--small", "--batch", 8, "--steps", 1, "--tasks", "heads"]
    found, printed = bench("training_speed.py", tmp_path / "out.json", *options)
    ways = {row["way"]: row for row in found["rows"]}
    assert {"clipmatch", "tutorial", "Trainer"} <= ways.keys()
    assert all(row["pairs_a_second"] > 0 and row["peak_mb"] > 0 for row in found["rows"])
    assert ways["clipmatch"]["clipmatch_is_faster_by"] == 1
    assert found["bfloat16_measured"] or "bfloat16 was not measured" in printed
