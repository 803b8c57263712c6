"""InfoNCE for retrieval: queries against documents and hard negatives.

B queries, H shared and K own hard negatives, D feature width.
"""

from __future__ import annotations

import math
from numbers import Real
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
from gradcache_clip.ops.loss_alone import loss_alone
from gradcache_clip.ops.pairing import Pairing, Statistics
from gradcache_clip.ops.results import RetrievalOutput
from gradcache_clip.ops.softmax import (
    columns_of,
    debiased,
    negative_lse_minus_positive,
    one_positive_loss,
    rows_of,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int


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
) -> RetrievalOutput:
    """Compute the cross-entropy of each query over all documents and the hard negatives.

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
            column with the id of a query's own document is not a negative of this query.
        false_negative_margin: columns whose logit exceeds the positive's by more than
            logit_scale * margin (a margin of similarities, which may be negative) are not
            negatives. Own hard negatives are never left out.
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
        >>> rows = torch.eye(4)
        >>> result = info_nce_loss_with_accuracy(rows, rows, 2.0, symmetric=True)
        >>> print(f"{result.loss:.4f} {result.document_to_query_accuracy:.1f}")
        0.3408 1.0
    """
    rules = RetrievalRules(ids, false_negative_margin, symmetric, tau_plus)
    features = queries, documents, hard_negatives
    return _info_nce(*features, logit_scale, rules, impl, maxima=True)


def _alone(
    queries: Tensor,
    documents: Tensor,
    logit_scale: float | Tensor,
    *,
    hard_negatives: Tensor | None = None,
    ids: Tensor | None = None,
    false_negative_margin: float | None = None,
    symmetric: bool = False,
    tau_plus: float = 0.0,
    impl: str = "auto",
    maxima: bool,
) -> RetrievalOutput:
    rules = RetrievalRules(ids, false_negative_margin, symmetric, tau_plus)
    features = queries, documents, hard_negatives
    return _info_nce(*features, logit_scale, rules, impl, maxima=maxima)


def _info_nce(
    queries: Tensor,
    documents: Tensor,
    hard_negatives: Tensor | None,
    logit_scale: float | Tensor,
    rules: RetrievalRules,
    impl: str,
    *,
    maxima: bool,
) -> RetrievalOutput:
    columns, own = retrieval_columns(queries, documents, hard_negatives, rules)
    dtype = torch.promote_types(queries.dtype, columns.dtype)
    scale = scalar_tensor("logit_scale", logit_scale, queries.device, dtype)
    cosine = None
    if rules.false_negative_margin is not None:
        cosine = pair_products(queries, documents, scale.dtype)
    pairing = retrieval_pairing(cosine, len(queries), len(columns), scale, rules)
    pairing = pairing._replace(maxima=maxima)
    statistics = contrast_statistics("info_nce_loss", queries, columns, scale, pairing, impl)
    own_logits = None if own is None else own_negative_logits(queries, own, scale)
    return info_nce_result(statistics, own_logits, len(columns), scale, rules)


info_nce_loss = loss_alone(info_nce_loss_with_accuracy, _alone)
"""The loss of `info_nce_loss_with_accuracy` alone, with the same arguments."""


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
) -> RetrievalOutput:
    """Compute loss and accuracies from the statistics of `columns` columns and the own logits."""
    rows = rows_of(statistics)
    difference, count = negative_lse_minus_positive(rows), columns - 1
    if own_logits is not None:
        # log(exp(N) + exp(N of own)) - p, with N the log-sum-exps and p the positive.
        difference = torch.logaddexp(difference, own_logits.logsumexp(1) - rows.positive)
        hardest = torch.maximum(rows.hardest_negative, own_logits.detach().amax(1))
        rows = rows._replace(hardest_negative=hardest)
        count += own_logits.shape[1]
    loss = _direction_loss(difference, rows.positive, count, logit_scale, rules.ids, rules.tau_plus)
    if not rules.symmetric:
        return RetrievalOutput(loss, rows.accuracy(), None)
    back, B = columns_of(statistics), len(rows.positive)
    ids = None if rules.ids is None else rules.ids[:B]
    back_difference = negative_lse_minus_positive(back)
    document_loss = _direction_loss(
        back_difference, back.positive, B - 1, logit_scale, ids, rules.tau_plus
    )
    return RetrievalOutput((loss + document_loss) / 2, rows.accuracy(), back.accuracy())


