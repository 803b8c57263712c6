"""Measure how far features of the same rows are apart, and how far they may be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Relative change of a chunk's features that rounding alone may cause, by the precision computed in.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def tolerance_of(features: Tensor, dtypes: Iterable[torch.dtype] = ()) -> float:
    """Return the tolerance of the coarsest of the features' dtype, autocast's and `dtypes`."""
    device_type = features.device.type
    coarse = (
        _TOLERANCE.get(torch.get_autocast_dtype(device_type), 0.0)
        if torch.is_autocast_enabled(device_type)
        else 0.0
    )
    inside = (_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    return max(coarse, _TOLERANCE.get(features.dtype, 3e-2), *inside)


def tolerance_between_sizes(
    features: Iterable[Tensor], dtypes: Iterable[torch.dtype] = ()
) -> float:
    """Allow more than a replay: kernels for another number of rows or columns round differently."""
    dtypes = list(dtypes)
    tolerance = max(tolerance_of(each, dtypes) for each in features)
    return min(10 * tolerance, max(0.1, tolerance))


def largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest relative change of a row of any floating tensor; NaN counts as one."""
    floating = [pair for pair in zip(before, after, strict=True) if pair[0].is_floating_point()]
    changes = (_apart(one, other) for one, other in floating)
    return max(changes, key=lambda change: (change != change, change), default=0.0)


def _apart(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float(relative_change(one, other)) if one.numel() else 0.0


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
