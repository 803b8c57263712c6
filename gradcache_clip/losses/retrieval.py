"""Retrieval with chosen competitors: directions, hard negatives of each query, hardness weights.

b queries on this rank, B on all, K hard negatives of each query, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from gradcache_clip.losses.competitors import accuracy, joint_loss, mean_loss
from gradcache_clip.losses.options import check_finite, check_flags
from gradcache_clip.losses.retrieval_arguments import (
    Guide,
    RowArguments,
    check_options,
    check_rows,
    negatives_of,
    rules_of,
)
from gradcache_clip.losses.retrieval_contrasts import (
    DIRECTIONS,
    Compared,
    Hardness,
    RetrievalContrasts,
)
from gradcache_clip.losses.scaled import ScaledLoss, ScaleOptions, check_has_negatives
from gradcache_clip.ops.results import RetrievalOutput
from gradcache_clip.ops.softmax import weighted_mean

if TYPE_CHECKING:
    from typing_extensions import Unpack

PartitionMode = Literal["joint", "per_direction"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
_NAME = "retrieval_loss"


class RetrievalLoss(ScaledLoss):
    r"""Cross-entropy of each query with chosen competitors, over the queries of all ranks.

    With documents d_j, K hard negatives of each query and s = logit_scale, the denominators are

        query_to_doc:    Z_i = sum_j exp(s <q_i, d_j>) + over hard negatives
        doc_to_query:    Z_i = sum_j exp(s <q_j, d_i>)
        query_to_query:  Z_i = sum_{j != i} exp(s <q_i, q_j>)
        doc_to_doc:      Z_i = sum_{j != i} exp(s <d_i, d_j>) + over those of others

    and the loss is the mean over i of log(Z of all chosen directions together) - s <q_i, d_i> (the
    mean of log Z with partition_mode="per_direction"). No matrix of similarities is stored; each
    direction beyond "query_to_doc" costs one more pass over the tiles, "doc_to_query" none.

    Sources: Li et al. 2023, "Towards general text embeddings with multi-stage contrastive
    learning" (GTE), for further directions; Lan et al. 2025, "LLaVE", equation 5, for hardness
    weights. Options as in sentence-transformers' `MultipleNegativesRankingLoss`.

    Args:
        directions: of "query_to_doc" (always there), "doc_to_query", "query_to_query",
            "doc_to_doc".
        partition_mode: "joint", one softmax over all directions, or "per_direction", the mean of
            one for each, which all must hold the positive: no "query_to_query" or "doc_to_doc".
        hardness_mode: whose logits grow by hardness_strength * their similarity, a constant to
            autograd, in "query_to_doc": "in_batch_negatives", "hard_negatives" (a query's own, if
            there are any) or "all_negatives"; None for nobody's. Accuracies leave it out.
        hardness_strength: 0 or more; 9 in LLaVE.
        in_batch_negatives: False lets the own hard negatives of a query alone compete.
        share_hard_negatives: whether they compete for the other queries, too.
        negatives_in_doc_to_doc: whether shared ones stand in "doc_to_doc", too.
        guide_margin: with a guide, candidates whose similarity exceeds that of the pair less this
            margin are no negatives. Solatorio 2024, "GISTEmbed".
        relative_guide_margin: whether the margin is a share of the pair's absolute similarity.
        **options: `init_logit_scale=1/0.07`, `max_logit_scale=100`, `normalize=True`,
            `impl="auto"`, `group=None`, `exchange="gather"`; see `ScaledLoss`.

    Raises:
        ValueError: an unknown name, a negative strength, or options that contradict each other.

    Example:
        >>> import torch
        >>> from gradcache_clip.losses import RetrievalLoss
        >>> loss = RetrievalLoss(directions=("query_to_doc", "query_to_query"))
        >>> queries, documents = torch.eye(4), torch.eye(4)
        >>> print(f"{loss(queries, documents, -documents[:, None]).loss:.4f}")
        0.0000
    """

    feature_arguments = "queries", "documents", "hard_negatives"

    def __init__(
        self,
        *,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: PartitionMode = "joint",
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        in_batch_negatives: bool = True,
        share_hard_negatives: bool = True,
        negatives_in_doc_to_doc: bool = True,
        guide_margin: float = 0.0,
        relative_guide_margin: bool = False,
        **options: Unpack[ScaleOptions],
    ) -> None:
        super().__init__(**options)
        check_options(directions, partition_mode, hardness_mode, hardness_strength)
        check_flags(
            in_batch_negatives=in_batch_negatives,
            share_hard_negatives=share_hard_negatives,
            negatives_in_doc_to_doc=negatives_in_doc_to_doc,
            relative_guide_margin=relative_guide_margin,
        )
        check_finite("guide_margin", guide_margin, "such as 0.05")
        if not in_batch_negatives and tuple(directions) != DIRECTIONS[:1]:
            raise ValueError(
                f"directions: expected query_to_doc alone with in_batch_negatives=False, got "
                f"{list(directions)}; the others are made of in-batch negatives"
            )
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength
        self.in_batch_negatives = in_batch_negatives
        self.guide_margin, self.relative_guide_margin = guide_margin, relative_guide_margin
        self.share_hard_negatives = share_hard_negatives and in_batch_negatives
        self.negatives_in_doc_to_doc = negatives_in_doc_to_doc

    def forward(
        self,
        queries: Tensor,
        documents: Tensor,
        hard_negatives: Tensor | None = None,
        logit_scale: Tensor | None = None,
        *,
        negatives_per_query: int | None = None,
        ids: Tensor | None = None,
        groups: Tensor | None = None,
        column_bias: Tensor | None = None,
        guide: Guide | None = None,
        row_weights: Tensor | None = None,
    ) -> RetrievalOutput:
        """Compute the loss of all queries; row i of queries and documents is a pair.

        Args:
            queries: (b, D) floating tensor.
            documents: (b, D) floating tensor.
            hard_negatives: (b, K, D), K for each query; or (b*K, D), query by query, with
                negatives_per_query=K.
            logit_scale: a scale of the caller's own in place of the module's.
            negatives_per_query: K of hard negatives that are a matrix.
            ids: (b,) integers; queries of one id and their candidates are no negatives of each
                other, but a query's own hard negatives are.
            groups: (b,) integers, such as numbers of tasks; only queries and candidates of one
                group compete.
            column_bias: (b,), with hard negatives (b, 1 + K), added to the logits of documents;
                minus the logarithm of their sampling probability corrects a sampled softmax, and
                -inf leaves a hard negative out. It may require a gradient, which is complete for
                this rank's rows. Accuracies count it, under weighed in-batch negatives the share
                logit_scale / (logit_scale + hardness_strength) of it.
            guide: features of the same inputs by a frozen model, normalised: (b, G) of queries
                and documents and, with hard negatives, (b, K, G) of these.
            row_weights: (b,) weights of the queries in the mean, 0 or more, of which one is not 0.

        Raises:
            TypeError: features, ids or weights of a wrong type.
            ValueError: shapes that do not fit together, or the whole batch is a single pair without
                hard negatives.
        """
        further = RowArguments(negatives_per_query, ids, groups, column_bias, guide, row_weights)
        return self._outputs(None, (queries, documents, hard_negatives), logit_scale, further)[0]

    def prefixes(
        self,
        widths: Sequence[int],
        queries: Tensor,
        documents: Tensor,
        hard_negatives: Tensor | None = None,
        logit_scale: Tensor | None = None,
        *,
        negatives_per_query: int | None = None,
        ids: Tensor | None = None,
        groups: Tensor | None = None,
        column_bias: Tensor | None = None,
        guide: Guide | None = None,
        row_weights: Tensor | None = None,
    ) -> list[RetrievalOutput]:
        """Compute `forward` for each prefix of the features, normalised; see `MatryoshkaLoss`."""
        further = RowArguments(negatives_per_query, ids, groups, column_bias, guide, row_weights)
        return self._outputs(widths, (queries, documents, hard_negatives), logit_scale, further)

    def _outputs(
        self,
        widths: Sequence[int] | None,
        inputs: tuple[Tensor, Tensor, Tensor | None],
        logit_scale: Tensor | None,
        further: RowArguments,
    ) -> list[RetrievalOutput]:
        negatives = negatives_of(*inputs, further.negatives_per_query)
        if negatives is None and not self.in_batch_negatives:
            raise ValueError(
                "hard_negatives: expected some with in_batch_negatives=False, got None; nothing "
                "else competes"
            )
        check_rows(self.group, *inputs[:2], negatives, further)
        if further.guide is None and (self.guide_margin or self.relative_guide_margin):
            raise ValueError(
                f"guide: expected features with guide_margin={self.guide_margin}, got None; pass "
                "those of the guide, or build the loss without its margin"
            )
        if negatives is None:
            check_has_negatives(len(inputs[0]) * self.ranks.size)
        rest = [] if negatives is None else [negatives]
        features = self._prepared(widths, *inputs[:2], *rest)
        scale = self._scale_for(logit_scale, *features)
        margin = self.guide_margin, self.relative_guide_margin
        rules = rules_of(self.ranks, further, scale.dtype, margin[0], relative=margin[1])
        if rules.guide is not None:
            # NaN is above no threshold: such a guide would mask nothing, unseen.
            scale = scale + 0 * rules.guide.sum().to(scale.dtype)
        contrasts = RetrievalContrasts(
            partial(self._statistics, _NAME, widths=widths),
            self.ranks,
            features[0],
            features[1],
            features[2] if rest else None,
            scale,
            rules,
            self._hardness(),
            self.directions,
            self.share_hard_negatives,
            self.in_batch_negatives,
            widths or (),
            self.negatives_in_doc_to_doc,
        )
        weights = further.row_weights
        weights = None if weights is None else self.ranks.joined(weights)
        return [self._result(each, weights) for each in contrasts.compared()]

    def _hardness(self) -> Hardness:
        mode, strength = self.hardness_mode, self.hardness_strength
        return Hardness(
            strength * (mode in ("in_batch_negatives", "all_negatives")),
            strength * (mode in ("hard_negatives", "all_negatives")),
        )

    def _result(self, found: Compared, weights: Tensor | None) -> RetrievalOutput:
        positive, directions = found
        of_rows = joint_loss if self.partition_mode == "joint" else mean_loss
        loss = weighted_mean(of_rows(positive, list(directions.values())), weights)
        back = directions.get("doc_to_query")
        forth = accuracy(positive, directions["query_to_doc"])
        return RetrievalOutput(loss, forth, None if back is None else accuracy(positive, back))
