"""The CLIP kernels against the reference: in Triton's interpreter on a CPU, or on a GPU.

test_kernels_clip.py runs this file in a process of its own, because Triton decides at its first
import whether kernels are interpreted.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

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
)

from gradcache_clip.kernels import clip_gradient, clip_statistics
from gradcache_clip.kernels.launch_config import (
    INTERPRETED,
    LaunchConfig,
    launch_config,
    panel_shape,
    stripe_rows,
)
from gradcache_clip.ops import clip_loss, clip_loss_with_accuracy

DEVICE = "cpu" if INTERPRETED else "cuda"
# Products of bfloat16 in the interpreter are silently wrong.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])

reference = partial(clip_loss, impl="reference")
triton = partial(clip_loss, impl="triton")


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Several stripes and panels at B = 150, and a count of what was launched."""
    tiles = LaunchConfig(32, 32, 32, num_warps=4, num_stages=1, GROUP_M=2, workspace_bytes=8192)
    count: Counter[str] = Counter()
    for module in (clip_gradient, clip_statistics):
        monkeypatch.setattr(module, "launch_config", lambda features: tiles)
    _count_calls(monkeypatch, count, clip_statistics._Running, "merge")
    _count_calls(monkeypatch, count, clip_gradient._Panels, "gradient")
    return count


def _count_calls(
    monkeypatch: pytest.MonkeyPatch, count: Counter[str], owner: Any, name: str
) -> None:
    original = getattr(owner, name)

    def counted(*args: Any) -> Any:
        count[name] += 1
        return original(*args)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "D"), [(1, 3), (2, 16), (63, 64), (65, 64), (252, 123)])
def test_equals_the_reference(dtype: torch.dtype, B: int, D: int) -> None:
    inputs = random_inputs(B, D, dtype, scale=5.0, device=DEVICE)
    with poisoned_memory():
        got = loss_and_gradients(triton, inputs, outer=-2.5)
    expected = loss_and_gradients(reference, inputs, outer=-2.5)
    tolerance = 8 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    for value, want in zip(got, expected, strict=True):
        assert value.isfinite().all()
        scale = want.abs().max().clamp_min(1e-3)
        assert ((value - want).abs().max() / scale).item() < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_stripes_and_panels(dtype: torch.dtype, narrow: Counter[str]) -> None:
    inputs = random_inputs(150, 40, dtype, device=DEVICE)
    config = clip_gradient.launch_config(inputs.q)
    assert stripe_rows(config, 150) < 150
    assert max(panel_shape(config, 150, inputs.q.element_size())) < 150
    with poisoned_memory():
        got = loss_and_gradients(triton, inputs)
    # Stripes of 96 rows, with two merges each; panels of 64 x 32 (fp32) or 64 x 64 (16 bit).
    assert narrow["merge"] == 2 * 2
    assert narrow["gradient"] == (3 * 5 if dtype == torch.float32 else 3 * 3)
    errors = relative_errors(got, loss_and_gradients(reference, inputs))
    assert max(errors) < 8 * torch.finfo(dtype).eps + ROUNDED_LOGIT


def test_merge_reads_many_partials_at_once() -> None:
    """More tiles in a row than one step of the merge takes."""
    inputs = random_inputs(16 * 65, 16, torch.float32, device=DEVICE)
    config = LaunchConfig(2048 if INTERPRETED else 64, 16, 16, num_warps=4, num_stages=1)
    with torch.no_grad():
        _, row_max, row_sum, *_ = clip_statistics.clip_statistics(*inputs, config=config)
        logits = 30.0 * (inputs.q @ inputs.k.T).fill_diagonal_(-torch.inf)
    neg_lse = math.log(2) * row_max + row_sum.log()
    torch.testing.assert_close(neg_lse, logits.logsumexp(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [-0.6, 0.0, 0.9])
def test_error_budget(dtype: torch.dtype, cosine: float) -> None:
    """No further from fp64 than plain PyTorch in the same dtype, plus a few roundings."""
    inputs = clustered_inputs(cosine, 130, 64, dtype, device=DEVICE)
    truth = loss_and_gradients(reference, inputs.to(torch.float64))
    budget = relative_errors(loss_and_gradients(plain_loss, inputs), truth)
    got = relative_errors(loss_and_gradients(triton, inputs), truth)
    tolerance = 4 * torch.finfo(dtype).eps + ROUNDED_LOGIT
    assert all(error <= plain + tolerance for error, plain in zip(got, budget, strict=True))
    assert got[0] < 1e-5


@pytest.mark.parametrize("needed", range(1, 8))
def test_each_subset_of_gradients(needed: int) -> None:
    inputs = random_inputs(65, 16, torch.float32, device=DEVICE)
    full = torch.autograd.grad(triton(*inputs), inputs)
    wanted = [bool(needed >> bit & 1) for bit in range(3)]
    leaves = Inputs(*(x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)))
    triton(*leaves).backward()
    for leaf, gradient, want in zip(leaves, full, wanted, strict=True):
        assert (leaf.grad is not None) == want
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-7)


def test_accuracies_count_ranks_and_ties_are_wrong() -> None:
    q = torch.eye(4, device=DEVICE)
    k = torch.stack([q[0], q[1], q[1], q[0] + q[3]])
    result = clip_loss_with_accuracy(q, k, 10.0, impl="triton")
    assert result.image_to_text_accuracy.item() == 0.25
    assert result.text_to_image_accuracy.item() == 0.5


def test_small_gradients_survive_float16() -> None:
    """Every term of G is about exp(-16), where fp16 has two bits; the loss is scaled by 1e5."""
    q = torch.eye(8, dtype=torch.float16, device=DEVICE)
    inputs = Inputs(q, q.clone(), torch.tensor(16.0, device=DEVICE)).to(torch.float16)
    got = loss_and_gradients(triton, inputs, outer=1e5)
    expected = loss_and_gradients(reference, inputs.to(torch.float64), outer=1e5)
    assert max(relative_errors(got, expected)) < 2e-3


def test_runs_are_bit_equal() -> None:
    inputs = random_inputs(130, 33, torch.float16, device=DEVICE)
    first, second = (loss_and_gradients(triton, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_exact_under_autocast() -> None:
    inputs = random_inputs(65, 33, torch.float32, device=DEVICE)
    expected = loss_and_gradients(triton, inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = loss_and_gradients(triton, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


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
