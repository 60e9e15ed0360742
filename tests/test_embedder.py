"""Files and strings -> unit rows; a bad file costs itself and nothing else."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tokenizers
import torch
from PIL import Image

from clipmatch.checkpoint import load_checkpoint
from clipmatch.config import PreprocessConfig, to_json
from clipmatch.embedder import OnnxEmbedder, TorchEmbedder, load_model, read_batches
from clipmatch.errors import ClipmatchError
from clipmatch.modelfolder import config_values, write_json
from clipmatch.preprocess import load_image
from clipmatch.runtime import choose_device, choose_precision, seed_everything, usable_cores
from clipmatch.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def embedder(model_folder):
    return load_model(model_folder, device="cpu")


@pytest.fixture
def files(scenes):
    return sorted((scenes / "Images").iterdir())


def test_rows_are_unit_float32_in_the_order_of_the_files(embedder, files):
    files = files[:5][::-1] + files[:1]
    found = embedder.embed_images(files)
    assert found.paths == files
    assert found.failures == []
    assert found.rows.dtype == np.float32
    assert found.rows.shape == (6, embedder.dim)
    np.testing.assert_allclose(np.linalg.norm(found.rows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found.rows[-1], found.rows[-2], atol=1e-6)  # the same file twice


def test_rows_are_those_of_the_model_itself(embedder, files):
    transform, model = embedder.checkpoint.transform, embedder.checkpoint.model
    pixels = transform(images=[load_image(path) for path in files[:3]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.encode_image(pixels).numpy()
    np.testing.assert_allclose(embedder.embed_images(files[:3]).rows, expected, atol=1e-6)


def test_bad_files_are_failures_and_change_nothing_else(embedder, files, tmp_path):
    broken, empty = tmp_path / "broken.jpg", tmp_path / "empty.png"
    broken.write_bytes(files[0].read_bytes()[:300])
    empty.touch()
    missing = tmp_path / "missing.jpg"
    mixed = [broken, *files[:70], missing, *files[70:], empty]  # more than one batch
    found = embedder.embed_images(mixed)
    assert found.paths == files
    assert [failure.path for failure in found.failures] == [broken, missing, empty]
    assert [failure.reason for failure in found.failures][1:] == ["no such file or directory", "the file is empty"]
    np.testing.assert_allclose(found.rows, embedder.embed_images(files).rows, atol=1e-6)


def test_nothing_in_nothing_out(embedder, tmp_path):
    assert embedder.embed_images([]).rows.shape == (0, 16)
    assert embedder.embed_texts([]).shape == (0, 16)
    only_bad = embedder.embed_images([tmp_path / "none.jpg"])
    assert only_bad.rows.shape == (0, 16)
    assert len(only_bad.failures) == 1


def test_batches_keep_order_and_size(files, embedder):
    batches = list(read_batches(files, embedder.checkpoint.transform, size=33))
    assert [len(batch.paths) for batch in batches] == [33, 33, 14]
    assert [path for batch in batches for path in batch.paths] == files
    assert batches[0].pixels.shape == (33, 32, 32, 3)


def test_text_rows_do_not_depend_on_their_neighbours(embedder):
    texts = ["a red circle", "three small green hearts to the left of a big blue star at night", "", "wörd ☃"]
    together = embedder.embed_texts(texts)
    assert together.shape == (4, 16)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    alone = np.concatenate([embedder.embed_texts([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_more_texts_than_a_batch_keep_their_order(embedder):
    texts = ["a red circle", "a blue star", "two trees"] * 100
    rows = embedder.embed_texts(texts)
    np.testing.assert_allclose(rows, np.tile(embedder.embed_texts(texts[:3]), (100, 1)), atol=1e-5)


def test_a_text_longer_than_the_model_is_cut(embedder):
    words = "a red circle " * 100
    np.testing.assert_allclose(embedder.embed_texts([words]), embedder.embed_texts([words + "a star"]), atol=1e-6)


def test_fingerprint_and_width(embedder, model_folder):
    assert embedder.fingerprint == load_checkpoint(model_folder).fingerprint
    assert embedder.dim == 16


def test_bfloat16_is_close_to_float32(embedder, model_folder, files):
    half = load_model(model_folder, device="cpu", precision="bfloat16")
    assert half.precision.reason == "bfloat16: as asked"
    rows = half.embed_images(files[:4]).rows
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    cosines = (rows * embedder.embed_images(files[:4]).rows).sum(axis=1)
    assert cosines.min() > 0.99


def test_the_model_is_in_eval_mode(model_folder):
    checkpoint = load_checkpoint(model_folder)
    checkpoint.model.train()
    embedder = TorchEmbedder(checkpoint, "cpu")
    assert np.array_equal(embedder.embed_texts(["a star"]), embedder.embed_texts(["a star"]))


def test_big_photographs(embedder, tmp_path):
    Image.new("RGB", (3000, 2000), "red").save(tmp_path / "big.jpg")
    Image.new("RGB", (300, 200), "red").save(tmp_path / "small.jpg")
    rows = embedder.embed_images([tmp_path / "big.jpg", tmp_path / "small.jpg"]).rows
    assert rows[0] @ rows[1] > 0.999


def test_a_core_installation_says_what_to_install(model_folder):
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # importing it now raises ModuleNotFoundError, as if it were not there
        "import clipmatch\n"
        f"try: clipmatch.load_model({str(model_folder)!r})\n"
        "except clipmatch.ClipmatchError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f'The model {model_folder} needs the package torch; install it with: pip install "clipmatch[train]", or make a '
        f"copy that runs without it where it is installed: clipmatch export {model_folder} --out DIR\n"
    )


# Models for ONNX Runtime


@pytest.fixture
def colours(tmp_path):
    """A model folder whose vectors can be read: the share of red, green and blue, of pictures and of words."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "red": 1, "green": 2, "blue": 3}, "[PAD]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "colours"
    folder.mkdir()
    Tokenizer(words).save(folder / "tokenizer.json")
    model, preprocess = {"embed_dim": 3, "max_length": 4}, to_json(PreprocessConfig(size=8))
    write_json(folder / "config.json", config_values(model, preprocess, {"licence": "MIT"}, "f" * 16))
    write_colour_graphs(folder)
    return folder


