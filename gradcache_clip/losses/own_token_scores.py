"""Late-interaction scores of each query with candidates of its own, in tiles.

b queries, C candidates of each, D feature width. 2 Q R D flops for each score of Q query and R
candidate tokens, and as much again in the backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradcache_clip.ops.implementations import (
    autocast_disabled,
    refuse_transforms,
    second_derivative_refused,
)
from gradcache_clip.ops.late_interaction_op import TokenPasses, TokenRules
from gradcache_clip.ops.late_interaction_reference import DenseTokens, best_match
from gradcache_clip.ops.late_interaction_tiled import TorchTiles

if TYPE_CHECKING:
    from jaxtyping import Float

_LOSS = "own_token_scores"


def own_token_scores(
    queries: Float[Tensor, "t d"], candidates: Float[Tensor, "u d"], rules: TokenRules
) -> Float[Tensor, "b c"]:
    """Compute the scores of queries that look for C candidates of their own, query by query.

    `rules` hold the spans of b C candidates as images, and those of b queries as texts.
    """
    refuse_transforms(_LOSS, queries, candidates)
    scores: Tensor = _OwnScores.apply(queries, candidates, rules)
    return scores


def own_token_scores_reference(
    queries: DenseTokens, candidates: DenseTokens
) -> Float[Tensor, "b c"]:
    """Compute the scores of b queries that look for C candidates of their own, query by query."""
    own, found = (each.unflatten(0, (len(queries.values), -1)) for each in candidates[:2])
    similarity = torch.einsum("bqd,bcrd->bcqr", queries.values, own)
    return (best_match(similarity, found[:, :, None], dim=3) * queries.weight[:, None]).sum(2)


class _OwnScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, candidates: Tensor, rules: TokenRules) -> Tensor:
        ctx.rules = rules
        ctx.save_for_backward(queries, candidates)
        with autocast_disabled(queries.device):
            tiles = _tiles(queries, candidates, rules)
            found = [tiles.maxima(*pair, winners=False).text_to_image for pair in tiles.pairs()]
        return torch.cat(found).view(tiles.texts.samples, -1)

    @staticmethod
    def backward(ctx: Any, *doutput: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise second_derivative_refused(_LOSS)
        needs, dscores = ctx.needs_input_grad[:2], doutput[0].reshape(-1, 1)
        with autocast_disabled(dscores.device):
            queries, candidates = ctx.saved_tensors
            tiles = _tiles(queries, candidates, ctx.rules)
            sides = tiles.texts, tiles.images
            dqueries, dcandidates = (
                torch.zeros_like(side.values, dtype=dscores.dtype) if needed else None
                for side, needed in zip(sides, needs, strict=True)
            )
            for own, query in tiles.pairs():
                into = (
                    None if dcandidates is None else dcandidates[tiles.images.at(own)],
                    None if dqueries is None else dqueries[tiles.texts.at(query)],
                )
                maxima = tiles.maxima(own, query, winners=True)
                tiles.add_gradients((own, query), maxima, (None, dscores[own]), into)
        pairs = zip((dqueries, dcandidates), ctx.saved_tensors, strict=True)
        dq, dc = (None if each is None else each.to(given.dtype) for each, given in pairs)
        return dq, dc, None


def _tiles(queries: Tensor, candidates: Tensor, rules: TokenRules) -> TorchTiles:
    dtype = torch.promote_types(queries.dtype, torch.float32)
    tiles = TokenPasses("tiled").tiles(candidates[None], queries[None], dtype, rules)
    assert isinstance(tiles, TorchTiles)
    return tiles
