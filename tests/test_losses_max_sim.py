"""MaxSim losses beside the whole matrix in fp64, written sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from clip_inputs import relative_errors
from torch import Tensor, nn
from torch.nn.functional import kl_div, normalize
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache_clip import (
    GradCache,
    LateInteractionLoss,
    MatryoshkaLoss,
    MaxSimDistillationLoss,
    MaxSimLoss,
)
from gradcache_clip.ops import late_interaction_tiled
from gradcache_clip.ops.late_interaction_op import TokenPasses, TokenRules
from gradcache_clip.ops.late_interaction_tiled import TorchPanels
from gradcache_clip.ops.pairing import SideGradient

B, K, D, SCALE = 7, 2, 6, 3.0
IMPLEMENTATIONS = "reference", "tiled"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several samples a tile, several tiles a batch, one document longer than a tile."""
    monkeypatch.setattr(late_interaction_tiled, "_SIDE", 8)
    monkeypatch.setattr(late_interaction_tiled, "_ELEMENTS", 60)


class Sample(NamedTuple):
    """Unit tokens of a query or document."""

    look: Tensor
    found: Tensor


def score(one: Sample, other: Sample, reduction: str) -> Tensor:
    best = (one.look @ other.found.T).amax(1)
    return best.sum() if reduction == "sum" else best.mean()


Candidates = list[tuple[Sample, Tensor]]
"""Samples, and what is added to their logits."""


def cross_entropies(
    rows: list[Sample], candidates: Callable[[int], Candidates], reduction: str, scale: Tensor
) -> Tensor:
    """The first candidate of a row is the right one."""
    losses = []
    for i, row in enumerate(rows):
        logits = [scale * score(row, each, reduction) + bias for each, bias in candidates(i)]
        losses.append(-torch.stack(logits).log_softmax(0)[0])
    return torch.stack(losses)


def one_by_one(
    queries: list[Sample],
    documents: list[Sample],
    negatives: list[list[Sample]],
    scale: Tensor,
    *,
    symmetric: bool = False,
    token_reduction: str = "sum",
    in_batch_negatives: bool = True,
    share_hard_negatives: bool = True,
    ids: Tensor | None = None,
    groups: Tensor | None = None,
    column_bias: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    ids = torch.arange(B) if ids is None else ids
    groups = torch.zeros(B) if groups is None else groups
    weights = torch.ones(B) if row_weights is None else row_weights
    bias = torch.zeros(B, 1 + K) if column_bias is None else column_bias.view(B, -1)

    def others(i: int) -> list[int]:
        return [j for j in range(B) if ids[j] != ids[i] and groups[j] == groups[i]]

    def candidates(i: int) -> Candidates:
        found = [(documents[j], bias[j, 0]) for j in (i, *others(i) * in_batch_negatives)]
        shared = share_hard_negatives and in_batch_negatives
        for j in (i, *others(i) * shared):
            found += zip(negatives[j], bias[j, 1:], strict=False)
        return found

    def asking(i: int) -> Candidates:
        return [(queries[j], bias[i, 0]) for j in (i, *others(i))]

    loss = cross_entropies(queries, candidates, token_reduction, scale)
    if symmetric:
        loss = (loss + cross_entropies(documents, asking, token_reduction, scale)) / 2
    return (loss * weights).sum() / weights.sum()


class Tokens(NamedTuple):
    """Arguments of a loss, and the same samples one by one."""

    arguments: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Tensor]
    samples: tuple[list[Sample], list[Sample], list[list[Sample]]]

    @property
    def rules(self) -> dict[str, Tensor]:
        return {name: each for name, each in self.options.items() if name in RULES}

    def gradients(self, value: Tensor, scale: Tensor) -> list[Tensor]:
        value = 2.5 * value
        return [value.detach(), *torch.autograd.grad(value, [*self.arguments, scale])]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def samples(
    tokens: Tensor, found: Tensor | None = None, look: Tensor | None = None
) -> list[Sample]:
    everything = torch.ones(tokens.shape[:2], dtype=torch.bool)
    found, look = (everything if mask is None else mask for mask in (found, look))
    unit = normalize(tokens, dim=2)
    rows = zip(unit, look, found, strict=True)
    return [Sample(row[looking], row[finding]) for row, looking, finding in rows]


