"""Label smoothing without a pass over the logits: a mean logit is one inner product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcache_clip.ops.groups import dense_groups, group_sums, occurrences

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def mean_logits(
    q: Float[Tensor, "b d"],
    k: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    labels: Int[Tensor, " b"] | None,
    ids: Int[Tensor, " b"] | None,
) -> Float[Tensor, " b"]:
    """Average S_ij over the columns j that compete for row i.

    S summed over j is <q_i, sum k_j>, so no logits are needed.

    Without ids all columns compete; with ids those of an equal id and another label (without labels
    all but column i itself) do not.
    """
    q, k = q.to(logit_scale.dtype), k.to(logit_scale.dtype)
    total, count = k.sum(0), torch.full((len(q),), len(k), device=q.device)
    if ids is not None:
        group = dense_groups(ids)
        own = k if labels is None else group_sums(k, dense_groups(ids, labels))
        total = total - (group_sums(k, group) - own)
        count = count - (occurrences(group, group) - _own_count(ids, labels))
    return logit_scale * (q * total).sum(1) / count


def _own_count(ids: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        return torch.ones_like(ids)
    group = dense_groups(ids, labels)
    return occurrences(group, group)
