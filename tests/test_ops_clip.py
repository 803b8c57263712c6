"""The CLIP loss: the reference against the equations, the tiles against the reference.

What it shares with the other losses of the softmax family is in test_ops_contrast.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import hypothesis.strategies as st
import loop_losses
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
    small_tiles,
)
from hypothesis import given, settings
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from gradcache_clip.ops import ContrastiveOutput, clip_loss, clip_loss_with_accuracy

SHAPES = [(1, 3), (2, 3), (63, 16), (64, 16), (65, 33), (252, 123)]
OPTIONS = list(itertools.product([False, True], [False, True], [0.0, 0.2]))

reference = partial(clip_loss, impl="reference")
tiled = partial(clip_loss, impl="tiled")


@pytest.fixture(autouse=True)
def _many_tiles() -> Iterator[None]:
    with small_tiles(48, 80):
        yield


def options_of(B: int, labelled: bool, identified: bool, label_smoothing: float) -> dict[str, Any]:
    labels, ids = (torch.randint(0, B // 2 + 1, (B,)) for _ in range(2))
    return {
        "labels": labels if labelled else None,
        "ids": ids if identified else None,
        "label_smoothing": label_smoothing,
    }


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_options_equal_the_loops(options: tuple[bool, bool, float], impl: Any) -> None:
    inputs, chosen = random_inputs(8, 5, torch.float64, scale=9.0), options_of(8, *options)
    with small_tiles(3, 5):
        result = clip_loss_with_accuracy(*inputs, **chosen, impl=impl)
    expected = loop_losses.clip(*inputs, **chosen)
    torch.testing.assert_close(
        [x.item() for x in result], [x.item() for x in expected], rtol=1e-12, atol=1e-14
    )
    gradients = [torch.autograd.grad(loss, inputs) for loss in (result[0], expected[0])]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_equals_cross_entropy_of_torch(label_smoothing: float) -> None:
    q, k, scale = random_inputs(20, 5, torch.float64)
    labels, S = torch.randint(0, 8, (20,)), scale * q @ k.T
    entropy = partial(cross_entropy, label_smoothing=label_smoothing)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "impl": "tiled"}
    right = torch.arange(20)
    expected = (entropy(S, right) + entropy(S.T, right)) / 2
    torch.testing.assert_close(clip_loss(q, k, scale, **options), expected)
    targets = one_hot(labels).double() @ one_hot(labels).double().T
    targets = targets / targets.sum(1, keepdim=True)
    expected = (entropy(S, targets) + entropy(S.T, targets)) / 2
    torch.testing.assert_close(clip_loss(q, k, scale, labels=labels, **options), expected)


def test_accuracies_count_ranks_and_ties_are_wrong() -> None:
    q = torch.eye(4)
    k = torch.stack([q[0], q[1], q[1], q[0] + q[3]])
    # Logits of images: row 1 ties with text 2, row 2 is all zero, row 0 ties with text 3.
    # Logits of texts: column 0 right, 1 right, 2 belongs to image 1, 3 ties.
    for impl in ("reference", "tiled"):
        result = clip_loss_with_accuracy(q, k, 10.0, impl=impl)
        assert isinstance(result, ContrastiveOutput)
        assert result.image_to_text_accuracy.item() == 0.25
        assert result.text_to_image_accuracy.item() == 0.5
        assert not result.image_to_text_accuracy.requires_grad


def test_accuracy_with_labels_takes_the_best_positive() -> None:
    """Images 1 and 2 share a label: image 2 wins through text 1, and the tie of 1 and 2 is none."""
    q = torch.eye(4)
    k = torch.stack([q[0], q[1] + q[2], q[1], q[0] + q[3]])
    labels = torch.tensor([0, 1, 1, 2])
    for impl in ("reference", "tiled"):
        result = clip_loss_with_accuracy(q, k, 10.0, labels=labels, impl=impl)
        assert result.image_to_text_accuracy.item() == 0.75
        assert result.text_to_image_accuracy.item() == 0.75


@pytest.mark.parametrize(("B", "D"), SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_tiles_equal_the_reference(B: int, D: int, options: tuple[bool, bool, float]) -> None:
    inputs = random_inputs(B, D, torch.float64, scale=5.0)
    chosen = options_of(B, *options)
    with poisoned_memory():
        got = loss_and_gradients(partial(tiled, **chosen), inputs, outer=-2.5)
    expected = loss_and_gradients(partial(reference, **chosen), inputs, outer=-2.5)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("options", OPTIONS)
def test_batch_of_one_has_loss_zero(options: tuple[bool, bool, float]) -> None:
    inputs, chosen = random_inputs(1, 8, torch.float32), options_of(1, *options)
    got = loss_and_gradients(partial(tiled, **chosen), inputs)
    assert max(tensor.abs().max().item() for tensor in got) < (1e-5 if options[2] else 1e-30)
    assert clip_loss_with_accuracy(*inputs, **chosen, impl="tiled").image_to_text_accuracy == 1


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("name", ["ids", "labels"])
def test_nothing_but_positives(impl: Any, name: str) -> None:
    """All ids equal: no negatives, loss 0. All labels equal: the entropy of a uniform target."""
    inputs = random_inputs(70, 6, torch.float32)
    result = clip_loss_with_accuracy(*inputs, **{name: torch.full((70,), 3)}, impl=impl)
    gradients = torch.autograd.grad(result.loss, inputs)
    assert result.image_to_text_accuracy == result.text_to_image_accuracy == 1
    assert all(gradient.isfinite().all() for gradient in gradients)
    if name == "ids":
        assert result.loss == 0 and all((gradient == 0).all() for gradient in gradients)
    else:
        assert result.loss > math.log(70)


def test_ids_remove_duplicates() -> None:
    """Every pair stands twice: its copy does not compete with it, and all others do twice."""
    q, k, scale = random_inputs(33, 6, torch.float64, scale=9.0)
    twice = [x.repeat(2, 1) for x in (q, k)]
    got = clip_loss(*twice, scale, ids=torch.arange(33).repeat(2), impl="tiled")
    S = scale * q @ k.T
    others = S.masked_fill(torch.eye(33, dtype=torch.bool), -torch.inf) + math.log(2)
    losses = [
        torch.logaddexp(L.logsumexp(1), S.diagonal()) - S.diagonal() for L in (others, others.T)
    ]
    torch.testing.assert_close(got, (losses[0].mean() + losses[1].mean()) / 2)


def test_own_labels_and_ids_change_nothing() -> None:
    inputs, own = random_inputs(65, 7, torch.float64), torch.randperm(65)
    plain = loss_and_gradients(tiled, inputs)
    for options in ({"labels": own}, {"ids": own}, {"labels": own, "ids": own}):
        got = loss_and_gradients(partial(tiled, **options), inputs)
        torch.testing.assert_close(got, plain, rtol=1e-11, atol=1e-14)


@settings(max_examples=20, deadline=None)
@given(B=st.integers(1, 40), rows=st.integers(1, 45), columns=st.integers(1, 45))
def test_any_tile_gives_the_same_loss(B: int, rows: int, columns: int) -> None:
    inputs = random_inputs(B, 6, torch.float64, scale=20.0)
    loss = partial(tiled, **options_of(B, True, True, 0.1))
    expected = loss_and_gradients(loss, inputs)
    with small_tiles(rows, columns):
        got = loss_and_gradients(loss, inputs)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), options=st.sampled_from(OPTIONS))
def test_the_order_of_pairs_does_not_matter(seed: int, options: tuple[bool, bool, float]) -> None:
    torch.manual_seed(seed)
    (q, k, scale), order = random_inputs(40, 6, torch.float64, scale=9.0), torch.randperm(40)
    chosen = options_of(40, *options)
    moved = {n: v[order] if isinstance(v, Tensor) else v for n, v in chosen.items()}
    loss, dq, dk, dscale = loss_and_gradients(partial(tiled, **chosen), (q, k, scale))
    got = loss_and_gradients(partial(tiled, **moved), Inputs(q[order], k[order], scale).to(q.dtype))
    torch.testing.assert_close(got, [loss, dq[order], dk[order], dscale], rtol=1e-10, atol=1e-13)


def plain_with_options(
    q: Tensor, k: Tensor, logit_scale: Tensor, *, labels: Tensor, label_smoothing: float
) -> Tensor:
    logits = logit_scale.to(q.dtype) * q @ k.T
    targets = (labels[:, None] == labels).to(q.dtype)
    targets = targets / targets.sum(1, keepdim=True)
    entropy = partial(cross_entropy, target=targets, label_smoothing=label_smoothing)
    return (entropy(logits) + entropy(logits.T)) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", ["random", "gap", "collapse"])
@pytest.mark.parametrize("labelled", [False, True])
def test_error_budget(dtype: torch.dtype, make: str, labelled: bool) -> None:
    """No further from fp64 than plain PyTorch in the same dtype, plus a few roundings."""
    cosine = {"random": 0.0, "gap": -0.6, "collapse": 0.9}[make]
    inputs = clustered_inputs(cosine, 130, 64, dtype)
    options: dict[str, Any] = {}
    if labelled:
        options = {"labels": torch.arange(130) // 2, "label_smoothing": 0.1}
    plain = partial(plain_with_options, **options) if labelled else plain_loss
    truth = loss_and_gradients(partial(reference, **options), inputs.to(torch.float64))
    budget = relative_errors(loss_and_gradients(plain, inputs), truth)
    got = relative_errors(loss_and_gradients(partial(tiled, **options), inputs), truth)
    tolerance = 4 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    assert all(error <= plain + tolerance for error, plain in zip(got, budget, strict=True))
    # The loss and the scale's gradient are fp32 sums of fp32 logits, whatever the features are.
    assert max(got[0], got[3]) < 1e-5


def test_small_loss_keeps_its_digits() -> None:
    q = torch.eye(6)
    result, expected = clip_loss(q, q, 40.0, impl="tiled"), math.log1p(5 * math.exp(-40.0))
    assert result.item() == pytest.approx(expected, rel=1e-6)


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


def test_auto_is_tiled_on_the_cpu() -> None:
    inputs = random_inputs(20, 8, torch.float32)
    assert torch.equal(clip_loss(*inputs), tiled(*inputs))


EYE = torch.eye(3)
THREE = torch.arange(3)
FLOATS = "float16, bfloat16, float32 or float64"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], EYE, 1.0), TypeError, "image_features: expected a tensor, got list"),
        ((EYE.long(), EYE, 1.0), TypeError, f"image_features: expected {FLOATS}.*int64; convert"),
        ((EYE, EYE.bool(), 1.0), TypeError, f"text_features: expected {FLOATS}.*bool; convert"),
        ((EYE[None], EYE, 1.0), ValueError, r"image_features: .*\(B, D\).*\(1, 3, 3\); pool"),
        ((EYE[:0], EYE[:0], 1.0), ValueError, "image_features: expected a non-empty"),
        ((EYE, EYE[:2], 1.0), ValueError, r"text_features: .*\(3, 3\), got \(2, 3\); row i"),
        ((EYE, EYE.to("meta"), 1.0), ValueError, "text_features: .* cpu, got meta; move one"),
        ((EYE, EYE, "1"), TypeError, "logit_scale: expected a number.*got str; pass"),
        ((EYE, EYE, torch.tensor(1)), TypeError, "logit_scale: .*int64; pass"),
        ((EYE, EYE, torch.ones(2)), ValueError, r"logit_scale: expected one element.*\(2,\); pass"),
        ((EYE, EYE, torch.ones((), device="meta")), ValueError, "logit_scale: .*cpu, got meta; mo"),
    ],
)
def test_bad_input_is_named(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        clip_loss(*arguments)


@pytest.mark.parametrize("name", ["labels", "ids"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([0, 1, 2], TypeError, "expected a tensor of integers, got list; convert"),
        (THREE.float(), TypeError, "expected a tensor of integers, got torch.float32; convert"),
        (THREE.bool(), TypeError, "expected a tensor of integers, got torch.bool; convert"),
        (THREE.to(torch.uint16), TypeError, "integers, got torch.uint16; convert"),
        (THREE[:2], ValueError, r"expected shape \(3,\), got \(2,\); one number"),
        (THREE[:, None], ValueError, r"expected shape \(3,\), got \(3, 1\); one number"),
        (THREE.to("meta"), ValueError, "expected device cpu, got meta; move"),
    ],
)
def test_bad_numbers_are_named(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{name}: .*{message}"):
        clip_loss(EYE, EYE, 1.0, **{name: value})


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, math.nan])
def test_smoothing_is_a_share(share: float) -> None:
    message = f"label_smoothing: expected a share from 0 to below 1, got {share}; 0 turns it off"
    with pytest.raises(ValueError, match=message):
        clip_loss(EYE, EYE, 1.0, label_smoothing=share)


def test_impl_is_checked() -> None:
    with pytest.raises(ValueError, match="impl: expected .*got 'cuda'; use"):
        clip_loss(EYE, EYE, 1.0, impl="cuda")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r'got "triton", but .*; impl="tiled" runs on cpu'):
        clip_loss(EYE.double(), EYE.double(), 1.0, impl="triton")
