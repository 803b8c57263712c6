"""Checks what a `RetrievalLoss` is given, and gathers what it must know of all ranks.

b queries on this rank, B on all, K hard negatives of each query, D width, G width of a guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache_clip.distributed.collectives import check_same_everywhere, gather_rows
from gradcache_clip.distributed.exchange import Ranks
from gradcache_clip.losses.options import check_choice, check_finite, check_positive_int
from gradcache_clip.losses.retrieval_contrasts import DIRECTIONS, RowRules
from gradcache_clip.ops.arguments import (
    check_features,
    check_floating,
    check_integers,
    check_pairs,
    check_same_device,
)
from gradcache_clip.ops.groups import dense_groups

Guide = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


class RowArguments(NamedTuple):
    """What may be said of each query beside its features."""

    negatives_per_query: int | None
    ids: Tensor | None
    groups: Tensor | None
    column_bias: Tensor | None
    guide: Guide | None
    row_weights: Tensor | None


def check_options(
    directions: Sequence[str], partition_mode: str, hardness_mode: str | None, strength: float
) -> None:
    several = isinstance(directions, (list, tuple)) and all(d in DIRECTIONS for d in directions)
    if not several or "query_to_doc" not in directions:
        raise ValueError(
            f"directions: expected query_to_doc, and any of {', '.join(DIRECTIONS[1:])}, got "
            f"{directions!r}; pass a tuple of names"
        )
    check_choice("partition_mode", partition_mode, ("joint", "per_direction"))
    without = sorted(set(directions) & {"query_to_query", "doc_to_doc"})
    if partition_mode == "per_direction" and without:
        raise ValueError(
            f'partition_mode: expected "joint" with {" and ".join(without)}, got "per_direction"; '
            "a softmax without the positive would reward any drift of its negatives"
        )
    modes = None, "in_batch_negatives", "hard_negatives", "all_negatives"
    check_choice("hardness_mode", hardness_mode, modes)
    check_finite("hardness_strength", strength, "such as 9.0")
    if strength < 0 or (strength > 0 and hardness_mode is None):
        raise ValueError(
            f"hardness_strength: expected 0 or more, and 0 without a hardness_mode, got {strength}"
        )


def negatives_of(
    queries: Tensor, documents: Tensor, hard_negatives: Tensor | None, per_query: int | None
) -> Tensor | None:
    """Check all features; return the hard negatives as (b, K, D)."""
    check_pairs(("queries", "documents"), queries, documents)
    if hard_negatives is None:
        if per_query is not None:
            raise ValueError(
                f"negatives_per_query: expected None without hard_negatives, got {per_query}"
            )
        return None
    check_floating("hard_negatives", hard_negatives)
    check_same_device(("queries", "hard_negatives"), queries, hard_negatives)
    (b, D), shape = queries.shape, tuple(hard_negatives.shape)
    if per_query is not None:
        check_positive_int("negatives_per_query", per_query, "pass the K of (b * K, D) negatives")
    if per_query is not None and shape == (b * per_query, D):
        return hard_negatives.unflatten(0, (b, per_query))
    if per_query is not None or len(shape) != 3 or shape != (b, shape[1], D) or shape[1] == 0:
        raise ValueError(
            f"hard_negatives: expected ({b}, K, {D}), or ({b} * K, {D}) query by query with "
            f"negatives_per_query=K, got {shape} with negatives_per_query={per_query}; negatives "
            "that belong to no query, such as those of a queue, go to InfoNCELoss"
        )
    return hard_negatives


def check_rows(
    group: dist.ProcessGroup | None,
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None,
    given: RowArguments,
) -> None:
    """Raise unless all of it fits the queries, here and on every other rank."""
    K = 0 if negatives is None else negatives.shape[1]
    check_vectors(queries, (len(queries), K), given, learned_bias=True)
    if given.guide is not None:
        _check_guide(given.guide, queries, K)
    check_same_everywhere(
        group,
        queries=queries,
        documents=documents,
        hard_negatives=negatives,
        ids=given.ids,
        groups=given.groups,
        column_bias=given.column_bias,
        row_weights=given.row_weights,
        guide=None if given.guide is None else given.guide[0],
    )


def check_vectors(
    queries: Tensor, samples: tuple[int, int], given: RowArguments, *, learned_bias: bool = False
) -> None:
    """Raise unless ids, groups, bias and weights fit b queries with K hard negatives each."""
    b, K = samples
    for name in ("ids", "groups"):
        values = getattr(given, name)
        if values is not None:
            check_integers(name, values, (b,), queries.device)
    if given.row_weights is not None:
        _check_numbers("row_weights", given.row_weights, ((b,),), queries)
        _check_constant("row_weights", given.row_weights)
    if given.column_bias is not None:
        shapes = ((b,), (b, 1)) if K == 0 else ((b, 1 + K),)
        _check_numbers("column_bias", given.column_bias, shapes, queries)
        if not learned_bias:
            _check_constant("column_bias", given.column_bias)


def _check_numbers(
    name: str, values: Tensor, shapes: Sequence[tuple[int, ...]], queries: Tensor
) -> None:
    check_floating(name, values)
    if tuple(values.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(
            f"{name}: expected shape {expected}, got {tuple(values.shape)}; one number for each "
            + ("query" if name == "row_weights" else "document, then for each of its negatives")
        )
    check_same_device(("queries", name), queries, values)


def _check_constant(name: str, values: Tensor) -> None:
    if values.requires_grad:
        raise ValueError(
            f"{name}: expected constants, got a tensor that requires a gradient; pass "
            f"{name}.detach()"
        )


def _check_guide(guides: Sequence[Tensor], queries: Tensor, K: int) -> None:
    b = len(queries)
    parts = ("queries", "documents", "hard negatives")[: 2 + (K > 0)]
    several = isinstance(guides, (list, tuple))
    if not several or len(guides) != len(parts):
        raise ValueError(
            f"guide: expected features of {', '.join(parts)} by the guide, got "
            f"{len(guides) if several else type(guides).__name__}; pass a tuple, one for each input"
        )
    check_features("guide", guides[0])
    G = guides[0].shape[-1]
    for part, each in zip(parts, guides, strict=True):
        shape = (b, K, G) if part == "hard negatives" else (b, G)
        check_floating("guide", each)
        if tuple(each.shape) != shape or each.requires_grad:
            raise ValueError(
                f"guide: expected constant {part} of shape {shape}, got {tuple(each.shape)}"
                f"{', which require a gradient' if each.requires_grad else ''}; embed the batch "
                "with the guide under torch.no_grad(), normalised"
            )
        check_same_device(("queries", "guide"), queries, each)


def rules_of(
    ranks: Ranks, given: RowArguments, dtype: torch.dtype, margin: float, *, relative: bool
) -> RowRules:
    """Gather what all ranks say of their queries."""
    joined = ranks.joined
    ids = None if given.ids is None else dense_groups(joined(given.ids))
    groups = None if given.groups is None else joined(given.groups)
    bias = None
    if given.column_bias is not None:
        own = given.column_bias.to(dtype).reshape(len(given.column_bias), -1)
        bias = gather_rows(own, ranks.group).T if own.requires_grad else joined(own.T)
    if given.guide is None:
        return RowRules(ids, groups, bias)
    queries, documents, *negatives = (each.to(dtype) for each in given.guide)
    further = [each.permute(1, 2, 0) for each in negatives]
    guide = joined(torch.cat((torch.stack((queries.T, documents.T)), *further)))
    pairs = torch.linalg.vecdot(guide[0], guide[1], dim=0)
    threshold = pairs - margin * (pairs.abs() if relative else 1.0)
    # Copies of a document tie with it: the rounding of a tile must not choose among them.
    return RowRules(ids, groups, bias, guide, threshold + 8 * torch.finfo(dtype).eps)
