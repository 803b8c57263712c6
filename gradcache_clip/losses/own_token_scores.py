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
from gradcache_clip.ops.late_interaction_tiles import TokenTiles

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_LOSS = "own_token_scores"


def own_token_scores(
    queries: Float[Tensor, "t d"], candidates: Float[Tensor, "u d"], rules: TokenRules, impl: str
) -> Float[Tensor, "b c"]:
    """Compute the scores of queries that look for C candidates of their own, query by query.

    `rules` hold the spans of b C candidates as images, and those of b queries as texts.
    """
    refuse_transforms(_LOSS, queries, candidates)
    scores: Tensor = _OwnScores.apply(queries, candidates, rules, impl)
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
    def forward(
        ctx: Any, queries: Tensor, candidates: Tensor, rules: TokenRules, impl: str
    ) -> Tensor:
        ctx.rules, ctx.impl = rules, impl
        ctx.save_for_backward(queries, candidates)
        with autocast_disabled(queries.device):
            tiles = _tiles(queries, candidates, rules, impl)
            found = [
                tiles.maxima(*pair, winners=False).text_to_image.gather(1, _query(tiles, *pair))
                for pair in tiles.pairs()
            ]
        return torch.cat(found).view(tiles.texts.samples, -1)

    @staticmethod
    def backward(ctx: Any, *doutput: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise second_derivative_refused(_LOSS)
        with autocast_disabled(doutput[0].device):
            queries, candidates = ctx.saved_tensors
            tiles = _tiles(queries, candidates, ctx.rules, ctx.impl)
            found = _gradients(tiles, doutput[0].reshape(-1, 1), ctx.needs_input_grad[:2])
        pairs = zip(found, ctx.saved_tensors, strict=True)
        dq, dc = (None if each is None else each.to(given.dtype) for each, given in pairs)
        return dq, dc, None, None


def _gradients(
    tiles: TokenTiles, dscores: Float[Tensor, "n 1"], needs: tuple[bool, bool]
) -> list[Tensor | None]:
    """Compute the gradients of queries and candidates, where needed, from those of the scores."""
    sides, largest = (tiles.texts, tiles.images), dscores.abs().amax()
    # Gradients of scores stay within 16 bits.
    factor = largest.where(largest > 0, 1)
    into = [
        side.zeros(side.all) if needed else None for side, needed in zip(sides, needs, strict=True)
    ]
    for own, queries in tiles.pairs():
        maxima = tiles.maxima(own, queries, winners=True)
        place, found = _query(tiles, own, queries), torch.zeros_like(maxima.text_to_image)
        found.scatter_(1, place, dscores[own] / factor)
        dqueries, dcandidates = (
            None if each is None else each[side.at(where)]
            for each, side, where in zip(into, sides, (queries, own), strict=True)
        )
        tiles.add_gradients((own, queries), maxima, (None, found), (dcandidates, dqueries))
    unscale = factor / tiles.panels.gradient_scale
    return [
        None if each is None else side.of_given(each.mul_(unscale), side.given.dtype)
        for each, side in zip(into, sides, strict=True)
    ]


def _query(tiles: TokenTiles, own: slice, queries: slice) -> Int[Tensor, "n 1"]:
    """Return which of these queries each of these candidates belongs to."""
    candidate = torch.arange(own.start, own.stop, device=tiles.images.weight.device)
    each = tiles.images.samples // tiles.texts.samples
    return (candidate // each - queries.start)[:, None]


def _tiles(queries: Tensor, candidates: Tensor, rules: TokenRules, impl: str) -> TokenTiles:
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return TokenPasses(impl).tiles(candidates[None], queries[None], dtype, rules)
