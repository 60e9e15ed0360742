"""What a guide is asked, how it looks at pictures, and that its gradients lead where it says."""

import json
import math

import numpy as np
import pytest
import torch
from colours import paint
from PIL import Image
from test_pretrained import clip_parts

from clipmatch.embedder import TorchEmbedder
from clipmatch.errors import ClipmatchError
from clipmatch.generation.cutouts import cutouts, random_frames
from clipmatch.generation.guide import Guide, Targets, load_guide, spherical_distance
from clipmatch.generation.prompts import Prompt, parse_prompts
from clipmatch.pretrained import load_pretrained


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a bus in the snow", [("a bus in the snow", 1)]),
        ("bus:1 | blur:-0.5", [("bus", 1), ("blur", -0.5)]),
        (" a bus : 2 |  | snow:+.5", [("a bus", 2), ("snow:+.5", 1)]),  # a weight begins with a digit
        ("a train at 10:30", [("a train at 10:30", 1)]),
        ("area 51:-1 | desert", [("area 51", -1), ("desert", 1)]),
        ("odd: a thing: 3", [("odd: a thing", 3)]),
    ],
)
def test_prompts_with_weights(line, expected):
    assert [(prompt.text, prompt.weight) for prompt in parse_prompts(line)] == expected


def test_a_picture_is_a_prompt(photos):
    red = photos / "red.png"
    assert parse_prompts(f"{red}:0.5 | at night") == (Prompt(image=red, weight=0.5), Prompt("at night"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "prompt is empty"),
        (" | ", "prompt is empty"),
        ("blur:-1 | noise:-0.5", "only says what not to paint"),
        ("bus:0", "weight of 'bus' is 0"),
        ("nowhere.png:2", "picture nowhere.png does not exist"),
        (":2 | bus", "no words"),
    ],
)
def test_what_is_no_prompt_is_refused(line, message):
    with pytest.raises(ClipmatchError, match=message):
        parse_prompts(line)


def test_sides_are_noticed():
    assert parse_prompts("a cat LEFT of a dog")[0].has_sides
    assert not parse_prompts("a cat above leftovers")[0].has_sides


def views_of(picture, count=64, size=16, flip=False, seed=0):
    return cutouts(picture, count, size, torch.Generator().manual_seed(seed), flip)


def test_views_follow_from_the_seed_and_let_gradients_through():
    picture = torch.rand(1, 3, 40, 40, requires_grad=True)
    views = views_of(picture)
    assert views.shape == (64, 3, 16, 16)
    assert torch.equal(views, views_of(picture))
    assert not torch.equal(views, views_of(picture, seed=1))
    views.sum().backward()
    assert (picture.grad != 0).float().mean() > 0.99  # every place is looked at


def test_views_show_parts_of_several_sizes_and_mirror_only_if_asked():
    frames = random_frames(400, torch.Generator().manual_seed(0), flip=True)
    shares = frames[:, 1, 1].abs()
    assert 0.54 < shares.min() < 0.6
    assert 0.9 < shares.max() <= 1
    assert 0.4 < (frames[:, 0, 0] < 0).float().mean() < 0.6
    assert (random_frames(400, torch.Generator().manual_seed(0), flip=False)[:, 0, 0] > 0).all()
    corners = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]])
    assert (frames @ corners.T).abs().max() < 1.3  # not far over the edge


def test_unmirrored_views_keep_left_on_the_left():
    picture = torch.zeros(1, 3, 32, 32)
    picture[..., :16] = 1
    views = views_of(picture)
    assert (views[..., 0].mean(dim=(1, 2)) > views[..., -1].mean(dim=(1, 2))).all()
    mirrored = views_of(picture, flip=True)
    assert 10 < (mirrored[..., 0].mean(dim=(1, 2)) < mirrored[..., -1].mean(dim=(1, 2))).sum() < 54


def test_the_distance_is_half_the_squared_angle():
    rows = torch.tensor([[1.0, 0], [0, 1], [-1, 0]], requires_grad=True)
    distances = spherical_distance(rows, torch.tensor([[1.0, 0]]))
    assert distances.flatten().tolist() == pytest.approx([0, math.pi**2 / 8, math.pi**2 / 2], rel=2e-3)
    distances.sum().backward()
    assert rows.grad.isfinite().all()


