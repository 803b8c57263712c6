"""Columns averaged by the softmax of a row, by the kernels of a contrast.

M rows q_i, N columns k_j, S_ij = scale <q_i, k_j>, P_ij = softmax_j(S_ij), V width of the values.
P exists in the panels of a gradient alone; both functions are constants to autograd.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

# Columns of ones beside the values: with one alone the rows of a product would not be aligned.
_ONES = 8


@torch.library.custom_op(
    "gradcache_clip::softmax_average",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor values, Tensor scale) -> (Tensor, Tensor, Tensor)",
)
def softmax_average(
    q: Float[Tensor, "m d"],
    k: Float[Tensor, "n d"],
    values: Float[Tensor, "n v"],
    scale: Float[Tensor, ""],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum_j P_ij v_j (M, V), sum_j P_ij S_ij (M,) and the log-sum-exp of each row (M,).

    16-bit features give weights of 16 bits. They are divided by their own sum, so that what all
    logits have in common is not rounded.
    """
    from gradcache_clip.kernels.competition import Competition
    from gradcache_clip.kernels.contrast_gradient import softmax_products
    from gradcache_clip.kernels.contrast_statistics import contrast_statistics

    q, k, values = q.contiguous(), k.contiguous(), values.to(q.dtype)
    rules = Competition(both_ways=False, positive_shift=2 * (len(q) + len(k)))
    _, (peak, total), _ = contrast_statistics(q, k, scale, rules)
    lse = peak + total.log2()
    operand = torch.cat((values, k, values.new_ones(len(k), _ONES)), 1)
    seen = softmax_products(q, k, scale, lse, operand)
    average, columns = (seen[:, :-_ONES] / seen[:, -1:]).split((values.shape[1], k.shape[1]), 1)
    logits = scale * torch.linalg.vecdot(q.to(scale.dtype), columns)
    return average.contiguous(), logits, lse * math.log(2)


@softmax_average.register_fake
def _(q: Tensor, k: Tensor, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    average = scale.new_empty(len(q), values.shape[1])
    return average, scale.new_empty(len(q)), scale.new_empty(len(q))


@torch.library.custom_op(
    "gradcache_clip::softmax_average_gradient",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor scale, Tensor log_sum_exp, Tensor daverage) -> Tensor",
)
def softmax_average_gradient(
    q: Float[Tensor, "m d"],
    k: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
    log_sum_exp: Float[Tensor, " m"],
    daverage: Float[Tensor, "m v"],
) -> Tensor:
    """Return the gradient of the values, sum_i P_ij daverage_i (N, V)."""
    from gradcache_clip.kernels.contrast_gradient import softmax_products

    q, k = q.contiguous(), k.contiguous()
    # Within the range of fp16.
    largest = daverage.abs().amax().clamp_min(torch.finfo(daverage.dtype).tiny)
    operand, lse = (daverage / largest).to(q.dtype), log_sum_exp / math.log(2)
    return softmax_products(q, k, scale, lse, operand, transposed=True) * largest


@softmax_average_gradient.register_fake
def _(q: Tensor, k: Tensor, scale: Tensor, log_sum_exp: Tensor, daverage: Tensor) -> Tensor:
    return scale.new_empty(len(k), daverage.shape[1])
