"""How many threads: what was asked for, what affinity and control groups leave."""

import os
import subprocess
import sys

import pytest

from clipmatch.runtime import cpu_quotas, usable_cores


@pytest.fixture
def groups(tmp_path):
    """Writes control groups: path below the root -> content; and which of them the process is in."""

    def write(own, **files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_max", ".max").replace("_cfs", ".cfs")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "own").write_text(own)
        return cpu_quotas(tmp_path, tmp_path / "own")

    return write


def test_a_container_of_version_2(groups):
    assert groups("0::/\n", cpu_max="150000 100000\n") == [1.5]


def test_a_group_inside_another_is_held_to_both(groups):
    files = {"user__cpu_max": "400000 100000\n", "user__app__cpu_max": "max 100000\n", "cpu_max": "max 100000\n"}
    assert groups("0::/user/app\n", **files) == [4.0]


def test_version_1(groups):
    files = {"cpu__job__cpu_cfs_quota_us": "200000\n", "cpu__job__cpu_cfs_period_us": "100000\n"}
    files |= {"cpu__cpu_cfs_quota_us": "-1\n", "cpu__cpu_cfs_period_us": "100000\n"}
    assert groups("5:memory:/job\n4:cpu,cpuacct:/job\n", **files) == [2.0]


def test_no_control_groups(tmp_path):
    assert cpu_quotas(tmp_path, tmp_path / "none") == []


def test_the_least_of_quota_and_affinity_counts(monkeypatch):
    monkeypatch.delenv("CLIPMATCH_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for quotas, cores in (([], 8), ([2.5, 4.0], 2), ([0.5], 1), ([16.0], 8)):
        monkeypatch.setattr("clipmatch.runtime.cpu_quotas", lambda quotas=quotas: quotas)
        assert usable_cores() == cores


def test_a_number_of_threads_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("CLIPMATCH_THREADS", "3")
    assert usable_cores() == 3


@pytest.mark.parametrize("asked", ["0", "two", "-1", "1.5"])
def test_a_number_of_threads_that_is_none_is_one_sentence(asked, photos):
    command = [sys.executable, "-m", "clipmatch.cli", "find", "red", "--images", str(photos)]
    env = {**os.environ, "CLIPMATCH_THREADS": asked}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1
    assert done.stderr == f"Error: CLIPMATCH_THREADS is '{asked}'; give a whole number of threads, such as 2.\n"
