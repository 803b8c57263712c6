"""InfoNCE: the reference against loops, the tiles against the reference, and the options."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
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
    RetrievalOutput,
    clip_loss,
    info_nce_loss,
    info_nce_loss_with_accuracy,
)

NEGATIVES = ["none", "shared", "own"]
IDS = ["none", "documents", "all"]
MARGIN_AND_TAU = [(None, 0.0), (0.2, 0.0), (-0.3, 0.0), (None, 0.15)]
COMBINATIONS = [
    each
    for each in itertools.product(NEGATIVES, IDS, MARGIN_AND_TAU, [False, True])
    if each[1] != "all" or each[0] == "shared"
]
SHARED, OWN = 11, 3


@pytest.fixture(autouse=True)
def _many_tiles() -> Iterator[None]:
    with small_tiles(24, 40):
        yield


def make(
    combination: tuple[Any, ...], B: int, D: int, *, scale: float = 6.0
) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves (queries, documents, scale, hard negatives if any), and the options."""
    negatives, ids, (margin, tau_plus), symmetric = combination
    # Above B / 3 documents share an id with another one; each row keeps some negatives.
    numbers = torch.randint(0, B // 3 + 2, (B + SHARED,))
    numbers[:2] = torch.arange(min(2, B))
    leaves = [unit(B, D), unit(B, D), torch.tensor(scale, dtype=torch.float64)]
    if negatives != "none":
        leaves.append(unit(SHARED, D) if negatives == "shared" else unit(B, OWN, D))
    options = {
        "ids": {"none": None, "documents": numbers[:B], "all": numbers}[ids],
        "false_negative_margin": margin,
        "tau_plus": tau_plus,
        "symmetric": symmetric,
    }
    return [leaf.requires_grad_() for leaf in leaves], options


def result(leaves: list[Tensor], options: dict[str, Any], impl: Any) -> list[Tensor]:
    """Loss, gradients, accuracies."""
    negatives = leaves[3] if len(leaves) > 3 else None
    got = info_nce_loss_with_accuracy(*leaves[:3], hard_negatives=negatives, **options, impl=impl)
    assert (got.document_to_query_accuracy is None) == (not options["symmetric"])
    gradients = torch.autograd.grad(-1.5 * got.loss, leaves)
    return [got.loss.detach(), *gradients, *(x for x in got[1:] if x is not None)]


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_equals_the_loops(combination: tuple[Any, ...]) -> None:
    leaves, options = make(combination, 7, 4)
    negatives = leaves[3] if len(leaves) > 3 else None
    loss, *accuracies = loop_losses.info_nce(*leaves[:3], hard_negatives=negatives, **options)
    gradients = torch.autograd.grad(-1.5 * loss, leaves)
    expected = [loss.detach(), *gradients, *accuracies]
    for impl in ("reference", "tiled"):
        with small_tiles(3, 5):
            got = result(leaves, options, impl)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
@pytest.mark.parametrize(("B", "D"), [(1, 3), (2, 5), (24, 7), (65, 33)])
def test_tiles_equal_the_reference(combination: tuple[Any, ...], B: int, D: int) -> None:
    leaves, options = make(combination, B, D)
    with poisoned_memory():
        got = result(leaves, options, "tiled")
    expected = result(leaves, options, "reference")
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_symmetric_without_negatives_is_the_clip_loss() -> None:
    (q, k, scale), _ = make(COMBINATIONS[0], 50, 7)
    got = info_nce_loss_with_accuracy(q, k, scale, symmetric=True, impl="tiled")
    assert isinstance(got, RetrievalOutput)
    assert torch.equal(got.loss, clip_loss(q, k, scale, impl="tiled"))


def test_symmetric_is_the_mean_of_both_directions() -> None:
    """Hard negatives compete for queries only."""
    (q, k, scale, shared), _ = make(("shared", "none", (None, 0.0), True), 50, 7)
    there = info_nce_loss(q, k, scale, hard_negatives=shared)
    back = info_nce_loss(k, q, scale)
    got = info_nce_loss(q, k, scale, hard_negatives=shared, symmetric=True)
    torch.testing.assert_close(got, (there + back) / 2)


@pytest.mark.parametrize("tau_plus", [0.0, 0.1])
def test_own_negatives_of_all_equal_are_shared_ones(tau_plus: float) -> None:
    (q, k, scale, shared), _ = make(("shared", "none", (None, 0.0), True), 20, 7)
    own = shared.expand(20, *shared.shape)
    losses = [
        info_nce_loss(q, k, scale, hard_negatives=negatives, tau_plus=tau_plus)
        for negatives in (shared, own)
    ]
    torch.testing.assert_close(*losses)


def test_an_id_removes_documents_and_hard_negatives() -> None:
    q, k = unit(4, 5), unit(4, 5)
    shared = torch.cat((k[:1], unit(2, 5)))
    ids = torch.tensor([0, 1, 2, 3, 0, 8, 1])
    got = info_nce_loss(q, k, 6.0, hard_negatives=shared, ids=ids)
    S = 6.0 * q @ torch.cat((k, shared)).T
    keep = torch.ones(4, 7, dtype=torch.bool)
    keep[0, 4] = keep[1, 6] = False
    expected = cross_entropy(S.masked_fill(~keep, -torch.inf), torch.arange(4))
    torch.testing.assert_close(got, expected)


def test_margin_is_one_of_similarities() -> None:
    """Documents of similarity 0.5, 0.59 and 0.61 to all queries: 0.61 is out for 0.5."""
    cosines = torch.tensor([0.5, 0.59, 0.61])
    q, k = torch.eye(1, 8).expand(3, 8), cosines[:, None] * torch.eye(1, 8)
    got = info_nce_loss(q, k, 10.0, false_negative_margin=0.1)
    logits = 10 * cosines
    log_sums = torch.stack([logits[:2].logsumexp(0), logits.logsumexp(0), logits.logsumexp(0)])
    torch.testing.assert_close(got, (log_sums - logits).mean())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("why", ["ids", "margin", "one pair"])
def test_without_negatives_loss_and_gradients_are_zero(
    symmetric: bool, impl: Any, why: str
) -> None:
    B = 1 if why == "one pair" else 50
    leaves, _ = make(COMBINATIONS[0], B, 6)
    options: dict[str, Any] = {"symmetric": symmetric, "impl": impl}
    if why == "ids":
        options["ids"] = torch.full((B,), 9)
    if why == "margin":
        options["false_negative_margin"] = -2.5
    got = info_nce_loss_with_accuracy(*leaves, **options)
    assert got.loss == 0 and got.query_to_document_accuracy == 1
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(got.loss, leaves))


