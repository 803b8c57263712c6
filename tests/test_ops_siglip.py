"""The sigmoid loss: the reference against the paper's equation, the tiles against the reference."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from clip_inputs import ROUNDED_LOGIT, loss_and_gradients, poisoned_memory, relative_errors
from hypothesis import given, settings
from siglip_inputs import (
    Inputs,
    clustered_inputs,
    labels_of,
    plain_loss,
    random_inputs,
)

from gradcache_clip.ops import siglip, siglip_tiled
from gradcache_clip.ops.results import ContrastiveOutput
from gradcache_clip.ops.siglip import siglip_loss, siglip_loss_with_accuracy
from gradcache_clip.ops.siglip_tiled import Wanted
from gradcache_clip.ops.tiles import TileShape

SMALL = TileShape(rows=48, columns=80)
SHAPES = [(1, 3), (2, 3), (63, 16), (64, 16), (65, 33), (252, 123)]
EVERYTHING = Wanted(True, True, True, True, True)

reference = partial(siglip_loss, impl="reference")
tiled = partial(siglip_loss, impl="tiled")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, SMALL)


def cut(monkeypatch: pytest.MonkeyPatch, shape: TileShape) -> None:
    monkeypatch.setitem(siglip._PASSES, "tiled", partial(siglip_tiled.siglip_tiled, shape=shape))


def paper_loss(inputs: Inputs, positive: list[list[bool]]) -> float:
    """Equation 1, one pair at a time."""
    q, k, scale, bias = (x.detach().tolist() for x in inputs)
    total = 0.0
    for i, x in enumerate(q):
        for j, y in enumerate(k):
            logit = scale * sum(a * b for a, b in zip(x, y, strict=True)) + bias
            total += math.log(1 / (1 + math.exp((-1 if positive[i][j] else 1) * logit)))
    return -total / len(q)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_equals_the_equation(impl: Any) -> None:
    inputs = random_inputs(37, 5, torch.float64)
    pairs = torch.eye(37).bool().tolist()
    got = siglip_loss(*inputs, impl=impl).item()
    assert got == pytest.approx(paper_loss(inputs, pairs), rel=1e-13)
    labels = labels_of(37)
    same = (labels[:, None] == labels).tolist()
    got = siglip_loss(*inputs, labels=labels, impl=impl).item()
    assert got == pytest.approx(paper_loss(inputs, same), rel=1e-13)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_equals_open_clip(impl: Any) -> None:
    inputs = random_inputs(65, 16, torch.float64, bias=-10.0)
    got = loss_and_gradients(partial(siglip_loss, impl=impl), inputs)
    assert max(relative_errors(got, loss_and_gradients(plain_loss, inputs))) < 1e-12


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_images_with_several_captions(impl: Any) -> None:
    inputs = random_inputs(20, 5, torch.float64, N=50)
    labels = torch.randperm(20), labels_of(50, 25).int()
    same = (labels[0][:, None] == labels[1]).tolist()
    got = siglip_loss(*inputs, labels=labels, impl=impl).item()
    assert got == pytest.approx(paper_loss(inputs, same), rel=1e-13)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_tiles_equal_the_reference(B: int, D: int, labelled: bool) -> None:
    inputs = random_inputs(B, D, torch.float64)
    options = {"labels": labels_of(B)} if labelled else {}
    with poisoned_memory():
        got = loss_and_gradients(partial(tiled, **options), inputs, outer=-2.5)
    expected = loss_and_gradients(partial(reference, **options), inputs, outer=-2.5)
    assert max(relative_errors(got, expected)) < 1e-12
    assert all(tensor.isfinite().all() for tensor in got)


def test_more_texts_than_images() -> None:
    inputs = random_inputs(252, 123, torch.float64, N=507)
    labels = labels_of(252, 300), labels_of(507, 300)
    with poisoned_memory():
        got = loss_and_gradients(partial(tiled, labels=labels), inputs)
    expected = loss_and_gradients(partial(reference, labels=labels), inputs)
    assert max(relative_errors(got, expected)) < 1e-12
    results = [
        siglip_loss_with_accuracy(*inputs, labels=labels, impl=i) for i in ("tiled", "reference")
    ]
    assert results[0][1:] == results[1][1:]


def test_a_single_pair() -> None:
    q = torch.tensor([[1.0, 0.0]])
    result = siglip_loss_with_accuracy(q, q, 10.0, -10.0, impl="tiled")
    assert result.loss.item() == pytest.approx(math.log(2))
    assert result.image_to_text_accuracy == result.text_to_image_accuracy == 1
    no_positive = torch.tensor([1]), torch.tensor([2])
    result = siglip_loss_with_accuracy(q, q, 10.0, -10.0, labels=no_positive, impl="tiled")
    assert result.loss.item() == pytest.approx(math.log(2))
    assert result.image_to_text_accuracy == result.text_to_image_accuracy == 0


def test_accuracies_count_ranks_and_ties_are_wrong() -> None:
    q = torch.eye(4)
    k = torch.stack([q[0], q[1], q[1], q[0] + q[3]])
    # Logits of images: row 1 ties with text 2, row 2 is all zero, row 0 ties with text 3.
    # Logits of texts: column 0 right, 1 right, 2 belongs to image 1, 3 ties.
    for impl in ("reference", "tiled"):
        result = siglip_loss_with_accuracy(q, k, 10.0, -10.0, impl=impl)
        assert isinstance(result, ContrastiveOutput)
        assert result.image_to_text_accuracy.item() == 0.25
        assert result.text_to_image_accuracy.item() == 0.5
        assert not result.image_to_text_accuracy.requires_grad


@pytest.mark.parametrize("labelled", [False, True])
def test_accuracies_equal_the_reference(labelled: bool) -> None:
    inputs = random_inputs(130, 3, torch.float32, scale=4.0)
    labels = labels_of(130, 60) if labelled else None
    got, expected = (
        siglip_loss_with_accuracy(*inputs, labels=labels, impl=i) for i in ("tiled", "reference")
    )
    assert got[1:] == expected[1:]
    assert 0 < got.image_to_text_accuracy < 1
    torch.testing.assert_close(got.loss, expected.loss)


def test_any_label_is_compared_in_full() -> None:
    """Labels that are equal in their lower 32 bits, or as floats, are not equal."""
    inputs = random_inputs(3, 4, torch.float64)
    labels = torch.tensor([2**60, 2**60 + 1, -(2**32)])
    assert torch.equal(tiled(*inputs, labels=labels), tiled(*inputs))


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 40),
    rows=st.integers(1, 45),
    columns=st.integers(1, 45),
    labelled=st.booleans(),
)
def test_any_tile_gives_the_same(B: int, rows: int, columns: int, labelled: bool) -> None:
    inputs = random_inputs(B, 6, torch.float64)
    labels = (labels_of(B), labels_of(B)) if labelled else None
    got, expected = (
        siglip_tiled.siglip_tiled(*(x.detach() for x in inputs), labels, EVERYTHING, shape=shape)
        for shape in (TileShape(rows, columns), TileShape())
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(B=st.integers(1, 30), seed=st.integers(0, 2**31 - 1), labelled=st.booleans())
def test_the_order_of_the_pairs_does_not_matter(B: int, seed: int, labelled: bool) -> None:
    torch.manual_seed(seed)
    inputs, order = random_inputs(B, 6, torch.float64), torch.randperm(B)
    labels = labels_of(B) if labelled else None
    shuffled = inputs._replace(q=inputs.q[order], k=inputs.k[order]).to(torch.float64)
    shuffled_labels = None if labels is None else labels[order]
    loss, dq, dk, *rest = loss_and_gradients(partial(tiled, labels=labels), inputs)
    got = loss_and_gradients(partial(tiled, labels=shuffled_labels), shuffled)
    for a, b in zip(got, [loss, dq[order], dk[order], *rest], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_labels_are_names_alone() -> None:
    inputs, labels = random_inputs(65, 8, torch.float64), labels_of(65)
    names = torch.randperm(9)[labels] * 10_000_000_000 - 7
    first, second = (loss_and_gradients(partial(tiled, labels=x), inputs) for x in (labels, names))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    distinct = loss_and_gradients(partial(tiled, labels=torch.randperm(65)), inputs)
    expected = loss_and_gradients(tiled, inputs)
    assert max(relative_errors(distinct, expected)) < 1e-12


def test_both_sides_swapped() -> None:
    inputs = random_inputs(70, 8, torch.float64)
    loss, dq, dk, *rest = loss_and_gradients(tiled, inputs)
    swapped = loss_and_gradients(tiled, inputs._replace(q=inputs.k, k=inputs.q))
    assert max(relative_errors(swapped, [loss, dk, dq, *rest])) < 1e-12


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
    # Loss, dlogit_scale and dlogit_bias are fp32 sums of fp32 logits, whatever the features are.
    assert max(got[0], got[3], got[4]) < 1e-5


def test_sums_of_many_small_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start nearly all of the 9 million terms are 4.5e-5 or so."""
    cut(monkeypatch, TileShape())
    inputs = random_inputs(3000, 16, torch.float32, bias=-10.0)
    truth = loss_and_gradients(tiled, inputs.to(torch.float64))
    got = relative_errors(loss_and_gradients(tiled, inputs), truth)
    plain = relative_errors(loss_and_gradients(plain_loss, inputs), truth)
    assert max(got) < 2e-6
    assert all(error <= p + 1e-6 for error, p in zip(got, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [-80.0, -30.0, -1.0, 0.0, 1.0, 30.0, 80.0])
def test_each_term_keeps_its_digits(dtype: torch.dtype, bias: float) -> None:
    """Orthogonal features: every negative logit is the bias, every positive the bias plus 60."""
    inputs = Inputs(torch.eye(40), torch.eye(40), torch.tensor(60.0), torch.tensor(bias)).to(dtype)
    softplus = [max(x, 0) + math.log1p(math.exp(-abs(x))) for x in (-bias - 60, bias)]
    sigmoid = [math.exp(min(x, 0)) / (1 + math.exp(-abs(x))) for x in (-bias - 60, bias)]
    loss, dq, _, dscale, dbias = loss_and_gradients(tiled, inputs)
    rel, tiny = 100 * torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    assert loss.item() == pytest.approx(softplus[0] + 39 * softplus[1], rel=rel)
    assert dscale.item() == pytest.approx(-sigmoid[0], rel=rel, abs=tiny)
    assert dbias.item() == pytest.approx(39 * sigmoid[1] - sigmoid[0], rel=rel)
    assert dq[0, 0].item() == pytest.approx(60 / 40 * -sigmoid[0], rel=rel, abs=tiny)
    assert dq[0, 1].item() == pytest.approx(60 / 40 * sigmoid[1], rel=rel, abs=tiny)


def test_huge_logits_do_not_overflow() -> None:
    inputs = random_inputs(20, 8, torch.float32, scale=1e6)
    got = loss_and_gradients(tiled, inputs)
    expected = loss_and_gradients(reference, inputs.to(torch.float64))
    assert all(x.isfinite().all() for x in got)
    assert max(relative_errors(got, expected)) < 1e-4


def test_nan_and_infinity_reach_the_loss() -> None:
    for bad in (math.nan, math.inf):
        q, k, scale, bias = (x.detach().clone() for x in random_inputs(65, 4, torch.float32))
        q[40, 1] = bad
        assert not tiled(q, k, scale, bias).isfinite()


def test_auto_is_tiled_on_the_cpu() -> None:
    inputs = random_inputs(200, 8, torch.float32)
    assert torch.equal(siglip_loss(*inputs), tiled(*inputs))


def test_shapes_without_data() -> None:
    q = torch.empty(2000, 16, device="meta", requires_grad=True)
    for impl in ("reference", "tiled"):
        result = siglip_loss_with_accuracy(q, q, 1.0, 0.0, impl=impl)
        result.loss.backward()
        assert [x.shape for x in result] == [()] * 3
        assert q.grad is not None and q.grad.is_meta


EYE = torch.eye(3)
LABELS = torch.arange(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], EYE, 1.0, 0.0), TypeError, "image_features: expected a tensor, got list"),
        ((EYE.long(), EYE, 1.0, 0.0), TypeError, "image_features: expected float16.*int64"),
        ((EYE[None], EYE, 1.0, 0.0), ValueError, r"image_features: .*\(B, D\).*\(1, 3, 3\)"),
        ((EYE[:0], EYE[:0], 1.0, 0.0), ValueError, "image_features: expected a non-empty"),
        ((EYE, EYE[:2], 1.0, 0.0), ValueError, r"text_features: .*\(3, 3\), got \(2, 3\)"),
        ((EYE, EYE.to("meta"), 1.0, 0.0), ValueError, "text_features: .*cpu, got meta"),
        ((EYE, EYE, "1", 0.0), TypeError, "logit_scale: expected a number.*got str"),
        ((EYE, EYE, 1.0, torch.tensor(1)), TypeError, "logit_bias: .*int64"),
        ((EYE, EYE, 1.0, torch.ones(2)), ValueError, r"logit_bias: expected one element.*\(2,\)"),
        ((EYE, EYE, 1.0, torch.ones((), device="meta")), ValueError, "logit_bias: .*got meta"),
    ],
)
def test_bad_input_is_named(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        siglip_loss(*arguments)


@pytest.mark.parametrize(
    ("texts", "labels", "error", "message"),
    [
        (EYE, LABELS.float(), TypeError, "labels: expected a tensor of integers, got .*float32"),
        (EYE, [1, 2, 3], ValueError, "labels: expected one vector or a pair.*got 3"),
        (EYE, LABELS[:2], ValueError, r"labels: expected shape \(3,\), got \(2,\)"),
        (EYE[:2], LABELS, ValueError, r"text_features: expected the shape"),
        (EYE[:2], (LABELS, LABELS), ValueError, r"labels\[1\]: expected shape \(2,\), got \(3,\)"),
        (EYE[:2, :2], (LABELS, LABELS[:2]), ValueError, "text_features: expected the width .*3"),
        (EYE.to("meta"), (LABELS, LABELS), ValueError, "text_features: .*cpu, got meta"),
        (EYE, (LABELS, LABELS.to("meta")), ValueError, r"labels\[1\]: .*cpu, got meta"),
    ],
)
def test_bad_labels_are_named(
    texts: Any, labels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        siglip_loss(EYE, texts, 1.0, 0.0, labels=labels)


def test_impl_is_checked() -> None:
    with pytest.raises(ValueError, match="impl: expected .*got 'cuda'"):
        siglip_loss(EYE, EYE, 1.0, 0.0, impl="cuda")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r'got "triton", but .*; impl="tiled" runs on cpu'):
        siglip_loss(EYE.double(), EYE.double(), 1.0, 0.0, impl="triton")
