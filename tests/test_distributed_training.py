"""A strategy clips, steps, and keeps weights and state that every other strategy goes on from."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from deepspeed_cases import NEEDS_DEEPSPEED
from strategy_training import deepspeed_training, training_cases
from test_distributed_strategies import FP32, FP64, finished
from torch import nn

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.distributed import LocalStrategy


@pytest.mark.distributed
def test_strategies_in_turn_give_the_steps_of_one_process(tmp_path):
    results = finished(training_cases(), 2, tmp_path)
    assert max(results["strategies in turn"]["errors"]) < FP64, results


@NEEDS_DEEPSPEED
@pytest.mark.distributed
def test_deepspeed_steps_what_is_outside_of_it(tmp_path):
    for name, result in finished(deepspeed_training(), 2, tmp_path).items():
        assert max(result["errors"]) < FP32, (name, result)


def trained() -> tuple[list[nn.Module], torch.optim.Optimizer]:
    torch.manual_seed(0)
    towers = nn.ModuleDict({"image": nn.Linear(6, 4), "text": nn.Linear(5, 4)})
    modules = [towers.double(), ClipLoss().double()]
    return modules, torch.optim.AdamW([p for m in modules for p in m.parameters()], lr=0.01)


def backward(modules: list[nn.Module], strategy: LocalStrategy, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(8, w, generator=generator, dtype=torch.float64) for w in (6, 5)]
    GradCache([*modules[0].values()], modules[1], chunk_size=3, strategy=strategy)(*inputs)


def test_a_scaled_step_is_the_step_without():
    (plain, plain_optimizer), (scaled, optimizer) = trained(), trained()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    norms = []
    for modules, steps, strategy in (
        (plain, plain_optimizer, LocalStrategy()),
        (scaled, optimizer, LocalStrategy(scaler)),
    ):
        backward(modules, strategy)
        norms.append(strategy.step(steps, modules, max_norm=0.1))
    assert norms[0] > 0.1
    torch.testing.assert_close(norms[1], norms[0])
    for ours, theirs in zip(scaled[0].parameters(), plain[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_overflow_changes_no_weight_and_lowers_the_scale():
    modules, optimizer = trained()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    strategy, before = LocalStrategy(scaler), copy.deepcopy(modules[0].state_dict())
    backward(modules, strategy)
    modules[1].log_logit_scale.grad.fill_(float("inf"))
    strategy.step(optimizer, modules, max_norm=1.0)
    assert scaler.get_scale() == 2.0**11
    for name, value in modules[0].state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("writes", [True, False])
def test_the_scale_goes_on_where_it_was_saved(writes):
    modules, optimizer = trained()
    writer = LocalStrategy(torch.amp.GradScaler("cpu", init_scale=8.0) if writes else None)
    reader = LocalStrategy(torch.amp.GradScaler("cpu", init_scale=2.0))
    reader.load_state(optimizer, modules, writer.state(optimizer, modules))
    assert reader.grad_scaler.get_scale() == (8.0 if writes else 2.0)


def test_going_on_from_saved_weights_and_state_is_going_on():
    (modules, optimizer), strategy = trained(), LocalStrategy()
    (others, other_optimizer) = trained()
    for step in range(4):
        if step == 2:
            strategy.load_weights(others[0], strategy.weights(modules[0]))
            others[1].load_state_dict(modules[1].state_dict())
            state = copy.deepcopy(strategy.state(optimizer, modules))
            strategy.load_state(other_optimizer, others, state)
        for each, steps in ((modules, optimizer), (others, other_optimizer))[: 1 + (step > 1)]:
            steps.zero_grad()
            backward(each, strategy, step)
            strategy.step(steps, each)
    for ours, theirs in zip(others[0].parameters(), modules[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_parameter_that_was_never_used_starts_anew():
    modules, optimizer = trained()
    backward(modules, strategy := LocalStrategy())
    modules[0]["text"].bias.grad = None
    strategy.step(optimizer, modules)
    state = copy.deepcopy(strategy.state(optimizer, modules))
    assert state["optimizer"]["text.bias"] == {} != state["optimizer"]["text.weight"]
    others, other_optimizer = trained()
    strategy.load_weights(others[0], strategy.weights(modules[0]))
    others[1].load_state_dict(modules[1].state_dict())
    strategy.load_state(other_optimizer, others, state)
    for each, steps in ((modules, optimizer), (others, other_optimizer)):
        steps.zero_grad()
        backward(each, strategy)
        strategy.step(steps, each)
    assert other_optimizer.state[others[0]["text"].bias]["step"] == 1
    for ours, theirs in zip(others[0].parameters(), modules[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_learning_rate_reaches_every_group():
    optimizer = torch.optim.SGD([{"params": nn.Linear(2, 2).parameters()} for _ in range(2)], lr=1)
    LocalStrategy().set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_names_are_those_without_compile_and_tied_weights_are_one():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    weights = LocalStrategy().weights(nn.ModuleList([first, second]))
    assert [*weights] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert weights["0.weight"] is weights["1.weight"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_modules_keep_their_names():
    layer = nn.Linear(2, 2)
    both, weights = nn.ModuleDict({"tower": torch.compile(layer)}), {"tower.weight": torch.eye(2)}
    LocalStrategy().load_weights(both, weights | {"tower.bias": torch.ones(2)})
    assert [*LocalStrategy().weights(both)] == ["tower.weight", "tower.bias"]
    assert torch.equal(layer.weight, torch.eye(2))


def refused(message: str, call: Callable[..., object]) -> None:
    modules, optimizer = trained()
    strategy = LocalStrategy()
    backward(modules, strategy)
    before = [p.grad.clone() for m in modules for p in m.parameters()]
    with pytest.raises(ValueError, match=message):
        call(strategy, optimizer, modules)
    for gradient, p in zip(before, (p for m in modules for p in m.parameters()), strict=True):
        assert torch.equal(p.grad, gradient)


def test_an_optimizer_over_other_parameters_is_refused():
    counts = (
        r"optimizer: expected the {} trainable parameters of modules, got {} of them and {} oth"
    )
    refused(counts.format(4, 4, 1), lambda s, o, m: s.step(o, m[:1], 1.0))
    more = nn.Linear(2, 2)
    refused(counts.format(7, 5, 0), lambda s, o, m: s.step(o, [*m, more], 1.0))
    refused(counts.format(7, 5, 0), lambda s, o, m: s.state(o, [*m, more]))


@pytest.mark.parametrize("norm", [-1.0, float("nan")])
def test_what_is_no_norm_is_refused(norm):
    refused("max_norm: expected a norm above 0", lambda s, o, m: s.step(o, m, norm))
    refused("max_norm: expected a norm above 0", lambda s, o, m: s.clip(m, norm))


def test_two_parameters_of_one_name_are_refused():
    def state(strategy: LocalStrategy, optimizer: torch.optim.Optimizer, modules: list) -> None:
        strategy.state(optimizer, [*modules[0].values(), modules[1]])

    refused("modules: expected each name once, got two parameters named weight", state)


def test_what_does_not_fit_is_not_loaded():
    modules, optimizer = trained()
    strategy = LocalStrategy()
    weights = copy.deepcopy(strategy.weights(modules[0]))
    with pytest.raises(
        ValueError, match=r"weights: .*1 names that only one of both has, such as x"
    ):
        strategy.load_weights(modules[0], weights | {"x": torch.ones(1)})
    with pytest.raises(ValueError, match=r"expected text.bias of shape \(4,\), got \(1,\)"):
        strategy.load_weights(modules[0], weights | {"text.bias": torch.ones(1)})
    backward(modules, strategy)
    strategy.step(optimizer, modules)
    state = strategy.state(optimizer, modules)
    del state["optimizer"]["text.bias"]
    with pytest.raises(ValueError, match="optimizer state: expected moments of text.bias, got non"):
        strategy.load_state(optimizer, modules, state)
