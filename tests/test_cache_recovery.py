"""Out of memory, injected wherever a step may meet it: no gradient is lost or counted twice."""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from one_shot import gradient_errors, one_shot, twins, worst
from torch import Tensor, nn

from gradcache_clip import ByLength, ClipLoss, GradCache
from gradcache_clip.distributed import LocalStrategy

ROWS = 20


class Memory:
    """Says no in one place of a step, for chunks of more rows than fit there."""

    def __init__(self, place: str = "", call: int = 1, fits: int = 4) -> None:
        self.place, self.call, self.fits = place, call, fits
        self.calls = {"forward": 0, "backward": 0, "loss": 0, "loss backward": 0}
        self.failures = 0

    def ask(self, place: str, rows: int) -> None:
        self.calls[place] += 1
        if place == self.place and self.calls[place] >= self.call and rows > self.fits:
            self.failures += 1
            if self.failures > 40:
                raise AssertionError("the step starts again for ever")
            raise torch.OutOfMemoryError(f"injected, {rows} rows")


class Gate(torch.autograd.Function):
    """Passes through, and asks for memory on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Callable[[int], None]) -> Tensor:
        ctx.before = before
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.before(len(grad))
        return grad, None


class Encoder(nn.Module):
    """Asks for memory before its forward, and in the middle of its backward."""

    def __init__(self, memory: Memory, *, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.memory = memory
        self.first = nn.Linear(12, 16)
        self.middle = nn.BatchNorm1d(16) if norm else nn.LayerNorm(16)
        self.last = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.memory.ask("forward", len(x))
        return self.last(Gate.apply(self.middle(self.first(x)), self._before))

    def _before(self, rows: int) -> None:
        # Half of this chunk's gradients are in .grad by now.
        assert self.last[2].weight.grad is not None
        self.memory.ask("backward", rows)


class Loss(nn.Module):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory, self.pair = memory, ClipLoss()
        self.rows_in_chunk = 0

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        # A loss meets all rows whatever the chunk; it has more room after a retry.
        rows = 100 if self.memory.failures == 0 else 0
        self.memory.ask("loss", rows)
        gated = Gate.apply(a, lambda _: self.memory.ask("loss backward", rows))
        return self.pair(gated, b).loss


# Five chunks of four rows, or three of eight, in each of two towers.
PLACES = {
    # Four forwards check the rows of both towers, and six embed them.
    "check of rows": ("forward", 2, "embed"),
    "embed, first chunk": ("forward", 5, "embed"),
    "embed, a chunk between": ("forward", 6, "embed"),
    "embed, second tower": ("forward", 9, "embed"),
    "loss": ("loss", 1, "loss"),
    "backward of the loss": ("loss backward", 1, "loss"),
    "replay, first forward": ("forward", 11, "replay"),
    "replay, a later forward": ("forward", 13, "replay"),
    "replay, backward of the kept graph": ("backward", 1, "replay"),
    "replay, backward half-way": ("backward", 2, "replay"),
}


def batch() -> tuple[Tensor, Tensor]:
    # Two full chunks of eight and one of four that would fit: the second of three still does not.
    return torch.randn(24, 12), torch.randn(24, 12)


def set_gradients(modules: list[nn.Module]) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
    parameters = list(nn.ModuleList(modules).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return {p: (p.grad, p.grad.clone()) for p in parameters}


@contextlib.contextmanager
def halving(phase: str, tried: int, size: Any) -> Iterator[None]:
    message = rf"out of memory in the {phase} with chunks of {tried} rows.*chunk_size={size}$"
    with pytest.warns(UserWarning, match=message):
        yield


# With every graph retained the replay has no forward.
PLACES_AND_BUDGETS = [
    (place, budget)
    for place in PLACES
    for budget in (None, 10**9)
    if budget is None or not (place.startswith("replay") and "forward" in place)
]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("place", "budget"), PLACES_AND_BUDGETS)
def test_a_step_starts_again_with_smaller_chunks(place, budget, dropout):
    where, call, phase = PLACES[place]
    memory = Memory(where, call)
    encoders = [Encoder(memory, dropout=dropout) for _ in range(2)]
    ours = [*encoders, Loss(memory)]
    (ours, truth), inputs = copied(ours), batch()
    existing = set_gradients(ours)
    torch.manual_seed(3)
    cache = GradCache(ours[:2], ours[2], chunk_size=8, memory_budget=budget)
    with halving(phase, 8, 4):
        out = cache(*inputs)
    assert memory.failures == 1 and cache.chunk_size == 4
    state = torch.get_rng_state()
    torch.manual_seed(3)
    expected = GradCache(truth[:2], truth[2], chunk_size=4, memory_budget=cache.plan.memory_budget)
    torch.testing.assert_close(out.loss, expected(*inputs).loss, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())
    assert_added(existing, ours, truth)


def copied(modules: list[nn.Module]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules, and copies with all memory they ask for."""
    copies = list(copy.deepcopy(nn.ModuleList(modules)))
    enough = Memory()
    for module in copies:
        module.memory = enough
    return modules, copies


