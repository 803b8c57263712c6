"""The passes over tiles that a retrieval loss is made of, one for each direction.

b queries on this rank, B on all, K hard negatives of each query, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradcache_clip.distributed.collectives import gather_rows, with_summed_gradient
from gradcache_clip.distributed.exchange import Ranks
from gradcache_clip.losses.competitors import Competitors, with_gradient_times
from gradcache_clip.ops.info_nce import own_negative_logits
from gradcache_clip.ops.pairing import Pairing, Statistics
from gradcache_clip.ops.softmax import columns_of, rows_of
from gradcache_clip.ops.unit import wide_unit

DIRECTIONS = "query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"

GetStatistics = Callable[[Tensor, Tensor, Tensor, Pairing], list[Statistics]]
"""From q, k, the scale and the rules of all ranks; one for all features, or one for each prefix."""


class Hardness(NamedTuple):
    """What is added to a logit for each unit of its similarity, a constant to autograd."""

    in_batch: float = 0.0
    own: float = 0.0
    """Of a query's own hard negatives."""


class Compared(NamedTuple):
    """The logits of the pairs, and what competes with them in each direction."""

    positive: Tensor
    """(B,), of all ranks."""
    directions: dict[str, Competitors]


class RowRules(NamedTuple):
    """What is known of every query and its candidates, on all ranks; constants but for the bias."""

    ids: Tensor | None = None
    """(B,) integers; equal ones are no negatives of each other."""
    groups: Tensor | None = None
    """(B,) integers; only rows of one group compete."""
    bias: Tensor | None = None
    """(1 + K, B), added to the logits of the document and of each hard negative."""
    guide: Tensor | None = None
    """(2 + K, G, B), another model's query, document and hard negatives."""
    threshold: Tensor | None = None
    """(B,), the product of guides above which a candidate is no negative."""


class _Side(NamedTuple):
    """The rules of the rows, or of the columns, of one contrast."""

    ids: Tensor | None
    groups: Tensor | None
    bias: Tensor | None
    guide: Tensor | None
    threshold: Tensor | None


