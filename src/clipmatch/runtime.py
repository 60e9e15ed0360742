"""The machine: device, number type, threads and seeds, each automatic choice with its reason.

In: nothing, or a name given by the user. Out: PyTorch devices and dtypes, and a sentence that says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipmatch.errors import ClipmatchError

if TYPE_CHECKING:
    import torch


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Precision:
    """The number type that matrix products run in; None: float32, no autocast."""

    dtype: torch.dtype | None
    reason: str


def usable_cores() -> int:
    """The cores that this process may use: CLIPMATCH_THREADS, or else affinity and, on Linux, the container's quota.

    Raises ClipmatchError if CLIPMATCH_THREADS is no whole number above 0.
    """
    asked = os.environ.get("CLIPMATCH_THREADS")
    if asked:
        if not asked.isdecimal() or not int(asked):
            raise ClipmatchError(f"CLIPMATCH_THREADS is {asked!r}; give a whole number of threads, such as 2.")
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in cpu_quotas())]))


def cpu_quotas(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[float]:
    """What control groups leave to this process, in cores: its own group and those around it; empty without a limit.

    Version 2 keeps quota and period in cpu.max, version 1 in two files below cpu/. In a container the process's own
    group is the root of what it sees.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        inside = top / path.lstrip("/")
        for folder in {top, inside, *(parent for parent in inside.parents if parent.is_relative_to(top))}:
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no such file; no limit: "max" or -1
                quota, period = quota_of(folder, bool(controllers))
                if quota > 0:
                    found.append(quota / period)
    return found


def quota_of(folder: Path, first: bool) -> tuple[int, int]:
    """Microseconds of computing in each period of so many. first: version 1. Raises OSError or ValueError."""
    if first:
        return int((folder / "cpu.cfs_quota_us").read_text()), int((folder / "cpu.cfs_period_us").read_text())
    quota, period = (folder / "cpu.max").read_text().split()
    return int(quota), int(period)


def cache_folder() -> Path:
    """Where what can be computed again is kept: CLIPMATCH_CACHE, or the system's place for caches."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("CLIPMATCH_CACHE") or user_cache_path("clipmatch"))


def reuse_memory() -> None:
    """Keep freed memory for the next tensor instead of giving it back to the system.

    Tensors of many megabytes are otherwise mapped and unmapped at each operation, and on a CPU half of a training step
    goes into page faults. Linux only; elsewhere nothing happens.
    """
    if platform.system() != "Linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch: large tensors on huge pages
    with contextlib.suppress(OSError, AttributeError):  # a C library without mallopt
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def choose_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the fastest there is: CUDA, Apple's GPU, CPU."""
    import torch

    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ClipmatchError(f"The device {name!r} can't be used here ({first}); try --device cpu.") from None
    return device


def choose_precision(device: torch.device, name: str | None = None) -> Precision:
    """The precision called `name` ("float32", "bfloat16", "float16"), or the fastest that is safe on `device`."""
    import torch

    if name is not None:
        kinds = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if name not in kinds:
            raise ClipmatchError(f"Unknown precision {name!r}; use one of {', '.join(kinds)}.")
        return Precision(kinds[name], f"{name}: as asked")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, "bfloat16: this GPU computes in it")
        return Precision(torch.float16, "float16: this GPU has no bfloat16; the loss is scaled")
    if device.type == "cpu":
        features = cpu_features()
        for feature, label in (("amx_bf16", "AMX-BF16"), ("avx512_bf16", "AVX512-BF16")):
            if feature in features:
                return Precision(torch.bfloat16, f"bfloat16: this CPU has {label}")
        return Precision(None, "float32: this CPU has no fast bfloat16")
    return Precision(None, f"float32: the exact choice on {device.type}")


def cpu_features() -> set[str]:
    """The CPU's feature names as Linux lists them; empty elsewhere."""
    if platform.system() != "Linux":
        return set()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed PyTorch's draws on the CPU and on `device`, often: all devices at once take a millisecond or two, for those
    that are not in use write down who asked.
    """
    import torch

    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def is_first_process() -> bool:
    """Whether this process is alone, or the first of several: as several processes that train together are started."""
    return os.environ.get("RANK", "0") == "0"
