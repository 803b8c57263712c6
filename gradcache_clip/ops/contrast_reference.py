"""Statistics from the whole M x N matrix: the specification that other implementations meet."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcache_clip.ops.pairing import Pairing, Statistics


def contrast_reference(q: Tensor, k: Tensor, logit_scale: Tensor, pairing: Pairing) -> Statistics:
    """Compute them by plain autograd over the full logits, in at least fp32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = logit_scale.to(dtype) * (q.to(dtype) @ k.to(dtype).T)
    logits = biased_reference(logits, pairing)
    positives, competes = masks_reference(pairing, len(q), len(k), q.device)
    of_rows, of_columns = _guided(pairing, competes)
    rows = side_reference(logits, positives, of_rows, pairing.row_labels, pairing.row_threshold)
    empty = logits.new_empty(0)
    columns = (empty, empty, empty, empty)
    if pairing.both_ways:
        columns = side_reference(
            logits.T, positives.T, of_columns.T, pairing.column_labels, pairing.column_threshold
        )
        if pairing.column_labels is None:
            columns = (empty, *columns[1:])
    return Statistics(*rows, *columns)


def biased_reference(logits: Tensor, pairing: Pairing) -> Tensor:
    """Add the bias of rows and columns to M x N logits."""
    if pairing.row_bias is not None:
        logits = logits + pairing.row_bias[:, None]
    if pairing.column_bias is not None:
        logits = logits + pairing.column_bias
    return logits


def masks_reference(
    pairing: Pairing, rows: int, columns: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return masks of positives and of competitors, positives among them; both M x N."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)[None, :]
    partner = row + pairing.positive_shift
    positives = (column == partner) | (column == partner - columns)
    if pairing.row_labels is not None and pairing.column_labels is not None:
        positives = pairing.row_labels[:, None] == pairing.column_labels[None, :]
    competes = torch.ones_like(positives)
    if pairing.row_ids is not None and pairing.column_ids is not None:
        competes = positives | (pairing.row_ids[:, None] != pairing.column_ids[None, :])
    if pairing.row_groups is not None and pairing.column_groups is not None:
        same_group = pairing.row_groups[:, None] == pairing.column_groups[None, :]
        competes = competes & (positives | same_group)
    if pairing.self_contrast:
        positives, competes = positives & (row != column), competes & (row != column)
    return positives, competes


def _guided(pairing: Pairing, competes: Tensor) -> tuple[Tensor, Tensor]:
    """Return who competes for rows, and for columns, by the thresholds of both."""
    if pairing.row_guide is None or pairing.column_guide is None:
        return competes, competes
    guide = pairing.row_guide.T @ pairing.column_guide
    rows = columns = competes
    if pairing.row_guide_threshold is not None:
        rows = competes & (guide <= pairing.row_guide_threshold[:, None])
    if pairing.column_guide_threshold is not None:
        columns = competes & (guide <= pairing.column_guide_threshold)
    return rows, columns


def side_reference(
    logits: Tensor,
    positives: Tensor,
    competes: Tensor,
    labels: Tensor | None = None,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return positive, max, sum and hardest_negative of each row."""
    if threshold is not None:
        competes = competes & (logits <= threshold[:, None])
    positive = logits.where(positives, 0).sum(1)
    # With labels the sum holds the positives too; without, the loss adds its one positive itself.
    summed = competes if labels is not None else competes & ~positives
    peak, total = _max_and_sum(logits.masked_fill(~summed, -torch.inf))
    empty = logits.new_empty(0)
    if labels is None:
        return positive, peak, total, empty
    hardest_negative = logits.detach().masked_fill(positives | ~competes, -torch.inf).amax(1)
    return positive, peak, total, hardest_negative


def _max_and_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    peak = logits.detach().amax(1)
    # Where nothing competes there is no finite maximum to subtract.
    reference = peak.masked_fill(peak == -torch.inf, 0)
    return peak, torch.exp(logits - reference[:, None]).sum(1)
