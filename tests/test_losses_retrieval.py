"""RetrievalLoss beside the whole matrices in fp64, and beside sentence-transformers' own loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gradcache_clip import MatryoshkaLoss
from gradcache_clip.losses import RetrievalLoss
from gradcache_clip.losses.retrieval_contrasts import DIRECTIONS

B, K, D = 6, 3, 8
SCALE = 7.0
HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
SETS = (DIRECTIONS[:1], DIRECTIONS[:2], DIRECTIONS[:3], DIRECTIONS)
ALONE = {"negatives_in_doc_to_doc": False}
WAYS = [*((each, "joint") for each in SETS), (DIRECTIONS[:2], "per_direction")]


def features(K: int = K, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, D), (B, D), (B, K, D)][: 3 if K else 2]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [each.requires_grad_() for each in made]


def further(K: int) -> dict[str, Any]:
    """Everything that can be said of the rows."""
    generator = torch.Generator().manual_seed(1)
    double = {"generator": generator, "dtype": torch.float64}
    guides = [(B, 5), (B, 5), (B, K, 5)][: 3 if K else 2]
    return {
        "ids": torch.tensor([5, -1, 5, 2, 9, 2]),
        "groups": torch.tensor([0, 0, 0, 7, 0, 7]),
        "column_bias": torch.randn(B, 1 + K, **double, requires_grad=True),
        "guide": tuple(normalize(torch.randn(each, **double), dim=-1) for each in guides),
        "row_weights": torch.rand(B, **double),
    }


def whole(
    given: Sequence[Tensor],
    scale: Tensor,
    *,
    directions: Sequence[str] = DIRECTIONS[:1],
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    in_batch_negatives: bool = True,
    share_hard_negatives: bool = True,
    negatives_in_doc_to_doc: bool = True,
    guide_margin: float = 0.0,
    relative_guide_margin: bool = False,
    ids: Tensor | None = None,
    groups: Tensor | None = None,
    column_bias: Tensor | None = None,
    guide: Sequence[Tensor] | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """As the docstring of the loss has it, with every matrix in memory."""
    q, d, *rest = (normalize(each, dim=-1) for each in given)
    own = rest[0] if rest else q.new_empty(B, 0, D)
    rows = torch.arange(B)
    # Candidates: the documents, then the hard negatives query by query.
    candidates = torch.cat((d, own.flatten(0, 1)))
    owner = torch.cat((rows, rows.repeat_interleave(own.shape[1])))
    is_document, mine = torch.arange(len(owner)) < B, owner == rows[:, None]
    pair = mine & is_document
    names, kinds = (rows if ids is None else ids), (0 * rows if groups is None else groups)
    of_other_group = kinds[owner] != kinds[:, None]
    of_same_id = names[owner] == names[:, None]
    bias = torch.zeros(B, 1 + own.shape[1], dtype=q.dtype)
    if column_bias is not None:
        bias = column_bias.view(B, -1)
    biases = torch.cat((bias[:, 0], bias[:, 1:].flatten()))
    gq = gd = torch.zeros(B, 1, dtype=q.dtype)
    gc = torch.zeros(len(owner), 1, dtype=q.dtype)
    limit = torch.full((B, 1), torch.inf, dtype=q.dtype)
    if guide is not None:
        gq, gd = guide[:2]
        gc = torch.cat((gd, *(each.flatten(0, 1) for each in guide[2:])))
        similar = (gq * gd).sum(1, keepdim=True)
        limit = similar - guide_margin * (similar.abs() if relative_guide_margin else 1.0)

    cosine, strength = q @ candidates.T, torch.zeros(B, len(owner), dtype=q.dtype)
    if hardness_mode in ("in_batch_negatives", "all_negatives"):
        strength[~mine] = hardness_strength
    if hardness_mode in ("hard_negatives", "all_negatives"):
        strength[mine & ~is_document] = hardness_strength
    seen = torch.full_like(mine, share_hard_negatives) | is_document | mine
    if not in_batch_negatives:
        seen = mine
    out = (of_same_id & ~mine) | of_other_group | ((gq @ gc.T > limit) & ~pair) | ~seen
    parts = {}
    logits = scale * cosine + biases + strength * cosine.detach()
    parts["query_to_doc"] = logits.masked_fill(out, -torch.inf)
    positive = (scale * cosine + biases)[:, :B].diagonal()
    out = ((of_same_id & ~mine) | of_other_group)[:, :B] | ((gd @ gq.T > limit) & ~mine[:, :B])
    parts["doc_to_query"] = (scale * d @ q.T + bias[:, :1]).masked_fill(out, -torch.inf)
    out = (of_same_id | of_other_group)[:, :B] | (gq @ gq.T > limit)
    parts["query_to_query"] = (scale * q @ q.T).masked_fill(out, -torch.inf)
    out = of_same_id | of_other_group | (gd @ gc.T > limit)
    shared = share_hard_negatives and negatives_in_doc_to_doc
    out |= ~(torch.full_like(out, shared) | is_document)
    parts["doc_to_doc"] = (scale * d @ candidates.T + biases).masked_fill(out, -torch.inf)

    z = [parts[name].logsumexp(1) for name in directions]
    total = torch.stack(z).logsumexp(0) if partition_mode == "joint" else torch.stack(z).mean(0)
    weights = torch.ones(B, dtype=q.dtype) if row_weights is None else row_weights
    return ((total - positive) * weights).sum() / weights.sum()


def compare(given: list[Tensor], impl: str, calls: dict[str, Any], options: dict[str, Any]) -> None:
    loss = RetrievalLoss(init_logit_scale=SCALE, impl=impl, **options).double()
    learned = [calls["column_bias"]] if "column_bias" in calls else []
    inputs = [*given, loss.log_logit_scale, *learned]
    got = loss(*given, **calls).loss
    want = whole(given, loss.log_logit_scale.exp(), **options, **calls)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("mode", HARDNESS)
@pytest.mark.parametrize(("directions", "partition"), WAYS)
def test_equals_the_whole_matrices(
    directions: Sequence[str], partition: str, mode: str | None, impl: str
) -> None:
    options = {"directions": directions, "partition_mode": partition, "hardness_mode": mode}
    options["hardness_strength"] = 2.5 if mode else 0.0
    for K_, share, calls in product((0, K), (True, False), (False, True)):
        given = further(K_) if calls else {}
        compare(features(K_), impl, given, {**options, "share_hard_negatives": share})


@pytest.mark.parametrize("name", ["ids", "groups", "column_bias", "guide"])
@pytest.mark.parametrize("K", [0, K])
def test_each_rule_alone(name: str, K: int) -> None:
    plain, given = {"directions": DIRECTIONS}, {name: further(K)[name]}
    margin = {"guide_margin": 0.1} if name == "guide" else {}
    compare(features(K), "tiled", given, {**plain, **margin})
    compare(features(K), "tiled", given, {**plain, **margin, **ALONE})
    if margin:
        compare(features(K), "tiled", given, {**plain, **margin, "relative_guide_margin": True})
    # What is said of the rows must matter.
    build = partial(RetrievalLoss, init_logit_scale=SCALE, **plain)
    with_rule = build(**margin).double()(*features(K), **given).loss
    assert abs(with_rule - build().double()(*features(K)).loss) > 1e-3


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_copies_of_a_document_are_negatives_whatever_the_rounding(impl: str) -> None:
    """The guide's similarity of a copy is that of the pair, which it does not exceed."""
    generator = torch.Generator().manual_seed(2)
    rows = normalize(torch.randn(64, 384, generator=generator), dim=1)
    queries, documents = rows, normalize(rows.roll(1, 1), dim=1)[:1].expand(64, -1)
    loss = RetrievalLoss(init_logit_scale=1.0, impl=impl)
    got = loss(queries, documents, guide=(queries, documents.contiguous())).loss
    torch.testing.assert_close(got, torch.tensor(64.0).log())


