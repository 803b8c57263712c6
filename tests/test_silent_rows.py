"""Encoders whose rows depend on each other within a chunk are refused in the first step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from one_shot import gradient_errors, one_shot, twins, worst
from row_cases import row_cases
from strategy_processes import result_of, run_cases
from torch import Tensor, nn

from gradcache_clip import ByLength, ClipLoss, FrozenTrunk, GradCache, deferred_step
from gradcache_clip.distributed import LocalStrategy

ROWS, CHUNK, CHUNKS, WIDTH = 14, 4, 4, 6


def batch() -> list[Tensor]:
    return [torch.randn(ROWS, WIDTH, dtype=torch.float64) for _ in range(2)]


class Attends(nn.Module):
    """Every row attends to all rows of its chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, 8)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.embed(rows)[:, None]
        return (x + self.attention(x, x, x, need_weights=False)[0])[:, 0]


class Centre(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features - features.mean(0)


class Standardise(nn.Module):
    """Batch statistics by hand, which no warning of batch norm knows of."""

    def forward(self, features: Tensor) -> Tensor:
        return (features - features.mean(0)) / (features.std(0, correction=0) + 1)


class Pads(nn.Module):
    """Pads lists to the longest of them, and takes a mean over the padding as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)

    def forward(self, lists: Sequence[Tensor]) -> Tensor:
        padded = nn.utils.rnn.pad_sequence(list(lists), batch_first=True)
        return self.embedding(padded).mean(1)


def lists() -> list[Tensor]:
    """The first is the longest of its chunk; so one half is padded otherwise."""
    return [torch.arange(1, 2 + (9 - i) % 7) for i in range(ROWS)]


MIXING: dict[str, tuple[Any, Any, str]] = {
    "attention": (Attends, None, r"first in attention \(MultiheadAttention\)"),
    "mean": (
        lambda: nn.Sequential(nn.Linear(WIDTH, 8), Centre(), nn.Linear(8, 8)),
        None,
        r"first in 1 \(Centre\)",
    ),
    "statistics": (
        lambda: nn.Sequential(nn.Linear(WIDTH, 8), Standardise()),
        None,
        r"first in 1 \(Standardise\)",
    ),
    "padding": (Pads, lists, "whether padding to the longest row of a list changes the features"),
}


def modules_for(encoder: nn.Module) -> list[nn.Module]:
    return [each.double() for each in (encoder, nn.Linear(WIDTH, 8), ClipLoss())]


def refused(
    modules: Sequence[nn.Module], inputs: Sequence[Any], words: str, **options: Any
) -> None:
    """Nothing but the error is left behind."""
    for p in nn.ModuleList(modules).parameters():
        p.grad = torch.full_like(p, 0.5)
    buffers = {n: b.clone() for n, b in nn.ModuleList(modules).named_buffers()}
    cache = GradCache(modules[:2], modules[2], **{"chunk_size": CHUNK, **options})
    before = torch.get_rng_state()
    with pytest.raises(
        ValueError, match=rf"encoder 0 \(\w+\): expected features of a row.*{words}"
    ):
        cache(*inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert all((p.grad == 0.5).all() for p in nn.ModuleList(modules).parameters())
    after = dict(nn.ModuleList(modules).named_buffers())
    assert all(torch.equal(after[name], value) for name, value in buffers.items())


@pytest.mark.parametrize("on_out_of_memory", ["halve", "raise"])
@pytest.mark.parametrize("chunk_size", [CHUNK, 1, 2 * CHUNK])
@pytest.mark.parametrize("name", MIXING)
def test_rows_that_mix_are_refused_where_they_do(name, chunk_size, on_out_of_memory):
    build, inputs, words = MIXING[name]
    given = [inputs() if inputs else batch()[0], batch()[1]]
    options = {"chunk_size": chunk_size, "on_out_of_memory": on_out_of_memory}
    refused(modules_for(build()), given, words, **options)


@pytest.mark.parametrize("name", MIXING)
def test_their_gradients_would_be_wrong(name):
    """Without the check, the chunks stand alone; the one-shot step says otherwise."""
    build, inputs, _ = MIXING[name]
    given = [inputs() if inputs else batch()[0], batch()[1]]
    ours, truth = twins(*modules_for(build()))
    GradCache(ours[:2], ours[2], chunk_size=CHUNK, check_rows="off")(*given)
    one_shot(truth[:2], truth[2], given)
    assert worst(gradient_errors(ours, truth))[1] > 1e-4


def test_a_deferred_step_checks_as_well():
    modules = modules_for(Attends())
    with pytest.raises(ValueError, match="first in attention"):
        deferred_step(GradCache(modules[:2], modules[2], chunk_size=CHUNK), *batch())


def test_one_module_for_both_and_rows_embedded_together():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = nn.ModuleList([nn.Linear(WIDTH, 8), Attends()])

        def forward(self, tower: int, rows: Tensor) -> Tensor:
            return self.towers[tower](rows)

    both = Both().double()
    cache = GradCache(both, ClipLoss().double(), chunk_size=CHUNK, embed_chunk_size=8)
    with pytest.raises(ValueError, match=r"encoder 1 \(Both\): .*first in towers.1.attention"):
        cache(*batch())


def test_a_frozen_trunk_that_mixes():
    trunk = nn.Sequential(nn.Linear(WIDTH, 8), Centre()).requires_grad_(False)
    modules = modules_for(FrozenTrunk(trunk, nn.Linear(8, 8)))
    refused(modules, batch(), r"first in trunk.1 \(Centre\)")


def test_a_head_that_mixes():
    modules = modules_for(nn.Linear(WIDTH, 8))
    head = nn.Sequential(nn.Linear(8, 8), Centre()).double()
    options = {"get_features": [head, None]}
    refused(modules, batch(), "first in get_features", **options)


class Tokens(nn.Module):
    """Pools what the mask calls tokens, or (wrongly) the mean over all rows of a chunk."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.embedding, self.mixes = nn.Embedding(50, 8), mixes

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        pooled = (self.embedding(input_ids) * attention_mask[..., None]).sum(1)
        return pooled - pooled.mean(0) if self.mixes else pooled


def tokens() -> dict[str, Tensor]:
    mask = (torch.arange(9) < (torch.arange(ROWS) % 9 + 1)[:, None]).long()
    return {"input_ids": torch.randint(1, 50, (ROWS, 9)) * mask, "attention_mask": mask}


@pytest.mark.parametrize("by", [ByLength(), ByLength(max_tokens=12), ByLength(max_tokens=1)])
def test_rows_sorted_by_length(by):
    inputs, options = [tokens(), batch()[1]], {"sort_by_length": [by, None]}
    refused(modules_for(Tokens(mixes=True)), inputs, "", **options)
    ours, truth = twins(*modules_for(Tokens(mixes=False)))
    GradCache(ours[:2], ours[2], chunk_size=CHUNK, **options)(*inputs)
    one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


class Calls(nn.Module):
    """Counts; with `carries` it also adds a little more to its rows in every call."""

    def __init__(self, inner: nn.Module, *, carries: bool = False) -> None:
        super().__init__()
        self.inner, self.calls, self.carries = inner, 0, carries

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(rows) + 0.1 * self.calls * self.carries


def deferred(cache: GradCache, *inputs: Tensor) -> None:
    deferred_step(cache, *inputs).loss.backward()


@pytest.mark.parametrize("call", [deferred, GradCache.__call__])
def test_only_the_first_step_pays(call):
    calls, counts = list[int](), list[int]()
    modules = modules_for(nn.Linear(WIDTH, 8))
    modules[0].register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    cache = GradCache(modules[:2], modules[2], chunk_size=CHUNK)
    unchecked = GradCache(modules[:2], modules[2], chunk_size=CHUNK, check_rows="off")
    for each in (cache, cache, cache, unchecked):
        calls.clear()
        call(each, *batch())
        counts.append(len(calls))
    assert counts[0] == counts[1] + 2 and counts[1] == counts[2] == counts[3]


@pytest.mark.parametrize("chunk_size", [CHUNK, 1, ROWS])
def test_dropout_is_left_alone(chunk_size):
    """Features cannot be compared, and the random numbers that follow are the same."""
    ends = []
    for check_rows in ("error", "off"):
        torch.manual_seed(3)
        modules = modules_for(nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.5)))
        cache = GradCache(modules[:2], modules[2], chunk_size=chunk_size, check_rows=check_rows)
        cache(*batch())
        ends.append((torch.get_rng_state(), [p.grad for p in modules[0].parameters()]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert all(torch.equal(*pair) for pair in zip(ends[0][1], ends[1][1], strict=True))


@pytest.mark.parametrize("build", [nn.BatchNorm1d, lambda n: nn.BatchNorm1d(n, affine=False)])
def test_batch_norm_keeps_its_own_warning(build):
    norm = build(8)
    modules = modules_for(nn.Sequential(nn.Linear(WIDTH, 8), norm))
    with pytest.warns(UserWarning, match="batch norm in train mode") as caught:
        GradCache(modules[:2], modules[2], chunk_size=CHUNK)(*batch())
    assert len(caught) == 1 and norm.num_batches_tracked == CHUNKS


def test_batch_norm_in_eval_mode_is_exact():
    ours, truth = twins(*modules_for(nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8).eval())))
    GradCache(ours[:2], ours[2], chunk_size=CHUNK)(*(inputs := batch()))
    one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 8)

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(rows.mul_(1.5))


