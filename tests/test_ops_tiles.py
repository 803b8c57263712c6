"""Tiles are as large as the device wants, and their memory is bounded.

The meta device, which computes nothing, stands for any accelerator.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache_clip.ops.contrast_tiled import statistics_tiled
from gradcache_clip.ops.late_interaction_op import TokenPasses, TokenRules
from gradcache_clip.ops.pairing import Pairing
from gradcache_clip.ops.prefixes_tiled import prefix_statistics_tiled
from gradcache_clip.ops.siglip_tiled import Wanted, siglip_tiled

B, D = 20_000, 2


class Tiles(TorchDispatchMode):
    """The shapes of what products of two matrices return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.shapes.append(result.shape)
        return result


def contrast(q: Tensor, k: Tensor, scale: Tensor) -> None:
    statistics_tiled(q, k, scale, Pairing())


def self_contrast(q: Tensor, k: Tensor, scale: Tensor) -> None:
    statistics_tiled(q, q, scale, Pairing(positive_shift=1, both_ways=False, self_contrast=True))


def sigmoid(q: Tensor, k: Tensor, scale: Tensor) -> None:
    siglip_tiled(q, k, scale, scale, None, Wanted(*(False,) * 5))


def prefixes(q: Tensor, k: Tensor, scale: Tensor) -> None:
    prefix_statistics_tiled(q, k, scale, [Pairing()], [D])


def tokens(q: Tensor, k: Tensor, scale: Tensor) -> None:
    rules = TokenRules(None, None, False, "sum")
    given = (x.view(-1, 8, D) for x in (q, k))
    TokenPasses("tiled").statistics(*given, scale, rules)


@pytest.mark.parametrize(
    ("pass_over", "rows", "columns"),
    [
        (contrast, 2048, 8192),
        (self_contrast, 2048, 2048),
        (sigmoid, 2048, 8192),
        (prefixes, 1024, 4096),
        (tokens, 2048, 8192),
    ],
)
def test_an_accelerator_gets_large_tiles(
    pass_over: Callable[..., None], rows: int, columns: int
) -> None:
    q, k, scale = (torch.empty(shape, device="meta") for shape in ((B, D), (B, D), ()))
    with Tiles() as tiles:
        pass_over(q, k, scale)
    assert max(tiles.shapes, key=torch.Size.numel) == (rows, columns)
    stripes, panels = ceil(B / rows), ceil(B / columns)
    expected = stripes * (stripes + 1) // 2 if pass_over is self_contrast else stripes * panels
    assert len(tiles.shapes) == expected


def test_a_cpu_gets_tiles_for_its_cache() -> None:
    q = k = torch.ones(1025, D)
    with Tiles() as tiles:
        contrast(q, k, torch.ones(()))
    assert [tuple(shape) for shape in tiles.shapes] == [(1024, 1024), (1024, 1), (1, 1024), (1, 1)]
