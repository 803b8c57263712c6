"""What all losses of the softmax family have in common, because they share one differentiable op.

`case(name, B, D)` is a loss with its options over B pairs; its last leaf is the scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from clip_inputs import (
    CASES,
    FULL_CASES,
    Products,
    assert_each_subset,
    case,
    poisoned_memory,
    small_tiles,
)
from hypothesis import given, settings
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck

from gradcache_clip.memory.counter import LiveBytes
from gradcache_clip.ops import contrast
from gradcache_clip.ops.pairing import Pairing

every_loss = pytest.mark.parametrize("name", CASES)
# Said by torch of itself, when forward mode loads its own decompositions.
torch_loads_forward_mode = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _many_tiles() -> Iterator[None]:
    with small_tiles(32, 32):
        yield


def bitwise(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@every_loss
@pytest.mark.parametrize(("B", "D"), [(1, 3), (2, 5), (31, 8), (32, 8), (33, 7), (95, 23)])
def test_tiles_equal_the_reference(name: str, B: int, D: int) -> None:
    each = case(name, B, D)
    with poisoned_memory():
        got = each.outcome("tiled", outer=-2.5)
    torch.testing.assert_close(got, each.outcome("reference", outer=-2.5), rtol=1e-11, atol=1e-14)


@every_loss
@settings(max_examples=8, deadline=None)
@given(B=st.integers(1, 40), edge=st.integers(1, 45))
def test_any_tile_gives_the_same_loss(name: str, B: int, edge: int) -> None:
    each = case(name, B, 6)
    expected = each.outcome()
    with small_tiles(edge, edge):
        got = each.outcome()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


@every_loss
def test_gradcheck(name: str) -> None:
    each = case(name, 7, 4, scale=3.0)
    with small_tiles(3, 3):
        assert torch.autograd.gradcheck(each.loss, tuple(each.leaves), fast_mode=True)


@every_loss
def test_each_subset_of_gradients(name: str) -> None:
    each = case(name, 37, 6)
    assert_each_subset(each.loss, each.leaves, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("wanted", "products"),
    [((True, True, True), 3), ((True, False, True), 2), ((False, False, True), 2)],
)
def test_no_product_that_nobody_asked_for(wanted: tuple[bool, ...], products: int) -> None:
    B, D = 50, 8
    each = case("clip", B, D, torch.float32)
    leaves = [x.detach().requires_grad_(w) for x, w in zip(each.leaves, wanted, strict=True)]
    loss, count = each.loss(*leaves), Products()
    with small_tiles(32, 32, watched_by=count):
        loss.backward()
    assert count.flops == products * 2 * B * B * D


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_runs_are_bit_equal(name: str, dtype: torch.dtype) -> None:
    each = case(name, 70, 33, dtype)
    assert bitwise(each.outcome(), each.outcome())


@every_loss
def test_a_power_of_two_in_front_scales_every_gradient_exactly(name: str) -> None:
    """As a GradScaler's factor does; the features are fp32, where nothing overflows."""
    each = case(name, 40, 9, torch.float32)
    gradients = slice(1, 1 + len(each.leaves))
    plain, scaled = each.outcome()[gradients], each.outcome(outer=-65536.0)[gradients]
    assert bitwise(scaled, [-65536.0 * gradient for gradient in plain])


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """Around the forward and the backward, which would otherwise multiply in bf16."""
    each = case(name, 40, 9, dtype, scale=30.0)
    expected = each.outcome()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = each.outcome()
    assert bitwise(got, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference = each.loss(*each.leaves, impl="reference")
    assert torch.equal(reference, each.loss(*each.leaves, impl="reference"))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_loss_and_gradients(name: str, dtype: torch.dtype) -> None:
    each = case(name, 9, 8, dtype)
    result = each.call(*each.leaves, impl="tiled")
    wide = torch.promote_types(dtype, torch.float32)
    assert {x.dtype for x in result if x is not None} == {wide}
    assert {x.shape for x in result if x is not None} == {()}
    assert all(not x.requires_grad for x in result[1:] if x is not None)
    result.loss.backward()
    assert [x.grad.dtype for x in each.leaves] == [x.dtype for x in each.leaves]


@pytest.mark.parametrize("name", FULL_CASES)
def test_torch_compile_takes_the_whole_step(name: str) -> None:
    torch.compiler.reset()
    each = case(name, 35, 6, torch.float32)
    compiled = torch.compile(each.call, fullgraph=True, backend="aot_eager")
    got = each._replace(call=compiled).outcome()
    assert bitwise(got, each.outcome())


@torch_loads_forward_mode
@every_loss
def test_reference_differentiates_twice(name: str) -> None:
    each = case(name, 6, 3, scale=2.0)

    def reference(*leaves: Tensor) -> Tensor:
        return each.loss(*leaves, impl="reference")

    assert torch.autograd.gradgradcheck(reference, tuple(each.leaves), fast_mode=True)
    tangents = tuple(torch.randn_like(leaf) for leaf in each.leaves)
    leaves = tuple(leaf.detach() for leaf in each.leaves)
    _, derivative = torch.func.jvp(reference, leaves, tangents)
    gradients = torch.autograd.grad(reference(*each.leaves), each.leaves)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(derivative, expected)


@every_loss
def test_second_derivatives_are_refused(name: str) -> None:
    each = case(name, 5, 4)
    function = name.partition(",")[0] + "_loss"
    for leaf in (each.leaves[0], each.leaves[-1]):
        loss = each.loss(*each.leaves)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        message = f'{function}: expected one derivative, got a second one; .*impl="reference"'
        with pytest.raises(RuntimeError, match=message):
            gradient.square().sum().backward()


@torch_loads_forward_mode
@every_loss
def test_transforms_are_refused(name: str) -> None:
    """A fused op would be a constant to forward mode: a derivative of zero without a word."""
    each = case(name, 5, 4)
    features, *rest = (leaf.detach() for leaf in each.leaves)
    function = name.partition(",")[0] + "_loss"
    message = f'{function}: expected ordinary tensors, .*use impl="reference"'

    def loss(features: Tensor) -> Tensor:
        return each.loss(features, *rest)

    def loss_of_scale(logit_scale: Tensor) -> Tensor:
        return each.loss(features, *rest[:-1], logit_scale)

    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(loss)(features)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(loss_of_scale, (rest[-1],), (rest[-1],))
    with pytest.raises(RuntimeError, match=message):
        torch.vmap(loss)(features[None])
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        loss(forward_ad.make_dual(features, features))


@every_loss
def test_a_graph_serves_one_backward_unless_retained(name: str) -> None:
    each = case(name, 5, 4)
    loss = each.loss(*each.leaves)
    first = torch.autograd.grad(loss, each.leaves, retain_graph=True)
    assert bitwise(list(torch.autograd.grad(loss, each.leaves)), list(first))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@every_loss
def test_inference_needs_no_graph(name: str) -> None:
    each = case(name, 20, 8, torch.float32)
    expected = each.loss(*each.leaves, impl="auto")
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = each.loss(*each.leaves, impl="auto")
        assert not loss.requires_grad and torch.equal(loss, expected)


@every_loss
def test_shapes_without_data(name: str) -> None:
    each = case(name, 12, 4)
    call: Any = each.call
    numbers = {k: v.to("meta") for k, v in call.keywords.items() if isinstance(v, Tensor)}
    for impl in ("reference", "tiled"):
        leaves = [leaf.detach().to("meta").requires_grad_() for leaf in each.leaves]
        loss = call(*leaves, impl=impl, **numbers).loss
        loss.backward()
        assert loss.shape == ()
        assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


@every_loss
def test_non_contiguous_features(name: str) -> None:
    each = case(name, 40, 6)
    strided = [torch.empty(*x.shape, 2, dtype=x.dtype).select(-1, 1).copy_(x) for x in each.leaves]
    got = each.with_leaves(*strided).outcome()
    torch.testing.assert_close(got, each.outcome(), rtol=1e-11, atol=1e-14)


@every_loss
def test_nan_and_infinity_reach_the_loss(name: str) -> None:
    for bad in (torch.nan, torch.inf):
        each = case(name, 65, 4, torch.float32)
        with torch.no_grad():
            each.leaves[0][40, 1] = bad
        assert not each.loss(*each.leaves).isfinite()


@every_loss
def test_a_factor_moves_between_features_and_scale(name: str) -> None:
    """loss(c q, c k, s / c^2) is one number for all c; debiasing is for unit features alone."""
    if "debiased" in name:
        pytest.skip("its floor exp(-logit_scale) assumes unit features")
    each, c = case(name, 40, 6), 2.0
    expected = each.outcome()
    leaves = [leaf * c for leaf in each.leaves[:-1]] + [each.leaves[-1] / c**2]
    if "margin" in name:
        # A margin of similarities scales with them.
        each.call.keywords["false_negative_margin"] *= c**2
    got = each.with_leaves(*leaves).outcome()
    factors = [1.0, *[1 / c] * (len(leaves) - 1), c**2]
    for a, b, factor in zip(got, expected, factors + [1.0] * 2, strict=False):
        torch.testing.assert_close(a, b * factor, rtol=1e-12, atol=1e-15)


@every_loss
def test_never_allocates_the_matrix(name: str) -> None:
    """Nor anything else of B x B: the largest tensor, and all that lives at once."""
    B, D = 290, 3
    each = case(name, B, D, torch.float32)
    products = Products()
    with small_tiles(32, 32, watched_by=products):
        each.loss(*each.leaves).backward()
    features = sum(leaf.numel() for leaf in each.leaves)
    assert products.count > B / 32 * (B / 32 + 1)
    assert products.largest <= max(features, 32 * 32) < B * B / 15
    live = LiveBytes(start=each.leaves)
    with small_tiles(32, 32, watched_by=live):
        each.loss(*each.leaves).backward()
    # Features and their gradients, a few tiles, some dozens of vectors; B x B is 4 B^2 bytes.
    assert live.peak_bytes < 4 * B * B / 2
    with Products() as products:
        each.loss(*each.leaves, impl="reference")
    assert products.largest >= B * B


def engine_arguments(*, needs: tuple[bool, ...]) -> tuple[Any, ...]:
    torch.manual_seed(0)
    each = case("clip, labels and ids", 9, 4, torch.float32)
    q, k, logit_scale = each.leaves
    labels, ids = each.call.keywords["labels"], each.call.keywords["ids"]
    bias = torch.randn(9, requires_grad=needs[1])
    vectors, rules = Pairing(labels, labels, ids, ids, column_bias=bias).packed()
    leaves = [x.detach().requires_grad_(n) for x, n in zip((q, k, logit_scale), needs, strict=True)]
    return *leaves, vectors, rules, "tiled", "clip_loss", bias


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, True), (False, False, False)])
def test_opcheck_of_the_statistics(needs: tuple[bool, ...]) -> None:
    arguments = engine_arguments(needs=needs)
    opcheck(contrast._statistics, arguments)
    z, scale = arguments[0], arguments[2]
    vectors, rules = Pairing(positive_shift=4, both_ways=False, self_contrast=True).packed()
    z = z[:8].detach()
    opcheck(contrast._statistics, (z, z, scale, vectors, rules, "tiled", "nt_xent_loss", None))


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, True)])
def test_opcheck_of_the_gradient(needs: tuple[bool, ...]) -> None:
    *arguments, _bias = engine_arguments(needs=(False, False, False))
    sides = [list(torch.randn(3, 9).unbind()) for _ in range(2)]
    opcheck(contrast._gradient, (*arguments, *sides, [*needs, needs[1]]))
