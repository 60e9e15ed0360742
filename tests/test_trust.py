"""Models from strangers: nothing they hold is run, and nothing outside of their folder is read."""

import ast
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import clipmatch
from clipmatch.checkpoint import load_checkpoint, load_tokenizer
from clipmatch.compact import load_heads
from clipmatch.embedder import load_model
from clipmatch.errors import ClipmatchError
from clipmatch.index import Index, find_matches
from clipmatch.model import CLIPModel, build_backbone
from clipmatch.modelfolder import EMBEDDED
from clipmatch.session import open_session
from clipmatch.trust import check_graph

SOURCES = Path(clipmatch.__file__).parent
SECRET = np.arange(64, dtype=np.float32)
# What reads pickles, and runs what they name; or runs text. Two old kinds of generators exist as pickles alone: of
# those PyTorch's restricted reader takes tensors (weights_only), and no name that is not on its list.
FORBIDDEN = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__"}
RESTRICTED = {"biggan.py", "taming.py"}


@pytest.fixture
def stranger(tmp_path):
    """A copy of the embedded model, as somebody may have sent it."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "stranger"))


@pytest.fixture
def no_pickle(monkeypatch):
    """Reading a pickle, in whatever library, fails the test."""

    def poisoned(*_, **__):
        pytest.fail("a pickle was read")

    for place, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (pickle, "_Unpickler")):
        monkeypatch.setattr(place, name, poisoned)
    monkeypatch.setattr(torch, "load", poisoned)
    read = np.load
    monkeypatch.setattr(np, "load", lambda *a, **k: poisoned() if k.get("allow_pickle") else read(*a, **k))


def config_of(folder, **changes):
    """Change values of a config.json; a dict is changed in its parts."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) and name in values else value
    path.write_text(json.dumps(values))


