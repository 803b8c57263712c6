"""Late interaction tile by tile: against the reference, in fp64, and seen from inside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from clip_inputs import (
    ROUNDED_LOGIT,
    assert_each_subset,
    loss_and_gradients,
    poisoned_memory,
    relative_errors,
)
from hypothesis import given, settings
from late_interaction_inputs import (
    OPTIONS,
    TokenInputs,
    clustered_tokens,
    errors_without_positives,
    plain_loss,
    random_masks,
    token_inputs,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache_clip.ops import late_interaction_tiled
from gradcache_clip.ops.late_interaction import late_interaction_loss
from gradcache_clip.ops.late_interaction_op import TokenPasses, TokenRules
from gradcache_clip.ops.late_interaction_passes import gradient, statistics
from gradcache_clip.ops.pairing import SideGradient

SHAPES = [(1, 3, 2, 3), (2, 1, 1, 3), (7, 5, 3, 8), (13, 4, 9, 5), (20, 17, 3, 16), (63, 2, 5, 8)]


reference = partial(late_interaction_loss, impl="reference")
tiled = partial(late_interaction_loss, impl="tiled")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several images and texts a tile, several tiles a batch, edges that do not divide it."""
    cut(monkeypatch, side=20, elements=700)
    yield


def cut(monkeypatch: pytest.MonkeyPatch, *, side: int, elements: int) -> None:
    monkeypatch.setattr(late_interaction_tiled, "_SIDE", side)
    monkeypatch.setattr(late_interaction_tiled, "_ELEMENTS", elements)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_equal_the_reference(
    shape: tuple[int, ...], masked: bool, options: dict[str, Any]
) -> None:
    inputs = token_inputs(*shape)
    options = options | (random_masks(inputs) if masked else {})
    with poisoned_memory():
        got = loss_and_gradients(partial(tiled, **options), inputs, outer=-2.5)
    expected = loss_and_gradients(partial(reference, **options), inputs, outer=-2.5)
    assert max(relative_errors(got, expected)) < 1e-12
    assert all(tensor.isfinite().all() for tensor in got)


def test_a_copy_before_the_first_token_gives_its_gradient_back() -> None:
    """Masked tokens stand for the first valid one; the winner among equals may be a copy."""
    inputs = token_inputs(6, 4, 4, 3)
    masks = {"image_mask": torch.tensor([[False, False, True, True]] * 6)}
    masks["text_mask"] = masks["image_mask"].flip(1)
    got = loss_and_gradients(partial(tiled, **masks), inputs)
    expected = loss_and_gradients(partial(reference, **masks), inputs)
    assert max(relative_errors(got, expected)) < 1e-12
    assert got[1][:, :2].abs().max() == 0 and got[1][:, 2].abs().min() > 0


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6)),
    side=st.integers(1, 40),
    elements=st.integers(1, 2000),
    seed=st.integers(0, 1000),
)
def test_any_tile_gives_the_same_loss(
    shape: tuple[int, int, int], side: int, elements: int, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = token_inputs(*shape, 5, scale=20.0)
    masks = random_masks(inputs)
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, side=side, elements=elements)
        got = loss_and_gradients(partial(tiled, **masks), inputs)
    expected = loss_and_gradients(partial(reference, **masks), inputs)
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-14)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), turn=st.integers(0, 6), shift=st.integers(0, 4))
def test_order_of_pairs_and_of_tokens_is_irrelevant(seed: int, turn: int, shift: int) -> None:
    torch.manual_seed(seed)
    inputs = token_inputs(7, 5, 3, 6)
    images, texts = (x.detach().roll(turn, 0) for x in inputs[:2])
    moved = TokenInputs(images.roll(shift, 1), texts.flip(1), inputs.logit_scale).to(torch.float64)
    got, expected = (loss_and_gradients(tiled, each) for each in (moved, inputs))
    got[1] = got[1].roll(-shift, 1).roll(-turn, 0)
    got[2] = got[2].flip(1).roll(-turn, 0)
    assert max(relative_errors(got, expected)) < 1e-11


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options: dict[str, Any]) -> None:
    inputs = token_inputs(5, 3, 4, 5, scale=3.0)
    masks = random_masks(inputs)
    assert torch.autograd.gradcheck(partial(tiled, **masks, **options), tuple(inputs))


def test_each_subset_of_gradients() -> None:
    assert_each_subset(tiled, token_inputs(20, 3, 4, 8), rtol=1e-11, atol=1e-15)


