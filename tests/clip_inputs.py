"""Features, losses and gradients that the tests of the CLIP op and of its kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

# Half a unit in the last place of an fp32 logit between 64 and 128.
ROUNDED_LOGIT = 2.0**-18

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    logit_scale: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """Leaves in another dtype; the scale stays fp32 unless everything becomes fp64."""
        scale_dtype = torch.promote_types(dtype, torch.float32)
        return Inputs(
            self.q.detach().to(dtype).requires_grad_(),
            self.k.detach().to(dtype).requires_grad_(),
            self.logit_scale.detach().to(scale_dtype).requires_grad_(),
        )


def random_inputs(
    B: int, D: int, dtype: torch.dtype, *, scale: float = 30.0, device: str = "cpu"
) -> Inputs:
    """Unrelated unit vectors."""
    q, k = (normalize(torch.randn(B, D, dtype=torch.float64), dim=1) for _ in range(2))
    return _leaves(q, k, scale, dtype, device)


def clustered_inputs(
    cosine: float, B: int, D: int, dtype: torch.dtype, *, device: str = "cpu"
) -> Inputs:
    """Every image against every text near one cosine, at scale 100: a gap, or a collapse."""
    axis = torch.zeros(D, dtype=torch.float64)
    axis[0] = 1
    across = torch.zeros_like(axis)
    across[1] = 1
    centre = cosine * axis + (1 - cosine**2) ** 0.5 * across
    noise = 0.02 * torch.randn(2, B, D, dtype=torch.float64)
    q, k = normalize(axis + noise[0], dim=1), normalize(centre + noise[1], dim=1)
    return _leaves(q, k, 100.0, dtype, device)


def _leaves(q: Tensor, k: Tensor, scale: float, dtype: torch.dtype, device: str) -> Inputs:
    logit_scale = torch.tensor(scale, dtype=torch.float64)
    return Inputs(q.to(device), k.to(device), logit_scale.to(device)).to(dtype)


def plain_loss(q: Tensor, k: Tensor, logit_scale: Tensor) -> Tensor:
    """What a person writes without this library, in the dtype of the features throughout."""
    logits = logit_scale.to(q.dtype) * q @ k.T
    labels = torch.arange(len(q), device=q.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def loss_and_gradients(loss: Loss, inputs: Inputs, *, outer: float = 1.0) -> list[Tensor]:
    """Loss, dq, dk, dlogit_scale of outer * loss, in fp64."""
    value = loss(*inputs)
    gradients = torch.autograd.grad(outer * value, inputs)
    return [value.detach().double(), *(gradient.double() for gradient in gradients)]


def relative_errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    """For each tensor the largest difference over the largest expected entry."""
    return [
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        for a, b in zip(got, expected, strict=True)
    ]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN, so that reading one before writing it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(2).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