def graph_with(location, path, place="initializer"):
    """A graph whose numbers lie in another file."""
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "256")):
        outside.external_data.add(key=key, value=value)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [64])
    if place == "initializer":
        node = helper.make_node("Identity", ["w"], ["y"])
        graph = helper.make_graph([node], "g", [], [output], [outside])
    else:
        node = helper.make_node("Constant", [], ["y"])
        node.attribute.append(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=outside))
        graph = helper.make_graph([node], "g", [], [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


# Pickles and code


def test_every_loader_without_a_pickle(model_folder, vqgan, towers, photos, tmp_path, no_pickle):
    from clipmatch.generation.vqgan import load_vqgan

    load_model()
    load_checkpoint(model_folder)
    load_heads()
    load_vqgan(vqgan)
    build_backbone(str(towers / "vit-s14"))
    load_tokenizer(str(towers / "minilm"))
    with Index.open(tmp_path / "index.sqlite", model_folder) as index:
        index.update([photos], progress=False)
        index.teach("red", [photos / "red.png"])
    with Index.open(tmp_path / "index.sqlite") as index:
        assert len(index.find("@red", top_k=4)) > 0
    assert find_matches("red", images=photos, progress=False)


def test_no_source_reads_pickles_or_runs_text():
    found = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found |= {(path.name, name) for name in named if name.split(".")[0] in FORBIDDEN}
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if called in CALLS or given.get("shell") == "True" or given.get("allow_pickle") == "True":
                    found.add((path.name, called))
                if given.get("trust_remote_code", "False") != "False":
                    found.add((path.name, "trust_remote_code"))
                if called == "torch.load" and not (given["weights_only"] == "True" and path.name in RESTRICTED):
                    found.add((path.name, called))
    assert found == set()


class Mine:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_in_a_stranger_s_folder_are_not_run(stranger, model_folder, towers, tmp_path):
    from clipmatch.generation.biggan import load_biggan
    from clipmatch.generation.taming import read_taming

    mark = tmp_path / "run"
    data = pickle.dumps({"w": Mine(mark)}, 2)
    pickle.loads(data)
    assert mark.is_dir()  # it would
    mark.rmdir()
    own = Path(shutil.copytree(model_folder, tmp_path / "own"))
    tower = Path(shutil.copytree(towers / "vit-s14", tmp_path / "tower"))
    for folder in (stranger, own, tower):
        for name in ("model.safetensors", "pytorch_model.bin", "image.onnx", "text.onnx", "tokenizer.json"):
            if name == "pytorch_model.bin" or (folder / name).exists():
                (folder / name).write_bytes(data)
    for load in (
        lambda: load_model(stranger).embed_texts(["a"]),
        lambda: load_model(own),
        lambda: build_backbone(str(tower)),
        lambda: load_biggan(tower),
        lambda: read_taming(tower / "pytorch_model.bin"),
    ):
        with pytest.raises(ClipmatchError):
            load()
    torch.save({"w": Mine(mark)}, tmp_path / "new.ckpt")
    with pytest.raises(ClipmatchError):
        read_taming(tmp_path / "new.ckpt")
    assert not mark.exists()


# Graphs


@pytest.mark.parametrize("place", ["initializer", "attribute"])
def test_a_graph_whose_weights_lie_elsewhere_is_refused(stranger, tmp_path, place):
    (tmp_path / "secret.bin").write_bytes(SECRET.tobytes())
    (stranger / "inside.bin").write_bytes(SECRET.tobytes())
    (stranger / "link.bin").symlink_to(tmp_path / "secret.bin")
    for location in ("../secret.bin", str(tmp_path / "secret.bin"), "link.bin", "inside.bin"):
        path = graph_with(location, stranger / "g.onnx", place)
        with pytest.raises(ClipmatchError, match=r"the graph g\.onnx keeps weights in other files"):
            open_session(path)
    graph_with("inside.bin", stranger / "text.onnx", place)
    (stranger / "link.bin").unlink()
    for load in (lambda: load_model(stranger).embed_texts(["a dog"]), lambda: load_heads(stranger)):
        with pytest.raises(ClipmatchError, match=r"other files|damaged"):
            load()


def test_numbers_of_other_lengths_in_the_file_hide_nothing(tmp_path):
    """Protobuf reads a length that is written with more bytes than it takes."""
    data = graph_with("../secret.bin", tmp_path / "g.onnx").read_bytes()
    entry = b"\x0a\x08location\x12\x0d../secret.bin"
    outer = b"\x6a" + bytes([len(entry)]) + entry
    assert outer in data
    longer = b"\x0a\x88\x80\x00location\x12\x0d../secret.bin"
    hidden = data.replace(outer, b"\x6a" + bytes([len(longer)]) + longer)
    (tmp_path / "g.onnx").write_bytes(hidden)
    with pytest.raises(ClipmatchError, match="other files"):
        check_graph(tmp_path / "g.onnx")


def test_a_graph_may_have_the_word_in_its_names(tmp_path):
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    tensor = helper.make_tensor("location.weight", TensorProto.FLOAT, [2], [1.0, 2.0])
    node = helper.make_node("Identity", ["location.weight"], ["y"])
    graph = helper.make_graph([node], "location", [], [output], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    assert open_session(tmp_path / "g.onnx").run(None, {})[0].tolist() == [1.0, 2.0]


def test_operators_of_other_libraries_are_not_looked_for(tmp_path):
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    node = helper.make_node("Run", [], ["y"], domain="evil.so", library="/tmp/evil.so")
    graph = helper.make_graph([node], "g", [], [output])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("evil.so", 1)]
    (tmp_path / "g.onnx").write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString())
    with pytest.raises(Exception, match="Run"):
        open_session(tmp_path / "g.onnx")


# Links and settings


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "calibration.json"])
def test_links_out_of_the_folder_are_refused(stranger, name):
    (stranger / name).unlink()
    (stranger / name).symlink_to(EMBEDDED / name)
    with pytest.raises(ClipmatchError, match=f"{name} is a link that leads out of the model folder"):
        load_model(stranger)


