"""Files and strings -> unit rows; a bad file costs itself and nothing else."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from clipmatch.checkpoint import load_checkpoint
from clipmatch.embedder import TorchEmbedder, load_model, read_batches
from clipmatch.errors import ClipmatchError
from clipmatch.preprocess import load_image
from clipmatch.runtime import choose_device, choose_precision, seed_everything, usable_cores


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
    assert done.stdout == 'This needs the package torch; install it with: pip install "clipmatch[train]"\n'


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
