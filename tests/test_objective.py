"""From a batch to gradients: in chunks as in one piece, with every loss and whatever is learnt beside the pairs."""

import numpy as np
import pytest
import torch

from clipmatch.concepts import Concepts
from clipmatch.config import TrainConfig
from clipmatch.data import load_captions
from clipmatch.errors import ClipmatchError
from clipmatch.modelfolder import LOGIT_BIAS
from clipmatch.objective import Objective
from clipmatch.ranks import Ranks
from clipmatch.runtime import Precision
from clipmatch.sources import Batch, LiveImages, LiveTexts, PairDataset, mix_pairs
from clipmatch.teachers import Teachers

EXACT = Precision(None, "")


@pytest.fixture
def pairs(scenes, tiny):
    """Pictures and captions of scenes, read as they are asked for."""
    rows = load_captions(scenes).rows[:20]
    images = LiveImages([row.path for row in rows], tiny.transform, augment=False, flip=False, seed=0)
    texts = LiveTexts([caption for row in rows for caption in row.captions], tiny.tokenizer, max_length=40)
    return PairDataset(images, texts, np.cumsum([0, *(len(row.captions) for row in rows)]), seed=0)


@pytest.fixture
def batch(pairs):
    """Ten pairs, two of them of one picture."""
    return pairs.__getitems__([(0, item) for item in (0, 1, 2, 3, 4, 5, 6, 7, 8, 3)])


def objective(tiny, pairs, precision=EXACT, teachers=None, **settings):
    settings = TrainConfig(out="unused", tune_image="all", tune_text="all", **settings)
    return Objective(tiny, pairs, settings, 0, precision, torch.device("cpu"), teachers, Ranks())


def gradients(asked, *batches):
    """What `backward` of these batches leaves at the weights and at the bias, by name."""
    named = dict(asked.model.named_parameters())
    if asked.logit_bias is not None:
        named["logit_bias"] = asked.logit_bias
    for value in named.values():
        value.grad = None
    torch.manual_seed(5)
    losses = [asked.backward(batch, 3, len(batches)) for batch in batches]
    return losses, {name: value.grad for name, value in named.items() if value.grad is not None}


def agree(found, expected, **tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance.get("rtol", 1e-5))
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        near = 1e-6 * max(1.0, 10 * float(value.abs().max()))  # float32, summed in another order
        torch.testing.assert_close(found[1][name], value, **{"rtol": 1e-4, "atol": near, **tolerance}, msg=name)


def some_teachers():
    rng = torch.Generator().manual_seed(0)
    return Teachers(torch.randn(20, 4, generator=rng).half(), torch.randn(100, 4, generator=rng).half(), ("somebody",))


@pytest.mark.parametrize("chunk", [1, 4, 9])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "hinge"])
def test_chunks_give_the_gradients_of_the_whole_batch(tiny, pairs, batch, loss, chunk):
    whole = gradients(objective(tiny, pairs, loss=loss), batch)
    agree(gradients(objective(tiny, pairs, loss=loss, chunk=chunk), batch), whole)
    assert ("log_logit_scale" in whole[1]) == (loss != "hinge")
    assert ("logit_bias" in whole[1]) == (loss == "sigmoid")
    assert all(value.abs().sum() > 0 for name, value in whole[1].items() if ".fc." in name or "logit" in name)


def test_a_chunk_s_own_pairs_are_not_all_that_its_loss_sees(tiny, pairs, batch):
    """What it would be if chunks were small batches: another loss, and other gradients."""
    images, texts = batch.split(5)[0]
    first = Batch(images, texts, batch.image_ids[:5], batch.text_ids[:5], [])
    (whole,), _ = gradients(objective(tiny, pairs, chunk=5), batch)
    (half,), _ = gradients(objective(tiny, pairs, chunk=5), first)
    assert whole > half + 0.3  # chance is ln 10 and ln 5


