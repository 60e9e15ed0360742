"""Canvases and the guided loop: what is painted, what is kept, and that seeds fix everything."""

import pytest
import torch
from PIL import Image

from clipmatch.embedder import TorchEmbedder
from clipmatch.errors import ClipmatchError
from clipmatch.generation.canvas import VQCanvas, as_pixels
from clipmatch.generation.guide import Guide, Targets
from clipmatch.generation.optimise import GuidanceConfig, falling_rate, optimise, start
from clipmatch.generation.vqgan import load_vqgan


@pytest.fixture(scope="module")
def vqgan(vqgan):
    """The model in the tiny VQGAN's folder."""
    return load_vqgan(vqgan)


@pytest.fixture
def canvas(vqgan):
    return VQCanvas(vqgan, "weights")


@pytest.fixture
def guide(tiny):
    return Guide(TorchEmbedder(tiny, "cpu"))


@pytest.fixture
def targets(canvas, guide):
    """What the guide sees in a picture that the canvas can paint."""
    with torch.no_grad():
        return Targets(guide.encode(canvas.paint(canvas.start(1, 16, seed=99))), torch.ones(1))


def test_tokens_are_painted_as_the_decoder_paints_their_codes(canvas, vqgan):
    tokens = torch.randint(32, (2, 64), generator=torch.Generator().manual_seed(0))
    latents = canvas.from_tokens(tokens)
    assert torch.equal(latents[0][1, :, 0, 3], vqgan.quantize.embedding.weight[tokens[1, 3]])
    with torch.no_grad():
        expected = vqgan.decode(latents[0], force_not_quantize=True).sample / 2 + 0.5
        pictures = canvas.paint(latents)
    assert pictures.shape == (2, 3, 16, 16)
    torch.testing.assert_close(pictures, expected.clamp(0, 1))


def test_the_nearest_code_is_painted_and_the_gradient_passes(canvas):
    latents = canvas.start(1, 16, seed=0)
    nearby = [(latents[0] + 1e-3 * torch.randn(latents[0].shape)).requires_grad_()]
    painted = canvas.paint(nearby)
    with torch.no_grad():
        torch.testing.assert_close(painted, canvas.paint(latents), rtol=1e-4, atol=1e-5)
    painted.sum().backward()
    assert nearby[0].grad.abs().sum() > 0


def test_latents_stay_in_the_range_of_the_codebook(canvas, vqgan):
    low, high = vqgan.quantize.embedding.weight.aminmax(dim=0)
    latents = canvas.start(1, 16, seed=0)
    latents[0] *= 100
    canvas.settle(latents)
    assert torch.equal(latents[0].amax(dim=(0, 2, 3)), high)
    assert torch.equal(latents[0].amin(dim=(0, 2, 3)), low)


def test_strength_bounds_how_far_a_picture_is_left(canvas, vqgan):
    image = Image.effect_noise((40, 20), 80).convert("RGB")
    low, high = vqgan.quantize.embedding.weight.aminmax(dim=0)
    for strength in (0.0, 0.25, 1.0):
        latents = canvas.from_picture(image, 2, 16, strength)
        first = latents[0].clone()
        assert first.shape == (2, 4, 8, 8)
        assert torch.equal(first[0], first[1])
        latents[0] += 1000
        canvas.settle(latents)
        expected = torch.minimum(first + strength * (high - low)[:, None, None], high[:, None, None])
        torch.testing.assert_close(latents[0], expected)


def test_the_middle_of_a_picture_is_taken():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    pixels = as_pixels(image, 8)[0]
    assert pixels.shape == (3, 8, 8)
    assert pixels[:, 4, 4].tolist() == [0, 0, 1]
    assert pixels[0].max() < 0.1  # at the edge a little of the red beyond


