"""The kernel of the sigmoid loss against the reference: in Triton's interpreter, or on a GPU.

test_kernels.py runs this file in a process of its own, because Triton decides at its first import
whether kernels are interpreted.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import siglip_inputs
import torch
from clip_inputs import (
    ROUNDED_LOGIT,
    assert_each_subset,
    loss_and_gradients,
    poisoned_memory,
    relative_errors,
)
from siglip_inputs import Inputs, clustered_inputs, plain_loss, random_inputs
from torch import Tensor

from gradcache_clip.kernels import cuts
from gradcache_clip.kernels import sigmoid as kernels
from gradcache_clip.kernels.cuts import panel_shape
from gradcache_clip.kernels.launch_config import (
    ARCHITECTURES,
    INTERPRETED,
    LaunchConfig,
    table_entry,
)
from gradcache_clip.ops.siglip import siglip_loss, siglip_loss_with_accuracy

DEVICE = "cpu" if INTERPRETED else "cuda"
# Products of bfloat16 in the interpreter are silently wrong; on a GPU it stands for both, whose
# kernels differ in one conversion.
DTYPES = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]

labels_of = partial(siglip_inputs.labels_of, device=DEVICE)
reference = partial(siglip_loss, impl="reference")
triton = partial(siglip_loss, impl="triton")


def tiles(rows: int, columns: int, workspace_bytes: int) -> LaunchConfig:
    return LaunchConfig(
        rows, columns, 32, num_warps=4, num_stages=1, GROUP_M=2, workspace_bytes=workspace_bytes
    )


def use(monkeypatch: pytest.MonkeyPatch, tile: LaunchConfig, parts: int) -> None:
    """Without labels descriptors load the features, as on sm_90, if there are several parts."""

    def config(features: Tensor, kernel: str | None = None) -> LaunchConfig:
        return tile if kernel is None else replace(tile, parts=parts, stacked=parts > 1)

    monkeypatch.setattr(kernels, "launch_config", config)
    monkeypatch.setattr(cuts, "multiprocessors", lambda device: 3)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Tiles of 32 x 64 and a workspace for several panels; counts panels and products."""
    use(monkeypatch, tiles(32, 64, 8192), 1)
    return counted(monkeypatch)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    count: Counter[str] = Counter()
    compute, add_product = kernels._Panels.compute, kernels.add_product

    def counted_panel(*arguments: Any) -> Tensor:
        count["panels"] += 1
        return compute(*arguments)

    def counted_product(*arguments: Any) -> None:
        count["products"] += 1
        add_product(*arguments)

    monkeypatch.setattr(kernels._Panels, "compute", counted_panel)
    monkeypatch.setattr(kernels, "add_product", counted_product)
    return count


def check(inputs: Inputs, labels: Any = None, *, outer: float = 1.0) -> None:
    """Loss, gradients and accuracies equal those of the reference, alone and together."""
    with poisoned_memory():
        alone = loss_and_gradients(partial(triton, labels=labels), inputs, outer=outer)
    expected = check_together(inputs, labels, outer=outer)
    assert_close(alone, expected, inputs.q.dtype)


def check_together(inputs: Inputs, labels: Any = None, *, outer: float = 1.0) -> list[Tensor]:
    with poisoned_memory():
        result = siglip_loss_with_accuracy(*inputs, labels=labels, impl="triton")
        got = loss_and_gradients(lambda *_: result.loss, inputs, outer=outer)
    exact = inputs.to(torch.float64)
    expected = loss_and_gradients(partial(reference, labels=labels), exact, outer=outer)
    assert_close(got, expected, inputs.q.dtype)
    right = siglip_loss_with_accuracy(*exact, labels=labels, impl="reference")[1:]
    assert [x.item() for x in result[1:]] == pytest.approx([x.item() for x in right])
    return expected


def assert_close(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = 8 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    for value, want in zip(got, expected, strict=True):
        assert value.isfinite().all()
        scale = want.abs().max().clamp_min(1e-3)
        assert ((value - want).abs().max() / scale).item() < tolerance


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("B", "D", "dtype"),
    [(B, D, torch.float32) for B, D in ((1, 3), (2, 16), (63, 64), (64, 16), (65, 64))]
    + [(130, 123, dtype) for dtype in DTYPES],
)
def test_equals_the_reference(B: int, D: int, dtype: torch.dtype, labelled: bool) -> None:
    inputs = random_inputs(B, D, dtype, device=DEVICE)
    check(inputs, labels_of(B) if labelled else None, outer=-2.5)


def test_more_texts_than_images() -> None:
    for M, N in ((70, 129), (129, 70), (1, 65), (65, 1)):
        inputs = random_inputs(M, 33, torch.float32, N=N, device=DEVICE)
        check(inputs, (labels_of(M, 60), labels_of(N, 60)))


