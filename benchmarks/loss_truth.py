"""The inputs of loss.py, the losses as a person writes them, and their fp64 truth.

B pairs, D features. q are image, k text features; in the NT-Xent loss the two views of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

Leaves = tuple[Tensor, ...]
"""q and k (B, D), the scale of the logits and, for the sigmoid loss, their bias."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTPUTS = {
    "clip": ("loss", "dq", "dk", "dscale"),
    "siglip": ("loss", "dq", "dk", "dscale", "dbias"),
    "nt_xent": ("loss", "dq", "dk", "dscale"),
}
SIGLIP_BIAS = -10.0


@dataclass(frozen=True)
class Case:
    """Where the vectors lie, and the scale of their logits."""

    meaning: str
    scale: float
    cosine: float | None = None
    """Of every q to every k, about; unrelated vectors when None."""
    slipped: bool = False
    """The vector equal to q_i is k_(i+1)."""
    dtype: str = ""
    """Replaces the dtype of the run."""


CASES = {
    "random": Case("unrelated vectors, scale 14.3", 1 / 0.07),
    "gap": Case("all cosines near -0.6 (a modality gap), scale 100", 100.0, -0.6),
    "slipped": Case("q_i equals k_(i+1), a list off by a row; scale 100", 100.0, slipped=True),
    "near": Case("all cosines near 0.9, scale 100, bf16", 100.0, 0.9, dtype="bf16"),
}


def make_leaves(
    loss: str, case: Case, batch_size: int, width: int, dtype: str, device: str
) -> Leaves:
    """The same tensors for every contestant: unit vectors, rounded to their dtype; fp32 scalars."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch_size, width, generator=generator) for _ in range(2))
    if case.slipped:
        k = q.roll(1, 0)
    if case.cosine is not None:
        q, k = q.mul_(0.02), k.mul_(0.02)
        q[:, 0] += 1
        k[:, 0] += case.cosine
        k[:, 1] += (1 - case.cosine**2) ** 0.5
    scalars = [case.scale, SIGLIP_BIAS][: len(OUTPUTS[loss]) - 3]
    tensors = [
        *(normalize(x, dim=1).to(device, DTYPES[case.dtype or dtype]) for x in (q, k)),
        *(torch.tensor(value, device=device) for value in scalars),
    ]
    return tuple(tensor.requires_grad_() for tensor in tensors)


def plain_clip(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    """What a person writes: the matrix and two cross-entropies, in the dtype of the features."""
    logits = scale * q @ k.T
    labels = torch.arange(len(q), device=q.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def plain_siglip(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The pseudocode of the SigLIP paper (Zhai et al. 2023, algorithm 1)."""
    signs = 2 * torch.eye(len(q), dtype=q.dtype, device=q.device) - 1
    return -logsigmoid(signs * (scale * q @ k.T + bias)).sum() / len(q)


def plain_nt_xent(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    """SimCLR (Chen et al. 2020, equation 1): each view against the 2B - 1 others."""
    views = torch.cat([q, k])
    logits = (scale * views @ views.T).fill_diagonal_(-torch.inf)
    return cross_entropy(logits, torch.arange(len(views), device=q.device).roll(len(q)))


PLAIN: dict[str, Callable[..., Tensor]] = {
    "clip": plain_clip,
    "siglip": plain_siglip,
    "nt_xent": plain_nt_xent,
}


def truth(loss: str, leaves: Leaves, *, normalised: bool) -> list[Tensor]:
    """Loss and gradients in fp64 at these very numbers, through a normalisation if asked."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    features = [normalize(x, dim=1) if normalised else x for x in exact[:2]]
    value = PLAIN[loss](*features, *exact[2:])
    return [value.detach(), *torch.autograd.grad(value, exact)]


def outputs(function: Callable[..., Tensor], leaves: Leaves) -> list[Tensor | None]:
    """Loss and gradients; None where a gradient does not exist."""
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)]


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest exact entry; infinite where something is not finite."""
    if not got.isfinite().all():
        return float("inf")
    difference = (got.double() - exact).abs().max()
    return float(difference / exact.abs().max().clamp_min(1e-30))


def relative_errors(
    loss: str, got: Sequence[Tensor | None], exact: Sequence[Tensor]
) -> dict[str, float]:
    """The error of each output by name; a scalar without a gradient is left out."""
    named = dict(zip(OUTPUTS[loss], zip(got, exact, strict=True), strict=True))
    missing = [name for name in ("dq", "dk") if named[name][0] is None]
    if missing:
        raise ValueError(f"{missing[0]}: expected a gradient, got none")
    return {name: relative_error(a, b) for name, (a, b) in named.items() if a is not None}
