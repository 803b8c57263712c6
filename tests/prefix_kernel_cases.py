"""The prefix kernels against the reference: in Triton's interpreter on a CPU, or on a GPU.

test_kernels.py runs this file in a process of its own, because Triton decides at its first import
whether kernels are interpreted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
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
from prefix_inputs import (
    prefix_losses,
)
from torch import Tensor
from torch.nn.functional import normalize

from gradcache_clip import ClipLoss, InfoNCELoss, NTXentLoss, SupConLoss
from gradcache_clip.kernels import prefix_gradient, prefix_statistics, statistics_parts
from gradcache_clip.kernels.cuts import panel_shape, stripe_rows
from gradcache_clip.kernels.launch_config import (
    INTERPRETED,
    LaunchConfig,
    prefix_config,
)
from gradcache_clip.kernels.prefix_statistics import Segments

DEVICE = "cpu" if INTERPRETED else "cuda"
# Products of bfloat16 in the interpreter are silently wrong; on a GPU it stands for both, whose
# kernels differ in one conversion.
DTYPES = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]


def total(results: Sequence[Any]) -> Tensor:
    return torch.stack([weight * each.loss for weight, each in enumerate(results, 1)]).sum()


def clip(widths: Sequence[int], impl: Any = "triton") -> Callable[..., Tensor]:
    def loss(q: Tensor, k: Tensor, logit_scale: Tensor) -> Tensor:
        # The CLIP loss under the name that takes a batch of one.
        options = {"logit_scale": logit_scale, "symmetric": True, "impl": impl}
        return total(prefix_losses(InfoNCELoss, widths, q, k, **options))

    return loss


def longer(inputs: Inputs) -> Inputs:
    """Rows of other lengths than 1."""
    lengths = torch.rand(len(inputs.q), 1, device=DEVICE, dtype=torch.float64) + 0.25
    features = inputs.q.double() * lengths, inputs.k.double() * lengths.flip(0)
    return Inputs(*features, inputs.logit_scale).to(inputs.q.dtype)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Several stripes and panels at B = 110, and a count of what was launched."""
    tiles = LaunchConfig(32, 32, 16, num_warps=4, num_stages=1, GROUP_M=2, workspace_bytes=16384)
    count: Counter[str] = Counter()
    for module in (prefix_gradient, prefix_statistics):
        monkeypatch.setattr(module, "prefix_config", lambda features, gradient: tiles)

    class Counted(statistics_parts.Running):
        def merge(self, where: slice, parts: int) -> None:
            count["merge"] += 1
            super().merge(where, parts)

        @staticmethod
        def empty(*args: Any, **options: Any) -> Counted:
            return Counted(**vars(statistics_parts.Running.empty(*args, **options)))

    monkeypatch.setattr(prefix_statistics, "Running", Counted)
    _count_calls(monkeypatch, count, prefix_gradient._Panels, "gradients")
    return count


def _count_calls(
    monkeypatch: pytest.MonkeyPatch, count: Counter[str], owner: Any, name: str
) -> None:
    original = getattr(owner, name)

    def counted(*args: Any) -> Any:
        count[name] += 1
        return original(*args)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("B", "widths", "D", "dtype"),
    [
        (2, (1, 3), 3, torch.float32),
        (3, (16,), 16, torch.float32),
        (63, (64, 128), 128, torch.float32),
        (65, (1, 3, 65, 70), 70, torch.float32),
        *((130, (40, 123), 130, dtype) for dtype in DTYPES),
    ],
)
def test_equals_the_reference(B: int, widths: tuple[int, ...], D: int, dtype: torch.dtype) -> None:
    inputs = longer(random_inputs(B, D, dtype, scale=5.0, device=DEVICE))
    with poisoned_memory():
        got = loss_and_gradients(clip(widths), inputs, outer=-2.5)
    expected = loss_and_gradients(clip(widths, "reference"), inputs, outer=-2.5)
    tolerance = 8 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    for value, want in zip(got, expected, strict=True):
        assert value.isfinite().all()
        scale = want.abs().max().clamp_min(1e-3)
        assert ((value - want).abs().max() / scale).item() < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_stripes_and_panels(dtype: torch.dtype, launched: Counter[str]) -> None:
    widths = (8, 33, 40)
    inputs = longer(random_inputs(110, 40, dtype, device=DEVICE))
    config = prefix_statistics.prefix_config(inputs.q, gradient=True)
    assert stripe_rows(config, 110 * len(widths)) == 96
    itemsize = inputs.q.element_size()
    assert panel_shape(config, 110, itemsize * len(widths)) == (32 if itemsize == 4 else 64, 32)
    with poisoned_memory():
        got = loss_and_gradients(clip(widths), inputs)
    # Stripes of 96 rows with two merges each; panels of 32 x 32 (fp32) or 64 x 32 (16 bit).
    assert launched["merge"] == 2 * 2
    assert launched["gradients"] == (4 if itemsize == 4 else 2) * 4
    errors = relative_errors(got, loss_and_gradients(clip(widths, "reference"), inputs))
    assert max(errors) < 8 * torch.finfo(dtype).eps + ROUNDED_LOGIT


def test_queries_over_documents_and_hard_negatives(launched: Counter[str]) -> None:
    """Rows alone, or both ways, over more columns than rows."""
    dtype = torch.float32
    queries, documents, scale = longer(random_inputs(70, 24, dtype, device=DEVICE))
    negatives = torch.randn(41, 24, device=DEVICE).to(dtype).requires_grad_()
    leaves = queries, documents, negatives, scale
    for symmetric in (False, True):

        def loss(*leaves: Tensor, impl: Any = "triton", symmetric: bool = symmetric) -> Tensor:
            q, k, hard, scale = leaves
            options = {"logit_scale": scale, "symmetric": symmetric, "impl": impl}
            return total(prefix_losses(InfoNCELoss, (8, 24), q, k, hard, **options))

        launched.clear()
        got = loss_and_gradients(loss, leaves)
        assert launched["merge"] == (2 if symmetric else 1) * 1 and launched["gradients"] > 1
        expected = loss_and_gradients(partial(loss, impl="reference"), leaves)
        errors = relative_errors(got, expected)
        assert max(errors) < 8 * torch.finfo(dtype).eps + ROUNDED_LOGIT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [-0.6, 0.0, 0.9])
