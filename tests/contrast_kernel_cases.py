"""The softmax family's kernels against the reference: in Triton's interpreter, or on a GPU.

test_kernels.py runs this file in a process of its own, because Triton decides at its first import
whether kernels are interpreted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from clip_inputs import (
    ROUNDED_LOGIT,
    Inputs,
    assert_each_subset,
    clustered_inputs,
    loss_and_gradients,
    plain_loss,
    poisoned_memory,
    random_inputs,
    relative_errors,
)
from contrast_pairings import RULES, assert_close, outcome, pairing, unequal_inputs
from torch import Tensor
from torch.nn.functional import normalize

from gradcache_clip.kernels import (
    contrast_gradient,
    contrast_statistics,
    cuts,
    statistics_parts,
)
from gradcache_clip.kernels.competition import Competition
from gradcache_clip.kernels.cuts import panel_shape, stripe_rows
from gradcache_clip.kernels.launch_config import (
    INTERPRETED,
    LaunchConfig,
    launch_config,
    one_part,
)
from gradcache_clip.losses import InBatchDistillationLoss, MatryoshkaLoss
from gradcache_clip.losses.retrieval import RetrievalLoss
from gradcache_clip.losses.retrieval_contrasts import DIRECTIONS
from gradcache_clip.ops import clip_loss, clip_loss_with_accuracy, contrast
from gradcache_clip.ops.info_nce import info_nce_loss
from gradcache_clip.ops.pairing import Pairing, SideGradient
from gradcache_clip.ops.self_contrast import nt_xent_loss, sup_con_loss

# A positive, or what repeats it beyond the edge, is computed like a negative and then replaced.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning"),
]

DEVICE = "cpu" if INTERPRETED else "cuda"
# Products of bfloat16 in the interpreter are silently wrong; on a GPU it stands for both, whose
# kernels differ in one conversion.
DTYPES = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]
NARROW = LaunchConfig(32, 32, 32, num_warps=4, num_stages=1, GROUP_M=2, workspace_bytes=4096)
DESCRIBED = replace(NARROW, BLOCK_N=64, parts=4, stacked=True)

reference = partial(clip_loss, impl="reference")
triton = partial(clip_loss, impl="triton")


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Several stripes and panels from 70 rows on, and a count of what was launched.

    Descriptors load the features where they do on sm_90.
    """
    count: Counter[str] = Counter()

    def config(features: Tensor, *, kernel: str | None = None, **rules: bool) -> LaunchConfig:
        return NARROW if kernel is None else DESCRIBED

    for module in (contrast_statistics, contrast_gradient):
        monkeypatch.setattr(module, "launch_config", config)
    monkeypatch.setattr(cuts, "multiprocessors", lambda device: 3)
    _count_calls(monkeypatch, count, statistics_parts.Running, "merge")
    _count_calls(monkeypatch, count, contrast_gradient._Panels, "gradient")
    return count


def _count_calls(
    monkeypatch: pytest.MonkeyPatch, count: Counter[str], owner: Any, name: str
) -> None:
    original = getattr(owner, name)

    def counted(*args: Any) -> Any:
        count[name] += 1
        return original(*args)

    monkeypatch.setattr(owner, name, counted)


SIZES = [(1, 1, 3), (64, 64, 64), (63, 66, 40), (65, 100, 123)]
# What changes the machine code; rules that differ in a shift alone do not. Each pair of rules and
# dtype is a kernel to compile, and 16-bit features take no branch of their own.
FEW_RULES = ["", "labels ids", "shift ids thresholds groups bias guide", "self"]


@pytest.mark.parametrize(
    ("rules", "dtype", "sizes"),
    [(rules, torch.float32, SIZES) for rules in RULES]
    + [(rules, dtype, SIZES[-1:]) for rules in ("", "self") for dtype in DTYPES[1:]],
)
def test_equals_the_reference(
    rules: str, dtype: torch.dtype, sizes: list[tuple[int, int, int]]
) -> None:
    for size in sizes:
        equals_the_reference(rules, size, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("rules", "widths"), [("", ()), ("self", ()), ("", (16, 40))])
