"""The benchmarks of indexing and of a first query, at a tiny size, so that they can't rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import common  # noqa: E402


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
    with pytest.raises(RuntimeError, match="ended with 1: .*wrong"):
        common.run([sys.executable, "-c", "import sys; sys.exit('wrong')"])
