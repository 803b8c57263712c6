"""What losses compute over vectors: counts, group sums, smoothing, and losses from statistics."""

from __future__ import annotations

import inspect
import math
import pickle
from collections import Counter
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from clip_inputs import clustered_inputs, loss_and_gradients, relative_errors, unit
from hypothesis import given, settings
from torch import Tensor

from gradcache_clip import ops
from gradcache_clip.ops import clip_loss, info_nce_loss, sup_con_loss
from gradcache_clip.ops.groups import dense_groups, group_sums, occurrences
from gradcache_clip.ops.smoothing import mean_logits
from gradcache_clip.ops.softmax import (
    Direction,
    debiased,
    many_positives_loss,
    negative_lse_minus_positive,
    one_positive_loss,
)

SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
EXTREMES = [-(2**63), 2**63 - 1, 0, -1, 7]
integers = st.sampled_from(EXTREMES) | st.integers(-3, 3)


@given(values=st.lists(integers, min_size=1), among=st.lists(integers, min_size=1))
def test_occurrences(values: list[int], among: list[int]) -> None:
    count = Counter(among)
    got = occurrences(torch.tensor(values), torch.tensor(among))
    assert got.tolist() == [count[value] for value in values]


@given(pairs=st.lists(st.tuples(integers, integers), min_size=1, max_size=30))
def test_dense_groups_are_equal_where_all_numbers_are(pairs: list[tuple[int, int]]) -> None:
    first, second = (torch.tensor(numbers) for numbers in zip(*pairs, strict=True))
    for keys, group in (
        (pairs, dense_groups(first, second)),
        (first.tolist(), dense_groups(first)),
    ):
        numbers = group.tolist()
        assert len(set(zip(keys, numbers, strict=True))) == len(set(keys)) == len(set(numbers))
        assert min(numbers) == 0 and max(numbers) < len(keys)


def test_group_sums() -> None:
    features, group = unit(40, 5).requires_grad_(), torch.randint(0, 12, (40,))
    got = group_sums(features, group)
    expected = torch.stack([features[group == g].sum(0) for g in group])
    torch.testing.assert_close(got, expected)
    weights = torch.randn(40, 5, dtype=torch.float64)
    gradients = [torch.autograd.grad((x * weights).sum(), features) for x in (got, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("identified", [False, True])
def test_mean_logit_over_what_competes(labelled: bool, identified: bool) -> None:
    B, scale = 23, torch.tensor(9.0, dtype=torch.float64)
    q, k = unit(B, 4), unit(B, 4)
    labels = torch.randint(0, 9, (B,)) if labelled else torch.arange(B)
    ids = torch.randint(0, 5, (B,)) if identified else torch.arange(B) + 100
    competes = (labels[:, None] == labels) | (ids[:, None] != ids)
    S = scale * q @ k.T
    expected = torch.stack([row[mask].mean() for row, mask in zip(S, competes, strict=True)])
    options = (labels if labelled else None, ids if identified else None)
    torch.testing.assert_close(mean_logits(q, k, scale, *options), expected)


@pytest.mark.parametrize("dtype", [*SIGNED, torch.uint8])
def test_any_integers_are_labels_and_ids(dtype: torch.dtype) -> None:
    """Numbers are compared, never computed with: a narrow dtype must not overflow."""
    q, k, scale = unit(12, 4), unit(12, 4), 5.0
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    labels = torch.tensor([low, high, 0, 1, 2, low, high, 3, 3, 4, 5, 6]).to(dtype)
    ids = torch.tensor([high, low, 0, 0, 1, 2, 3, high, 4, low, 5, 5]).to(dtype)
    wide = {"labels": labels.long(), "ids": ids.long()}
    narrow = {"labels": labels, "ids": ids}
    assert torch.equal(sup_con_loss(q, labels, scale), sup_con_loss(q, wide["labels"], scale))
    for options in ({}, {"label_smoothing": 0.1}):
        for names in (["labels"], ["ids"], ["labels", "ids"]):
            got = clip_loss(q, k, scale, **options, **{name: narrow[name] for name in names})
            expected = clip_loss(q, k, scale, **options, **{name: wide[name] for name in names})
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [*SIGNED, torch.uint8])
def test_hard_negatives_without_ids_stay_negatives(dtype: torch.dtype) -> None:
    """Whatever numbers the documents have, the least and the largest of the dtype among them."""
    q, k, negatives, scale = unit(5, 4), unit(5, 4), unit(6, 4), 5.0
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    ids = torch.tensor([low, high, 2, 3, 4]).to(dtype)
    got = info_nce_loss(q, k, scale, hard_negatives=negatives, ids=ids)
    torch.testing.assert_close(got, info_nce_loss(q, k, scale, hard_negatives=negatives))


def direction(positive: float, logits: list[float]) -> Direction:
    peak = max(logits, default=-math.inf)
    total = sum(math.exp(x - peak) for x in logits)
    numbers = (positive, peak, total, positive, peak)
    return Direction(*(torch.tensor([x], dtype=torch.float64) for x in numbers))


@settings(max_examples=50)
@given(positive=st.floats(-300, 300), logits=st.lists(st.floats(-300, 300), max_size=6))
def test_cross_entropy_from_statistics(positive: float, logits: list[float]) -> None:
    each = direction(positive, logits)
    everything = torch.tensor([positive, *logits], dtype=torch.float64)
    expected = -everything.log_softmax(0)[:1]
    got = one_positive_loss(negative_lse_minus_positive(each))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert each.accuracy() == float(all(positive > x for x in logits))


def test_small_losses_keep_their_digits() -> None:
    """One logarithm of all, less the positive, would give 0."""
    loss = one_positive_loss(negative_lse_minus_positive(direction(40.0, [0.0, 0.0, -1.0])))
    expected = math.log1p((2 + math.exp(-1)) * math.exp(-40.0))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("positive", [3.0, -200.0])
def test_no_negatives(positive: float) -> None:
    """Loss 0, and a gradient of 0 rather than NaN."""
    each = Direction(*(x.requires_grad_() for x in direction(positive, [])))
    loss = one_positive_loss(negative_lse_minus_positive(each))
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (each.positive, each.total)):
        assert gradient.item() == 0


