"""Does `verify` see what is silently wrong with hooks, and over several processes?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import verify_over_ranks
from rank_processes import failures
from torch import Tensor, nn

from gradcache_clip import ClipLoss, GradCache, verify
from gradcache_clip.verification.hooks import ON_PARTS


def encoders() -> list[nn.Module]:
    torch.manual_seed(5)
    image = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 8))
    return [module.double() for module in (image, nn.Linear(9, 8))]


def batch() -> list[Tensor]:
    return [torch.randn(20, width, dtype=torch.float64) for width in (6, 9)]


def steps_after_accumulation(modules: nn.ModuleList, optimizer: torch.optim.Optimizer) -> None:
    for weight in modules.parameters():
        weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())


def steps_in_a_tensor_hook(modules: nn.ModuleList, optimizer: torch.optim.Optimizer) -> None:
    next(modules.parameters()).register_hook(lambda _: optimizer.step())


def steps_in_a_module_hook(modules: nn.ModuleList, optimizer: torch.optim.Optimizer) -> None:
    modules[0][2].register_full_backward_hook(lambda *_: optimizer.step())


def writes_without_an_optimizer(modules: nn.ModuleList, _: torch.optim.Optimizer) -> None:
    """Past the version counter too."""
    weight = next(modules.parameters())
    weight.register_hook(lambda gradient: weight.data.sub_(gradient))


Hook = Callable[[nn.ModuleList, torch.optim.Optimizer], None]
HOOKS = [
    steps_after_accumulation,
    steps_in_a_tensor_hook,
    steps_in_a_module_hook,
    writes_without_an_optimizer,
]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("started", [False, True], ids=["new optimizer", "optimizer with state"])
def test_weights_and_optimizers_are_put_back_bit_for_bit(hook: Hook, started: bool):
    towers, elsewhere = encoders(), nn.Parameter(torch.ones(3))
    modules = nn.ModuleList([*towers, ClipLoss().double()])
    parameters = [*modules.parameters(), elsewhere]
    rate = torch.tensor(0.1)
    optimizer = torch.optim.AdamW(parameters, lr=rate, amsgrad=True, foreach=False)
    if started:
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    elsewhere.grad = torch.ones(3)
    hook(modules, optimizer)
    before = copy.deepcopy([parameters, optimizer.state_dict()])
    identities = [id(parameter) for parameter in modules.parameters()]
    state = {name: dict(entry) for name, entry in optimizer.state.items()}
    verify(GradCache(towers, modules[2], gradient_hooks="every_chunk"), *batch())
    torch.testing.assert_close([parameters, optimizer.state_dict()], before, rtol=0, atol=0)
    assert [id(parameter) for parameter in modules.parameters()] == identities
    for parameter, entry in state.items():
        assert all(entry[name] is optimizer.state[parameter][name] for name in entry)
    assert optimizer.param_groups[0]["lr"] is rate


def test_hooks_do_not_run_and_are_there_again():
    towers, seen = encoders(), []
    weight = towers[1].weight
    handle = weight.register_post_accumulate_grad_hook(lambda _: seen.append(1))
    report = verify(GradCache(towers, ClipLoss().double(), gradient_hooks="every_chunk"), *batch())
    assert seen == [] and report.headline == f"not exact: {ON_PARTS}"
    (reason,) = report.reasons
    assert reason.startswith("encoder 1: weight: a post-accumulate hook runs once per chunk")
    assert 'pass gradient_hooks="once"' in reason and not report.exact
    weight.sum().backward()
    handle.remove()
    weight.sum().backward()
    assert seen == [1]


def test_a_hook_on_a_parameter_that_only_a_function_knows_is_held_too():
    towers, head = encoders(), nn.Linear(8, 8).double()
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    head.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    before = head.weight.detach().clone()
    heads = [lambda x: head(x), None]
    report = verify(GradCache(towers, ClipLoss().double(), get_features=heads), *batch())
    assert torch.equal(head.weight, before) and len(report.rows) == 9 and not report.exact
    (reason,) = report.reasons
    assert "a tensor of a function" in reason and "pass the module itself" in reason


def test_hooks_that_run_once_are_noted_by_name():
    towers = encoders()
    towers[0][0].bias.register_hook(lambda gradient: gradient / gradient.norm())
    towers[1].weight.register_post_accumulate_grad_hook(lambda weight: weight.grad.zero_())
    report = verify(GradCache(towers, ClipLoss().double(), gradient_hooks="once"), *batch())
    names = "encoder 0: 0.bias, encoder 1: weight"
    assert report.exact and report.reasons == [], str(report)
    assert report.notes == [f"{names}: hooks run once a step, on the finished gradient"]


def test_hooks_that_nobody_spoke_of_are_refused_as_by_the_step():
    towers = encoders()
    towers[0][0].bias.register_hook(lambda gradient: 2 * gradient)
    cache, inputs = GradCache(towers, ClipLoss().double(), gradient_hooks="error"), batch()
    with pytest.raises(ValueError, match="gradient_hooks: expected parameters") as of_verify:
        verify(cache, *inputs)
    with pytest.raises(ValueError) as of_step:
        cache(*inputs)
    assert str(of_verify.value) == str(of_step.value)


def test_an_error_puts_everything_back():
    towers = encoders()
    before = copy.deepcopy(nn.ModuleList(towers).state_dict())
    calls: list[int] = []

    def fails(_module: nn.Module, *_: Any) -> None:
        calls.append(1)
        with torch.no_grad():
            towers[0][0].weight.add_(1)
        if len(calls) > 3:
            raise ZeroDivisionError

    towers[0][2].register_full_backward_hook(fails)
    with pytest.raises(ZeroDivisionError):
        verify(GradCache(towers, ClipLoss().double()), *batch())
    torch.testing.assert_close(nn.ModuleList(towers).state_dict(), before, rtol=0, atol=0)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_over_several_ranks(world: int, tmp_path: Path):
    assert failures(verify_over_ranks.suite, world, tmp_path) == []
