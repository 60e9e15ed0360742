"""Contrastive losses: pure functions of embeddings, small enough to check by hand.

In: unit vectors of both kinds, row i of one belonging to row i of the other. Out: a scalar.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

MARGIN = 0.2  # of cosines, VSE++'s


def contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy over the batch's pairs (Radford et al. 2021) -> scalar, in nats.

    images, texts: [b, d] unit vectors. excluded: bool [b, b], false on the diagonal; where true, text j fits image i
    though it is not its own: no negative of it, so it drops out of the softmax.
    """
    logits = masked(logit_scale * images @ texts.T, excluded)  # [b images, b texts]
    target = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def sigmoid_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, excluded: Tensor | None = None
) -> Tensor:
    """For each image and each text of the batch: do they belong together? (SigLIP, Zhai et al. 2023) -> scalar.

    The cross-entropy, in nats, summed over all [b, b] answers and divided by b. images, texts, excluded: as for
    `contrastive_loss`; an excluded pair is not asked about. logit_bias: scalar, added to the logits, for nearly all
    answers are no.
    """
    logits = logit_scale * images @ texts.T + logit_bias  # [b images, b texts]
    wanted = 2 * torch.eye(len(logits), device=logits.device) - 1
    losses = -logsigmoid(wanted * logits)
    if excluded is not None:
        losses = losses.masked_fill(excluded, 0)
    return losses.sum() / len(logits)


def hinge_loss(images: Tensor, texts: Tensor, excluded: Tensor | None = None, margin: float = MARGIN) -> Tensor:
    """How far the hardest negative of each image and of each text is from being `margin` less alike than its own
    (VSE++, Faghri et al. 2018) -> scalar: the sum over both directions, divided by b.

    images, texts, excluded: as for `contrastive_loss`. Of cosines: the logit scale has no part in it.
    """
    cosines = images @ texts.T  # [b images, b texts]
    own = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    others = masked(cosines, own if excluded is None else own | excluded)
    short = [(margin + others.amax(dim=way) - cosines.diagonal()).clamp(min=0) for way in (0, 1)]
    return (short[0] + short[1]).mean()


def distillation_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor, teaching: Tensor, excluded: Tensor | None = None
) -> Tensor:
    """Symmetric cross-entropy against a teacher's softmax instead of the pairs alone (Hinton et al. 2015) -> scalar.

    images, texts, excluded: as for `contrastive_loss`. teaching [b, b]: the teacher's logits, images by texts.
    """
    logits = masked(logit_scale * images @ texts.T, excluded)
    target = masked(teaching, excluded)
    by_image = cross_entropy(logits, target.softmax(dim=1))
    return (by_image + cross_entropy(logits.T, target.T.softmax(dim=1))) / 2


def masked(logits: Tensor, excluded: Tensor | None) -> Tensor:
    """Logits [b, b], what drops out of the softmax far below the rest; finite, for 0 times infinity is no number."""
    return logits if excluded is None else logits.masked_fill(excluded, -1e4)


def siblings(image_ids: Tensor) -> Tensor:
    """Numbers of the images of a batch's pairs [b] -> bool [b, b]: true between different pairs of one image.

    Their captions are no negatives of each other: without this, a caption is pushed away from its own picture.
    """
    same = image_ids[:, None] == image_ids[None, :]
    return same.fill_diagonal_(False)
