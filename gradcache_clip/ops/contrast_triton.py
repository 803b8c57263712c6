"""The softmax family through the Triton kernels, which are imported on first use only.

The kernels count in units of log 2, the losses in nats.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.ops.pairing import Gradients, Needs, Pairing, SideGradient, Statistics

if TYPE_CHECKING:
    from gradcache_clip.kernels.competition import Competition

_LOG_2 = math.log(2)
LOG2_E = 1 / _LOG_2


def statistics_triton(q: Tensor, k: Tensor, logit_scale: Tensor, pairing: Pairing) -> Statistics:
    """Launch the tile kernel and its merges; memory beyond vectors: a workspace of bounded size."""
    from gradcache_clip.kernels.contrast_statistics import contrast_statistics

    q, k = _contiguous(q, k, pairing)
    positive, rows, columns = contrast_statistics(
        q, k, logit_scale, _competition(pairing), maxima=pairing.maxima
    )
    if not pairing.maxima:
        rows, columns = (each if each is None else near_the_sum(each) for each in (rows, columns))
    row_side = _in_nats(rows)
    if len(positive):
        row_side = (positive * _LOG_2, *row_side[1:])
    column_side = _in_nats(rows.new_empty(2, 0) if columns is None else columns)
    return Statistics(*row_side, *column_side)


def gradient_triton(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    rows: SideGradient,
    columns: SideGradient | None,
    needs: Needs,
    column_sums: Tensor | None,
    dtype: torch.dtype,
) -> Gradients:
    """Compute dq and dk in `dtype`, and dlogit_scale; None where `needs` says False.

    A self-contrast has no dk. Adds the gradient of column_bias to `column_sums` if there are any.
    """
    from gradcache_clip.kernels.contrast_gradient import contrast_gradient

    q, k = _contiguous(q, k, pairing)
    column_side = None if columns is None else _in_log2(columns)
    sides = _in_log2(rows), column_side
    given = q, k, logit_scale, _competition(pairing), *sides, needs
    return contrast_gradient(*given, column_sums=column_sums, dtype=dtype)


def _contiguous(q: Tensor, k: Tensor, pairing: Pairing) -> tuple[Tensor, Tensor]:
    # In a self-contrast a copy of q must serve as k too.
    q = q.contiguous()
    return q, q if pairing.self_contrast else k.contiguous()


def _competition(pairing: Pairing) -> Competition:
    from gradcache_clip.kernels.competition import Competition

    return Competition(
        row_labels=_integers(pairing.row_labels),
        column_labels=_integers(pairing.column_labels),
        row_ids=_integers(pairing.row_ids),
        column_ids=_integers(pairing.column_ids),
        row_threshold=_logits(pairing.row_threshold),
        column_threshold=_logits(pairing.column_threshold),
        row_groups=_integers(pairing.row_groups),
        column_groups=_integers(pairing.column_groups),
        row_bias=_logits(pairing.row_bias),
        column_bias=_logits(pairing.column_bias),
        row_guide=_features(pairing.row_guide),
        column_guide=_features(pairing.column_guide),
        row_guide_threshold=_numbers(pairing.row_guide_threshold),
        column_guide_threshold=_numbers(pairing.column_guide_threshold),
        positive_shift=pairing.positive_shift,
        both_ways=pairing.both_ways,
        self_contrast=pairing.self_contrast,
    )


def _integers(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.to(torch.int64).contiguous()


def _features(guide: Tensor | None) -> Tensor | None:
    return None if guide is None else guide.T.float().contiguous()


def _numbers(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float().contiguous()


def _logits(vector: Tensor | None) -> Tensor | None:
    """Convert logits from nats, into memory of their own."""
    return None if vector is None else vector * LOG2_E


def _in_nats(planes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convert to positive, max, sum and hardest_negative; what is missing is empty."""
    positive, hardest_negative = planes[2:] * _LOG_2 if len(planes) == 4 else planes.new_empty(2, 0)
    return positive.clone(), *softmax_in_nats(*planes[:2]), hardest_negative.clone()


def near_the_sum(planes: Tensor) -> Tensor:
    """Move references by whole numbers so that sums are from 1/2 to 1, and none overflows.

    Gradients of the sums are then of one size, as those of fp16 need to be.
    """
    if len(planes) == 4:
        return planes
    total, exponent = torch.frexp(planes[1])
    return torch.stack((planes[0] + exponent, total))


def softmax_in_nats(maximum: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Convert maxima to nats, and sums of exp(S - maximum) to these maxima.

    A maximum is rounded on its way into nats, and again on its way back in the backward. The sum is
    taken relative to what comes back, so that the two passes agree to the last bit.
    """
    reference = maximum * _LOG_2
    moved = torch.where(maximum > -torch.inf, maximum - reference * LOG2_E, 0)
    return reference, total * torch.exp2(moved)


def _in_log2(side: SideGradient) -> tuple[Tensor, Tensor, Tensor]:
    return side.max * LOG2_E, side.dsum.contiguous(), side.dpositive.contiguous()