def test_strided_features_and_labels() -> None:
    inputs = random_inputs(130, 32, torch.float32, device=DEVICE)
    strided = Inputs(inputs.q.T.contiguous().T, inputs.k[:, ::2].repeat(1, 2), *inputs[2:])
    labels = labels_of(260)[::2]
    assert not (labels.is_contiguous() or strided.q.is_contiguous())
    check(strided.to(torch.float32), labels)


def test_several_panels(launched: Counter[str]) -> None:
    dtype = torch.float32
    inputs = random_inputs(130, 40, dtype, device=DEVICE)
    check(inputs, labels_of(130))
    rows, columns = panel_shape(tiles(32, 64, 8192), 130, inputs.q.element_size())
    panels = -(-130 // rows) * -(-130 // columns)
    assert panels >= 4 and rows < 130 and columns < 130
    # Twice, and the second time with accuracies.
    assert launched == {"panels": 2 * panels, "products": 4 * panels}


@pytest.mark.parametrize(("M", "N"), [(100, 100), (64, 128), (33, 130), (130, 33)])
def test_a_block_without_positives(M: int, N: int, launched: Counter[str]) -> None:
    """As with labels of which no two are equal, in several panels, ragged and not."""
    dtype = torch.float32
    inputs = [x.detach() for x in random_inputs(M, 40, dtype, N=N, device=DEVICE)]
    rows, columns = torch.arange(M, device=DEVICE), torch.arange(N, device=DEVICE) + M
    wanted = (True,) * 5
    with poisoned_memory():
        got = kernels.sigmoid_loss(*inputs, None, wanted, paired=False)
    expected = kernels.sigmoid_loss(*inputs, (rows, columns), wanted)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="no GPU is given such tiles")
