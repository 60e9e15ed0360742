"""A model folder: what goes in comes out, alone, whole, and never by pickle."""

import json
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file

from clipmatch import checkpoint as module
from clipmatch.atomic import aside
from clipmatch.checkpoint import (
    Checkpoint,
    create_checkpoint,
    load_checkpoint,
    load_preprocessing,
    load_tokenizer,
    parse_preprocessing,
    save_checkpoint,
)
from clipmatch.config import ModelConfig, PreprocessConfig
from clipmatch.errors import ClipmatchError
from clipmatch.model import CLIPModel, build_backbone
from clipmatch.modelfolder import find_folder
from clipmatch.preprocess import Transform

FILES = {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of the saved model, to be damaged."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def names(folder):
    return {path.name for path in folder.iterdir()}


def edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# There and back


def test_what_is_saved_is_loaded(tiny, tmp_path):
    tiny = replace(tiny, about={"trained_on": {"pictures": 60}})
    fingerprint = save_checkpoint(tiny, tmp_path / "m")
    assert names(tmp_path / "m") == FILES
    loaded = load_checkpoint(tmp_path / "m")
    assert loaded.fingerprint == fingerprint
    assert len(fingerprint) == 16
    assert loaded.about == {"trained_on": {"pictures": 60}}
    assert loaded.transform.config == tiny.transform.config
    assert loaded.tokenizer("a red circle")["input_ids"] == tiny.tokenizer("a red circle")["input_ids"]
    assert not loaded.model.training
    assert torch.equal(loaded.model.encode_image(pixels()), tiny.model.encode_image(pixels()))


def test_loading_needs_no_network_and_no_tower_folder(vocabulary, tmp_path, no_network):
    build_backbone(tiny_config(50).image_tower).save_pretrained(tmp_path / "vit")
    config = tiny_config(vocabulary.vocab_size, image_tower=str(tmp_path / "vit"))
    save_checkpoint(Checkpoint(CLIPModel(config), vocabulary, Transform(PreprocessConfig(size=32))), tmp_path / "m")
    shutil.rmtree(tmp_path / "vit")
    assert load_checkpoint(tmp_path / "m").model.encode_image(pixels()).shape == (2, 16)


def test_the_fingerprint_stays_over_save_load_save(model_folder, tmp_path):
    first = load_checkpoint(model_folder)
    again = save_checkpoint(first, tmp_path / "again")
    assert again == first.fingerprint
    assert save_checkpoint(load_checkpoint(tmp_path / "again"), tmp_path / "third") == again


def test_the_fingerprint_tells_weights_preprocessing_and_words_apart(tiny, tmp_path):
    seen = [save_checkpoint(tiny, tmp_path / "m")]
    bicubic = Transform(PreprocessConfig(size=32, resample="bicubic"))
    seen.append(save_checkpoint(replace(tiny, transform=bicubic), tmp_path / "m"))
    with torch.no_grad():
        tiny.model.image_encoder.fc.bias[0] += 1e-3
    seen.append(save_checkpoint(tiny, tmp_path / "m"))
    tiny.tokenizer.backend.add_tokens(["zebra"])
    seen.append(save_checkpoint(tiny, tmp_path / "m"))
    assert len(set(seen)) == 4
    seen.append(save_checkpoint(replace(tiny, about={"note": "words do not embed"}), tmp_path / "m"))
    assert seen[4] == seen[3]


def test_nothing_is_pickled(model_folder, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load reads pickles"))
    load_checkpoint(model_folder)
    sources = Path(module.__file__).parent.glob("*.py")
    assert [
        path.name for path in sources if "torch.load(" in path.read_text() or "import pickle" in path.read_text()
    ] == []


def test_towers_of_stages_can_be_saved_too(vocabulary, tmp_path):
    shape = {"hidden_sizes": [8, 24], "depths": [1, 1], "num_stages": 2}
    config = tiny_config(
        vocabulary.vocab_size, image_tower={"model_type": "convnext", **shape}, image_pooling="mean"
    )  # fmt: skip
    model = CLIPModel(config).eval()
    save_checkpoint(Checkpoint(model, vocabulary, Transform(PreprocessConfig(size=32))), tmp_path / "m")
    assert torch.equal(CLIPModel.from_pretrained(tmp_path / "m").encode_image(pixels()), model.encode_image(pixels()))


# Methods of the model


def test_a_loaded_model_can_be_saved_again_by_itself(model_folder, tmp_path):
    model = CLIPModel.from_pretrained(model_folder)
    model.save_pretrained(tmp_path / "copy", note="a copy")
    copy = load_checkpoint(tmp_path / "copy")
    assert copy.fingerprint == load_checkpoint(model_folder).fingerprint
    assert copy.about == {"note": "a copy"}
    CLIPModel.from_pretrained(tmp_path / "copy").save_pretrained(tmp_path / "third")
    assert load_checkpoint(tmp_path / "third").about == {"note": "a copy"}


def test_a_model_built_by_hand_needs_its_words_and_pixels(vocabulary, tmp_path):
    model = CLIPModel(tiny_config(vocabulary.vocab_size))
    with pytest.raises(ClipmatchError, match="no tokenizer or transform; pass both as tokenizer= and transform="):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    model.save_pretrained(tmp_path / "m", tokenizer=vocabulary, transform=Transform(PreprocessConfig(size=32)))
    assert names(tmp_path / "m") == FILES


class FakeHub:
    """Stands for huggingface_hub.HfApi; keeps what it was told."""

    calls: list

    def __init__(self, token=None):
        FakeHub.calls = [("token", token)]

    def create_repo(self, repo_id, **kwargs):
        FakeHub.calls.append(("create", repo_id, kwargs))

    def upload_folder(self, repo_id, folder_path, **kwargs):
        FakeHub.calls.append(("upload", repo_id, names(Path(folder_path)), kwargs["commit_message"]))
        return f"https://huggingface.co/{repo_id}/commit/1"


def test_push_to_hub(model_folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    model = CLIPModel.from_pretrained(model_folder)
    address = model.push_to_hub("me/mine", token="hf_x", private=True, commit_message="first")
    assert address == "https://huggingface.co/me/mine/commit/1"
    assert FakeHub.calls == [
        ("token", "hf_x"),
        ("create", "me/mine", {"exist_ok": True, "private": True}),
        ("upload", "me/mine", FILES, "first"),
    ]


def test_a_push_that_fails_is_one_sentence(model_folder):
    model = CLIPModel.from_pretrained(model_folder)
    with pytest.raises(ClipmatchError, match=r"The hub did not take the model 'me/mine'.*hf auth login") as caught:
        model.push_to_hub("me/mine")
    assert "\n" not in str(caught.value)


def test_a_model_from_the_hubs_cache(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--me--mine"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(model_folder, repository / "snapshots" / "abc")
    assert load_checkpoint("me/mine").fingerprint == load_checkpoint(model_folder).fingerprint


# Saving is all or nothing


def test_a_failure_in_the_middle_leaves_the_old_model(tiny, folder, monkeypatch):
    before = load_checkpoint(folder).fingerprint

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tiny, folder)
    assert load_checkpoint(folder).fingerprint == before
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith("model")] == ["model"]


def test_a_kill_in_the_middle_leaves_the_old_model(folder):
    before = load_checkpoint(folder).fingerprint
    program = (
        "import os, sys\n"
        "from clipmatch import checkpoint\n"
        "checkpoint.write_json = lambda *_: os._exit(9)\n"
        "model = checkpoint.load_checkpoint(sys.argv[1])\n"
        "model.model.log_logit_scale.data.zero_()\n"
        "checkpoint.save_checkpoint(model, sys.argv[1])\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(folder)], check=False).returncode == 9
    loaded = load_checkpoint(folder)
    assert loaded.fingerprint == before
    save_checkpoint(loaded, folder)  # what the killed one left behind is no obstacle
    assert {path.name for path in folder.parent.iterdir() if path.name.startswith("model")} == {"model"}


@pytest.mark.parametrize("name", ["model", "best"])
def test_a_kill_between_the_two_renames_is_recovered(folder, name):
    before = load_checkpoint(folder).fingerprint
    folder = folder.rename(folder.with_name(name))
    loaded = load_checkpoint(folder)
    folder.rename(aside(folder))
    assert load_checkpoint(folder).fingerprint == before
    if name == "best":
        assert load_checkpoint(folder.parent).fingerprint == before  # the run's folder
    save_checkpoint(loaded, folder)
    assert names(folder) == FILES
    assert not aside(folder).exists()


def test_the_old_model_stays_until_the_new_one_is_in_place(tiny, folder, monkeypatch):
    """A save after such a kill must not remove the only model before its own is there."""
    folder.rename(aside(folder))
    seen, rename = [], Path.rename

    def watched(draft, target):
        seen.append(find_folder(folder).name)
        return rename(draft, target)

    monkeypatch.setattr(Path, "rename", watched)
    save_checkpoint(tiny, folder)
    assert seen == [aside(folder).name]
    assert find_folder(folder) == folder


def test_a_folder_with_other_files_is_not_replaced(tiny, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ClipmatchError, match=r"holds other files \(holiday.jpg\); save to a new or empty folder"):
        save_checkpoint(tiny, tmp_path / "photos")
    assert names(tmp_path / "photos") == {"holiday.jpg"}


def test_another_programs_model_is_not_replaced(tiny, tmp_path):
    build_backbone(tiny_config(50).image_tower).save_pretrained(tmp_path / "vit")
    with pytest.raises(ClipmatchError, match=r"holds other files \(config.json\)"):
        save_checkpoint(tiny, tmp_path / "vit")


def test_saving_over_an_older_model_and_into_an_empty_folder(tiny, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert save_checkpoint(tiny, folder) == save_checkpoint(tiny, tmp_path / "empty")
    assert names(folder) == FILES


def test_saving_into_the_current_folder_and_the_home_folder(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    save_checkpoint(tiny, ".")
    assert load_checkpoint(folder).fingerprint == save_checkpoint(tiny, "~/mine")
    assert names(tmp_path / "mine") == FILES


def test_further_files_lie_beside_the_model(tiny, tmp_path):
    extra = {"state.json": {"step": 3}, "optimizer.safetensors": {"m": torch.ones(2)}}
    save_checkpoint(tiny, tmp_path / "last", extra)
    save_checkpoint(tiny, tmp_path / "last", extra)
    assert names(tmp_path / "last") == FILES | {"state.json", "optimizer.safetensors"}
    assert torch.equal(load_file(tmp_path / "last" / "optimizer.safetensors")["m"], torch.ones(2))


def test_a_place_that_can_not_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ClipmatchError, match=r"can't be written .*; choose another"):
        save_checkpoint(tiny, tmp_path / "file" / "model")


# Folders that are no model


def test_a_run_stands_for_its_best_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run" / "best")
    assert find_folder(tmp_path / "run") == tmp_path / "run" / "best"
    assert load_checkpoint(tmp_path / "run").fingerprint == load_checkpoint(folder).fingerprint


def damage_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_weights(folder):
    save_file({"fc": torch.ones(2)}, folder / "model.safetensors")


def newer(folder):
    edit(folder / "config.json", schema=99)


def foreign(folder):
    (folder / "config.json").write_text('{"model_type": "vit"}')


def misspelt(folder):
    values = json.loads((folder / "config.json").read_text())["model"]
    edit(folder / "config.json", model={**values, "embed_dimm": 3})


def hub_tower(folder):
    values = json.loads((folder / "config.json").read_text())["model"]
    edit(folder / "config.json", model={**values, "image_tower": "google/vit-base-patch16-224"})


def wrong_kind(folder):
    edit(folder / "config.json", model=[1, 2], preprocess={"size": "big"})


def wrong_value(folder):
    edit(folder / "config.json", preprocess={"size": "big"})


def half_a_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text()[:50])


def incomplete_config(folder):
    path = folder / "config.json"
    path.write_text('{"format": "clipmatch", "schema": 1, "model": {}}')


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damage_weights, "is damaged .*; copy or train it again"),
        (other_weights, "is damaged .*Missing key.*; copy or train it again"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is damaged .*model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "is damaged .*Cannot read the tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "is damaged .*Cannot read the tokenizer"),
        (newer, r'is from a newer clipmatch, and this is .*; upgrade this one: pip install -U "clipmatch"'),
        (foreign, "no clipmatch model folder"),
        (misspelt, "is damaged .*Unknown setting 'embed_dimm' for ModelConfig; did you mean 'embed_dim'"),
        (hub_tower, "is damaged .*does not describe its towers"),
        (wrong_kind, "is damaged"),
        (wrong_value, "is damaged"),
        (half_a_config, "can't be read .*; copy the model again"),
        (incomplete_config, "lacks fingerprint, preprocess; copy the model again"),
        (shutil.rmtree, "does not exist; train one with: clipmatch train --out"),
        (lambda folder: (folder / "config.json").unlink(), "is no model folder"),
    ],
)
def test_a_folder_that_is_no_model(folder, no_network, damage, sentence):
    damage(folder)
    with pytest.raises(ClipmatchError, match=sentence) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_names_that_are_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClipmatchError, match=r"is no model folder"):
        load_checkpoint(".")
    with pytest.raises(ClipmatchError, match="does not exist; train one"):
        load_checkpoint("mine")
    with pytest.raises(ClipmatchError, match=r"There is no folder runs/mine here. The hub model 'runs/mine' can't be"):
        load_checkpoint("runs/mine")


