"""The autograd node that the tiled and the Triton implementation share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.clip_terms import ClipStatistics, SoftmaxTerms, clip_terms

if TYPE_CHECKING:
    from jaxtyping import Float

Needs = tuple[bool, bool, bool]
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


class ClipPasses(NamedTuple):
    """One implementation: a pass for the statistics, and a pass for the gradients.

    `gradient(q, k, logit_scale, terms, factor, needs)` returns (dq, dk, dlogit_scale), None where
    `needs` says False; `factor` (0-dim) is the outer gradient over 2B.
    """

    statistics: Callable[[Tensor, Tensor, Tensor], ClipStatistics]
    gradient: Callable[[Tensor, Tensor, Tensor, SoftmaxTerms, Tensor, Needs], Gradients]


class ClipFunction(torch.autograd.Function):
    """Loss, row accuracy and column accuracy of q, k (B x D) and logit_scale (0-dim)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, "b d"],
        k: Float[Tensor, "b d"],
        logit_scale: Float[Tensor, ""],
        passes: ClipPasses,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with autocast_disabled(q.device):
            summary, terms = clip_terms(passes.statistics(q, k, logit_scale))
        ctx.passes = passes
        ctx.save_for_backward(q, k, logit_scale, *terms)
        ctx.mark_non_differentiable(summary.row_accuracy, summary.column_accuracy)
        return summary

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Any, ...]:
        q, k, logit_scale, *terms = ctx.saved_tensors
        with torch.no_grad(), autocast_disabled(q.device):
            factor = dloss / (2 * len(q))
            gradients = ctx.passes.gradient(
                q, k, logit_scale, SoftmaxTerms(*terms), factor, ctx.needs_input_grad[:3]
            )
        if torch.is_grad_enabled():
            gradients = tuple(
                None if gradient is None else _OnceDifferentiable.apply(gradient, dloss, leaf)
                for gradient, leaf in zip(gradients, (q, k, logit_scale), strict=True)
            )
        return (*gradients, None)


class _OnceDifferentiable(torch.autograd.Function):
    """Gradients of a backward with create_graph=True, which refuse to be differentiated again.

    torch's once_differentiable is not enough: it lets them pass for constants when the outer
    gradient is one, and the second-order terms would be missing without a word.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            'clip_loss: expected one derivative, got a second one; impl="tiled" and "triton" '
            'differentiate once, impl="reference" as often as you like'
        )


def autocast_disabled(device: torch.device) -> AbstractContextManager[Any]:
    """A region where products keep the dtype of their operands, whatever the caller's autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