def write_colour_graphs(folder, width=3, ids="input_ids", words=4):
    """features: the mean of all pixels, or how often each colour is named; embedding: the same as a unit vector."""
    node, info, number = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto
    outputs = [info("embedding", number.FLOAT, ["b", width]), info("features", number.FLOAT, ["b", width])]
    unit = node("LpNormalization", ["features"], ["embedding"], axis=-1, p=2)
    places, table = np.array([1, 2], np.int64), np.eye(words, width, -1, dtype=np.float32)
    image = [
        node("Cast", ["pixels"], ["floats"], to=number.FLOAT),
        node("ReduceMean", ["floats", "places"], ["features"], keepdims=0),
        unit,
    ]
    text = [
        node("Gather", ["table", ids], ["colours"]),
        node("Unsqueeze", ["attention_mask", "last"], ["column"]),
        node("Cast", ["column"], ["mask"], to=number.FLOAT),
        node("Mul", ["colours", "mask"], ["masked"]),
        node("ReduceSum", ["masked", "middle"], ["features"], keepdims=0),
        unit,
    ]
    pixels = [info("pixels", number.UINT8, ["b", 8, 8, 3])]
    write_onnx(folder / "image.onnx", image, pixels, outputs, {"places": places})
    constants = {"table": table, "last": np.array([2], np.int64), "middle": np.array([1], np.int64)}
    inputs = [info(name, number.INT64, ["b", "t"]) for name in (ids, "attention_mask")]
    write_onnx(folder / "text.onnx", text, inputs, outputs, constants)


def write_onnx(path, nodes, inputs, outputs, constants):
    values = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "colours", inputs, outputs, values)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), str(path))


def paint(path, colour):
    Image.new("RGB", (20, 10), colour).save(path)
    return path


