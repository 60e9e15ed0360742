"""Each benchmark runs at a tiny size, so that it can't rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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


def run(name, *options):
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quantised(scenes, tmp_path):
    out = tmp_path / "out.json"
    printed = run("quantised.py", "--data", scenes, "--rows", 3000, "--json", out)
    found = json.loads(out.read_text())["recall"]
    assert found["int8"] > 0.9 > found["1 bit"]
    assert found["1 bit, the best 1000 by float32"] > found["1 bit, the best 100 by float32"] > found["1 bit"]
    assert "| int8 |" in printed


def test_capacity():
    printed = run("capacity.py", "--pictures", 1e6, "--core-second", 0.036, "--dim", 100, "--row-bytes", 600)
    figures = dict(line.strip("| ").split(" | ") for line in printed.splitlines() if " | " in line)
    assert figures["core hours to embed"] == "10"
    assert figures["cost of the requests for them"] == "0.8"
    assert figures["rows alone, GB: float32"] == "0.4"
    assert figures["table, TB (float32 rows and what is known of the pictures)"] == "0.001"


def test_lance_cluster(scenes, tmp_path):
    pytest.importorskip("ray", reason="the extra `distributed` is not installed; make test-cluster has it")
    out = tmp_path / "out.json"
    run("cluster.py", "--data", scenes, "--files", 12, "--rounds", 1, "--workers", 1, "--json", out)
    result = json.loads(out.read_text())
    assert set(result["rounds"]) == {"one machine", "ray, 1 worker"}
    assert all(round["all"] > 0 for rounds in result["rounds"].values() for round in rounds)


def test_lance_query(scenes, tmp_path):
    pytest.importorskip("lancedb", reason="the extra `distributed` is not installed; make test-cluster has it")
    out = tmp_path / "out.json"
    run("lance_query.py", "--data", scenes, "--rows", 3000, "--json", out)
    result = json.loads(out.read_text())
    assert result["cases"]["all"]["recall"] > 0.9
    assert 20 < result["caption_characters"] < result["bytes_a_row"]["data: the rest"] < 1000
    assert 0 < result["bytes_a_row"]["index of vector"] < 4 * result["dim"]


def test_painting_memory(tmp_path):
    out = tmp_path / "out.json"
    printed = run("painting_memory.py", "--small", "--json", out)
    for name, peaks in json.loads(out.read_text())["peak_mb"].items():
        assert peaks["3"] == pytest.approx(peaks["1"], rel=0.2)  # a picture's, whatever their number
        assert f"| {name} |" in printed
