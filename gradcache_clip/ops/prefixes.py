"""Statistics of several prefixes of the features as one differentiable op.

M rows q_i, N columns k_j, widths d_1 < ... < d_P. Prefix p of a row are its first d_p entries, L2-
normalised anew; S^p_ij = logit_scale <unit prefix of q_i, unit prefix of k_j>. The products of a
prefix are those of the one before and a few more, so that one pass over the tiles serves all: with
d_P the widest, 2 M N d_P flops in the forward, 2 M N d_P in the backward for S again, and 4 M N d_P
("tiled") or 4 M N (d_1 + ... + d_P) ("triton") for the products with its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcache_clip.ops.contrast import contrast_statistics
from gradcache_clip.ops.implementations import (
    autocast_disabled,
    refuse_transforms,
    resolve_impl,
)
from gradcache_clip.ops.pairing import Gradients, Needs, Pairing, SideGradient, Statistics
from gradcache_clip.ops.prefixes_reference import prefixes_reference, unit_prefix
from gradcache_clip.ops.prefixes_tiled import prefix_gradient_tiled, prefix_statistics_tiled
from gradcache_clip.ops.prefixes_triton import (
    in_one_pass,
    prefix_gradient_triton,
    prefix_statistics_triton,
)
from gradcache_clip.ops.statistics_op import fake_sizes, make_differentiable

_STATISTICS = {"tiled": prefix_statistics_tiled, "triton": prefix_statistics_triton}
_GRADIENT = {"tiled": prefix_gradient_tiled, "triton": prefix_gradient_triton}


def prefix_statistics(
    loss: str,
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    widths: Sequence[int],
    impl: str,
) -> list[Statistics]:
    """Statistics of each prefix, differentiable in q, k and logit_scale.

    "triton" has kernels for one positive a row; with labels, ids or thresholds it makes one pass
    for each width over normalised copies of the prefixes, and holds no M x N tensor either.

    Args:
        loss: name of the public function, for its errors.
        q: (M, D) floating tensor, not normalised. A prefix of zeros stays zero.
        k: (N, D) floating tensor on the same device; in a self-contrast q itself.
        logit_scale: 0-dim, in the dtype of the logits.
        pairing: which logits are positives and which compete; its thresholds are (P, M) and (P, N).
        widths: increasing, the last at most D; see `check_widths`.
        impl: "auto", "reference", "tiled" or "triton".
    """
    dtype = torch.promote_types(q.dtype, k.dtype)
    resolved = resolve_impl(impl, q.device, dtype)
    q, k = q.to(dtype), k.to(dtype)
    if resolved == "reference":
        with autocast_disabled(q.device):
            return prefixes_reference(q, k, logit_scale, _pairings(pairing, widths), widths)
    if resolved == "triton" and not in_one_pass(pairing):
        return one_pass_each(contrast_statistics, loss, q, k, logit_scale, pairing, widths)
    refuse_transforms(loss, q, k, logit_scale)
    vectors, rules = pairing.packed()
    stacked = _statistics(q, k, logit_scale, vectors, rules, list(widths), resolved, loss)
    return [Statistics(*each) for each in zip(*(x.unbind() for x in stacked), strict=True)]


def check_widths(name: str, widths: Sequence[int], D: int) -> None:
    """Raise unless the widths are increasing whole numbers from 1 to D."""
    increasing = all(a < b for a, b in zip((0, *widths), widths, strict=False))
    if not widths or not increasing or widths[-1] > D:
        raise ValueError(
            f"{name}: expected increasing widths from 1 to the width of the features, {D}, got "
            f"{list(widths)}; the last one may be {D} itself"
        )


def _pairings(pairing: Pairing, widths: Sequence[int]) -> list[Pairing]:
    """The rules of each prefix, which differ in their thresholds."""
    rows, columns = pairing.row_threshold, pairing.column_threshold
    return [
        pairing._replace(
            row_threshold=None if rows is None else rows[index],
            column_threshold=None if columns is None else columns[index],
        )
        for index in range(len(widths))
    ]


def one_pass_each(
    statistics: Callable[..., Statistics],
    loss: str,
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    widths: Sequence[int],
) -> list[Statistics]:
    """By Triton kernels, with one contrast a width over normalised copies of the prefixes."""
    result = []
    for each, width in zip(_pairings(pairing, widths), widths, strict=True):
        rows = unit_prefix(q, width).to(q.dtype)
        columns = rows if pairing.self_contrast else unit_prefix(k, width).to(k.dtype)
        result.append(statistics(loss, rows, columns, logit_scale, each, "triton"))
    return result


class PrefixPasses(NamedTuple):
    """The two passes over the tiles of all prefixes; their fields have a leading dimension P."""

    impl: str
    """"tiled", or "triton" where `in_one_pass` of the pairing."""
    widths: Sequence[int]

    def statistics(self, q: Tensor, k: Tensor, logit_scale: Tensor, pairing: Pairing) -> Statistics:
        """What one pass over the logits leaves of each row and column."""
        with autocast_disabled(q.device):
            pairings = _pairings(pairing, self.widths)
            each = _STATISTICS[self.impl](q, k, logit_scale, pairings, self.widths)
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
    ) -> Gradients:
        """dq, dk and dlogit_scale; None where not needed, and dk of a self-contrast."""
        row_sides = [SideGradient(*each) for each in zip(*rows, strict=True)]
        column_sides: list[SideGradient | None] = [None] * len(self.widths)
        if columns is not None:
            column_sides = [SideGradient(*each) for each in zip(*columns, strict=True)]
        rules = _pairings(pairing, self.widths), self.widths
        with autocast_disabled(q.device):
            return _GRADIENT[self.impl](q, k, logit_scale, *rules, row_sides, column_sides, needs)


# torch.compile calls these two as they are, through the shapes that the fake kernels give.
@torch.library.custom_op(
    "gradcache_clip::prefix_statistics",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor logit_scale, Tensor?[] vectors, int[] rules, int[] widths, "
    "str impl, str loss) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _statistics(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    vectors: Sequence[Tensor | None],
    rules: Sequence[int],
    widths: Sequence[int],
    impl: str,
    loss: str,
) -> tuple[Tensor, ...]:
    """Statistics with a leading dimension of prefixes."""
    passes = PrefixPasses(impl, widths)
    return tuple(passes.statistics(q, k, logit_scale, Pairing.unpacked(vectors, rules)))


@torch.library.custom_op(
    "gradcache_clip::prefix_gradient",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor logit_scale, Tensor?[] vectors, int[] rules, int[] widths, "
    "str impl, str loss, Tensor[] rows, Tensor[] columns, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
)
def _gradient(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    vectors: Sequence[Tensor | None],
    rules: Sequence[int],
    widths: Sequence[int],
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
    gradients = PrefixPasses(impl, widths).gradient(q, k, logit_scale, pairing, *sides, needed)
    return tuple(q.new_empty(0) if gradient is None else gradient for gradient in gradients)


@_statistics.register_fake
def _(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    vectors: Any,
    rules: Any,
    widths: Sequence[int],
    impl: str,
    loss: str,
) -> tuple[Tensor, ...]:
    sizes = fake_sizes(q, k, vectors, rules)
    return tuple(logit_scale.new_empty(len(widths), size) for size in sizes)


make_differentiable(_statistics, _gradient)