# New models on pretrained towers


def tower_folders(tmp_path, vocabulary, preprocessing):
    config = tiny_config(vocabulary.vocab_size)
    build_backbone(config.image_tower).save_pretrained(tmp_path / "vit")
    build_backbone(config.text_tower).save_pretrained(tmp_path / "bert")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    vocabulary.save(tmp_path / "bert" / "tokenizer.json")
    return ModelConfig(str(tmp_path / "vit"), str(tmp_path / "bert"), embed_dim=16, max_length=40)


def test_a_new_model_takes_words_and_pixels_from_its_towers(tmp_path, vocabulary):
    config = tower_folders(tmp_path, vocabulary, {"size": {"height": 32, "width": 32}, "resample": 3})
    new = create_checkpoint(config)
    assert new.transform.config == PreprocessConfig(size=32, resample="bicubic")
    assert new.tokenizer("a red star")["input_ids"] == vocabulary("a red star")["input_ids"]
    assert new.fingerprint == ""
    assert create_checkpoint(config, resample="lanczos").transform.config.resample == "lanczos"
    new.model.save_pretrained(tmp_path / "m")
    assert isinstance(load_checkpoint(tmp_path / "m").model.config.image_tower, dict)


def test_a_text_tower_without_tokenizer(tmp_path, vocabulary):
    with pytest.raises(ClipmatchError, match="has no tokenizer; pass one"):
        create_checkpoint(tiny_config(50))
    build_backbone(tiny_config(50).text_tower).save_pretrained(tmp_path / "bert")
    with pytest.raises(ClipmatchError, match="bert holds no tokenizer that can be read; copy one"):
        load_tokenizer(str(tmp_path / "bert"))
    with pytest.raises(ClipmatchError, match="'nobody/none' can't be reached"):
        load_tokenizer("nobody/none")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, PreprocessConfig()),
        ({"size": 384, "resample": 2}, PreprocessConfig(size=384)),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224}, "resample": 3},
            PreprocessConfig(size=224, resample="bicubic", fit="crop"),
        ),
        (
            {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3], "resample": None},
            PreprocessConfig(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3)),
        ),
        ({"do_normalize": False, "image_mean": [0.5] * 3}, PreprocessConfig(mean=(0, 0, 0), std=(1, 1, 1))),
    ],
)
def test_preprocessing_as_the_tower_wants_it(values, expected):
    assert parse_preprocessing(values) == expected


def test_preprocessing_that_can_not_be_had(tmp_path):
    with pytest.raises(ClipmatchError, match="'nobody/none' can't be reached"):
        load_preprocessing("nobody/none")
    (tmp_path / "preprocessor_config.json").write_text('{"size": [')
    with pytest.raises(ClipmatchError, match=r"preprocessor_config.json can't be used"):
        load_preprocessing(str(tmp_path))
