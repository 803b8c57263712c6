"""Retrieval metrics on the features of a data set, without an N x N matrix.

N images, M texts, Q queries, C candidates, D feature width. Scores are dot products in fp32;
normalise the features first to get cosine similarity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.train.evaluation.features import Features, scores_of
from gradcache_clip.train.evaluation.ranking import (
    chance_of_hit,
    check_depths,
    check_features,
    check_ids,
    check_sizes,
    exact_fp32,
    ranks_of_best_right,
    recall_of,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class DirectionMetrics:
    """Retrieval metrics in one direction."""

    recall: Mapping[int, float]
    """k -> share of queries with a right candidate among the first k, 0 to 1."""
    chance: Mapping[int, float]
    """k -> expected recall of a random order."""
    median_rank: float
    """Median rank of the best right candidate, from 1; the lower of two middle ranks."""
    mean_rank: float
    queries: int
    candidates: int

    def to_scalars(self, name: str) -> dict[str, float]:
        """Return metrics as `NAME_recall_at_1`, `NAME_recall_at_1_chance`, `NAME_mean_rank`, ..."""
        scalars: dict[str, float] = {}
        for k, share in self.recall.items():
            scalars[f"{name}_recall_at_{k}"] = share
            scalars[f"{name}_recall_at_{k}_chance"] = self.chance[k]
        ranks = {f"{name}_median_rank": self.median_rank, f"{name}_mean_rank": self.mean_rank}
        return scalars | ranks


@dataclass(frozen=True)
class RetrievalMetrics:
    """Retrieval metrics in both directions."""

    image_to_text: DirectionMetrics
    text_to_image: DirectionMetrics

    def to_scalars(self) -> dict[str, float]:
        """Return metrics with the prefixes `image_to_text_` and `text_to_image_`, for a log."""
        return {
            **self.image_to_text.to_scalars("image_to_text"),
            **self.text_to_image.to_scalars("text_to_image"),
        }


class Retrieved(NamedTuple):
    """Best candidates of each query, best first."""

    scores: Float[Tensor, "q k"]
    indices: Int[Tensor, "q k"]


def recall_at_k(
    image_features: Features,
    text_features: Features,
    *,
    image_ids: Int[Tensor, " n"] | None = None,
    text_ids: Int[Tensor, " m"] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    tile: int = 1024,
) -> RetrievalMetrics:
    """Compute recall@k in both directions, for any number of right candidates per query.

        rank of a query = 1 + number of wrong candidates that score at least as
                          high as its best right one
        recall@k        = share of queries with rank <= k

    Ties, up to fp32 rounding, count against the model, so constant features score nothing. Memory
    beyond the features: O(N + M) plus a few tiles.

    Args:
        image_features: one row per image, any floating dtype and device; (N, D), or
            `TokenFeatures`, which have their own scores.
        text_features: one row per text, on the same device and of the same kind.
        image_ids, text_ids: integers, equal where image and text belong together: several captions
            per image, several images per caption. Without ids, row i of the images belongs to row i
            of the texts.
        ks: depths. Recall and chance are 1 for k of at least the number of candidates.
        tile: rows and columns of a block of the score matrix.

    Returns:
        Recall, chance level and ranks in both directions.

    Raises:
        ValueError: empty sets, shapes or ids that do not match, NaN or infinite features, an image
            without text or a text without image, or `ks` or `tile` below 1.

    Source:
        Karpathy and Fei-Fei 2015, section 4.2 (recall@k with several captions per image).

    Example:
        >>> features, owners = torch.eye(4), torch.tensor([0, 0, 1, 2, 3])
        >>> metrics = recall_at_k(features, features[owners],
        ...                       image_ids=torch.arange(4), text_ids=owners, ks=(1,))
        >>> metrics.text_to_image.recall[1], metrics.text_to_image.chance[1]
        (1.0, 0.25)
    """
    check_features("image_features", image_features, tile)
    check_features("text_features", text_features, tile)
    check_sizes("image_features", image_features, "text_features", text_features)
    images, texts = _ids(image_features, text_features, image_ids, text_ids)
    _check_partners(images, texts)
    return RetrievalMetrics(
        image_to_text=recall_of_queries(
            image_features, images, text_features, texts, ks=ks, tile=tile
        ),
        text_to_image=recall_of_queries(
            text_features, texts, image_features, images, ks=ks, tile=tile
        ),
    )


@torch.no_grad()
def retrieve(
    query_features: Features,
    candidate_features: Features,
    k: int,
    *,
    tile: int = 1024,
) -> Retrieved:
    """Find the k best candidates of each query, tile by tile; ties go to the lower index.

    Args:
        query_features: one row per query.
        candidate_features: one row per candidate.
        k: number of candidates per query; the result has min(k, C) columns.
        tile: rows and columns of a block of the score matrix.

    Raises:
        ValueError: empty sets, unequal widths, NaN or infinite features, or `k` below 1.

    Example:
        >>> retrieve(torch.eye(3)[:1], torch.eye(3), 2).indices
        tensor([[0, 1]])
    """
    check_features("query_features", query_features, tile)
    check_features("candidate_features", candidate_features, tile)
    check_sizes("query_features", query_features, "candidate_features", candidate_features)
    check_depths((k,))
    blocks = query_features.split(tile)
    with exact_fp32(query_features.device):
        parts = [_best(rows.float(), candidate_features, k, tile) for rows in blocks]
    return Retrieved(torch.cat([p.scores for p in parts]), torch.cat([p.indices for p in parts]))


def _best(queries: Features, candidates: Features, k: int, tile: int) -> Retrieved:
    scores = torch.empty(len(queries), 0, device=queries.device)
    indices = torch.empty_like(scores, dtype=torch.long)
    for start, columns in _numbered_tiles(candidates, tile):
        found = _first(scores_of(queries, columns), k)
        scores = torch.cat([scores, found.scores], dim=1)
        indices = torch.cat([indices, found.indices + start], dim=1)
        # Earlier tiles come first, so stable sorting keeps ties in index order.
        merged = _first(scores, k)
        scores, indices = merged.scores, indices.gather(1, merged.indices)
    return Retrieved(scores, indices)


def _numbered_tiles(rows: Features, tile: int) -> Iterable[tuple[int, Features]]:
    return zip(range(0, len(rows), tile), rows.split(tile), strict=True)


def _first(scores: Tensor, k: int) -> Retrieved:
    """Return the top k with ties in index order, which torch.topk does not guarantee."""
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    return Retrieved(ordered[:, :k], order[:, :k])


def _ids(
    images: Features, texts: Features, image_ids: Tensor | None, text_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ids of images and texts; without any, row numbers."""
    if (image_ids is None) != (text_ids is None):
        raise ValueError("image_ids, text_ids: expected both or none, got one; pass the other too")
    if image_ids is None or text_ids is None:
        if len(images) != len(texts):
            raise ValueError(
                f"text_features: expected {len(images)} rows, one per image, got {len(texts)}; "
                "pass image_ids= and text_ids=, equal where image and text belong together"
            )
        rows = torch.arange(len(images), device=images.device)
        return rows, rows
    check_ids("image_ids", image_ids, images)
    check_ids("text_ids", text_ids, texts)
    return image_ids.to(images.device), text_ids.to(images.device)


