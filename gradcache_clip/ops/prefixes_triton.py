"""Several prefixes in one pass of the Triton kernels, which are imported on first use only."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradcache_clip.ops.pairing import Pairing, SideGradient, Statistics

Needs = tuple[bool, bool, bool]
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


def in_one_pass(pairing: Pairing) -> bool:
    """Whether the kernels know these rules: one positive a row, and all columns compete."""
    return not pairing.self_contrast and all(vector is None for vector in pairing.packed()[0])


def prefix_statistics_triton(
    q: Tensor, k: Tensor, logit_scale: Tensor, pairings: Sequence[Pairing], widths: Sequence[int]
) -> list[Statistics]:
    raise NotImplementedError


def prefix_gradient_triton(
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor,
    pairings: Sequence[Pairing],
    widths: Sequence[int],
    rows: Sequence[SideGradient],
    columns: Sequence[SideGradient | None],
    needs: Needs,
) -> Gradients:
    raise NotImplementedError
