"""Losses of prefixes in one pass, against the sum of as many losses of normalised prefixes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from clip_inputs import (
    CASES,
    FULL_CASES,
    ROUNDED_LOGIT,
    Products,
    assert_each_subset,
    clustered_inputs,
    loss_and_gradients,
    plain_loss,
    poisoned_memory,
    random_inputs,
    relative_errors,
)
from hypothesis import given, settings
from prefix_inputs import (
    outcome,
    prefix_case,
    prefix_losses,
    small_tiles,
)
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import normalize

from gradcache_clip import ClipLoss, InfoNCELoss, NTXentLoss, SupConLoss
from gradcache_clip.memory.counter import LiveBytes
from gradcache_clip.ops import contrast
from gradcache_clip.ops.pairing import Pairing

every_loss = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _many_tiles() -> Iterator[None]:
    with small_tiles(32):
        yield


@every_loss
@pytest.mark.parametrize("impl", ["tiled", "reference"])
@pytest.mark.parametrize(
    ("B", "widths", "D"),
    [(3, (1, 2), 3), (3, (5,), 5), (31, (1, 3, 65, 70), 70), (33, (2, 4), 9), (95, (16, 23), 23)],
)
def test_equals_separate_losses(
    name: str, impl: str, B: int, widths: tuple[int, ...], D: int
) -> None:
    each, separate = prefix_case(name, B, widths, D)
    with poisoned_memory():
        got = outcome(each.call, each.leaves, outer=-2.5, impl=impl)
    expected = outcome(separate, each.leaves, outer=-2.5)
    assert len(got) == len(expected) > len(each.leaves)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_equals_the_paper_pair_by_pair() -> None:
    """Equation 1 of the paper with cosine similarities, in plain Python."""
    B, widths = 9, (1, 3, 7)
    each, _ = prefix_case("clip", B, widths, 7)
    images, texts = (leaf.tolist() for leaf in each.leaves[:2])
    scale, expected = each.leaves[2].item(), 0.0
    for weight, d in enumerate(widths, 1):
        L = [[scale * _cosine(a[:d], b[:d]) for b in texts] for a in images]
        for rows in (L, list(zip(*L, strict=True))):
            rowwise = (math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(rows))
            expected += weight * sum(rowwise) / (2 * B)
    for impl in ("tiled", "reference"):
        assert each.loss(*each.leaves, impl=impl).item() == pytest.approx(expected, rel=1e-13)


def _cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


@every_loss
@settings(max_examples=8, deadline=None)
@given(B=st.integers(3, 40), edge=st.integers(1, 45), data=st.data())
def test_any_tile_and_widths(name: str, B: int, edge: int, data: st.DataObject) -> None:
    widths = sorted(data.draw(st.sets(st.integers(1, 8), min_size=1)))
    each, separate = prefix_case(name, B, widths, 8)
    with small_tiles(edge):
        got = outcome(each.call, each.leaves)
    torch.testing.assert_close(got, outcome(separate, each.leaves), rtol=1e-9, atol=1e-12)


@every_loss
def test_gradcheck(name: str) -> None:
    each, _ = prefix_case(name, 7, (2, 3), 4)
    with small_tiles(3):
        assert torch.autograd.gradcheck(each.loss, tuple(each.leaves), fast_mode=True)


@every_loss
def test_each_subset_of_gradients(name: str) -> None:
    each, _ = prefix_case(name, 37, (2, 6), 6)
    assert_each_subset(each.loss, each.leaves, rtol=1e-10, atol=1e-14)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_runs_are_bit_equal(name: str, dtype: torch.dtype) -> None:
    each, _ = prefix_case(name, 70, (3, 33), 35, dtype)
    expected = outcome(each.call, each.leaves)
    assert _bitwise(outcome(each.call, each.leaves), expected)
    # In fp16 torch itself cannot concatenate under this autocast, and gradients overflow.
    if dtype != torch.float16:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert _bitwise(outcome(each.call, each.leaves), expected)
        gradients = slice(1, 1 + len(each.leaves))
        scaled = outcome(each.call, each.leaves, outer=-1024.0)[gradients]
        assert _bitwise(scaled, [-1024.0 * gradient for gradient in expected[gradients]])


@pytest.mark.parametrize("name", FULL_CASES)
def test_torch_compile_takes_the_whole_step(name: str) -> None:
    torch.compiler.reset()
    each, _ = prefix_case(name, 35, (3, 6), 6, torch.float32)
    compiled = torch.compile(each.call, fullgraph=True, backend="aot_eager")
    assert _bitwise(outcome(compiled, each.leaves), outcome(each.call, each.leaves))


def _bitwise(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cosine", [-0.6, 0.0, 0.9])
def test_error_budget(dtype: torch.dtype, cosine: float) -> None:
    """No further from fp64 than plain PyTorch in the same dtype, plus a few roundings."""
    widths = (8, 40, 64)
    inputs = clustered_inputs(cosine, 130, 64, dtype)
    longer = type(inputs)(2.0 * inputs.q, 0.5 * inputs.k, inputs.logit_scale).to(dtype)

    def plain(q: Tensor, k: Tensor, logit_scale: Tensor) -> Tensor:
        prefixes = [[normalize(x[:, :d].float(), dim=1).to(dtype) for x in (q, k)] for d in widths]
        return torch.stack([plain_loss(*each, logit_scale) for each in prefixes]).sum()

    def ours(q: Tensor, k: Tensor, logit_scale: Tensor, impl: Any = "tiled") -> Tensor:
        results = prefix_losses(ClipLoss, widths, q, k, logit_scale=logit_scale, impl=impl)
        return torch.stack([each.loss for each in results]).sum()

    truth = loss_and_gradients(
        lambda *inputs: ours(*inputs, impl="reference"), longer.to(torch.float64)
    )
    budget = relative_errors(loss_and_gradients(plain, longer), truth)
    got = relative_errors(loss_and_gradients(ours, longer), truth)
    tolerance = 4 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    assert all(error <= plain + tolerance for error, plain in zip(got, budget, strict=True))
    # Loss and scale see the features unrounded, for these are not normalised in their own dtype.
    assert max(got[0], got[3]) < 1e-5


@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_prefixes_of_zeros(impl: Any) -> None:
    """F.normalize leaves them zero, and their gradient is the product without a projection."""
    each, separate = prefix_case("clip", 6, (2, 4), 5)
    with torch.no_grad():
        each.leaves[0][1, :2] = 0
        each.leaves[1][3] = 0
        each.leaves[1][4, :4] = 1e-14
    got, expected = outcome(each.call, each.leaves, impl=impl), outcome(separate, each.leaves)
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert not got[1][:, 4].any() and not got[2][:, 4].any(), "beyond the widest prefix"


def test_flops_are_those_of_the_widest_prefix() -> None:
    B, D, widths = 96, 40, (8, 16, 24, 40)
    each, _ = prefix_case("clip", B, widths, D, torch.float32)
    with small_tiles(32, watched_by=(products := Products())):
        loss = each.loss(*each.leaves)
        assert products.flops == 2 * B * B * D
        loss.backward()
    assert products.flops == 8 * B * B * D
    frozen = [each.leaves[0].detach(), *each.leaves[1:]]
    with small_tiles(32, watched_by=(products := Products())):
        each.loss(*frozen).backward()
    assert products.flops == 6 * B * B * D
    only_scale = [*(x.detach() for x in each.leaves[:2]), each.leaves[2]]
    with small_tiles(32, watched_by=(products := Products())):
        each.loss(*only_scale).backward()
    assert products.flops == 4 * B * B * D


@every_loss
def test_never_allocates_the_matrix(name: str) -> None:
    B, D, edge, widths = 260, 3, 32, (1, 3)
    each, _ = prefix_case(name, B, widths, D, torch.float32)
    features = sum(leaf.numel() for leaf in each.leaves)
    products, live = Products(), LiveBytes(start=each.leaves)
    with small_tiles(edge, watched_by=products):
        each.loss(*each.leaves).backward()
    assert products.count > 0 and products.largest <= max(features, edge * edge) < B * B / 15
    with small_tiles(edge, watched_by=live):
        each.loss(*each.leaves).backward()
    assert live.peak_bytes < 4 * B * B / 2


@every_loss
def test_derivatives_that_do_not_exist_are_refused(name: str) -> None:
    each, _ = prefix_case(name, 5, (2, 4), 4)
    function = name.partition(",")[0] + "_loss"
    for leaf in (each.leaves[0], each.leaves[-1]):
        (gradient,) = torch.autograd.grad(each.loss(*each.leaves), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{function}: expected one derivative, got a sec"):
            gradient.square().sum().backward()
    first, *rest = (leaf.detach() for leaf in each.leaves)
    with pytest.raises(RuntimeError, match=f"{function}: expected ordinary tensors"):
        torch.func.grad(lambda x: each.loss(x, *rest))(first)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
@pytest.mark.parametrize("labelled", [False, True])
def test_opcheck(needs: tuple[bool, ...], labelled: bool) -> None:
    inputs = random_inputs(9, 5, torch.float32, scale=5.0)
    labels = torch.arange(9) % 4 if labelled else None
    leaves = [x.detach().requires_grad_(n) for x, n in zip(inputs, needs, strict=True)]
    vectors, numbers = Pairing(labels, labels).packed()
    rest = "tiled", "loss"
    opcheck(contrast._statistics, (*leaves, vectors, [*numbers, 2, 5], *rest, None))
    features = inputs.q[:8].detach()
    vectors, numbers = Pairing(positive_shift=4, both_ways=False, self_contrast=True).packed()
    scale = inputs.logit_scale.detach()
    arguments = features, features, scale, vectors, [*numbers, 2, 5], *rest
    opcheck(contrast._statistics, (*arguments, None))
    sides = [torch.rand(2, 8), torch.rand(2, 8), torch.rand(2, 8)], [torch.empty(2, 0)] * 3
    opcheck(contrast._gradient, (*arguments, *sides, [True, True, needs[0], False]))


@pytest.mark.parametrize("widths", [[], [0, 2], [2, 2], [3, 2], [2, 5]])
def test_bad_widths(widths: list[int]) -> None:
    features = torch.eye(4)
    message = r"widths: expected increasing widths from 1 to .*, 4, got \["
    for build in (ClipLoss, InfoNCELoss, NTXentLoss):
        with pytest.raises(ValueError, match=message):
            prefix_losses(build, widths, features, features)
    with pytest.raises(ValueError, match=message):
        prefix_losses(SupConLoss, widths, features, labels=torch.arange(4))


def test_other_bad_input_is_named() -> None:
    features = torch.eye(4)
    with pytest.raises(ValueError, match=r"text_features: expected the shape of image_features"):
        prefix_losses(ClipLoss, [2], features, features[:2])
    with pytest.raises(TypeError, match="queries: expected float16"):
        prefix_losses(InfoNCELoss, [2], features.long(), features)
    with pytest.raises(ValueError, match="tau_plus: expected a share"):
        prefix_losses(NTXentLoss, [2], features, features, tau_plus=1.0)
    with pytest.raises(TypeError, match="labels: expected a tensor of integers"):
        prefix_losses(SupConLoss, [2], features, labels=features[0])
    with pytest.raises(ValueError, match="impl: expected"):
        prefix_losses(ClipLoss, [2], features, features, impl="cuda")
