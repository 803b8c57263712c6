"""Hooks on the gradients of parameters run as in the one-shot step, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hook_cases import hook_cases
from one_shot import gradient_errors, one_shot, twins, worst
from strategy_processes import result_of, run_cases
from torch import Tensor, nn

from gradcache_clip import ClipLoss, GradCache, deferred_step
from gradcache_clip.distributed import LocalStrategy

ROWS, CHUNK = 14, 4
CHUNKS = 4
ONCE = {"gradient_hooks": "once"}


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 10), nn.GELU(), nn.Linear(10, 6))


def batch(step: int = 0, widths: tuple[int, ...] = (7, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(ROWS, w, generator=generator, dtype=torch.float64) for w in widths]


def pair() -> tuple[list[nn.Module], list[nn.Module]]:
    """Two towers and a loss, and their copies."""
    return twins(*(module.double() for module in (mlp(7), mlp(5), ClipLoss())))


def parameters(modules: list[nn.Module]) -> list[nn.Parameter]:
    return list(nn.ModuleList(modules).parameters())


@torch.no_grad()
def furthest(ours: list[nn.Module], truth: list[nn.Module]) -> float:
    """Between the weights of both, relative."""
    pairs = zip(parameters(ours), parameters(truth), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def clamp(gradient: Tensor) -> Tensor:
    return gradient.clamp(-1e-3, 1e-3)


def step_in_backward(modules: list[nn.Module], lr: float = 0.05) -> None:
    """An optimizer for each parameter, which steps as soon as its gradient is there."""
    for parameter in parameters(modules):
        optimizer = torch.optim.AdamW([parameter], lr=lr)

        def take(p: nn.Parameter, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            p.grad = None

        parameter.register_post_accumulate_grad_hook(take)


def clip_in_backward(modules: list[nn.Module]) -> None:
    for parameter in parameters(modules):
        parameter.register_hook(clamp)


def both_in_backward(modules: list[nn.Module]) -> None:
    clip_in_backward(modules)
    step_in_backward(modules)


@pytest.mark.parametrize("budget", [None, 4000, 10**9])
@pytest.mark.parametrize("on_out_of_memory", ["halve", "raise"])
@pytest.mark.parametrize("register", [step_in_backward, both_in_backward])
def test_an_optimizer_in_the_backward(register, on_out_of_memory, budget):
    ours, truth = pair()
    for modules in (ours, truth):
        register(modules)
    options = {"on_out_of_memory": on_out_of_memory, "memory_budget": budget}
    cache = GradCache(ours[:2], ours[2], chunk_size=CHUNK, **ONCE, **options)
    for step in range(4):
        cache(*batch(step))
        one_shot(truth[:2], truth[2], batch(step))
        assert all(p.grad is None for p in parameters(ours))
    assert furthest(ours, truth) < 1e-10


@pytest.mark.parametrize("on_out_of_memory", ["halve", "raise"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_clamp_sees_the_finished_gradient(earlier, on_out_of_memory):
    ours, truth = pair()
    for modules in (ours, truth):
        clip_in_backward(modules)
    cache = GradCache(
        ours[:2], ours[2], chunk_size=CHUNK, on_out_of_memory=on_out_of_memory, **ONCE
    )
    for step in range(1 + earlier):
        cache(*batch(step))
        one_shot(truth[:2], truth[2], batch(step))
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


@pytest.mark.parametrize("on_out_of_memory", ["halve", "raise"])
def test_hooks_are_given_what_one_backward_gives_them(on_out_of_memory):
    """`register_hook` this step's gradient, `register_post_accumulate_grad_hook` the sum."""
    ours, truth = pair()
    seen: dict[int, list[Tensor]] = {}
    for side, modules in enumerate((ours, truth)):
        for p in parameters(modules):
            p.grad = torch.full_like(p, 0.5)
            notes = seen.setdefault(side, [])
            p.register_hook(lambda gradient, notes=notes: notes.append(gradient.clone()))
            p.register_post_accumulate_grad_hook(lambda p, n=notes: n.append(p.grad.clone()))
    GradCache(ours[:2], ours[2], chunk_size=CHUNK, on_out_of_memory=on_out_of_memory, **ONCE)(
        *batch()
    )
    one_shot(truth[:2], truth[2], batch())
    assert len(seen[0]) == len(seen[1]) == 2 * len(parameters(ours))

    def key(tensor: Tensor) -> tuple[int, float]:
        return tensor.numel(), float(tensor.sum())

    # One backward visits parameters in another order.
    for mine, theirs in zip(sorted(seen[0], key=key), sorted(seen[1], key=key), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


def test_scaled_gradients():
    ours, truth = pair()
    for modules in (ours, truth):
        clip_in_backward(modules)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    strategy = LocalStrategy(scaler)
    GradCache(ours[:2], ours[2], chunk_size=CHUNK, strategy=strategy, **ONCE)(*batch())
    loss = truth[2](truth[0](batch()[0]), truth[1](batch()[1])).loss
    scaler.scale(loss).backward()
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


class Both(nn.Module):
    """One module for both inputs, whose towers share a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.towers, self.shared = nn.ModuleList([mlp(7), mlp(5)]), nn.Linear(6, 6)

    def forward(self, tower: int, rows: Tensor) -> Tensor:
        return self.shared(self.towers[tower](rows))


def sharing_towers() -> tuple[Any, Callable[..., Any]]:
    shared = nn.Linear(6, 6)
    return [nn.Sequential(mlp(7), shared), nn.Sequential(mlp(5), shared)], {}


def tied_towers() -> tuple[Any, Callable[..., Any]]:
    both = mlp(7)
    return [both, both], {}


def one_module() -> tuple[Any, Callable[..., Any]]:
    return Both(), {}


def frozen_tower() -> tuple[Any, Callable[..., Any]]:
    return [mlp(7), mlp(5).requires_grad_(False)], {}


def with_head() -> tuple[Any, Callable[..., Any]]:
    return [mlp(7), mlp(5)], {"get_features": [nn.Linear(6, 6), None]}


@pytest.mark.parametrize(
    "build", [sharing_towers, tied_towers, one_module, frozen_tower, with_head]
)
@pytest.mark.parametrize("budget", [None, 10**9])
def test_who_has_the_parameter(build, budget):
    widths = (7, 7) if build is tied_towers else (7, 5)
    encoders, options = build()
    heads = options.get("get_features", [None, None])
    modules = nn.ModuleList([encoders] if isinstance(encoders, nn.Module) else encoders)
    extra = nn.ModuleList([head for head in heads if head is not None])
    (ours, our_extra, loss), (truth, true_extra, true_loss) = twins(
        *(each.double() for each in (modules, extra, ClipLoss()))
    )
    sides = [[ours, our_extra, loss], [truth, true_extra, true_loss]]
    for side in sides:
        trained = [m for m in side if any(p.requires_grad for p in m.parameters())]
        for p in (p for m in trained for p in m.parameters() if p.requires_grad):
            p.register_hook(clamp)
            optimizer = torch.optim.AdamW([p], lr=0.05)
            p.register_post_accumulate_grad_hook(lambda _, o=optimizer: o.step())
    one = isinstance(encoders, nn.Module)
    found = [our_extra[0], None] if len(our_extra) else None
    cache = GradCache(
        ours[0] if one else list(ours),
        loss,
        chunk_size=CHUNK,
        memory_budget=budget,
        get_features=found,
        **ONCE,
    )
    for step in range(3):
        inputs = batch(step, widths)
        cache(*inputs)
        features = [truth[0](i, x) if one else truth[i](x) for i, x in enumerate(inputs)]
        if len(true_extra):
            features[0] = true_extra[0](features[0])
        true_loss(*features).loss.backward()
        for side in sides:
            nn.ModuleList(side).zero_grad()
    assert furthest(*sides) < 1e-10


def test_a_leaf_input_with_a_hook():
    ours, truth = pair()
    inputs, true_inputs = batch(), batch()
    for given in (inputs, true_inputs):
        given[0].requires_grad_().register_hook(clamp)
    GradCache(ours[:2], ours[2], chunk_size=CHUNK, **ONCE)(*inputs)
    one_shot(truth[:2], truth[2], true_inputs)
    torch.testing.assert_close(inputs[0].grad, true_inputs[0].grad, rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match=r"encoder 0.*: an input with the hook clamp"):
        GradCache(ours[:2], ours[2], chunk_size=CHUNK)(*inputs)


def test_a_deferred_step():
    ours, truth = pair()
    for modules in (ours, truth):
        both_in_backward(modules)
    cache = GradCache(ours[:2], ours[2], chunk_size=CHUNK, **ONCE)
    for step in range(3):
        (deferred_step(cache, *batch(step)).loss / 3).backward()
        (truth[2](*(m(x) for m, x in zip(truth, batch(step), strict=False))).loss / 3).backward()
    assert furthest(ours, truth) < 1e-10


@pytest.mark.parametrize("register", [step_in_backward, clip_in_backward])
@pytest.mark.parametrize("call", [deferred_step, lambda cache, *inputs: cache(*inputs)])
def test_hooks_are_refused_by_name(register, call):
    ours, _ = pair()
    register(ours[:2])
    name = {step_in_backward: r"step_in_backward.<locals>.take", clip_in_backward: "clamp"}
    cache = GradCache(ours[:2], ours[2], chunk_size=CHUNK)
    message = (
        rf"gradient_hooks: expected .* got encoder 0 \(Sequential\): 0.weight and 7 more with the "
        rf"hook {name[register]} of test_silent_hooks, .* pass gradient_hooks=\"once\""
    )
    with pytest.raises(ValueError, match=message):
        call(cache, *batch())
    assert all(p.grad is None for p in parameters(ours))


def test_a_hook_in_a_partial_is_named():
    ours, _ = pair()
    ours[1][0].bias.register_hook(partial(torch.clamp, min=-1e-3))
    with pytest.raises(ValueError, match=r"encoder 1.*: 0.bias with the hook .*clamp"):
        GradCache(ours[:2], ours[2], chunk_size=CHUNK)(*batch())


def test_another_choice():
    with pytest.raises(ValueError, match="gradient_hooks: expected 'error', 'once' or 'every_chu"):
        GradCache([mlp(7)], ClipLoss(), gradient_hooks="twice")


@pytest.mark.parametrize("budget", [None, 10**9])
def test_every_chunk_is_what_autograd_does(budget):
    ours, _ = pair()
    calls: list[int] = []
    ours[0][0].weight.register_hook(lambda _: calls.append(1))
    ours[1][0].weight.register_post_accumulate_grad_hook(lambda _: calls.append(2))
    mode = {"gradient_hooks": "every_chunk", "memory_budget": budget}
    GradCache(ours[:2], ours[2], chunk_size=CHUNK, **mode)(*batch())
    assert (calls.count(1), calls.count(2)) == (CHUNKS, CHUNKS)


def test_once_is_once():
    ours, _ = pair()
    calls: list[int] = []
    ours[0][0].weight.register_hook(lambda _: calls.append(1))
    ours[1][0].weight.register_post_accumulate_grad_hook(lambda _: calls.append(2))
    GradCache(ours[:2], ours[2], chunk_size=CHUNK, **ONCE)(*batch())
    assert calls == [1, 2], "each when its own tower is done"


def test_handles_still_remove_their_hooks():
    ours, truth = pair()
    weights = ours[0][0].weight, ours[0][2].weight
    calls: list[int] = []
    handles = [
        weights[0].register_hook(lambda _: calls.append(1)),
        weights[1].register_post_accumulate_grad_hook(lambda _: calls.append(2)),
    ]
    cache = GradCache(ours[:2], ours[2], chunk_size=CHUNK, **ONCE)
    cache(*batch())
    nn.ModuleList(ours).zero_grad()
    one_shot(ours[:2], ours[2], batch())
    assert sorted(calls) == [1, 1, 2, 2], "a plain backward runs them again"
    for handle in handles:
        handle.remove()
    nn.ModuleList(ours).zero_grad()
    GradCache(ours[:2], ours[2], chunk_size=CHUNK)(*batch())
    assert len(calls) == 4
    one_shot(truth[:2], truth[2], batch())
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


class Breaks(nn.Module):
    """Raises in a chosen call, and is otherwise an encoder."""

    def __init__(self, inner: nn.Module, at: int, error: BaseException) -> None:
        super().__init__()
        self.inner, self.at, self.error, self.calls = inner, at, error, 0

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.inner(rows)


@pytest.mark.parametrize("on_out_of_memory", ["halve", "raise"])
@pytest.mark.parametrize("at", [2, CHUNKS + 2])
def test_after_an_error_hooks_and_gradients_are_as_before(at, on_out_of_memory):
    ours, truth = pair()
    calls: list[str] = []
    broken = Breaks(ours[1], at, RuntimeError("broken"))
    for modules in (ours[:2], truth[:2]):
        for p in parameters(modules):
            p.grad = torch.full_like(p, 0.5)
    hook = ours[1][0].weight.register_hook(lambda _: calls.append("hook"))
    options = {"on_out_of_memory": on_out_of_memory, "check_rows": "off"}
    cache = GradCache([ours[0], broken], ours[2], chunk_size=CHUNK, **ONCE, **options)
    with pytest.raises(RuntimeError, match="broken"):
        cache(*batch())
    hooked = ours[1][0].weight
    assert calls == [] and list(hooked._backward_hooks.values()), "the hook is there"
    assert torch.equal(hooked.grad, torch.full_like(hooked, 0.5))
    if on_out_of_memory == "raise" and at > CHUNKS:
        with pytest.raises(RuntimeError, match=r"broken off; call optimizer.zero_grad"):
            cache(*batch())
    nn.ModuleList(ours).zero_grad()
    nn.ModuleList(truth).zero_grad()
    cache(*batch())
    one_shot(truth[:2], truth[2], batch())
    assert calls == ["hook"]
    assert worst(gradient_errors(ours, truth))[1] < 1e-10
    hook.remove()


@pytest.mark.parametrize("mode", ["once", "every_chunk"])
@pytest.mark.parametrize("where", ["encoder", "loss"])
def test_out_of_memory_after_an_optimizer_has_stepped(where, mode):
    """A weight that has moved cannot be taken back; the error says so."""
    ours, _ = pair()
    # The replay of the first tower is over when the second one runs out of memory.
    breaking = Breaks(ours[1], 2 * CHUNKS - 1, torch.OutOfMemoryError("injected"))
    step_in_backward([ours[0] if where == "encoder" else ours[2]])
    options = {"gradient_hooks": mode, "check_rows": "off"}
    cache = GradCache([ours[0], breaking], ours[2], chunk_size=CHUNK, **options)
    message = "cannot start again because hooks have run on gradients, such as an optimizer's"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        cache(*batch())


def test_out_of_memory_after_a_clamp_starts_again():
    ours, truth = pair()
    for modules in (ours, truth):
        clip_in_backward(modules)
    breaking = Breaks(ours[1], 2 * CHUNKS - 1, torch.OutOfMemoryError("injected"))
    cache = GradCache([ours[0], breaking], ours[2], chunk_size=CHUNK, check_rows="off", **ONCE)
    with pytest.warns(UserWarning, match="out of memory in the replay.*chunk_size=2"):
        cache(*batch())
    one_shot(truth[:2], truth[2], batch())
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


def test_a_hook_of_the_loss_sees_earlier_gradients_too():
    """The loss has one backward; its hooks need no permission, and run once."""
    ours, truth = pair()
    for modules in (ours, truth):
        step_in_backward(modules[2:])
        modules[2].log_logit_scale.grad = torch.tensor(0.5, dtype=torch.float64)
    GradCache(ours[:2], ours[2], chunk_size=CHUNK)(*batch())
    one_shot(truth[:2], truth[2], batch())
    assert furthest(ours, truth) < 1e-10
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


def test_measuring_a_chunk_size_runs_no_hook():
    ours, truth = pair()
    for modules in (ours, truth):
        step_in_backward(modules)
    cache = GradCache(ours[:2], ours[2], chunk_size="auto", **ONCE)
    cache(*batch())
    one_shot(truth[:2], truth[2], batch())
    assert cache.chunk_size != "auto"
    assert furthest(ours, truth) < 1e-10


class Borrows(nn.Module):
    """Uses a layer that it has not registered."""

    def __init__(self, inner: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.inner, self.borrowed = inner, (layer,)

    def forward(self, rows: Tensor) -> Tensor:
        return self.borrowed[0](self.inner(rows))


@pytest.mark.parametrize("on_out_of_memory", ["halve", "raise"])
def test_a_parameter_that_a_later_tower_only_borrows(on_out_of_memory):
    """Its hooks have run when the gradients of the second tower arrive."""
    ours, _ = pair()
    layer = ours[0][2]
    second = Borrows(ours[1], nn.Linear(6, 10).double())
    second.borrowed = (nn.Sequential(second.borrowed[0], layer),)
    layer.weight.register_hook(clamp)
    cache = GradCache(
        [ours[0], second], ours[2], chunk_size=CHUNK, on_out_of_memory=on_out_of_memory, **ONCE
    )
    with pytest.raises(RuntimeError, match=r"encoder 0 \(Sequential\): 2.weight: .*registered it"):
        cache(*batch())


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2])
def test_over_ranks(world, tmp_path):
    results = run_cases(hook_cases(), world, tmp_path)
    for case in hook_cases():
        found = result_of(results, case)
        if "error" in found:
            assert found["error"] < 1e-10, (case, found)