def test_links_within_the_hub_s_cache_are_followed(tmp_path):
    blobs, folder = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1234"
    shutil.copytree(EMBEDDED, blobs)
    folder.mkdir(parents=True)
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(f"../../blobs/{path.name}")
    assert load_model(folder).embed_texts(["a"]).shape == (1, load_model().dim)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fingerprint": "../../../../tmp/x"}, "wrong fingerprint"),  # which names the file of an index
        ({"fingerprint": None}, "wrong fingerprint"),
        ({"about": []}, "wrong about"),
        ({"about": {"log_logit_scale": "5"}}, "log_logit_scale"),
        ({"about": {"log_logit_scale": 1e9}}, "log_logit_scale"),
        ({"model": []}, "wrong model"),
        ({"model": {"embed_dim": 10**12}}, "embed_dim must be positive"),
        ({"schema": "1"}, "newer"),
        ({"preprocess": {"size": 10**6}}, "at most 4096"),
        ({"preprocess": {"std": [0, 0, 0]}}, "std must not be zero"),
        ({"preprocess": {"mean": "abc"}}, "three numbers"),
        ({"preprocess": {"path": "/etc/passwd"}}, "Unknown setting 'path'"),
    ],
)
def test_values_that_make_no_sense(stranger, photos, changes, said):
    config_of(stranger, **changes)
    with pytest.raises(ClipmatchError, match=said):
        find_matches("a dog", model=stranger, images=photos, progress=False)


@pytest.mark.parametrize("name", ["a/..", "../b", "a/b\0c", "a b/c", "http:/x", "a/b?c", "-a/b", "a/%2e%2e", "a//b"])
def test_names_that_are_none_of_the_hub(name):
    with pytest.raises(ClipmatchError):
        load_model(name)


def test_settings_that_lead_elsewhere(towers, model_folder, tmp_path):
    for number, (file, values, said) in enumerate(
        [
            ("adapter_config.json", {"base_model_name_or_path": "/etc"}, "adapter"),
            ("model.safetensors.index.json", {"weight_map": {"a": "../../x.safetensors"}}, "safetensors"),
            ("model.safetensors.index.json", {"weight_map": {"a": "x.bin"}}, "no safetensors file"),
            ("config.json", {"attn_implementation": "somebody/kernel"}, "code from elsewhere"),
            ("config.json", {"_attn_implementation": {"": "somebody/kernel"}}, "code from elsewhere"),
            ("config.json", {"sub": {"quantization_config": {"quant_method": "x"}}}, "code from elsewhere"),
            ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}, "names a file by vocab_file"),
        ]
    ):
        folder = Path(shutil.copytree(towers / "vit-s14", tmp_path / str(number)))
        path = folder / file
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))
        with pytest.raises(ClipmatchError, match=said):
            build_backbone(str(folder))
    own = Path(shutil.copytree(model_folder, tmp_path / "own"))
    config = json.loads((own / "config.json").read_text())
    config["model"]["image_tower"]["attn_implementation"] = "somebody/kernel"
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(ClipmatchError, match="code from elsewhere"):
        CLIPModel.from_pretrained(own)


def test_code_in_a_folder_is_not_run(towers, tmp_path):
    folder = Path(shutil.copytree(towers / "vit-s14", tmp_path / "coded"))
    (folder / "modeling_own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'run')!r})")
    config = json.loads((folder / "config.json").read_text())
    coded = {"auto_map": {"AutoConfig": "modeling_own.Own", "AutoModel": "modeling_own.Own"}, "model_type": "own"}
    for changes in (coded, {"auto_map": coded["auto_map"]}):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        try:
            build_backbone(str(folder))
        except ClipmatchError:
            continue
    assert not (tmp_path / "run").exists()


def test_safetensors_that_lie_about_their_sizes(model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "own"))
    for header in (b"{" * 1000, json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})):
        data = header if isinstance(header, bytes) else header.encode()
        for length in (len(data), 1 << 62):
            (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + data)
            with pytest.raises(ClipmatchError, match="damaged"):
                load_checkpoint(folder)
