"""The rigs of the server run at a tiny size, so that they can't rot; the second one also says what it finds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from album import serving

from clipmatch.studio import Studio

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_a_family_for_a_moment(tmp_path):
    command = [sys.executable, BENCHMARKS / "server_load.py", "--minutes", "0.05", "--times", "4", "--photographs", "4"]
    done = subprocess.run([*command, "--json", tmp_path / "load.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "load.json").read_text())
    assert (found["people"], found["errors"], found["said"]) == (20, [], "")
    assert found["waits"]["all"]["requests"] > 20
    assert found["waits"]["thumb"]["p99_ms"] > found["waits"]["thumb"]["p50_ms"] > 0
    assert "| thumb |" in done.stdout


def test_the_server_keeps_to_its_own_description(album, embedded, model_folder, vqgan, tmp_path):
    """Whatever that allows is answered as it says, whatever else with a sentence; nothing is a server error."""
    pytest.importorskip("schemathesis", reason="the extra `dev` is not installed")
    studio = Studio(str(model_folder), str(vqgan))
    with serving(album.copy(tmp_path).index, embedded, studio=studio) as address:
        command = [sys.executable, BENCHMARKS / "api_fuzz.py", "--server", address, "--examples", "12"]
        done = subprocess.run([*command, "--json", tmp_path / "fuzz.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "fuzz.json").read_text())
    assert found["requests"] > 60
    assert not [code for code in found["statuses"] if int(code) >= 500]
    assert found["paints"]
    assert not [label for label, codes in found["endpoints"].items() if not codes["answered"]]
