"""Late interaction with every token pair in memory: the specification that others meet.

B pairs, P image tokens, R text tokens, D feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def late_interaction_reference(
    image_tokens: Float[Tensor, "b p d"],
    text_tokens: Float[Tensor, "b r d"],
    logit_scale: Float[Tensor, ""],
    image_mask: Bool[Tensor, "b p"] | None,
    text_mask: Bool[Tensor, "b r"] | None,
    one_way: bool,
    token_reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss and both accuracies from all B x P x B x R similarities."""
    dtype = torch.promote_types(image_tokens.dtype, torch.float32)
    images, image_valid, image_weight = _side(image_tokens.to(dtype), image_mask, token_reduction)
    texts, text_valid, text_weight = _side(text_tokens.to(dtype), text_mask, token_reduction)
    similarity = torch.einsum("ipd,jrd->ipjr", images, texts)
    best_image = _best(similarity, image_valid[:, :, None, None], dim=1)
    text_to_image = torch.einsum("jr,ijr->ij", text_weight, best_image)
    best_text = _best(similarity, text_valid[None, None], dim=3)
    image_to_text = torch.einsum("ip,ipj->ij", image_weight, best_text)
    labels = torch.arange(len(images), device=images.device)
    loss = cross_entropy(logit_scale * text_to_image.T, labels)
    if one_way:
        image_to_text = text_to_image
    else:
        loss = (cross_entropy(logit_scale * image_to_text, labels) + loss) / 2
    return loss, _accuracy(logit_scale * image_to_text), _accuracy(logit_scale * text_to_image.T)


def _side(
    tokens: Tensor, mask: Tensor | None, token_reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, zero where masked, the mask, and the weight of each token."""
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    weight = mask.to(tokens.dtype)
    if token_reduction == "mean":
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
    return tokens.masked_fill(~mask[:, :, None], 0), mask, weight


def _best(similarity: Tensor, valid: Tensor, dim: int) -> Tensor:
    """Return the maximum over the valid tokens, the first of equal ones; 0 where none is valid."""
    best = similarity.masked_fill(~valid, -torch.inf).max(dim).values
    return best.masked_fill(~valid.any(dim), 0)


def _accuracy(logits: Tensor) -> Tensor:
    """Return the share of rows whose diagonal entry is larger than every other one."""
    positive = logits.detach().diagonal()
    negatives = logits.detach().clone().fill_diagonal_(-torch.inf)
    return (positive > negatives.amax(1)).to(logits.dtype).mean()
