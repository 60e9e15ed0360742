"""Everything that the README shows is run: its commands in order, its Python, its sample search."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from captionfiles import pack_rows

from clipmatch.data import load_captions
from clipmatch.demo import QUERIES, sample_photographs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture(scope="module")
def place(scenes, towers, tmp_path_factory):
    """A folder like a reader's: captions.txt, Images, Pictures, and the default towers in the hub's cache."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(scenes, folder, dirs_exist_ok=True)
    shutil.copytree(scenes / "Images", folder / "Pictures")
    for name, tower in (("google--vit-base-patch16-224", "vit-s14"), ("distilbert-base-uncased", "minilm")):
        cached = folder / "hf" / "hub" / f"models--{name}"
        shutil.copytree(towers / tower, cached / "snapshots" / "0123")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0123")
    return folder


def environment(place):
    return {
        **os.environ,
        "HOME": str(place),  # for ~/Pictures
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(place / "hf"),
        "HF_HUB_OFFLINE": "1",
        "CLIPMATCH_CACHE": str(place / "cache"),
        "XDG_DATA_HOME": str(place / "data"),
    }


def run(command, place):
    return subprocess.run(command, cwd=place, env=environment(place), capture_output=True, text=True, check=False)


def serve(command, place):
    """Start the server, ask it for its page, end it by Ctrl-C."""
    command = [*command, "--port", "0"]  # whatever else is at the usual one
    with subprocess.Popen(command, cwd=place, env=environment(place), stdout=subprocess.PIPE, text=True) as process:
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        with urllib.request.urlopen(address) as page:
            assert b"clipmatch" in page.read()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    return process


def export_gallery(command, place, request):
    """Give a gallery away, with the libraries that other tests use too; not at all where npm can't fetch them."""
    try:
        libraries = request.getfixturevalue("libraries")
    except pytest.skip.Exception:
        return None
    return run([*command, "--runtime", str(libraries)], place)


def test_commands_and_python_in_order(place, request):
    commands = [line for block in blocks("sh") for line in block.strip().splitlines() if line.startswith("clipmatch ")]
    assert len(commands) >= 4
    for command in commands:
        if command.startswith("clipmatch export-gallery"):
            done = export_gallery(shlex.split(command), place, request)
        else:
            done = (serve if "serve" in command else run)(shlex.split(command), place)
        assert done is None or done.returncode == 0, f"{command}\n{done.stderr}"
    assert (place / "figures.json").is_file()
    assert (place / "card.html").is_file()
    for code in blocks("python"):
        done = run([sys.executable, "-c", code], place)
        assert done.returncode == 0, done.stderr


def test_the_recipes_of_training(place):
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    commands = [line for block in blocks("sh", page) for line in block.strip().splitlines()]
    assert len(commands) >= 10
    rows = load_captions(place).rows
    for number in range(4):
        pack_rows(place / "shards" / f"train-{number}.tar", rows[number::4])
    for command in commands:
        assert command.startswith(("clipmatch ", "torchrun "))
        done = run(shlex.split(command), place)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert not (place / "out" / "plan").exists()
    assert (place / "out" / "two" / "best" / "model.safetensors").is_file()


def test_the_verbs_of_make_exist():
    rules = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z]+)", README)) <= rules


def test_the_sample_search_is_real(demo):
    """The same queries in the same form; processors round differently, so a close call may fall the other way."""
    _, printed = demo
    sample = blocks("console")[0].splitlines()
    assert sample[0] == "$ clipmatch demo"
    shown = sample[1:]
    lines = printed.splitlines()[: len(shown)]
    assert lines[0] == shown[0]
    firsts, claims = ([row.split("  ")[0] for row in part[1 : 1 + len(QUERIES)]] for part in (lines, shown))
    assert [first.strip() for first in firsts] == [claim.strip() for claim in claims] == list(QUERIES)
    best, claimed = (re.findall(r"(\w+) \d\.\d\d(?:  |$)", "\n".join(part), re.MULTILINE) for part in (lines, shown))
    assert len(best) == len(claimed) == 3 * len(QUERIES)
    assert sum(one == other for one, other in zip(best, claimed, strict=True)) >= 2 * len(QUERIES)
    assert lines[-1] == shown[-1]  # where the page is


def test_the_sample_sessions_are_real(tmp_path):
    """Command by command: the same lines, with the same photographs first; processors round differently."""
    shutil.copytree(sample_photographs()[0].parent, tmp_path / "Pictures")
    session = "".join(blocks("console")[1:])
    parts = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)+)", session, re.MULTILINE)
    assert len(parts) == 8
    for command, shown in parts:
        done = run(shlex.split(command), tmp_path)
        printed = done.stdout.replace(str(tmp_path), "/home/you")
        assert done.returncode == 0, done.stderr
        assert len(printed.splitlines()) == len(shown.splitlines())
        if "--not" in command:
            assert "left out for what they show" in done.stderr
        if command.startswith(("clipmatch find", "clipmatch explain")):
            scores = [[float(score) for score in re.findall(r"\d\.\d+", part)] for part in (printed, shown)]
            assert scores[0] == pytest.approx(scores[1], abs=0.05)
        if command.startswith("clipmatch find"):
            printed, shown = (re.findall(r"^ +1 .* (/.*)$", part, re.MULTILINE) for part in (printed, shown))
        if command.startswith("clipmatch explain"):
            printed, shown = (re.findall(r"^([a-z]+) +\+", part, re.MULTILINE) for part in (printed, shown))
        assert printed == shown
