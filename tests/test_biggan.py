"""BigGAN-deep against its published layout: names and shapes of all three sizes, and numbers of a tiny one."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import conv2d, interpolate, linear, max_pool2d

from clipmatch.errors import ClipmatchError
from clipmatch.generation.biggan import BigGAN, BigGANCanvas, biggan_canvas, folded, load_biggan, parse_config

BLOCKS = {  # of the published config.json: doubling?, channels in, channels out, in widths of 128
    128: "0-16-16 1-16-16 0-16-16 1-16-8 0-8-8 1-8-4 0-4-4 1-4-2 0-2-2 1-2-1",
    256: "0-16-16 1-16-16 0-16-16 1-16-8 0-8-8 1-8-8 0-8-8 1-8-4 0-4-4 1-4-2 0-2-2 1-2-1",
    512: "0-16-16 1-16-16 0-16-16 1-16-8 0-8-8 1-8-8 0-8-8 1-8-4 0-4-4 1-4-2 0-2-2 1-2-1 0-1-1 1-1-1",
}
PARAMETERS = {128: 50.4, 256: 55.9, 512: 56.2}  # millions, as the release says


def published_config(side, blocks, **changes):
    layers = [
        [bool(int(part)) if place == 0 else int(part) for place, part in enumerate(block.split("-"))]
        for block in blocks.split()
    ]
    common = {"z_dim": 128, "class_embed_dim": 128, "channel_width": 128, "num_classes": 1000, "eps": 1e-4}
    return {"output_dim": side, "layers": layers, "attention_layer_position": 8, "n_stats": 51, **common, **changes}


def published_shapes(config):
    """Names and shapes of the tensors in pytorch_model.bin."""
    width, condition = config["channel_width"], config["z_dim"] + config["class_embed_dim"]
    shapes = {"embeddings.weight": (config["class_embed_dim"], config["num_classes"])}

    def normalised(name, *shape, bias=False):
        columns = math.prod(shape[1:])
        shapes.update({f"{name}.weight_orig": shape, f"{name}.weight_u": shape[:1], f"{name}.weight_v": (columns,)})
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def statistics(name, channels):
        shapes.update({f"{name}.running_{kind}": (config["n_stats"], channels) for kind in ("means", "vars")})

    normalised("generator.gen_z", 16 * 16 * width, condition, bias=True)
    place = 0
    for number, (_, before, after) in enumerate(config["layers"]):
        before, after = before * width, after * width
        if number == config["attention_layer_position"]:
            name = f"generator.layers.{place}"
            for part, outputs, inputs in (("theta", 8, 1), ("phi", 8, 1), ("g", 2, 1), ("o_conv", 1, 2)):
                normalised(f"{name}.snconv1x1_{part}", before // outputs, before // inputs, 1, 1)
            shapes[f"{name}.gamma"] = (1,)
            place += 1
        sides = [before, before // 4, before // 4, before // 4, after]
        for part in range(4):
            name = f"generator.layers.{place}"
            normalised(f"{name}.bn_{part}.scale", sides[part], condition)
            normalised(f"{name}.bn_{part}.offset", sides[part], condition)
            statistics(f"{name}.bn_{part}", sides[part])
            kernel = 3 if part in (1, 2) else 1
            normalised(f"{name}.conv_{part}", sides[part + 1], sides[part], kernel, kernel, bias=True)
        place += 1
    statistics("generator.bn", width)
    shapes.update({"generator.bn.weight": (width,), "generator.bn.bias": (width,)})
    normalised("generator.conv_to_rgb", width, width, 3, 3, bias=True)
    return shapes


@pytest.mark.parametrize("side", [128, 256, 512])
def test_the_published_layouts_load(side):
    config = published_config(side, BLOCKS[side])
    with torch.device("meta"):
        model = BigGAN(parse_config(config))
        state = {name: torch.empty(shape) for name, shape in published_shapes(config).items()}
    learnt = sum(
        math.prod(shape) for name, shape in published_shapes(config).items() if not re.search(r"_[uv]$|running_", name)
    )
    assert learnt / 1e6 == pytest.approx(PARAMETERS[side], abs=0.05)
    model.load_state_dict(folded(state), assign=True)  # strict: no name too many or too few, all shapes equal
    rows = 1 + len(config["layers"])
    pictures = model(torch.empty(2, rows, 128, device="meta"), torch.empty(2, rows, 1000, device="meta"), 0.4)
    assert pictures.shape == (2, 3, side, side)


TINY = published_config(
    16,
    "0-16-16 1-16-8 1-8-1",
    z_dim=6,
    class_embed_dim=6,
    channel_width=4,
    num_classes=5,
    n_stats=11,
    attention_layer_position=2,
)


@pytest.fixture(scope="module")
def state():
    """Random tensors of the tiny config, with the vectors that iterations of the power method would have left."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in published_shapes(TINY).items()}
    for name in list(state):
        if name.endswith(".weight_orig"):
            left, _, right = torch.linalg.svd(state[name].flatten(1), full_matrices=False)
            state[name.replace("_orig", "_u")], state[name.replace("_orig", "_v")] = left[:, 0], right[0]
        if name.endswith("running_vars"):
            state[name] = state[name].abs() + 0.5
    return state


