"""The CLIP op: the reference against the paper's equations, the tiles against the reference."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from clip_inputs import (
    ROUNDED_LOGIT,
    Inputs,
    clustered_inputs,
    loss_and_gradients,
    plain_loss,
    poisoned_memory,
    random_inputs,
    relative_errors,
)
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache_clip.ops import ClipLossResult, clip, clip_loss, clip_loss_with_accuracy
from gradcache_clip.ops.clip_tiled import TileShape, clip_tiled

SMALL = TileShape(rows=48, columns=80)
SHAPES = [(1, 3), (2, 3), (63, 16), (64, 16), (65, 33), (252, 123)]

reference = partial(clip_loss, impl="reference")


def tiled(q: Tensor, k: Tensor, logit_scale: Tensor, *, tile: TileShape = SMALL) -> Tensor:
    return clip_tiled(q, k, logit_scale, tile=tile)[0]


def paper_loss(q: Tensor, k: Tensor, logit_scale: Tensor) -> float:
    """Equations 6 to 8, one pair at a time."""
    L = (logit_scale * q @ k.T).tolist()
    B = len(L)
    i2t = sum(-math.log(math.exp(L[i][i]) / sum(math.exp(x) for x in L[i])) for i in range(B)) / B
    t2i = (
        sum(
            -math.log(math.exp(L[i][i]) / sum(math.exp(L[k][i]) for k in range(B)))
            for i in range(B)
        )
        / B
    )
    return 0.5 * (i2t + t2i)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_equals_the_equations(impl: Any) -> None:
    inputs = random_inputs(37, 5, torch.float64)
    assert clip_loss(*inputs, impl=impl).item() == pytest.approx(paper_loss(*inputs), rel=1e-13)


def test_accuracies_count_ranks_and_ties_are_wrong() -> None:
    q = torch.eye(4)
    k = torch.stack([q[0], q[1], q[1], q[0] + q[3]])
    # Logits of images: row 1 ties with text 2, row 2 is all zero, row 0 ties with text 3.
    # Logits of texts: column 0 right, 1 right, 2 belongs to image 1, 3 ties.
    for impl in ("reference", "tiled"):
        result = clip_loss_with_accuracy(q, k, 10.0, impl=impl)
        assert isinstance(result, ClipLossResult)
        assert result.image_to_text_accuracy.item() == 0.25
        assert result.text_to_image_accuracy.item() == 0.5
        assert not result.image_to_text_accuracy.requires_grad


@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_tiles_equal_the_reference(B: int, D: int) -> None:
    inputs = random_inputs(B, D, torch.float64, scale=5.0)
    with poisoned_memory():
        got = loss_and_gradients(tiled, inputs, outer=-2.5)
    expected = loss_and_gradients(reference, inputs, outer=-2.5)
    assert max(relative_errors(got, expected)) < 1e-12
    assert all(tensor.isfinite().all() for tensor in got)


def test_batch_of_one_has_loss_zero() -> None:
    inputs = random_inputs(1, 8, torch.float32)
    assert [tensor.abs().max().item() for tensor in loss_and_gradients(tiled, inputs)] == [0.0] * 4
    assert clip_loss_with_accuracy(*inputs, impl="tiled").image_to_text_accuracy == 1


def test_tiles_really_cut_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradcache_clip.ops import clip_tiled as module

    folded: list[int] = []
    original = module._fold
    monkeypatch.setattr(
        module, "_fold", lambda *args, dim: (folded.append(dim), original(*args, dim=dim))
    )
    tiled(*random_inputs(252, 8, torch.float32))
    assert folded == [1, 0] * (6 * 4)


@settings(max_examples=40, deadline=None)
@given(B=st.integers(1, 40), rows=st.integers(1, 45), columns=st.integers(1, 45))
def test_any_tile_gives_the_same_loss(B: int, rows: int, columns: int) -> None:
    inputs = random_inputs(B, 6, torch.float64, scale=20.0)
    loss = partial(tiled, tile=TileShape(rows, columns))
    expected = loss_and_gradients(partial(tiled, tile=TileShape()), inputs)
    for got, want in zip(loss_and_gradients(loss, inputs), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_gradcheck() -> None:
    inputs = random_inputs(7, 5, torch.float64, scale=3.0)
    loss = partial(tiled, tile=TileShape(2, 3))
    torch.autograd.gradcheck(loss, tuple(inputs))


@pytest.mark.parametrize("needed", range(8))
def test_each_subset_of_gradients(needed: int) -> None:
    inputs = random_inputs(65, 16, torch.float64)
    full = torch.autograd.grad(tiled(*inputs), inputs)
    wanted = [bool(needed >> bit & 1) for bit in range(3)]
    leaves = Inputs(*(x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)))
    loss = tiled(*leaves)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for leaf, gradient, want in zip(leaves, full, wanted, strict=True):
        assert (leaf.grad is not None) == want
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-11, atol=1e-15)


class CountProducts(TorchDispatchMode):
    """Counts matrix products, and remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize(("needs", "products"), [((1, 1, 1), 3), ((1, 0, 1), 2), ((0, 0, 1), 2)])