@pytest.mark.parametrize(
    ("shape", "parts"), [((16, 16), 1), ((16, 64), 1), ((16, 64), 4), ((64, 16), 1)]
)
@pytest.mark.parametrize("workspace_bytes", [1, 8192, 2**20])
def test_every_tile_is_computed_wherever_edges_fall(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], parts: int, workspace_bytes: int
) -> None:
    """Diagonal, last tile row and last tile column meet in all ways, in one panel and in many."""
    use(monkeypatch, tiles(*shape, workspace_bytes), parts)
    for B in (17, 48, 65) if workspace_bytes == 8192 else (65,):
        check_together(random_inputs(B, 8, torch.float32))
    check_together(random_inputs(33, 8, torch.float32, N=48), (labels_of(33), labels_of(48)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [-0.6, 0.0, 0.9])
def test_error_budget(dtype: torch.dtype, cosine: float) -> None:
    """No further from fp64 than plain PyTorch in the same dtype, plus a few roundings."""
    inputs = clustered_inputs(cosine, 100, 64, dtype, device=DEVICE)
    truth = loss_and_gradients(reference, inputs.to(torch.float64))
    budget = relative_errors(loss_and_gradients(plain_loss, inputs), truth)
    got = relative_errors(loss_and_gradients(triton, inputs), truth)
    tolerance = 4 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    assert all(error <= plain + tolerance for error, plain in zip(got, budget, strict=True))
    assert max(got[0], got[3], got[4]) < 1e-5


def test_each_term_keeps_its_digits() -> None:
    """log(1 + exp(x)) and its derivative from -80 to 80, of a negative and of a positive."""
    one = torch.ones(1, 16, device=DEVICE) / 4
    for x in (-80.0, -30.0, -10.0, -3.0, -1.0, -0.3, -0.01, 0.0, 0.01, 0.3, 1.0, 3.0, 10.0, 80.0):
        softplus = max(x, 0) + math.log1p(math.exp(-abs(x)))
        sigmoid = math.exp(min(x, 0)) / (1 + math.exp(-abs(x)))
        bias = torch.tensor(x, device=DEVICE, requires_grad=True)
        loss = triton(one, one, 0.0, bias, labels=(labels_of(1), labels_of(1) - 100))
        loss.backward()
        rel = 4e-7 + 2e-7 * abs(x)
        assert loss.item() == pytest.approx(softplus, rel=rel)
        assert bias.grad.item() == pytest.approx(sigmoid, rel=rel)
        assert triton(one, one, 0.0, -bias).item() == pytest.approx(softplus, rel=rel)


def test_sums_of_many_small_terms() -> None:
    inputs = random_inputs(500, 16, torch.float32, bias=-10.0, device=DEVICE)
    truth = loss_and_gradients(reference, inputs.to(torch.float64))
    assert max(relative_errors(loss_and_gradients(triton, inputs), truth)) < 2e-6


def test_each_subset_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = counted(monkeypatch)

    def loss(*leaves: Tensor) -> Tensor:
        launched.clear()
        return triton(*leaves)

    def one_product_for_each(leaves: list[Tensor]) -> None:
        wanted = sum(leaf.requires_grad for leaf in leaves[:2])
        assert launched["products"] == launched["panels"] * wanted

    inputs = random_inputs(40, 16, torch.float32, device=DEVICE)
    assert_each_subset(loss, inputs, rtol=1e-4, atol=1e-7, after=one_product_for_each)


def test_the_loss_alone_allocates_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = kernels._Panels._allocate
    monkeypatch.setattr(
        kernels._Panels, "_allocate", lambda self, *size: (original(self, *size), made.append(self))
    )
    inputs = random_inputs(65, 16, torch.float32, device=DEVICE)
    with torch.no_grad():
        triton(*inputs)
    triton(inputs.q.detach(), inputs.k.detach(), *inputs[2:])
    triton(*inputs)
    siglip_loss_with_accuracy(*inputs, impl="triton")
    assert [panels.workspace.numel() > 1 for panels in made] == [False, False, True, True]
    assert [panels.row_best.numel() > 1 for panels in made] == [False, False, False, True]


def test_accuracies_count_ranks_and_ties_are_wrong() -> None:
    q = torch.eye(4, device=DEVICE)
    k = torch.stack([q[0], q[1], q[1], q[0] + q[3]])
    result = siglip_loss_with_accuracy(q, k, 10.0, -10.0, impl="triton")
    assert result.image_to_text_accuracy.item() == 0.25
    assert result.text_to_image_accuracy.item() == 0.5


@pytest.mark.parametrize("labelled", [False, True])
def test_ranks_among_negative_similarities(labelled: bool) -> None:
    inputs = clustered_inputs(-0.6, 130, 64, torch.float32, device=DEVICE)
    labels = labels_of(130, 60) if labelled else None
    got, expected = (
        siglip_loss_with_accuracy(*inputs, labels=labels, impl=impl)[1:]
        for impl in ("triton", "reference")
    )
    assert [x.item() for x in got] == pytest.approx([x.item() for x in expected])
    assert max(got) < 0.5


@pytest.mark.parametrize("scale", [-3.0, 0.0])
def test_scales_that_turn_or_level_the_ranks(scale: float) -> None:
    inputs = random_inputs(70, 3, torch.float32, scale=scale, device=DEVICE)
    check(inputs)
    check(inputs, labels_of(70, 40))


def test_small_gradients_survive_float16() -> None:
    """Every term of G is about exp(-16), where fp16 has two bits; the loss is scaled by 1e5."""
    inputs = random_inputs(64, 16, torch.float16, scale=1.0, bias=-16.0, device=DEVICE)
    no_positives = torch.arange(64, device=DEVICE), torch.arange(64, device=DEVICE) + 64
    got = loss_and_gradients(partial(triton, labels=no_positives), inputs, outer=1e5)
    exact = inputs.to(torch.float64)
    expected = loss_and_gradients(partial(reference, labels=no_positives), exact, outer=1e5)
    assert max(relative_errors(got, expected)) < 2e-3


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_runs_are_bit_equal(dtype: torch.dtype) -> None:
    inputs = random_inputs(130, 33, dtype, device=DEVICE)
    first, second = (loss_and_gradients(triton, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiles_whole() -> None:
    inputs = random_inputs(65, 16, torch.float32, device=DEVICE)
    expected = loss_and_gradients(triton, inputs)
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager")
    got = loss_and_gradients(compiled, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_exact_under_autocast() -> None:
    inputs = random_inputs(65, 33, torch.float32, device=DEVICE)
    expected = loss_and_gradients(triton, inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = loss_and_gradients(triton, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
def test_nan_and_infinity_reach_the_loss() -> None:
    for bad in (math.nan, math.inf):
        inputs = random_inputs(65, 4, torch.float32, device=DEVICE)
        q = inputs.q.detach().clone()
        q[40, 1] = bad
        assert not triton(q, *inputs[1:]).isfinite()


def test_what_cannot_run_is_refused() -> None:
    q = torch.eye(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="kernels have no float64"):
        triton(q.double(), q.double(), 1.0, 0.0)
    if INTERPRETED:
        with pytest.raises(RuntimeError, match="interpreter has no bfloat16"):
            triton(q.bfloat16(), q.bfloat16(), 1.0, 0.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_of_a_million_stays_within_the_workspace(architecture: int) -> None:
    """Sums of every tile of a million rows and columns would take 1.5 GB."""
    q = torch.empty(1_000_000, 1, dtype=torch.bfloat16, device="meta")
    scale = torch.empty((), device="meta")
    for labels in (None, (scale, scale)):
        kernel: Any = None if labels else "sigmoid"
        config = table_entry(architecture, q.dtype, kernel=kernel)
        panels = kernels._Panels(q, q, scale, scale, labels, (True,) * 5, config)
        for each in (panels.workspace, panels.row_best, panels.column_best):
            assert each.numel() * each.element_size() <= config.workspace_bytes
        assert panels.sums.numel() * panels.sums.element_size() <= 384 * 2**10
