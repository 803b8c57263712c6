"""A step whose replay waits for the backward of its loss equals the step in one graph."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from one_shot import gradient_errors, one_shot, twins, worst
from rank_processes import Check, failures
from strategy_steps import (
    PlainClip,
    errors_of,
    global_batch,
    in_one_graph,
    rows_of,
    seed,
    two_towers,
)
from strategy_wraps import as_they_are, each_in_ddp, one_in_ddp
from torch import Tensor, nn

from gradcache_clip import ClipLoss, GradCache, ReplayMismatchError
from gradcache_clip.cache.deferred import deferred_step
from gradcache_clip.distributed import (
    AllReduceStrategy,
    DDPStrategy,
    FSDPStrategy,
    LocalStrategy,
)

ROWS = 23
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}


def mlp(width: int, dropout: float = 0.0) -> nn.Sequential:
    hidden = [nn.Linear(width, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*hidden, nn.Linear(32, 16))


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 12, dtype=dtype), torch.randn(ROWS, 20, dtype=dtype)


class Pair:
    """A cache, and the same encoders and loss for one graph."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, dropout: float = 0.0, **options: Any
    ) -> None:
        modules = [each.to(dtype) for each in (mlp(12, dropout), mlp(20, dropout), ClipLoss())]
        self.ours, self.truth = twins(*modules)
        options = {"chunk_size": 4, "check_rows": "off", **options}
        self.cache = GradCache(self.ours[:2], self.ours[2], **options)

    def deferred(self, inputs: tuple[Tensor, Tensor], **loss_kwargs: Any) -> Any:
        return deferred_step(self.cache, *inputs, loss_kwargs=loss_kwargs)

    def in_one_graph(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return self.truth[2](self.truth[0](inputs[0]), self.truth[1](inputs[1])).loss

    def gradients(self) -> list[Tensor | None]:
        return [p.grad for p in nn.ModuleList(self.ours).parameters()]

    def error(self) -> float:
        return worst(gradient_errors(self.ours, self.truth))[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("chunk_size", [1, 4, (5, ROWS), 100, "auto"])
@pytest.mark.parametrize("memory_budget", [None, 40_000, 10**9])
def test_gradients_equal_the_one_shot_step(dtype, chunk_size, memory_budget):
    pair, inputs = Pair(dtype, chunk_size=chunk_size, memory_budget=memory_budget), batch(dtype)
    out, expected = pair.deferred(inputs), pair.in_one_graph(inputs)
    torch.testing.assert_close(out.loss, expected)
    assert all(gradient is None for gradient in pair.gradients())
    out.loss.backward()
    expected.backward()
    assert pair.error() < LIMIT[dtype]
    assert 0 <= out.accuracy <= 1


def test_whatever_becomes_of_the_loss_reaches_every_parameter():
    """Scaled, added to the loss of another batch and to a penalty on the weights."""
    pair, first, second = Pair(), batch(), batch()

    def total(one: Tensor, other: Tensor, modules: list[nn.Module]) -> Tensor:
        penalty = sum(p.square().sum() for p in nn.ModuleList(modules).parameters())
        return one.exp() / 3 - 2 * other + 0.1 * penalty

    total(pair.deferred(first).loss, pair.deferred(second).loss, pair.ours).backward()
    total(pair.in_one_graph(first), pair.in_one_graph(second), pair.truth).backward()
    assert pair.error() < 1e-10


def test_a_loss_of_another_kind_over_the_same_features():
    """Nothing is assumed of the loss but that it is a scalar."""
    cache = GradCache([mlp(12).double()], lambda features: features.sin().sum(), chunk_size=3)
    (encoder,), (true,) = twins(cache.encoders[0])
    x = batch()[0]
    deferred_step(cache, x).loss.backward()
    true(x).sin().sum().backward()
    assert worst(gradient_errors([encoder], [true]))[1] < 1e-10


def test_accumulated_steps_are_the_mean_of_their_losses():
    pair = Pair()
    for inputs in (batch(), batch(), batch()):
        (pair.deferred(inputs).loss / 3).backward()
        (pair.in_one_graph(inputs) / 3).backward()
    assert pair.error() < 1e-10


def test_grad_scaler_scales_encoders_and_loss_alike():
    pair, inputs = Pair(torch.float32), batch(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(nn.ModuleList(pair.ours).parameters(), lr=0.1)
    scaler.scale(pair.deferred(inputs).loss).backward()
    (1024 * pair.in_one_graph(inputs)).backward()
    assert pair.error() < 1e-5
    scaler.unscale_(optimizer)
    for parameter in nn.ModuleList(pair.truth).parameters():
        parameter.grad /= 1024
    assert pair.error() < 1e-5


@pytest.mark.parametrize("memory_budget", [None, 10**9])
def test_dropout_is_replayed_and_other_draws_go_on(memory_budget):
    """As in one graph over the same chunks, whatever is drawn between forward and backward."""
    pair, inputs = Pair(dropout=0.3, memory_budget=memory_budget), batch()
    torch.manual_seed(5)
    one_shot(pair.truth[:2], pair.truth[2], inputs, chunk_size=4)
    expected_after = torch.rand(3)
    torch.manual_seed(5)
    loss = pair.deferred(inputs).loss
    assert torch.equal(torch.rand(3), expected_after)
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert pair.error() < 1e-10


def test_two_steps_with_dropout_may_be_open_at_once():
    pair, inputs = Pair(dropout=0.3), (batch(), batch())
    torch.manual_seed(5)
    first, second = (pair.deferred(each).loss for each in inputs)
    second.backward()
    first.backward()
    torch.manual_seed(5)
    for each in inputs:
        one_shot(pair.truth[:2], pair.truth[2], each, chunk_size=4)
    assert pair.error() < 1e-10


def test_the_replay_has_the_autocast_of_its_embed():
    """The backward is taken outside, as it should be."""
    both = Pair(torch.float32), Pair(torch.float32)
    for mine, other in zip(both[0].ours, both[1].ours, strict=True):
        other.load_state_dict(mine.state_dict())
    inputs = batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = both[0].deferred(inputs).loss
        both[1].cache(*inputs)
    loss.backward()
    for mine, other in zip(both[0].gradients(), both[1].gradients(), strict=True):
        assert torch.equal(mine, other)


def test_a_backward_inside_another_autocast_replays_outside_of_it():
    pair, inputs = Pair(), batch()
    loss = pair.deferred(inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    pair.in_one_graph(inputs).backward()
    assert pair.error() < 1e-10


def test_a_weight_that_encoder_and_loss_share_under_autocast():
    """A copy in 16 bits that the embed made without a graph would cut the loss off from it."""
    shared = nn.Linear(12, 12)

    def loss(features: Tensor) -> Tensor:
        return shared(features).square().mean()

    encoder, x = nn.Sequential(nn.Linear(12, 12), shared), torch.randn(8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        deferred_step(GradCache([encoder], loss, chunk_size=2), x).loss.backward()
        got = shared.weight.grad.clone()
        shared.zero_grad()
        loss(encoder(x)).backward()
    torch.testing.assert_close(got, shared.weight.grad, rtol=0.05, atol=1e-3)


def test_labels_for_the_whole_batch_reach_the_loss():
    pair, inputs, labels = Pair(), batch(), torch.arange(ROWS) // 2
    pair.deferred(inputs, labels=labels).loss.backward()
    images, texts = (encoder(x) for encoder, x in zip(pair.truth[:2], inputs, strict=True))
    pair.truth[2](images, texts, labels=labels).loss.backward()
    assert pair.error() < 1e-10


def test_a_frozen_encoder_gets_nothing_and_is_never_replayed():
    pair, inputs, calls = Pair(), batch(), []
    for side in (pair.ours, pair.truth):
        side[0].requires_grad_(False)
    pair.ours[0].register_forward_hook(lambda *_: calls.append(1))
    pair.deferred(inputs).loss.backward()
    pair.in_one_graph(inputs).backward()
    assert pair.error() < 1e-10
    assert len(calls) == math.ceil(ROWS / 4)


def test_with_frozen_encoders_the_scale_still_learns():
    pair, inputs = Pair(), batch()
    for side in (pair.ours, pair.truth):
        nn.ModuleList(side[:2]).requires_grad_(False)
    pair.deferred(inputs).loss.backward()
    pair.in_one_graph(inputs).backward()
    assert pair.error() < 1e-10


def test_a_loss_without_a_graph_is_refused():
    pair = Pair()
    nn.ModuleList(pair.ours).requires_grad_(False)
    with pytest.raises(ValueError, match="loss: expected a loss that depends on a trainable"):
        pair.deferred(batch())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_an_evaluation_in_chunks(mode):
    pair, inputs, rows = Pair(chunk_size=5, dropout=0.3), batch(), []
    pair.ours[0].register_forward_hook(lambda _m, _i, output: rows.append(len(output)))
    nn.ModuleList([*pair.ours, *pair.truth]).eval()
    with mode():
        out = pair.deferred(inputs)
    torch.testing.assert_close(out.loss, pair.in_one_graph(inputs).detach())
    assert not out.loss.requires_grad
    assert rows == [5, 5, 5, 5, 3]
    assert all(gradient is None for gradient in pair.gradients())


def test_a_second_backward_is_refused_and_changes_nothing():
    pair = Pair()
    loss = pair.deferred(batch()).loss
    loss.backward(retain_graph=True)
    encoders = list(nn.ModuleList(pair.ours[:2]).parameters())
    before = [parameter.grad.clone() for parameter in encoders]
    with pytest.raises(RuntimeError, match="expected one backward, got a second one"):
        loss.backward()
    after = [parameter.grad for parameter in encoders]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_graph_of_the_gradients_is_refused():
    pair = Pair()
    with pytest.raises(RuntimeError, match="expected a backward without create_graph"):
        pair.deferred(batch()).loss.backward(create_graph=True)
    encoders = nn.ModuleList(pair.ours[:2])
    assert all(parameter.grad is None for parameter in encoders.parameters())


def test_weights_that_changed_in_between_are_caught():
    pair = Pair()
    loss = pair.deferred(batch()).loss
    with torch.no_grad():
        pair.ours[1][0].weight.mul_(1.5)
    with pytest.raises(ReplayMismatchError, match=r"encoder 1 .* changed in place between"):
        loss.backward()


def test_a_mismatch_may_be_a_warning_or_nothing():
    for replay_check, expected in (("warn", 1), ("off", 0)):
        pair = Pair(check_replay=replay_check)
        loss = pair.deferred(batch()).loss
        with torch.no_grad():
            pair.ours[1][0].weight.mul_(1.5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss.backward()
        assert [str(w.message)[:9] for w in caught] == ["encoder 1"] * expected


def test_a_loss_that_writes_into_the_features_is_refused():
    def loss(features: Tensor) -> Tensor:
        return features.mul_(2).sum()

    with pytest.raises((ValueError, RuntimeError), match=r"features|in-?place"):
        deferred_step(GradCache([mlp(12)], loss, chunk_size=4), torch.randn(8, 12))


def test_features_that_are_not_finite_are_named_before_anything_is_changed():
    pair, inputs = Pair(), batch()
    inputs[1][9] = math.nan
    with pytest.raises(ValueError, match=r"encoder 1 .* in chunk 2 of 6 \(rows 8 to 11\)"):
        pair.deferred(inputs)


def test_strategies_that_cannot_wait():
    with pytest.raises(ValueError, match=r"deferred_step: .* got FSDPStrategy.* call cache"):
        Pair(strategy=FSDPStrategy()).deferred(batch())
    strategy = LocalStrategy(torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"strategy without grad_scaler, got one.*scaled twice"):
        Pair(strategy=strategy).deferred(batch())


def test_a_step_that_is_given_up_frees_its_graphs_at_once():
    pair, kept = Pair(memory_budget=10**9), []
    pair.ours[0].register_forward_hook(lambda _m, _i, output: kept.append(weakref.ref(output)))
    out = pair.deferred(batch())
    assert any(each() is not None for each in kept)
    del out
    assert all(each() is None for each in kept)


def test_a_batch_norm_is_told_to_the_caller_and_counts_each_chunk_once():
    norm = nn.BatchNorm1d(12)
    cache = GradCache([nn.Sequential(norm, nn.Linear(12, 16)), mlp(20)], ClipLoss(), chunk_size=8)
    with pytest.warns(UserWarning, match="batch norm in train mode") as caught:
        out = deferred_step(cache, *batch(torch.float32))
    assert caught[0].filename == __file__
    out.loss.backward()
    assert norm.num_batches_tracked == 3


def over_ranks(wrap: Any, strategy: Any, options: dict[str, Any]) -> None:
    """Thrice the loss of the global batch."""
    ours, truth = [m.double() for m in two_towers(0.2)], [m.double() for m in two_towers(0.2)]
    loss, true_loss = ClipLoss().double(), PlainClip().double()
    cache = GradCache(wrap(ours), loss, chunk_size=3, strategy=strategy(), **options)
    sides = [nn.ModuleList([*ours, loss]), nn.ModuleList([*truth, true_loss])]
    for step in range(2):
        given = global_batch(step)
        seed(step, dist.get_rank())
        (3 * deferred_step(cache, *rows_of(dist.get_rank(), given)).loss).backward()
        in_one_graph(truth, lambda q, k: 3 * true_loss(q, k), step, given, 3)
        name, error = worst(errors_of(*sides))
        assert error < 1e-10, f"{name}: {error:.1e}"
        for side in sides:
            side.zero_grad()


def in_two() -> Iterator[tuple[str, Check]]:
    for name, options in (("", {}), (", graphs kept", {"memory_budget": 10**9})):
        for wrap in (each_in_ddp, one_in_ddp):
            yield f"{wrap.__name__}{name}", partial(over_ranks, wrap, DDPStrategy, options)
        yield f"all-reduce{name}", partial(over_ranks, as_they_are, AllReduceStrategy, options)


@pytest.mark.distributed
def test_in_two_processes(tmp_path: Path) -> None:
    found = failures(in_two, 2, tmp_path)
    assert not found, "\n".join(found)
