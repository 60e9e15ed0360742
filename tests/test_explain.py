"""Why a photograph matches: words and places."""

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import tiny_config
from PIL import Image

from clipmatch.cli import main
from clipmatch.demo import sample_photographs
from clipmatch.embedder import TorchEmbedder, load_model
from clipmatch.errors import ClipmatchError
from clipmatch.explain import explain, warm
from clipmatch.model import CLIPModel


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def cat_beside_blank(tmp_path_factory):
    """A cat in the left half of a picture, nothing in the right one."""
    path = tmp_path_factory.mktemp("cat") / "cat.png"
    (cat,) = [found for found in sample_photographs() if found.stem == "chelsea"]
    picture = Image.new("RGB", (600, 300), (120, 140, 110))
    with Image.open(cat) as photo:
        picture.paste(photo.convert("RGB").resize((300, 300)), (0, 0))
    picture.save(path)
    return path


def test_the_heat_lies_on_what_is_named(model, cat_beside_blank):
    found = explain(model, "a cat", cat_beside_blank)
    assert found.heat.min() == 0
    assert found.heat.max() <= 1
    half = found.heat.shape[1] // 2
    assert found.heat[:, :half].mean() > 3 * found.heat[:, half + 1 :].mean()
    assert found.peak[0] < 0.5


def test_the_score_is_the_search_s(model, cat_beside_blank):
    found = explain(model, "a cat", cat_beside_blank)
    row, text = model.embed_images([cat_beside_blank]).rows[0], model.embed_texts(["a cat"])[0]
    assert found.score == pytest.approx(float(row @ text), abs=1e-5)


def test_a_word_counts_what_is_lost_without_it(model, cat_beside_blank):
    found = explain(model, "a cat", cat_beside_blank)
    whole, *less = model.embed_texts(["a cat", "cat", "a"]) @ model.embed_images([cat_beside_blank]).rows[0]
    assert [word for word, _ in found.words] == ["a", "cat"]
    assert [change for _, change in found.words] == pytest.approx([whole - value for value in less], abs=1e-5)
    assert found.words[1][1] > abs(found.words[0][1])
    ((word, change),) = explain(model, "cat", cat_beside_blank).words
    assert (word, change) == ("cat", pytest.approx(explain(model, "cat", cat_beside_blank).score, abs=1e-5))


def test_a_model_without_places_is_asked_part_by_part(tiny, cat_beside_blank):
    """Only the left half of the picture changes what this model says of it."""
    embedder = TorchEmbedder(tiny)
    assert embedder.encode_places(np.zeros((1, 32, 32, 3), np.uint8)) is None  # a class token
    embedder.encode_pixels = lambda pixels: np.stack([np.array([part[:, :16].std() / 50, 1.0]) for part in pixels])
    embedder.encode_strings = lambda texts: np.array([[0.0, 1.0] if text == "." else [1.0, 0.0] for text in texts])
    heat = explain(embedder, "circle", cat_beside_blank).heat
    assert heat.shape == (8, 8)
    assert heat[:, :4].max() == 1
    assert heat[:, 6:].max() == 0  # parts that begin there lie in the right half alone


def test_only_an_average_of_convolutions_knows_places(vocabulary):
    """What a transformer's average has of a place may be of any other, which attention brought there."""
    averaged = tiny_config(vocabulary.vocab_size, image_pooling="mean")
    assert not CLIPModel(averaged).has_places
    tower = {"model_type": "convnext", "hidden_sizes": [8, 24], "depths": [1, 1], "num_stages": 2}
    convolutions = tiny_config(vocabulary.vocab_size, image_tower=tower, image_pooling="mean")
    assert CLIPModel(convolutions).has_places


def test_a_flat_map_is_not_blown_up():
    assert warm(np.array([[0.1, 0.1], [0.1, 0.101]], np.float32)).max() == pytest.approx(0.05, abs=0.01)
    assert warm(np.array([[0.1, 0.1], [0.1, 0.3]], np.float32)).tolist() == [[0, 0], [0, 1]]


def test_the_picture_is_the_photograph_with_heat(model, cat_beside_blank, tmp_path):
    found = explain(model, "a cat", cat_beside_blank)
    picture = found.picture(300)
    assert picture.size == (300, 150)
    x, y = (int(part * side) for part, side in zip(found.peak, picture.size, strict=True))
    hot, cold = picture.getpixel((x, y)), picture.getpixel((290, 5))
    assert hot[0] - hot[2] > cold[0] - cold[2] + 40  # redder
    written = found.save(tmp_path / "why.png")
    with Image.open(written) as page:
        assert page.width == 600
        assert page.height > 300 + 2 * 20  # a bar for each word
    with pytest.raises(ClipmatchError, match="can't be written"):
        found.save(tmp_path / "none" / "why.png")
    with pytest.raises(ClipmatchError, match="can't be written"):
        found.save(tmp_path / "why.txt")


def test_on_the_command_line(cat_beside_blank, tmp_path):
    out = tmp_path / "why.jpg"
    result = CliRunner().invoke(main, ["explain", "a cat", str(cat_beside_blank), "-o", str(out)])
    assert result.exit_code == 0, result.output
    first, *bars = result.stdout.splitlines()
    assert first.startswith("cosine 0.")
    assert bars[1].startswith("cat  +")
    assert bars[1].endswith("#" * 24)
    assert out.is_file()
    for words in (["a cat", str(tmp_path / "none.jpg")], ["@nobody", str(cat_beside_blank), "--index", str(out)]):
        failed = CliRunner().invoke(main, ["explain", *words])
        assert failed.exit_code == 1
        assert failed.stderr.startswith("Error: ")
        assert failed.stderr.count("\n") == 1
