"""The command line, mostly as a person runs it: exit status, stdout, stderr."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from PIL import Image

import clipmatch
from clipmatch.cli import main
from clipmatch.data import content_hash, load_captions, select_split
from clipmatch.embedder import load_model

COMMANDS = (
    "index",
    "find",
    "duplicates",
    "serve",
    "export-gallery",
    "teach",
    "concepts",
    "explain",
    "data",
    "demo",
    "train",
    "evaluate",
    "export",
    "models",
)
SLOW = ("torch", "transformers", "onnx", "onnxruntime", "matplotlib", "jinja2", "numpy.testing")


def run(*arguments, code=0):
    """Run a command in this process; it must end with this status and without a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    crash = result.exception if not isinstance(result.exception, SystemExit) else None
    assert crash is None, result.output
    assert result.exit_code == code, result.output
    return result


def sentence(*arguments):
    """The one sentence that a command fails with."""
    result = run(*arguments, code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def program(*arguments, **kwargs):
    """Run `python -m clipmatch.cli` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "clipmatch.cli", *arguments], capture_output=True, **kwargs)


# Help


ALL = {name: main.get_command(click.Context(main), name) for name in main.list_commands(click.Context(main))}


def test_help_lists_the_commands_in_words():
    text = run("--help").stdout
    for name in COMMANDS:
        assert f"\n  {name} " in text
        assert run(name, "--help").stdout.startswith(f"Usage: main {name} ")
    assert f"version {clipmatch.__version__}" in run("--version").stdout


def test_the_examples_of_the_help_name_real_options():
    lines = [line.split() for line in run("--help").stdout.splitlines() if line.strip().startswith("clipmatch ")]
    assert len(lines) == 16
    for _, name, *words in lines:
        command = ALL[name]
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_every_option_explains_itself():
    for name, command in {**ALL, **ALL["data"].commands}.items():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{name} {parameter.opts}"


def test_importing_and_help_load_nothing_slow():
    check = f"import sys; print([name for name in {SLOW} if name in sys.modules])"
    for start in ("import clipmatch", "from clipmatch.cli import main; main(['--help'], standalone_mode=False)"):
        done = subprocess.run([sys.executable, "-c", f"{start}; {check}"], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"


def test_public_names_exist():
    for name in clipmatch.__all__:
        assert getattr(clipmatch, name).__name__ == name
    assert set(clipmatch.__all__) <= set(dir(clipmatch))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        clipmatch.trian  # noqa: B018


# evaluate


def test_evaluate_prints_a_table_and_writes_figures(model_folder, scenes, tmp_path):
    target, dev = tmp_path / "new" / "figures.json", scenes / "splits" / "dev.txt"
    result = run(
        "evaluate", "--model", model_folder, "--captions", scenes, "--split", dev, "--json", target, "--device", "cpu"
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert lines[0] == "20 images, 100 captions; percent (95 % interval; chance)"
    assert lines[1].startswith("text -> image  R@1 ")
    assert lines[2].startswith("image -> text  R@1 ")
    figures = json.loads(target.read_text())
    rows = select_split(load_captions(scenes).rows, dev)
    assert (figures["images"], figures["captions"], figures["gallery"]) == (20, 100, 20)
    assert figures["split_hash"] == content_hash(rows)
    assert figures["model"] == {"fingerprint": load_model(model_folder).fingerprint, "path": str(model_folder)}
    assert figures["failures"] == []
    assert figures["text_to_image"]["chance"]["recall@1"] == pytest.approx(1 / 20)
    for direction in ("text_to_image", "image_to_text"):
        part = figures[direction]
        for k in (1, 5, 10):
            low, high = part["interval"][f"recall@{k}"]
            assert 0 <= low <= part[f"recall@{k}"] <= high <= 1
    assert f"R@1 {100 * figures['text_to_image']['recall@1']:.1f} " in lines[1]


def test_evaluate_to_stdout_is_nothing_but_json(model_folder, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes")
    broken = tmp_path / "scenes" / "Images" / "dev-00003.jpg"
    broken.write_bytes(b"no picture")
    split = tmp_path / "scenes" / "splits" / "dev.txt"
    result = run(
        "evaluate", "--model", model_folder, "--captions", tmp_path / "scenes", "--split", split, "--json", "-"
    )
    figures = json.loads(result.stdout)
    assert figures["images"] == 19
    assert [failure["path"] for failure in figures["failures"]] == [str(broken)]
    assert "1 image could not be read:\n" in result.stderr
    assert f"  {broken}: it is not an image" in result.stderr


def test_evaluate_writes_a_card(model_folder, scenes, tmp_path):
    split = scenes / "splits" / "dev.txt"
    run("evaluate", "--model", model_folder, "--captions", scenes, "--split", split, "--html", tmp_path / "card.html")
    assert "<html" in (tmp_path / "card.html").read_text()


def test_evaluate_keeps_its_table_when_a_file_can_not_be_written(model_folder, scenes, tmp_path):
    (tmp_path / "file").write_text("")
    split, target = scenes / "splits" / "dev.txt", tmp_path / "file" / "figures.json"
    result = run(
        "evaluate", "--model", model_folder, "--captions", scenes, "--split", split, "--json", target, code=1
    )  # fmt: skip
    assert result.stdout.startswith("20 images")
    assert f"\nError: {tmp_path / 'file'}" in result.stderr


def test_an_evaluated_model_knows_how_sure_it_is(model_folder, scenes, tmp_path):
    model = shutil.copytree(model_folder, tmp_path / "model")
    asked = ("find", "a red circle", "--model", model, "--images", scenes / "Images")
    assert "is not calibrated" in sentence(*asked, "--min-confidence", 0.5)

    result = run("evaluate", "--model", model, "--captions", scenes, "--json", "-")
    figures = json.loads(result.stdout)["confidence"]
    assert 0 <= figures["ece"] < 0.2
    assert json.loads((model / "calibration.json").read_text())["figures"] == figures

    lines = run(*asked, "-k", 3).stdout.splitlines()
    assert lines[0] == "rank  score  conf  path"
    assert len(lines) == 4
    for line, row in zip(lines[1:], json.loads(run(*asked, "-k", 3, "--json").stdout), strict=True):
        assert f"{row['confidence']:.2f}" == line.split()[2]
        assert 0 < row["confidence"] < 1


def test_nothing_matches(model_folder, scenes, tmp_path):
    model = shutil.copytree(model_folder, tmp_path / "model")
    run("evaluate", "--model", model, "--captions", scenes)
    asked = ("find", "a red circle", "--model", model, "--images", scenes / "Images")
    result = run(*asked, "--min-confidence", 1)
    assert result.stdout == ""
    assert "\nNo photograph seems to show 'a red circle': the best has a confidence of 0." in result.stderr
    assert json.loads(run(*asked, "--min-confidence", 1, "--json").stdout) == []
    assert len(run(*asked, "--min-confidence", 0).stdout.splitlines()) == 10


def test_few_pictures_give_figures_without_confidence(model_folder, scenes, tmp_path):
    model = shutil.copytree(model_folder, tmp_path / "model")
    rest = ("--captions", scenes, "--split", scenes / "splits" / "dev.txt", "--json", "-")
    result = run("evaluate", "--model", model, *rest)
    assert json.loads(result.stdout)["confidence"] is None
    assert "No confidence: 20 captioned pictures are too few" in result.stderr
    assert not (model / "calibration.json").exists()


# find


@pytest.fixture
def odd_photos(tmp_path):
    """Three photographs: a plain name, one with line break and quote, one with a byte that is no UTF-8."""
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [b"plain.png", b'two\n"lines".png', b"caf\xe9.png"]
    try:
        for name, colour in zip(names, ("red", "green", "blue"), strict=True):
            Image.new("RGB", (32, 32), colour).save(folder / os.fsdecode(name))
    except OSError:
        pytest.skip("this file system takes no such names")
    return folder


def find(model_folder, folder, *options):
    arguments = ("--model", model_folder, "--images", folder, "--duplicates", "show")
    return run("find", "a red circle", *arguments, *options).stdout_bytes


def test_find_with_awkward_names(model_folder, odd_photos):
    folder = os.fsencode(odd_photos)
    raw = {folder + b"/plain.png", folder + b'/two\n"lines".png', folder + b"/caf\xe9.png"}

    table = find(model_folder, odd_photos).decode().splitlines()
    assert table[0] == "rank  score  path"
    assert {line.split("  ")[-1] for line in table[1:]} == {
        f"{odd_photos}/plain.png", f'{odd_photos}/two\\n"lines".png', f"{odd_photos}/caf\\udce9.png"
    }  # fmt: skip
    scores = [float(line.split()[1]) for line in table[1:]]
    assert scores == sorted(scores, reverse=True)

    rows = json.loads(find(model_folder, odd_photos, "--json"))
    assert {os.fsencode(row["path"]) for row in rows} == raw
    assert [round(row["score"], 3) for row in rows] == scores

    paths = find(model_folder, odd_photos, "--paths", "-k", 2)
    assert paths == b"".join(os.fsencode(row["path"]) + b"\n" for row in rows[:2])


def test_find_in_one_file_and_in_a_folder(model_folder, scenes):
    folder = scenes / "Images"
    arguments = ("find", "two blue stars", "--model", model_folder, "--paths", "--images")
    assert run(*arguments, folder / "dev-00001.jpg").stdout == f"{folder / 'dev-00001.jpg'}\n"
    found = run(*arguments, folder, "-k", 4).stdout.splitlines()
    assert len(set(found)) == 4
    assert all(Path(path).parent == folder for path in found)


def test_find_reports_bad_files_on_stderr(model_folder, scenes, tmp_path):
    shutil.copy(scenes / "Images" / "dev-00001.jpg", tmp_path / "good.jpg")
    (tmp_path / "bad\x1b[31m.jpg").write_bytes(b"no picture")
    result = run("find", "a star", "--model", model_folder, "--images", tmp_path, "--paths")
    assert result.stdout == f"{tmp_path / 'good.jpg'}\n"
    assert "1 image could not be read:" in result.stderr
    assert "bad\\x1b[31m.jpg: it is not an image" in result.stderr  # a name does not colour the terminal


def test_names_that_the_terminal_lacks_are_escaped(model_folder, scenes, tmp_path):
    shutil.copy(scenes / "Images" / "dev-00001.jpg", tmp_path / "Ω.jpg")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    arguments = ("--model", str(model_folder), "--images", str(tmp_path))
    done = program("find", "a star", *arguments, env=environment)
    assert done.returncode == 0
    assert done.stdout.endswith(b"\\u03a9.jpg\n")


def test_a_reader_that_goes_away_gets_no_traceback(model_folder, scenes):
    command = [sys.executable, "-m", "clipmatch.cli", "find", "a star", "--model", str(model_folder)]
    command += ["--images", str(scenes / "Images")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0
    assert b"Traceback" not in errors
    assert b"BrokenPipe" not in errors


# What goes wrong


def test_model_folders_that_are_none(scenes, tmp_path):
    rest = ("--images", scenes / "Images")
    assert sentence("find", "a star", "--model", tmp_path / "none", *rest) == (
        f"Error: The model folder {tmp_path / 'none'} does not exist; "
        f"train one with: clipmatch train --out {tmp_path / 'none'}\n"
    )
    assert "is no model folder (it has no config.json)" in sentence("find", "a star", "--model", tmp_path, *rest)
    text = sentence("find", "a star", "--model", "nobody/none", *rest)
    assert "There is no folder nobody/none here. The hub model 'nobody/none' can't be reached" in text


def test_image_folders_that_are_none(model_folder, tmp_path):
    arguments = ("find", "a star", "--model", model_folder, "--images")
    assert f"The image folder {tmp_path / 'none'} does not exist" in sentence(*arguments, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert f"The folder {tmp_path / 'empty'} holds no pictures" in sentence(*arguments, tmp_path / "empty")


def test_queries_and_devices_that_can_not_work(model_folder, scenes):
    rest = ("--model", model_folder, "--images", scenes / "Images")
    assert "The query is empty" in sentence("find", " ", *rest)
    assert "top_k is 0" in sentence("find", "a star", *rest, "-k", "0")
    assert "The device 'gpu' can't be used here" in sentence("find", "a star", *rest, "--device", "gpu")


def test_training_on_towers_that_can_not_be_had(scenes, tmp_path):
    arguments = ("train", "--captions", scenes, "--out", tmp_path / "run")
    text = sentence(*arguments)
    assert "The hub model 'distilbert-base-uncased' can't be reached and is not in the local cache" in text
    assert "name a local model folder instead" in text
    assert "'./vit' holds no Hugging Face model" in sentence(
        *arguments, "--image-tower", "./vit", "--text-tower", "./vit"
    )  # fmt: skip


def test_training_without_captions(tmp_path):
    assert "Which captions? Give --captions FILE" in sentence("train", "--out", tmp_path / "run")
    assert "no caption file or folder" in sentence("train", "--captions", tmp_path / "none", "--out", tmp_path / "run")


@pytest.mark.parametrize("value", ["some", "0", "-1", "1.5"])
def test_tuning_is_none_all_or_a_number(value):
    result = run("train", "--out", "x", "--tune-image", value, code=2)
    assert "give none, all, or a number of blocks" in result.stderr


def test_without_pytorch_it_says_what_to_install(model_folder, scenes):
    blocked = "import sys; sys.modules['torch'] = None; from clipmatch.cli import main; main()"
    for what, arguments in (
        (f"The model {model_folder}", ["find", "a star", "--model", model_folder, "--images", scenes / "Images"]),
        (f"The model {model_folder}", ["evaluate", "--model", model_folder, "--captions", scenes]),
        ("This", ["train", "--captions", scenes, "--out", "run"]),
    ):
        command = [sys.executable, "-c", blocked, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(
            f'Error: {what} needs the package torch; install it with: pip install "clipmatch[train]"'
        )
        assert done.stderr.count("\n") == 1


def test_searching_and_measuring_without_naming_a_model(model_folder, scenes, tmp_path, monkeypatch):
    model = shutil.copytree(model_folder, tmp_path / "model")  # evaluate writes into it
    monkeypatch.setattr("clipmatch.embedder.embedded_folder", lambda: model)
    named = run("find", "a star", "--model", model, "--images", scenes / "Images", "--json")
    assert run("find", "a star", "--images", scenes / "Images", "--json").stdout == named.stdout
    figures = json.loads(run("evaluate", "--captions", scenes, "--json", "-").stdout)
    assert figures["model"]["path"] is None


def test_an_installation_without_a_model_of_its_own(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("clipmatch.embedder.EMBEDDED", tmp_path / "none")
    text = sentence("find", "a star", "--images", scenes / "Images")
    assert text.endswith("lacks the embedded model; name a model (on the command line by --model).\n")


# models


@pytest.fixture
def collection(model_folder, tmp_path, monkeypatch):
    """Two model folders, a run and much that is none; an empty hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("clipmatch.catalogue.EMBEDDED", tmp_path / "none")
    top = tmp_path / "top"
    for place in ("a", "out/run/best", "out/run/last", "1/2/3", "1/2/3/4", ".hidden"):
        shutil.copytree(model_folder, top / place, dirs_exist_ok=True)
    (top / "vit").mkdir()
    (top / "vit" / "config.json").write_text('{"model_type": "vit"}')
    return top


def test_models_in_folders_and_on_the_hub(collection, model_folder, tmp_path):
    rows = json.loads(run("models", collection, "--json").stdout)
    assert [row["name"] for row in rows if row["place"] == "folder"] == [
        str(collection / "1" / "2" / "3"), str(collection / "a"), str(collection / "out" / "run")
    ]  # fmt: skip
    size = sum(path.stat().st_size for path in model_folder.iterdir())
    assert rows[0] == {
        "name": str(collection / "1" / "2" / "3"), "place": "folder", "runs_by": "PyTorch", "size": size, "dim": 16,
        "recall": None, "licence": None,
    }  # fmt: skip
    hub = {row["name"]: row for row in rows if row["place"] == "hub"}
    assert set(hub) >= {"openai/clip-vit-base-patch32", "google/siglip2-base-patch16-224"}
    assert (hub["openai/clip-vit-base-patch32"]["dim"], hub["openai/clip-vit-base-patch32"]["licence"]) == (512, "MIT")


def test_models_as_a_table_with_figures(collection, tmp_path, monkeypatch):
    config = collection / "a" / "config.json"
    recalls = {"recall@1": 0.281, "recall@5": 0.6, "recall@10": 0.73}
    values = {**json.loads(config.read_text()), "about": {"licence": "MIT", "dev": {"text_to_image": recalls}}}
    config.write_text(json.dumps(values))
    monkeypatch.setattr("clipmatch.catalogue.EMBEDDED", collection / "a")
    cached = tmp_path / "hub" / "models--openai--clip-vit-base-patch32" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    (cached / "model.safetensors").touch()
    monkeypatch.chdir(collection)
    lines = [line.split() for line in run("models").stdout.splitlines()]
    assert lines[0] == ["--model", "where", "runs", "by", "MB", "dim", "dev", "R@1/5/10", "licence"]
    assert lines[1][:3] + lines[1][4:] == ["embedded", "clipmatch", "PyTorch", "16", "28.1/60.0/73.0", "MIT"]
    assert [line[:2] for line in lines[2:4]] == [["1/2/3", "folder"], ["out/run", "folder"]]
    assert ["openai/clip-vit-base-patch32", "hub", "cache"] in [line[:3] for line in lines]


def test_models_in_a_folder_that_is_not_there(tmp_path):
    assert f"The folder {tmp_path / 'none'} does not exist" in sentence("models", tmp_path / "none")


def test_interrupting_ends_with_130(model_folder, scenes, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("clipmatch.ingest.update", interrupt)
    result = run("find", "a star", "--model", model_folder, "--images", scenes, code=130)
    assert result.stderr == "Interrupted.\n"


def test_options_without_effect_are_refused(model_folder, scenes, tmp_path):
    assert "--epochs would change nothing" in sentence("train", "--resume", "--out", tmp_path, "--epochs", "3")
    arguments = ["train", "--captions", scenes, "--model", model_folder, "--out", tmp_path / "run"]
    assert "--dropout, --text-pooling" in sentence(*arguments, "--text-pooling", "mean", "--dropout", "0.5")


def test_measuring_on_training_pictures_is_called_so(model_folder, scenes, tmp_path):
    run("train", "--captions", scenes, "--model", model_folder, "--out", tmp_path / "run", "--epochs", "1")
    everything = run("evaluate", "--model", tmp_path / "run", "--captions", scenes)
    assert "was trained on 60 of these 80 images" in everything.stderr
    held_out = tmp_path / "run" / "splits" / "dev.txt"
    assert (
        "Warning" not in run("evaluate", "--model", tmp_path / "run", "--captions", scenes, "--split", held_out).stderr
    )


def test_missing_pictures_are_in_the_figures(model_folder, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "data")
    (tmp_path / "data" / "Images" / "dev-00003.jpg").unlink()
    model = shutil.copytree(model_folder, tmp_path / "model")  # evaluate writes into it
    done = run("evaluate", "--model", model, "--captions", tmp_path / "data", "--json", tmp_path / "f.json")
    assert json.loads((tmp_path / "f.json").read_text())["failures"] == [
        {"path": "dev-00003.jpg", "reason": "does not exist"}
    ]
    assert "dev-00003.jpg: does not exist" in done.stderr
