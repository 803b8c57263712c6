"""The order of samples: a pure function of seed and step, with substitutes that never collide."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from gradcache_clip.train.data.order import MAX_SUBSTITUTES, Order


@pytest.mark.parametrize(
    ("samples", "batch_size"), [(67, 10), (60, 10), (10, 10), (11, 10), (5, 1)]
)
def test_an_epoch_has_no_sample_twice_and_drops_less_than_a_batch(samples, batch_size):
    order = Order(samples, batch_size, seed=3)
    assert order.steps == samples // batch_size
    for epoch in range(3):
        steps = range(epoch * order.steps, (epoch + 1) * order.steps)
        drawn = [sample for step in steps for sample in order.batch(step)]
        assert {order.epoch(step) for step in steps} == {epoch}
        assert len({*drawn}) == len(drawn) == order.steps * batch_size
        assert {*drawn} <= {*range(samples)}


def test_seed_and_epoch_change_the_order():
    batches = [Order(1000, 500, seed).batch(step) for seed in (0, 1) for step in (0, 2)]
    assert len({batch.tobytes() for batch in batches}) == 4


def test_another_process_draws_the_same():
    code = (
        "from gradcache_clip.train.data.order import Order; order = Order(90, 9, 5);"
        "print([order.batch(17).tolist(), [*order.substitutes(17, 4)][:20]])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    order = Order(90, 9, 5)
    assert eval(done.stdout) == [order.batch(17).tolist(), [*order.substitutes(17, 4)][:20]]


@pytest.mark.parametrize("step", [0, 4, 9, 123])
def test_substitutes_of_different_rows_never_meet(step):
    order = Order(samples=103, batch_size=10, seed=1)
    members = {*order.batch(step).tolist()}
    # 93 others: each row has nine or ten of its own before it turns to those of others.
    own = [[*itertools.islice(order.substitutes(step, row), 9)] for row in range(10)]
    everything = [sample for row in own for sample in row]
    assert len({*everything}) == len(everything) == 90
    assert not members & {*everything}


@pytest.mark.parametrize("samples", [11, 13, 20, 47])
def test_a_row_tries_every_sample_outside_its_batch(samples):
    order = Order(samples, batch_size=10, seed=2)
    others = {*range(samples)} - {*order.batch(3).tolist()}
    for row in range(10):
        assert {*order.substitutes(3, row)} == others


def test_substitutes_end():
    assert not [*Order(10, 10, 0).substitutes(0, 0)]
    assert len([*Order(10**6, 10, 0).substitutes(0, 0)]) == MAX_SUBSTITUTES
