"""InfoNCE for retrieval: queries against documents and hard negatives.

B queries, H shared and K own hard negatives, D feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.arguments import (
    check_floating,
    check_integers,
    check_pairs,
    check_same_device,
    check_share,
    scalar_tensor,
)
from gradcache_clip.ops.contrast import contrast_statistics
from gradcache_clip.ops.groups import dense_groups, occurrences
from gradcache_clip.ops.implementations import Impl, autocast_disabled
from gradcache_clip.ops.pairing import Pairing, Statistics
from gradcache_clip.ops.softmax import (
    Direction,
    columns_of,
    debiased_gap,
    negative_gap,
    one_positive_loss,
    rows_of,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class InfoNCEResult(NamedTuple):
    """Loss and rank-1 accuracies of a batch, as 0-dim tensors; the accuracies carry no gradient."""

    loss: Float[Tensor, ""]
    query_to_document_accuracy: Float[Tensor, ""]
    document_to_query_accuracy: Float[Tensor, ""] | None
    """None unless the loss is symmetric."""


def info_nce_loss(
    queries: Float[Tensor, "b d"],
    documents: Float[Tensor, "b d"],
    logit_scale: float | Float[Tensor, ""],
    *,
    hard_negatives: Float[Tensor, "h d"] | Float[Tensor, "b k d"] | None = None,
    ids: Int[Tensor, " b"] | Int[Tensor, " b+h"] | None = None,
    false_negative_margin: float | None = None,
    symmetric: bool = False,
    tau_plus: float = 0.0,
    impl: Impl = "auto",
) -> Float[Tensor, ""]:
    """The loss of `info_nce_loss_with_accuracy` alone; same arguments, errors and source.

    Example:
        >>> import torch
        >>> from gradcache_clip.ops import info_nce_loss
        >>> queries, documents = torch.eye(4), torch.eye(4)
        >>> print(f"{info_nce_loss(queries, documents, 2.0):.4f}")
        0.3408
        >>> print(f"{info_nce_loss(queries, documents, 2.0, hard_negatives=-documents):.4f}")
        0.6045
    """
    return info_nce_loss_with_accuracy(
        queries,
        documents,
        logit_scale,
        hard_negatives=hard_negatives,
        ids=ids,
        false_negative_margin=false_negative_margin,
        symmetric=symmetric,
        tau_plus=tau_plus,
        impl=impl,
    ).loss


def info_nce_loss_with_accuracy(
    queries: Float[Tensor, "b d"],
    documents: Float[Tensor, "b d"],
    logit_scale: float | Float[Tensor, ""],
    *,
    hard_negatives: Float[Tensor, "h d"] | Float[Tensor, "b k d"] | None = None,
    ids: Int[Tensor, " b"] | Int[Tensor, " b+h"] | None = None,
    false_negative_margin: float | None = None,
    symmetric: bool = False,
    tau_plus: float = 0.0,
    impl: Impl = "auto",
) -> InfoNCEResult:
    """Cross-entropy of each query over all documents of the batch and the hard negatives.

    With columns k = [documents; hard_negatives] and S = logit_scale * queries @ k.T:

        loss = mean_i (logsumexp_j S_ij - S_ii)

    and, if symmetric, the mean of that and of the same for each document over all queries. "tiled"
    and "triton" never hold S. Shared hard negatives are appended to the documents, which copies
    both once.

    Args:
        queries: (B, D) fp16, bf16, fp32 or fp64, taken as it is: L2-normalise first for cosine
            similarities.
        documents: (B, D) on the same device; row i is the positive of query i.
        logit_scale: multiplier of the similarities (1/temperature, already exponentiated).
        hard_negatives: (H, D), negatives of every query (also what a momentum queue holds), or
            (B, K, D), K negatives for each query alone.
        ids: (B,) integers of the documents, or (B + H,) of documents and shared hard negatives. A
            column whose id is that of a query's own document is no negative of this query.
        false_negative_margin: columns whose logit exceeds the positive's by more than
            logit_scale * margin (a margin of similarities, which may be negative) are no negatives.
            Own hard negatives are never left out.
        symmetric: both directions; hard negatives compete for queries only.
        tau_plus: share of positives among the negatives, from 0 to below 1, taken out of their
            mean: the debiased loss. For unit features.
        impl: "auto", "reference", "tiled" or "triton"; see `clip_loss_with_accuracy`.

    Returns:
        loss: 0-dim, in nats, fp32 (fp64 for fp64 features).
        query_to_document_accuracy: share of queries whose document has a larger logit than every
            negative, 0 to 1; a tie is wrong. No gradient.
        document_to_query_accuracy: the same for the documents over all queries, or None.

    Raises:
        TypeError: features or logit_scale of a wrong type.
        ValueError: shapes, devices or options that do not fit together.
        RuntimeError: impl="triton" where it cannot run.

    Source: van den Oord et al. 2018, "Representation learning with contrastive predictive coding",
    equation 4. Debiased: Chuang et al. 2020, "Debiased contrastive learning", equation 8.

    Example:
        >>> import torch
        >>> from gradcache_clip.ops import info_nce_loss_with_accuracy
        >>> result = info_nce_loss_with_accuracy(torch.eye(4), torch.eye(4), 2.0, symmetric=True)
        >>> print(f"{result.loss:.4f} {result.document_to_query_accuracy:.1f}")
        0.3408 1.0
    """
    rules = RetrievalRules(ids, false_negative_margin, symmetric, tau_plus)
    columns, own = retrieval_columns(queries, documents, hard_negatives, rules)
    dtype = torch.promote_types(queries.dtype, columns.dtype)
    scale = scalar_tensor("logit_scale", logit_scale, queries.device, dtype)
    cosine = None
    if false_negative_margin is not None:
        cosine = pair_products(queries, documents, scale.dtype)
    pairing = retrieval_pairing(cosine, len(queries), len(columns), scale, rules)
    statistics = contrast_statistics("info_nce_loss", queries, columns, scale, pairing, impl)
    own_logits = None if own is None else own_negative_logits(queries, own, scale)
    return info_nce_result(statistics, own_logits, len(columns), scale, rules)


class RetrievalRules(NamedTuple):
    """The options of the loss."""

    ids: Int[Tensor, " b"] | Int[Tensor, " b+h"] | None
    false_negative_margin: float | None
    symmetric: bool
    tau_plus: float


def info_nce_result(
    statistics: Statistics,
    own_logits: Float[Tensor, "b k"] | None,
    columns: int,
    logit_scale: Float[Tensor, ""],
    rules: RetrievalRules,
) -> InfoNCEResult:
    """Loss and accuracies of a contrast with this many columns, own hard negatives apart."""
    rows = rows_of(statistics)
    gap, count = negative_gap(rows), columns - 1
    if own_logits is not None:
        gap = torch.logaddexp(gap, own_logits.logsumexp(1) - rows.positive)
        rows = rows._replace(rival=torch.maximum(rows.rival, own_logits.detach().amax(1)))
        count += own_logits.shape[1]
    if rules.tau_plus > 0:
        negatives = _negatives(rules.ids, count, len(gap))
        gap = debiased_gap(gap, rows.positive, negatives, logit_scale, rules.tau_plus)
    loss = one_positive_loss(gap).mean()
    if not rules.symmetric:
        return InfoNCEResult(loss, rows.accuracy(), None)
    back = columns_of(statistics)
    document_loss = _document_loss(back, logit_scale, rules.ids, rules.tau_plus)
    return InfoNCEResult((loss + document_loss) / 2, rows.accuracy(), back.accuracy())


def _document_loss(
    back: Direction, logit_scale: Tensor, ids: Tensor | None, tau_plus: float
) -> Tensor:
    gap, B = negative_gap(back), len(back.positive)
    if tau_plus > 0:
        negatives = _negatives(None if ids is None else ids[:B], B - 1, B)
        gap = debiased_gap(gap, back.positive, negatives, logit_scale, tau_plus)
    return one_positive_loss(gap).mean()


def _negatives(ids: Tensor | None, count: int, rows: int) -> Tensor | int:
    """Number of negatives of each row: `count` less the other columns of its id."""
    return count if ids is None else count + 1 - occurrences(ids[:rows], ids)


def retrieval_pairing(
    cosine: Float[Tensor, "... b"] | None,
    rows: int,
    columns: int,
    logit_scale: Float[Tensor, ""],
    rules: RetrievalRules,
) -> Pairing:
    """Which columns compete; `cosine` are the similarities of the pairs where a margin is given."""
    row_ids = column_ids = row_threshold = column_threshold = None
    if rules.ids is not None:
        column_ids = _extended(rules.ids, columns)
        row_ids = column_ids[:rows]
    if cosine is not None and rules.false_negative_margin is not None:
        row_threshold = logit_scale.detach() * (cosine + rules.false_negative_margin)
        column_threshold = row_threshold.new_full((*cosine.shape[:-1], columns), torch.inf)
        column_threshold[..., :rows] = row_threshold
    vectors = None, None, row_ids, column_ids, row_threshold, column_threshold
    return Pairing(*vectors, both_ways=rules.symmetric)


@torch.no_grad()
def pair_products(queries: Tensor, documents: Tensor, dtype: torch.dtype) -> Float[Tensor, " b"]:
    """Inner product of each query with its document."""
    with autocast_disabled(queries.device):
        return torch.linalg.vecdot(queries.to(dtype), documents.to(dtype))


def _extended(ids: Tensor, columns: int) -> Tensor:
    """Ids of documents, then of hard negatives: without their own, one that no document has."""
    groups = dense_groups(ids)
    return torch.cat((groups, groups.new_full((columns - len(ids),), -1)))


def own_negative_logits(queries: Tensor, own: Tensor, logit_scale: Tensor) -> Float[Tensor, "b k"]:
    """Logits of each query with its own hard negatives."""
    wide = logit_scale.dtype
    # Not as a matrix product, whose backward would follow an autocast that surrounds it.
    with autocast_disabled(queries.device):
        return logit_scale * torch.linalg.vecdot(own.to(wide), queries.to(wide)[:, None])


def retrieval_columns(
    queries: Tensor, documents: Tensor, hard_negatives: Tensor | None, rules: RetrievalRules
) -> tuple[Tensor, Tensor | None]:
    """Columns that compete for every query, and hard negatives of each alone; checks them all."""
    check_pairs(("queries", "documents"), queries, documents)
    shared, own = _hard_negatives(queries, hard_negatives)
    columns = documents if shared is None else _appended(documents, shared)
    _check_options(queries, columns, rules)
    return columns, own


def _appended(documents: Tensor, hard_negatives: Tensor) -> Tensor:
    dtype = torch.promote_types(documents.dtype, hard_negatives.dtype)
    return torch.cat((documents.to(dtype), hard_negatives.to(dtype)))


def _hard_negatives(
    queries: Tensor, hard_negatives: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(shared, own): at most one of them."""
    if hard_negatives is None:
        return None, None
    check_floating("hard_negatives", hard_negatives)
    B, D = queries.shape
    shape = tuple(hard_negatives.shape)
    own = len(shape) == 3 and shape[0] == B
    if shape[-1:] != (D,) or not (own or len(shape) == 2) or hard_negatives.numel() == 0:
        raise ValueError(
            f"hard_negatives: expected (H, {D}) for every query or ({B}, K, {D}) for each one, "
            f"got {shape}; pass None where there are none"
        )
    check_same_device(("queries", "hard_negatives"), queries, hard_negatives)
    return (None, hard_negatives) if own else (hard_negatives, None)


def _check_options(queries: Tensor, columns: Tensor, rules: RetrievalRules) -> None:
    if rules.ids is not None:
        check_integers("ids", rules.ids, (len(queries), len(columns)), queries.device)
    check_share("tau_plus", rules.tau_plus)
    if rules.false_negative_margin is not None and rules.tau_plus > 0:
        raise ValueError(
            f"tau_plus: expected 0 beside a false_negative_margin, got {rules.tau_plus}; debiasing "
            "needs the number of negatives, which a margin leaves open: choose one of the two"
        )
