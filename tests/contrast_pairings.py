"""Pairings of every kind, features for them, and what a contrast makes of both."""

from __future__ import annotations

import torch
from clip_inputs import ROUNDED_LOGIT, Inputs
from torch import Tensor
from torch.nn.functional import normalize

from gradcache_clip.ops import contrast
from gradcache_clip.ops.pairing import Pairing

# Each is two kernels to compile, so the longer ones stand for the shorter ones that they hold.
RULES = [
    "",
    "shift",
    "labels",
    "ids",
    "rows",
    "rows labels",
    "self",
    "self labels",
    "self labels ids",
    "labels ids groups bias",
    "rows shift ids groups bias guide",
    "self ids groups guide",
    "thresholds ids guide",
]


def pairing(rules: str, M: int, N: int, device: str) -> Pairing:
    """A pairing in which every rule that is named has something to do."""
    has = set(rules.split())
    self_contrast = "self" in has
    vectors: dict[str, Tensor] = {}
    for rule, most in (("labels", N // 4), ("ids", N // 4), ("groups", 3)):
        if rule in has:
            row, column = (torch.randint(max(2, most), (n,), device=device) for n in (M, N))
            vectors |= {f"row_{rule}": column if self_contrast else row, f"column_{rule}": column}
    for rule, name in (("thresholds", "threshold"), ("bias", "bias")):
        if rule in has:
            row, column = (2 * torch.randn(n, device=device) for n in (M, N))
            vectors |= {f"row_{name}": row, f"column_{name}": column}
    if "guide" in has:
        # Of a width that is no multiple of a step of the main loop.
        row, column = (torch.randn(9, n, device=device) for n in (M, N))
        vectors |= {"row_guide": column if self_contrast else row, "column_guide": column}
        row, column = (torch.rand(n, device=device) for n in (M, N))
        vectors |= {"row_guide_threshold": column if self_contrast else row}
        vectors |= {"column_guide_threshold": column}
    both_ways = "rows" not in has and not self_contrast
    shift = N // 2 if self_contrast else min(3, N - 1) * ("shift" in has)
    last = {"both_ways": both_ways, "self_contrast": self_contrast}
    return Pairing(**vectors, positive_shift=shift, **last)


def outcome(rules: Pairing, impl: str, inputs: Inputs) -> list[Tensor]:
    """Statistics as log-sum-exps, and the gradients of a weighted loss over them.

    That of a bias of the columns is summed in fp32 whatever the features are.
    """
    q, k, logit_scale = inputs
    learned = [] if rules.column_bias is None else [rules.column_bias.requires_grad_()]
    k = q if rules.self_contrast else k
    rows_and_columns = contrast.contrast_statistics("loss", q, k, logit_scale, rules, impl)
    sides = [rows_and_columns[:4]] + [rows_and_columns[4:]] * rules.both_ways
    values, loss = [], torch.zeros((), device=q.device)
    for side, (positive, peak, total, hardest) in enumerate(sides):
        lse = torch.where(total > 0, peak + total.clamp_min(1e-30).log(), 0)
        weight = torch.linspace(0.5, 1.5, len(lse), device=q.device) / len(lse)
        loss = loss + (weight * lse).sum()
        values += [lse, peak]
        if side == 0 or rules.row_labels is not None:
            loss = loss - (weight.flip(0) * positive).sum() / 4
            values += [positive, hardest]
    leaves = (q, logit_scale) if rules.self_contrast else inputs
    gradients = torch.autograd.grad(loss, [*learned, *leaves])
    return [each.detach().double() for each in (*values, *gradients)]


def unequal_inputs(M: int, N: int, D: int, dtype: torch.dtype, device: str) -> Inputs:
    q, k = (normalize(torch.randn(n, D, dtype=torch.float64), dim=1) for n in (M, N))
    scale = torch.tensor(10.0, dtype=torch.float64)
    return Inputs(q.to(device), k.to(device), scale.to(device)).to(dtype)


def assert_close(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Statistics to the rounding of fp32, and the last three, the gradients, to that of `dtype`."""
    for place, (value, want) in enumerate(zip(got, expected, strict=True)):
        finite = want.isfinite()
        assert torch.equal(value.isfinite(), finite) and not value.isnan().any(), place
        if finite.any():
            rounding = torch.finfo(dtype if place >= len(got) - 3 else torch.float32).eps
            # dlogit_scale is a sum of terms of either sign that all weigh like 1.
            floor = 0.3 if want.ndim == 0 else 1e-3
            scale = want[finite].abs().max().clamp_min(floor)
            error = (value - want)[finite].abs().max() / scale
            assert error.item() < 8 * rounding + ROUNDED_LOGIT, (place, error)
