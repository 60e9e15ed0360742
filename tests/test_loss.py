"""The contrastive loss, against numbers that can be worked out by hand."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from clipmatch.loss import contrastive_loss, distillation_loss, hinge_loss, siblings, sigmoid_loss

ONE = torch.tensor(1.0)


def test_two_pairs_by_hand():
    # Cosines are the identity: each row's softmax is e / (e + 1), both ways.
    loss = contrastive_loss(torch.eye(2), torch.eye(2), ONE)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)


def test_both_directions_count():
    # Image 0 fits both texts; image 1 fits none. By rows ln 2 twice; by columns text 0 and 1 are (1, 0) and (1, 0).
    images, texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    rows = math.log(2)
    columns = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
    assert contrastive_loss(images, texts, ONE).item() == pytest.approx((rows + columns) / 2, abs=1e-6)


def test_chance_is_the_logarithm_of_the_batch_size():
    same = torch.ones(8, 4) / 2
    assert contrastive_loss(same, same, torch.tensor(30.0)).item() == pytest.approx(math.log(8), abs=1e-5)


def test_captions_of_the_same_image_do_not_push_each_other_away():
    # Pictures 0 and 1 are one and the same: with ids only picture 2 is a negative of 0 and 1.
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss = contrastive_loss(images, images, ONE, siblings(torch.tensor([7, 7, 9])))
    of_two, of_three = math.log(1 + math.exp(-1)), math.log(1 + 2 * math.exp(-1))
    assert loss.item() == pytest.approx((2 * of_two + of_three) / 3, abs=1e-6)
    assert contrastive_loss(images, images, ONE).item() > loss.item() + 0.2


def test_siblings_get_no_gradient_from_each_other():
    torch.manual_seed(0)
    images, texts = normalize(torch.randn(3, 4), dim=1), normalize(torch.randn(3, 4), dim=1)
    texts.requires_grad_()
    contrastive_loss(images[:2], texts[:2], ONE, siblings(torch.tensor([5, 5]))).backward()
    assert torch.equal(texts.grad, torch.zeros(3, 4))  # each has no negative left: the loss is 0, and finite


def test_different_ids_change_nothing():
    torch.manual_seed(0)
    images, texts = normalize(torch.randn(5, 4), dim=1), normalize(torch.randn(5, 4), dim=1)
    scale = torch.tensor(10.0)
    assert torch.equal(
        contrastive_loss(images, texts, scale, siblings(torch.arange(5))), contrastive_loss(images, texts, scale)
    )  # fmt: skip


def test_gradients_reach_images_texts_and_scale():
    torch.manual_seed(0)
    images, texts = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    contrastive_loss(normalize(images, dim=1), normalize(texts, dim=1), scale).backward()
    assert all(part.grad.abs().sum() > 0 for part in (images, texts, scale))


def test_a_teacher_by_hand():
    # The student is indifferent (all cosines 0); the teacher gives the pairs logit 1 and all else 0: whatever it
    # says, the cross-entropy against two equal chances is ln 2.
    images, texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert distillation_loss(images, texts, ONE, torch.eye(2)).item() == pytest.approx(math.log(2), abs=1e-6)
    # A student that says the same as the teacher is left with the entropy of e / (e + 1) and 1 / (e + 1).
    p = math.e / (math.e + 1)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert distillation_loss(torch.eye(2), torch.eye(2), ONE, torch.eye(2)).item() == pytest.approx(entropy, abs=1e-6)


def test_a_student_that_agrees_with_its_teacher_learns_nothing_from_it():
    torch.manual_seed(0)
    images, texts = torch.randn(4, 3), normalize(torch.randn(4, 3), dim=1)
    images.requires_grad_()
    rows, scale = normalize(images, dim=1), torch.tensor(5.0, requires_grad=True)
    distillation_loss(rows, texts, scale, 5 * (rows @ texts.T).detach()).backward()
    assert images.grad.abs().max() < 1e-6
    other = normalize(torch.randn(4, 3), dim=1)
    distillation_loss(normalize(images, dim=1), texts, scale, 5 * other @ texts.T).backward()
    assert images.grad.abs().max() > 1e-3


def test_a_teacher_says_nothing_about_siblings():
    same = siblings(torch.tensor([5, 5, 6]))
    teaching, other = torch.eye(3), torch.eye(3)
    other[0, 1] = other[1, 0] = 0.9
    images = normalize(torch.tensor([[1.0, 0.2], [0.3, 1.0], [0.5, 0.5]]), dim=1)
    loss = distillation_loss(images, images, ONE, teaching, same)
    assert loss.isfinite()
    assert loss == distillation_loss(images, images, ONE, other, same)
    assert loss != distillation_loss(images, images, ONE, other)


# Sigmoid


def test_two_pairs_by_hand_with_the_sigmoid():
    # Logits are 1 for a pair and 0 elsewhere: a pair costs ln(1 + 1/e), "no" to an even chance ln 2; each twice.
    loss = sigmoid_loss(torch.eye(2), torch.eye(2), ONE, torch.tensor(0.0))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)) + math.log(2), abs=1e-6)
    # A bias of -1 makes it 0 for a pair and -1 elsewhere: the other way round, and the same in all.
    assert sigmoid_loss(torch.eye(2), torch.eye(2), ONE, -ONE).item() == pytest.approx(loss.item(), abs=1e-6)


def drawn(count, *ids):
    """Unit vectors [count, 4] of both kinds, and which of them are siblings."""
    torch.manual_seed(0)
    images, texts = normalize(torch.randn(count, 4), dim=1), normalize(torch.randn(count, 4), dim=1)
    return images, texts, siblings(torch.tensor(ids))


def test_the_sigmoid_against_the_obvious_version():
    images, texts, excluded = drawn(5, 1, 2, 1, 3, 3)
    total = 0.0
    for i in range(5):
        for j in range(5):
            if i == j or not excluded[i, j]:
                logit = 8.0 * float(images[i] @ texts[j]) - 3.0
                total += math.log(1 + math.exp(-logit if i == j else logit))
    assert int(excluded.sum()) == 4  # two pairs of siblings, both ways
    loss = sigmoid_loss(images, texts, torch.tensor(8.0), torch.tensor(-3.0), excluded)
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)


def test_the_sigmoid_stays_finite_and_moves_scale_and_bias():
    images, texts, excluded = drawn(3, 1, 1, 2)
    scale, bias = torch.tensor(100.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    loss = sigmoid_loss(images, texts, scale, bias, excluded)
    loss.backward()
    assert loss.isfinite()
    assert scale.grad.abs() > 0
    assert bias.grad.abs() > 0


# Hinge


def test_three_pairs_by_hand_with_the_hinge():
    # Text 1 lies at cosines 0.8 and 0.6 to images 0 and 1; the other texts are their images.
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    # Image 0: hardest 0.8, own 1, short by 0. Image 1: hardest 0, own 0.6: 0. Image 2: 0.
    # Text 0: hardest 0, own 1: 0. Text 1: hardest 0.8, own 0.6: short by 0.4. Text 2: 0.
    assert hinge_loss(images, texts).item() == pytest.approx(0.4 / 3, abs=1e-6)
    # With a margin of 0.5 image 0 is short by 0.3 and text 1 by 0.7.
    assert hinge_loss(images, texts, margin=0.5).item() == pytest.approx(1.0 / 3, abs=1e-6)


def test_the_hinge_against_the_obvious_version():
    images, texts, excluded = drawn(6, 1, 2, 1, 3, 3, 4)
    total = 0.0
    for i in range(6):
        allowed = [j for j in range(6) if j != i and not excluded[i, j]]
        own = float(images[i] @ texts[i])
        total += max(0.0, 0.2 - own + max(float(images[i] @ texts[j]) for j in allowed))
        total += max(0.0, 0.2 - own + max(float(images[j] @ texts[i]) for j in allowed))
    assert hinge_loss(images, texts, excluded).item() == pytest.approx(total / 6, rel=1e-5)
    assert hinge_loss(images, texts).item() >= total / 6


def test_a_sibling_is_no_hard_negative():
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    loss = hinge_loss(images, images.detach(), siblings(torch.tensor([5, 5])))
    loss.backward()
    assert loss.item() == 0.0  # neither has a negative left
    assert torch.equal(images.grad, torch.zeros(2, 2))
    assert hinge_loss(images, images.detach()).item() == pytest.approx(0.4)


def test_only_the_hardest_negative_is_pushed_away():
    images = torch.tensor([[1.0, 0.0]] * 3)
    texts = torch.tensor([[0.5, 0.0], [0.9, 0.0], [0.8, 0.0]], requires_grad=True)
    hinge_loss(images, texts, margin=0.0).backward()
    # Images 0 and 2 are too near to text 1, and so is no text to another image: it alone is pushed, twice.
    assert texts.grad[:, 0].tolist() == pytest.approx([-1 / 3, 2 / 3, -1 / 3])
