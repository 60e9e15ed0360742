"""The benchmark of warm queries runs at a tiny size, so that it can't rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_warm_query(scenes, tmp_path):
    pytest.importorskip("faiss")
    command = [sys.executable, str(ROOT / "benchmarks" / "warm_query.py"), "--data", str(scenes), "--rows", "600"]
    command += ["--pictures", "60", "--queries", "12", "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "warm_query.json").read_text())
    [size] = result["sizes"]
    assert size["rows"] == 600
    cases = size["cases"]
    assert cases["product"]["ratio"] == 1
    for name in ("candidates", "candidates, half pass", "candidates, 1 % pass", "faiss IndexFlatIP"):
        assert cases[name]["recall"] > 0.9
        assert cases[name]["ms"] > 0
    assert size["memory"]["resident_mb"] > 10
    assert size["stages_ms"]["whole"] > size["stages_ms"]["embed the sentence"] > 0
    assert "| candidates |" in (tmp_path / "warm_query.md").read_text()
    assert (tmp_path / "warm_query.png").read_bytes().startswith(b"\x89PNG")