def test_reference_differentiates_twice_without_negatives() -> None:
    """Both documents have one id: nothing competes with either."""
    leaves = [unit(2, 3).requires_grad_(), unit(2, 3).requires_grad_()]
    ids = torch.zeros(2, dtype=torch.int64)
    loss = info_nce_loss(*leaves, 4.0, ids=ids, impl="reference")
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(gradient.sum() for gradient in gradients), leaves)
    assert all((gradient == 0).all() for gradient in second)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    combination=st.sampled_from(COMBINATIONS),
    rows=st.integers(1, 40),
    columns=st.integers(1, 60),
)
def test_order_and_tiles_do_not_matter(
    seed: int, combination: tuple[Any, ...], rows: int, columns: int
) -> None:
    torch.manual_seed(seed)
    leaves, options = make(combination, 30, 5)
    expected = result(leaves, options, "tiled")
    order = torch.randperm(30)
    ids = options["ids"]
    if ids is not None:
        options["ids"] = torch.cat((ids[:30][order], ids[30:]))
    own = combination[0] == "own"
    moved = [leaf[order] if leaf.shape[:1] == (30,) else leaf for leaf in leaves]
    with small_tiles(rows, columns):
        got = result([leaf.detach().requires_grad_() for leaf in moved], options, "tiled")
    for index in (1, 2, 4) if own else (1, 2):
        expected[index] = expected[index][order]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 29), max_size=4, unique=True), masked=st.booleans())
def test_queries_in_chunks(cuts: list[int], masked: bool) -> None:
    """Queries compete with all documents however they are cut: the loss is a mean over rows."""
    B = 30
    q, k = unit(B, 6), unit(B, 6)
    ids = torch.randint(0, 12, (B,)) if masked else torch.arange(B)
    total, edges = torch.zeros(()), [0, *sorted(cuts), B]
    for start, stop in itertools.pairwise(edges):
        own = torch.arange(start, stop)
        rest = torch.cat((torch.arange(start), torch.arange(stop, B)))
        options = {"hard_negatives": k[rest], "ids": torch.cat((ids[own], ids[rest]))}
        if len(rest) == 0:
            options = {"ids": ids}
        total = total + len(own) * info_nce_loss(q[own], k[own], 7.0, **options)
    torch.testing.assert_close(total / B, info_nce_loss(q, k, 7.0, ids=ids))