def test_chunks_with_concepts_teachers_and_accumulation(tiny, pairs, batch, tmp_path):
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(3, 32)).astype(np.float32)
    names = [["moon"], ["star"], ["fish"]]
    Concepts(np.zeros(32, np.float32), directions, names, [[], [], []]).save(tmp_path / "concepts.safetensors")
    others = {"concepts": str(tmp_path / "concepts.safetensors"), "teachers": some_teachers()}
    other = pairs.__getitems__([(1, item) for item in range(10, 18)])
    whole = gradients(objective(tiny, pairs, **others), batch, other)
    agree(gradients(objective(tiny, pairs, chunk=3, **others), batch, other), whole)
    plain = gradients(objective(tiny, pairs), batch, other)
    assert plain[0] != whole[0]


def test_a_batch_no_larger_than_a_chunk_is_not_split(tiny, pairs, batch, monkeypatch):
    whole = gradients(objective(tiny, pairs), batch)
    asked = objective(tiny, pairs, chunk=10)
    monkeypatch.setattr(asked, "backward_in_chunks", lambda *_: pytest.fail("it was split"))
    agree(gradients(asked, batch), whole)


@pytest.mark.parametrize("loss", ["softmax", "hinge"])
def test_chunks_draw_the_same_dropout_both_times(tiny, pairs, batch, loss):
    """The reference keeps the graphs of all chunks, each with the dropout of its seed, and goes back once."""
    tiny.model.train()
    asked = objective(tiny, pairs, loss=loss, chunk=4)
    found = gradients(asked, batch)
    torch.manual_seed(5)
    chunks = batch.split(4)
    seeds = torch.randint(1 << 62, (len(chunks) + 1,)).tolist()
    parts = [asked.embed_chunk(*chunk, seed) for chunk, seed in zip(chunks, seeds, strict=False)]
    for value in asked.model.parameters():
        value.grad = None
    loss_of_all = asked.loss_of(batch, *(torch.cat(rows) for rows in zip(*parts, strict=True)), 3)
    loss_of_all.backward()
    expected = {name: value.grad for name, value in asked.model.named_parameters() if value.grad is not None}
    agree(found, ([loss_of_all.item()], expected))
    again = gradients(asked, batch)
    agree(again, found, rtol=0, atol=0)  # the same seed, the same step
    tiny.model.eval()
    without = gradients(asked, batch)[1]
    name = "image_encoder.fc.weight"
    assert (without[name] - found[1][name]).norm() > 0.05 * found[1][name].norm()  # there was dropout


def test_dropout_differs_from_chunk_to_chunk(tiny, pairs, batch):
    tiny.model.train()
    asked = objective(tiny, pairs, chunk=5)
    seen = []
    asked.loss_of = lambda batch, features, images, texts, step: seen.append(images) or (images.sum() + texts.sum())
    images, texts = batch.split(5)[0]
    twice = Batch(
        torch.cat([images, images]),
        tuple(torch.cat([text, text]) for text in texts),
        batch.image_ids,
        batch.text_ids,
        [],
    )
    gradients(asked, twice)
    assert not torch.allclose(seen[0][:5], seen[0][5:], atol=1e-3)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_chunks_in_half_precision(tiny, pairs, batch, kind):
    """Float16 scales the loss, and its gradients with it, in both passes alike."""
    half = Precision(kind, "")
    whole = gradients(objective(tiny, pairs, half), batch)
    chunked = gradients(objective(tiny, pairs, half, chunk=4), batch)
    assert whole[0] == pytest.approx(chunked[0], rel=0.01)
    exact = gradients(objective(tiny, pairs), batch)[1]
    scale = objective(tiny, pairs, half).scaler.get_scale()
    assert scale == (1.0 if kind == torch.bfloat16 else 65536.0)
    for name in ("image_encoder.fc.weight", "text_encoder.backbone.embeddings.word_embeddings.weight"):
        error = (chunked[1][name] / scale - exact[name]).norm() / exact[name].norm()
        assert error < 0.1, name
        assert (chunked[1][name] - whole[1][name]).norm() < 0.05 * whole[1][name].norm(), name


# The sigmoid's bias


