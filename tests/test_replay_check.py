"""How much a replay may differ from its embed, by the precision that features are computed in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradcache_clip import GradCache, ReplayMismatchError


class Drifting(nn.Module):
    """Multiplies its second and later passes over a chunk by 1 + drift."""

    def __init__(self, drift: float, dtype: torch.dtype, chunks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, dtype=dtype))
        self.drift, self.chunks, self.calls = drift, chunks, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        factor = 1 + self.drift if self.calls > self.chunks else 1.0
        return (x * self.weight).double().mul(factor).to(self.weight.dtype)


def step(drift: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder = Drifting(drift, dtype, chunks=4)
    cache = GradCache((encoder,), lambda x: x.float().square().mean(), chunk_size=3)
    cache(torch.randn(12, 8, dtype=dtype))


@pytest.mark.parametrize(
    ("dtype", "rounding", "change"),
    [
        (torch.float64, 1e-11, 1e-7),
        (torch.float32, 1e-5, 1e-3),
        (torch.float16, 1e-3, 1e-2),
        (torch.bfloat16, 1e-2, 1e-1),
    ],
)
def test_rounding_of_the_features_precision_passes_and_more_does_not(dtype, rounding, change):
    step(rounding, dtype)
    with pytest.raises(ReplayMismatchError, match="encoder 0"):
        step(change, dtype)


def test_features_of_fp32_that_autocast_computed_coarsely_may_differ_as_much():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(1e-2, torch.float32)
    with pytest.raises(ReplayMismatchError):
        step(1e-2, torch.float32)


def test_the_error_names_the_chunk_that_changed_most():
    class OneChunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.weight + (self.calls == 6)  # the replay of the second of four

    with pytest.raises(ReplayMismatchError, match=r"chunk 1 of 4.*1 chunks in all"):
        GradCache((OneChunk(),), lambda x: x.square().mean(), chunk_size=2, check_rows="off")(
            torch.randn(8, 4)
        )


def test_nan_in_a_replay_is_a_change():
    with pytest.raises(ReplayMismatchError, match="nan"):
        step(float("nan"), torch.float32)
