"""What launchers share that write G panel by panel: cuts, workspace and the vendor's product."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from gradcache_clip.kernels.cuts import multiprocessors, panel_shape, up_to_whole
from gradcache_clip.kernels.launch_config import (
    FLOAT16_GRADIENT_SCALE,
    LaunchConfig,
)


def slices(size: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover range(size)."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


class Panels:
    """M x N logits in panels whose G, in tiles that are whole, fits the workspace."""

    def __init__(self, q: Tensor, k: Tensor, config: LaunchConfig, *, planes: int = 1) -> None:
        """Take features whose width is a multiple of BLOCK_D, and how many G there are."""
        self.q, self.k, self.config = q, k, config
        itemsize = q.element_size() * planes
        height, width = panel_shape(config, len(k), itemsize, q.shape[1], multiprocessors(q.device))
        self.shape = min(height, len(q)), min(width, len(k))
        self.stride = up_to_whole(self.shape[1], config.BLOCK_N)
        whole_rows = up_to_whole(self.shape[0], config.BLOCK_M)
        self._allocation = planes, whole_rows, self.stride

    def allocated(self) -> Tensor:
        """Planes x rows x columns of G, not initialised."""
        return self.q.new_empty(self._allocation)

    def stripes(self) -> Iterator[slice]:
        return slices(len(self.q), self.shape[0])

    def columns_from(self, first: int = 0) -> Iterator[slice]:
        for part in slices(len(self.k) - first, self.shape[1]):
            yield slice(first + part.start, first + part.stop)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, accumulated in fp32."""
    out = a.new_empty((len(a), b.shape[1]), dtype=torch.float32)
    add_product(out, a, b, beta=0)
    return out


def add_product(out: Tensor, a: Tensor, b: Tensor, *, beta: int = 1) -> None:
    """out = beta out + a b in fp32, accumulated in fp32."""
    add = _widened if a.dtype == torch.float32 else _fastest(a.device)
    add(out, a, b, beta)


def _in_place(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    torch.addmm(out, a, b, beta=beta, out_dtype=torch.float32, out=out)


def _through_a_copy(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    own = torch.mm(a, b, out_dtype=torch.float32)
    out.add_(own) if beta else out.copy_(own)


def _widened(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    out.addmm_(a.float(), b.float(), beta=beta)


@cache
def _fastest(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, int], None]:
    """The best way to multiply 16-bit matrices into fp32 that this torch has on the device."""
    for add in (_in_place, _through_a_copy):
        if _works(add, device):
            return add
    if device.type == "cuda":
        warnings.warn(
            f"torch {torch.__version__} has no 16-bit matrix product with an fp32 result: the "
            "gradients of fused losses take fp32 products, about ten times as long; install torch "
            "2.8 or later",
            stacklevel=2,
        )
    return _widened


def _works(add: Callable[..., None], device: torch.device) -> bool:
    out = torch.ones(16, 16, device=device)
    try:
        add(out, out.half(), out.half(), 1)
    except (TypeError, RuntimeError):
        return False
    return True


def in_range_of_float16(
    vectors: list[Tensor | None],
) -> tuple[list[Tensor | None], Tensor]:
    """The vectors over a common factor, so that |G| <= FLOAT16_GRADIENT_SCALE."""
    # exp(S - max) <= 1: no entry of G is larger than all vectors at their largest together.
    largest = sum(each.abs().amax() for each in vectors if each is not None)
    largest = largest.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = [None if each is None else each / largest * FLOAT16_GRADIENT_SCALE for each in vectors]
    return scaled, largest / FLOAT16_GRADIENT_SCALE