def test_no_product_that_nobody_asked_for(needs: tuple[int, ...], products: int) -> None:
    inputs = random_inputs(20, 8, torch.float32)
    leaves = [x.detach().requires_grad_(bool(need)) for x, need in zip(inputs, needs, strict=True)]
    loss = tiled(*leaves)
    with CountProducts() as count:
        loss.backward()
    assert count.products == products


def test_never_allocates_the_matrix() -> None:
    B, D = 600, 8
    inputs = random_inputs(B, D, torch.float32)
    with CountProducts() as count:
        tiled(*inputs).backward()
    assert count.largest <= max(B * D, SMALL.rows * SMALL.columns) < B * B / 50
    with CountProducts() as count:
        reference(*inputs)
    assert count.largest == B * B


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", ["random", "gap", "collapse"])
def test_error_budget(dtype: torch.dtype, make: str) -> None:
    """No further from fp64 than plain PyTorch in the same dtype, plus a few roundings."""
    cosine = {"random": 0.0, "gap": -0.6, "collapse": 0.9}[make]
    inputs = clustered_inputs(cosine, 130, 64, dtype)
    truth = loss_and_gradients(reference, inputs.to(torch.float64))
    budget = relative_errors(loss_and_gradients(plain_loss, inputs), truth)
    got = relative_errors(loss_and_gradients(tiled, inputs), truth)
    tolerance = 4 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    assert all(error <= plain + tolerance for error, plain in zip(got, budget, strict=True))
    # The loss and the scale's gradient are fp32 sums of fp32 logits, whatever the features are.
    assert max(got[0], got[3]) < 1e-5


def test_small_loss_keeps_its_digits() -> None:
    q = torch.eye(6)
    result, expected = clip_loss(q, q, 40.0, impl="tiled"), math.log1p(5 * math.exp(-40.0))
    assert result.item() == pytest.approx(expected, rel=1e-6)


