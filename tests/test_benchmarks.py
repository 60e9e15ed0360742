"""Each benchmark runs at a tiny size, so that it can't rot."""

import json
import subprocess
import sys
from pathlib import Path

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
