"""Statistics of a contrast as one differentiable op, so that losses are a few lines over vectors.

M rows q_i, N columns k_j, S_ij = logit_scale <q_i, k_j>. The losses of the softmax family differ in
their `Pairing` and in what they do with vectors of M and N numbers; autograd brings the gradients
of those vectors back, and one more pass over the tiles turns them into dq, dk and dlogit_scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.contrast_reference import contrast_reference
from gradcache_clip.ops.contrast_tiled import gradient_tiled, statistics_tiled
from gradcache_clip.ops.contrast_triton import gradient_triton, statistics_triton
from gradcache_clip.ops.implementations import (
    autocast_disabled,
    refuse_transforms,
    resolve_impl,
)
from gradcache_clip.ops.pairing import Gradients, Needs, Pairing, SideGradient, Statistics
from gradcache_clip.ops.statistics_op import fake_sizes, make_differentiable

_STATISTICS = {"tiled": statistics_tiled, "triton": statistics_triton}
_GRADIENT = {"tiled": gradient_tiled, "triton": gradient_triton}


def contrast_statistics(
    loss: str, q: Tensor, k: Tensor, logit_scale: Tensor, pairing: Pairing, impl: str
) -> Statistics:
    """Statistics of the contrast, differentiable in q, k and logit_scale.

    Args:
        loss: name of the public function, for its errors.
        q: (M, D) floating tensor.
        k: (N, D) floating tensor on the same device; in a self-contrast q itself.
        logit_scale: 0-dim, in the dtype of the logits.
        pairing: which logits are positives and which compete.
        impl: "auto", "reference", "tiled" or "triton".
    """
    dtype = torch.promote_types(q.dtype, k.dtype)
    resolved = resolve_impl(impl, q.device, dtype)
    q, k = q.to(dtype), k.to(dtype)
    if resolved == "reference":
        with autocast_disabled(q.device):
            return contrast_reference(q, k, logit_scale, pairing)
    refuse_transforms(loss, q, k, logit_scale)
    vectors, rules = pairing.packed()
    return Statistics(*_statistics(q, k, logit_scale, vectors, rules, resolved, loss))


class ContrastPasses(NamedTuple):
    """The two passes over the tiles of a contrast, below autograd and outside of any autocast."""

    impl: str
    """"tiled" or "triton"."""

    def statistics(self, q: Tensor, k: Tensor, logit_scale: Tensor, pairing: Pairing) -> Statistics:
        """What one pass over the logits leaves of each row and column."""
        with autocast_disabled(q.device):
            return _STATISTICS[self.impl](q, k, logit_scale, pairing)

    def gradient(
        self,
        q: Tensor,
        k: Tensor,
        logit_scale: Tensor,
        pairing: Pairing,
        rows: SideGradient,
        columns: SideGradient | None,
        needs: Needs,
    ) -> Gradients:
        """dq, dk and dlogit_scale; None where not needed, and dk of a self-contrast."""
        with autocast_disabled(q.device):
            return _GRADIENT[self.impl](q, k, logit_scale, pairing, rows, columns, needs)


# torch.compile calls these two as they are, through the shapes that the fake kernels give.
@torch.library.custom_op(
    "gradcache_clip::contrast_statistics",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor logit_scale, Tensor?[] vectors, int[] rules, str impl, "
    "str loss) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _statistics(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    vectors: Sequence[Tensor | None],
    rules: Sequence[int],
    impl: str,
    loss: str,
) -> tuple[Tensor, ...]:
    return tuple(
        ContrastPasses(impl).statistics(q, k, logit_scale, Pairing.unpacked(vectors, rules))
    )


@torch.library.custom_op(
    "gradcache_clip::contrast_gradient",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor logit_scale, Tensor?[] vectors, int[] rules, str impl, "
    "str loss, Tensor[] rows, Tensor[] columns, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def _gradient(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    vectors: Sequence[Tensor | None],
    rules: Sequence[int],
    impl: str,
    loss: str,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients that are not needed come back empty."""
    pairing = Pairing.unpacked(vectors, rules)
    sides = SideGradient(*rows), SideGradient(*columns) if pairing.both_ways else None
    needed = needs[0], needs[1], needs[2]
    gradients = ContrastPasses(impl).gradient(q, k, logit_scale, pairing, *sides, needed)
    return tuple(q.new_empty(0) if gradient is None else gradient for gradient in gradients)


@_statistics.register_fake
def _(
    q: Tensor, k: Tensor, logit_scale: Tensor, vectors: Any, rules: Any, impl: str, loss: str
) -> tuple[Tensor, ...]:
    return tuple(logit_scale.new_empty(size) for size in fake_sizes(q, k, vectors, rules))


make_differentiable(_statistics, _gradient)
