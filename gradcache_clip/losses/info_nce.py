"""InfoNCE as a module. b: queries of this rank, B: of all ranks, D: width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache_clip.distributed.collectives import check_same_everywhere
from gradcache_clip.distributed.exchange import Exchange
from gradcache_clip.losses.over_ranks import contrast_over_ranks, prefixes_over_ranks
from gradcache_clip.losses.retrieval_batch import RetrievalBatch
from gradcache_clip.losses.scaled import ScaledLoss, check_rows, unit
from gradcache_clip.ops import Impl
from gradcache_clip.ops.arguments import check_share
from gradcache_clip.ops.info_nce import RetrievalRules, retrieval_columns
from gradcache_clip.ops.prefixes import check_widths


class RetrievalOutput(NamedTuple):
    """A loss and how often the right partner wins within the batch, all 0-dim tensors."""

    loss: Tensor
    query_to_document_accuracy: Tensor
    document_to_query_accuracy: Tensor | None
    """None unless the loss is symmetric."""

    @property
    def accuracy(self) -> Tensor:
        """Of the directions that the loss has, their mean, between 0 and 1."""
        if self.document_to_query_accuracy is None:
            return self.query_to_document_accuracy
        return (self.query_to_document_accuracy + self.document_to_query_accuracy) / 2


class InfoNCELoss(ScaledLoss):
    """Cross-entropy of each query over the documents of the whole batch and hard negatives.

    See `gradcache_clip.ops.info_nce_loss`. Columns are the documents of all ranks, then the hard
    negatives of all ranks; the B x columns matrix is never stored. Source: van den Oord et al.
    2018, equation 4.

    Args:
        symmetric: documents look for their query as well.
        false_negative_margin: columns more similar to a query than its own document by more than
            this leave the competition; None keeps all.
        tau_plus: share of positives among the negatives that the debiased loss takes out.
        init_logit_scale: first value of the learned multiplier (1/temperature).
        max_logit_scale: its upper bound.
        normalize: L2-normalise all features first.
        impl: "auto", "reference", "tiled" or "triton".
        group: process group whose ranks share the batch; the default group when None.
        exchange: "gather" or "ring": how features of other ranks arrive; see `ClipLoss`.

    Example:
        >>> import torch
        >>> from gradcache_clip import InfoNCELoss
        >>> out = InfoNCELoss(init_logit_scale=20.0)(torch.eye(4), torch.eye(4), -torch.eye(4))
        >>> bool(out.loss < 1e-5), float(out.accuracy)
        (True, 1.0)
    """

    def __init__(
        self,
        *,
        symmetric: bool = False,
        false_negative_margin: float | None = None,
        tau_plus: float = 0.0,
        init_logit_scale: float = 1 / 0.07,
        max_logit_scale: float = 100.0,
        normalize: bool = True,
        impl: Impl = "auto",
        group: dist.ProcessGroup | None = None,
        exchange: Exchange = "gather",
    ) -> None:
        super().__init__(
            init_logit_scale=init_logit_scale,
            max_logit_scale=max_logit_scale,
            normalize=normalize,
            impl=impl,
            group=group,
            exchange=exchange,
        )
        check_share("tau_plus", tau_plus)
        self.symmetric = symmetric
        self.false_negative_margin = false_negative_margin
        self.tau_plus = tau_plus

    def forward(
        self,
        queries: Tensor,
        documents: Tensor,
        hard_negatives: Tensor | None = None,
        logit_scale: Tensor | None = None,
        *,
        ids: Tensor | None = None,
    ) -> RetrievalOutput:
        """Loss of all queries; row i of queries and documents belongs together.

        Args:
            queries: (b, D) floating tensor.
            documents: (b, D) floating tensor.
            hard_negatives: (h, D), negatives of every query on every rank, such as the local
                features of a `FeatureQueue`; or (b, K, D), K for each query alone. As many on every
                rank.
            logit_scale: a scale of the caller's own in place of the module's.
            ids: (b,) integers of the documents, or (b + h,) of documents and hard negatives; a
                column with the id of a query's own document is no negative.

        Raises:
            TypeError: features or ids of a wrong type.
            ValueError: shapes that do not fit together.
        """
        batch = self._batch(queries, documents, hard_negatives, ids, normalize=self.normalize)
        scale = self._scale_for(logit_scale, batch.queries, batch.columns)
        cosine = None if self.false_negative_margin is None else batch.cosines(scale.dtype)
        features, pairing = (batch.queries, batch.columns), batch.pairing(cosine, scale)
        statistics = contrast_over_ranks(
            "info_nce_loss", *features, scale, pairing, self.impl, self.ranks
        )
        return RetrievalOutput(*batch.result(statistics, scale))

    def prefixes(
        self,
        widths: Sequence[int],
        queries: Tensor,
        documents: Tensor,
        hard_negatives: Tensor | None = None,
        logit_scale: Tensor | None = None,
        *,
        ids: Tensor | None = None,
    ) -> list[RetrievalOutput]:
        """`forward` over prefixes of the features, each normalised anew; see `MatryoshkaLoss`."""
        batch = self._batch(queries, documents, hard_negatives, ids, normalize=False)
        check_widths("widths", widths, queries.shape[1])
        scale = self._scale_for(logit_scale, batch.queries, batch.columns)
        prefixes, cosine = [batch.of_prefix(width) for width in widths], None
        if self.false_negative_margin is not None:
            cosine = torch.stack([each.cosines(scale.dtype) for each in prefixes])
        features, pairing = (batch.queries, batch.columns), batch.pairing(cosine, scale)
        statistics = prefixes_over_ranks(
            "info_nce_loss", *features, scale, pairing, widths, self.impl, self.ranks
        )
        return [
            RetrievalOutput(*prefix.result(of_prefix, scale))
            for prefix, of_prefix in zip(prefixes, statistics, strict=True)
        ]

    def _batch(
        self,
        queries: Tensor,
        documents: Tensor,
        hard_negatives: Tensor | None,
        ids: Tensor | None,
        *,
        normalize: bool,
    ) -> RetrievalBatch:
        """Features of this rank and ids of all ranks, after checks."""
        check_rows(queries=queries, documents=documents)
        margin, options = self.false_negative_margin, (self.symmetric, self.tau_plus)
        rules = RetrievalRules(ids, margin, *options)
        columns, own = retrieval_columns(queries, documents, hard_negatives, rules)
        check_same_everywhere(self.group, queries=queries, columns=columns, own=own, ids=ids)
        if normalize:
            queries, columns, own = unit(queries), unit(columns), None if own is None else unit(own)
        rules = rules._replace(ids=None if ids is None else self._global_ids(ids, len(queries)))
        return RetrievalBatch(queries, columns, own, rules, self.ranks)

    def _global_ids(self, ids: Tensor, rows: int) -> Tensor:
        """Documents of all ranks first, then hard negatives of all ranks."""
        joined = self.ranks.joined
        return (
            torch.cat((joined(ids[:rows]), joined(ids[rows:]))) if len(ids) > rows else joined(ids)
        )
