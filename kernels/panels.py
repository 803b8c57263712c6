"""What launchers share that write G panel by panel: cuts, alignment and the vendor's product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import triton
from torch import Tensor

from gradcache_clip.kernels.launch_config import FLOAT16_GRADIENT_SCALE

# Rows of G start at multiples of 16 bytes, which the vendor's fast products require.
_ALIGNED_COLUMNS = 8


def slices(size: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover range(size)."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def aligned(columns: int) -> int:
    """Length of a row of the workspace that holds this many columns."""
    return triton.cdiv(columns, _ALIGNED_COLUMNS) * _ALIGNED_COLUMNS


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, accumulated in fp32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if _mm_returns_float32(a.device):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def in_range_of_float16(
    vectors: list[Tensor | None],
) -> tuple[list[Tensor | None], Tensor]:
    """The vectors over a common factor, so that |G| <= FLOAT16_GRADIENT_SCALE."""
    # exp(S - max) <= 1: no entry of G is larger than all vectors at their largest together.
    largest = sum(each.abs().amax() for each in vectors if each is not None)
    largest = largest.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = [None if each is None else each / largest * FLOAT16_GRADIENT_SCALE for each in vectors]
    return scaled, largest / FLOAT16_GRADIENT_SCALE


@cache
def _mm_returns_float32(device: torch.device) -> bool:
    """Whether this torch multiplies 16-bit matrices into fp32 here (CUDA, torch 2.8 or later)."""
    probe = torch.ones(16, 16, dtype=torch.float16, device=device)
    try:
        torch.mm(probe, probe, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True
