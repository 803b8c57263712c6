"""Graphs that are kept from the embed: how many, how much memory, and the same gradients."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from one_shot import gradient_errors, one_shot, twins, worst
from test_distributed import (
    LOCAL,
    OneModule,
    build,
    counted_reductions,
    global_batch,
    in_two_processes,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from gradcache_clip import ByLength, ClipLoss, GradCache
from gradcache_clip.cache import graph_budget
from gradcache_clip.cache.graph_budget import SavedBytes
from gradcache_clip.distributed import DDPStrategy, LocalStrategy
from gradcache_clip.memory import LiveBytes

# Encoders count their calls, among which those of the check would be.
GradCache = partial(GradCache, check_rows="off")

ROWS, CHUNK = 24, 4
CHUNKS = ROWS // CHUNK


def mlp(width: int, hidden: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 8))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 12), torch.randn(ROWS, 12)


# The GELU's input and its output, fp32; inputs and weights are in memory anyway.
GRAPH_BYTES = 2 * CHUNK * 32 * 4


class Counted(nn.Module):
    """Counts its calls, and the graphs of them that are alive."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.alive_at_calls: list[int] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        self.alive_at_calls.append(len(self.alive))
        features = self.inner(*args, **kwargs)
        if not features.requires_grad:
            return features
        return Marked.apply(features, self.alive)


class Token:
    """Lives as long as the graph that holds it."""


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alive: weakref.WeakSet[Any]) -> Tensor:
        ctx.token = Token()
        alive.add(ctx.token)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def test_the_measured_bytes_are_those_of_the_graph():
    encoder, x = mlp(12), batch()[0][:CHUNK]
    saved = SavedBytes([*encoder.parameters(), x])
    with LiveBytes(start=[*encoder.parameters(), x]) as live, saved.counting(True):
        features = encoder(x)
        assert saved.total == GRAPH_BYTES
        assert live.current_bytes - live.start_bytes == GRAPH_BYTES + features.nbytes


def test_the_bytes_of_a_checkpointed_graph_are_its_boundaries():
    blocks = nn.ModuleList([mlp(8) for _ in range(3)])
    x = torch.randn(CHUNK, 8)
    saved = SavedBytes([*blocks.parameters(), x])
    with saved.counting(True):
        hidden = x
        for block in blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False)
    assert saved.total == 2 * CHUNK * 8 * 4


@pytest.mark.parametrize(
    ("graphs", "kept"),
    [(0, 1), (0.9, 1), (1, 2), (2.5, 3), (5, 6), (6, 7), (7, 8), (11, 12), (12, 12), (99, 12)],
)
def test_as_many_graphs_are_kept_as_fit(graphs, kept):
    """The last chunk of a step is kept beside them: its replay would need as much."""
    (a, b, loss), (true_a, true_b, true_loss) = twins(mlp(12), mlp(12), ClipLoss())
    one, other = Counted(a), Counted(b)
    other.alive = one.alive
    inputs = batch()
    budget = int(graphs * GRAPH_BYTES)
    cache = GradCache([one, other], loss, chunk_size=CHUNK, memory_budget=budget)
    cache(*inputs)
    assert one.calls + other.calls == 2 * CHUNKS + (2 * CHUNKS - kept)
    # While a chunk runs, the budget's graphs are alive at most, and the one beside them.
    assert max(one.alive_at_calls + other.alive_at_calls) <= max(1, int(graphs) + 1)
    assert len(one.alive) == 0, "a graph outlived its step"
    one_shot([true_a, true_b], true_loss, inputs)
    assert worst(gradient_errors([a, b, loss], [true_a, true_b, true_loss]))[1] < 1e-5


