"""Softmax statistics as one differentiable op, so that losses are a few lines over vectors.

M rows q_i, N columns k_j, S_ij = logit_scale <q_i, k_j>. The losses of the softmax family differ in
their `Pairing` and in what they do with vectors of M and N numbers; autograd brings the gradients
of those vectors back, and one more pass over the tiles turns them into dq, dk and dlogit_scale.

With widths d_1 < ... < d_P the same for P prefixes: prefix p of a row is its first d_p entries,
L2-normalised anew. The products of a prefix are those of the one before and a few more, so one pass
over the tiles serves all: 2 M N d_P flops in the forward, 2 M N d_P in the backward for S again,
and 4 M N d_P ("tiled") or 4 M N (d_1 + ... + d_P) ("triton") for the products with its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from gradcache_clip.ops.prefixes_tiled import prefix_gradient_tiled, prefix_statistics_tiled
from gradcache_clip.ops.prefixes_triton import (
    in_one_pass,
    prefix_gradient_triton,
    prefix_statistics_triton,
)
from gradcache_clip.ops.statistics_op import register
from gradcache_clip.ops.unit import unit, wide_unit

_STATISTICS = {"tiled": statistics_tiled, "triton": statistics_triton}
_GRADIENT = {"tiled": gradient_tiled, "triton": gradient_triton}
_PREFIX_STATISTICS = {"tiled": prefix_statistics_tiled, "triton": prefix_statistics_triton}
_PREFIX_GRADIENT = {"tiled": prefix_gradient_tiled, "triton": prefix_gradient_triton}


def contrast_statistics(
    loss: str, q: Tensor, k: Tensor, logit_scale: Tensor, pairing: Pairing, impl: str
) -> Statistics:
    """Compute the statistics of a contrast, differentiable in q, k, logit_scale and column_bias.

    Args:
        loss: name of the public function, for its errors.
        q: (M, D) floating tensor.
        k: (N, D) floating tensor on the same device; q itself in a self-contrast.
        logit_scale: 0-dim, in the dtype of the logits.
        pairing: which logits are positives and which compete.
        impl: "auto", "reference", "tiled" or "triton".
    """
    q, k, impl = promoted(q, k, impl)
    if impl == "reference":
        with autocast_disabled(q.device):
            return contrast_reference(q, k, logit_scale, pairing)
    return _differentiable(loss, q, k, logit_scale, pairing, (), impl)


def prefix_statistics(
    loss: str,
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    impl: str,
    widths: Sequence[int],
) -> list[Statistics]:
    """Compute the statistics of each prefix, differentiable as in `contrast_statistics`.

    The kernels take one positive per row; with any further rule "triton" makes one pass
    per width over normalised copies of the prefixes, and holds no M x N tensor either.

    Args:
        loss, logit_scale, impl: as in `contrast_statistics`.
        q: (M, D) floating tensor, not normalised. A prefix of zeros stays zero.
        k: (N, D) floating tensor on the same device; q itself in a self-contrast.
        pairing: as in `contrast_statistics`, with thresholds of shape (P, M) and (P, N).
        widths: increasing, the last at most D; see `check_widths`.
    """
    q, k, impl = promoted(q, k, impl)
    if impl == "reference":
        with autocast_disabled(q.device):
            return _reference_of_prefixes(q, k, logit_scale, pairing, widths)
    if impl == "triton" and not in_one_pass(pairing):
        return one_pass_each(contrast_statistics, loss, q, k, logit_scale, pairing, widths)
    return _differentiable(loss, q, k, logit_scale, pairing, widths, impl).unstacked()


def promoted(q: Tensor, k: Tensor, impl: str) -> tuple[Tensor, Tensor, str]:
    """Return both in their common dtype, and the implementation that takes it."""
    dtype = torch.promote_types(q.dtype, k.dtype)
    return q.to(dtype), k.to(dtype), resolve_impl(impl, q.device, dtype)


def one_pass_each(
    statistics: Callable[..., Statistics],
    loss: str,
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    widths: Sequence[int],
) -> list[Statistics]:
    """Call `statistics` once per width, over normalised copies of the prefixes, by kernels."""
    result = []
    for each, width in zip(pairing.of_prefixes(len(widths)), widths, strict=True):
        rows = unit(q, width)
        columns = rows if pairing.self_contrast else unit(k, width)
        result.append(statistics(loss, rows, columns, logit_scale, each, "triton"))
    return result


def _reference_of_prefixes(
    q: Tensor, k: Tensor, logit_scale: Tensor, pairing: Pairing, widths: Sequence[int]
) -> list[Statistics]:
    rules = zip(pairing.of_prefixes(len(widths)), widths, strict=True)
    return [
        contrast_reference(wide_unit(q, width), wide_unit(k, width), logit_scale, each)
        for each, width in rules
    ]


class ContrastPasses(NamedTuple):
    """The two passes over the tiles of a contrast, below autograd and outside of any autocast."""

    impl: str
    """"tiled" or "triton"; with widths "triton" only where `in_one_pass` of the pairing."""
    widths: Sequence[int] = ()
    """Of prefixes; where there are any, all statistics have a leading dimension P."""

    def statistics(self, q: Tensor, k: Tensor, logit_scale: Tensor, pairing: Pairing) -> Statistics:
        """Reduce the logits of each row and column to a few numbers, in one pass."""
        with autocast_disabled(q.device):
            if not self.widths:
                return _STATISTICS[self.impl](q, k, logit_scale, pairing)
            rules = pairing.of_prefixes(len(self.widths))
            each = _PREFIX_STATISTICS[self.impl](q, k, logit_scale, rules, self.widths)
        return Statistics(*(torch.stack(field) for field in zip(*each, strict=True)))

    def gradient(
        self,
        q: Tensor,
        k: Tensor,
        logit_scale: Tensor,
        pairing: Pairing,
        rows: SideGradient,
        columns: SideGradient | None,
        needs: Needs,
        column_sums: Tensor | None,
        dtype: torch.dtype,
    ) -> Gradients:
        """Compute dq and dk in `dtype`, and dlogit_scale.

        None where not needed, and for dk of a self-contrast.

        Adds the gradient of column_bias to `column_sums` if there are any.
        """
        asked: Any = needs, column_sums, dtype
        with autocast_disabled(q.device):
            if not self.widths:
                return _GRADIENT[self.impl](q, k, logit_scale, pairing, rows, columns, *asked)
            P = len(self.widths)
            sides = rows.unstacked(), [None] * P if columns is None else columns.unstacked()
            rules = pairing.of_prefixes(P), self.widths
            return _PREFIX_GRADIENT[self.impl](q, k, logit_scale, *rules, *sides, *asked)

    def shapes(self, M: int, N: int, pairing: Pairing) -> list[tuple[int, ...]]:
        """Return the shapes of the fields of `Statistics`; what a contrast lacks is empty."""
        labelled, N = pairing.row_labels is not None, N if pairing.both_ways else 0
        lengths = M, M, M, M * labelled, N * labelled, N, N, N * labelled
        leading = (len(self.widths),) if self.widths else ()
        return [(*leading, length) for length in lengths]


# In the op, widths follow the numbers of the pairing.
def _unpack(
    vectors: Sequence[Tensor | None], numbers: Sequence[int], impl: str
) -> tuple[ContrastPasses, Pairing]:
    return ContrastPasses(impl, numbers[4:]), Pairing.unpacked(vectors, numbers[:4])


_statistics, _gradient = register("contrast", _unpack)


def _differentiable(
    loss: str,
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    widths: Sequence[int],
    impl: str,
) -> Statistics:
    refuse_transforms(loss, q, k, logit_scale, pairing.column_bias)
    vectors, numbers = pairing.packed()
    given = q, k, logit_scale, vectors, [*numbers, *widths], impl, loss, pairing.column_bias
    return Statistics(*_statistics(*given))
