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
    logits = logit_scale * images @ texts.T  # [b images, b texts]
    if excluded is not None:
        logits = logits.masked_fill(excluded, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def siblings(image_ids: Tensor) -> Tensor:
    """Numbers of the images of a batch's pairs [b] -> bool [b, b]: true between different pairs of one image.

    Their captions are no negatives of each other: without this, a caption is pushed away from its own picture.
    """
    same = image_ids[:, None] == image_ids[None, :]
    return same.fill_diagonal_(False)
