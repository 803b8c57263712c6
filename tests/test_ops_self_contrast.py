"""NT-Xent and SupCon: the reference against loops, half a matrix of tiles against the reference."""

from __future__ import annotations

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
    clustered_inputs,
    loss_and_gradients,
    poisoned_memory,
    relative_errors,
    small_tiles,
    unit,
)
from hypothesis import given, settings
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradcache_clip.ops import (
    SelfContrastOutput,
    clip_loss,
    nt_xent_loss,
    nt_xent_loss_with_accuracy,
    sup_con_loss,
    sup_con_loss_with_accuracy,
)

SHAPES = [(1, 3), (2, 3), (15, 6), (16, 6), (17, 7), (32, 16), (33, 16), (126, 23)]


@pytest.fixture(autouse=True)
def _many_tiles() -> Iterator[None]:
    with small_tiles(32, 32):
        yield


def views(B: int, D: int, scale: float = 6.0) -> list[Tensor]:
    """Leaves (features_a, features_b, scale)."""
    leaves = [unit(B, D), unit(B, D), torch.tensor(scale, dtype=torch.float64)]
    return [leaf.requires_grad_() for leaf in leaves]


def by_labels(labels: Tensor, *, impl: Any = "tiled") -> Any:
    return lambda features, scale: sup_con_loss(features, labels, scale, impl=impl)


@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_nt_xent_equals_the_loops(tau_plus: float, impl: Any) -> None:
    leaves = views(6, 4)
    with small_tiles(5, 5):
        got = nt_xent_loss_with_accuracy(*leaves, tau_plus=tau_plus, impl=impl)
    assert isinstance(got, SelfContrastOutput)
    expected = loop_losses.nt_xent(*leaves, tau_plus=tau_plus)
    torch.testing.assert_close(list(got), expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, leaves) for loss in (got[0], expected[0])]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1, 0, 3, 3, 4], [7] * 9, [0] * 8 + [1]])
@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_sup_con_equals_the_loops(labels: list[int], impl: Any) -> None:
    """Labels 2 and 4 have one row: no positives, no part in the mean, but negatives of others."""
    features, _, scale = views(9, 4)
    with small_tiles(4, 4):
        got = sup_con_loss_with_accuracy(features, torch.tensor(labels), scale, impl=impl)
    assert isinstance(got, SelfContrastOutput)
    expected = loop_losses.sup_con(features, labels, scale)
    torch.testing.assert_close(list(got), expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, (features, scale)) for loss in (got[0], expected[0])]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_tiles_equal_the_reference(B: int, D: int) -> None:
    leaves, labels = views(B, D), torch.randint(0, B // 2 + 1, (B,))
    for tau_plus in (0.0, 0.2):
        with poisoned_memory():
            got = loss_and_gradients(partial(nt_xent_loss, tau_plus=tau_plus), leaves, outer=-3.0)
        reference = partial(nt_xent_loss, tau_plus=tau_plus, impl="reference")
        expected = loss_and_gradients(reference, leaves, outer=-3.0)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)
    with poisoned_memory():
        got = loss_and_gradients(by_labels(labels), leaves[1:], outer=-3.0)
    expected = loss_and_gradients(by_labels(labels, impl="reference"), leaves[1:], outer=-3.0)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_two_views_are_labels_of_two_rows() -> None:
    a, b, scale = views(40, 6)
    labels = torch.arange(40).repeat(2)
    got = sup_con_loss_with_accuracy(torch.cat((a, b)), labels, scale)
    expected = nt_xent_loss_with_accuracy(a, b, scale)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_nt_xent_equals_cross_entropy_of_torch() -> None:
    a, b, scale = views(20, 6)
    torch.testing.assert_close(nt_xent_loss(a, b, scale), plain_nt_xent(a, b, scale))


