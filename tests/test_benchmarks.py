"""Each benchmark runs at a tiny size, so that it can't rot."""

import json
import subprocess
import sys
from pathlib import Path

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