class Wide(nn.Module):
    """Few weights, and many activations a row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)[:, None] * torch.linspace(0, 1, 400)[:, None]
        for _ in range(3):
            hidden = F.gelu(hidden)
        return hidden.mean(1)


def test_live_memory_stays_within_the_budget():
    encoders, inputs, peaks = [Wide(), Wide()], batch(), {}
    start = [*nn.ModuleList(encoders).parameters(), *inputs]
    one = SavedBytes(start)
    with one.counting(True):
        encoders[0](inputs[0][:CHUNK])
    assert one.total > 3 * CHUNK * 400 * 8 * 4
    for graphs in (0, 2, 4, 9):
        budget = graphs * one.total
        cache = GradCache(encoders, ClipLoss(), chunk_size=CHUNK, memory_budget=budget)
        with LiveBytes(start=start) as live:
            cache(*inputs)
        peaks[graphs] = live.peak_bytes
    for graphs in (2, 4, 9):
        grown = peaks[graphs] - peaks[0]
        assert 0.9 * graphs * one.total < grown <= graphs * one.total + 8192


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 12)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for _ in range(20):
            hidden = F.gelu(hidden)
        return (hidden * attention_mask[..., None]).sum(1)


def test_the_budget_holds_where_the_first_chunk_is_not_the_largest():
    """Of chunks of at most 100 tokens the first, one row of 51, has half of the others' tokens."""
    lengths = torch.tensor([51, 51, *[10] * 60])
    mask = (torch.arange(51) < lengths[:, None]).long()
    tokens = {"input_ids": torch.randint(1, 50, mask.shape) * mask, "attention_mask": mask}
    others, encoders = torch.randn(62, 12), [Words(), nn.Linear(12, 12)]
    start, held = [*nn.ModuleList(encoders).parameters(), *tokens.values(), others], {}
    first = SavedBytes(start)
    with first.counting(True):
        encoders[0](tokens["input_ids"][:1], mask[:1])
    for budget in (0, 5 * first.total):

        def loss(a: Tensor, b: Tensor, budget: int = budget) -> Tensor:
            held[budget] = live.current_bytes
            return F.mse_loss(a, b)

        sort = [ByLength(max_tokens=100), None]
        cache = GradCache(encoders, loss, sort_by_length=sort, memory_budget=budget)
        with LiveBytes(start=start) as live:
            cache(tokens, others)
    assert 3 * first.total < held[5 * first.total] - held[0] <= 5 * first.total + 4096


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_graph_is_kept_beside_a_frozen_encoder(frozen):
    encoders = [Counted(mlp(12)), Counted(mlp(12))]
    encoders[frozen].requires_grad_(False)
    GradCache(encoders, ClipLoss(), chunk_size=CHUNK)(*batch())
    assert encoders[frozen].calls == CHUNKS
    assert encoders[1 - frozen].calls == 2 * CHUNKS - 1


@pytest.mark.parametrize("one_module", [False, True])
def test_frozen_encoders_use_none_of_the_budget(one_module):
    trained, frozen = Counted(mlp(12)), Counted(mlp(12).requires_grad_(False))
    encoders = OneModule(frozen, trained) if one_module else [frozen, trained]
    budget = CHUNKS * GRAPH_BYTES
    GradCache(encoders, ClipLoss(), chunk_size=CHUNK, memory_budget=budget)(*batch())
    assert (frozen.calls, trained.calls) == (CHUNKS, CHUNKS)


@pytest.mark.parametrize("budget", [3 * GRAPH_BYTES, 10**9])
def test_casts_of_autocast_do_not_cut_retained_graphs_off(budget):
    """A weight's 16-bit copy from a chunk without a graph would leave it without a gradient."""
    shared = mlp(12)
    (a, b, loss), (true_a, true_b, true_loss) = twins(shared, shared, ClipLoss())
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        GradCache([a, b], loss, chunk_size=CHUNK, memory_budget=budget)(*inputs)
        GradCache([true_a, true_b], true_loss, chunk_size=CHUNK)(*inputs)
    errors = gradient_errors([a, b, loss], [true_a, true_b, true_loss])
    assert worst(errors)[1] < 1e-6, errors
    assert all(parameter.grad.abs().sum() > 0 for parameter in shared.parameters())


def test_retained_graphs_share_the_casts_of_autocast():
    """A 16-bit copy of all weights for each chunk would take more than the activations."""
    encoder, held = nn.Sequential(nn.Linear(12, 400), nn.Linear(400, 400)), {}
    x, y = batch()
    for budget in (0, 10**9):

        def loss(a: Tensor, b: Tensor, budget: int = budget) -> Tensor:
            held[budget] = live.current_bytes
            return F.mse_loss(a, b)

        cache = GradCache([encoder, nn.Linear(12, 400)], loss, chunk_size=4, memory_budget=budget)
        with LiveBytes(start=encoder.parameters()) as live, torch.autocast("cpu", torch.bfloat16):
            cache(x, y)
    weights = sum(parameter.numel() for parameter in encoder.parameters()) * 2
    activations = ROWS * 2 * 400 * 2
    assert held[10**9] - held[0] < 2 * weights + 2 * activations


def test_a_measured_graph_still_notices_what_was_changed_in_place():
    x, factor = torch.randn(3, requires_grad=True), torch.ones(3)
    saved = SavedBytes([])
    with saved.counting(True):
        product = x * factor
    factor.mul_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("budget", [2 * GRAPH_BYTES, 10**9])