def by_query(tokens: list[Sample]) -> list[list[Sample]]:
    return [tokens[i * K : (i + 1) * K] for i in range(B)]


def padded() -> Tokens:
    """Without masks: documents and hard negatives of different lengths."""
    queries, documents, negatives = leaf(B, 3, D), leaf(B, 5, D), leaf(B, K, 4, D)
    each = samples(queries), samples(documents), by_query(samples(negatives.flatten(0, 1)))
    return Tokens((queries, documents, negatives), {}, each)


def some(*shape: int) -> Tensor:
    mask = torch.rand(shape) < 0.4
    return mask.index_fill(-1, torch.tensor(shape[-1] - 1), True)


def masked(*, with_counts: bool = False) -> Tokens:
    """With counts: tokens that look and cannot be found, and the reverse."""
    queries, documents, negatives = leaf(B, 4, D), leaf(B, 9, D), leaf(B, K, 5, D)
    masks = {
        "query_mask": some(B, 4),
        "document_mask": some(B, 9),
        "hard_negative_mask": some(B, K, 5),
    }
    look = masks["query_mask"], masks["document_mask"]
    if with_counts:
        masks |= {"query_counts": some(B, 4).flip(1), "document_counts": some(B, 9).flip(1)}
        look = masks["query_counts"], masks["document_counts"]
    found = masks["hard_negative_mask"].flatten(0, 1)
    each = (
        samples(queries, masks["query_mask"], look[0]),
        samples(documents, masks["document_mask"], look[1]),
        by_query(samples(negatives.flatten(0, 1), found, found)),
    )
    return Tokens((queries, documents, negatives), masks, each)


def packed() -> Tokens:
    """One document and one hard negative are longer than a tile."""
    lengths = {
        "query_lengths": torch.randint(1, 5, (B,)),
        "document_lengths": torch.randint(1, 6, (B,)).index_fill(0, torch.tensor(3), 11),
        "hard_negative_lengths": torch.randint(1, 4, (B, K)).index_fill(0, torch.tensor(2), 9),
    }
    tokens = [leaf(int(each.sum()), D) for each in lengths.values()]
    one_by_one = [
        [Sample(x, x) for x in normalize(each, dim=1).split(lengths[name].flatten().tolist())]
        for each, name in zip(tokens, lengths, strict=True)
    ]
    each = one_by_one[0], one_by_one[1], by_query(one_by_one[2])
    return Tokens(tuple(tokens), lengths, each)


RULES = {
    "ids": torch.tensor([5, 2**40, 5, 3, 2**40, 5, 7]),
    "groups": torch.tensor([0, 0, 0, 0, 1, 1, 9]),
    "column_bias": torch.linspace(-1, 4, B * (1 + K), dtype=torch.float64).view(B, 1 + K).sin(),
    "row_weights": torch.linspace(0, 1, B),
}


def ruled(*names: str, make: Callable[[], Tokens] = masked) -> Callable[[], Tokens]:
    """With rules of who competes: by all of them one query has its own negatives alone."""

    def given() -> Tokens:
        tokens = make()
        return tokens._replace(options=tokens.options | {n: RULES[n] for n in names or RULES})

    return given