def test_sizes_between_codes_are_refused(canvas):
    for begin in (lambda: canvas.start(1, 15, 0), lambda: canvas.from_picture(Image.new("RGB", (9, 9)), 1, 15, 1)):
        with pytest.raises(ClipmatchError, match="multiple of 2 pixels; give --size 16"):
            begin()
    assert canvas.start(1, 32, 0)[0].shape == (1, 4, 16, 16)


def test_guidance_finds_what_is_asked_for(canvas, guide, targets):
    latents = canvas.start(2, 16, seed=1)
    before = guide.score(canvas.paint(latents), targets)
    done = optimise(canvas, guide, targets, latents, GuidanceConfig(steps=60, views=4))
    assert (1 - done.scores < 0.85 * (1 - before)).all()
    assert not done.stopped
    assert done.pictures.shape == (2, 3, 16, 16)
    assert torch.equal(guide.score(done.pictures, targets), done.scores)


def test_a_seed_fixes_every_bit_whatever_else_is_painted(canvas, guide, targets):
    def painted(n, seed):
        latents = start(canvas, guide, targets, n, 16, seed)
        return optimise(canvas, guide, targets, latents, GuidanceConfig(steps=12, seed=seed, views=4)).pictures

    three = painted(3, 5)
    assert torch.equal(three, painted(3, 5))
    assert torch.equal(three[2:], painted(1, 7))
    assert not torch.equal(three[0], three[1])


def test_it_can_be_watched_and_stopped(canvas, guide, targets):
    seen = []
    latents = canvas.start(1, 16, seed=0)
    done = optimise(
        canvas, guide, targets, latents, GuidanceConfig(steps=50, views=2), seen.append, lambda: len(seen) == 14
    )
    assert [one.step for one in seen] == list(range(15))
    assert done.stopped
    assert done.steps == 14
    assert torch.equal(seen[0].pictures, canvas.paint(latents))
    assert torch.equal(done.pictures, seen[-1].best)
    assert not torch.equal(seen[13].pictures, seen[14].pictures)


class Memo:
    """A canvas whose latent is the picture."""

    rates = (1.0,)
    tries = 4

    def start(self, n, size, seed):
        return [torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))]

    def paint(self, latents):
        return latents[0] + 0

    def settle(self, latents):
        pass


class Script:
    """A guide whose scores are written down; it wants brighter pictures."""

    device = torch.device("cpu")

    def __init__(self, *scores):
        self.scores = iter(scores)

    def loss(self, pictures, *_):
        return -pictures.sum()

    def score(self, pictures, targets, count=16):
        return torch.tensor(next(self.scores))


def test_the_best_of_each_picture_is_kept():
    """Judged at the start, after ten steps and at the end: the first is best in the middle, the second at the start."""
    latents, shown = Memo().start(2, 4, seed=0), {}
    guide = Script([0.1, 0.9], [0.7, 0.2], [0.3, 0.8])

    def on_step(progress):
        shown[progress.step] = progress.pictures

    done = optimise(Memo(), guide, None, latents, GuidanceConfig(steps=15), on_step)
    assert done.scores.tolist() == pytest.approx([0.7, 0.9])
    assert torch.equal(done.pictures[0], shown[10][0])
    assert torch.equal(done.pictures[1], latents[0][1])


def test_without_steps_the_start_is_the_painting():
    latents = Memo().start(1, 4, seed=0)
    done = optimise(Memo(), Script([0.4]), None, latents, GuidanceConfig(steps=0))
    assert torch.equal(done.pictures, latents[0])
    assert (done.steps, done.stopped) == (0, False)


def test_the_start_is_the_most_promising_try():
    tries = Memo().start(4, 4, seed=3)[0]
    guide = Script([0.1], [0.2], [0.6], [0.3])
    assert torch.equal(start(Memo(), guide, None, 1, 4, seed=3)[0][0], tries[2])


def test_steps_shrink():
    assert [falling_rate(share) for share in (0, 0.5, 1)] == pytest.approx([1, 0.55, 0.1])