def test_onnx_rows_are_those_of_the_graphs(colours, tmp_path):
    files = [paint(tmp_path / "red.png", (255, 0, 0)), tmp_path / "none.png", paint(tmp_path / "x.png", (0, 30, 40))]
    model = load_model(colours)
    assert isinstance(model, OnnxEmbedder)
    assert (model.dim, model.fingerprint, model.about) == (3, "f" * 16, {"licence": "MIT"})
    found = model.embed_images(files)
    assert [path.name for path in found.paths] == ["red.png", "x.png"]
    assert [failure.path.name for failure in found.failures] == ["none.png"]
    np.testing.assert_allclose(found.rows, [[1, 0, 0], [0, 0.6, 0.8]], atol=1e-6)
    np.testing.assert_allclose(model.features_of_images(files).rows, [[255, 0, 0], [0, 30, 40]], atol=1e-4)
    np.testing.assert_allclose(model.embed_texts(["blue", "red red green"])[0], [0, 0, 1], atol=1e-6)
    texts = ["blue", "red red green", "green green green green blue"]  # the last is cut after four words
    np.testing.assert_allclose(model.features_of_texts(texts), [[0, 0, 1], [2, 1, 0], [0, 4, 0]])


def test_a_graph_is_read_when_it_is_needed(colours, tmp_path):
    (colours / "image.onnx").write_bytes(b"damaged")
    model = load_model(colours)
    assert model.embed_texts(["red"]).tolist() == [[1, 0, 0]]
    assert model.text_session is model.text_session
    with pytest.raises(ClipmatchError, match=r"is damaged .*image.onnx"):
        model.embed_images([paint(tmp_path / "red.png", "red")])


def use(folder, picture):
    model = load_model(folder)
    return model.embed_images([picture]), model.embed_texts(["red"])


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**values, **changes})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "text.onnx").unlink(), r"\(it has no text.onnx\)"),
        (lambda folder: (folder / "text.onnx").write_bytes(b""), "text.onnx"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"\(it has no tokenizer.json\)"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "Cannot read the tokenizer"),
        (lambda folder: edit_config(folder, model={"embed_dim": 3}), "max_length"),
        (lambda folder: edit_config(folder, model={"embed_dim": 4, "max_length": 4}), "embeddings of 3 numbers, .* 4"),
        (lambda folder: edit_config(folder, preprocess={"size": 9}), r"pictures of \[8, 8, 3\], .* \[9, 9, 3\]"),
        (lambda folder: write_colour_graphs(folder, width=2), "embeddings of 2 numbers, .* 3"),
        (lambda folder: write_colour_graphs(folder, words=1), "indices element out of data bounds"),
        (lambda folder: write_colour_graphs(folder, ids="ids"), "takes ids, attention_mask instead of input_ids, att"),
    ],
)
def test_an_onnx_folder_that_is_damaged(colours, damage, sentence, tmp_path):
    damage(colours)
    with pytest.raises(ClipmatchError, match=rf"is damaged .*{sentence}.*; copy or export it again") as caught:
        use(colours, paint(tmp_path / "red.png", "red"))
    assert str(colours) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_both_kinds_runs_by_what_is_asked_for(colours, model_folder, tmp_path):
    both = shutil.copytree(model_folder, tmp_path / "both")
    for name in ("image.onnx", "text.onnx"):
        shutil.copy(colours / name, both)
    assert type(load_model(both)) is OnnxEmbedder
    assert type(load_model(both, device="cpu", precision="float32")) is OnnxEmbedder
    assert type(load_model(both, precision="bfloat16")) is TorchEmbedder
    (both / "model.safetensors").unlink()
    for wish in ({"device": "cuda"}, {"precision": "float16"}):
        with pytest.raises(ClipmatchError, match=r"is for ONNX Runtime, .*; leave out the device and the precision"):
            load_model(both, **wish)


# Which model a name means


def test_no_name_means_the_model_that_comes_with_the_package(colours, tmp_path, monkeypatch):
    monkeypatch.setattr("clipmatch.embedder.EMBEDDED", colours)
    assert load_model().fingerprint == "f" * 16
    monkeypatch.setattr("clipmatch.embedder.EMBEDDED", tmp_path / "none")
    with pytest.raises(ClipmatchError, match="lacks the embedded model; name a model"):
        load_model()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache; a function that puts a repository of these files there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(name, folder):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("abc")
        shutil.copytree(folder, repository / "snapshots" / "abc")

    return add