@pytest.mark.parametrize("mode", HARDNESS)
def test_own_negatives_alone(mode: str | None) -> None:
    options = {"in_batch_negatives": False, "hardness_mode": mode}
    options["hardness_strength"] = 2.5 if mode else 0.0
    compare(features(), "tiled", {}, options)
    given = {name: further(K)[name] for name in ("column_bias", "guide", "row_weights")}
    compare(features(), "tiled", given, options)


@pytest.mark.parametrize("in_batch", [True, False])
def test_nothing_competes_with_some_queries(in_batch: bool) -> None:
    """Their gradients are zero, and not NaN."""
    bias = further(K)["column_bias"].detach()
    bias[:2, 1:] = -torch.inf
    given = {"column_bias": bias.requires_grad_(), "groups": torch.arange(B)}
    directions = DIRECTIONS if in_batch else DIRECTIONS[:1]
    options = {"in_batch_negatives": in_batch, "directions": directions}
    compare(features(), "tiled", given, {**options, "share_hard_negatives": False})


@pytest.mark.parametrize("mode", HARDNESS)
@pytest.mark.parametrize(("directions", "partition"), WAYS)
def test_equals_sentence_transformers(
    directions: Sequence[str], partition: str, mode: str | None
) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    options = {"directions": directions, "partition_mode": partition, "hardness_mode": mode}
    options["hardness_strength"] = 2.5 if mode else 0.0
    theirs = losses.CachedMultipleNegativesRankingLoss(
        nn.Sequential(nn.Identity()), scale=SCALE, mini_batch_size=B, **options
    )
    given = features()
    loss = RetrievalLoss(init_logit_scale=SCALE, impl="tiled", **options).double()
    got = loss(*given).loss
    parts = [given[0], given[1], *given[2].unbind(1)]
    want = theirs.calculate_loss([[each] for each in parts])
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    for a, b in zip(torch.autograd.grad(got, given), torch.autograd.grad(want, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_prefixes_are_the_losses_of_normalised_prefixes() -> None:
    options = {"directions": DIRECTIONS, "hardness_mode": "all_negatives", "hardness_strength": 3.0}
    given, widths, weights = features(), [3, D], [2.0, 0.5]
    bias = further(K)["column_bias"]
    inner = RetrievalLoss(init_logit_scale=SCALE, impl="tiled", **options).double()
    got = MatryoshkaLoss(inner, widths, weights)(*given, column_bias=bias).loss
    scale = inner.log_logit_scale.exp()
    want = sum(
        weight * whole([each[..., :width] for each in given], scale, column_bias=bias, **options)
        for width, weight in zip(widths, weights, strict=True)
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    inputs = [*given, inner.log_logit_scale, bias]
    for a, b in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_matrix_of_negatives_belongs_query_by_query() -> None:
    queries, documents, own = features()
    loss = RetrievalLoss(share_hard_negatives=False).double()
    flat = own.flatten(0, 1)
    got = loss(queries, documents, flat, negatives_per_query=K).loss
    assert got == loss(queries, documents, own).loss
    with pytest.raises(ValueError, match=r"hard_negatives: expected \(6, K, 8\), or \(6 \* K, 8\)"):
        loss(queries, documents, flat)
    with pytest.raises(ValueError, match=r"got \(18, 8\) with negatives_per_query=2"):
        loss(queries, documents, flat, negatives_per_query=2)
    with pytest.raises(ValueError, match=r"negatives_per_query: expected a positive .* got 3\.0"):
        loss(queries, documents, flat, negatives_per_query=3.0)
    with pytest.raises(ValueError, match="negatives_per_query: expected None without"):
        loss(queries, documents, negatives_per_query=2)


def test_accuracies_count_similarities_and_not_what_hardness_adds() -> None:
    queries = torch.eye(4, dtype=torch.float64)
    documents = queries + 0.6 * queries.roll(1, 0)
    options = {"hardness_mode": "all_negatives", "hardness_strength": 50.0}
    loss = RetrievalLoss(directions=DIRECTIONS[:2], impl="tiled", **options).double()
    # A bias of all candidates changes no order.
    for bias in (None, torch.full((4,), -90.0)):
        out = loss(queries, documents, column_bias=bias)
        assert (out.query_to_document_accuracy, out.document_to_query_accuracy) == (1.0, 1.0)


@pytest.mark.parametrize("shared", [True, False])
def test_accuracies_count_the_bias_of_own_negatives_too(shared: bool) -> None:
    queries = torch.eye(4)
    loss = RetrievalLoss(share_hard_negatives=shared, init_logit_scale=1.0)
    for bias, accuracy in ((-9.0, 1.0), (9.0, 0.0)):
        column_bias = torch.tensor([0.0, bias]).expand(4, 2)
        out = loss(queries, queries, 0.5 * queries[:, None], column_bias=column_bias)
        assert out.query_to_document_accuracy == accuracy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": ("query_to_query",)}, "directions: expected query_to_doc, and any of"),
        (
            {"partition_mode": "both"},
            "partition_mode: expected 'joint' or 'per_direction'",
        ),
        (
            {"directions": DIRECTIONS, "partition_mode": "per_direction"},
            'partition_mode: expected "joint" with doc_to_doc and query_to_query',
        ),
        (
            {"hardness_mode": "hard"},
            "hardness_mode: expected None, 'in_batch_negatives'",
        ),
        ({"hardness_strength": 1.0}, "hardness_strength: expected 0 or more, and 0 without"),
        (
            {"hardness_mode": "all_negatives", "hardness_strength": math.nan},
            "hardness_strength: expected a finite number, got nan; such as 9.0",
        ),
        ({"guide_margin": math.nan}, "guide_margin: expected a finite number, got nan"),
        ({"directions": None}, "directions: expected query_to_doc, .* got None; pass a tuple"),
        ({"in_batch_negatives": "no"}, "in_batch_negatives: expected True or False, got 'no'"),
        ({"init_logit_scale": "7"}, "init_logit_scale: expected 0 < .* got 7"),
        (
            {"hardness_mode": "all_negatives", "hardness_strength": -1.0},
            "hardness_strength: expected 0 or more",
        ),
        (
            {"directions": DIRECTIONS[:2], "in_batch_negatives": False},
            "directions: expected query_to_doc alone with in_batch_negatives=False",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        RetrievalLoss(**options)


def test_a_guide_that_is_not_finite_does_not_go_unseen() -> None:
    queries, documents, _ = features()
    guide = queries.detach().clone()
    guide[2, 0] = torch.nan
    assert RetrievalLoss().double()(queries, documents, guide=(guide, guide)).loss.isnan()


def test_wrong_rows() -> None:
    queries, documents, _ = features()
    loss = RetrievalLoss().double()
    with pytest.raises(ValueError, match=r"row_weights: expected shape \(6,\), got \(5,\)"):
        loss(queries, documents, row_weights=torch.ones(5))
    with pytest.raises(ValueError, match="row_weights: expected constants, got a tensor that"):
        loss(queries, documents, row_weights=torch.ones(6, requires_grad=True))
    with pytest.raises(TypeError, match="row_weights: expected float16"):
        loss(queries, documents, row_weights=torch.ones(6, dtype=torch.long))
    with pytest.raises(ValueError, match="guide: expected features of queries, .* Tensor"):
        loss(queries, documents, guide=queries)
    with pytest.raises(ValueError, match="guide: expected features with guide_margin=0.1"):
        RetrievalLoss(guide_margin=0.1).double()(queries, documents)
    with pytest.raises(ValueError, match="hard_negatives: expected some with in_batch_negatives"):
        RetrievalLoss(in_batch_negatives=False).double()(queries, documents)