def plain(q: Tensor, k: Tensor, logit_scale: Tensor, negatives: Tensor) -> Tensor:
    """What a person writes without this library, in the dtype of the features throughout."""
    scaled = logit_scale.to(q.dtype) * q
    if negatives.ndim == 2:
        logits = scaled @ torch.cat((k, negatives)).T
    else:
        logits = torch.cat((scaled @ k.T, torch.einsum("bd,bkd->bk", scaled, negatives)), dim=1)
    return cross_entropy(logits, torch.arange(len(q)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make_inputs", ["random", "gap", "collapse"])
@pytest.mark.parametrize("own", [False, True])
def test_error_budget(dtype: torch.dtype, make_inputs: str, own: bool) -> None:
    cosine = {"random": 0.0, "gap": -0.6, "collapse": 0.9}[make_inputs]
    q, k, scale = clustered_inputs(cosine, 150, 64, dtype)
    negatives = k[80:].expand(80, 70, 64) if own else k[80:]
    leaves = [q[:80], k[:80], scale, negatives]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def ours(q: Tensor, k: Tensor, s: Tensor, n: Tensor, impl: Any = "tiled") -> Tensor:
        return info_nce_loss(q, k, s, hard_negatives=n, impl=impl)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = loss_and_gradients(lambda *x: ours(*x, impl="reference"), exact)
    budget = relative_errors(loss_and_gradients(plain, leaves), truth)
    got = relative_errors(loss_and_gradients(ours, leaves), truth)
    # Own negatives have an exponential sum of their own, whose rounding is common to all of them.
    tolerance = 4 * torch.finfo(dtype).eps + (8 if own else 1) * ROUNDED_LOGIT
    assert all(error <= plain + tolerance for error, plain in zip(got, budget, strict=True))
    # The scale's gradient through own negatives is a part of its own, and most of it cancels.
    assert got[0] < 1e-5 and got[3] < (5e-5 if own else 1e-5)


def test_hard_negatives_are_promoted_and_get_gradients_in_their_own_dtype() -> None:
    q, k = (unit(5, 64).bfloat16().requires_grad_() for _ in range(2))
    for shape in ((7, 64), (5, 3, 64)):
        negatives = unit(*shape).float().requires_grad_()
        loss = info_nce_loss(q, k, 30.0, hard_negatives=negatives)
        loss.backward()
        assert loss.dtype == torch.float32
        assert negatives.grad is not None and negatives.grad.dtype == torch.float32
        expected = info_nce_loss(q.float(), k.float(), 30.0, hard_negatives=negatives)
        torch.testing.assert_close(loss, expected)


EYE = torch.eye(3)
THREE = torch.arange(3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hard_negatives": [1]}, TypeError, "hard_negatives: expected a tensor, got list"),
        ({"hard_negatives": EYE.long()}, TypeError, "hard_negatives: .*int64; convert"),
        ({"hard_negatives": EYE[0]}, ValueError, r"\(H, 3\) .* or \(3, K, 3\).*got \(3,\); pass"),
        ({"hard_negatives": EYE[:, :2]}, ValueError, r"hard_negatives: .*got \(3, 2\); pass None"),
        ({"hard_negatives": EYE[None]}, ValueError, r"hard_negatives: .*got \(1, 3, 3\); pass"),
        ({"hard_negatives": torch.ones(2, 4, 3)}, ValueError, r"hard_negatives: .*\(3, K, 3\) for"),
        ({"hard_negatives": EYE[:0]}, ValueError, r"hard_negatives: .*got \(0, 3\); pass None"),
        ({"hard_negatives": EYE.to("meta")}, ValueError, "hard_negatives: .*got meta; move"),
        ({"ids": THREE.float()}, TypeError, "ids: expected a tensor of integers.*float32; convert"),
        ({"ids": THREE[:2]}, ValueError, r"ids: expected shape \(3,\), got \(2,\); one number"),
        (
            {"ids": THREE[:2], "hard_negatives": EYE[:2]},
            ValueError,
            r"ids: expected shape \(3,\) or \(5,\), got \(2,\); one number",
        ),
        ({"ids": THREE.to("meta")}, ValueError, "ids: expected device cpu, got meta; move"),
        ({"tau_plus": 1.0}, ValueError, "tau_plus: expected a share.*got 1.0; 0 turns it off"),
        ({"tau_plus": None}, ValueError, "tau_plus: expected a share.*got None; 0 turns it off"),
        ({"false_negative_margin": math.nan}, ValueError, "false_negative_margin: .*got nan; None"),
        ({"tau_plus": -0.1}, ValueError, "tau_plus: expected a share.*got -0.1; 0 turns it off"),
        (
            {"tau_plus": 0.1, "false_negative_margin": 0.1},
            ValueError,
            "tau_plus: expected 0 beside a false_negative_margin, got 0.1; .*choose one",
        ),
        ({"impl": "cuda"}, ValueError, "impl: expected .*got 'cuda'; use"),
    ],
)
def test_bad_options_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        info_nce_loss(EYE, EYE, 1.0, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((EYE.bool(), EYE, 1.0), TypeError, "queries: expected float16.*bool; convert"),
        ((EYE, EYE[:2], 1.0), ValueError, r"documents: .*queries \(3, 3\), got \(2, 3\); row i"),
        ((EYE.to_sparse(), EYE, 1.0), TypeError, "queries: expected a dense tensor.*to_dense"),
        ((EYE, EYE, None), TypeError, "logit_scale: expected a number.*NoneType; pass"),
    ],
)
def test_bad_input_is_named(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        info_nce_loss(*arguments)
