"""MaxSim of queries and documents, with hard negatives of each query and scores of a teacher.

b queries on this rank, K hard negatives of each, Q tokens of a query, P and R of a document and a
hard negative, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.distributed.collectives import check_same_everywhere
from gradcache_clip.losses.competitors import Competitors, accuracy, joint_loss
from gradcache_clip.losses.options import check_flags
from gradcache_clip.losses.retrieval_arguments import RowArguments
from gradcache_clip.losses.scaled import LossOptions, ScaledLoss, check_has_negatives
from gradcache_clip.losses.token_batch import GivenTokens, TokenBatch
from gradcache_clip.losses.token_contrast import (
    own_logits,
    packed_statistics,
    reference_statistics,
)
from gradcache_clip.losses.token_inputs import TokenInputs, vectors_of
from gradcache_clip.ops.implementations import resolve_impl
from gradcache_clip.ops.late_interaction import check_token_reduction
from gradcache_clip.ops.late_interaction_op import TokenRules
from gradcache_clip.ops.pairing import Statistics
from gradcache_clip.ops.results import RetrievalOutput
from gradcache_clip.ops.softmax import columns_of, rows_of, weighted_mean
from gradcache_clip.ops.token_pieces import TokenReduction

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MaxSimLoss(ScaledLoss):
    r"""Cross-entropy of each query with all documents, scored by their best matching tokens.

    With tokens x_iq of query i and y_jp of document j,

        S_ij = logit_scale * sum_q max_p <x_iq, y_jp>
        loss = mean_i log sum_j exp(S_ij) - S_ii

    where hard negatives stand in the sum as well. This is `LateInteractionLoss` one way, with the
    names, the order and the competitors of `RetrievalLoss`. Tokens may come packed, of any number
    for each sample; masked ones are dropped, so padding costs next to nothing. At most a tile of
    similarities and a stripe of scores are in memory.

    Sources: Khattab and Zaharia 2020, "ColBERT", section 3; Faysse et al. 2024, "ColPali", for
    documents that are images; Yao et al. 2021, "FILIP", for symmetric.

    Args:
        symmetric: documents look for queries as well, in a softmax of their own; the mean of both.
        token_reduction: "sum" over the tokens that look, as in ColBERT, or "mean".
        in_batch_negatives: False lets the own hard negatives of a query alone compete.
        share_hard_negatives: whether they compete for the other queries, too.
        init_logit_scale: initial multiplier of the scores.
        max_logit_scale: its upper bound.
        **options: `normalize=True` (each token), `impl="auto"`, `group=None`, `exchange="gather"`;
            see `ScaledLoss`.

    Raises:
        ValueError: options that contradict each other.

    Example:
        >>> import torch
        >>> from gradcache_clip import MaxSimLoss
        >>> queries, documents = torch.eye(12).view(4, 3, 12), torch.eye(12)
        >>> lengths = torch.tensor([3, 3, 3, 3])
        >>> loss = MaxSimLoss(init_logit_scale=5.0)
        >>> print(f"{loss(queries, documents, document_lengths=lengths).loss:.5f}")
        0.00000
    """

    feature_arguments = "query_tokens", "document_tokens", "hard_negatives"

    def __init__(
        self,
        *,
        symmetric: bool = False,
        token_reduction: TokenReduction = "sum",
        in_batch_negatives: bool = True,
        share_hard_negatives: bool = True,
        init_logit_scale: float = 1.0,
        max_logit_scale: float = 100.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(
            init_logit_scale=init_logit_scale, max_logit_scale=max_logit_scale, **options
        )
        check_token_reduction(token_reduction)
        check_flags(
            symmetric=symmetric,
            in_batch_negatives=in_batch_negatives,
            share_hard_negatives=share_hard_negatives,
        )
        if symmetric and not in_batch_negatives:
            raise ValueError(
                "symmetric: expected False with in_batch_negatives=False, got True; for a document "
                "the only negatives are those of the batch"
            )
        self.symmetric = symmetric
        self.token_reduction: TokenReduction = token_reduction
        self.in_batch_negatives = in_batch_negatives
        self.share_hard_negatives = share_hard_negatives and in_batch_negatives

    def forward(
        self,
        query_tokens: Tensor,
        document_tokens: Tensor,
        hard_negatives: Tensor | None = None,
        logit_scale: Tensor | None = None,
        *,
        query_mask: Tensor | None = None,
        document_mask: Tensor | None = None,
        hard_negative_mask: Tensor | None = None,
        query_counts: Tensor | None = None,
        document_counts: Tensor | None = None,
        query_lengths: Tensor | None = None,
        document_lengths: Tensor | None = None,
        hard_negative_lengths: Tensor | None = None,
        ids: Tensor | None = None,
        groups: Tensor | None = None,
        column_bias: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> RetrievalOutput:
        """Compute the loss of all queries; sample i of queries and documents is a pair.

        Args:
            query_tokens: (b, Q, D) floating tensor, or (T, D) with query_lengths.
            document_tokens: (b, P, D), or (T, D) with document_lengths.
            hard_negatives: (b, K, R, D) tokens of K for each query, or (T, D), query by query, with
                hard_negative_lengths.
            logit_scale: a scale of the caller's own in place of the module's.
            query_mask: bool in the shape of the tokens without D, True for tokens that count.
            document_mask: the same; one way these are the tokens that a query may find.
            hard_negative_mask: the same.
            query_counts: True for tokens that count, where these are others than the mask's: the
                mask tokens of ColBERT's query expansion. The mask then says which tokens documents
                may find.
            document_counts: the same for documents; only if symmetric.
            query_lengths: (b,) integers, the number of tokens of each query, of packed tokens.
            document_lengths: (b,).
            hard_negative_lengths: (b, K).
            ids: (b,) integers; as groups, column_bias and row_weights in `RetrievalLoss`.
            groups: (b,) integers.
            column_bias: (b,), with hard negatives (b, 1 + K), constants.
            row_weights: (b,), 0 or more.

        Raises:
            TypeError: tokens, masks, lengths or ids of a wrong type.
            ValueError: shapes that do not fit together, a sample without any token that counts, or
                the whole batch is a single pair without hard negatives.
        """
        queries = GivenTokens("query", query_tokens, query_mask, query_counts, query_lengths)
        of_documents = document_mask, document_counts, document_lengths
        documents = GivenTokens("document", document_tokens, *of_documents)
        negatives = _negatives(hard_negatives, hard_negative_mask, hard_negative_lengths)
        further = RowArguments(None, ids, groups, column_bias, None, row_weights)
        inputs = TokenInputs(queries, documents, negatives, further)
        self._check(inputs)
        return self._output(inputs, self._scale_for(logit_scale, query_tokens, document_tokens))

    def _check(self, inputs: TokenInputs) -> None:
        inputs.check()
        if inputs.documents.counts is not None and not self.symmetric:
            raise ValueError(
                "document_counts: expected None unless symmetric, got a tensor; one way documents "
                "do not look: pass a document_mask"
            )
        if inputs.negatives is None:
            check_has_negatives(inputs.queries.samples[0] * self.ranks.size)
            if not self.in_batch_negatives:
                raise ValueError(
                    "hard_negatives: expected some with in_batch_negatives=False, got None; "
                    "nothing else competes"
                )

    def _output(self, inputs: TokenInputs, scale: Tensor) -> RetrievalOutput:
        further = inputs.further
        impl = resolve_impl(self.impl, inputs.queries.tokens.device, inputs.dtype)
        rules = TokenRules(None, None, not self.symmetric, self.token_reduction)
        positive, against, back = None, None, None
        if self.in_batch_negatives:
            statistics = self._statistics_of(inputs, scale, rules, impl)
            queries, back = columns_of(statistics), rows_of(statistics)
            positive, against = queries.positive, Competitors.of(queries, with_positive=True)
        # They have the id of their query, by which the tiles leave them out.
        own_apart = not self.share_hard_negatives or further.ids is not None
        if inputs.negatives is not None and own_apart:
            positive, against = self._with_own(inputs, scale, rules, impl, positive, against)
        assert positive is not None and against is not None
        weights = None if further.row_weights is None else self.ranks.joined(further.row_weights)
        loss = weighted_mean(joint_loss(positive, [against]), weights)
        forth = accuracy(positive, against)
        if not self.symmetric or back is None:
            return RetrievalOutput(loss, forth, None)
        other = Competitors.of(back, with_positive=True)
        loss = (loss + weighted_mean(joint_loss(back.positive, [other]), weights)) / 2
        return RetrievalOutput(loss, forth, accuracy(back.positive, other))

    def _statistics_of(
        self, inputs: TokenInputs, scale: Tensor, rules: TokenRules, impl: str
    ) -> Statistics:
        """Compare all queries with all documents, and with the hard negatives that are shared."""
        shared = inputs.negatives if self.share_hard_negatives else None
        queries, columns = self._batch(inputs.queries), self._batch(inputs.documents)
        if shared is not None:
            columns = columns.followed_by(self._batch(shared))
        given = columns, queries, scale, rules, inputs.further
        if impl == "reference":
            return reference_statistics(*given, self.ranks)
        return packed_statistics(*given, impl, self.ranks)

    def _with_own(
        self,
        inputs: TokenInputs,
        scale: Tensor,
        rules: TokenRules,
        impl: str,
        positive: Tensor | None,
        against: Competitors | None,
    ) -> tuple[Tensor, Competitors]:
        """Let the hard negatives of each query compete with it alone."""
        assert inputs.negatives is not None
        queries = self._batch(inputs.queries)
        options = scale, rules, impl, self.ranks
        if positive is None or against is None:
            named = vectors_of(inputs.further)
            check_same_everywhere(self.group, query_lengths=queries.lengths, **named)
            documents, bias = self._batch(inputs.documents), inputs.own_bias(slice(0, 1))
            positive = own_logits(queries, documents, *options, bias=bias)[:, 0]
            nothing = torch.full_like(positive, -torch.inf)
            against = Competitors(nothing, nothing, with_positive=True)
        negatives, bias = self._batch(inputs.negatives), inputs.own_bias(slice(1, None))
        logits = own_logits(queries, negatives, *options, hardest=against.hardest, bias=bias)
        return positive, against.joined(logits, logits.detach().amax(1))

    def _batch(self, given: GivenTokens) -> TokenBatch:
        """Drop the padding, then normalise."""
        batch = given.batch(both_ways=self.symmetric)
        return batch._replace(values=self._unit(batch.values))

    def extra_repr(self) -> str:
        own = f"symmetric={self.symmetric}, token_reduction={self.token_reduction!r}"
        return f"{own}, {super().extra_repr()}"


def _negatives(
    tokens: Tensor | None, mask: Tensor | None, lengths: Tensor | None
) -> GivenTokens | None:
    if tokens is not None:
        return GivenTokens("hard_negative", tokens, mask, None, lengths)
    for name, each in (("mask", mask), ("lengths", lengths)):
        if each is not None:
            raise ValueError(
                f"hard_negative_{name}: expected None without hard_negatives, got a tensor"
            )
    return None