CASES: list[tuple[Callable[[], Tokens], dict[str, Any]]] = [
    (padded, {}),
    (padded, {"share_hard_negatives": False, "token_reduction": "mean"}),
    (masked, {}),
    (masked, {"symmetric": True, "token_reduction": "mean"}),
    (lambda: masked(with_counts=True), {"symmetric": True}),
    (lambda: masked(with_counts=True), {"symmetric": True, "token_reduction": "mean"}),
    (masked, {"share_hard_negatives": False}),
    (packed, {"token_reduction": "mean"}),
    (packed, {"symmetric": True, "share_hard_negatives": False}),
    (packed, {"in_batch_negatives": False}),
    (ruled("ids"), {}),
    (ruled("groups", "column_bias"), {"symmetric": True}),
    (ruled(), {"token_reduction": "mean"}),
    (ruled(make=packed), {"symmetric": True, "share_hard_negatives": False}),
    (ruled(make=packed), {"in_batch_negatives": False}),
]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_equals_the_whole_matrix(case: int, impl: Any) -> None:
    make, options = CASES[case]
    given, scale = make(), torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    loss = MaxSimLoss(impl=impl, **options)
    out = loss(*given.arguments, scale, **given.options)
    truth = given.gradients(one_by_one(*given.samples, scale, **options, **given.rules), scale)
    assert max(relative_errors(given.gradients(out.loss, scale), truth)) < 1e-10
    assert (out.document_to_query_accuracy is None) == (not loss.symmetric)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_expansion_tokens_look_and_are_not_looked_for(impl: Any) -> None:
    """ColBERT's query expansion: the attention mask leaves them out, the score does not."""
    given, scale = masked(), torch.tensor(SCALE, dtype=torch.float64)
    queries, documents, _ = given.arguments
    every = torch.ones(B, 4, dtype=torch.bool)
    masks = {name: given.options[name] for name in ("query_mask", "document_mask")}
    loss = MaxSimLoss(impl=impl)
    got = loss(queries, documents, None, scale, query_counts=every, **masks).loss
    masks.pop("query_mask")
    assert got == loss(queries, documents, None, scale, **masks).loss
    found = given.options["document_mask"]
    truth = one_by_one(samples(queries), samples(documents, found, found), [[]] * B, scale)
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_accuracies_count_queries_above_all_that_compete(impl: Any) -> None:
    tokens = torch.eye(8).view(4, 2, 8)
    hard = torch.zeros(4, 1, 1, 8)
    hard[2, 0, 0] = 3 * tokens[2].sum(0)
    given = tokens, tokens.roll(1, 0).lerp(tokens, 0.9), hard
    for shared, expected in ((True, 0.75), (False, 0.75)):
        loss = MaxSimLoss(impl=impl, share_hard_negatives=shared, normalize=False)
        assert loss(*given).query_to_document_accuracy == expected
    assert MaxSimLoss(impl=impl)(*given[:2]).query_to_document_accuracy == 1