def restated(state, condition, truncation):
    """The published generator's forward pass, straight from its tensors."""

    def normalised(name):
        matrix = state[f"{name}.weight_orig"]
        return matrix / torch.linalg.matrix_norm(matrix.flatten(1), ord=2)

    def norm(name, maps, scale, offset):
        place = round(truncation * 10)  # eleven statistics: 0, 0.1, ... 1
        mean, variance = state[f"{name}.running_means"][place], state[f"{name}.running_vars"][place]
        return torch.relu((maps - mean[:, None, None]) / (variance[:, None, None] + 1e-4).sqrt() * scale + offset)

    def conditional(name, maps):
        scale = 1 + linear(condition, normalised(f"{name}.scale"))[:, :, None, None]
        return norm(name, maps, scale, linear(condition, normalised(f"{name}.offset"))[:, :, None, None])

    def attend(name, maps):
        b, c, h, w = maps.shape
        theta, phi, g = (conv2d(maps, normalised(f"{name}.snconv1x1_{part}")) for part in ("theta", "phi", "g"))
        scores = torch.einsum("bcij,bckl->bijkl", theta, max_pool2d(phi, 2)).reshape(b, h, w, -1).softmax(dim=-1)
        seen = torch.einsum("bijp,bcp->bcij", scores, max_pool2d(g, 2).reshape(b, c // 2, -1))
        return maps + state[f"{name}.gamma"] * conv2d(seen, normalised(f"{name}.snconv1x1_o_conv"))

    maps = linear(condition, normalised("generator.gen_z"), state["generator.gen_z.bias"])
    maps = maps.view(-1, 4, 4, 64).permute(0, 3, 1, 2)
    for place, block in enumerate(("0-64-64", "1-64-32", None, "1-32-4")):
        name = f"generator.layers.{place}"
        if block is None:
            maps = attend(name, maps)
            continue
        doubles, _, after = map(int, block.split("-"))
        inner = maps
        for part, padding in enumerate((0, 1, 1, 0)):
            inner = conditional(f"{name}.bn_{part}", inner)
            if doubles and part == 1:
                inner = interpolate(inner, scale_factor=2)
            conv = f"{name}.conv_{part}"
            inner = conv2d(inner, normalised(conv), state[f"{conv}.bias"], padding=padding)
        around = maps[:, :after]
        maps = inner + (interpolate(around, scale_factor=2) if doubles else around)
    weight, bias = (state[f"generator.bn.{part}"][:, None, None] for part in ("weight", "bias"))
    rgb = "generator.conv_to_rgb"
    maps = conv2d(norm("generator.bn", maps, weight, bias), normalised(rgb), state[f"{rgb}.bias"], padding=1)
    return maps[:, :3].tanh()


def loaded(state):
    model = BigGAN(parse_config(TINY))
    model.load_state_dict(folded(state))
    return model.eval()


def test_a_picture_is_that_of_the_published_network(state):
    noise, classes = torch.randn(2, 6), torch.eye(5)[[3, 1]]
    condition = torch.cat([noise, classes @ state["embeddings.weight"].T], dim=1)
    with torch.no_grad():
        pictures = loaded(state)(noise[:, None].expand(2, 4, 6), classes[:, None].expand(2, 4, 5), truncation=0.3)
    assert pictures.shape == (2, 3, 16, 16)
    assert pictures.std() > 0.1
    torch.testing.assert_close(pictures, restated(state, condition, 0.3), rtol=1e-4, atol=1e-5)


def test_statistics_between_two_truncations_lie_in_between(state):
    norm = loaded(state).generator.bn
    maps = torch.zeros(1, 4, 1, 1)
    means, variances = norm.running_means, norm.running_vars
    for truncation, mean, variance in (
        (0.5, means[5], variances[5]),
        (0.525, 0.75 * means[5] + 0.25 * means[6], 0.75 * variances[5] + 0.25 * variances[6]),
        (1.0, means[10], variances[10]),
    ):
        expected = -mean / (variance + 1e-4).sqrt()
        torch.testing.assert_close(norm.standardise(maps, truncation)[0, :, 0, 0], expected)


def test_each_layer_has_a_latent_of_its_own(state):
    model = loaded(state)
    noise, classes = torch.randn(1, 4, 6), torch.full((1, 4, 5), 0.2)
    with torch.no_grad():
        before = model(noise, classes, 1.0)
        for layer in range(4):
            other = noise.clone()
            other[0, layer] += 1
            assert not torch.equal(model(other, classes, 1.0), before)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_folder_loads_and_is_painted_on(state, form, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    if form == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    canvas = biggan_canvas(tmp_path, torch.device("cpu"), truncation=0.5)
    latents = canvas.start(2, 16, seed=3)
    assert [latent.shape for latent in latents] == [(2, 4, 6), (2, 4, 5)]
    assert all(torch.equal(one, other) for one, other in zip(latents, canvas.start(2, 16, seed=3), strict=True))
    assert not torch.equal(latents[0], canvas.start(2, 16, seed=4)[0])
    assert latents[0].abs().max() <= 2
    pictures = canvas.paint([latent.requires_grad_() for latent in latents])
    assert pictures.shape == (2, 3, 16, 16)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    pictures.square().sum().backward()
    assert all(latent.grad.abs().sum() > 0 for latent in latents)


def test_truncation_scales_the_noise_and_picks_the_statistics(state):
    model = loaded(state)
    noise, logits = torch.randn(1, 4, 6), torch.randn(1, 4, 5)
    with torch.no_grad():
        expected = model(0.5 * noise, logits.softmax(-1), 0.5) / 2 + 0.5
        assert torch.equal(BigGANCanvas(model, truncation=0.5).paint([noise, logits]), expected)


def test_settling_keeps_noise_near(state):
    canvas = BigGANCanvas(loaded(state))
    latents = [torch.tensor([[[-5.0, 0.5, 3.0, 1, 1, 1]]]), torch.full((1, 1, 5), 9.0)]
    canvas.settle(latents)
    assert latents[0].flatten().tolist() == [-2.0, 0.5, 2.0, 1, 1, 1]
    assert latents[1].flatten().tolist() == [9.0] * 5


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "pytorch_model.bin").unlink(), "No such file"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"nothing"), "."),
        (lambda folder: torch.save(nn.Linear(2, 2), folder / "pytorch_model.bin"), "."),  # code, which is not run
        (lambda folder: torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin"), "."),
        (lambda folder: (folder / "config.json").write_text('{"layers": []}'), "output_dim"),
    ],
)
def test_what_is_no_biggan_is_refused_in_one_sentence(state, damage, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    torch.save(state, tmp_path / "pytorch_model.bin")
    damage(tmp_path)
    with pytest.raises(ClipmatchError, match=f"holds no BigGAN-deep that can be read.*{reason}.*copy it again"):
        load_biggan(tmp_path)


def test_another_size_and_a_first_picture_are_refused(state):
    canvas = BigGANCanvas(loaded(state))
    with pytest.raises(ClipmatchError, match="paints pictures of 16 pixels"):
        canvas.start(1, 64, 0)
    with pytest.raises(ClipmatchError, match="can't begin with a picture"):
        canvas.from_picture(None, 1, 16, 1.0)
