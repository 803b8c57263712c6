"""The ways to train that memory is measured of: their gradients, counted bytes and operations."""

from __future__ import annotations

import pytest
import torch
from engine_steps import Workload
from memory_steps import (
    FEATURES,
    METHODS,
    SIZES,
    _held,
    build_encoders,
    count_pair_flops,
    count_step,
    make_inputs,
    make_steps,
    step_flops,
)
from torch.utils.flop_counter import FlopCounterMode

from gradcache_clip.memory import LiveBytes

_MLP = SIZES["mlp"]
_BATCH, _CHUNK = 24, 4


def _work(method: str) -> Workload:
    torch.manual_seed(0)
    encoders = build_encoders(_MLP, checkpointed=METHODS[method].checkpointed)
    return Workload(encoders, make_inputs(_MLP, _BATCH))


def _gradients(method: str) -> list[torch.Tensor]:
    work = _work(method)
    METHODS[method].make(work, _CHUNK)()
    return [p.grad for encoder in work.encoders for p in encoder.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_the_gradients_of_the_plain_step(method):
    for got, expected in zip(_gradients(method), _gradients("plain"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_the_weights_and_leaves_no_gradients(method, monkeypatch):
    built = []
    monkeypatch.setattr(
        "memory_steps.build_encoders",
        lambda *args, **options: built.append(build_encoders(*args, **options)) or built[-1],
    )
    (step,) = make_steps([method], _MLP, _BATCH, _CHUNK)
    parameters = [p for encoder in built[0] for p in encoder.parameters()]
    before = [p.detach().clone() for p in parameters]
    step()
    moved = [not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)]
    assert all(moved) and all(p.grad is None for p in parameters)


@pytest.mark.parametrize("method", METHODS)
def test_counted_bytes_are_those_of_a_real_step(method):
    chunk = _CHUNK if METHODS[method].chunked else _BATCH
    work = _work(method)
    step = METHODS[method].make(work, chunk)
    held = _held(work.encoders, work.inputs)
    live = LiveBytes(start=held)
    with live:
        step()
    assert live.current_bytes >= live.start_bytes, "what is held lives to the end"
    counted = count_step(method, _MLP, _BATCH, chunk)
    # Of a cached step, the scale of the loss and its two states are counted as well.
    assert counted.floor_bytes - live.start_bytes == (12 if method == "cached" else 0)
    tolerance = 0.02 if method == "cached" else 1e-4
    assert counted.peak_bytes == pytest.approx(live.peak_bytes, rel=tolerance)


def test_what_must_live_is_counted_at_any_batch():
    batch, matrix, features = 8192, 4 * 8192**2, 4 * 8192 * FEATURES
    counted = {name: count_step(name, _MLP, batch, 64) for name in METHODS}
    above = {name: found.peak_bytes - found.floor_bytes for name, found in counted.items()}
    floor = counted["plain"].floor_bytes
    assert {found.floor_bytes for found in counted.values()} == {floor, floor + 12}
    for name in ("plain", "checkpointed", "accumulated", "published"):
        assert above[name] > 2 * matrix
    # Of both sides features and unit features at least, and no matrix of all pairs.
    assert 4 * features < above["cached"] < matrix
    assert above["checkpointed"] < above["plain"]


@pytest.mark.parametrize("method", ["plain", "published", "accumulated"])
def test_the_losses_of_a_step_are_estimated_as_they_are_counted(method):
    def real(batch: int) -> float:
        work = Workload(build_encoders(_MLP), make_inputs(_MLP, batch))
        with FlopCounterMode(display=False) as flops:
            METHODS[method].make(work, _CHUNK)()
        return flops.get_total_flops()

    def estimated(batch: int) -> float:
        return step_flops(method, batch, _CHUNK, count_pair_flops(_MLP))

    # What grows faster than the batch is the loss.
    assert real(32) - 2 * real(16) == pytest.approx(estimated(32) - 2 * estimated(16), rel=1e-6)
    # The first layers need no gradient of their inputs, so backwards are no more than two forwards.
    assert 0.7 * estimated(32) < real(32) <= estimated(32)


def test_operations_of_a_pair():
    pixels, tokens = 3 * _MLP.image_size**2, _MLP.tokens
    image = pixels * 256 + 256 * FEATURES
    text = tokens * (64 * 64 + 64 * FEATURES)
    assert count_pair_flops(_MLP) == 2 * (image + text)