@pytest.fixture
def guide(tiny):
    return Guide(TorchEmbedder(tiny, "cpu"))


@pytest.fixture(scope="module")
def hub_clip(tmp_path_factory):
    """A tiny CLIP as the hub has them."""
    folder = tmp_path_factory.mktemp("hub") / "clip"
    torch.manual_seed(0)
    model, tokenizer, steps = clip_parts()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(steps))
    return folder


def test_rows_are_those_of_the_embedder(guide, hub_clip):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    for each in (guide, Guide(load_pretrained(str(hub_clip), "cpu"))):
        assert each.size == 32
        rows = each.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
        np.testing.assert_allclose(rows.detach().numpy(), each.embedder.encode_pixels(pixels), atol=1e-5)


def test_pictures_of_any_size_are_seen_alike(guide):
    smooth = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    large = torch.nn.functional.interpolate(smooth, 96, mode="bilinear")
    assert float((guide.encode(smooth) * guide.encode(large)).sum()) > 0.999


def test_targets_are_rows_with_weights(guide, photos):
    prompts = parse_prompts(f"a star:3 | {photos / 'red.png'}:-1")
    rows, weights = guide.targets(prompts)
    assert weights.tolist() == [0.75, -0.25]
    np.testing.assert_array_equal(rows[0], guide.embedder.embed_texts(["a star"])[0])
    np.testing.assert_array_equal(rows[1], guide.embedder.embed_images([photos / "red.png"]).rows[0])


def test_a_picture_that_cannot_be_read_is_named(guide, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ClipmatchError, match=r"bad\.png can't be read"):
        guide.targets(parse_prompts(str(tmp_path / "bad.png")))


def test_gradients_lead_towards_what_is_wanted_and_away_from_what_is_not(guide):
    wanted, unwanted = torch.nn.functional.normalize(torch.randn(2, 16), dim=1)
    targets = Targets(torch.stack([wanted, unwanted]), torch.tensor([0.5, -0.5]))
    picture = torch.rand(1, 3, 32, 32, requires_grad=True)
    before = guide.encode(picture.detach())[0]
    guide.loss(picture, targets, torch.Generator().manual_seed(0)).backward()
    with torch.no_grad():
        after = guide.encode(picture - 3 * picture.grad / picture.grad.norm())[0]
    assert after @ wanted - after @ unwanted > before @ wanted - before @ unwanted
    assert all(weight.grad is None and not weight.requires_grad for weight in guide.embedder.model.parameters())


def test_scores_are_weighted_cosines_and_always_the_same(guide):
    pictures = torch.rand(2, 3, 32, 32)
    row = guide.encode(pictures[:1]).detach()
    targets = Targets(torch.cat([row, -row]), torch.tensor([0.5, -0.5]))
    scores = guide.score(pictures, targets)
    assert torch.equal(scores, guide.score(pictures, targets))
    assert 0.5 < scores[0] <= 1
    assert torch.allclose(guide.score(pictures[1:], targets)[0], scores[1])


def test_guides_load_by_name(model_folder, hub_clip):
    own, other = load_guide(model_folder, "cpu"), load_guide(str(hub_clip), "cpu")
    assert own.fingerprint != other.fingerprint
    assert own.encode(torch.rand(1, 3, 20, 20)).norm() == pytest.approx(1)
    assert other.encode(torch.rand(1, 3, 20, 20)).norm() == pytest.approx(1)


def test_a_model_without_gradients_is_refused():
    with pytest.raises(ClipmatchError, match=r"embedded is for ONNX Runtime.*name a model folder with PyTorch weights"):
        load_guide("embedded")


def test_examples_are_drawn_from_files_of_any_kind(guide, tmp_path):
    paint(tmp_path / "a.png", (255, 0, 0))
    Image.open(tmp_path / "a.png").convert("L").save(tmp_path / "grey.png")
    assert guide.targets(parse_prompts(str(tmp_path / "grey.png"))).rows.shape == (1, 16)
