"""The statistics of a contrast and their gradients, tile by tile, against the whole matrix."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from clip_inputs import Products, poisoned_memory, unit
from hypothesis import example, given, settings
from torch import Tensor

from gradcache_clip.ops import tile_statistics
from gradcache_clip.ops.contrast_reference import contrast_reference
from gradcache_clip.ops.contrast_tiled import gradient_tiled, statistics_tiled
from gradcache_clip.ops.pairing import Pairing, SideGradient, Statistics
from gradcache_clip.ops.tiles import Tiles, TileShape, diagonal, slices

SCALE = torch.tensor(6.0, dtype=torch.float64)
SHAPES = [(1, 1, 3), (1, 7, 2), (2, 2, 5), (63, 64, 16), (64, 64, 16), (65, 130, 33)]
RAGGED = (252, 507, 123)
OBLONG, SQUARE = TileShape(48, 80), TileShape(64, 64)

PAIRINGS = {
    "pairs": {},
    "shifted pairs": {"shift"},
    "ids": {"ids"},
    "shifted ids": {"ids", "shift"},
    "thresholds": {"thresholds"},
    "ids and thresholds": {"ids", "thresholds"},
    "labels": {"labels"},
    "labels and ids": {"labels", "ids"},
    "groups": {"groups"},
    "shift, groups and ids": {"shift", "groups", "ids"},
    "labels and groups": {"labels", "groups"},
    "bias": {"bias"},
    "labels and bias": {"labels", "bias"},
    "guide": {"guide"},
    "all but labels": {"ids", "thresholds", "groups", "bias", "guide"},
}
SELF_PAIRINGS = {
    "two views": {"shift"},
    "two views and ids": {"shift", "ids"},
    "self labels": {"labels"},
    "self labels and ids": {"labels", "ids"},
}


def make(
    rules: set[str] | dict[str, Any], M: int, N: int, D: int, *, both_ways: bool = True
) -> tuple[Tensor, Tensor, Pairing]:
    labels = torch.randint(0, N // 3 + 1, (M + N,)) if "labels" in rules else None
    ids = torch.randint(0, N // 3 + 1, (M + N,)) if "ids" in rules else None
    limits = SCALE * (torch.rand(M + N, dtype=torch.float64) - 0.3)
    thresholds = (limits[:M], limits[M:]) if "thresholds" in rules else (None, None)
    pairing = Pairing(
        *_split(labels, M),
        *_split(ids, M),
        *thresholds,
        **_further(rules, M, N),
        positive_shift=2 * N // 3 if "shift" in rules else 0,
        both_ways=both_ways,
    )
    return unit(M, D), unit(N, D), pairing


def _further(rules: set[str] | dict[str, Any], M: int, N: int) -> dict[str, Tensor]:
    """Groups, biases and guides of rows and columns."""
    double = {"dtype": torch.float64}
    found: dict[str, Tensor] = {}
    if "groups" in rules:
        # Pair i is of one group.
        groups = torch.randint(0, 3, (max(M, N),))
        found |= {"row_groups": groups[:M], "column_groups": groups[:N]}
    if "bias" in rules:
        found |= {"row_bias": torch.randn(M, **double), "column_bias": torch.randn(N, **double)}
    if "guide" in rules:
        found |= {"row_guide": torch.randn(4, M, **double)}
        found |= {"column_guide": torch.randn(4, N, **double)}
        found |= {"row_guide_threshold": torch.rand(M, **double)}
        found |= {"column_guide_threshold": torch.rand(N, **double)}
    return found


def make_self(rules: set[str], B: int, D: int) -> tuple[Tensor, Pairing]:
    labels = torch.randint(0, B // 2 + 1, (2 * B,)) if "labels" in rules else None
    ids = torch.randint(0, B // 2 + 1, (2 * B,)) if "ids" in rules else None
    shift = B if "shift" in rules else 0
    return unit(2 * B, D), Pairing(
        labels, labels, ids, ids, positive_shift=shift, both_ways=False, self_contrast=True
    )


def _split(numbers: Tensor | None, M: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if numbers is None else (numbers[:M], numbers[M:])


def check(q: Tensor, k: Tensor, pairing: Pairing, shape: TileShape) -> None:
    """Statistics, and their gradients for random gradients of both signs."""
    leaves = [q.requires_grad_(), k.requires_grad_(), SCALE.clone().requires_grad_()]
    bias = pairing.column_bias
    learned = [] if bias is None else [bias.requires_grad_()]
    expected = contrast_reference(*leaves, pairing)
    if pairing.row_labels is None:
        expected = expected._replace(column_positive=expected.row_positive.new_empty(0))
    with poisoned_memory(), torch.no_grad():
        got = statistics_tiled(*leaves, pairing, shape=shape)
    plain = Statistics(*(x.detach() for x in expected))
    torch.testing.assert_close(got, plain, rtol=1e-12, atol=1e-12)
    d = Statistics(*(torch.randn_like(x) for x in expected))
    weighted = [(x * dx).sum() for x, dx in zip(expected, d, strict=True) if x.requires_grad]
    inputs = (leaves[0], leaves[2]) if q is k else tuple(leaves)
    expected_gradients = list(torch.autograd.grad(sum(weighted), [*inputs, *learned]))
    rows = SideGradient(got.row_max, d.row_sum, d.row_positive)
    columns = SideGradient(got.column_max, d.column_sum, d.column_positive)
    asked = (True,) * 3, None if bias is None else torch.zeros_like(bias), q.dtype
    with poisoned_memory(), torch.no_grad():
        gradients = gradient_tiled(
            *leaves, pairing, rows, columns if pairing.both_ways else None, *asked, shape=shape
        )
    got_gradients = [x for x in (*gradients, asked[1]) if x is not None]
    # The scale's gradient is a sum of M N terms of both signs.
    torch.testing.assert_close(got_gradients, expected_gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rules", PAIRINGS.values(), ids=PAIRINGS)
@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("M", "N", "D"), SHAPES)
def test_tiles_equal_the_matrix(rules: set[str], both_ways: bool, M: int, N: int, D: int) -> None:
    check(*make(rules, M, N, D, both_ways=both_ways), TileShape(24, 40))


@pytest.mark.parametrize("rules", PAIRINGS.values(), ids=PAIRINGS)
def test_ragged(rules: set[str]) -> None:
    check(*make(rules, *RAGGED), OBLONG)


@pytest.mark.parametrize("rules", [PAIRINGS["labels"], PAIRINGS["labels and ids"]])
def test_more_rows_than_columns(rules: set[str]) -> None:
    check(*make(rules, 130, 65, 7), OBLONG)


@pytest.mark.parametrize("rules", SELF_PAIRINGS.values(), ids=SELF_PAIRINGS)
@pytest.mark.parametrize(("B", "D"), [(1, 3), (2, 5), (31, 4), (32, 8), (33, 9), (126, 23)])
def test_self_contrast_equals_the_matrix(rules: set[str], B: int, D: int) -> None:
    z, pairing = make_self(rules, B, D)
    check(z, z, pairing, SQUARE)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("both_ways", [False, True])
def test_what_a_contrast_lacks_is_empty(labelled: bool, both_ways: bool) -> None:
    """The same fields in both implementations, so that losses may ask for the size."""
    q, k, pairing = make({"labels"} if labelled else {}, 4, 6, 3, both_ways=both_ways)
    sizes = [4, 4, 4, 4 * labelled, 6 * labelled, 6, 6, 6 * labelled]
    sizes = sizes if both_ways else sizes[:4] + [0] * 4
    for compute in (statistics_tiled, contrast_reference):
        assert [len(x) for x in compute(q, k, SCALE, pairing)] == sizes


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 25), columns=st.integers(1, 25))
@example(rows=8, columns=5)
@example(rows=5, columns=8)
def test_self_contrast_with_oblong_tiles(rows: int, columns: int) -> None:
    z, pairing = make_self(SELF_PAIRINGS["two views"], 11, 4)
    check(z, z, pairing, TileShape(rows, columns))


@settings(max_examples=25, deadline=None)
@given(
    rules=st.sampled_from(list(PAIRINGS.values())),
    M=st.integers(1, 30),
    more=st.integers(0, 30),
    rows=st.integers(1, 35),
    columns=st.integers(1, 65),
)
def test_any_tile(rules: set[str], M: int, more: int, rows: int, columns: int) -> None:
    check(*make(rules, M, M + more, 5), TileShape(rows, columns))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), cuts=st.lists(st.integers(1, 39), max_size=4))
def test_statistics_of_column_blocks_add_up(seed: int, cuts: list[int]) -> None:
    """max of maxima, sums brought to one reference point: what merges ranks or blocks."""
    torch.manual_seed(seed)
    q, k, pairing = make({"labels", "ids"}, 21, 40, 5, both_ways=False)
    whole = statistics_tiled(q, k, SCALE, pairing, shape=OBLONG)
    edges = sorted({0, 40, *cuts})
    blocks = []
    for start, stop in pairwise(edges):
        columns = slice(start, stop)
        of_block = pairing._replace(
            column_labels=pairing.column_labels[columns], column_ids=pairing.column_ids[columns]
        )
        blocks.append(statistics_tiled(q, k[columns], SCALE, of_block, shape=OBLONG))
    torch.testing.assert_close(sum(b.row_positive for b in blocks), whole.row_positive)
    torch.testing.assert_close(torch.stack([b.row_max for b in blocks]).amax(0), whole.row_max)
    hardest = torch.stack([b.row_hardest_negative for b in blocks]).amax(0)
    torch.testing.assert_close(hardest, whole.row_hardest_negative)
    sums = [b.row_sum * (b.row_max - whole.row_max).exp() for b in blocks]
    torch.testing.assert_close(sum(sums), whole.row_sum)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_rows_and_columns_in_another_order(seed: int) -> None:
    torch.manual_seed(seed)
    q, k, pairing = make({"labels", "ids"}, 37, 50, 5)
    order, columns = torch.randperm(37), torch.randperm(50)
    permuted = Pairing(
        pairing.row_labels[order],
        pairing.column_labels[columns],
        pairing.row_ids[order],
        pairing.column_ids[columns],
    )
    whole = statistics_tiled(q, k, SCALE, pairing, shape=SQUARE)
    got = statistics_tiled(q[order], k[columns], SCALE, permuted, shape=TileShape(16, 16))
    for index, each in enumerate(got):
        expected = whole[index][order if index < 4 else columns]
        torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_a_row_without_competitors_has_an_empty_sum(side: str) -> None:
    """Its whole first tile, or all tiles, are masked: no -inf minus -inf, no NaN."""
    q, k, pairing = make({"ids"}, 40, 40, 5)
    ids = torch.arange(40)
    row_ids, column_ids = ids.clone(), ids.clone()
    row_ids[7], column_ids[:] = 99, ids
    if side == "rows":
        column_ids[:] = 99
    else:
        row_ids[:] = 99
        column_ids[7] = 99
    pairing = pairing._replace(row_ids=row_ids, column_ids=column_ids)
    statistics = statistics_tiled(q, k, SCALE, pairing, shape=TileShape(16, 16))
    peak, total = statistics[1:3] if side == "rows" else statistics[5:7]
    assert peak[7] == -torch.inf and total[7] == 0
    check(q, k, pairing, TileShape(16, 16))


@pytest.mark.parametrize("both_ways", [True, False])
def test_tiles_really_cut_the_matrix(both_ways: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folded: list[int] = []
    original = tile_statistics.RunningSoftmax.fold

    def fold(self: Any, tile: Tensor, where: slice, dim: int, scratch: Tensor) -> None:
        folded.append(dim)
        original(self, tile, where, dim, scratch)

    monkeypatch.setattr(tile_statistics.RunningSoftmax, "fold", fold)
    q, k, pairing = make({}, 252, 507, 8, both_ways=both_ways)
    statistics_tiled(q, k, SCALE, pairing, shape=OBLONG)
    assert folded == ([1, 0] if both_ways else [1]) * (6 * 7)


def flops(pairing: Pairing, q: Tensor, k: Tensor, needs: tuple[bool, bool, bool]) -> list[int]:
    """Of the products of the forward and of the backward."""
    with Products() as forward:
        statistics = statistics_tiled(q, k, SCALE, pairing, shape=TileShape(16, 16))
    rows, columns = SideGradient(*statistics[1:3], statistics[0]), None
    if pairing.both_ways:
        columns = SideGradient(*statistics[5:7], statistics[5])
    with Products() as backward:
        asked = needs, None, q.dtype
        gradient_tiled(q, k, SCALE, pairing, rows, columns, *asked, shape=TileShape(16, 16))
    return [forward.flops, backward.flops]


@pytest.mark.parametrize(
    ("needs", "products"),
    [
        ((True,) * 3, 3),
        ((True, False, True), 2),
        ((False, True, True), 2),
        ((False, False, True), 2),
        ((False, False, False), 1),
    ],
)
def test_no_product_that_nobody_asked_for(needs: tuple[bool, bool, bool], products: int) -> None:
    q, k, pairing = make({}, 50, 70, 8)
    product = 2 * 50 * 70 * 8
    assert flops(pairing, q, k, needs) == [product, products * product]


def test_symmetry_halves_a_self_contrast() -> None:
    """But for the tiles on the diagonal, of which both halves are computed."""
    B, D = 160, 4
    z, pairing = make_self({"shift"}, B, D)
    general = Pairing(positive_shift=B, both_ways=True)
    needs = (True, True, True)
    half, full = flops(pairing, z, z, needs), flops(general, z, z, needs)
    product, on_diagonal = 2 * (2 * B) ** 2 * D, 16 / (2 * B)
    assert full == [product, 3 * product]
    assert half == pytest.approx([product * (1 + on_diagonal) / 2, product * (3 + on_diagonal) / 2])


@settings(max_examples=200, deadline=None)
@given(
    rows=st.tuples(st.integers(0, 12), st.integers(1, 12)),
    columns=st.tuples(st.integers(0, 12), st.integers(1, 12)),
    shift=st.integers(-15, 15),
)
def test_diagonal_of_a_tile(rows: tuple[int, int], columns: tuple[int, int], shift: int) -> None:
    stripe, panel = (slice(start, start + size) for start, size in (rows, columns))
    i = torch.arange(stripe.start, stripe.stop)[:, None]
    j = torch.arange(panel.start, panel.stop)[None]
    tile = 100 * i + j
    entries, found = diagonal(tile, stripe, panel, shift)
    expected = [
        row for row in range(stripe.start, stripe.stop) if panel.start <= row + shift < panel.stop
    ]
    assert entries.tolist() == [100 * row + row + shift for row in expected]
    if expected:
        assert list(range(found.start, found.stop)) == expected


@given(start=st.integers(0, 20), length=st.integers(0, 50), step=st.integers(1, 20))
def test_slices_cover_a_range_once(start: int, length: int, step: int) -> None:
    parts = list(slices(start, start + length, step))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(
        range(start, start + length)
    )
    assert all(0 < part.stop - part.start <= step for part in parts)


def test_tiles_share_their_memory_and_cover_the_matrix() -> None:
    q, k = unit(50, 6), unit(70, 6)
    tiles, S = Tiles(q, k, SCALE, OBLONG), torch.empty(50, 70, dtype=torch.float64)
    addresses = set()
    for stripe in tiles.stripes():
        for panel in tiles.panels():
            tile = tiles.logits(stripe, panel)
            addresses.add(tile.data_ptr())
            S[stripe, panel] = tile
    torch.testing.assert_close(S, SCALE * q @ k.T, rtol=1e-12, atol=1e-14)
    assert len(addresses) == 1