def _check_partners(image_ids: Tensor, text_ids: Tensor) -> None:
    for name, ids, others, partner in (
        ("image", image_ids, text_ids, "text"),
        ("text", text_ids, image_ids, "image"),
    ):
        alone = (~torch.isin(ids, others)).nonzero().flatten()
        if len(alone):
            raise ValueError(
                f"{name}_features: expected each {name} to have its {partner}, got {len(alone)} "
                f"without (first: row {int(alone[0])}); drop those rows or correct the ids"
            )


def recall_of_queries(
    queries: Features,
    query_ids: Int[Tensor, " q"],
    candidates: Features,
    candidate_ids: Int[Tensor, " c"],
    *,
    ks: Sequence[int] = (1, 5, 10),
    tile: int = 1024,
) -> DirectionMetrics:
    """Compute `recall_at_k` in one direction.

    Args:
        queries, candidates: features of Q and C samples, of one kind, on one device.
        query_ids, candidate_ids: integers, equal where query and candidate belong together.
        ks, tile: see `recall_at_k`.

    Raises:
        ValueError: see `recall_at_k`.
    """
    check_features("queries", queries, tile)
    check_features("candidates", candidates, tile)
    check_sizes("queries", queries, "candidates", candidates)
    ranks = ranks_of_best_right(queries, query_ids, candidates, candidate_ids, tile=tile)
    return DirectionMetrics(
        recall=recall_of(ranks, ks),
        chance={k: chance_of_hit(query_ids, candidate_ids, k) for k in ks},
        median_rank=float(ranks.median()),
        mean_rank=float(ranks.double().mean()),
        queries=len(queries),
        candidates=len(candidates),
    )