def assert_added(existing, ours: list[nn.Module], truth: list[nn.Module]) -> None:
    """Each gradient is the one that was there plus the step's, in the tensor that was there."""
    true_parameters = nn.ModuleList(truth).parameters()
    for (parameter, (grad, before)), true in zip(existing.items(), true_parameters, strict=True):
        assert parameter.grad is grad
        torch.testing.assert_close(grad, before + true.grad, rtol=1e-6, atol=1e-6)
    assert len(existing) == len(list(nn.ModuleList(ours).parameters()))


def test_parameters_without_earlier_gradients():
    memory = Memory("backward", 2)
    ours, truth = copied([Encoder(memory), Encoder(memory), Loss(memory)])
    inputs = batch()
    with halving("replay", 8, 4):
        GradCache(ours[:2], ours[2], chunk_size=8)(*inputs)
    one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors(ours, truth))[1] < 1e-5


@pytest.mark.parametrize("place", ["forward", "backward", "loss"])
def test_running_statistics_record_the_chunks_of_the_last_attempt(place):
    memory = Memory(place, 2 if place != "loss" else 1)
    ours, truth = copied([Encoder(memory, norm=True), Encoder(memory), Loss(memory)])
    inputs = batch()
    with halving({"forward": "embed", "backward": "replay", "loss": "loss"}[place], 8, 4), known():
        GradCache(ours[:2], ours[2], chunk_size=8)(*inputs)
    with known():
        GradCache(truth[:2], truth[2], chunk_size=4)(*inputs)
    assert ours[0].middle.num_batches_tracked == 6
    for one, other in zip(ours[0].buffers(), truth[0].buffers(), strict=True):
        assert torch.equal(one, other)
    assert worst(gradient_errors(ours, truth))[1] < 1e-6


@contextlib.contextmanager
def known() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="batch norm in train mode")
        yield


@pytest.mark.parametrize("place", ["embed, a chunk between", "loss", "replay, backward half-way"])
def test_parameters_that_only_a_function_knows(place):
    """A head inside get_features and a loss in a closure are no modules that can be asked."""
    where, call, phase = PLACES[place]
    memory = Memory(where, call)
    ours = [Encoder(memory), Encoder(memory), Loss(memory)]
    head, true_head = twins(nn.Linear(8, 8))
    (ours, truth), inputs = copied(ours), batch()
    existing = set_gradients([*ours, *head])
    cache = GradCache(
        ours[:2],
        lambda a, b: ours[2](a, b),
        chunk_size=8,
        get_features=[lambda features: head[0](features), None],
    )
    with halving(phase, 8, 4):
        cache(*inputs)
    truth[2](true_head[0](truth[0](inputs[0])), truth[1](inputs[1])).backward()
    for (parameter, (grad, before)), true in zip(
        existing.items(), nn.ModuleList([*truth, *true_head]).parameters(), strict=True
    ):
        assert parameter.grad is grad
        torch.testing.assert_close(grad, before + true.grad, rtol=1e-5, atol=1e-6)


def test_a_grad_scaler_scales_the_second_attempt_alone():
    memory = Memory("backward", 2)
    ours, truth = copied([Encoder(memory), Encoder(memory), Loss(memory)])
    inputs = batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    with halving("replay", 8, 4):
        GradCache(ours[:2], ours[2], chunk_size=8, strategy=LocalStrategy(scaler))(*inputs)
    (512.0 * truth[2](truth[0](inputs[0]), truth[1](inputs[1]))).backward()
    assert worst(gradient_errors(ours, truth))[1] < 1e-5


def test_inputs_that_are_leaves_get_the_gradient_of_one_attempt():
    memory = Memory("backward", 3)
    ours, truth = copied([Encoder(memory), Encoder(memory), Loss(memory)])
    images, texts = batch()
    images.requires_grad_()
    images.grad = earlier = torch.ones_like(images)
    with halving("replay", 8, 4):
        GradCache(ours[:2], ours[2], chunk_size=8)(images, texts)
    true_images = images.detach().clone().requires_grad_()
    truth[2](truth[0](true_images), truth[1](texts)).backward()
    assert images.grad is earlier
    torch.testing.assert_close(images.grad, 1 + true_images.grad, rtol=1e-5, atol=1e-6)