def test_an_encoder_that_changes_what_its_graph_holds_is_an_error(budget):
    """One graph over two calls would raise as well; gradients that are wrong must not come out."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 8)
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            self.scale.mul_(1.5)
            return self.linear(x) * self.scale

    encoder = Scales()
    cache = GradCache([encoder, encoder], ClipLoss(), chunk_size=ROWS, memory_budget=budget)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|changed by"):
        cache(*batch())


@pytest.mark.parametrize(
    ("budget", "free", "total", "kept"),
    [
        # 0.8 of what is free; all fits, so nothing is replayed and no room is needed for that.
        ("auto", 12 / 0.8, 0, 12),
        # Room for eleven: one stays free for a replay.
        ("auto", 11.5 / 0.8, 0, 11),
        ("auto", 1 / 0.8, 0, 1),
        (0.5, 0, 2 * 5, 6),
        (1.0, 0, 3, 4),
    ],
)
def test_a_budget_as_a_share(budget, free, total, kept, monkeypatch):
    monkeypatch.setattr(graph_budget, "_free_bytes", lambda device: int(free * GRAPH_BYTES) + 1)
    monkeypatch.setattr(graph_budget, "_total_bytes", lambda device: int(total * GRAPH_BYTES) + 1)
    one, other = Counted(mlp(12)), Counted(mlp(12))
    GradCache([one, other], ClipLoss(), chunk_size=CHUNK, memory_budget=budget)(*batch())
    assert one.calls + other.calls == 4 * CHUNKS - kept


def test_shares_are_of_the_memory_that_is_there():
    device = torch.device("cpu")
    total = graph_budget.budget_bytes(1.0, device)
    assert 2**27 < graph_budget.budget_bytes("auto", device) < total
    assert graph_budget.budget_bytes(0.25, device) == int(0.25 * total)


@pytest.mark.parametrize("budget", [-1, 0.0, 1.5, -0.5, True, "much", float("nan"), [1]])
def test_what_is_no_budget(budget):
    with pytest.raises(ValueError, match="memory_budget: expected bytes.*such as memory_budget"):
        GradCache([mlp(12)], ClipLoss(), memory_budget=budget)


def test_a_budget_is_there_anew_in_every_step():
    one, other = Counted(mlp(12)), Counted(mlp(12))
    cache = GradCache([one, other], ClipLoss(), chunk_size=CHUNK, memory_budget=3 * GRAPH_BYTES)
    for _ in range(3):
        cache(*batch())
    assert one.calls + other.calls == 3 * (4 * CHUNKS - 4)


def test_outputs_that_share_storage_are_counted_once():
    saved = SavedBytes([])
    x = torch.randn(6, 5, requires_grad=True)
    with saved.counting(True):
        (x[:3].exp() * x[3:]).sum()
    # exp saves its result, the product both factors; x itself is one storage for both views.
    assert saved.total == x.nbytes + x[:3].nbytes


class JointEnds(LocalStrategy):
    """As with DDP, the first and the last chunk are replayed through the wrapper, in any case."""

    joint_first_and_last = True


@pytest.mark.parametrize("chunk_size", [CHUNK, ROWS // 2, ROWS])
@pytest.mark.parametrize("budget", [None, 2 * GRAPH_BYTES, 10**9])
def test_the_ends_of_a_joint_replay_are_not_kept(budget, chunk_size):
    one, other = Counted(mlp(12)), Counted(mlp(12))
    cache = GradCache(
        [one, other],
        ClipLoss(),
        chunk_size=chunk_size,
        memory_budget=budget,
        strategy=JointEnds(),
    )
    cache(*batch())
    chunks = ROWS // chunk_size
    between = max(0, chunks - 2)
    kept = {None: 0, 10**9: 2 * between}.get(budget, min(2, between))
    assert one.calls + other.calls == 4 * chunks - kept


def ddp_with_a_budget(rank: int, *, wrap_together: bool, chunk_size: int, budget: int | None):
    image, text, loss = build()
    true_image, true_text, true_loss = build()
    calls: list[int] = []
    for module in (image, text):
        module.register_forward_hook(lambda *_: calls.append(1))
    wrapped = [DDP(OneModule(image, text))] if wrap_together else [DDP(image), DDP(text)]
    cache = GradCache(
        wrapped[0] if wrap_together else wrapped,
        loss,
        chunk_size=chunk_size,
        strategy=DDPStrategy(),
        memory_budget=budget,
    )
    counts = [counted_reductions(module) for module in wrapped]
    ours, truth = [image, text, loss], [true_image, true_text, true_loss]
    chunks = -(-LOCAL // chunk_size)
    for step in range(2):
        for module in [*ours, *truth]:
            module.zero_grad()
        calls.clear()
        inputs = global_batch(step)
        out = cache(*(x[rank * LOCAL : (rank + 1) * LOCAL] for x in inputs))
        # The first and the last chunk of each tower go through the wrappers again.
        replayed = chunks if budget is None else min(chunks, 2)
        assert len(calls) == 2 * (chunks + replayed), (chunk_size, budget, len(calls))
        true_loss.group = dist.new_group([rank], use_local_synchronization=True)
        expected = one_shot([true_image, true_text], true_loss, inputs)
        torch.testing.assert_close(out.loss, expected.loss.detach(), rtol=1e-12, atol=0)
        name, error = worst(gradient_errors(ours, truth))
        assert error < 1e-10, (chunk_size, budget, step, name, error)
        assert all(len(sizes) == step + 1 for sizes in counts), counts


def every_way(rank: int) -> None:
    ddp_with_a_budget(rank, wrap_together=False, chunk_size=2, budget=10**9)
    ddp_with_a_budget(rank, wrap_together=True, chunk_size=2, budget=10**9)
    # One chunk is all there is, and it must go through the wrapper.
    ddp_with_a_budget(rank, wrap_together=False, chunk_size=LOCAL, budget=None)
    ddp_with_a_budget(rank, wrap_together=True, chunk_size=LOCAL, budget=10**9)


@pytest.mark.distributed
def test_two_processes():
    in_two_processes(every_way)