def test_rows_without_positives_lose_nothing() -> None:
    each = direction(0.0, [1.0, 2.0])
    positives = torch.tensor([0])
    assert many_positives_loss(each, positives).item() == 0
    assert many_positives_loss(direction(0.0, []), positives).item() == 0


def chuang(p: Tensor, negatives: Tensor, scale: Tensor, tau_plus: float) -> Tensor:
    """Equation 8 in probabilities; with M = 1 the positive itself is the sample of positives."""
    g = (negatives.exp().mean() - tau_plus * p.exp()) / (1 - tau_plus)
    g = torch.maximum(g, torch.exp(-scale))
    return -(p.exp() / (p.exp() + len(negatives) * g)).log()


@pytest.mark.parametrize("tau_plus", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("scale", [1.0, 2.0, 10.0])
def test_debiased_equals_the_equation(tau_plus: float, scale: float) -> None:
    """Both where the correction holds and where its floor does."""
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    floored = 0
    for cosine in (-0.9, -0.2, 0.3, 0.99):
        cosines = torch.rand(7, dtype=torch.float64) - 0.5
        p, negatives = s * cosine, s * cosines
        difference = (negatives.logsumexp(0) - p)[None]
        got = one_positive_loss(debiased(difference, p[None], 7, s, tau_plus))[0]
        expected = chuang(p, negatives, s, tau_plus)
        floored += bool(negatives.exp().mean() < tau_plus * p.exp() + (1 - tau_plus) * (-s).exp())
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-15)
        ours, theirs = (torch.autograd.grad(x, s, retain_graph=True) for x in (got, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    if tau_plus == 0.5 and scale == 10:
        assert 0 < floored < 4


@pytest.mark.parametrize("scale", [2.0, 20.0, 100.0])
def test_debiasing_in_single_precision(scale: float) -> None:
    """In logarithms throughout: equation 8 in probabilities overflows at a scale of 100."""
    q, k, s = clustered_inputs(0.7, 130, 32, torch.float64)
    leaves = [q, k, torch.full_like(s, scale).requires_grad_()]
    single = [leaf.detach().float().requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in single]
    for symmetric in (False, True):
        loss = partial(info_nce_loss, tau_plus=0.1, symmetric=symmetric)
        truth = loss_and_gradients(partial(loss, impl="reference"), exact)
        assert max(relative_errors(loss_and_gradients(loss, single), truth)) < 2e-4


def test_debiased_without_negatives_is_zero() -> None:
    """N = 0 in equation 8: nothing competes with the positive."""
    one, scale = unit(1, 4), 3.0
    assert info_nce_loss(one, one, scale, tau_plus=0.1).item() == 0
    q, k = unit(5, 4), unit(5, 4)
    ids = torch.zeros(5, dtype=torch.int64)
    assert info_nce_loss(q, k, scale, ids=ids, tau_plus=0.1, symmetric=True).item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_debiasing_hides_no_bad_number(bad: float) -> None:
    difference, positive = torch.tensor([bad, 0.0]), torch.tensor([1.0, 1.0])
    loss = one_positive_loss(debiased(difference, positive, 5, torch.tensor(2.0), 0.1))
    assert not loss[0].isfinite() and loss[1].isfinite()


@pytest.mark.parametrize("name", ["clip", "info_nce", "nt_xent", "sup_con", "late_interaction"])
def test_the_loss_alone_has_the_signature_of_loss_and_accuracy(name: str) -> None:
    alone, both = (getattr(ops, f"{name}_loss{suffix}") for suffix in ("", "_with_accuracy"))
    signatures = inspect.signature(alone), inspect.signature(both)
    assert signatures[0].parameters == signatures[1].parameters
    assert signatures[0].return_annotation == "Float[Tensor, '']"
    assert signatures[1].return_annotation.endswith("Output")
    assert f"`{name}_loss_with_accuracy` alone" in alone.__doc__
    assert pickle.loads(pickle.dumps(alone)) is alone