@pytest.mark.parametrize("build", [InPlace, lambda: Calls(nn.Linear(WIDTH, 8), carries=True)])
@pytest.mark.parametrize("chunk_size", [CHUNK, 1])
def test_what_changes_by_itself_is_not_said_to_mix_rows(build, chunk_size):
    modules = modules_for(build())
    cache = GradCache(modules[:2], modules[2], chunk_size=chunk_size)
    with pytest.raises(RuntimeError, match="expected the replay to repeat the embed"):
        cache(*batch())


class Remembers(nn.Module):
    """Keeps its calls in buffers: one in place, one replaced, one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 8)
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("unsaved", torch.zeros(()), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        self.in_place += 1
        self.unsaved.add_(1)
        self.replaced = self.replaced + 1
        return self.linear(rows)


def test_buffers_count_the_chunks_alone():
    counts = []
    for check_rows in ("error", "off"):
        modules = modules_for(Remembers())
        GradCache(modules[:2], modules[2], chunk_size=CHUNK, check_rows=check_rows)(*batch())
        counts.append([float(buffer) for buffer in modules[0].buffers()])
    assert counts[0] == counts[1]


class Reuses(nn.Module):
    """Writes every output into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.memory = nn.Linear(WIDTH, 8), torch.empty(0, dtype=torch.float64)

    def forward(self, rows: Tensor) -> Tensor:
        features = self.linear(rows)
        if torch.is_grad_enabled():
            return features
        return self.memory.resize_(features.shape).copy_(features)


class EnablesGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 8)

    def forward(self, rows: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.linear(rows)


@pytest.mark.parametrize("build", [Reuses, EnablesGradients, lambda: nn.Linear(WIDTH, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_encoders_that_pass(build, dtype):
    ours, truth = twins(*(module.to(dtype) for module in modules_for(build())))
    if build is Reuses:
        ours[0].memory, truth[0].memory = (torch.empty(0, dtype=dtype) for _ in range(2))
    inputs = [rows.to(dtype) for rows in batch()]
    GradCache(ours[:2], ours[2], chunk_size=CHUNK)(*inputs)
    one_shot(truth[:2], truth[2], inputs)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}
    assert worst(gradient_errors(ours, truth))[1] < tolerance[dtype]


def test_under_autocast():
    modules = [module.float() for module in modules_for(Attends())]
    inputs = [rows.float() for rows in batch()]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="depend on"):
        GradCache(modules[:2], modules[2], chunk_size=CHUNK)(*inputs)
    ours, truth = twins(nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), ClipLoss())
    with torch.autocast("cpu", torch.bfloat16):
        GradCache(ours[:2], ours[2], chunk_size=ROWS)(*inputs)
        loss = truth[2](*(m(x) for m, x in zip(truth, inputs, strict=False))).loss
    loss.backward()
    assert worst(gradient_errors(ours, truth))[1] < 1e-6, "no cast without a graph is left"


class Fits(nn.Module):
    """Has memory for one row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 8)

    def forward(self, rows: Tensor) -> Tensor:
        if len(rows) > 1:
            raise torch.OutOfMemoryError("injected")
        return self.linear(rows)


def test_memory_for_one_row_is_enough():
    ours, truth = twins(*modules_for(Fits()))
    GradCache(ours[:2], ours[2], chunk_size=[1, CHUNK])(*(inputs := batch()))
    one_shot([truth[0].linear, truth[1]], truth[2], inputs)
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


def test_a_batch_of_one_row_has_nothing_to_compare():
    encoder = Calls(nn.Linear(WIDTH, 8))
    modules = modules_for(encoder)
    single = [rows[:1] for rows in batch()]
    GradCache(modules[:2], lambda a, b: (a * b).sum(), chunk_size=CHUNK)(*single)
    assert encoder.calls == 2


def test_a_loss_that_raises_leaves_the_check_to_the_next_step():
    encoder, failing = Calls(nn.Linear(WIDTH, 8)), [True]
    modules = modules_for(encoder)

    def loss(a: Tensor, b: Tensor) -> Any:
        if failing.pop() if failing else False:
            raise RuntimeError("broken")
        return modules[2](a, b)

    cache = GradCache(modules[:2], loss, chunk_size=CHUNK)
    with pytest.raises(RuntimeError, match="broken"):
        cache(*batch())
    first, encoder.calls = encoder.calls, 0
    cache(*batch())
    assert encoder.calls > first


def test_no_warning_of_its_own():
    modules = modules_for(nn.Linear(WIDTH, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradCache(modules[:2], modules[2], chunk_size=CHUNK, strategy=LocalStrategy())(*batch())


@pytest.mark.distributed
def test_over_ranks(tmp_path):
    cases = row_cases()
    results = run_cases(cases, 2, tmp_path)
    for case in cases:
        result_of(results, case)


def test_an_encoder_that_takes_whole_chunks_alone():
    """Its company has the size of a chunk."""

    class Fixed(nn.Linear):
        def forward(self, rows):
            return super().forward(rows.view(4, 8))

    encoders, inputs = (Fixed(8, 4), nn.Linear(6, 4)), (torch.randn(12, 8), torch.randn(12, 6))
    GradCache(encoders, ClipLoss(), chunk_size=4)(*inputs)


def test_nothing_is_compiled_for_halves():
    shapes = []

    def backend(graph, example_inputs):
        shapes.append(tuple(example_inputs[-1].shape))
        return graph.forward

    encoder = torch.compile(nn.Linear(8, 4), backend=backend)
    torch.compiler.reset()
    GradCache((encoder, nn.Linear(6, 4)), ClipLoss(), chunk_size=4)(
        torch.randn(12, 8), torch.randn(12, 6)
    )
    assert shapes and {rows for rows, *_ in shapes} == {4}


def test_a_single_chunk_is_checked_as_well():
    """A later batch, or one on another rank, may have several."""
    modules = modules_for(Centred())
    with pytest.raises(ValueError, match="do not depend on the other rows"):
        GradCache(modules[:2], modules[2], chunk_size=ROWS)(*batch())


class Centred(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, 8)

    def forward(self, rows):
        features = super().forward(rows)
        return features - features.mean(0)


def test_each_input_is_checked_once_also_beside_one_of_a_single_chunk():
    """The rows of the second may meet in any later step, whose first input is known by then."""
    calls: list[int] = []
    encoders = [nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)]
    encoders[0].register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    cache = GradCache(encoders, ClipLoss(), chunk_size=[CHUNK, ROWS])
    cache(*(each.float() for each in batch()))
    assert len(calls) == 2 * CHUNKS + 2
    calls.clear()
    cache(*(each.float() for each in batch()))
    assert len(calls) == 2 * CHUNKS