def test_accuracies_count_ranks_and_ties_are_wrong() -> None:
    axes = torch.eye(4)
    a, b = axes[:2], torch.stack([axes[0], axes[0]])
    for impl in ("reference", "tiled"):
        # View 0 ties with both of b, as does b_0; view 1 and b_1 have no similar partner.
        assert nt_xent_loss_with_accuracy(a, b, 10.0, impl=impl).accuracy == 0
        assert nt_xent_loss_with_accuracy(a, a, 10.0, impl=impl).accuracy == 1
        features = torch.stack([axes[0], axes[0], axes[1], axes[0] + axes[1], axes[3]])
        labels = torch.tensor([0, 0, 1, 1, 2])
        result = sup_con_loss_with_accuracy(features, labels, 10.0, impl=impl)
        # Row 0: 1 against 1, a tie, and row 1 alike; row 2 wins; row 3: 1 against 1; row 4 is out.
        assert result.accuracy == 0.25
        assert not result.accuracy.requires_grad


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_one_sample_of_two_views_has_loss_zero(impl: Any) -> None:
    leaves = [x.detach().float().requires_grad_() for x in views(1, 8)]
    result = nt_xent_loss_with_accuracy(*leaves, impl=impl)
    assert result.loss == 0 and result.accuracy == 1
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(result.loss, leaves))


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("N", [1, 2, 70])
def test_without_positives_loss_and_gradients_are_zero(impl: Any, N: int) -> None:
    features, _, scale = (x.detach().float().requires_grad_() for x in views(N, 8))
    result = sup_con_loss_with_accuracy(features, torch.arange(N), scale, impl=impl)
    assert result.loss == 0 and result.accuracy == 0
    gradients = torch.autograd.grad(result.loss, (features, scale))
    assert all((gradient == 0).all() for gradient in gradients)


def test_debiased_with_one_sample_is_zero() -> None:
    """N = 0 negatives in equation 8 of Chuang et al.: nothing competes with the partner."""
    assert nt_xent_loss(*views(1, 8), tau_plus=0.1) == 0


def test_a_row_without_positives_still_repels() -> None:
    features, _, scale = views(5, 4)
    labels = torch.tensor([0, 0, 1, 1, 2])
    (gradient,) = torch.autograd.grad(sup_con_loss(features, labels, scale), features)
    assert gradient[4].abs().max() > 1e-3
    with_it, without = (
        sup_con_loss(features[:rows], labels[:rows], scale).item() for rows in (5, 4)
    )
    assert with_it > without


def test_the_other_view_gets_its_own_gradient() -> None:
    """dq of a symmetric contrast is the gradient through both of its sides."""
    a, b, scale = views(20, 6)
    both = torch.autograd.grad(nt_xent_loss(a, b, scale), (a, b))
    one = torch.autograd.grad(nt_xent_loss(a, b.detach(), scale), a)[0]
    other = torch.autograd.grad(nt_xent_loss(a.detach(), b, scale), b)[0]
    torch.testing.assert_close((one, other), both)
    same = torch.autograd.grad(nt_xent_loss(a, a, scale), a)[0]
    apart = torch.autograd.grad(
        nt_xent_loss(a, b_of := a.detach().requires_grad_(), scale), (a, b_of)
    )
    torch.testing.assert_close(same, apart[0] + apart[1])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), B=st.integers(1, 40), edge=st.integers(1, 45))
def test_order_views_and_tiles_do_not_matter(seed: int, B: int, edge: int) -> None:
    torch.manual_seed(seed)
    a, b, scale = views(B, 5)
    order, swap = torch.randperm(B), torch.rand(B, 1) < 0.5
    loss, da, db, dscale = loss_and_gradients(nt_xent_loss, (a, b, scale))
    moved = [torch.where(swap, x, y)[order].detach().requires_grad_() for x, y in ((b, a), (a, b))]
    with small_tiles(edge, edge):
        got = loss_and_gradients(nt_xent_loss, (*moved, scale))
    expected = [loss, torch.where(swap, db, da)[order], torch.where(swap, da, db)[order], dscale]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), N=st.integers(1, 60), edge=st.integers(1, 45))
