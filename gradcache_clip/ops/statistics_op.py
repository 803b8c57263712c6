"""Registers passes over tiles with torch.library, so that autograd and torch.compile take them.

An op takes (q, k, logit_scale, vectors, rules, impl, loss, column_bias): tensors and numbers into
which the caller has packed what decides positives and competitors. A bias of the columns is among
the vectors, and once more apart, as autograd sees no tensor in a list that also holds None. The op
returns the fields of `Statistics`. A second op computes its gradients, and refuses to be
differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gradcache_clip.ops.implementations import second_derivative_refused
from gradcache_clip.ops.pairing import Gradients, Needs, SideGradient, Statistics

_ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor logit_scale, Tensor?[] vectors, int[] rules, str impl, str loss"
)
_STATISTICS_ARGUMENTS = f"{_ARGUMENTS}, Tensor? column_bias"
_GRADIENT_ARGUMENTS = f"{_ARGUMENTS}, Tensor[] rows, Tensor[] columns, bool[] needs"


class Passes(Protocol):
    """Two passes over the tiles of a contrast, below autograd and outside of any autocast."""

    def statistics(self, q: Tensor, k: Tensor, logit_scale: Tensor, rules: Any, /) -> Statistics:
        """Reduce the logits of each row and column to a few numbers."""

    def gradient(
        self,
        q: Tensor,
        k: Tensor,
        logit_scale: Tensor,
        rules: Any,
        rows: SideGradient,
        columns: SideGradient | None,
        needs: Needs,
        column_sums: Tensor | None,
        dtype: torch.dtype,
        /,
    ) -> Gradients:
        """Compute dq and dk in this dtype, and dlogit_scale; None where not needed.

        Adds the gradient of a bias of the columns to `column_sums` if there are any.
        """

    def shapes(self, M: int, N: int, rules: Any, /) -> list[tuple[int, ...]]:
        """Return the shapes of what `statistics` returns for M rows and N columns."""


# From packed vectors and numbers and an implementation to passes and their rules.
Unpack = Callable[[Sequence["Tensor | None"], Sequence[int], str], tuple[Passes, Any]]


def register(name: str, unpack: Unpack) -> tuple[Any, Any]:
    """Register `gradcache_clip::<name>_statistics` and `<name>_gradient`, and return both."""

    @_operator(f"{name}_statistics", f"{_STATISTICS_ARGUMENTS}) -> ({', '.join(['Tensor'] * 8)})")
    def statistics(
        q: Tensor, k: Tensor, logit_scale: Tensor, vectors: Any, rules: Any, impl: str, *rest: Any
    ) -> tuple[Tensor, ...]:
        passes, unpacked = unpack(vectors, rules, impl)
        return tuple(passes.statistics(q, k, logit_scale, unpacked))

    @statistics.register_fake
    def _(
        q: Tensor, k: Tensor, logit_scale: Tensor, vectors: Any, rules: Any, impl: str, *rest: Any
    ) -> tuple[Tensor, ...]:
        passes, unpacked = unpack(vectors, rules, impl)
        shapes = passes.shapes(len(q), len(k), unpacked)
        return tuple(logit_scale.new_empty(shape) for shape in shapes)

    @_operator(f"{name}_gradient", f"{_GRADIENT_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
    def gradient(
        q: Tensor, k: Tensor, logit_scale: Tensor, vectors: Any, rules: Any, impl: str, *rest: Any
    ) -> tuple[Tensor, ...]:
        # An op returns no None: gradients that are not needed come back empty.
        passes, unpacked = unpack(vectors, rules, impl)
        _loss, rows, columns, (*needs, needs_bias) = rest
        column_side = SideGradient(*columns) if unpacked.both_ways else None
        sides = SideGradient(*rows), column_side
        # A bias of columns alone is not symmetric.
        assert not (needs_bias and unpacked.self_contrast)
        dbias = logit_scale.new_zeros(len(k)) if needs_bias else None
        asked: Any = tuple(needs), dbias, q.dtype
        found = passes.gradient(q, k, logit_scale, unpacked, *sides, *asked)
        return tuple(q.new_empty(0) if each is None else each for each in (*found, dbias))

    @gradient.register_fake
    def _(
        q: Tensor, k: Tensor, logit_scale: Tensor, vectors: Any, rules: Any, impl: str, *rest: Any
    ) -> tuple[Tensor, ...]:
        *_, needs = rest
        self_contrast = unpack(vectors, rules, impl)[1].self_contrast
        # In a self-contrast dq holds the gradients through both sides.
        of_features = needs[0] or (self_contrast and needs[1]), needs[1] and not self_contrast
        like = q, k, logit_scale, logit_scale.new_empty(len(k))
        return tuple(
            torch.empty_like(x, memory_format=torch.contiguous_format) if need else q.new_empty(0)
            for x, need in zip(like, (*of_features, *needs[2:]), strict=True)
        )

    statistics.register_autograd(_backward_through(gradient), setup_context=_save)
    gradient.register_autograd(_refuse, setup_context=_keep_name)
    return statistics, gradient


def _operator(name: str, schema: str) -> Any:
    return torch.library.custom_op(f"gradcache_clip::{name}", mutates_args=(), schema=schema)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, logit_scale, vectors, *ctx.options, _bias = inputs
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
    ctx.mark_non_differentiable(*statistics.constants)


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
            [*ctx.needs_input_grad[:3], ctx.needs_input_grad[-1]],
        )
        *needed, dbias = (each if each.numel() else None for each in gradients)
        # torch.library takes a list as a list only if no None is among it.
        of_vectors = [None] * len(vectors) if all(ctx.given) else None
        return (*needed, of_vectors, *(None for _ in ctx.options), dbias)

    return backward


def _keep_name(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, ctx.loss, _rows, _columns, _needs = inputs


def _refuse(ctx: Any, *doutput: Tensor) -> None:
    raise second_derivative_refused(ctx.loss)
