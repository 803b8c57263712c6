"""Panels of the gradient: their cut, and the vendor's product that adds to an accumulator."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from gradcache_clip.kernels import panels
from gradcache_clip.kernels.cuts import panel_shape
from gradcache_clip.kernels.launch_config import (
    LaunchConfig,
    table_entry,
)
from gradcache_clip.kernels.similarity import padded


@pytest.fixture(autouse=True)
def forgotten() -> None:
    panels._fastest.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_and_accumulated_in_fp32(dtype: torch.dtype) -> None:
    a, b = torch.randn(5, 300).to(dtype), torch.randn(300, 4).to(dtype)
    exact = a.double() @ b.double()
    torch.testing.assert_close(panels.product(a, b).double(), exact, rtol=1e-5, atol=1e-4)
    out = torch.ones(5, 4)
    panels.add_product(out, a, b)
    torch.testing.assert_close(out.double(), exact + 1, rtol=1e-5, atol=1e-4)


def test_products_go_in_place_where_this_torch_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator exists, takes an fp32 accumulator as input and output, and is tried first."""
    schema = torch.ops.aten.addmm.dtype_out._schema
    assert [each.name for each in schema.arguments] == [
        *("self", "mat1", "mat2", "out_dtype", "beta", "alpha", "out")
    ]
    tried = []
    monkeypatch.setattr(panels, "_works", lambda add, device: tried.append(add) or True)
    assert panels._fastest(torch.device("cuda")) is panels._in_place
    assert tried == [panels._in_place]


def test_slow_products_say_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "_works", lambda add, device: False)
    with pytest.warns(UserWarning, match=r"torch .* has no 16-bit matrix product .* 2\.8 or later"):
        assert panels._fastest(torch.device("cuda")) is panels._widened
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        panels._fastest(torch.device("cuda"))
        panels._fastest(torch.device("cpu"))


def test_panels_end_with_a_wave_of_the_vendors_tiles() -> None:
    """On the 132 multiprocessors of an H100."""
    config = replace(table_entry(90, torch.bfloat16), BLOCK_M=128)
    shape = partial(panel_shape, config, itemsize=2, multiprocessors=132)
    assert shape(65_536, D=512) == (8448, 8448)
    assert shape(65_536, D=768) == (11_264, 11_264)
    assert shape(65_536, D=1024) == (12_672, 8448)
    # Full rows where they fit, and a wave of any kind only where there is one.
    assert shape(8192, D=512) == (8448, 8192)
    small = LaunchConfig(128, 128, 64, 8, 3, workspace_bytes=2**20)
    assert panel_shape(small, 65_536, 2, 512, 132) == (768, 640)


def test_features_are_copied_only_to_be_padded_or_aligned() -> None:
    features = torch.randn(3, 64)
    assert padded(features, 32) is features
    assert padded(features, 48).shape == (3, 96)
    moved = torch.randn(3 * 64 + 1)[1:].view(3, 64)
    assert moved.data_ptr() % 16 and not padded(moved, 32).data_ptr() % 16
    assert torch.equal(padded(moved, 32), moved)
