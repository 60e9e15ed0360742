"""The server against its own description: whatever that allows is answered as it says, whatever else with a sentence.

`benchmarks/api_fuzz.py` asks for longer.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from album import serving

schemathesis = pytest.importorskip("schemathesis")


def test_what_the_description_allows(album, embedded, tmp_path):
    with serving(album.copy(tmp_path).index, embedded) as address:
        script = Path(__file__).parents[1] / "benchmarks" / "api_fuzz.py"
        command = [sys.executable, script, "--server", address, "--examples", "5", "--json", tmp_path / "fuzz.json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
