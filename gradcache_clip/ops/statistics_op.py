"""What makes an op that returns `Statistics` differentiable, for torch.library.

Such an op takes (q, k, logit_scale, vectors, rules, ..., loss), the vectors and rules of a packed
`Pairing`; its gradient op takes the same, then [max, dsum, dpositive] of the rows and of the
columns, and which of the first three need a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.ops.implementations import second_derivative_refused
from gradcache_clip.ops.pairing import Pairing, Statistics


def make_differentiable(statistics: Any, gradient: Any) -> None:
    """Let autograd go through `gradient` after `statistics`, once."""
    statistics.register_autograd(_backward_through(gradient), setup_context=_save)
    gradient.register_autograd(_refuse, setup_context=_keep_name)
    gradient.register_fake(_fake_gradient)


def fake_sizes(q: Tensor, k: Tensor, vectors: Sequence[Tensor | None], rules: Any) -> list[int]:
    """Lengths of the fields of `Statistics`; what a contrast lacks is empty."""
    pairing = Pairing.unpacked(vectors, rules)
    labelled, M, N = pairing.row_labels is not None, len(q), len(k) if pairing.both_ways else 0
    return [M, M, M, M * labelled, N * labelled, N, N, N * labelled]


def _fake_gradient(q: Tensor, k: Tensor, logit_scale: Tensor, *arguments: Any) -> Any:
    vectors, rules, *_, needs = arguments
    self_contrast = Pairing.unpacked(vectors, rules).self_contrast
    needed = needs[0] or (self_contrast and needs[1]), needs[1] and not self_contrast, needs[2]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else q.new_empty(0)
        for x, need in zip((q, k, logit_scale), needed, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, logit_scale, vectors, *ctx.options = inputs
    statistics = Statistics(*output)
    ctx.given = [vector is not None for vector in vectors]
    ctx.save_for_backward(
        q,
        k,
        logit_scale,
        statistics.row_max,
        statistics.column_max,
        *(vector for vector in vectors if vector is not None),
    )
    ctx.mark_non_differentiable(
        statistics.row_max, statistics.row_rival, statistics.column_max, statistics.column_rival
    )


def _backward_through(gradient: Any) -> Callable[..., tuple[Any, ...]]:
    def backward(ctx: Any, *doutput: Tensor) -> tuple[Any, ...]:
        q, k, logit_scale, row_max, column_max, *given = ctx.saved_tensors
        vectors = [given.pop(0) if there else None for there in ctx.given]
        d = Statistics(*doutput)
        gradients = gradient(
            q,
            k,
            logit_scale,
            vectors,
            *ctx.options,
            [row_max, d.row_sum, d.row_positive],
            [column_max, d.column_sum, d.column_positive],
            ctx.needs_input_grad[:3],
        )
        needed = (each if each.numel() else None for each in gradients)
        return (*needed, None, *(None for _ in ctx.options))

    return backward


def _keep_name(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, ctx.loss, _rows, _columns, _needs = inputs


def _refuse(ctx: Any, *doutput: Tensor) -> None:
    raise second_derivative_refused(ctx.loss)