@pytest.fixture
def pretrained(monkeypatch):
    """What models of other makers are asked for, instead of loading them."""
    asked = []
    monkeypatch.setattr("clipmatch.pretrained.load_pretrained", lambda *wish: asked.append(wish) or SimpleNamespace())
    return asked


def test_models_of_other_makers(tmp_path, hub, pretrained):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    hub("maker/clip", tmp_path / "clip")
    load_model(tmp_path / "clip", "cpu", "float32")
    load_model("maker/clip")
    assert pretrained == [(str(tmp_path / "clip"), "cpu", "float32"), ("maker/clip", None, None)]


def test_our_models_on_the_hub(colours, model_folder, hub, pretrained):
    hub("me/onnx", colours)
    hub("me/torch", model_folder)
    assert load_model("me/onnx").fingerprint == "f" * 16
    assert load_model("me/torch").fingerprint == load_checkpoint(model_folder).fingerprint
    assert pretrained == []


def test_names_that_are_no_model(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"layers": 3}')
    hub("maker/odd", tmp_path / "odd")
    for name, sentence in (
        ("odd", "odd is no clipmatch model folder"),
        ("maker/odd", "The hub repository 'maker/odd' is not of a clipmatch model; name another"),
        ("nobody/none", "There is no folder nobody/none here. The hub model 'nobody/none' can't be reached"),
        ("mine", "The model folder mine does not exist; train one with"),
    ):
        with pytest.raises(ClipmatchError, match=sentence):
            load_model(name)


def test_the_hub_is_asked_once_for_the_kind_of_a_model(tmp_path, hub, pretrained, monkeypatch):
    """Online, the config.json of an unknown repository is fetched once; a known one is not asked about again."""
    asked = []

    def fetch(name, file, local_files_only):
        asked.append((name, file, local_files_only))
        (tmp_path / "config.json").write_text('{"model_type": "clip"}')
        return str(tmp_path / "config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr("clipmatch.modelfolder.offline", lambda: False)
    load_model("maker/clip")
    assert asked == [("maker/clip", "config.json", False)]
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    hub("maker/clip", tmp_path / "clip")
    load_model("maker/clip")
    assert len(asked) == 1
    assert len(pretrained) == 2


# The machine


def test_device_and_precision_are_named_or_refused():
    assert choose_device("cpu").type == "cpu"
    assert choose_device().type in ("cpu", "cuda", "mps")
    with pytest.raises(ClipmatchError, match=r"The device 'gpu' can't be used here .*; try --device cpu"):
        choose_device("gpu")
    cpu = torch.device("cpu")
    assert choose_precision(cpu, "float32").dtype is None
    with pytest.raises(ClipmatchError, match="Unknown precision 'int8'; use one of float32, bfloat16, float16"):
        choose_precision(cpu, "int8")


@pytest.mark.parametrize(
    ("features", "dtype", "reason"),
    [
        ({"avx2"}, None, "float32: this CPU has no fast bfloat16"),
        ({"avx512_bf16"}, torch.bfloat16, "bfloat16: this CPU has AVX512-BF16"),
        ({"avx512_bf16", "amx_bf16"}, torch.bfloat16, "bfloat16: this CPU has AMX-BF16"),
    ],
)
def test_precision_follows_the_cpu(monkeypatch, features, dtype, reason):
    monkeypatch.setattr("clipmatch.runtime.cpu_features", lambda: features)
    chosen = choose_precision(torch.device("cpu"))
    assert (chosen.dtype, chosen.reason) == (dtype, reason)


def test_cores_and_seeds():
    assert usable_cores() >= 1
    seed_everything(3)
    first = (torch.rand(2), np.random.rand(2))
    seed_everything(3)
    assert torch.equal(torch.rand(2), first[0])
    assert np.array_equal(np.random.rand(2), first[1])