def test_runs_are_bit_equal() -> None:
    inputs = random_inputs(252, 33, torch.bfloat16)
    first, second = (loss_and_gradients(tiled, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_have_the_dtype_of_their_inputs() -> None:
    q = torch.randn(5, 4, dtype=torch.bfloat16, requires_grad=True)
    k = torch.randn(5, 4, dtype=torch.float32, requires_grad=True)
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    loss = clip_loss(q, k, scale, impl="tiled")
    loss.backward()
    assert loss.dtype == torch.float32
    assert [x.grad.dtype for x in (q, k, scale)] == [x.dtype for x in (q, k, scale)]
    torch.testing.assert_close(loss, clip_loss(q.float(), k, 1.0, impl="reference"))
    assert clip_loss(q, k.half(), 1.0).dtype == torch.float32


def test_non_contiguous_features_and_shared_tensor() -> None:
    q = torch.randn(8, 20, dtype=torch.float64).T.requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(tiled(q, q, scale), (q, scale))
    expected = torch.autograd.grad(reference(q, q, scale), (q, scale))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)


def test_exact_under_autocast() -> None:
    inputs = random_inputs(65, 33, torch.float32)
    for loss in (tiled, partial(clip_loss, impl="tiled")):
        expected = loss_and_gradients(loss, inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = loss_and_gradients(loss, inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = reference(*inputs)
    assert torch.equal(under_autocast, reference(*inputs))


def test_second_backward_is_refused() -> None:
    q, k, scale = random_inputs(5, 4, torch.float64)
    loss = tiled(q, k, scale)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    (gradient,) = torch.autograd.grad(tiled(q, k, scale), q, create_graph=True)
    with pytest.raises(RuntimeError, match="expected one derivative.*reference"):
        gradient.square().sum().backward()


def test_nan_and_infinity_reach_the_loss() -> None:
    for bad in (math.nan, math.inf):
        q, k, scale = (x.detach().clone() for x in random_inputs(65, 4, torch.float32))
        q[40, 1] = bad
        assert not tiled(q, k, scale).isfinite()


def test_auto_is_tiled_on_the_cpu_and_inference_needs_no_graph() -> None:
    inputs = random_inputs(20, 8, torch.float32)
    with torch.no_grad():
        loss = clip_loss(*inputs)
    assert not loss.requires_grad
    assert torch.equal(loss, clip_loss(*inputs, impl="tiled"))


EYE = torch.eye(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], EYE, 1.0), TypeError, "image_features: expected a tensor, got list"),
        ((EYE.long(), EYE, 1.0), TypeError, "image_features: expected float16.*int64"),
        ((EYE, EYE.bool(), 1.0), TypeError, "text_features: expected float16"),
        ((EYE[None], EYE, 1.0), ValueError, r"image_features: .*\(B, D\).*\(1, 3, 3\)"),
        ((EYE[:0], EYE[:0], 1.0), ValueError, "image_features: expected a non-empty"),
        ((EYE, EYE[:2], 1.0), ValueError, r"text_features: .*\(3, 3\), got \(2, 3\)"),
        ((EYE, EYE.to("meta"), 1.0), ValueError, "text_features: expected device cpu, got meta"),
        ((EYE, EYE, "1"), TypeError, "logit_scale: expected a number.*got str"),
        ((EYE, EYE, torch.tensor(1)), TypeError, "logit_scale: .*int64"),
        ((EYE, EYE, torch.ones(2)), ValueError, r"logit_scale: expected one element.*\(2,\)"),
        ((EYE, EYE, torch.ones((), device="meta")), ValueError, "logit_scale: .*cpu, got meta"),
    ],
)
def test_bad_input_is_named(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        clip_loss(*arguments)


def test_impl_is_checked() -> None:
    with pytest.raises(ValueError, match="impl: expected .*got 'cuda'"):
        clip_loss(EYE, EYE, 1.0, impl="cuda")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r'got "triton", but .*; impl="tiled" runs on cpu'):
        clip_loss(EYE.double(), EYE.double(), 1.0, impl="triton")


def test_shapes_without_data() -> None:
    q = torch.empty(2000, 16, device="meta", requires_grad=True)
    for impl in ("reference", "tiled"):
        loss = clip_loss(q, q, 1.0, impl=impl)
        loss.backward()
        assert loss.shape == () and q.grad is not None and q.grad.is_meta


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(clip)
    assert result.attempted > 0
    assert result.failed == 0


def test_import_loads_torch_alone() -> None:
    heavy = "{'triton', 'jaxtyping', 'numpy.testing'} & set(sys.modules)"
    code = f"import sys, gradcache_clip.ops; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)
