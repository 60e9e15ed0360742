"""Each benchmark runs at a tiny size, so that it can't rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_cached_features(tmp_path):
    script = ROOT / "benchmarks" / "cached_features.py"
    out = tmp_path / "result.json"
    command = [sys.executable, str(script), "--pictures", "64", "--rounds", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["ratio"] > 10  # hundreds at the usual size
    assert result["ratio"] == result["plain_epoch_s"] / result["cached_epoch_s"]


def test_gradient_cache(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gradient_cache.py"), "--batch", "64", "--chunks", "8"]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, chunked = json.loads(out.read_text())["rows"]
    assert whole["chunk"] is None
    assert chunked["chunk"] == 8
    for figure in ("loss", "gradient_norm"):
        assert chunked[figure] == pytest.approx(whole[figure], rel=1e-3)
    assert whole["peak_mb"] >= whole["before_training_mb"] > 0


def test_training_levers(towers, scenes, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "training_levers.py"), str(towers), "--data", str(scenes)]
    command += ["--seeds", "1", "--only", "chunk", "--json", str(tmp_path / "out.json")]
    command += ["--out", str(tmp_path / "runs"), "--markdown", str(tmp_path / "out.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    base, chunked = json.loads((tmp_path / "out.json").read_text())
    assert chunked["changes"] == {"chunk": 128}
    assert base["text_to_image"] == chunked["text_to_image"]  # a batch of 60 is one chunk
    assert "| chunk 128 |" in (tmp_path / "out.md").read_text()
    assert "no clear difference (+0.0)" in done.stdout
