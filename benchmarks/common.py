"""What the benchmarks share: turns, medians and paired ratios, whole processes, tables, JSON with the machine's name.

Absolute times of a busy machine mean little, so whatever is compared takes turns in one script, and a ratio is the
median of the rounds' own ratios.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from clipmatch.runtime import usable_cores

CLIPMATCH = Path(sys.executable).with_name("clipmatch")  # as people type it


def machine(*packages: str) -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, versions of Python and of these packages."""
    found = {"cpu": cpu_name(), "cores": usable_cores(), "memory_gb": memory_gb(), "system": platform.system()}
    found["python"] = platform.python_version()
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def machine_line(found: Mapping[str, Any]) -> str:
    """The machine in one line, for the head of a table."""
    rest = ", ".join(f"{name} {value}" for name, value in list(found.items())[4:] if value)
    return f"{found['cpu']}, {found['cores']} cores, {found['memory_gb']} GB; {rest}"


def cpu_name() -> str:
    """The processor as Linux names it, elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    kinds = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{named} ({' '.join(kinds)})" if kinds else named


def memory_gb() -> int | None:
    """Of the machine."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (ValueError, OSError):
        return None


def in_turns(cases: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Call each case once a round, every other round in reverse order -> what each gave, by round."""
    found: dict[str, list[Any]] = {name: [] for name in cases}
    for number in range(rounds):
        names = list(cases)
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(cases[name]())
            print(f"  round {number + 1} of {rounds}: {name}", file=sys.stderr)
    return found


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(mine: Sequence[float], other: Sequence[float]) -> float:
    """The median of the rounds' ratios mine / other."""
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


@dataclass(frozen=True)
class Process:
    """A whole process: seconds from its start to its end, peak memory in megabytes, what it printed."""

    seconds: float
    peak_mb: float
    stdout: str


# Between the benchmark and what it measures: on Linux a process's peak begins with that of the one that started it.
LAUNCH = """
import os, sys, time
start = time.perf_counter()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(child, 0)
with open(sys.argv[1], "w") as file:
    print(time.perf_counter() - start, usage.ru_maxrss, file=file)
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


def run(command: Sequence[str | Path], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Process:
    """Run a command to its end, in a folder. Raises RuntimeError, with what it said, when it fails."""
    with tempfile.NamedTemporaryFile("r") as figures:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", LAUNCH, figures.name, *map(str, command)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **(env or {})},  # compiled once, as where it is installed
            cwd=cwd,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
        seconds, peak = map(float, figures.read().split())
    return Process(seconds, peak / (1e6 if platform.system() == "Darwin" else 1e3), done.stdout)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def write_json(path: Path | None, values: Any) -> None:
    """Write the figures, where a file is named."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=1, default=float) + "\n")
