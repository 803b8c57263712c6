"""Several prefixes in one pass of the Triton kernels, which are imported on first use only.

The kernels count logits in units of log 2. What comes out of here is in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradcache_clip.ops.pairing import Gradients, Needs, Pairing, SideGradient, Statistics
from gradcache_clip.ops.prefixes_tiled import SMALLEST_NORM, prefix_norms

_LOG2_E = 1 / math.log(2)


def in_one_pass(pairing: Pairing) -> bool:
    """Whether the kernels know these rules: one positive a row, and all columns compete."""
    return not pairing.self_contrast and all(vector is None for vector in pairing.packed()[0])


def prefix_statistics_triton(
    q: Tensor, k: Tensor, logit_scale: Tensor, pairings: Sequence[Pairing], widths: Sequence[int]
) -> list[Statistics]:
    """Statistics of every prefix by one tile kernel and its merges."""
    from gradcache_clip.kernels.prefix_statistics import prefix_statistics

    rules = pairings[0]
    inverse = [_inverse_norms(features, widths) for features in (q, k)]
    positive, rows, columns = prefix_statistics(
        q,
        k,
        inverse[0] * (logit_scale * _LOG2_E),
        inverse[1],
        widths,
        rules.positive_shift,
        rules.both_ways,
    )
    empty = positive.new_empty(len(widths), 0)
    column_max, column_sum = (empty, empty) if columns is None else _in_nats(columns)
    fields = (positive * math.log(2), *_in_nats(rows), empty, empty, column_max, column_sum, empty)
    return [Statistics(*each) for each in zip(*(field.unbind() for field in fields), strict=True)]


def prefix_gradient_triton(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairings: Sequence[Pairing],
    widths: Sequence[int],
    rows: Sequence[SideGradient],
    columns: Sequence[SideGradient | None],
    needs: Needs,
) -> Gradients:
    """dq, dk and dlogit_scale of every prefix by one tile kernel and the vendor's products."""
    from gradcache_clip.kernels.prefix_gradient import prefix_gradient

    inverse = [_inverse_norms(features, widths) for features in (q, k)]
    row_max, *row_gradients = (torch.stack(field) for field in zip(*rows, strict=True))
    column_max = column_dsum = None
    given = [side for side in columns if side is not None]
    if given:
        column_max = _in_log2(torch.stack([side.max for side in given]))
        column_dsum = torch.stack([side.dsum for side in given])
    return prefix_gradient(
        q,
        k,
        logit_scale,
        (inverse[0] * (logit_scale * _LOG2_E), *inverse),
        (_in_log2(row_max), *row_gradients, column_max, column_dsum),
        widths,
        pairings[0].positive_shift,
        1 / SMALLEST_NORM,
        needs,
    )


def _inverse_norms(features: Tensor, widths: Sequence[int]) -> Tensor:
    norms = prefix_norms(features, widths, torch.float32)
    return norms.clamp_min(SMALLEST_NORM).reciprocal()


def _in_nats(running: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima in nats, and sums over exp(S - what the backward will make of these maxima)."""
    maximum, total = running.unbind(1)
    nats = maximum * math.log(2)
    shift = (maximum - nats * _LOG2_E).nan_to_num(nan=0.0)
    return nats, total * torch.exp2(shift)


def _in_log2(maximum: Tensor) -> Tensor:
    """Maxima in units of log 2; +inf where nothing was summed, so that exp(S - maximum) is 0."""
    return (maximum * _LOG2_E).masked_fill(maximum == -torch.inf, torch.inf)
