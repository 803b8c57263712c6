"""How far two gradients are apart, and how far rounding may bring them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Relative difference that rounding explains in any case.
RELATIVE_ROUNDING = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 3e-2,
}
# Two orders of a sum are a small sample of how far apart orders can be.
_TIMES_SPREAD = 10.0


class Gap(NamedTuple):
    """Difference of one gradient between two steps."""

    error: float
    """Relative."""
    equal: bool
    """Whether it is up to the rounding of its precision."""
    allowed: bool
    """Equal, or the plain step itself changes as much when it is rounded otherwise."""


def gap(ours: Tensor | None, theirs: Tensor | None, again: Tensor | None, rounding: float) -> Gap:
    """Compare a gradient with the plain step's; `again` is the latter, rounded otherwise."""
    if theirs is not None:
        rounding = max(rounding, RELATIVE_ROUNDING.get(theirs.dtype, 0.0))
    size, distance = _distance(theirs, None), _distance(ours, theirs)
    equal = distance <= rounding * size
    error = distance / size if size else (math.inf if distance else 0.0)
    return Gap(error, equal, equal or distance <= _TIMES_SPREAD * _distance(again, theirs))


def all_allowed(gaps: Mapping[int, Gap]) -> bool:
    return all(each.allowed for each in gaps.values())


def wide(tensor: Tensor) -> Tensor:
    """In fp64, or in fp32 on Apple's GPUs, which have no fp64."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def _distance(one: Tensor | None, other: Tensor | None) -> float:
    """Euclidean; a gradient that is missing counts as zero."""
    if one is None or other is None:
        single = one if other is None else other
        return 0.0 if single is None else float(torch.linalg.vector_norm(wide(single)))
    return float(torch.linalg.vector_norm(wide(one) - wide(other)))
