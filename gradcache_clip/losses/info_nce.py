"""InfoNCE as a module. b: queries of this rank, B: of all ranks, D: width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache_clip.distributed.collectives import gather_rows
from gradcache_clip.losses.scaled import ScaledLoss, check_rows
from gradcache_clip.ops import Impl, info_nce_loss_with_accuracy
from gradcache_clip.ops.arguments import check_integers, check_share
from gradcache_clip.ops.matryoshka import info_nce_prefix_losses


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
    ) -> None:
        super().__init__(
            init_logit_scale=init_logit_scale,
            max_logit_scale=max_logit_scale,
            normalize=normalize,
            impl=impl,
            group=group,
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
            hard_negatives: (h, D), negatives of every query, such as the rows of a `FeatureQueue`;
                or (b, K, D), K for each query alone. As many on every rank.
            logit_scale: a scale of the caller's own in place of the module's.
            ids: (b,) integers of the documents, or (b + h,) of documents and hard negatives; a
                column with the id of a query's own document is no negative.

        Raises:
            TypeError: features or ids of a wrong type.
            ValueError: shapes that do not fit together.
        """
        features, options = self._global(
            self._global_features, queries, documents, hard_negatives, ids
        )
        scale = self._bounded_scale(logit_scale)
        return RetrievalOutput(*info_nce_loss_with_accuracy(*features, scale, **options))

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
        features, options = self._global(
            partial(gather_rows, group=self.group), queries, documents, hard_negatives, ids
        )
        scale = self._bounded_scale(logit_scale)
        results = info_nce_prefix_losses(*features, scale, widths, **options)
        return [RetrievalOutput(*result) for result in results]

    def _global(
        self,
        gather: Callable[[Tensor], Tensor],
        queries: Tensor,
        documents: Tensor,
        hard_negatives: Tensor | None,
        ids: Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Features and options of all ranks, after checks."""
        check_rows(queries=queries, documents=documents)
        rows = columns = len(queries)
        if hard_negatives is not None and hard_negatives.dim() == 2:
            columns += len(hard_negatives)
        if ids is not None:
            check_integers("ids", ids, (rows, columns), queries.device)
        return (gather(queries), gather(documents)), {
            "hard_negatives": None if hard_negatives is None else gather(hard_negatives),
            "ids": None if ids is None else self._global_ids(ids, rows),
            "false_negative_margin": self.false_negative_margin,
            "symmetric": self.symmetric,
            "tau_plus": self.tau_plus,
            "impl": self.impl,
        }

    def _global_ids(self, ids: Tensor, rows: int) -> Tensor:
        """Documents of all ranks first, then hard negatives of all ranks, as the columns are."""
        documents = self._global_integers(ids[:rows])
        if len(ids) == rows:
            return documents
        return torch.cat((documents, self._global_integers(ids[rows:])))
