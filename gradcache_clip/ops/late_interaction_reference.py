"""Late interaction with every token pair in memory: the specification that others meet.

I images of P tokens, J texts of R tokens, D feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.contrast_reference import (
    biased_reference,
    masks_reference,
    side_reference,
)
from gradcache_clip.ops.pairing import Pairing, Statistics

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class DenseTokens(NamedTuple):
    """Padded tokens of one side."""

    values: Float[Tensor, "s t d"]
    found: Bool[Tensor, "s t"]
    """Which tokens may be found."""
    weight: Float[Tensor, "s t"]
    """Of a token in the mean or sum over its sample."""

    @staticmethod
    def of(
        tokens: Tensor,
        found: Tensor | None,
        counts: Tensor | None,
        token_reduction: str,
        dtype: torch.dtype,
    ) -> DenseTokens:
        """Prepare one side; without masks all tokens may be found, and count."""
        everything = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        found, counts = (everything if mask is None else mask for mask in (found, counts))
        weight = counts.to(dtype)
        if token_reduction == "mean":
            weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
        values = tokens.to(dtype).masked_fill(~(found | counts)[:, :, None], 0)
        return DenseTokens(values, found, weight)


def token_statistics_reference(
    images: DenseTokens,
    texts: DenseTokens,
    logit_scale: Float[Tensor, ""],
    pairing: Pairing,
    *,
    one_way: bool,
) -> Statistics:
    """Compute the statistics from all I x P x J x R similarities; images beyond J have no text.

    In `pairing` texts are the rows, and images the columns.
    """
    similarity = torch.einsum("ipd,jrd->ipjr", images.values, texts.values)
    best_image = best_match(similarity, images.found[:, :, None, None], dim=1)
    text_to_image = logit_scale * torch.einsum("jr,ijr->ji", texts.weight, best_image)
    best_text = best_match(similarity, texts.found[None, None], dim=3)
    image_to_text = logit_scale * torch.einsum("ip,ipj->ji", images.weight, best_text)
    back = biased_reference(text_to_image if one_way else image_to_text, pairing)
    forth = biased_reference(text_to_image, pairing)
    masks = masks_reference(pairing, len(forth), len(back.T), forth.device)
    of_images = _side(back.T, *(mask.T for mask in masks))
    return Statistics(*of_images, *_side(forth, *masks))


def best_match(similarity: Tensor, valid: Tensor, dim: int) -> Tensor:
    """Return the maximum over the valid tokens, the first of equal ones; 0 where none is valid."""
    best = similarity.masked_fill(~valid, -torch.inf).max(dim).values
    return best.masked_fill(~valid.any(dim), 0)


def _side(logits: Tensor, *masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positive, peak, total, _ = side_reference(logits, *masks)
    # With one positive per sample the hardest negative is the maximum.
    return positive, peak, total, peak
