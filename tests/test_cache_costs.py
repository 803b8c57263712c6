"""Budgets of chunks in whatever rows cost, and the shapes that chunks have."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from one_shot import gradient_errors, twins, worst
from packed_inputs import graph_library
from torch import Tensor, nn

from gradcache_clip import ByLength, ClipLoss, GradCache, PackedPatches, PackedTokens, Ragged
from gradcache_clip.cache import auto_chunk

ROWS, LENGTH = 12, 10


class Words(nn.Module):
    """Sums what the mask keeps; notes the shapes of its chunks, and refuses large ones."""

    def __init__(self, fits: int = 10**9) -> None:
        super().__init__()
        self.words, self.fits = nn.Embedding(40, 8), fits
        self.shapes: list[tuple[int, int]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.training:
            self.shapes.append(tuple(input_ids.shape))
        if input_ids.numel() > self.fits:
            raise torch.OutOfMemoryError("injected")
        return (self.words(input_ids) * attention_mask[..., None]).sum(1)


class Bags(nn.Module):
    """Sums a packed tensor by row; its own number of entries is that of the chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.sizes = nn.Linear(3, 8), []

    def forward(self, counts: Tensor, entries: Tensor | None = None) -> Tensor:
        self.sizes.append(0 if entries is None else len(entries))
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        summed = torch.zeros(len(counts), 8, dtype=self.inner.weight.dtype)
        return summed if entries is None else summed.index_add(0, rows, self.inner(entries))


def words(rows: int = ROWS, length: int = LENGTH, side: str = "right") -> dict[str, Tensor]:
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1))).long()
    mask = mask.flip(1) if side == "left" else mask
    return {"input_ids": torch.randint(1, 40, mask.shape) * mask, "attention_mask": mask}


def bags(rows: int = ROWS) -> Ragged:
    counts = torch.randint(0, 6, (rows,))
    counts[0] = 5
    entries = torch.randn(int(counts.sum()), 3).double()
    return Ragged({"counts": counts, "entries": entries}, rows_of={"entries": counts})


def assert_exact(encoder: nn.Module, inputs: Any, by_length: ByLength, **options: Any) -> Any:
    """Beside the one-shot step in fp64; returns the encoder and the cache."""
    ours, truth = twins(encoder.double(), nn.Linear(5, 8).double(), ClipLoss().double())
    whole = inputs.nest if isinstance(inputs, Ragged) else inputs
    if isinstance(inputs, Ragged):
        whole = whole | {"entries": whole["entries"].value}
    others = torch.randn(ROWS, 5).double()
    options = {"check_rows": "off"} | options
    cache = GradCache(ours[:2], ours[2], sort_by_length=[by_length, None], **options)
    cache(inputs, others)
    truth[0].fits = 10**9
    truth[2](truth[0](**whole), truth[1](others)).loss.backward()
    assert worst(gradient_errors(ours, truth))[1] < 1e-10
    return ours[0], cache


