"""Queries, documents and hard negatives of one rank, and the rules that hold over all ranks.

W ranks, b queries and h shared hard negatives on each, D feature width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradcache_clip.distributed.collectives import gather_rows, with_summed_gradient
from gradcache_clip.distributed.exchange import Ranks
from gradcache_clip.ops.info_nce import (
    RetrievalRules,
    info_nce_result,
    own_negative_logits,
    pair_products,
    retrieval_pairing,
)
from gradcache_clip.ops.pairing import Pairing, Statistics
from gradcache_clip.ops.results import RetrievalOutput
from gradcache_clip.ops.unit import wide_unit


class RetrievalBatch(NamedTuple):
    """The inputs of an InfoNCE loss, checked."""

    queries: Tensor
    """(b, D) of this rank."""
    columns: Tensor
    """(b + h, D) of this rank: documents, then shared hard negatives."""
    own: Tensor | None
    """(b, K, D), negatives of one query each, on this rank."""
    rules: RetrievalRules
    """Its ids are those of all ranks, documents first."""
    ranks: Ranks

    def of_prefix(self, width: int) -> RetrievalBatch:
        """Cut all features to their first `width` entries, and normalise them."""
        queries, columns = wide_unit(self.queries, width), wide_unit(self.columns, width)
        own = None if self.own is None else wide_unit(self.own, width)
        return self._replace(queries=queries, columns=columns, own=own)

    def cosines(self, dtype: torch.dtype) -> Tensor:
        """Return the similarity of each query of all ranks to its document."""
        documents = self.columns[: len(self.queries)]
        return self.ranks.joined(pair_products(self.queries, documents, dtype))

    def pairing(self, cosine: Tensor | None, logit_scale: Tensor) -> Pairing:
        """Return the rules of all ranks' rows and columns, documents before hard negatives."""
        W = self.ranks.size
        rows, columns = len(self.queries) * W, len(self.columns) * W
        return retrieval_pairing(cosine, rows, columns, logit_scale, self.rules)

    def result(self, statistics: Statistics, logit_scale: Tensor) -> RetrievalOutput:
        """Compute loss and accuracies of all ranks."""
        columns, own_logits = len(self.columns) * self.ranks.size, None
        if self.own is not None:
            # Each rank scales the logits of its own rows alone.
            scale = with_summed_gradient(logit_scale, self.ranks.group)
            logits = own_negative_logits(self.queries, self.own, scale)
            own_logits = gather_rows(logits, self.ranks.group)
        return info_nce_result(statistics, own_logits, columns, logit_scale, self.rules)
