"""L2 normalisation: of features, of prefixes of them, and the norms that tiles need instead.

P prefixes of widths d_1 < ... < d_P; prefix p of a row is its first d_p entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from jaxtyping import Float

# F.normalize divides by no less, so a row of zeros stays zero.
SMALLEST_NORM = 1e-12


def unit(features: Float[Tensor, "*b d"], width: int | None = None) -> Tensor:
    """Divide each row, or its first `width` entries, by its L2 norm; keep the dtype."""
    return wide_unit(features, width).to(features.dtype)


def wide_unit(features: Float[Tensor, "*b d"], width: int | None = None) -> Tensor:
    """`unit` in at least fp32: an fp16 norm overflows at 65,504, and SMALLEST_NORM rounds to 0."""
    prefix = features if width is None else features[..., :width]
    return normalize(prefix.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def segments(widths: Sequence[int]) -> list[slice]:
    """Return the entries that each width adds to the one before."""
    return [slice(a, b) for a, b in zip((0, *widths[:-1]), widths, strict=True)]


def inverse_norms(
    features: Float[Tensor, "n d"], widths: Sequence[int], dtype: torch.dtype
) -> Float[Tensor, "p n"]:
    """Return 1 / L2 norm of each prefix of each row, at most 1 / SMALLEST_NORM."""
    parts = [features[:, segment].to(dtype) for segment in segments(widths)]
    squares = [torch.linalg.vecdot(part, part) for part in parts]
    # On CUDA a float cumsum is not deterministic, and prefixes are few.
    norms = torch.stack(list(accumulate(squares))).sqrt()
    return norms.clamp_min(SMALLEST_NORM).reciprocal()
