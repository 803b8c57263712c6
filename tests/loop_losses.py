"""The softmax family as loops over the formulas of the papers, one sample at a time, for fp64.

No maximum is subtracted and nothing is masked: sets of columns are lists, and sums run over them.
Every function returns the loss and its accuracies, in the order of the public result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Integers = Sequence[int] | None


def clip(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    *,
    labels: Integers = None,
    ids: Integers = None,
    label_smoothing: float = 0.0,
) -> list[Tensor]:
    """Radford et al. 2021, figure 3, with targets over several positives (Khosla et al. 2020)."""
    B = len(q)
    losses, accuracies = [], []
    for L in (logit_scale * q @ k.T, logit_scale * k @ q.T):
        total, right = torch.zeros(()), 0
        for i in range(B):
            positives = [j for j in range(B) if j == i or _equal(labels, i, labels, j)]
            competes = [j for j in range(B) if j in positives or not _equal(ids, i, ids, j)]
            denominator = sum(L[i, j].exp() for j in competes)
            for j in competes:
                target = label_smoothing / len(competes)
                target += (1 - label_smoothing) / len(positives) if j in positives else 0
                total = total - target * (L[i, j].exp() / denominator).log()
            right += _wins(L[i], positives, competes)
        losses.append(total / B)
        accuracies.append(_share(right, B))
    return [(losses[0] + losses[1]) / 2, *accuracies]


def info_nce(
    queries: Tensor,
    documents: Tensor,
    logit_scale: Tensor,
    *,
    hard_negatives: Tensor | None = None,
    ids: Integers = None,
    false_negative_margin: float | None = None,
    symmetric: bool = False,
    tau_plus: float = 0.0,
) -> list[Tensor]:
    """Van den Oord et al. 2018, equation 4; debiased by Chuang et al. 2020, equation 8."""
    B, columns = len(queries), documents
    if hard_negatives is not None and hard_negatives.ndim == 2:
        columns = torch.cat((documents, hard_negatives))
    S = logit_scale * queries @ columns.T
    row_losses, column_losses, right, back_right = [], [], 0, 0

    def is_negative(logit: Tensor, i: int, j: int) -> bool:
        if i == j or _equal(ids, i, ids, j):
            return False
        if false_negative_margin is None:
            return True
        return bool(logit <= S[i, i] + logit_scale * false_negative_margin)

    for i in range(B):
        negatives = [S[i, j] for j in range(len(columns)) if is_negative(S[i, j], i, j)]
        if hard_negatives is not None and hard_negatives.ndim == 3:
            negatives += [logit_scale * queries[i] @ negative for negative in hard_negatives[i]]
        row_losses.append(_one_positive(S[i, i], negatives, logit_scale, tau_plus))
        right += all(S[i, i] > negative for negative in negatives)
        negatives = [S[j, i] for j in range(B) if is_negative(S[j, i], i, j)]
        column_losses.append(_one_positive(S[i, i], negatives, logit_scale, tau_plus))
        back_right += all(S[i, i] > negative for negative in negatives)
    if not symmetric:
        return [sum(row_losses) / B, _share(right, B)]
    loss = (sum(row_losses) / B + sum(column_losses) / B) / 2
    return [loss, _share(right, B), _share(back_right, B)]


def nt_xent(
    features_a: Tensor, features_b: Tensor, logit_scale: Tensor, *, tau_plus: float = 0.0
) -> list[Tensor]:
    """Chen et al. 2020, equation 1 and algorithm 1; debiased by Chuang et al. 2020, equation 8."""
    z, B = torch.cat((features_a, features_b)), len(features_a)
    S = logit_scale * z @ z.T
    total, right = torch.zeros(()), 0
    for i in range(2 * B):
        partner = i + B if i < B else i - B
        negatives = [S[i, j] for j in range(2 * B) if j not in (i, partner)]
        total = total + _one_positive(S[i, partner], negatives, logit_scale, tau_plus)
        right += all(S[i, partner] > negative for negative in negatives)
    return [total / (2 * B), _share(right, 2 * B)]


def sup_con(features: Tensor, labels: Sequence[int], logit_scale: Tensor) -> list[Tensor]:
    """Khosla et al. 2020, equation 2, over the rows that have a positive."""
    N, S = len(features), logit_scale * features @ features.T
    total, right, rows = torch.zeros(()), 0, 0
    for i in range(N):
        others = [a for a in range(N) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        if not positives:
            continue
        denominator = sum(S[i, a].exp() for a in others)
        inner = sum((S[i, p].exp() / denominator).log() for p in positives)
        total = total - inner / len(positives)
        right += _wins(S[i], positives, others)
        rows += 1
    return [total / max(rows, 1), _share(right, max(rows, 1))]


def _one_positive(
    positive: Tensor, negatives: list[Tensor], logit_scale: Tensor, tau_plus: float
) -> Tensor:
    """-log(exp(p) / (exp(p) + N g)); without debiasing g is the mean of exp over N negatives."""
    if not negatives:
        return positive - positive
    g = sum(negative.exp() for negative in negatives) / len(negatives)
    if tau_plus > 0:
        corrected = (g - tau_plus * positive.exp()) / (1 - tau_plus)
        g = torch.maximum(corrected, torch.exp(-logit_scale))
    return -(positive.exp() / (positive.exp() + len(negatives) * g)).log()


def _wins(logits: Tensor, positives: list[int], competes: list[int]) -> bool:
    best = max(logits[j].item() for j in positives)
    return all(best > logits[j].item() for j in competes if j not in positives)


def _equal(values: Integers, i: int, among: Integers, j: int) -> bool:
    """Whether two columns share a number; hard negatives beyond the numbers share none."""
    if values is None or among is None or j >= len(among):
        return False
    return bool(values[i] == among[j])


def _share(count: int, rows: int) -> Tensor:
    return torch.tensor(count / rows, dtype=torch.float64)