def test_without_hard_negatives_it_is_late_interaction_one_way() -> None:
    given, scale = masked(), torch.tensor(SCALE, dtype=torch.float64)
    (queries, documents, _), masks = given.arguments, given.options
    other = LateInteractionLoss(one_way=True, token_reduction="sum")(
        documents,
        queries,
        scale,
        image_mask=masks["document_mask"],
        text_mask=masks["query_mask"],
    )
    masks.pop("hard_negative_mask")
    loss = MaxSimLoss()(queries, documents, None, scale, **masks).loss
    torch.testing.assert_close(loss, other.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("one_way", [True, False])
def test_rules_of_images_and_texts(one_way: bool, impl: Any) -> None:
    """One pair has nobody to compete with."""
    leaves = [leaf(B, 5, D), leaf(B, 3, D), torch.tensor(SCALE).double().requires_grad_()]
    rules = RULES | {"column_bias": RULES["column_bias"][:, 0]}
    loss = LateInteractionLoss(one_way=one_way, impl=impl)(*leaves, **rules).loss
    sides = samples(leaves[1]), samples(leaves[0]), [[]] * B
    options = {"symmetric": not one_way, "token_reduction": "mean", **rules}
    truth = one_by_one(*sides, leaves[2], **options)
    got, want = ([x.detach(), *torch.autograd.grad(x, leaves)] for x in (loss, truth))
    assert max(relative_errors(got, want)) < 1e-10


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("objective", ["kl", "margin_mse"])
@pytest.mark.parametrize("make", [padded, masked, packed])
def test_distillation_equals_the_formula(make: Any, objective: Any, impl: Any) -> None:
    given, scale = make(), torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(B, 1 + K, dtype=torch.float64)
    loss = MaxSimDistillationLoss(objective, teacher_scale=2.0, impl=impl)
    out = loss(*given.arguments, teacher, scale, **given.options)
    queries, documents, negatives = given.samples
    student = scale * torch.stack(
        [
            torch.stack([score(q, each, "sum") for each in (d, *hard)])
            for q, d, hard in zip(queries, documents, negatives, strict=True)
        ]
    )
    expected = (
        kl_div(student.log_softmax(1), (2 * teacher).softmax(1), reduction="none").sum(1).mean()
    )
    if objective == "margin_mse":
        margins = [each[:, :1] - each[:, 1:] for each in (student, 2 * teacher)]
        expected = (margins[0] - margins[1]).square().mean()
    truth, got = given.gradients(expected, scale), given.gradients(out.loss, scale)
    assert max(relative_errors(got, truth)) < 1e-10
    assert out.agreement == (student.argmax(1) == teacher.argmax(1)).double().mean()


class Largest(TorchDispatchMode):
    """Remembers the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return result


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Similarities of each tile that was computed, with tiles of at most 400."""
    monkeypatch.setattr(late_interaction_tiled, "_SIDE", 20)
    monkeypatch.setattr(late_interaction_tiled, "_ELEMENTS", 400)
    tiles: list[int] = []
    buffer = TorchPanels._buffer

    def recorded(self: TorchPanels, name: str, rows: int, columns: int) -> Tensor:
        if name == "similarity":
            tiles.append(rows * columns)
        return buffer(self, name, rows, columns)

    monkeypatch.setattr(TorchPanels, "_buffer", recorded)
    return tiles


@pytest.mark.parametrize("as_masks", [False, True])
def test_padding_costs_an_eighth_at_most(as_masks: bool, seen: list[int]) -> None:
    """One document of 90 tokens among short ones: padded to it, 22 times the work, not 9 / 8."""
    lengths = torch.randint(1, 5, (60,)).index_fill(0, torch.tensor(7), 90)
    queries, tokens = torch.randn(60, 3, D), torch.randn(int(lengths.sum()), D)
    options: dict[str, Tensor] = {"document_lengths": lengths}
    if as_masks:
        options = {"document_mask": torch.arange(90) < lengths[:, None]}
        tokens = torch.randn(60, 90, D)
    leaves = queries.requires_grad_(), tokens.requires_grad_()
    MaxSimLoss(impl="tiled")(*leaves, **options).loss.backward()
    assert 1 <= sum(seen) / (2 * int(lengths.sum()) * 60 * 3) <= 9 / 8
    assert max(seen) <= 400


def test_passes_over_packed_tokens_never_allocate_a_matrix(seen: list[int]) -> None:
    lengths = torch.randint(1, 5, (100,)).index_fill(0, torch.tensor(7), 90)
    stop = lengths.cumsum(0)
    images = torch.stack((stop - lengths, stop, stop))
    texts = torch.stack([torch.arange(100) * 3 + offset for offset in (0, 3, 3)])
    rules = TokenRules(None, None, False, "sum", image_spans=images, text_spans=texts)
    tokens, passes = torch.randn(1, int(lengths.sum()), D), TokenPasses("tiled")
    queries, scale = torch.randn(100, 3, D), torch.tensor(1.0)
    with Largest() as largest:
        found = passes.statistics(tokens, queries, scale, rules)
        sides = (SideGradient(peak, peak, peak) for peak in (found.row_max, found.column_max))
        passes.gradient(tokens, queries, scale, rules, *sides, (True,) * 3, None, tokens.dtype)
    # A stripe of at most 20 documents keeps its scores with all queries.
    assert largest.numel <= max(tokens.numel() + D, queries.numel(), 400, 20 * 100)
    assert max(seen) <= 400


def test_own_candidates_never_exceed_a_tile(seen: list[int]) -> None:
    queries, documents = (torch.randn(20, 3, D, requires_grad=True) for _ in range(2))
    negatives = torch.randn(20, 9, 7, D, requires_grad=True)
    with Largest() as largest:
        loss = MaxSimLoss(share_hard_negatives=False)(queries, documents, negatives).loss
        loss.backward()
    assert sum(seen) == 2 * (20 * 3 * 9 * 7 + (20 * 3) ** 2)
    assert max(seen) <= 400 and largest.numel == negatives.numel()


@pytest.mark.parametrize("shared", [True, False])
def test_error_budget_in_bf16(shared: bool) -> None:
    """No further from fp64 than plain PyTorch in bf16, plus a few roundings."""
    shapes = (12, 6, 32), (12, 9, 32), (12, K, 7, 32)
    leaves = [normalize(torch.randn(shape), dim=-1).bfloat16() for shape in shapes]

    def plain(queries: Tensor, documents: Tensor, negatives: Tensor) -> Tensor:
        scores = torch.einsum("iqd,jpd->ijqp", queries, documents).amax(3).sum(2)
        hard = torch.einsum("iqd,jkrd->ijkqr", queries, negatives).amax(4).sum(3)
        hard = hard.flatten(1) if shared else hard.diagonal().T
        return -torch.cat((scores, hard), 1).log_softmax(1).diagonal().mean()

    loss = MaxSimLoss(normalize=False, share_hard_negatives=shared)

    def outputs(function: Any, dtype: torch.dtype) -> list[Tensor]:
        given = [each.to(dtype).requires_grad_() for each in leaves]
        value = function(*given)
        return [value.detach(), *torch.autograd.grad(value, given)]

    truth = outputs(plain, torch.float64)
    budget = relative_errors(outputs(plain, torch.bfloat16), truth)
    got = relative_errors(outputs(lambda *x: loss(*x).loss, torch.bfloat16), truth)
    tolerance = 4 * torch.finfo(torch.bfloat16).eps
    assert all(error <= allowed + tolerance for error, allowed in zip(got, budget, strict=True))
    assert got[0] < 1e-5


@pytest.mark.parametrize("shared", [True, False])
def test_cached_step_equals_the_plain_step(shared: bool) -> None:
    """Hard negatives are a third input, of K documents for each row."""
    encoder, other = nn.Linear(4, D).double(), nn.Linear(3, D).double()
    loss = MaxSimLoss(share_hard_negatives=shared, token_reduction="mean").double()
    shapes = (B, 3, 4), (B, 5, 3), (B, K, 4, 3)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    masks = {"document_mask": some(B, 5), "hard_negative_mask": some(B, K, 4)}
    parameters = [*encoder.parameters(), *other.parameters(), *loss.parameters()]
    encoders = encoder, other, other
    features = [module(x) for module, x in zip(encoders, inputs, strict=True)]
    expected = loss(*features, **masks).loss
    truth = torch.autograd.grad(expected, parameters)
    out = GradCache(encoders, loss, chunk_size=2)(*inputs, loss_kwargs=masks)
    torch.testing.assert_close(out.loss, expected.detach(), rtol=1e-12, atol=0)
    got = [parameter.grad for parameter in parameters]
    torch.testing.assert_close(got, list(truth), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("make", [ruled(make=padded), packed])
def test_matryoshka_prefixes(make: Any) -> None:
    given = make()
    out = MatryoshkaLoss(MaxSimLoss(), dims=[3, D])(*given.arguments, **given.options)
    prefixes = ([each[..., :width] for each in given.arguments] for width in (3, D))
    expected = sum(MaxSimLoss()(*each, **given.options).loss for each in prefixes)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)


def test_learned_scale_and_second_derivative() -> None:
    given = padded()
    loss = MaxSimLoss(init_logit_scale=2.0, share_hard_negatives=False)
    loss(*given.arguments).loss.backward()
    assert loss.log_logit_scale.grad.abs() > 0
    (gradient,) = torch.autograd.grad(
        MaxSimDistillationLoss("kl", impl="reference")(*given.arguments, torch.zeros(B, 3)).loss,
        given.arguments[0],
        create_graph=True,
    )
    gradient.sum().backward()
    loss = MaxSimDistillationLoss("kl")(*given.arguments, torch.zeros(B, 3)).loss
    with pytest.raises(RuntimeError, match="expected one derivative, got a second one"):
        torch.autograd.grad(loss, given.arguments[0], create_graph=True)


TOKENS, ONES = torch.ones(3, 2, 4), torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((TOKENS[:, 0], TOKENS), {}, r"query_tokens: expected non-empty \(b, T, D\)"),
        ((TOKENS, TOKENS[:2]), {}, r"document_tokens: expected \(3,\) samples of width 4"),
        ((TOKENS, TOKENS, TOKENS), {}, r"hard_negatives: expected non-empty \(b, K, T, D\)"),
        (
            (TOKENS, TOKENS, torch.ones(2, 1, 2, 4)),
            {},
            r"hard_negatives: expected \(3, 1\) samples .* got \(2, 1\)",
        ),
        ((TOKENS[:1], TOKENS[:1]), {}, "batch: expected at least 2 pairs"),
        (
            (TOKENS, TOKENS),
            {"hard_negative_lengths": ONES},
            "hard_negative_lengths: expected None without hard_negatives",
        ),
        (
            (TOKENS, TOKENS[:, 0]),
            {"document_lengths": ONES + 1},
            "document_lengths: .* add up to the 3 tokens, got shape .* and sum 6",
        ),
        (
            (TOKENS, TOKENS),
            {"query_mask": torch.zeros(3, 2, dtype=torch.bool)},
            "query_mask: .*got none in sample 0",
        ),
        ((TOKENS, TOKENS), {"document_mask": ONES.bool()}, r"document_mask: .*\(3, 2\), got \(3"),
        (
            (TOKENS, TOKENS),
            {"document_counts": torch.ones(3, 2, dtype=torch.bool)},
            "document_counts: expected None unless symmetric",
        ),
        ((TOKENS, TOKENS), {"ids": ONES[:2]}, r"ids: expected shape \(3,\), got \(2,\)"),
        (
            (TOKENS, TOKENS, TOKENS[:, None]),
            {"column_bias": ONES.float()},
            r"column_bias: expected shape \(3, 2\), got \(3,\); one number for each document",
        ),
        (
            (TOKENS, TOKENS),
            {"column_bias": torch.ones(3, requires_grad=True)},
            r"column_bias: expected constants, .*pass column_bias.detach\(\)",
        ),
    ],
)
def test_bad_input_is_named(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaxSimLoss()(*arguments, **options)


def test_bad_types_and_settings_are_named() -> None:
    with pytest.raises(TypeError, match="query_mask: expected a bool tensor"):
        MaxSimLoss()(TOKENS, TOKENS, query_mask=TOKENS[..., 0])
    with pytest.raises(TypeError, match="query_lengths: expected a tensor of integers"):
        MaxSimLoss()(TOKENS[:, 0], TOKENS, query_lengths=ONES.float())
    with pytest.raises(ValueError, match="symmetric: expected False with in_batch_negatives"):
        MaxSimLoss(symmetric=True, in_batch_negatives=False)
    with pytest.raises(TypeError, match="symmetric: expected True or False, got 'no'"):
        MaxSimLoss(symmetric="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="teacher_scale: expected a finite number, got nan"):
        MaxSimDistillationLoss(teacher_scale=math.nan)
    with pytest.raises(ValueError, match="hard_negatives: expected some with in_batch"):
        MaxSimLoss(in_batch_negatives=False)(TOKENS, TOKENS)
    with pytest.raises(ValueError, match="token_reduction: expected"):
        MaxSimLoss(token_reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="objective: expected 'kl' or 'margin_mse'"):
        MaxSimDistillationLoss("mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scores: expected constants of shape \(3, 2\)"):
        MaxSimDistillationLoss()(TOKENS, TOKENS, TOKENS[:, None], torch.ones(3, 3))
