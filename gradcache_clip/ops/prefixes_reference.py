"""Statistics of several prefixes, each for itself: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gradcache_clip.ops.contrast_reference import contrast_reference
from gradcache_clip.ops.pairing import Pairing, Statistics


def prefixes_reference(
    q: Tensor, k: Tensor, logit_scale: Tensor, pairings: Sequence[Pairing], widths: Sequence[int]
) -> list[Statistics]:
    """The full matrix of each prefix, by plain autograd."""
    return [
        contrast_reference(unit_prefix(q, width), unit_prefix(k, width), logit_scale, pairing)
        for pairing, width in zip(pairings, widths, strict=True)
    ]


def unit_prefix(features: Tensor, width: int) -> Tensor:
    """The first `width` entries of each row, L2-normalised, in at least fp32."""
    wide = torch.promote_types(features.dtype, torch.float32)
    return normalize(features[..., :width].to(wide), dim=-1)