def test_several_failures_down_to_one_row():
    memory = Memory("forward", 1, fits=1)
    ours, truth = copied([Encoder(memory), Encoder(memory), Loss(memory)])
    inputs = batch()
    existing = set_gradients(ours)
    cache = GradCache(ours[:2], ours[2], chunk_size=(8, 3), embed_chunk_size=24, check_rows="off")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache(*inputs)
    messages = [str(warning.message) for warning in caught]
    assert [message.split("chunks of ")[1].split()[0] for message in messages] == ["8", "4", "2"]
    assert {warning.filename for warning in caught} == {__file__}
    assert cache.chunk_size == (1, 1) and memory.failures == 3
    one_shot(truth[:2], truth[2], inputs)
    for (parameter, (grad, before)), true in zip(
        existing.items(), nn.ModuleList(truth).parameters(), strict=True
    ):
        assert parameter.grad is grad
        torch.testing.assert_close(grad, before + true.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_not_even_one_row_fits(place):
    memory = Memory(place, 1, fits=0)
    ours, _ = copied([Encoder(memory), Encoder(memory), Loss(memory)])
    existing = set_gradients(ours)
    cache = GradCache(ours[:2], ours[2], chunk_size=5)
    message = (
        r"expected chunks of one row to fit, got no memory in the \w+ with any of chunk_size "
        r"5, 2, 1; take smaller inputs.*injected, 1 rows"
    )
    with (
        warnings.catch_warnings(),
        pytest.raises(torch.OutOfMemoryError, match=message),
    ):
        warnings.simplefilter("ignore")
        cache(*(x[:20] for x in batch()))
    for parameter, (grad, before) in existing.items():
        assert parameter.grad is grad and torch.equal(grad, before)


def test_the_next_step_keeps_the_size_that_fits():
    memory = Memory("forward", 1)
    ours, truth = copied([Encoder(memory), Encoder(memory), Loss(memory)])
    inputs = batch()
    cache = GradCache(ours[:2], ours[2], chunk_size=8)
    with halving("embed", 8, 4):
        cache(*inputs)
    cache(*inputs)
    assert memory.failures == 1
    for _ in range(2):
        one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors(ours, truth))[1] < 1e-5


@pytest.mark.parametrize(
    ("budget", "halved"), [(None, None), (1001, 500), (0.5, 0.25), ("auto", "auto")]
)
def test_the_budget_for_graphs_is_halved_as_well(budget, halved):
    memory = Memory("forward", 1)
    cache = GradCache(
        [Encoder(memory), Encoder(memory)],
        ClipLoss(),
        chunk_size=8,
        memory_budget=budget,
        embed_chunk_size=16,
    )
    with halving("embed", 8, 4):
        cache(*batch())
    assert (cache.plan.memory_budget, cache.plan.embed_chunk_size) == (halved, None)
    asked = cache.settings
    assert (asked.chunk_size, asked.memory_budget, asked.embed_chunk_size) == (8, budget, 16)


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alive: weakref.WeakSet[Any]) -> Tensor:
        ctx.token = Memory()
        alive.add(ctx.token)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@pytest.mark.parametrize("place", ["embed, second tower", "replay, backward half-way"])
def test_nothing_of_a_failed_attempt_is_alive_in_the_next(place):
    """Graphs that were retained would take the very memory that ran out."""
    where, call, _ = PLACES[place]
    memory, alive = Memory(where, call), weakref.WeakSet()
    alive_at_start: list[int] = []

    class Holds(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            if memory.failures and not alive_at_start:
                alive_at_start.append(len(alive))
            return Kept.apply(super().forward(x), alive)

    cache = GradCache(
        [Holds(memory), Holds(memory)], Loss(memory), chunk_size=8, memory_budget=10**9
    )
    with halving(r"\w+", 8, 4):
        cache(*batch())
    assert alive_at_start == [0]
    assert len(alive) == 0


class TokenEncoder(nn.Module):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory, self.embedding = memory, nn.Embedding(50, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.memory.ask("forward", input_ids.numel())
        return (self.embedding(input_ids) * attention_mask[..., None]).sum(1)


def test_chunks_of_a_number_of_tokens_are_halved_too():
    lengths = torch.randint(1, 7, (24, 1))
    mask = (torch.arange(6) < lengths).long()
    tokens = {"input_ids": torch.randint(1, 50, (24, 6)) * mask, "attention_mask": mask}
    memory = Memory("forward", 1, fits=12)
    ours, truth = copied([TokenEncoder(memory), Encoder(Memory()), Loss(Memory())])
    inputs = tokens, batch()[0]
    sort = [ByLength(max_tokens=48), None]
    cache = GradCache(ours[:2], ours[2], chunk_size=8, sort_by_length=sort)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="GradCache: out of memory")
        cache(*inputs)
    assert memory.failures == 2
    one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors(ours, truth))[1] < 1e-5


class WithOthers(LocalStrategy):
    """Other ranks would wait for one that starts again."""

    recovers = False


