"""Live bytes against sums made by hand, and resident memory."""

from __future__ import annotations

import gc
import mmap
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from gradcache_clip import ClipLoss
from gradcache_clip.memory import (
    LiveBytes,
    cuda_block_bytes,
    peak_resident_bytes,
    reset_peak_resident_bytes,
    resident_bytes,
)

_KIB = 1024
_WORLDS = ["real", "fake", "meta"]


def _world(name: str) -> Any:
    return {"real": nullcontext, "fake": FakeTensorMode, "meta": lambda: torch.device("meta")}[
        name
    ]()


@pytest.mark.parametrize("world", _WORLDS)
def test_views_and_in_place_ops_are_free(world):
    with _world(world), LiveBytes() as live:
        x = torch.ones(16, 16)
        assert live.current_bytes == _KIB
        views = [x.t(), x[3:], x.view(4, 64), x.expand(5, 16, 16), x.detach()]
        x.mul_(2)
        torch.add(x, 1, out=x)
        assert live.current_bytes == live.peak_bytes == _KIB
        del x
        assert live.current_bytes == _KIB, "a view keeps the storage alive"
        del views
        assert live.current_bytes == 0
    assert live.peak_bytes == _KIB


@pytest.mark.parametrize("world", _WORLDS)
def test_temporaries_count_until_they_are_freed(world):
    with _world(world), LiveBytes() as live:
        x = torch.ones(256)
        y = ((x * 2) * 3) * 4
        assert live.current_bytes == 2 * _KIB
    # At the last product live x, the second temporary and the result; the first is gone.
    assert live.peak_bytes == 3 * _KIB
    assert live.largest_tensor_bytes == _KIB
    del x, y
    assert live.current_bytes == 0, "storages freed after the context are still taken off"


@pytest.mark.parametrize("world", _WORLDS)
def test_activations_saved_for_backward_count(world):
    with _world(world):
        x, weight = torch.ones(8, 32), torch.ones(32, 32, requires_grad=True)
        with LiveBytes(start={"input": [x], "parameter": [weight]}) as live:
            assert live.start_bytes == 5 * _KIB
            # The product is freed; tanh saves its result and exp its own.
            loss = torch.exp(torch.tanh(x @ weight)).sum()
            assert live.bytes_by_kind == {
                "input": _KIB,
                "parameter": 4 * _KIB,
                "activation": 2 * _KIB + 4,
            }
            loss.backward()
            live.mark([weight.grad], "gradient")
            del loss
            assert live.bytes_by_kind["gradient"] == 4 * _KIB
            assert "activation" not in live.bytes_by_kind


def test_tensors_from_before_do_not_count_and_neither_do_their_views():
    x = torch.ones(1024)
    with LiveBytes() as live:
        y = x[10:]
        y.add_(1)
        z = y.view(-1)
        assert live.current_bytes == 0
        live.mark([z], "input")
        assert live.bytes_by_kind == {"input": 4 * _KIB}


def test_resized_storages_are_measured_again():
    with LiveBytes() as live:
        x = torch.ones(256)
        x.resize_(1024)
        assert live.current_bytes == 4 * _KIB
        x.untyped_storage().resize_(0)
        assert live.current_bytes == 0
        x.untyped_storage().resize_(8 * _KIB)
        x.zero_()
        assert live.current_bytes == live.peak_bytes == live.largest_tensor_bytes == 8 * _KIB


def test_the_peak_knows_what_it_consisted_of():
    kept = torch.ones(256)
    with LiveBytes(start={"parameter": [kept]}, kind="other") as live:
        a = torch.ones(512)
        live.mark([a], "feature")
        b = torch.ones(256)
        del a
        c = torch.ones(128)
    assert live.peak_by_kind == {"parameter": _KIB, "feature": 2 * _KIB, "other": _KIB}
    assert sum(live.peak_by_kind.values()) == live.peak_bytes
    del b, c


def test_cuda_rounding_is_per_storage():
    with LiveBytes(rounding="cuda") as live:
        x = torch.ones(1), torch.ones(129), torch.empty(0)
    assert live.peak_bytes == 512 + 1024 + 0
    assert live.largest_tensor_bytes == 129 * 4
    assert [cuda_block_bytes(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    del x
    assert live.current_bytes == 0


def test_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match=r"rounding: expected 'none' or 'cuda', got 'gpu'"):
        LiveBytes(rounding="gpu")


def test_the_counter_keeps_nothing_alive():
    with LiveBytes() as live:
        x = torch.ones(256)
        x.sum()
    gc.collect()
    del x
    assert live.current_bytes == 0 and live.bytes_by_kind == {}


def test_matrix_of_all_pairs_shows_in_the_plain_loss_alone():
    features = [F.normalize(torch.randn(1500, 8), dim=1).requires_grad_() for _ in range(2)]
    largest = {}
    for impl in ("reference", "tiled"):
        with LiveBytes() as live:
            ClipLoss(impl=impl)(*features).loss.backward()
        largest[impl] = live.largest_tensor_bytes
    assert largest["reference"] >= 4 * 1500**2
    assert largest["tiled"] < 4 * 1500**2


def test_resident_memory_follows_an_allocation():
    if not reset_peak_resident_bytes():
        pytest.skip("this system cannot reset the peak of resident memory")
    # What other tests left behind must neither go in between nor be used again.
    gc.collect()
    before = resident_bytes()
    with mmap.mmap(-1, 64 * 2**20) as block:
        block[:: mmap.PAGESIZE] = bytes(len(block) // mmap.PAGESIZE)
        assert resident_bytes() - before > 48 * 2**20
    assert peak_resident_bytes() - before > 48 * 2**20
    reset_peak_resident_bytes()
    assert peak_resident_bytes() - before < 48 * 2**20
