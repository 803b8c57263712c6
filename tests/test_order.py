"""The order of samples: a pure function of seed and step, with substitutes that never collide."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from gradcache_clip.train.data.order import MAX_SUBSTITUTES, Order
from gradcache_clip.train.data.spares import Spares


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
    # 93 others: each row has nine or ten of its own.
    own = [[*order.substitutes(step, row)] for row in range(10)]
    everything = [sample for row in own for sample in row]
    assert len({*everything}) == len(everything) == 93
    assert not members & {*everything} and {*map(len, own)} == {9, 10}


@pytest.mark.parametrize("broken_share", [0.1, 0.4])
@pytest.mark.parametrize("samples", [11, 13, 20, 25, 47])
def test_no_two_rows_of_a_small_set_get_the_same(samples, broken_share):
    draw = random.Random(samples)
    for step in range(20):
        order = Order(samples, batch_size=10, seed=2)
        broken = {*draw.sample(range(samples), int(broken_share * samples))}
        members = order.batch(step).tolist()

        def filled(position, order=order, broken=broken, members=members, step=step):
            spares = Spares(order, lambda sample: sample not in broken)
            own = [members[position], *order.substitutes(step, position)]
            found = next((sample for sample in own if sample not in broken), None)
            return spares.of(step, position) if found is None else found

        batch = [filled(position) for position in range(10)]
        good = [sample for sample in batch if sample is not None]
        assert not {*good} & broken and len({*good}) == len(good)
        assert len(good) == min(10, samples - len(broken))


def test_substitutes_end():
    assert not [*Order(10, 10, 0).substitutes(0, 0)]
    assert len([*Order(10**6, 10, 0).substitutes(0, 0)]) == MAX_SUBSTITUTES