@pytest.mark.parametrize(
    "options", [{"on_out_of_memory": "raise"}, {"strategy": WithOthers()}], ids=["raise", "ranks"]
)
def test_raise_leaves_the_error_and_the_sizes_alone(options):
    memory = Memory("backward", 2)
    cache = GradCache([Encoder(memory), Encoder(memory)], Loss(memory), chunk_size=8, **options)
    with pytest.raises(torch.OutOfMemoryError, match="^injected, 8 rows$"):
        cache(*batch())
    assert cache.chunk_size == 8 and memory.failures == 1


def test_what_is_no_choice():
    with pytest.raises(ValueError, match="on_out_of_memory: expected 'halve' or 'raise', got 'no'"):
        GradCache([nn.Linear(2, 2)], ClipLoss(), on_out_of_memory="no")


def test_an_allocator_of_the_host_that_refuses():
    """Not injected: torch itself refuses 2^60 bytes."""

    class Greedy(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 4:
                torch.empty(2**60, dtype=torch.uint8)
            return super().forward(x)

    ours, truth = copied([Greedy(Memory()), Encoder(Memory()), Loss(Memory())])
    inputs = batch()
    with halving("embed", 8, 4):
        GradCache(ours[:2], ours[2], chunk_size=8)(*inputs)
    one_shot([Encoder.forward.__get__(truth[0]), truth[1]], truth[2], inputs)
    assert worst(gradient_errors(ours, truth))[1] < 1e-5


class Breaks(Encoder):
    """Fails in its replay, in another way than for want of memory."""

    def _before(self, rows: int) -> None:
        self.memory.calls["backward"] += 1
        if self.memory.calls["backward"] == 3:
            raise RuntimeError("a bug of the caller's")


@pytest.mark.parametrize("known_to_modules", [True, False], ids=["modules", "functions"])
def test_another_error_leaves_earlier_gradients_as_they_were(known_to_modules):
    memory = Memory()
    modules = [Breaks(memory), Breaks(memory), Loss(memory)]
    existing = set_gradients(modules)
    loss = modules[2] if known_to_modules else lambda a, b: modules[2](a, b)
    with pytest.raises(RuntimeError, match="a bug of the caller's"):
        GradCache(modules[:2], loss, chunk_size=8)(*batch())
    assert all(parameter.grad is grad for parameter, (grad, _) in existing.items())
    assert all(torch.equal(grad, before) for grad, before in existing.values())


class Counts(Encoder):
    """Carries a buffer from call to call, in place or as a new tensor."""

    def __init__(self, memory: Memory, *, in_place: bool) -> None:
        super().__init__(memory)
        self.in_place = in_place
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.seen.add_(1)
        else:
            self.seen = self.seen + 1
        return super().forward(x)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("call", [5, 6, 7, 11])
def test_a_buffer_that_cannot_be_restored_ends_the_step(in_place, call):
    memory = Memory("forward", call)
    modules = [Counts(memory, in_place=in_place), Encoder(memory), Loss(memory)]
    existing = set_gradients(modules)
    message = r"cannot start again because it had changed the buffer seen of Counts; choose a small"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        GradCache(modules[:2], modules[2], chunk_size=8)(*batch())
    for parameter, (grad, before) in existing.items():
        assert parameter.grad is grad and torch.equal(grad, before)


class Moves(nn.Module):
    """Replaces a buffer in its first calls, and fails at a later one."""

    def __init__(self, fails_at: int) -> None:
        super().__init__()
        self.linear, self.calls, self.fails_at = nn.Linear(12, 8), 0, fails_at
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.calls < 6:
            self.seen = self.seen + 1
        self.calls += 1
        if self.calls == self.fails_at:
            raise torch.OutOfMemoryError("injected")
        return self.linear(x)


def test_a_new_buffer_in_the_place_of_the_old_one_is_noticed():
    """Python gives the id of a tensor that is gone to another one."""
    unnoticed = []
    for call in range(2, 30):
        cache = GradCache([Moves(call), nn.Linear(12, 8)], ClipLoss(), chunk_size=2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="GradCache: out of memory")
            try:
                cache(torch.randn(32, 12), torch.randn(32, 12))
                unnoticed.append(call)
            except torch.OutOfMemoryError:
                pass
    assert unnoticed == []


def test_a_step_that_fits_costs_no_second_set_of_gradients_in_place():
    """Without earlier gradients nothing is set aside, and nothing is added afterwards."""
    memory = Memory()
    modules = [Encoder(memory), Encoder(memory), Loss(memory)]
    seen: dict[str, int] = {}
    weight = modules[0].first.weight
    weight.register_post_accumulate_grad_hook(lambda p: seen.__setitem__("grad", id(p.grad)))
    GradCache(modules[:2], modules[2], chunk_size=8, gradient_hooks="every_chunk")(*batch())
    assert seen["grad"] == id(weight.grad)