def test_gradients_come_unrounded_where_they_are_added(
    rules: str, widths: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, scale = (x.detach() for x in unequal_inputs(66, 66, 40, dtype, DEVICE))
    k, pairs = q if rules else k, pairing(rules, 66, 66, DEVICE)
    passes = contrast.ContrastPasses("triton", widths)
    found = passes.statistics(q, k, scale, pairs)
    ones = torch.ones_like(found.row_max)
    rows, columns = (SideGradient(x, ones, -ones) for x in (found.row_max, found.column_max))
    given = q, k, scale, pairs, rows, columns if pairs.both_ways else None, (True,) * 3, None
    wide, narrow = (passes.gradient(*given, each)[:2] for each in (torch.float32, dtype))
    for before, after in zip(wide, narrow, strict=True):
        assert before is after is None or torch.equal(before.to(dtype), after)
        assert before is None or not torch.equal(before, after.float())


def equals_the_reference(rules: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    M, N, D = size
    if "self" in rules:
        M = N = N + N % 2
    inputs, pairs = unequal_inputs(M, N, D, dtype, DEVICE), pairing(rules, M, N, DEVICE)
    with poisoned_memory():
        got = outcome(pairs, "triton", inputs)
    assert_close(got, outcome(pairs, "reference", inputs), dtype)


@pytest.mark.parametrize(
    "rules",
    [
        "",
        "shift ids thresholds groups bias",
        pytest.param(
            "rows",
            marks=pytest.mark.skipif(not INTERPRETED, reason="two more kernels to compile"),
        ),
    ],
)
def test_descriptors_load_the_features(rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are taken in parts, of which the last ones may lie beyond the columns."""
    for module in (contrast_statistics, contrast_gradient):
        monkeypatch.setattr(module, "launch_config", lambda features, **rules: DESCRIBED)
    for size in SIZES:
        equals_the_reference(rules, size, torch.float32)


@pytest.mark.parametrize(
    ("rules", "dtype"),
    [(rules, torch.float32) for rules in FEW_RULES]
    + [("labels ids", dtype) for dtype in DTYPES[1:]],
)
def test_several_stripes_and_panels(rules: str, dtype: torch.dtype, narrow: Counter[str]) -> None:
    M, N = (100, 100) if "self" in rules else (70, 100)
    inputs, pairs = unequal_inputs(M, N, 40, dtype, DEVICE), pairing(rules, M, N, DEVICE)
    numbers = 4 if "labels" in rules else 2
    config = NARROW if {"self", "guide"} & set(rules.split()) else DESCRIBED
    forward = NARROW if "labels" in rules else config
    stripes = -(-M // stripe_rows(one_part(forward), N, numbers=numbers))
    height, width = panel_shape(config, N, inputs.q.element_size())
    assert stripes > 1 and height < M and width < N
    with poisoned_memory():
        got = outcome(pairs, "triton", inputs)
    assert_close(got, outcome(pairs, "reference", inputs), dtype)
    assert narrow["merge"] == stripes * (1 if "rows" in rules else 2)
    firsts = range(0, M, height)
    if "self" in rules:
        # Panels left of a stripe's own columns are never computed.
        assert narrow["gradient"] == sum(-(-(N - first) // width) for first in firsts)
    else:
        assert narrow["gradient"] == len(firsts) * -(-N // width)


def lse(statistics: tuple[Tensor, ...]) -> Tensor:
    _, peak, total, _ = statistics
    return torch.where(total > 0, peak + total.clamp_min(1e-38).log(), -torch.inf)


@pytest.mark.parametrize("rules", ["", "rows"])
def test_one_exponential_for_rows_and_columns(rules: str) -> None:
    """Without maxima: sums from 1/2 to 1 beside any reference, and the same gradients."""
    equals_the_reference_without_maxima(rules)


@pytest.mark.parametrize("rules", ["", "shift ids thresholds groups bias guide", "self"])
def test_flags_of_several_stripes(rules: str, narrow: Counter[str]) -> None:
    """Each stripe of a self-contrast has fewer tiles than the one before, and flags on them."""
    equals_the_reference_without_maxima(rules)
    assert narrow["merge"] > 2


def equals_the_reference_without_maxima(rules: str) -> None:
    M, N = (100, 100) if "self" in rules else (70, 100)
    inputs, pairs = unequal_inputs(M, N, 40, torch.float32, DEVICE), pairing(rules, M, N, DEVICE)
    with poisoned_memory():
        got = outcome(pairs._replace(maxima=False), "triton", inputs)
    expected = outcome(pairs, "reference", inputs)
    # Peaks come after each log-sum-exp.
    peaks = [1, 5] if pairs.both_ways else [1]
    kept = [[x for i, x in enumerate(values) if i not in peaks] for values in (got, expected)]
    assert_close(*kept, torch.float32)
    k = inputs.q if pairs.self_contrast else inputs.k
    arguments = inputs.q, k, inputs.logit_scale, pairs._replace(maxima=False)
    row_sum = contrast.contrast_statistics("loss", *arguments, "triton").row_sum
    assert ((row_sum == 0) | ((row_sum > 0.49) & (row_sum < 1.01))).all()


def far_apart() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a tile from -600 to 600, and rows and columns whose largest differ by hundreds."""
    q, k, _ = random_inputs(64, 16, torch.float32, device=DEVICE)
    lengths = torch.linspace(-1, 1, 64, device=DEVICE)[:, None]
    anchor = torch.zeros(1, 16, device=DEVICE)
    anchor[0, 0] = 1
    q, k = q.detach() * 0.1 + lengths * anchor, k.detach() * 0.1 + lengths.roll(7, 0) * anchor
    return q, k, torch.tensor(600.0, device=DEVICE)


def test_tiles_whose_logits_are_far_apart_are_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, scale = far_apart()
    pairs = Pairing(maxima=False)
    truth = contrast.contrast_statistics("loss", q, k, scale, Pairing(), "reference")
    found = contrast.contrast_statistics("loss", q, k, scale, pairs, "triton")
    for side in (slice(0, 4), slice(4, 8)):
        torch.testing.assert_close(lse(found[side]), lse(truth[side]), rtol=1e-5, atol=1e-4)
    # Without the second launch most sums are lost.
    monkeypatch.setattr(contrast_statistics, "_launches", lambda config, **_: [(config, 1)])
    lost = contrast.contrast_statistics("loss", q, k, scale, pairs, "triton")
    assert (lse(lost[:4]) < lse(truth[:4]) - 1).sum() > 10


Public = Callable[[Tensor, Tensor, Tensor, str], Tensor]


def public_losses() -> dict[str, Public]:
    labels, ids = torch.arange(40, device=DEVICE) // 3, torch.arange(40, device=DEVICE) % 13
    hard = normalize(torch.randn(10, 24, device=DEVICE), dim=1)
    options: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
        "labels and ids": (clip_loss, {"labels": labels, "ids": ids, "label_smoothing": 0.1}),
        "retrieval": (info_nce_loss, {"hard_negatives": hard, "tau_plus": 0.1}),
        "margin": (info_nce_loss, {"false_negative_margin": -0.3, "ids": ids, "symmetric": True}),
        "views": (nt_xent_loss, {}),
    }
    losses: dict[str, Public] = {
        name: lambda q, k, s, impl, loss=loss, given=given: loss(q, k, s, impl=impl, **given)
        for name, (loss, given) in options.items()
    }
    losses["classes"] = lambda q, k, s, impl: sup_con_loss(
        torch.cat((q, k)), labels.repeat(2), s, impl=impl
    )
    teacher = [torch.randn(40, 9, device=DEVICE) for _ in range(2)]
    losses["teacher"] = lambda q, k, s, impl: (
        InBatchDistillationLoss(teacher_scale=2.0, symmetric=True, normalize=False, impl=impl)(
            q, k, *teacher, s
        ).loss
    )
    return losses


@pytest.mark.parametrize("name", public_losses())
def test_public_losses(name: str) -> None:
    dtype = torch.float32
    loss = public_losses()[name]
    inputs = random_inputs(40, 24, dtype, scale=10.0, device=DEVICE)
    results = [
        loss_and_gradients(lambda *x, impl=impl: loss(*x, impl), inputs, outer=-2.5)
        for impl in ("triton", "reference")
    ]
    assert_close(*results, dtype)


def test_merge_reads_many_partials_at_once() -> None:
    """More tiles in a row than one step of the merge takes."""
    inputs = random_inputs(16 * 65, 16, torch.float32, device=DEVICE)
    config = LaunchConfig(2048 if INTERPRETED else 64, 16, 16, num_warps=4, num_stages=1)
    with torch.no_grad():
        _, rows, _ = contrast_statistics.contrast_statistics(
            *inputs, Competition(both_ways=False), config=config
        )
        logits = 30.0 * (inputs.q @ inputs.k.T).fill_diagonal_(-torch.inf)
    neg_lse = (rows[0] + rows[1].log2()) / torch.log2(torch.tensor(torch.e))
    torch.testing.assert_close(neg_lse, logits.logsumexp(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [-0.6, 0.0, 0.9])
@pytest.mark.parametrize("labelled", [False, True])
def test_error_budget(labelled: bool, cosine: float, dtype: torch.dtype) -> None:
    """No further from fp64 than plain PyTorch in the same dtype, plus a few roundings."""
    inputs = clustered_inputs(cosine, 100, 64, dtype, device=DEVICE)
    # Labels that all differ change the algebra and not the loss.
    labels = torch.arange(100, device=DEVICE) if labelled else None
    truth = loss_and_gradients(reference, inputs.to(torch.float64))
    budget = relative_errors(loss_and_gradients(plain_loss, inputs), truth)
    got = relative_errors(loss_and_gradients(partial(triton, labels=labels), inputs), truth)
    tolerance = 4 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    assert all(error <= plain + tolerance for error, plain in zip(got, budget, strict=True))
    assert got[0] < 1e-5


@pytest.mark.parametrize("rules", ["", "labels", "rows"])
def test_each_subset_of_gradients(rules: str) -> None:
    inputs, pairs = (
        unequal_inputs(40, 50, 16, torch.float32, DEVICE),
        pairing(rules, 40, 50, DEVICE),
    )

    def loss(*leaves: Tensor) -> Tensor:
        result = contrast.contrast_statistics("loss", *leaves, pairs, "triton")
        return (result.row_max + result.row_sum.log() - result.row_positive).sum()

    assert_each_subset(loss, inputs, rtol=1e-4, atol=1e-5)


def test_accuracies_count_ranks_and_ties_are_wrong() -> None:
    q = torch.eye(4, device=DEVICE)
    k = torch.stack([q[0], q[1], q[1], q[0] + q[3]])
    result = clip_loss_with_accuracy(q, k, 10.0, impl="triton")
    assert result.image_to_text_accuracy.item() == 0.25
    assert result.text_to_image_accuracy.item() == 0.5


@pytest.mark.parametrize(("labelled", "outer"), [(0, 1e-4), (0, 1e5), (1, 1e-4), (1, 1e4)])
def test_float16_gradients_neither_vanish_nor_overflow(labelled: int, outer: float) -> None:
    """Without labels every term of G is about exp(-16), where fp16 has two bits."""
    q = torch.eye(8, dtype=torch.float16, device=DEVICE)
    inputs = Inputs(q, q.clone(), torch.tensor(16.0, device=DEVICE)).to(torch.float16)
    labels = torch.arange(8, device=DEVICE) // 2 if labelled else None
    got, expected = (
        torch.autograd.grad(outer * clip_loss(*leaves, labels=labels, impl=impl), leaves)
        for impl, leaves in (("triton", inputs), ("reference", inputs.to(torch.float64)))
    )
    for value, want in zip(got, expected, strict=True):
        # Half the smallest fp16: what the result itself cannot hold.
        error = (value.double() - want).abs().max() - 2.0**-25
        assert error <= 2e-3 * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_runs_are_bit_equal_and_layout_does_not_matter(
    dtype: torch.dtype, narrow: Counter[str]
) -> None:
    inputs, pairs = (
        unequal_inputs(70, 90, 33, dtype, DEVICE),
        pairing("labels ids", 70, 90, DEVICE),
    )
    first, second = (outcome(pairs, "triton", inputs) for _ in range(2))
    strided = Inputs(inputs.q.T.contiguous().T, inputs.k.T.contiguous().T, inputs.logit_scale)
    vectors = [None if x is None else x.int().repeat_interleave(2)[::2] for x in pairs[:4]]
    third = outcome(Pairing(*vectors), "triton", strided)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


# Which implementation runs is decided once and cached; compiled code traces through that.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_exact_under_autocast_and_compile() -> None:
    inputs = random_inputs(65, 33, torch.float32, device=DEVICE)
    expected = loss_and_gradients(triton, inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = loss_and_gradients(triton, inputs)
    compiled = torch.compile(triton, backend="aot_eager", fullgraph=True)
    for values in (got, loss_and_gradients(compiled, inputs)):
        assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


def test_what_cannot_run_is_refused() -> None:
    q = torch.eye(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="kernels have no float64"):
        triton(q.double(), q.double(), 1.0)
    if INTERPRETED:
        with pytest.raises(RuntimeError, match="interpreter has no bfloat16"):
            triton(q.bfloat16(), q.bfloat16(), 1.0)
    assert clip_loss(q.double(), q.double(), 1.0).dtype == torch.float64


def test_workspace_stays_within_its_budget() -> None:
    config = launch_config(torch.empty(1, device=DEVICE))
    for N in (100, 10_000, 65_536, 1_000_000):
        for itemsize in (2, 4):
            rows, columns = panel_shape(config, N, itemsize)
            assert rows % config.BLOCK_M == 0
            assert columns == N or columns % config.BLOCK_N == 0
            assert rows * columns * itemsize <= config.workspace_bytes
        assert stripe_rows(config, N) % config.BLOCK_M == 0
        assert stripe_rows(config, N, numbers=4) <= stripe_rows(config, N)


def retrieval_rules(names: str) -> dict[str, Any]:
    """What is said of 70 queries with two hard negatives each."""
    guides = [torch.randn(each, device=DEVICE) for each in ((70, 9), (70, 9), (70, 2, 9))]
    rules = {
        "ids": torch.arange(70, device=DEVICE) % 9,
        "groups": torch.arange(70, device=DEVICE) % 2,
        "column_bias": torch.randn(70, 3, device=DEVICE, requires_grad=True),
        "guide": tuple(normalize(each, dim=-1) for each in guides),
    }
    return {name: rules[name] for name in names.split()}


@pytest.mark.parametrize(
    ("names", "dtype"),
    [("", torch.float32)] + [("ids groups column_bias guide", dtype) for dtype in DTYPES],
)
def test_error_budget_of_retrieval(names: str, dtype: torch.dtype) -> None:
    """Directions with and without positives, no further from fp64 than plain PyTorch."""
    shapes = (70, 40), (70, 40), (70, 2, 40)
    given = [torch.randn(each, device=DEVICE).to(dtype) for each in shapes]
    rules = retrieval_rules(names)

    def outcome_of(impl: str, dtype: torch.dtype) -> list[Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [each.to(dtype).requires_grad_() for each in given]
        scale = torch.tensor(20.0, dtype=wide, device=DEVICE, requires_grad=True)
        margin = 0.1 if "guide" in rules else 0.0
        loss = RetrievalLoss(directions=DIRECTIONS, guide_margin=margin, impl=impl)
        with poisoned_memory():
            value = loss(*leaves, scale, **rules).loss
            learned = [rules["column_bias"]] if "column_bias" in rules else []
            return [value.detach(), *torch.autograd.grad(value, [*leaves, scale, *learned])]

    truth = outcome_of("reference", torch.float64)
    budget = relative_errors(outcome_of("reference", dtype), truth)
    got = relative_errors(outcome_of("triton", dtype), truth)
    tolerance = 4 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    assert all(error <= plain + tolerance for error, plain in zip(got, budget, strict=True))
    assert got[0] < 1e-5 or dtype != torch.float32


def whole_distillation(rows: Tensor, columns: Tensor, scale: Tensor, *teacher: Tensor) -> Tensor:
    """What a person writes, in the dtype of the features throughout."""
    student, taught = scale.to(rows.dtype) * rows @ columns.T, 30.0 * teacher[0] @ teacher[1].T
    both = (taught, student), (taught.T, student.T)
    logs = [(each.log_softmax(1), other.log_softmax(1)) for each, other in both]
    return sum(((p - q) * p.exp()).sum(1).mean() for p, q in logs) / 2


@pytest.mark.skipif(not INTERPRETED, reason="each dtype is four more kernels to compile")
@pytest.mark.parametrize("widths", [(), (8, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget_of_distillation(
    dtype: torch.dtype, widths: tuple[int, ...], narrow: Counter[str]
) -> None:
    """The teacher's softmax in several panels, far from zero."""
    given = [normalize(torch.randn(66, n) + 1, dim=1).to(dtype) for n in (24, 24, 40, 40)]
    scale = torch.tensor(20.0, dtype=torch.float64)
    options = {"teacher_scale": 30.0, "symmetric": True, "impl": "triton"}
    loss: Any = InBatchDistillationLoss(normalize=bool(widths), **options)
    loss = MatryoshkaLoss(loss, widths) if widths else loss

    def fused(rows: Tensor, columns: Tensor, scale: Tensor, *teacher: Tensor) -> Tensor:
        with poisoned_memory():
            return loss(rows, columns, *teacher, scale).loss

    def whole(rows: Tensor, columns: Tensor, scale: Tensor, *teacher: Tensor) -> Tensor:
        cut = [[normalize(x[:, :w], dim=1) for x in (rows, columns)] for w in widths]
        each = (whole_distillation(*x, scale, *teacher) for x in cut or [(rows, columns)])
        return sum(each, torch.zeros(()))

    def outcome_of(loss: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        teacher = [each.to(dtype) for each in given[2:]]
        inputs = Inputs(given[0], given[1], scale).to(dtype)
        return loss_and_gradients(lambda *leaves: loss(*leaves, *teacher), inputs)

    truth = outcome_of(whole, torch.float64)
    budget = relative_errors(outcome_of(whole, dtype), truth)
    got = relative_errors(outcome_of(fused, dtype), truth)
    tolerance = 4 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    assert all(error <= plain + tolerance for error, plain in zip(got, budget, strict=True))
    assert got[0] < 1e-5 and narrow["gradient"] > 5
