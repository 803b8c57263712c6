"""Measure how far features of the same rows are apart, and how far they may be."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative change of a chunk's features that rounding alone may cause, by the precision computed in.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def tolerance_of(features: Tensor) -> float:
    """Return the tolerance of the features' dtype, or of autocast's if that is coarser."""
    device_type = features.device.type
    coarse = (
        _TOLERANCE.get(torch.get_autocast_dtype(device_type), 0.0)
        if torch.is_autocast_enabled(device_type)
        else 0.0
    )
    return max(coarse, _TOLERANCE.get(features.dtype, 3e-2))


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """Return the largest change of a row, relative to its size, or the mean size if larger."""
    before, after = before.to(wide(before.dtype)), after.to(wide(after.dtype))
    return relative(row_norms(after - before), before).amax()


def relative(moved: Tensor, features: Tensor) -> Tensor:
    """Divide distances of rows by the rows' sizes, or by the mean size if that is larger."""
    sizes = row_norms(features, moved.dtype)
    floor = sizes.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return moved / torch.maximum(sizes, floor)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def row_norms(features: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    flat = features if features.ndim == 2 else features.reshape(len(features), -1)
    return torch.linalg.vector_norm(flat, dim=1, dtype=dtype)