def test_the_sigmoid_begins_as_in_the_paper_and_goes_on_where_it_was(tiny, pairs):
    first = objective(tiny, pairs, loss="sigmoid")
    assert first.logit_bias.item() == -10
    assert tiny.model.logit_scale.item() == pytest.approx(10)
    with torch.no_grad():
        tiny.model.log_logit_scale.fill_(1.0)
    tiny.about[LOGIT_BIAS] = -12.5
    assert objective(tiny, pairs, loss="sigmoid").logit_bias.item() == -12.5
    assert tiny.model.log_logit_scale.item() == 1.0
    assert objective(tiny, pairs, loss="softmax").logit_bias is None


# Mixed pairs


def cached(count):
    """A batch of features by which a pair is known: 1 at its own number; the caption's 10 times that."""
    ids = torch.arange(count)
    return Batch(torch.eye(count), (10 * torch.eye(count),), ids, ids, [])


def test_pairs_are_mixed_by_one_share_in_picture_and_caption():
    torch.manual_seed(0)
    mixed = mix_pairs(cached(50), 0.2)
    torch.testing.assert_close(mixed.texts[0], 10 * mixed.images)
    torch.testing.assert_close(mixed.images.sum(dim=1), torch.ones(50))
    assert (mixed.images > 0).sum(dim=1).max() == 2
    own = mixed.images.diagonal()
    assert own.min() >= 0.5  # each is still the pair that its number says
    assert 5 < (own < 0.9).sum() < 40  # some clearly mixed, others hardly
    torch.manual_seed(0)
    assert (mix_pairs(cached(50), 5.0).images.diagonal() < 0.9).sum() > 40  # a large parameter: nearly all
    assert torch.equal(mixed.image_ids, torch.arange(50))


def test_the_loss_is_that_of_the_mixed_pairs(tiny, pairs, batch):
    settings = TrainConfig(out="unused", mixup=0.4)
    asked = Objective(tiny, pairs, settings, 0, EXACT, torch.device("cpu"), None, Ranks())
    seen = []
    asked.embed = lambda images, texts: (
        seen.append((images, texts)) or (images, *(torch.ones(6, 4, requires_grad=True),) * 2)
    )
    torch.manual_seed(1)
    asked.backward(cached(6), 0)
    torch.manual_seed(1)
    mixed = mix_pairs(cached(6), 0.4)
    assert torch.equal(seen[0][0], mixed.images)
    assert torch.equal(seen[0][1][0], mixed.texts[0])


def test_pictures_made_worse_raise_the_loss_and_look_the_same(tiny, pairs, batch):
    tiny.model.eval()  # without dropout, which would change the loss by itself
    asked = objective(tiny, pairs, adversarial=7.0)
    torch.manual_seed(0)
    worse = asked.made_worse(batch, 7.0)
    change = worse - batch.images
    sizes = change.square().mean(dim=(1, 2, 3)).sqrt()
    assert sizes.max() <= 7.001
    assert sizes.min() > 3  # a step of 7 from a start within 7
    noise = torch.randn(change.shape)
    noisy = batch.images + 7 * noise / noise.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()

    def loss(images):
        with torch.no_grad():
            return asked.loss_of(batch, *asked.embed(images, batch.texts), 0).item()

    plain = loss(batch.images)
    assert loss(worse) - plain > 5 * abs(loss(noisy) - plain)
    seen = []
    asked.embed = lambda images, texts: seen.append(images) or Objective.embed(asked, images, texts)
    torch.manual_seed(0)
    asked.backward(batch, 0)
    assert torch.equal(seen[-1], worse)  # what is learnt
    assert all(value.grad.isfinite().all() for value in tiny.model.parameters() if value.grad is not None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tune_image": "none"}, "adversarial needs tune_image all"),
        ({"tune_image": "all", "chunk": 8}, "leave out chunk"),
        ({"tune_image": "all", "adversarial": 300.0}, "in 0..255"),
    ],
)
def test_where_pictures_can_not_be_made_worse(settings, said):
    with pytest.raises(ClipmatchError, match=said):
        TrainConfig(out="unused", **{"adversarial": 7.0, **settings})
