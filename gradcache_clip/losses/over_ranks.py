"""Statistics of a contrast whose rows and columns are spread over ranks.

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
from gradcache_clip.losses.spread_contrast import Passes, SpreadContrast, StatisticsOverRanks
from gradcache_clip.ops.contrast import ContrastPasses, contrast_statistics
from gradcache_clip.ops.implementations import (
    refuse_transforms,
    resolve_impl,
)
from gradcache_clip.ops.pairing import Pairing, Statistics
from gradcache_clip.ops.prefixes import (
    PrefixPasses,
    in_one_pass,
    one_pass_each,
    prefix_statistics,
)


def contrast_over_ranks(
    loss: str,
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    impl: str,
    ranks: Ranks,
) -> Statistics:
    """`contrast_statistics` of the rows and columns of all ranks, on every rank.

    Args:
        loss: name of the loss, for errors.
        q: (m, D) rows of this rank, as many on every rank.
        k: (n, D) columns of this rank; in a self-contrast q itself.
        logit_scale: 0-dim, the same on every rank; its gradient is complete on every rank.
        pairing: of all rows and columns, as one process has them: the partners of the rows of all
            ranks come before columns without a partner (n > m). In a self-contrast the shift is
            that within a rank.
        impl: "reference" gathers all features on every rank; the others never do the same twice.
        ranks: who shares the batch, and how features travel.
    """
    dtype = torch.promote_types(q.dtype, k.dtype)
    resolved = resolve_impl(impl, q.device, dtype)
    if ranks.size == 1 or resolved == "reference":
        arguments = _of_all_ranks(q, k, logit_scale, pairing, ranks)
        return contrast_statistics(loss, *arguments, resolved)
    return _spread(
        loss, ContrastPasses(resolved), q.to(dtype), k.to(dtype), logit_scale, pairing, ranks
    )


def prefixes_over_ranks(
    loss: str,
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    widths: Sequence[int],
    impl: str,
    ranks: Ranks,
) -> list[Statistics]:
    """`prefix_statistics` of the rows and columns of all ranks, on every rank."""
    dtype = torch.promote_types(q.dtype, k.dtype)
    resolved = resolve_impl(impl, q.device, dtype)
    if ranks.size == 1 or resolved == "reference":
        arguments = _of_all_ranks(q, k, logit_scale, pairing, ranks)
        return prefix_statistics(loss, *arguments, widths, resolved)
    q, k = q.to(dtype), k.to(dtype)
    if resolved == "triton" and not in_one_pass(pairing):
        each = partial(contrast_over_ranks, ranks=ranks)
        return one_pass_each(each, loss, q, k, logit_scale, pairing, widths)
    stacked = _spread(loss, PrefixPasses(resolved, widths), q, k, logit_scale, pairing, ranks)
    return [Statistics(*each) for each in zip(*(x.unbind() for x in stacked), strict=True)]


def _of_all_ranks(
    q: Tensor, k: Tensor, logit_scale: Tensor, pairing: Pairing, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor, Pairing]:
    """Everything on every rank, in the order of one process."""
    if ranks.size == 1:
        return q, k, logit_scale, pairing
    order = _rank_by_rank(q, k, ranks)
    rows, columns = gather_rows(q, ranks.group), gather_rows(k, ranks.group)
    if order is not None:
        columns = columns[order.argsort()]
    shift = pairing.positive_shift
    if shift > 0:
        rows = columns = _first_views_first(rows, len(q), shift)
    return rows, columns, logit_scale, pairing._replace(positive_shift=shift * ranks.size)


def _first_views_first(features: Tensor, rows: int, shift: int) -> Tensor:
    """Two views of a sample are `shift` rows apart on each rank, then W times as many."""
    views = features.view(-1, rows // shift, shift, *features.shape[1:])
    return views.transpose(0, 1).flatten(0, 2)


def _rank_by_rank(q: Tensor, k: Tensor, ranks: Ranks) -> Tensor | None:
    """Of each column, one rank's after another's, its number in the order of one process.

    None where both orders are the same.
    """
    m, n, W = len(q), len(k), ranks.size
    if n == m:
        return None
    number = torch.arange(W * n, device=k.device)
    partners, others = number[: W * m].view(W, m), number[W * m :].view(W, n - m)
    return torch.cat((partners, others), 1).flatten()


def _spread(
    loss: str,
    passes: Passes,
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    ranks: Ranks,
) -> Statistics:
    refuse_transforms(loss, q, k, logit_scale)
    order = _rank_by_rank(q, k, ranks)
    contrast = SpreadContrast(loss, passes, pairing.with_columns(order), ranks)
    statistics = Statistics(*StatisticsOverRanks.apply(q, k, logit_scale, contrast))
    return statistics if order is None else statistics.with_columns(order.argsort())
