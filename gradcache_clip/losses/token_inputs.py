"""What a loss over tokens is given, and who competes by it over all ranks.

b queries on this rank, K hard negatives of each.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from gradcache_clip.distributed.exchange import Ranks
from gradcache_clip.losses.retrieval_arguments import RowArguments, check_vectors
from gradcache_clip.losses.token_batch import GivenTokens, check_token_inputs
from gradcache_clip.ops.pairing import Pairing


class TokenInputs(NamedTuple):
    """Tokens and what is said of each query beside them, with the names of retrieval."""

    queries: GivenTokens
    documents: GivenTokens
    negatives: GivenTokens | None
    further: RowArguments

    def check(self) -> None:
        """Raise unless all of it fits together."""
        check_token_inputs(*self[:3])
        K = 0 if self.negatives is None else self.negatives.samples[1]
        check_vectors(self.queries.tokens, (self.queries.samples[0], K), self.further)

    @property
    def dtype(self) -> torch.dtype:
        dtypes = (each.tokens.dtype for each in self[:3] if each is not None)
        return reduce(torch.promote_types, dtypes)

    def own_bias(self, candidates: slice) -> Tensor | None:
        """Return the bias of the document (0) and the hard negatives of each query, (b, C)."""
        bias = self.further.column_bias
        return None if bias is None else bias.view(len(bias), -1)[:, candidates]


def vectors_of(further: RowArguments) -> dict[str, Tensor | None]:
    """Return what all ranks must pass, or none, by its name."""
    names = "ids", "groups", "column_bias", "row_weights"
    return {name: getattr(further, name) for name in names}


def token_pairing(further: RowArguments, shared: int, dtype: torch.dtype, ranks: Ranks) -> Pairing:
    """Return the rules of all queries (rows), and of all documents and hard negatives (columns).

    Columns lie rank by rank: documents, then `shared` hard negatives of each query.
    """
    ids, groups, bias = further.ids, further.groups, further.column_bias
    if bias is not None:
        bias = bias.to(dtype).view(len(bias), -1)[:, : 1 + shared]
    return Pairing(
        row_ids=_joined(ids, ranks),
        column_ids=_joined(ids, ranks, 1 + shared),
        row_groups=_joined(groups, ranks),
        column_groups=_joined(groups, ranks, 1 + shared),
        column_bias=_joined(bias, ranks, 1 + shared),
    )


def _joined(values: Tensor | None, ranks: Ranks, candidates: int = 1) -> Tensor | None:
    """Gather a number for each candidate of each query, all documents of a rank first."""
    if values is None:
        return None
    of_candidates = values.view(len(values), -1).expand(-1, candidates)
    return ranks.joined(torch.cat((of_candidates[:, 0], of_candidates[:, 1:].flatten())))