def test_error_budget(dtype: torch.dtype, cosine: float) -> None:
    """No further from fp64 than plain PyTorch in the same dtype, plus a few roundings."""
    widths = (8, 40, 64)
    inputs = longer(clustered_inputs(cosine, 100, 64, dtype, device=DEVICE))

    def plain(q: Tensor, k: Tensor, logit_scale: Tensor) -> Tensor:
        prefixes = [[normalize(x[:, :d].float(), dim=1).to(dtype) for x in (q, k)] for d in widths]
        losses = [p * plain_loss(*each, logit_scale) for p, each in enumerate(prefixes, 1)]
        return torch.stack(losses).sum()

    truth = loss_and_gradients(clip(widths, "reference"), inputs.to(torch.float64))
    budget = relative_errors(loss_and_gradients(plain, inputs), truth)
    got = relative_errors(loss_and_gradients(clip(widths), inputs), truth)
    tolerance = 4 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    assert all(error <= plain + tolerance for error, plain in zip(got, budget, strict=True))
    # Unlike plain PyTorch in 16 bits the forward sees the features unrounded by a normalisation.
    assert got[0] < 1e-5


def test_each_subset_of_gradients() -> None:
    inputs = longer(random_inputs(40, 16, torch.float32, device=DEVICE))
    assert_each_subset(clip((3, 16)), inputs, rtol=1e-4, atol=1e-7)


def test_prefixes_of_zeros() -> None:
    q, k, scale = random_inputs(6, 5, torch.float32, device=DEVICE, scale=3.0)
    with torch.no_grad():
        q[1, :2] = 0
        k[3] = 0
    got = loss_and_gradients(clip((2, 4)), (q, k, scale))
    expected = loss_and_gradients(clip((2, 4), "reference"), (q, k, scale))
    assert all(x.isfinite().all() for x in got)
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)
    assert not got[1][:, 4].any(), "beyond the widest prefix"


@pytest.mark.parametrize("outer", [2.0**-20, 65536.0])
def test_float16_at_any_scale_of_the_loss(outer: float) -> None:
    inputs = random_inputs(40, 16, torch.float16, scale=16.0, device=DEVICE)
    got = loss_and_gradients(clip((4, 16)), inputs, outer=outer)
    expected = loss_and_gradients(clip((4, 16), "reference"), inputs, outer=outer)
    # Gradients that small are subnormal numbers of fp16.
    tolerance = 4e-3 if outer > 1 else 0.1
    assert max(relative_errors(got, expected)) < tolerance
    assert relative_errors(got, expected)[3] < 2e-3


def test_runs_are_bit_equal_and_autocast_changes_nothing() -> None:
    inputs = longer(random_inputs(70, 33, torch.float16, device=DEVICE))
    first, second = (loss_and_gradients(clip((8, 33)), inputs) for _ in range(2))
    inputs = inputs.to(torch.float32)
    expected = loss_and_gradients(clip((8, 33)), inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = loss_and_gradients(clip((8, 33)), inputs)
    for a, b in (*zip(first, second, strict=True), *zip(got, expected, strict=True)):
        assert torch.equal(a, b)


def test_other_rules_take_one_pass_for_each_width(launched: Counter[str]) -> None:
    q, k, scale = longer(random_inputs(30, 12, torch.float32, device=DEVICE, scale=5.0))
    labels = torch.arange(30, device=DEVICE) % 7

    def losses(impl: Any) -> list[Callable[..., Tensor]]:
        def of(build: Any, *features: Tensor, **options: Any) -> Tensor:
            return total(prefix_losses(build, (5, 12), *features, impl=impl, **options))

        return [
            lambda q, k, s: of(ClipLoss, q, k, logit_scale=s, labels=labels),
            lambda q, k, s: of(InfoNCELoss, q, k, logit_scale=s, false_negative_margin=0.3),
            lambda q, k, s: of(NTXentLoss, q, k, logit_scale=s),
            lambda q, k, s: of(
                SupConLoss, torch.cat((q, k)), logit_scale=s, labels=labels.repeat(2)
            ),
        ]

    for ours, reference in zip(losses("triton"), losses("reference"), strict=True):
        got = loss_and_gradients(ours, (q, k, scale))
        errors = relative_errors(got, loss_and_gradients(reference, (q, k, scale)))
        assert max(errors) < 1e-5
    assert not launched


def test_segments_are_whole_steps() -> None:
    features = torch.arange(12.0, device=DEVICE).view(2, 6) + 1
    segments = Segments((1, 4), 2)
    assert segments.ends == (2, 6)
    assert segments.padded(features).tolist() == [[1, 0, 2, 3, 4, 0], [7, 0, 8, 9, 10, 0]]
    whole = Segments((2, 6), 2)
    assert whole.ends == (2, 6) and whole.padded(features).data_ptr() == features.data_ptr()


def test_workspace_stays_within_its_budget() -> None:
    config = prefix_config(torch.empty(1, device=DEVICE), gradient=True)
    for N in (100, 10_000, 65_536, 1_000_000):
        for planes in (2, 5):
            rows, columns = panel_shape(config, N, 4 * planes)
            assert rows * columns * 4 * planes <= config.workspace_bytes
