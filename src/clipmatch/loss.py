"""The contrastive loss: a pure function of embeddings, small enough to check by hand.

In: unit vectors of both kinds, row i of one belonging to row i of the other. Out: a scalar.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy over the batch's pairs (Radford et al. 2021) -> scalar, in nats.

    images, texts: [b, d] unit vectors. excluded: bool [b, b], false on the diagonal; where true, text j fits image i
    though it is not its own: no negative of it, so it drops out of the softmax.
    """
    logits = masked(logit_scale * images @ texts.T, excluded)  # [b images, b texts]
    target = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


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
