"""Late interaction of tokens that are spread over ranks: statistics, and scores of own candidates.

b queries on this rank, s documents and hard negatives, S on all ranks, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradcache_clip.distributed.collectives import (
    check_same_everywhere,
    gather_rows,
    with_summed_gradient,
)
from gradcache_clip.distributed.exchange import Ranks
from gradcache_clip.losses.distributed_contrast import DistributedContrast
from gradcache_clip.losses.own_token_scores import own_token_scores, own_token_scores_reference
from gradcache_clip.losses.padded_tokens import of_all_ranks
from gradcache_clip.losses.retrieval_arguments import RowArguments
from gradcache_clip.losses.token_batch import TokenBatch
from gradcache_clip.losses.token_inputs import token_pairing, vectors_of
from gradcache_clip.ops.implementations import autocast_disabled, refuse_transforms
from gradcache_clip.ops.late_interaction_op import TokenPasses, TokenRules, token_statistics
from gradcache_clip.ops.late_interaction_reference import (
    DenseTokens,
    token_statistics_reference,
)
from gradcache_clip.ops.pairing import Statistics

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

_LOSS = "max_sim_loss"


def packed_statistics(
    documents: TokenBatch,
    queries: TokenBatch,
    logit_scale: Tensor,
    rules: TokenRules,
    further: RowArguments,
    impl: str,
    ranks: Ranks,
) -> Statistics:
    """Compute the statistics of B queries and their documents in tiles, without padding."""
    images, texts = _Spread.over(ranks, documents), _Spread.over(ranks, queries)
    check_same_everywhere(
        ranks.group,
        document_tokens=images.tokens,
        query_tokens=texts.tokens,
        document_counts=images.counts,
        query_counts=texts.counts,
        **vectors_of(further),
    )
    shared = len(documents.lengths) // len(queries.lengths) - 1
    rules = rules._replace(
        pairing=token_pairing(further, shared, logit_scale.dtype, ranks),
        image_mask=of_all_ranks(images.counts, ranks),
        text_mask=of_all_ranks(texts.counts, ranks),
        image_spans=images.spans,
        text_spans=texts.spans,
    )
    return _over_ranks(images.tokens, texts.tokens, logit_scale, rules, impl, ranks)


def reference_statistics(
    documents: TokenBatch,
    queries: TokenBatch,
    logit_scale: Tensor,
    rules: TokenRules,
    further: RowArguments,
    ranks: Ranks,
) -> Statistics:
    """Compute the same from the similarities of all tokens of all ranks."""
    check_same_everywhere(ranks.group, query_lengths=queries.lengths, **vectors_of(further))
    b, S = len(queries.lengths), len(documents.lengths)
    images, texts = (
        _gathered(_padded(each, rules, logit_scale.dtype, ranks), ranks)
        for each in (documents, queries)
    )
    order = _documents_first(b, S, ranks, logit_scale.device)
    images = DenseTokens(*(each[order] for each in images))
    pairing = token_pairing(further, S // b - 1, logit_scale.dtype, ranks).with_columns(order)
    with autocast_disabled(logit_scale.device):
        options = {"one_way": rules.one_way}
        found = token_statistics_reference(images, texts, logit_scale, pairing, **options)
    return _with_rows(found, [each[: b * ranks.size] for each in found[:4]])


def own_logits(
    queries: TokenBatch,
    candidates: TokenBatch,
    logit_scale: Tensor,
    rules: TokenRules,
    impl: str,
    ranks: Ranks,
    hardest: Float[Tensor, " B"] | None = None,
    bias: Float[Tensor, "b c"] | None = None,
) -> Float[Tensor, "B c"]:
    """Compute the logits of all ranks' queries with C candidates of their own, query by query.

    `hardest` are the largest logits of what else competes with them in tiles, whose gradient of the
    scale counts from there. `bias` is added to the logits of this rank's queries.
    """
    if impl == "reference":
        sides = (_padded(each, rules, logit_scale.dtype, None) for each in (queries, candidates))
        with autocast_disabled(logit_scale.device):
            scores = own_token_scores_reference(*sides)
    else:
        rules = rules._replace(
            one_way=True,
            text_mask=queries.counts,
            image_spans=candidates.spans,
            text_spans=queries.spans,
        )
        dtype = torch.promote_types(queries.values.dtype, candidates.values.dtype)
        given = queries.values.to(dtype), candidates.values.to(dtype)
        scores = own_token_scores(*given, rules, impl)
    # Each rank scales the scores of its own queries alone.
    scale = with_summed_gradient(logit_scale, ranks.group)
    logits = scale * scores
    if hardest is not None and impl != "reference":
        zero = (hardest[ranks.own(len(scores)), None] / logit_scale).detach()
        logits = logits - (scale - scale.detach()) * zero.nan_to_num(0, 0, 0)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    return gather_rows(logits, ranks.group)


def _over_ranks(
    images: Tensor, texts: Tensor, logit_scale: Tensor, rules: TokenRules, impl: str, ranks: Ranks
) -> Statistics:
    dtype = torch.promote_types(images.dtype, texts.dtype)
    given = images.to(dtype), texts.to(dtype), logit_scale
    refuse_transforms(_LOSS, *given)
    if ranks.size == 1:
        found = token_statistics(*given, rules, impl, _LOSS)
    else:
        found = DistributedContrast(_LOSS, TokenPasses(impl), rules, ranks).differentiable(*given)
    rows = [each.view(ranks.size, -1)[:, : len(texts)].flatten() for each in found[:4]]
    return _with_rows(found, rows)


def _with_rows(statistics: Statistics, rows: list[Tensor]) -> Statistics:
    """Keep of the rows those of documents, in the order of queries."""
    fields = [*rows, *statistics[4:]]
    return Statistics(*fields)


class _Spread(NamedTuple):
    """Tokens of this rank in a shape that all ranks share, and the spans of all."""

    tokens: Float[Tensor, "s l d"]
    """The tokens one after the other; unused ones at the end."""
    counts: Bool[Tensor, "s l"] | None
    spans: Int[Tensor, "3 S"]

    @staticmethod
    def over(ranks: Ranks, batch: TokenBatch) -> _Spread:
        values, counts, samples = batch.values, batch.counts, len(batch.lengths)
        most = int(ranks.maximum(torch.tensor(len(values), device=values.device)))
        length = -(-most // samples)
        if missing := samples * length - len(values):
            values = F.pad(values, (0, 0, 0, missing))
            counts = None if counts is None else F.pad(counts, (0, missing))
        return _Spread(
            values.view(samples, length, -1),
            None if counts is None else counts.view(samples, length),
            ranks.joined(batch.spans + ranks.rank * samples * length),
        )


def _padded(
    batch: TokenBatch, rules: TokenRules, dtype: torch.dtype, ranks: Ranks | None
) -> DenseTokens:
    """Pad the tokens to one length, with ranks to that of the longest sample on any."""
    longest = batch.lengths.max()
    place = torch.arange(
        int(longest if ranks is None else ranks.maximum(longest)), device=longest.device
    )
    start, found, stop = (each[:, None] for each in batch.spans)
    index = (start + place).clamp_max(len(batch.values) - 1)
    counts = start + place < stop
    if batch.counts is not None:
        counts = counts & batch.counts[index]
    masks = start + place < found, counts
    return DenseTokens.of(batch.values[index], *masks, rules.token_reduction, dtype)


def _gathered(side: DenseTokens, ranks: Ranks) -> DenseTokens:
    return DenseTokens(*(gather_rows(each, ranks.group) for each in side))


def _documents_first(b: int, S: int, ranks: Ranks, device: torch.device) -> Int[Tensor, " n"]:
    """Return the numbers of the documents of all ranks, then those of all hard negatives."""
    by_rank = torch.arange(ranks.size * S, device=device).view(ranks.size, S)
    return torch.cat((by_rank[:, :b].flatten(), by_rank[:, b:].flatten()))