def lengths(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["attention_mask"].sum(1)


def squares(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["attention_mask"].sum(1) ** 2


@pytest.mark.parametrize("budget", [1, 50, 130, 10**6])
def test_rows_times_the_dearest(budget):
    inputs = words()
    by_length = ByLength(max_cost=budget, cost_of=squares)
    encoder, _ = assert_exact(Words(), inputs, by_length)
    assert all(n == 1 or n * width**2 <= budget for n, width in encoder.shapes)
    embedded = encoder.shapes[: len(by_length.chunks(inputs, 64, 1, "input 0"))]
    assert sum(n for n, _ in embedded) == ROWS


@pytest.mark.parametrize("options", [{"max_tokens": 12}, {"max_cost": 12}], ids=str)
def test_packed_rows_cost_their_sum(options):
    inputs = bags()
    encoder, _ = assert_exact(Bags(), inputs, ByLength(**options))
    lengths = sorted(inputs.nest["entries"].lengths, reverse=True)
    sizes, total = [], 0
    for length in lengths:
        if sizes and total + length <= 12:
            total += length
            sizes[-1] = total
        else:
            sizes.append(total := length)
    assert encoder.sizes[: len(sizes)] == sizes and len(sizes) > 2


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.integers(0, 9) | st.floats(0, 9), min_size=1, max_size=30),
    budget=st.integers(1, 40),
    packed=st.booleans(),
    at_least=st.integers(1, 2),
)
def test_as_many_rows_as_fit(costs, budget, packed, at_least):
    rows = len(costs)
    counts = torch.ones(rows, dtype=torch.long)
    inputs: Any = {"x": torch.zeros(rows, 2)}
    if packed:
        inputs = Ragged(inputs, rows_of={"x": counts})
    by_length = ByLength(max_cost=budget, cost_of=lambda _: costs)
    chunks = by_length.chunks(inputs, 3, at_least, "input 0", inputs)
    assert sorted(torch.cat([chunk.rows for chunk in chunks]).tolist()) == list(range(rows))

    def cost(rows: Tensor) -> float:
        each = torch.tensor(costs, dtype=torch.float64)[rows]
        return float(each.sum() if packed else each.max() * len(each))

    for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
        assert len(chunk) == 1 or cost(chunk.rows) <= budget + 1e-9
        if following is not None and len(chunk) < -(-rows // at_least):
            one_more = torch.cat([chunk.rows, following.rows[:1]])
            assert cost(one_more) > budget - 1e-9


def test_types_that_have_rows_of_their_own_cost_their_entries():
    lengths = torch.tensor([3, 5, 1, 2])
    jagged = torch.nested.nested_tensor(
        [torch.randn(int(n), 2) for n in lengths], layout=torch.jagged
    )
    library = graph_library()
    graphs = library.data.Batch.from_data_list(
        [library.data.Data(x=torch.randn(int(n), 2)) for n in lengths]
    )
    positions = torch.cat([torch.arange(int(n)) for n in lengths])[None]
    tokens = PackedTokens()({"input_ids": positions, "position_ids": positions})
    for inputs in (jagged, graphs, tokens):
        chunks = ByLength(max_tokens=6).chunks(inputs, 64, 1, "input 0")
        assert [chunk.rows.tolist() for chunk in chunks] == [[1], [0, 3, 2]]
        assert [chunk.cost for chunk in chunks] == [5, 6]


def test_functions_are_given_the_input_as_it_was_passed():
    """Not what `rows` makes of it."""
    seen: list[Any] = []

    def patches(inputs: dict[str, Tensor]) -> list[int]:
        seen.append(inputs)
        return [8, 4, 4, 4]

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(40, 8)

        def forward(self, input_ids: Tensor, **images: Tensor) -> Tensor:
            return self.words(input_ids).sum(1)

    ids = torch.full((4, 3), 9)
    ids[:, 0] = 5
    ids[1:, 1] = 5
    batch = {"input_ids": ids, "image_grid_thw": torch.tensor([[1, 4, 2], *[[1, 2, 2]] * 3])}
    batch["pixel_values"] = torch.randn(20, 12)
    GradCache(
        [Tokens(), nn.Linear(5, 8)],
        ClipLoss(),
        rows=[PackedPatches(image_token_id=9), None],
        sort_by_length=[ByLength(max_cost=8, cost_of=patches), None],
    )(batch, torch.randn(4, 5))
    assert seen and all(each is batch for each in seen)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_step_has_few_shapes(side):
    inputs = words(1000, 512, side)
    many = ByLength(max_tokens=8192).shapes(inputs)
    few = ByLength(max_tokens=8192, pad_to_multiple_of=128).shapes(inputs)
    assert len(many) > 30 and len(few) <= 5
    assert sum(rows * count for (rows, _), count in few.items()) == 1000
    assert {columns for _, columns in few} == {128, 256, 384, 512}
    assert all(rows == 8192 // columns for rows, columns in list(few)[:-1])


@pytest.mark.parametrize("by_length", [ByLength(), ByLength(max_tokens=24, pad_to_multiple_of=4)])
def test_the_shapes_are_those_of_the_step(by_length):
    inputs = words()
    encoder, _ = assert_exact(Words(), inputs, by_length, chunk_size=5)
    shapes = by_length.shapes(inputs, chunk_size=5)
    assert set(encoder.shapes) == set(shapes)
    assert shapes == dict.fromkeys(shapes, 1) | {
        shape: encoder.shapes.count(shape) // 2 for shape in shapes if shapes[shape] > 1
    }


def test_shapes_without_a_mask_are_rows():
    assert ByLength().shapes(["a", "bc", "d"], chunk_size=2) == {(2,): 1, (1,): 1}


def test_out_of_memory_halves_the_cost():
    by_length = ByLength(max_cost=40, cost_of=lengths)
    inputs = words()
    inputs["attention_mask"][0] = 1
    with pytest.warns(UserWarning, match="out of memory in the embed"):
        _, cache = assert_exact(Words(fits=21), inputs, by_length)
    assert cache.plan.sort_by_length[0] == ByLength(max_cost=20, cost_of=lengths)
    assert cache.settings.sort_by_length[0] is by_length


@pytest.fixture
def clock(monkeypatch):
    """Every pass takes as long as any other, so that twice the tokens are twice as fast."""
    ticks = itertools.count()
    monkeypatch.setattr(auto_chunk, "_now", lambda device: float(next(ticks)))


@pytest.mark.parametrize("kind", [{"max_tokens": "auto"}, {"max_cost": "auto"}], ids=str)
def test_a_budget_is_found(kind, clock):
    """From eight of the longest rows on, doubled while it fits."""
    inputs = words()
    inputs["attention_mask"][3] = 1
    encoder, cache = assert_exact(Words(fits=95), inputs, ByLength(**kind), chunk_size="auto")
    assert cache.plan.sort_by_length == (ByLength(**dict.fromkeys(kind, 8 * LENGTH)), None)
    assert cache.settings.sort_by_length[0].budget == "auto"
    measured = len(encoder.shapes)
    cache(inputs, torch.randn(ROWS, 5).double())
    steps = encoder.shapes[measured:]
    assert len(steps) <= 4 and all(n * width <= 80 for n, width in steps), "it is found once"


def test_a_budget_of_packed_rows_is_found(clock):
    inputs = bags()
    _, cache = assert_exact(Bags(), inputs, ByLength(max_tokens="auto"), chunk_size="auto")
    assert cache.plan.sort_by_length[0].budget == sum(inputs.nest["entries"].lengths)


def test_a_budget_is_recorded_apart_from_rows(tmp_path, clock):
    record, inputs = tmp_path / "sizes.json", words()
    inputs["attention_mask"][0] = 1
    for by_length in (ByLength(), ByLength(max_tokens="auto")):
        options = {"chunk_size": "auto", "chunk_record": record}
        _, cache = assert_exact(Words(), inputs, by_length, **options)
    assert sorted(json.loads(record.read_text()).values()) == [ROWS, ROWS, ROWS * LENGTH]
    assert cache.plan.sort_by_length[0].max_tokens == ROWS * LENGTH
    record.write_text(json.dumps(dict.fromkeys(json.loads(record.read_text()), 7)))
    _, again = assert_exact(Words(), inputs, ByLength(max_tokens="auto"), **options)
    assert again.plan.sort_by_length[0].max_tokens == 7


def test_sorted_rows_are_measured_as_they_are_cut(clock):
    """The longest ones, trimmed; a budget that is given needs no measurement."""
    inputs = {name: x[:, :LENGTH] for name, x in words(ROWS, 2 * LENGTH).items()}
    inputs["attention_mask"][:, 5:] = 0
    encoder, cache = assert_exact(Words(), inputs, ByLength(), chunk_size="auto")
    assert encoder.shapes[0] == (8, 5) and cache.chunk_size == (ROWS, ROWS)
    encoder, cache = assert_exact(Words(), inputs, ByLength(max_tokens=15), chunk_size="auto")
    assert encoder.shapes[0] == (3, 5)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "two budgets": (
        {"max_tokens": 12, "max_cost": 30},
        "max_cost: expected one budget, got 30 beside max_tokens=12; leave one of them out",
    ),
    "a cost without a budget": (
        {"cost_of": len},
        "cost_of: expected a budget in what it counts, got none; pass max_cost=, or length_of=",
    ),
    "no budget": (
        {"max_cost": 0},
        "max_cost: expected a positive integer, 'auto' or None, got 0; such as max_cost=16384",
    ),
    "another word": (
        {"max_tokens": "all"},
        "max_tokens: expected a positive integer, 'auto' or None, got 'all'",
    ),
    "no multiple": (
        {"pad_to_multiple_of": 0},
        "pad_to_multiple_of: expected a positive integer, got 0; such as pad_to_multiple_of=64",
    ),
    "half a multiple": ({"pad_to_multiple_of": 1.5}, "expected a positive integer, got 1.5"),
    "no multiple at all": ({"pad_to_multiple_of": None}, "expected a positive integer, got None"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_arguments_that_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ByLength(**options)


@pytest.mark.parametrize("argument", ["cost_of", "length_of"])
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1, 2], "one number for each of 3 rows, got shape (2,); return a (B,) tensor or a list"),
        (4, "one number for each of 3 rows, got shape ()"),
        ([1.0, float("nan"), 2.0], "finite numbers of 0 or more, got nan; count what a row has"),
        ([1, -1, 2], "finite numbers of 0 or more, got -1"),
        ([1.0, float("inf"), 2.0], "finite numbers of 0 or more, got inf"),
    ],
)
def test_costs_that_are_none(argument, returned, message):
    by_length = ByLength(max_cost=8, **{argument: lambda _: returned})
    cache = GradCache(
        [nn.Linear(5, 8), nn.Linear(5, 8)], ClipLoss(), sort_by_length=[by_length, None]
    )
    with pytest.raises(ValueError, match=re.escape(f"input 0: expected {argument} to return")) as e:
        cache(torch.randn(3, 5), torch.randn(3, 5))
    assert message in str(e.value)


def test_a_budget_to_be_found_needs_a_measurement():
    message = 'sort_by_length: expected chunk_size="auto" beside a budget that is "auto", got '
    with pytest.raises(ValueError, match=re.escape(message + "chunk_size=64; pass chunk_size=")):
        GradCache([nn.Linear(5, 8)], ClipLoss(), sort_by_length=ByLength(max_tokens="auto"))


def test_a_list_of_mappings_has_no_lengths():
    """Each has as many keys as any other."""
    with pytest.raises(ValueError, match="expected rows whose length is known.*got list"):
        ByLength(max_tokens=8).chunks([{"x": 1, "y": 2}], 4, 1, "input 0")