class Watch(TorchDispatchMode):
    """Counts what matters, and remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.tiles = self.winners = self.sums = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tiles += func is torch.ops.aten.mm.out
        self.winners += func.overloadpacket is torch.ops.aten.ne
        self.sums += "embedding_bag" in str(func)
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel())
        return result


def watched(
    inputs: TokenInputs, needs: tuple[bool, bool, bool], **options: Any
) -> tuple[Watch, Watch]:
    """Forward and backward of the tiled op, seen from inside."""
    rules = TokenRules(options.get("image_mask"), options.get("text_mask"), False, "mean")
    x, y, scale = (each.detach() for each in inputs)
    with Watch() as forward:
        tiles = TokenPasses("tiled").tiles(x, y, scale.dtype, rules)
        found = statistics(tiles, scale, rules.pairing)
    ones = torch.ones_like(found.row_max)
    sides = (SideGradient(peak, ones, -ones) for peak in (found.row_max, found.column_max))
    with Watch() as backward:
        tiles = TokenPasses("tiled").tiles(x, y, scale.dtype, rules)
        gradient(tiles, scale, rules.pairing, tuple(sides), needs, x.dtype)
    return forward, backward


@pytest.mark.parametrize(
    ("needs", "sums"),
    [
        ((True, True, True), 2),
        ((True, False, False), 1),
        ((False, True, True), 1),
        ((False, False, True), 0),
    ],
)
def test_no_work_that_nobody_asked_for(needs: tuple[bool, bool, bool], sums: int) -> None:
    # Tiles of 5 images and 11 texts.
    tiles = 4 * 2
    forward, backward = watched(token_inputs(20, 4, 3, 8), needs)
    assert (forward.tiles, forward.winners, forward.sums) == (tiles, 0, 0)
    winners = 2 if sums else 0
    assert (backward.tiles, backward.winners, backward.sums) == (
        tiles,
        winners * tiles,
        sums * tiles,
    )


def test_never_allocates_a_matrix() -> None:
    B, P, R, D = 120, 6, 5, 8
    inputs = token_inputs(B, P, R, D, torch.float32)
    masks = random_masks(inputs)
    for each in watched(inputs, (True, True, True), **masks):
        # Tiles of 3 images and 7 texts; a stripe keeps its scores with all texts.
        assert each.largest <= max(B * P * D, 3 * P * 7 * R, 3 * B) < B * B / 2
    with Watch() as watch:
        reference(*inputs, **masks)
    assert watch.largest == B * P * B * R


@pytest.mark.parametrize("texts", [1, 5, 14])
@pytest.mark.parametrize("one_way", [False, True])
@pytest.mark.parametrize("texts_first", [False, True])
def test_a_block_without_positives(texts: int, one_way: bool, texts_first: bool) -> None:
    """Also of fewer texts than images, and of more."""
    inputs = token_inputs(14, 4, 3, 8)
    inputs = TokenInputs(inputs.images[:5], inputs.texts[:texts], inputs.logit_scale)
    with poisoned_memory():
        errors = errors_without_positives(inputs, "tiled", one_way=one_way, texts_first=texts_first)
    assert max(errors) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", ["random", "gap", "collapse"])
@pytest.mark.parametrize("one_way", [False, True])
def test_error_budget(dtype: torch.dtype, make: str, one_way: bool) -> None:
    """No further from fp64 than plain PyTorch in the same dtype, plus a few roundings."""
    cosine = {"random": 0.0, "gap": -0.6, "collapse": 0.9}[make]
    inputs = clustered_tokens(cosine, 30, 7, 5, 64, dtype)
    loss, plain = (partial(each, one_way=one_way) for each in (tiled, plain_loss))
    truth = loss_and_gradients(partial(reference, one_way=one_way), inputs.to(torch.float64))
    budget = relative_errors(loss_and_gradients(plain, inputs), truth)
    got = relative_errors(loss_and_gradients(loss, inputs), truth)
    tolerance = 4 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    assert all(error <= allowed + tolerance for error, allowed in zip(got, budget, strict=True))
    # The loss and the scale's gradient are fp32 sums of fp32 scores, whatever the tokens are.
    assert max(got[0], got[3]) < 1e-5


def test_small_loss_keeps_its_digits() -> None:
    tokens = torch.eye(12).view(6, 2, 12)
    inputs = TokenInputs(tokens, tokens.clone(), torch.tensor(20.0)).to(torch.float32)
    got = loss_and_gradients(tiled, inputs)
    assert got[0].item() == pytest.approx(math.log1p(5 * math.exp(-20.0)), rel=1e-6)
    truth = loss_and_gradients(reference, inputs.to(torch.float64))
    assert max(relative_errors(got[1:], truth[1:])) < 1e-5


@pytest.mark.parametrize("scale", [0.0, -3.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    inputs = token_inputs(9, 3, 4, 6, scale=scale)
    got, expected = (loss_and_gradients(each, inputs) for each in (tiled, reference))
    assert max(relative_errors(got, expected)) < 1e-12


def test_runs_are_bit_equal() -> None:
    inputs = token_inputs(40, 5, 4, 16, torch.bfloat16)
    first, second = (loss_and_gradients(tiled, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_and_infinity_reach_the_loss() -> None:
    for bad in (math.nan, math.inf):
        for side in range(2):
            for one_way in (False, True):
                inputs = [x.detach().clone() for x in token_inputs(20, 3, 4, 4, torch.float32)]
                inputs[side][11, 1, 2] = bad
                inputs = TokenInputs(*inputs).to(torch.float32)
                got = loss_and_gradients(partial(tiled, one_way=one_way), inputs)
                assert not got[0].isfinite()
