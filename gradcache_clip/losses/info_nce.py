"""InfoNCE as a module. b: queries of this rank, B: of all ranks, D: width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.distributed.collectives import check_same_everywhere
from gradcache_clip.losses.options import check_finite, check_flags
from gradcache_clip.losses.retrieval_batch import RetrievalBatch
from gradcache_clip.losses.scaled import ScaledLoss, ScaleOptions, check_has_negatives
from gradcache_clip.ops.arguments import check_share
from gradcache_clip.ops.info_nce import RetrievalRules, retrieval_columns
from gradcache_clip.ops.results import RetrievalOutput

if TYPE_CHECKING:
    from typing_extensions import Unpack


class InfoNCELoss(ScaledLoss):
    """Cross-entropy of each query over the documents of the whole batch and hard negatives.

    See `gradcache_clip.ops.info_nce_loss_with_accuracy`. Columns are the documents of all ranks,
    then the hard negatives of all ranks; the B x columns matrix is never stored. Source: van den
    Oord et al. 2018, equation 4.

    Args:
        symmetric: add the loss of each document over all queries.
        false_negative_margin: columns that exceed the similarity of a query to its own document by
            more than this are not its negatives; None keeps all.
        tau_plus: share of positives among the negatives that the debiased loss subtracts.
        **options: `init_logit_scale=1/0.07`, `max_logit_scale=100`, `normalize=True`,
            `impl="auto"`, `group=None`, `exchange="gather"`; see `ScaledLoss`.

    Example:
        >>> import torch
        >>> from gradcache_clip import InfoNCELoss
        >>> loss, features = InfoNCELoss(init_logit_scale=20.0), torch.eye(4)
        >>> out = loss(features, features, -features)
        >>> bool(out.loss < 1e-5), float(out.accuracy)
        (True, 1.0)
    """

    feature_arguments = "queries", "documents", "hard_negatives"

    def __init__(
        self,
        *,
        symmetric: bool = False,
        false_negative_margin: float | None = None,
        tau_plus: float = 0.0,
        **options: Unpack[ScaleOptions],
    ) -> None:
        super().__init__(**options)
        check_flags(symmetric=symmetric)
        check_share("tau_plus", tau_plus)
        if false_negative_margin is not None:
            check_finite("false_negative_margin", false_negative_margin, "None keeps all columns")
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
        """Compute the loss of all queries; row i of queries and documents is a pair.

        Args:
            queries: (b, D) floating tensor.
            documents: (b, D) floating tensor.
            hard_negatives: (h, D), negatives of every query on every rank, such as the local
                features of a `FeatureQueue`; or (b, K, D), K for each query alone. As many on every
                rank.
            logit_scale: a scale of the caller's own in place of the module's.
            ids: (b,) integers of the documents, or (b + h,) of documents and hard negatives; a
                column with the id of a query's own document is not a negative.

        Raises:
            TypeError: features or ids of a wrong type.
            ValueError: shapes that do not fit together, or the whole batch is a single pair without
                hard negatives.
        """
        return self.prefixes(None, queries, documents, hard_negatives, logit_scale, ids=ids)[0]

    def prefixes(
        self,
        widths: Sequence[int] | None,
        queries: Tensor,
        documents: Tensor,
        hard_negatives: Tensor | None = None,
        logit_scale: Tensor | None = None,
        *,
        ids: Tensor | None = None,
    ) -> list[RetrievalOutput]:
        """Compute `forward`, or with widths that of each prefix; see `MatryoshkaLoss`."""
        batch = self._batch(widths, queries, documents, hard_negatives, ids)
        scale = self._scale_for(logit_scale, batch.queries, batch.columns)
        each = [batch] if widths is None else [batch.of_prefix(width) for width in widths]
        cosine = None
        if self.false_negative_margin is not None:
            cosines = [one.cosines(scale.dtype) for one in each]
            cosine = cosines[0] if widths is None else torch.stack(cosines)
        features, pairing = (batch.queries, batch.columns), batch.pairing(cosine, scale)
        statistics = self._statistics("info_nce_loss", *features, scale, pairing, widths)
        return [one.result(of_one, scale) for one, of_one in zip(each, statistics, strict=True)]

    def _batch(
        self,
        widths: Sequence[int] | None,
        queries: Tensor,
        documents: Tensor,
        hard_negatives: Tensor | None,
        ids: Tensor | None,
    ) -> RetrievalBatch:
        """Check everything; return the features of this rank with the ids of all ranks."""
        rules = RetrievalRules(ids, self.false_negative_margin, self.symmetric, self.tau_plus)
        columns, own = retrieval_columns(queries, documents, hard_negatives, rules)
        features = {"queries": queries, "documents": documents, "hard_negatives": hard_negatives}
        check_same_everywhere(self.group, **features, ids=ids)
        if hard_negatives is None:
            check_has_negatives(len(queries) * self.ranks.size)
        queries, columns, *rest = self._prepared(
            widths, queries, columns, *([] if own is None else [own])
        )
        rules = rules._replace(ids=None if ids is None else self._global_ids(ids, len(queries)))
        return RetrievalBatch(queries, columns, rest[0] if rest else None, rules, self.ranks)

    def _global_ids(self, ids: Tensor, rows: int) -> Tensor:
        """Gather ids: documents of all ranks first, then hard negatives of all ranks."""
        joined = self.ranks.joined
        return (
            torch.cat((joined(ids[:rows]), joined(ids[rows:]))) if len(ids) > rows else joined(ids)
        )
