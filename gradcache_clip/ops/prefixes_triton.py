"""Several prefixes in one pass of the Triton kernels, which are imported on first use only.

The kernels count logits in units of log 2; this file takes and returns nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradcache_clip.ops.contrast_triton import LOG2_E, softmax_in_nats
from gradcache_clip.ops.pairing import Gradients, Needs, Pairing, SideGradient, Statistics
from gradcache_clip.ops.unit import SMALLEST_NORM, inverse_norms


def in_one_pass(pairing: Pairing) -> bool:
    """Say whether the kernels take these rules: one positive per row, all columns compete."""
    return not pairing.self_contrast and all(vector is None for vector in pairing.packed()[0])


def prefix_statistics_triton(
    q: Tensor, k: Tensor, logit_scale: Tensor, pairings: Sequence[Pairing], widths: Sequence[int]
) -> list[Statistics]:
    """Launch one tile kernel and its merges for all prefixes."""
    from gradcache_clip.kernels.prefix_statistics import prefix_statistics

    rules = pairings[0]
    inverse = [inverse_norms(features, widths, torch.float32) for features in (q, k)]
    positive, rows, columns = prefix_statistics(
        q,
        k,
        inverse[0] * (logit_scale * LOG2_E),
        inverse[1],
        widths,
        rules.positive_shift,
        rules.both_ways,
    )
    empty = positive.new_empty(len(widths), 0)
    column_max, column_sum = (
        (empty, empty) if columns is None else softmax_in_nats(*columns.unbind(1))
    )
    row_max, row_sum = softmax_in_nats(*rows.unbind(1))
    of_rows = positive * math.log(2), row_max, row_sum, empty
    fields = *of_rows, empty, column_max, column_sum, empty
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
    column_sums: None,
    dtype: torch.dtype,
) -> Gradients:
    """Compute the gradients through all prefixes by one tile kernel and the vendor's products.

    They take no bias, and so leave no `column_sums`.
    """
    from gradcache_clip.kernels.prefix_gradient import prefix_gradient

    inverse = [inverse_norms(features, widths, torch.float32) for features in (q, k)]
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
        (inverse[0] * (logit_scale * LOG2_E), *inverse),
        (_in_log2(row_max), *row_gradients, column_max, column_dsum),
        widths,
        pairings[0].positive_shift,
        1 / SMALLEST_NORM,
        needs,
        dtype,
    )


def _in_log2(maximum: Tensor) -> Tensor:
    """Convert maxima to units of log 2; +inf where nothing was summed, for exp(S - maximum) = 0."""
    return (maximum * LOG2_E).masked_fill(maximum == -torch.inf, torch.inf)