@dataclass(frozen=True)
class RetrievalContrasts:
    """The features of one rank, and who competes with whom.

    Attributes:
        negatives: (b, K, D).
        shared: whether the negatives of a query compete for the others, too.
        negatives_in_doc_to_doc: whether shared negatives also compete with the documents.
        widths: of prefixes; () for all features.
    """

    statistics: GetStatistics
    ranks: Ranks
    queries: Tensor
    documents: Tensor
    negatives: Tensor | None
    logit_scale: Tensor
    rules: RowRules
    hardness: Hardness
    directions: Sequence[str]
    shared: bool
    in_batch: bool
    widths: Sequence[int]
    negatives_in_doc_to_doc: bool = True

    def compared(self) -> list[Compared]:
        """Compute all of it for all features, or for each prefix."""
        found = self._query_to_doc() if self.in_batch else self._own_alone()
        further = {
            "doc_to_query": self._doc_to_query,
            "query_to_query": self._query_to_query,
            "doc_to_doc": self._doc_to_doc,
        }
        for name, compute in further.items():
            if name in self.directions and name not in found[0].directions:
                for each, competitors in zip(found, compute(), strict=True):
                    each.directions[name] = competitors
        return found

    def _query_to_doc(self) -> list[Compared]:
        """Also the other way, which costs nothing unless hardness weighs this one."""
        extra, scale = self.hardness.in_batch, self.logit_scale + self.hardness.in_batch
        share = (self.logit_scale / scale).detach()
        q, k = self.queries, self._columns()
        if extra:
            # A logit grows by extra * similarity, through which no gradient flows.
            q, k = with_gradient_times(q, share), with_gradient_times(k, share)
        both_ways = "doc_to_query" in self.directions and not extra
        columns = self._of_candidates(self._shared_negatives, owned=self._own_excluded)
        rules = self._pairing(self._of_queries(), columns)
        statistics = self.statistics(q, k, scale, rules._replace(both_ways=both_ways))
        rows = [rows_of(each) for each in statistics]
        found = [
            Compared(each.positive, {"query_to_doc": Competitors.of(each, with_positive=True)})
            for each in rows
        ]
        for each, one in zip(found, statistics if both_ways else [], strict=both_ways):
            back = Competitors.of(columns_of(one), with_positive=True)
            each.directions["doc_to_query"] = back
        return self._with_own(self._with_positive(found, share) if extra else found)

    def _own_alone(self) -> list[Compared]:
        """A query's own negatives, and nothing of the batch."""
        logits = self._positives()
        nothing = [torch.full_like(each[:, 0], -torch.inf) for each in logits]
        found = [
            Compared(each[:, 0], {"query_to_doc": Competitors(none, none, with_positive=True)})
            for each, none in zip(logits, nothing, strict=True)
        ]
        return self._with_own(found)

    def _with_positive(self, found: list[Compared], share: Tensor) -> list[Compared]:
        """Replace the logits of the pairs, which hardness does not weigh."""
        plain = []
        for (weighed, directions), logits in zip(found, self._positives(), strict=True):
            positive, against = logits[:, 0], directions["query_to_doc"]
            # The hardest negative as far from the pair as if hardness weighed neither.
            hardest = positive.detach() + share * (against.hardest - weighed.detach())
            directions["query_to_doc"] = against._replace(hardest=hardest)
            plain.append(Compared(positive, directions))
        return plain

    def _with_own(self, found: list[Compared]) -> list[Compared]:
        """Add the negatives of each query alone, where they are no columns for all."""
        if self.negatives is None or not self._own_apart:
            return found
        left_out = self._guided_negatives()
        for each, logits in zip(found, self._logits(self.negatives), strict=True):
            plain = logits.detach()
            harder = logits + self.hardness.own * plain / self.logit_scale.detach()
            if self.rules.bias is not None:
                bias = self.rules.bias[1:].T
                harder, plain = harder + bias, plain + bias.detach()
            if left_out is not None:
                harder = harder.masked_fill(left_out, -torch.inf)
                plain = plain.masked_fill(left_out, -torch.inf)
            before = each.directions["query_to_doc"]
            each.directions["query_to_doc"] = before.joined(harder, plain.amax(1))
        return found

    def _guided_negatives(self) -> Tensor | None:
        """Mask the (B, K) negatives that the guide takes for right answers."""
        guide, threshold = self.rules.guide, self.rules.threshold
        if guide is None or threshold is None:
            return None
        return torch.einsum("gb,kgb->bk", guide[0], guide[2:]) > threshold[:, None]

    def _doc_to_query(self) -> list[Competitors]:
        rows = self._of_candidates(0)
        rules = self._pairing(rows, self._of_queries())
        found = self._against(self.documents, self.queries, rules, with_positive=True)
        # All that competes for a document has its bias, as its positive has.
        return found if rows.bias is None else [each.plus(rows.bias) for each in found]

    def _query_to_query(self) -> list[Competitors]:
        return self._among(self.queries, self._of_queries())

    def _doc_to_doc(self) -> list[Competitors]:
        """All documents of other queries."""
        K = self._shared_negatives
        if not (K and self.negatives_in_doc_to_doc):
            return self._among(self.documents, self._of_candidates(0))
        sides = (self._of_candidates(each, owned=True) for each in (0, K))
        rules = self._pairing(*sides).without_positives(self._pairs, self._pairs * (1 + K))
        return self._against(self.documents, self._columns(), rules)

    def _among(self, features: Tensor, side: _Side) -> list[Competitors]:
        """Compare rows with each other; none has a positive."""
        rules = self._pairing(side, side).without_positives(self._pairs, self._pairs)
        rules = rules._replace(self_contrast=side.bias is None)
        if side.bias is not None:
            # A bias of columns alone is not symmetric: the row itself is left out by its id.
            numbers = self._ids(owned=True)
            rules = rules._replace(row_ids=numbers, column_ids=numbers)
        return self._against(features, features, rules)

    def _against(
        self, rows: Tensor, columns: Tensor, rules: Pairing, *, with_positive: bool = False
    ) -> list[Competitors]:
        statistics = self.statistics(rows, columns, self.logit_scale, rules)
        return [Competitors.of(rows_of(each), with_positive=with_positive) for each in statistics]

    def _columns(self) -> Tensor:
        if self.negatives is None or not self.shared:
            return self.documents
        return torch.cat((self.documents, self.negatives.flatten(0, 1)))

    @property
    def _shared_negatives(self) -> int:
        """How many of each query are columns for all."""
        return 0 if self.negatives is None or not self.shared else self.negatives.shape[1]

    def _pairing(self, rows: _Side, columns: _Side) -> Pairing:
        """Return the rules of one direction."""
        return Pairing(
            row_ids=rows.ids,
            column_ids=columns.ids,
            row_groups=rows.groups,
            column_groups=columns.groups,
            column_bias=columns.bias,
            row_guide=rows.guide,
            column_guide=columns.guide,
            row_guide_threshold=rows.threshold,
            column_guide_threshold=columns.threshold,
            both_ways=False,
        )

    def _of_queries(self) -> _Side:
        guide = self.rules.guide
        ids, groups = self._ids(owned=self._own_excluded), self.rules.groups
        return _Side(ids, groups, None, None if guide is None else guide[0], self.rules.threshold)

    def _of_candidates(self, K: int, *, owned: bool = False) -> _Side:
        """Documents, then K negatives of each query, query by query."""
        ids, (_, groups, bias, guide, limit) = self._ids(owned=owned), self.rules
        if bias is not None:
            bias = torch.cat((bias[0], bias[1 : 1 + K].T.flatten()))
        if guide is not None:
            guide = torch.cat((guide[1], guide[2 : 2 + K].permute(1, 2, 0).flatten(1)), 1)
        # A negative is nobody's pair: nothing exceeds its threshold.
        limit = None if limit is None else pad(limit, (0, K * len(limit)), value=torch.inf)
        return _Side(_spread(ids, K), _spread(groups, K), bias, guide, limit)

    def _ids(self, *, owned: bool) -> Tensor | None:
        """Return the ids of the queries; their numbers if they must have one."""
        if self.rules.ids is None and owned:
            return torch.arange(self._pairs, device=self.queries.device)
        return self.rules.ids

    @property
    def _own_apart(self) -> bool:
        """Whether the hard negatives of a query meet it outside of the tiles."""
        of_one_id = self.rules.ids is not None
        return not self.shared or of_one_id or self.hardness.own != self.hardness.in_batch

    @property
    def _own_excluded(self) -> bool:
        """Whether shared negatives compete with their own query apart."""
        return self._shared_negatives > 0 and self._own_apart

    @property
    def _pairs(self) -> int:
        return len(self.queries) * self.ranks.size

    def _positives(self) -> list[Tensor]:
        """Compute the (B, 1) logits of the pairs."""
        logits, bias = self._logits(self.documents[:, None]), self.rules.bias
        return logits if bias is None else [each + bias[0, :, None] for each in logits]

    def _logits(self, candidates: Tensor) -> list[Tensor]:
        """Compute (B, K) logits of all ranks' queries with (b, K, D) candidates of their own."""
        # Each rank scales the logits of its own rows alone.
        scale = with_summed_gradient(self.logit_scale, self.ranks.group)
        pairs = [(self.queries, candidates)]
        if self.widths:
            pairs = [(wide_unit(self.queries, w), wide_unit(candidates, w)) for w in self.widths]
        return [
            gather_rows(own_negative_logits(q, own, scale), self.ranks.group) for q, own in pairs
        ]


def _spread(values: Tensor | None, K: int) -> Tensor | None:
    """Append, for K candidates of each row, what its row has."""
    return None if values is None else torch.cat((values, values.repeat_interleave(K)))