def test_names_of_labels_and_order_do_not_matter(seed: int, N: int, edge: int) -> None:
    torch.manual_seed(seed)
    features, _, scale = views(N, 5)
    labels, order = torch.randint(0, N // 3 + 1, (N,)), torch.randperm(N)
    loss, d, dscale = loss_and_gradients(by_labels(labels), (features, scale))
    renamed = (torch.randperm(N)[labels] * 2**40 - 2**45)[order]
    with small_tiles(edge, edge):
        moved = features[order].detach().requires_grad_()
        got = loss_and_gradients(by_labels(renamed), (moved, scale))
    torch.testing.assert_close(got, [loss, d[order], dscale], rtol=1e-10, atol=1e-13)


def plain_nt_xent(a: Tensor, b: Tensor, logit_scale: Tensor) -> Tensor:
    """What a person writes without this library, in the dtype of the features throughout."""
    z, B = torch.cat((a, b)), len(a)
    logits = logit_scale.to(z.dtype) * z @ z.T
    logits = logits.masked_fill(torch.eye(2 * B, dtype=torch.bool), -torch.inf)
    return cross_entropy(logits, torch.arange(2 * B).roll(B))


def plain_sup_con(features: Tensor, logit_scale: Tensor, *, labels: Tensor) -> Tensor:
    logits = logit_scale.to(features.dtype) * features @ features.T
    self_pairs = torch.eye(len(features), dtype=torch.bool)
    log_share = logits.masked_fill(self_pairs, -torch.inf).log_softmax(1)
    positives = (labels[:, None] == labels) & ~self_pairs
    total = log_share.where(positives, 0).sum(1)
    return -(total / positives.sum(1).to(features.dtype)).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", ["random", "gap", "collapse"])
@pytest.mark.parametrize("name", ["nt_xent", "sup_con"])
def test_error_budget(dtype: torch.dtype, make: str, name: str) -> None:
    """No further from fp64 than plain PyTorch in the same dtype, plus a few roundings."""
    a, b, scale = clustered_inputs(
        {"random": 0.0, "gap": -0.6, "collapse": 0.9}[make], 65, 64, dtype
    )
    labels = (torch.arange(130) // 2) % 33
    leaves = [a, b, scale]
    ours: Any = nt_xent_loss
    reference: Any = partial(nt_xent_loss, impl="reference")
    plain: Any = plain_nt_xent
    if name == "sup_con":
        leaves = [torch.cat((a, b)).detach().requires_grad_(), scale]
        ours, reference = by_labels(labels), by_labels(labels, impl="reference")
        plain = partial(plain_sup_con, labels=labels)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = loss_and_gradients(reference, exact)
    budget = relative_errors(loss_and_gradients(plain, leaves), truth)
    got = relative_errors(loss_and_gradients(ours, leaves), truth)
    tolerance = 4 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    assert all(error <= plain + tolerance for error, plain in zip(got, budget, strict=True))
    assert max(got[0], got[-1]) < 1e-5


def test_small_loss_keeps_its_digits() -> None:
    """Partners are alike, all others orthogonal: the loss is far below the precision of a logit."""
    q = torch.eye(6)
    expected = math.log1p(10 * math.exp(-40.0))
    assert nt_xent_loss(q, q, 40.0).item() == pytest.approx(expected, rel=1e-6)


def test_views_of_two_dtypes() -> None:
    a, b = unit(5, 4).bfloat16().requires_grad_(), unit(5, 4).float().requires_grad_()
    loss = nt_xent_loss(a, b, 3.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert a.grad is not None and a.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, nt_xent_loss(a.float(), b, 3.0, impl="reference"))


def test_other_views_are_no_copies_of_clip() -> None:
    """NT-Xent has 2B - 2 negatives a row, CLIP B - 1: both are right for what they are."""
    a, b, scale = views(30, 6)
    assert nt_xent_loss(a, b, scale) > clip_loss(a, b, scale) + 0.3


EYE = torch.eye(3)
THREE = torch.arange(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((EYE.int(), EYE, 1.0), {}, TypeError, "features_a: expected float16.*int32; convert"),
        ((EYE, None, 1.0), {}, TypeError, "features_b: expected a tensor, got NoneType"),
        ((EYE, EYE[:2], 1.0), {}, ValueError, r"features_b: .*\(3, 3\), got \(2, 3\); row i"),
        ((EYE, EYE.to("meta"), 1.0), {}, ValueError, "features_b: .*cpu, got meta; move one"),
        ((EYE, EYE, [1.0]), {}, TypeError, "logit_scale: expected a number.*got list; pass"),
        (
            (EYE, EYE, 1.0),
            {"tau_plus": 1.5},
            ValueError,
            "tau_plus: expected a share.*1.5; 0 turns",
        ),
        ((EYE, EYE, 1.0), {"impl": "cpu"}, ValueError, "impl: expected .*got 'cpu'; use"),
    ],
)
def test_bad_views_are_named(
    arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        nt_xent_loss(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((EYE[None], THREE, 1.0), {}, ValueError, r"features: .*\(B, D\).*got shape .*; pool"),
        ((EYE[:0], THREE[:0], 1.0), {}, ValueError, "features: expected a non-empty"),
        ((EYE, THREE.tolist(), 1.0), {}, TypeError, "labels: expected a tensor.*list; convert"),
        ((EYE, THREE.double(), 1.0), {}, TypeError, "labels: expected .*float64; convert"),
        ((EYE, THREE[:2], 1.0), {}, ValueError, r"labels: expected shape \(3,\), got \(2,\); one"),
        ((EYE, THREE.to("meta"), 1.0), {}, ValueError, "labels: .*device cpu, got meta; move"),
        ((EYE, THREE, "x"), {}, TypeError, "logit_scale: expected a number.*got str; pass"),
        ((EYE, THREE, 1.0), {"impl": "cpu"}, ValueError, "impl: expected .*got 'cpu'; use"),
    ],
)
def test_bad_rows_are_named(
    arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sup_con_loss(*arguments, **options)
