"""chunk_size="auto": what it finds, what it remembers, and that it leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from one_shot import gradient_errors, one_shot, twins, worst
from test_distributed import LOCAL, WORLD, build, global_batch, in_two_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from gradcache_clip import ByLength, ClipLoss, FrozenTrunk, GradCache
from gradcache_clip.cache import auto_chunk
from gradcache_clip.cache.auto_chunk import ChunkRecord, Measured, find_chunk_size
from gradcache_clip.distributed import DDPStrategy

ROWS = 40


class Counted(nn.Module):
    def __init__(self, inner: nn.Module, fits: int = 10**6) -> None:
        super().__init__()
        self.inner, self.fits = inner, fits
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("injected")
        return self.inner(x)


def mlp(width: int, *, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    middle = nn.BatchNorm1d(16) if norm else nn.LayerNorm(16)
    return nn.Sequential(nn.Linear(width, 16), middle, nn.Dropout(dropout), nn.Linear(16, 8))


def batch(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 12), torch.randn(rows, 6)


@pytest.fixture
def clock(monkeypatch):
    """Every pass takes as long as any other, so that twice the rows are twice as fast."""
    ticks = itertools.count()
    monkeypatch.setattr(auto_chunk, "_now", lambda device: float(next(ticks)))


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 5000),
    fits=st.integers(0, 6000),
    saturates=st.integers(1, 6000),
    row_bytes=st.integers(0, 10**6),
    limit=st.integers(0, 10**9),
)
def test_a_size_that_fits_and_is_worth_its_memory(rows, fits, saturates, row_bytes, limit):
    asked: list[int] = []

    def measure(size: int) -> Measured | None:
        asked.append(size)
        rate = float(min(size, saturates))
        return Measured(rate, size * row_bytes) if size <= fits else None

    found = find_chunk_size(measure, min(8, rows), rows, limit)
    assert 1 <= found <= rows
    assert asked == [min(8 * 2**i, rows) for i in range(len(asked))], "each is twice the last"
    assert len(asked) == len(set(asked)), "none is measured twice"
    if found == 1:
        assert rows == 1 or asked == [min(8, rows)]
        return
    assert found in asked and found <= fits
    # What was not tried would not fit, or there are no more rows.
    assert found == asked[0] or found * row_bytes <= limit
    if found == asked[-1] and found < rows:
        assert 2 * found * row_bytes > limit
    elif found != asked[-1]:
        following = asked[-1]
        assert following > fits or min(following, saturates) < 1.05 * min(found, saturates)


def test_where_eight_rows_do_not_fit_fewer_are_found():
    assert find_chunk_size(lambda n: Measured(n, n) if n <= 4 else None, 8, 100, 10**6) in (1, 2, 4)


@pytest.mark.parametrize("budget", [None, 10**9])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_the_size_that_was_found(dropout, budget, clock):
    (a, b, loss), truth = twins(mlp(12, dropout=dropout), mlp(6), ClipLoss())
    inputs = batch()
    torch.manual_seed(4)
    cache = GradCache([Counted(a, fits=16), b], loss, chunk_size="auto", memory_budget=budget)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = cache(*inputs)
    state = torch.get_rng_state()
    assert cache.chunk_size == (16, ROWS)
    torch.manual_seed(4)
    expected = one_shot(truth[:2], truth[2], inputs, 16 if dropout else None)
    torch.testing.assert_close(out.loss, expected.loss.detach())
    assert worst(gradient_errors([a, b, loss], truth))[1] < 1e-5
    assert torch.equal(state, torch.get_rng_state()), "the measurement drew random numbers"


def test_running_statistics_and_earlier_gradients_are_kept(clock):
    (a, b, loss), truth = twins(mlp(12, norm=True), mlp(6, norm=True), ClipLoss())
    for one, other in zip(
        nn.ModuleList([a, b, loss]).parameters(), nn.ModuleList(truth).parameters(), strict=True
    ):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
    existing = {p: p.grad for p in nn.ModuleList([a, b, loss]).parameters()}
    inputs = batch()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="batch norm in train mode")
        GradCache([a, Counted(b, fits=10)], loss, chunk_size="auto")(*inputs)
        GradCache(truth[:2], truth[2], chunk_size=(ROWS, 8))(*inputs)
    assert worst(gradient_errors([a, b, loss], truth))[1] < 1e-6
    assert all(parameter.grad is grad for parameter, grad in existing.items())
    for one, other in zip(
        nn.ModuleList([a, b]).buffers(), nn.ModuleList(truth[:2]).buffers(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("as_module", [True, False], ids=["module", "function"])
def test_no_gradient_is_left_on_what_get_features_trains(as_module, clock):
    """Not even zeros: an optimizer would decay weights that have them."""
    head, seen = nn.Linear(8, 8), []
    pair = ClipLoss()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        seen.append(None if head.weight.grad is None else head.weight.grad.clone())
        return pair(a, b).loss

    extract = head if as_module else (lambda features: head(features))
    cache = GradCache(
        [mlp(12), mlp(6)],
        loss,
        chunk_size="auto",
        get_features=[extract, None],
        on_out_of_memory="raise",
    )
    cache(*batch())
    assert seen == [None]


def test_a_frozen_encoder_and_a_frozen_trunk(clock):
    trunk = FrozenTrunk(nn.Linear(12, 10).requires_grad_(False), nn.Linear(10, 8))
    (a, b, loss), truth = twins(trunk, mlp(6).requires_grad_(False), ClipLoss())
    inputs = batch()
    cache = GradCache([a, b], loss, chunk_size="auto")
    cache(*inputs)
    assert cache.chunk_size == (ROWS, ROWS)
    one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors([a, b, loss], truth))[1] < 1e-5


def test_a_size_is_found_once(clock):
    counted = Counted(mlp(12))
    cache = GradCache([counted, mlp(6)], ClipLoss(), chunk_size="auto")
    cache(*batch())
    measured = len(counted.rows)
    cache(*batch())
    # One chunk, whose replay comes before that of the kept one.
    assert len(counted.rows) == measured + 2


def test_a_real_clock():
    (a, b, loss), truth = twins(mlp(12), mlp(6), ClipLoss())
    inputs = batch()
    cache = GradCache([a, b], loss, chunk_size="auto")
    cache(*inputs)
    assert all(size in (8, 16, 32, ROWS) for size in cache.chunk_size)
    one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors([a, b, loss], truth))[1] < 1e-5


def test_after_a_call_that_failed_it_is_still_to_be_found(clock):
    cache = GradCache([mlp(12), mlp(6)], ClipLoss(), chunk_size="auto")
    images, texts = batch()
    with pytest.raises(ValueError, match="expected 2, one for each encoder"):
        cache(images)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        cache(texts, texts)
    assert cache.chunk_size == "auto"
    cache(images, texts)
    assert cache.chunk_size == cache.plan.chunk_size == (ROWS, ROWS)
    assert cache.settings.chunk_size == "auto"


def test_an_encoder_that_fails_leaves_everything_as_it_was(clock):
    class Breaks(Counted):
        def forward(self, x: Tensor) -> Tensor:
            if len(self.rows) == 4:
                raise RuntimeError("a bug of the caller's")
            return super().forward(x)

    encoders = [Breaks(mlp(12, norm=True)), mlp(6)]
    before = [buffer.clone() for buffer in encoders[0].buffers()]
    state = torch.get_rng_state()
    cache = GradCache(encoders, ClipLoss(), chunk_size="auto")
    inputs = batch()
    torch.set_rng_state(state)
    with pytest.raises(RuntimeError, match="a bug of the caller's"):
        cache(*inputs)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for encoder in encoders for p in encoder.parameters())
    for buffer, was in zip(encoders[0].buffers(), before, strict=True):
        assert torch.equal(buffer, was)


def test_inputs_with_a_graph_are_refused_before_they_are_measured(clock):
    upstream, encoders = nn.Linear(5, 12), [Counted(mlp(12), fits=8), mlp(6)]
    cache = GradCache(encoders, ClipLoss(), chunk_size="auto")
    with pytest.raises(ValueError, match="encoder 0.*expected inputs that are leaves"):
        cache(upstream(torch.randn(ROWS, 5)), batch()[1])
    assert upstream.weight.grad is None


def test_a_chunk_size_record_is_used_again(tmp_path, clock):
    record = tmp_path / "run" / "chunks.json"
    first = GradCache([mlp(12), mlp(6)], ClipLoss(), chunk_size="auto", chunk_record=record)
    first(*batch())
    sizes = json.loads(record.read_text())
    assert sorted(sizes.values()) == [ROWS, ROWS] and len(sizes) == 2
    assert list(record.parent.iterdir()) == [record], "no partial file is left"
    counted = Counted(mlp(12))
    again = GradCache(
        [nn.Sequential(*counted.inner), mlp(6)],
        ClipLoss(),
        chunk_size="auto",
        chunk_record=str(record),
        check_rows="off",
    )
    again.encoders[0].register_forward_hook(lambda *_: counted.rows.append(1))
    again(*batch(16))
    # Embed and replay, and no measurement; the size is of the model, not of the batch.
    assert again.chunk_size == (ROWS, ROWS) and len(counted.rows) == 2
    record.write_text(json.dumps(dict.fromkeys(sizes, 3)))
    third = GradCache([mlp(12), mlp(6)], ClipLoss(), chunk_size="auto", chunk_record=record)
    third(*batch())
    assert third.chunk_size == (3, 3)


def test_what_a_size_holds_for(tmp_path, clock):
    """Other shapes, models, modes and precisions are measured anew."""
    record = tmp_path / "chunks.json"

    class Tokens(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).mean(1)

    def keys(encoder: nn.Module, length: int, rows: int = ROWS) -> set[str]:
        cache = GradCache([encoder], torch.sum, chunk_size="auto", chunk_record=record)
        cache(torch.randn(rows, length, 12))
        return set(json.loads(record.read_text()))

    known = keys(Tokens(12), 5)
    assert len(known) == 1
    assert keys(Tokens(12), 5, rows=50) == known
    assert len(keys(Tokens(12), 7)) == 2
    assert len(keys(Tokens(12).eval(), 7)) == 3
    partly = Tokens(12)
    partly.linear.bias.requires_grad_(False)
    assert len(keys(partly, 7)) == 4
    with torch.autocast("cpu", torch.bfloat16):
        assert len(keys(Tokens(12), 7)) == 5


GARBAGE = {
    "nothing": b"",
    "half a file": b'{"a": 3, "b',
    "no JSON": b"chunks = 3",
    "no text": b"\xff\xfe\x00\x80",
    "a list": b"[1, 2, 3]",
    "a number": b"7",
    "null": b"null",
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_record_that_is_none_is_written_anew(content, tmp_path, clock):
    record = tmp_path / "chunks.json"
    record.write_bytes(content)
    cache = GradCache([mlp(12), mlp(6)], ClipLoss(), chunk_size="auto", chunk_record=record)
    cache(*batch())
    assert sorted(json.loads(record.read_text()).values()) == [ROWS, ROWS]


@pytest.mark.parametrize("value", [0, -3, "8", 8.0, None, [8], True, {"size": 8}])
def test_sizes_in_a_record_that_are_none_are_measured(value, tmp_path):
    record = tmp_path / "chunks.json"
    record.write_text(json.dumps({"broken": value, "good": 8}))
    found = ChunkRecord(record)
    assert found.get("broken") is None and found.get("good") == 8


@settings(max_examples=30, deadline=None)
@given(sizes=st.dictionaries(st.text(max_size=20), st.integers(1, 10**9), max_size=5))
def test_a_record_returns_what_it_was_given(sizes, tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "chunks.json"
    record = ChunkRecord(path)
    for key, size in sizes.items():
        record.put(key, size)
    again = ChunkRecord(path)
    assert all(again.get(key) == record.get(key) == size for key, size in sizes.items())


def test_a_record_without_a_file_remembers_in_memory():
    record = ChunkRecord(None)
    record.put("a", 8)
    assert record.get("a") == 8 and record.get("b") is None


def test_sorted_rows_and_out_of_memory_after_the_measurement(clock):
    """What was measured may not fit later, when optimizer states have come."""
    counted = Counted(nn.Linear(12, 8))

    class Texts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counted = counted

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return (self.counted(x) * attention_mask[..., None]).sum(1)

    (texts, other, loss), truth = twins(Texts(), mlp(6), ClipLoss())
    mask = (torch.arange(5) < torch.randint(1, 6, (ROWS, 1))).long()
    inputs = {"x": torch.randn(ROWS, 5, 12), "attention_mask": mask}, batch()[1]
    sorting = [ByLength(columns=["x"]), None]
    cache = GradCache([texts, other], loss, chunk_size="auto", sort_by_length=sorting)
    cache(*inputs)
    assert cache.chunk_size == (ROWS, ROWS)
    texts.counted.fits = 12
    with pytest.warns(UserWarning, match="out of memory in the embed with chunks of"):
        cache(*inputs)
    assert cache.chunk_size == (10, 10)
    for _ in range(2):
        one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors([texts, other, loss], truth))[1] < 1e-5


def ranks_agree(rank: int) -> None:
    image, text, loss = build()
    (image, text, loss), truth = twins(image, text, loss)
    cache = GradCache([DDP(image), DDP(text)], loss, chunk_size="auto", strategy=DDPStrategy())
    # What this rank found before: three rows on one, seven on the other.
    cache._record.get = lambda key: (3, 7)[rank]
    inputs = global_batch(0)
    cache(*(x[rank * LOCAL : (rank + 1) * LOCAL] for x in inputs))
    assert cache.chunk_size == (3, 3), cache.chunk_size
    truth[2].group = torch.distributed.new_group([rank], use_local_synchronization=True)
    one_shot(truth[:2], truth[2], inputs)
    assert WORLD == 2 and worst(gradient_errors([image, text, loss], truth))[1] < 1e-10
    measured = GradCache([DDP(image), DDP(text)], loss, chunk_size="auto", strategy=DDPStrategy())
    measured(*(x[rank * LOCAL : (rank + 1) * LOCAL] for x in inputs))
    sizes: list[object] = [None] * WORLD
    torch.distributed.all_gather_object(sizes, measured.chunk_size)
    assert sizes[0] == sizes[1], sizes


@pytest.mark.distributed
def test_two_processes():
    in_two_processes(ranks_agree)