def _direction_loss(
    difference: Tensor,
    positive: Tensor,
    count: int,
    logit_scale: Tensor,
    ids: Tensor | None,
    tau_plus: float,
) -> Tensor:
    """Average the loss of one direction, debiased if asked, over `count` negatives per row."""
    if tau_plus > 0:
        negatives = _negatives(ids, count, len(positive))
        difference = debiased(difference, positive, negatives, logit_scale, tau_plus)
    return one_positive_loss(difference).mean()


def _negatives(ids: Tensor | None, count: int, rows: int) -> Tensor | int:
    """Return the number of negatives of each row: `count` minus the other columns of its id."""
    return count if ids is None else count + 1 - occurrences(ids[:rows], ids)


def retrieval_pairing(
    cosine: Float[Tensor, "... b"] | None,
    rows: int,
    columns: int,
    logit_scale: Float[Tensor, ""],
    rules: RetrievalRules,
) -> Pairing:
    """Return which columns compete; a margin needs `cosine`, the similarities of the pairs."""
    row_ids = column_ids = row_threshold = column_threshold = None
    if rules.ids is not None:
        column_ids = _extended(rules.ids, columns)
        row_ids = column_ids[:rows]
    if cosine is not None and rules.false_negative_margin is not None:
        row_threshold = logit_scale.detach() * (cosine + rules.false_negative_margin)
        # Hard negatives are columns without a query of their own: nothing exceeds their threshold.
        column_threshold = row_threshold.new_full((*cosine.shape[:-1], columns), torch.inf)
        column_threshold[..., :rows] = row_threshold
    vectors = None, None, row_ids, column_ids, row_threshold, column_threshold
    return Pairing(*vectors, both_ways=rules.symmetric)


@torch.no_grad()
def pair_products(queries: Tensor, documents: Tensor, dtype: torch.dtype) -> Float[Tensor, " b"]:
    """Return the inner product of each query with its document."""
    with autocast_disabled(queries.device):
        return torch.linalg.vecdot(queries.to(dtype), documents.to(dtype))


def _extended(ids: Tensor, columns: int) -> Tensor:
    """Extend the ids of documents by -1, which none of them has, for hard negatives without ids."""
    groups = dense_groups(ids)
    return torch.cat((groups, groups.new_full((columns - len(ids),), -1)))


def own_negative_logits(queries: Tensor, own: Tensor, logit_scale: Tensor) -> Float[Tensor, "b k"]:
    """Compute the logits of each query with its own hard negatives."""
    wide = logit_scale.dtype
    # Not as a matrix product, whose backward would follow an autocast that surrounds it.
    with autocast_disabled(queries.device):
        return logit_scale * torch.linalg.vecdot(own.to(wide), queries.to(wide)[:, None])


def retrieval_columns(
    queries: Tensor, documents: Tensor, hard_negatives: Tensor | None, rules: RetrievalRules
) -> tuple[Tensor, Tensor | None]:
    """Check everything; return the columns of all queries, and the hard negatives of each alone."""
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
    """Return (shared, own), of which at most one is given."""
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
    margin = rules.false_negative_margin
    if margin is not None and not (isinstance(margin, Real) and math.isfinite(margin)):
        raise ValueError(
            f"false_negative_margin: expected a finite number, got {margin!r}; None turns it off"
        )
    if rules.false_negative_margin is not None and rules.tau_plus > 0:
        raise ValueError(
            f"tau_plus: expected 0 beside a false_negative_margin, got {rules.tau_plus}; debiasing "
            "needs the number of negatives, which a margin leaves open: choose one of the two"
        )
