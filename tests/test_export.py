"""An ONNX model folder: it says what PyTorch says, needs no PyTorch, and is written whole or not at all."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from conftest import tiny_config
from onnx import numpy_helper

from clipmatch import export as module
from clipmatch.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from clipmatch.cli import main
from clipmatch.config import PreprocessConfig
from clipmatch.embedder import OnnxEmbedder, TorchEmbedder, load_model
from clipmatch.errors import ClipmatchError
from clipmatch.export import export_model, largest_difference, random_texts, write_graphs
from clipmatch.model import CLIPModel
from clipmatch.preprocess import Transform, load_image
from clipmatch.quantisation import byte_scale, quantise_weights
from clipmatch.session import open_session

FILES = {"config.json", "tokenizer.json", "image.onnx", "text.onnx"}

# Put before a program: PyTorch and all that comes with it can't be imported, as if it were not there.
CORE_ONLY = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnxscript", "safetensors", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def exported(model_folder, tmp_path_factory):
    """The tiny model as an ONNX folder; to be read only."""
    folder = tmp_path_factory.mktemp("onnx") / "tiny"
    export_model(model_folder, folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(exported, tmp_path / "model")


@pytest.fixture
def ready(exported, monkeypatch):
    """Instead of being made anew, the graphs are those of the tiny model, for tests of what is done with them."""

    def copy(checkpoint, place):
        for name in ("image.onnx", "text.onnx"):
            shutil.copy(exported / name, place)

    monkeypatch.setattr(module, "write_graphs", copy)


@pytest.fixture(scope="module")
def original(model_folder):
    return TorchEmbedder(load_checkpoint(model_folder), "cpu")


def names(folder):
    return {path.name for path in folder.iterdir()}


def noise(count, side=32):
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def words(count):
    return " ".join(["red", "circle", "blue", "star", "big", "tree"][i % 6] for i in range(count))


def checkpoint_of(vocabulary, **changes):
    torch.manual_seed(0)
    model = CLIPModel(tiny_config(vocabulary.vocab_size, **changes)).eval()
    return Checkpoint(model, vocabulary, Transform(PreprocessConfig(size=32, mean=(0.4, 0.5, 0.6))))


# What the graphs compute


@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_pictures_in_batches_of_any_size(exported, original, count):
    pixels = noise(count)
    rows = OnnxEmbedder(exported).encode_pixels(pixels)
    assert (rows.dtype, rows.shape) == (np.float32, (count, 16))
    np.testing.assert_allclose(rows, original.encode_pixels(pixels), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 38, 90])
@pytest.mark.parametrize("batch", [1, 3])
def test_texts_of_any_length_in_batches_of_any_size(exported, original, count, batch):
    """Each word is a token and two mark the ends; the model reads 40 of them."""
    texts = [words(count), "", "a"][:batch]
    onnx_model = OnnxEmbedder(exported)
    tokens = onnx_model.tokenizer(texts, padding=True, max_length=40)["input_ids"]
    assert len(tokens[0]) == min(count + 2, 40)
    np.testing.assert_allclose(onnx_model.encode_strings(texts), original.encode_strings(texts), atol=1e-4)


def test_files_and_features(exported, original, scenes, tmp_path):
    files = sorted((scenes / "Images").iterdir())[:70]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    found = OnnxEmbedder(exported).features_of_images([broken, *files], progress=False)
    assert found.paths == files
    assert [failure.path for failure in found.failures] == [broken]
    model, transform = original.model, original.transform
    pixels = transform(images=[load_image(path) for path in files[:4]], return_tensors="pt")["pixel_values"]
    tokens = original.checkpoint.tokenizer(["a red star", "two trees"], padding=True, return_tensors="pt")
    with torch.no_grad():
        image_features, text_features = model.image_encoder.features(pixels), model.text_encoder.features(**tokens)
    np.testing.assert_allclose(found.rows[:4], image_features.numpy(), atol=1e-4)
    texts = OnnxEmbedder(exported).features_of_texts(["a red star", "two trees"])
    np.testing.assert_allclose(texts, text_features.numpy(), atol=1e-4)
    assert OnnxEmbedder(exported).features_of_images([broken]).rows.shape == (0, 32)
    assert OnnxEmbedder(exported).features_of_texts([]).shape == (0, 32)


def test_an_output_that_is_not_there(exported):
    with pytest.raises(ClipmatchError, match="no output 'grid'; it has embedding, features"):
        OnnxEmbedder(exported).features_of_images([], output="grid")


VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TOWERS = {
    "convnext, mean": {
        "image_tower": {"model_type": "convnext", "hidden_sizes": [8, 24], "depths": [1, 1], "num_stages": 2},
        "image_pooling": "mean",
    },
    "dinov2, class token and mean": {
        "image_tower": {"model_type": "dinov2", "mlp_ratio": 2, **VIT},
        "image_pooling": "cls+mean",
        "text_pooling": "mean",
    },
    "deit, mean; bert": {
        "image_tower": {"model_type": "deit", "intermediate_size": 64, **VIT},
        "image_pooling": "mean",
        "text_tower": {"model_type": "bert", "vocab_size": 1000, "max_position_embeddings": 40, **BERT},
    },
}


@pytest.mark.parametrize("towers", TOWERS.values(), ids=TOWERS)
def test_other_towers(vocabulary, tmp_path, towers):
    checkpoint = checkpoint_of(vocabulary, **towers)
    save_checkpoint(checkpoint, tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "onnx")
    first, second = OnnxEmbedder(tmp_path / "onnx"), TorchEmbedder(checkpoint, "cpu")
    np.testing.assert_allclose(first.encode_pixels(noise(3)), second.encode_pixels(noise(3)), atol=1e-4)
    texts = ["a", words(5), words(60)]
    np.testing.assert_allclose(first.encode_strings(texts), second.encode_strings(texts), atol=1e-4)


def test_the_model_computes_attention_as_before(tiny, tmp_path):
    config = tiny.model.image_encoder.backbone.config
    attention = config._attn_implementation
    assert attention != "eager"  # the one that can be written as a graph
    write_graphs(tiny, tmp_path)
    assert config._attn_implementation == attention


def test_the_grid_embeds_each_place_alone(vocabulary, tmp_path):
    checkpoint = checkpoint_of(vocabulary, **TOWERS["convnext, mean"])
    write_graphs(checkpoint, tmp_path)
    session = open_session(tmp_path / "image.onnx")
    embedding, features, grid = session.run(["embedding", "features", "grid"], {"pixels": noise(2)})
    assert grid.shape == (2, 16, 16)  # 4 x 4 places, 16 numbers each
    model = checkpoint.model
    with torch.no_grad():
        pixels = torch.from_numpy(checkpoint.transform.normalise(noise(2)))
        maps = model.image_encoder.backbone(pixel_values=pixels).last_hidden_state
        hidden = maps.flatten(2).transpose(1, 2)
        expected = model.project_image(hidden[0, 5][None])[0].numpy()
    np.testing.assert_allclose(grid[0, 5], expected, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(grid, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(features, hidden.mean(dim=1).numpy(), atol=1e-4)
    assert embedding.shape == (2, 16)


def test_the_files_name_no_file_of_this_machine(exported):
    for name in ("image.onnx", "text.onnx"):
        assert b".py" not in (exported / name).read_bytes()


# What is written


def test_the_folder_says_where_it_came_from(model_folder, exported):
    assert names(exported) == FILES
    config, source = (json.loads((folder / "config.json").read_text()) for folder in (exported, model_folder))
    assert config["about"]["exported_from"]["fingerprint"] == source["fingerprint"]
    assert config["about"]["exported_from"]["numbers"] == "float32"
    assert max(config["about"]["exported_from"]["largest_cosine_difference"].values()) < 1e-6
    assert {**config, "about": None, "fingerprint": None} == {**source, "about": None, "fingerprint": None}
    assert config["fingerprint"] != source["fingerprint"]
    assert OnnxEmbedder(exported).fingerprint == config["fingerprint"]


def test_words_pictures_and_graphs_make_the_fingerprint(tiny, ready, exported, tmp_path):
    save_checkpoint(replace(tiny, about={"licence": "MIT"}), tmp_path / "m")
    same = export_model(tmp_path / "m", tmp_path / "onnx")
    assert OnnxEmbedder(tmp_path / "onnx").about["licence"] == "MIT"
    assert same.fingerprint == OnnxEmbedder(exported).fingerprint
    save_checkpoint(replace(tiny, transform=Transform(PreprocessConfig(size=32, resample="bicubic"))), tmp_path / "m")
    bicubic = export_model(tmp_path / "m", tmp_path / "onnx")
    int8 = export_model(tmp_path / "m", tmp_path / "onnx", int8=True)
    assert len({same.fingerprint, bicubic.fingerprint, int8.fingerprint}) == 3


def test_int8_is_smaller_and_close(vocabulary, tmp_path):
    """Wider than the tiny model, whose files are mostly the names of nodes, and with a head that takes a large mean
    away, as heads on standardised features do: it must not be rounded.
    """
    bert = {"model_type": "distilbert", "vocab_size": 2000, "dim": 128, "n_layers": 2, "n_heads": 2, "hidden_dim": 256}
    checkpoint = checkpoint_of(vocabulary, text_tower=bert, embed_dim=128)
    encoder = checkpoint.model.text_encoder
    with torch.no_grad():
        encoder.backbone.transformer.layer[-1].output_layer_norm.bias[3] += 500
        encoder.fc.bias -= 500 * encoder.fc.weight[:, 3]
    save_checkpoint(checkpoint, tmp_path / "m")
    export_model(tmp_path / "m", tmp_path / "float")
    done = export_model(tmp_path / "m", tmp_path / "int8", int8=True)
    assert 1e-6 < max(done.differences.values()) < 0.01
    sizes = [(tmp_path / kind / "text.onnx").stat().st_size for kind in ("float", "int8")]
    assert sizes[1] < 0.35 * sizes[0]
    first, second = OnnxEmbedder(tmp_path / "float"), OnnxEmbedder(tmp_path / "int8")
    assert first.fingerprint != second.fingerprint
    texts = [words(3), words(30)]
    assert largest_difference(first.encode_strings(texts), second.encode_strings(texts)) < 0.01
    assert largest_difference(first.encode_pixels(noise(4)), second.encode_pixels(noise(4))) < 0.01


def test_int8_rows_do_not_depend_on_their_neighbours(vocabulary, tmp_path):
    """A query alone and among others is the same query."""
    bert = {"model_type": "distilbert", "vocab_size": 1000, "dim": 128, "n_layers": 2, "n_heads": 2, "hidden_dim": 256}
    save_checkpoint(checkpoint_of(vocabulary, text_tower=bert, embed_dim=128), tmp_path / "m")
    export_model(tmp_path / "m", tmp_path / "int8", int8=True)
    model, texts = OnnxEmbedder(tmp_path / "int8"), [words(4), words(3), "a"]
    alone = np.concatenate([model.encode_strings([text]) for text in texts])
    np.testing.assert_allclose(model.encode_strings(texts), alone, atol=1e-5)


@pytest.fixture(scope="module")
def convolutions(vocabulary, tmp_path_factory):
    """A model folder with a tower of convolutions."""
    folder = tmp_path_factory.mktemp("lite") / "model"
    tower = {"model_type": "efficientnet_lite", "image_size": 64}
    torch.manual_seed(0)
    checkpoint = checkpoint_of(vocabulary, image_tower=tower, image_pooling="mean+max")
    config = PreprocessConfig(size=64, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    save_checkpoint(replace(checkpoint, transform=Transform(config)), folder)
    return folder


@pytest.fixture(scope="module")
def on_bytes(convolutions, scenes, tmp_path_factory):
    """The same exported with photographs, so that it computes on bytes."""
    return export_model(convolutions, tmp_path_factory.mktemp("lite") / "bytes", int8=True, pictures=scenes)


def test_convolutions_compute_on_bytes_once_photographs_tell_their_scale(convolutions, on_bytes, scenes, tmp_path):
    export_model(convolutions, tmp_path / "float", int8=True)
    assert on_bytes.differences["image"] < 0.05
    first, second = (folder / "image.onnx" for folder in (tmp_path / "float", on_bytes.folder))
    assert second.stat().st_size < 0.4 * first.stat().st_size
    kinds = [node.op_type for node in onnx.load(str(second)).graph.node]
    assert kinds.count("QuantizeLinear") >= kinds.count("Conv") > 10
    paths = sorted((scenes / "Images").iterdir())[:5]
    rows = [OnnxEmbedder(path.parent).embed_images(paths, progress=False).rows for path in (first, second)]
    assert largest_difference(*rows) < 0.05


def test_no_two_products_of_bytes_overflow(on_bytes):
    """Without VNNI a processor adds each two products in 16 bits, which 255 * 128 fills."""
    graph = onnx.load(str(on_bytes.folder / "image.onnx")).graph
    kernels = [numpy_helper.to_array(tensor) for tensor in graph.initializer]
    kernels = [kernel for kernel in kernels if kernel.ndim == 4 and kernel.shape[1] > 1]
    assert len(kernels) > 10
    for kernel in kernels:
        assert kernel.dtype == np.int8
        for order in (kernel, kernel.transpose(0, 2, 3, 1)):
            flat = order.reshape(len(order), -1).astype(int)
            assert np.abs(flat[:, 1:] + flat[:, :-1]).max() <= 128
        assert np.abs(kernel.astype(int)).max() > 60  # no step is given away without need


def test_pixels_go_into_the_first_convolution_as_they_are(on_bytes):
    """Where (x - 127) / 128 is what the tower wants, x itself with its zero at 127 is the same."""
    graph = onnx.load(str(on_bytes.folder / "image.onnx")).graph
    numbers = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    first = maker[next(node for node in graph.node if node.op_type == "Conv").input[0]]
    assert first.op_type == "DequantizeLinear"
    assert [float(numbers[name]) for name in first.input[1:]] == [1 / 128, 127]
    assert maker[first.input[0]].op_type == "Transpose"
    assert list(maker[first.input[0]].input) == ["pixels"]


@pytest.mark.parametrize(
    ("mean", "std", "scale"),
    [((127,) * 3, (128,) * 3, (1 / 128, 127)), ((127.5,) * 3, (127.5,) * 3, None), ((124, 116, 104), (58,) * 3, None)],
)  # fmt: skip
def test_a_byte_stands_for_its_value_only_where_zero_is_a_byte(mean, std, scale):
    config = PreprocessConfig(mean=tuple(m / 255 for m in mean), std=tuple(s / 255 for s in std))
    found = byte_scale(Transform(config))
    assert (found and (float(found["scale"]), int(found["zero_point"]))) == (scale and pytest.approx(scale))


def test_too_few_photographs_tell_no_scale(convolutions, scenes, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted((scenes / "Images").iterdir())[:3]:
        shutil.copy(path, few)
    with pytest.raises(ClipmatchError, match=r"few has too few readable photographs \(3\); more than 20 are needed"):
        export_model(convolutions, tmp_path / "out", int8=True, pictures=few)
    assert not (tmp_path / "out").exists()


def test_photographs_without_int8_are_refused(convolutions, scenes, tmp_path):
    options = ["export", str(convolutions), "--out", str(tmp_path / "out"), "--pictures", str(scenes)]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 1
    assert "--pictures would change nothing" in done.output


def test_tables_are_rounded_row_by_row(tmp_path):
    """Rows of very different size each keep their own seven bits and sign."""
    table = np.array([[100, -50], [0.001, 0.0005], [0, 0]], np.float32)
    make = onnx.helper
    graph = make.make_graph(
        [make.make_node("Gather", ["table", "ids"], ["rows"])],
        "g",
        [make.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["b"])],
        [make.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, ["b", 2])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(tmp_path / "g.onnx"))
    quantise_weights(tmp_path / "g.onnx")
    rows = open_session(tmp_path / "g.onnx").run(["rows"], {"ids": np.array([0, 1, 2, 1])})[0]
    np.testing.assert_allclose(rows, table[[0, 1, 2, 1]], rtol=0.01)
    kinds = {value.data_type for value in onnx.load(str(tmp_path / "g.onnx")).graph.initializer if len(value.dims) == 2}
    assert kinds == {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT}  # rows, and their scales [3, 1]


def test_a_graph_that_is_wrong_is_not_kept(tiny, ready, folder, tmp_path):
    with torch.no_grad():
        tiny.model.text_encoder.fc.weight.neg_()  # not in the graphs
    save_checkpoint(tiny, tmp_path / "changed")
    before = OnnxEmbedder(folder).fingerprint
    for out, int8, bound in ((folder, False, "0.0001"), (tmp_path / "new", True, "0.05")):
        with pytest.raises(ClipmatchError, match=rf"differ from PyTorch .* at most {bound} .* nothing was written"):
            export_model(tmp_path / "changed", out, int8)
    assert OnnxEmbedder(folder).fingerprint == before
    assert names(tmp_path) == {"model", "changed"}


def test_differences_are_largest_and_nan_is_no_equality():
    rows = np.array([[1, 0], [1, 0], [1, 0]], np.float32)
    others = np.array([[1, 0], [0.6, 0.8], [0.8, 0.6]], np.float32)
    assert largest_difference(rows, others) == pytest.approx(0.4)
    assert np.isnan(largest_difference(rows, others * np.nan))


def test_a_model_of_nans_is_not_exported(tiny, ready, tmp_path):
    with torch.no_grad():
        tiny.model.text_encoder.fc.bias[0] = float("nan")
    save_checkpoint(tiny, tmp_path / "m")
    with pytest.raises(ClipmatchError, match=r"differ from PyTorch .*nan for texts"):
        export_model(tmp_path / "m", tmp_path / "onnx")


def test_sentences_of_the_models_own_words(vocabulary):
    texts = random_texts(vocabulary)
    assert [len(text.split()) for text in texts] == [1, 2, 3, 5, 8, 12, 20, 100]
    assert vocabulary.backend.token_to_id("[UNK]") not in vocabulary(texts[-1], max_length=200)["input_ids"]


def test_other_files_are_not_replaced(model_folder, ready, folder, tmp_path):
    with pytest.raises(ClipmatchError, match=r"holds other files \(model.safetensors\); save to a new or empty"):
        export_model(model_folder, model_folder)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ClipmatchError, match=r"holds other files \(holiday.jpg\)"):
        export_model(model_folder, tmp_path / "photos")
    export_model(model_folder, folder)  # an earlier export is
    assert names(folder) == FILES


def test_an_onnx_folder_can_not_be_exported_again(exported, tmp_path):
    with pytest.raises(ClipmatchError, match=r"is in ONNX form already .* or name the folder"):
        export_model(exported, tmp_path / "again")


def test_a_tower_that_can_not_be_expressed(tiny, tmp_path, monkeypatch):
    class Stubborn(torch.nn.Module):
        def forward(self, pixels):
            return torch.linalg.eigvals(pixels[:, :, :, 0].float()).real

    monkeypatch.setattr(module, "TextGraph", lambda checkpoint: Stubborn())
    monkeypatch.setattr(module, "ImageGraph", lambda checkpoint: with_flag(Stubborn()))
    with pytest.raises(ClipmatchError, match=r"This model can't be written as image.onnx: ") as caught:
        write_graphs(tiny, tmp_path)
    assert "\n" not in str(caught.value)


def with_flag(graph):
    graph.has_grid = False
    return graph


# Without PyTorch


def core_only(*arguments):
    program = f"{CORE_ONLY}\nfrom clipmatch.cli import main\nmain()\n"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_searching_needs_no_pytorch_and_finds_the_same(exported, original, scenes):
    rest = ["--images", scenes / "Images", "-k", 10, "--json"]
    done = core_only("find", "a red circle", "--model", exported, *rest)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    everything = original.embed_images(sorted((scenes / "Images").iterdir()))
    scores = everything.rows @ original.embed_texts(["a red circle"])[0]
    best = np.argsort(-scores, kind="stable")[:10]
    assert [row["path"] for row in found] == [str(everything.paths[i]) for i in best]
    assert [row["score"] for row in found] == pytest.approx(scores[best].tolist(), abs=1e-4)


def test_measuring_and_listing_need_no_pytorch(exported, model_folder, scenes, tmp_path):
    split = scenes / "splits" / "dev.txt"
    rest = ["--captions", scenes, "--split", split, "--json", "-"]
    done = core_only("evaluate", "--model", exported, *rest)
    assert done.returncode == 0, done.stderr
    result = CliRunner().invoke(main, [str(word) for word in ["evaluate", "--model", model_folder, *rest]])
    assert json.loads(done.stdout)["text_to_image"] == json.loads(result.stdout)["text_to_image"]
    done = core_only("models", exported)
    assert done.returncode == 0, done.stderr
    assert str(exported) in done.stdout


# The command


def test_export_prints_sizes_and_differences(model_folder, ready, tmp_path):
    done = CliRunner().invoke(main, ["export", str(model_folder), "--out", str(tmp_path / "onnx"), "--int8"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["image.onnx", "text.onnx"]
    assert all(" MB  largest 1 - cosine from PyTorch " in line for line in lines[:2])
    assert lines[2] == f"ONNX model: {tmp_path / 'onnx'}"
    assert load_model(tmp_path / "onnx").dim == 16


def test_export_without_pytorch_says_what_to_install(model_folder, tmp_path):
    done = core_only("export", model_folder, "--out", tmp_path / "onnx")
    assert done.returncode == 1
    assert 'install it with: pip install "clipmatch[train]"' in done.stderr
    assert done.stderr.count("\n") == 1
