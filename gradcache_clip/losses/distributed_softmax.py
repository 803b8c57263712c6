"""Softmax statistics of a contrast whose rows and columns are spread over ranks.

Every rank returns those of all rows and columns, and so the same loss. "reference" gathers all
features on every rank and is what the others must equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gradcache_clip.distributed.collectives import gather_rows
from gradcache_clip.distributed.exchange import Ranks
from gradcache_clip.losses.distributed_contrast import DistributedContrast
from gradcache_clip.ops.contrast import (
    ContrastPasses,
    contrast_statistics,
    in_one_pass,
    one_pass_each,
    prefix_statistics,
    promoted,
)
from gradcache_clip.ops.implementations import refuse_transforms
from gradcache_clip.ops.pairing import Pairing, Statistics


def distributed_statistics(
    loss: str,
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    impl: str,
    ranks: Ranks,
) -> Statistics:
    """Compute `contrast_statistics` of the rows and columns of all ranks, on every rank.

    Args:
        loss: name of the loss, for errors.
        q: (m, D) rows of this rank, as many on every rank.
        k: (n, D) columns of this rank; q itself in a self-contrast.
        logit_scale: 0-dim, the same on every rank; its gradient is complete on every rank.
        pairing: of all rows and columns, as one process has them: the partners of the rows of all
            ranks come before columns without a partner (n > m). In a self-contrast the shift is
            that within a rank. The gradient of its bias is complete on every rank.
        impl: "reference" gathers all features on every rank; the others share the work.
        ranks: who shares the batch, and how features travel.
    """
    q, k, impl = promoted(q, k, impl)
    if ranks.size == 1 or impl == "reference":
        return contrast_statistics(loss, *_of_all_ranks(q, k, logit_scale, pairing, ranks), impl)
    return _distributed(loss, ContrastPasses(impl), q, k, logit_scale, pairing, ranks)


def distributed_prefix_statistics(
    loss: str,
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    impl: str,
    ranks: Ranks,
    widths: Sequence[int],
) -> list[Statistics]:
    """Compute `prefix_statistics` of the rows and columns of all ranks, on every rank."""
    q, k, impl = promoted(q, k, impl)
    if ranks.size == 1 or impl == "reference":
        everything = _of_all_ranks(q, k, logit_scale, pairing, ranks)
        return prefix_statistics(loss, *everything, impl, widths)
    if impl == "triton" and not in_one_pass(pairing):
        each = partial(distributed_statistics, ranks=ranks)
        return one_pass_each(each, loss, q, k, logit_scale, pairing, widths)
    passes = ContrastPasses(impl, widths)
    return _distributed(loss, passes, q, k, logit_scale, pairing, ranks).unstacked()


def _of_all_ranks(
    q: Tensor, k: Tensor, logit_scale: Tensor, pairing: Pairing, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor, Pairing]:
    """Gather everything on every rank, in the order of one process."""
    if ranks.size == 1:
        return q, k, logit_scale, pairing
    order = _rank_by_rank(q, k, ranks)
    rows, columns = gather_rows(q, ranks.group), gather_rows(k, ranks.group)
    if order is not None:
        columns = columns[order.argsort()]
    shift = pairing.positive_shift
    if 0 < shift < len(q):
        rows = columns = _first_views_first(rows, len(q), shift)
    return rows, columns, logit_scale, pairing._replace(positive_shift=shift * ranks.size)


def _first_views_first(features: Tensor, rows: int, shift: int) -> Tensor:
    """Move two views of a sample from `shift` rows apart, as on each rank, to W times as many."""
    views = features.view(-1, rows // shift, shift, *features.shape[1:])
    return views.transpose(0, 1).flatten(0, 2)


def _rank_by_rank(q: Tensor, k: Tensor, ranks: Ranks) -> Tensor | None:
    """Return, for the columns in rank order, their numbers in the order of one process.

    None where both orders are the same.
    """
    m, n, W = len(q), len(k), ranks.size
    if n == m:
        return None
    number = torch.arange(W * n, device=k.device)
    partners, others = number[: W * m].view(W, m), number[W * m :].view(W, n - m)
    return torch.cat((partners, others), 1).flatten()


def _distributed(
    loss: str,
    passes: ContrastPasses,
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    ranks: Ranks,
) -> Statistics:
    refuse_transforms(loss, q, k, logit_scale, pairing.column_bias)
    order = _rank_by_rank(q, k, ranks)
    rules = pairing.with_columns(order)
    constants = Pairing.unpacked(*rules.packed())
    contrast = DistributedContrast(loss, passes, constants, ranks)
    statistics = contrast.differentiable(q, k, logit_scale, rules.column_bias)
    return statistics if order is None else statistics.with_columns(order.argsort())
