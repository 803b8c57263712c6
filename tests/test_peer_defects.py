"""What went wrong in other implementations of these losses, and does not here.

One test for each kind of defect: wrong or missing gradients of the temperature, gradients that are
not those of the loss, overflow, saturation, widths and batches that fail, memory that grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from clip_inputs import (
    CASES,
    Products,
    case,
    clustered_inputs,
    loss_and_gradients,
    poisoned_memory,
    random_inputs,
    relative_errors,
    small_tiles,
    unit,
)
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from gradcache_clip import GradCache
from gradcache_clip.memory.counter import LiveBytes
from gradcache_clip.ops import clip_loss, info_nce_loss, nt_xent_loss, sup_con_loss

every_loss = pytest.mark.parametrize("name", CASES)
reference = partial(clip_loss, impl="reference")


def four_losses(q: Tensor, k: Tensor, scale: float | Tensor) -> list[Tensor]:
    labels = torch.arange(len(q)).repeat(2)
    return [
        clip_loss(q, k, scale),
        info_nce_loss(q, k, scale),
        nt_xent_loss(q, k, scale),
        sup_con_loss(torch.cat((q, k)), labels, scale),
    ]


@every_loss
def test_temperature_may_be_a_parameter(name: str) -> None:
    """Elsewhere a float alone is accepted, a parameter crashes, or is ignored without a word."""
    each = case(name, 20, 6, torch.float32)
    log_scale = nn.Parameter(torch.tensor(math.log(5.0)))
    loss = each.loss(*each.leaves[:-1], log_scale.exp())
    loss.backward()
    h = 1e-3
    with torch.no_grad():
        ahead, behind = (
            each.loss(*(x.double() for x in each.leaves[:-1]), (log_scale.double() + step).exp())
            for step in (h, -h)
        )
    assert log_scale.grad is not None
    assert log_scale.grad.item() == pytest.approx(((ahead - behind) / (2 * h)).item(), rel=1e-4)
    assert ahead != behind


@every_loss
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_gradient_is_that_of_the_loss(name: str, temperature: float) -> None:
    """Elsewhere it is rescaled "for stability": by 2.1 or 0.8 in these two settings."""
    each = case(name, 64, 8, scale=1 / temperature)
    directions = [torch.randn_like(leaf) for leaf in each.leaves]
    gradients = torch.autograd.grad(each.loss(*each.leaves), each.leaves)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    h = 1e-6
    with torch.no_grad():
        ahead, behind = (
            each.loss(*(x + step * d for x, d in zip(each.leaves, directions, strict=True)))
            for step in (h, -h)
        )
    assert slope.item() == pytest.approx(((ahead - behind) / (2 * h)).item(), rel=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_modality_gap_at_the_largest_scale(symmetric: bool) -> None:
    """With 1/temperature subtracted for the maximum every exponential underflows: loss -inf."""
    q, k, scale = clustered_inputs(-0.63, 1024, 64, torch.float32)
    logits = (scale * q @ k.T).detach()
    assert logits.mean().item() == pytest.approx(-63, abs=2)
    assert (logits - scale).exp().sum(1).log().isneginf().all()
    loss = partial(info_nce_loss, symmetric=symmetric)
    got = loss_and_gradients(loss, (q, k, scale))
    exact = [x.detach().double().requires_grad_() for x in (q, k, scale)]
    truth = loss_and_gradients(partial(loss, impl="reference"), exact)
    assert truth[0] > math.log(1024)
    assert max(relative_errors(got, truth)) < 1e-4


def test_saturated_pairs_keep_their_loss_and_their_gradient() -> None:
    """Elsewhere the loss stops at 43.67, and beyond it the gradient is 0."""
    axes = torch.eye(2)
    for scale, expected in ((50.0, 50.0), (100.0, 100.0)):
        q, k = axes.clone().requires_grad_(), axes.flip(0).clone().requires_grad_()
        for loss in four_losses(q, k, scale):
            assert loss.item() == pytest.approx(expected, rel=1e-6)
            gradients = torch.autograd.grad(loss, (q, k), retain_graph=True)
            assert min(gradient.abs().max() for gradient in gradients) > scale / 4


def test_exponentials_do_not_overflow() -> None:
    """exp(100) is no fp32 number: without the maximum taken off, inf - inf."""
    assert torch.tensor(100.0).exp().isinf()
    q = normalize(1 + 0.01 * torch.randn(70, 16), dim=1)
    for scale in (100.0, 1000.0):
        for loss in four_losses(q, q.flip(0), scale):
            assert loss.isfinite() and loss > 0


def test_loss_is_never_negative() -> None:
    for scale in (0.0, 1.0, 30.0, 100.0):
        assert all(loss >= 0 for loss in four_losses(torch.eye(9), torch.eye(9), scale))


@pytest.mark.parametrize("chunk_size", [8, 16, 64])
def test_scale_gradient_does_not_count_the_chunks(chunk_size: int) -> None:
    """Elsewhere it is multiplied by the number of accumulation steps."""
    inputs = torch.randn(64, 5), torch.randn(64, 5)
    encoders = nn.Linear(5, 7), nn.Linear(5, 7)
    log_scale = nn.Parameter(torch.tensor(1.5))

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return clip_loss(normalize(q), normalize(k), log_scale.exp())

    features = [encoder(x) for encoder, x in zip(encoders, inputs, strict=True)]
    (expected,) = torch.autograd.grad(loss(*features), log_scale)
    GradCache(encoders, loss, chunk_size=chunk_size)(*inputs)
    torch.testing.assert_close(log_scale.grad, expected)


@every_loss
def test_outer_factor_reaches_the_scale(name: str) -> None:
    """Elsewhere the temperature's gradient is stored in the forward and no factor reaches it."""
    each = case(name, 20, 6, torch.float32)
    *_, plain = torch.autograd.grad(each.loss(*each.leaves), each.leaves)
    for factor in (0.5, 1024.0, 65536.0):
        *_, scaled = torch.autograd.grad(factor * each.loss(*each.leaves), each.leaves)
        assert torch.equal(scaled, factor * plain)


@pytest.mark.parametrize("D", [1, 33, 123, 384, 640, 1000, 1152])
def test_any_width(D: int) -> None:
    """Elsewhere it is a multiple of 64 or 256, or below 64 a power of two."""
    q, k, scale = random_inputs(20, D, torch.float64)
    got = loss_and_gradients(clip_loss, (q, k, scale))
    expected = loss_and_gradients(reference, (q, k, scale))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("B", [1, 63, 65, 100, 191])
@pytest.mark.parametrize("loss", [clip_loss, nt_xent_loss])
def test_any_batch(B: int, loss: Callable[..., Tensor]) -> None:
    """Elsewhere the last, ragged tile reads past the end when B % 64 is not 0."""
    leaves = random_inputs(B, 16, torch.float64)
    with poisoned_memory(), small_tiles(64, 64):
        got = loss_and_gradients(loss, leaves)
    expected = loss_and_gradients(partial(loss, impl="reference"), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def near_each_other(rows: int, D: int, cosine: float) -> Tensor:
    axis = torch.zeros(D, dtype=torch.float64)
    axis[0] = cosine**0.5
    return (axis + (1 - cosine) ** 0.5 * unit(rows, D)).bfloat16()


def filtered_gradient(q: Tensor, k: Tensor, scale: float, eps: float, edge: int = 128) -> Tensor:
    """dq of softmax less target, without the tiles in which no entry reaches eps."""
    G = (scale * q @ k.T).softmax(1)
    G.diagonal().sub_(1)
    tiles = G.unflatten(1, (-1, edge)).unflatten(0, (-1, edge))
    kept = tiles.abs().amax((1, 3), keepdim=True) >= eps
    return (tiles * kept).reshape_as(G) @ k


def test_small_gradients_are_not_filtered() -> None:
    """Early in training every share of a softmax over 8,192 columns is small, and their sum not."""
    B, columns, scale = 256, 8192, 1 / 0.07
    q, k = near_each_other(B, 512, 0.9), near_each_other(columns, 512, 0.9)
    assert (q.double() @ k.double().T).mean().item() == pytest.approx(0.9, abs=0.01)
    leaves = [x.detach().requires_grad_() for x in (q, k[:B], k[B:])]
    loss = info_nce_loss(*leaves[:2], scale, hard_negatives=leaves[2])
    got = torch.autograd.grad(loss, leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    logits = scale * exact[0] @ torch.cat(exact[1:]).T
    truth = torch.autograd.grad(cross_entropy(logits, torch.arange(B)), exact)
    for ours, true in zip(got, truth, strict=True):
        assert direction(ours, true) > 0.999
    eps = torch.finfo(torch.bfloat16).eps / 32
    assert direction(filtered_gradient(q.double(), k.double(), scale, eps), truth[0]) < 0.4
    assert direction(filtered_gradient(q.double(), k.double(), scale, 0.0), truth[0]) > 0.999


def direction(got: Tensor, expected: Tensor) -> float:
    return cosine_similarity(got.double().flatten(), expected.flatten(), dim=0).item()


def test_gradients_add_up_in_single_precision() -> None:
    """Elsewhere each tile is added to a bf16 gradient, and small tiles vanish in large sums."""
    q, k, scale = clustered_inputs(0.9, 600, 16, torch.bfloat16)
    with small_tiles(20, 20):
        got = loss_and_gradients(clip_loss, (q, k, scale))
    exact = [x.detach().double().requires_grad_() for x in (q, k, scale)]
    truth = loss_and_gradients(reference, exact)
    # One rounding to bf16 of each entry at the end, and nothing else.
    for gradient, true in zip(got[1:3], truth[1:3], strict=True):
        rounding = true.abs() * torch.finfo(torch.bfloat16).eps / 2
        assert ((gradient - true).abs() <= rounding + 1e-6 * true.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_narrow_features_has_the_digits_of_fp32(dtype: torch.dtype) -> None:
    """Elsewhere it is off by 1e-3 in bf16 and 4e-4 in fp16."""
    q, k, scale = random_inputs(300, 32, dtype)
    truth = [loss.item() for loss in four_losses(q.double(), k.double(), scale.double())]
    got = [loss.item() for loss in four_losses(q, k, scale)]
    assert got == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    """Elsewhere atomic additions and locks decide the order of a sum."""
    for name in CASES:
        each = case(name, 150, 16, dtype)
        with small_tiles(32, 32):
            first, second = each.outcome(), each.outcome()
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_label_tensor_for_both_sides() -> None:
    """Elsewhere the same tensor means "remove self pairs": then a pair is no positive of itself."""
    q, labels = unit(6, 4), torch.arange(6)
    loss = clip_loss(q, q, 3.0, labels=labels)
    torch.testing.assert_close(loss, clip_loss(q, q, 3.0, labels=labels.clone()))
    torch.testing.assert_close(loss, clip_loss(q, q.clone(), 3.0))
    assert loss > 0
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.equal(sup_con_loss(q, labels, 3.0), sup_con_loss(q, labels.clone(), 3.0))


def peak_growth(B: int, loss: Callable[..., Tensor]) -> int:
    """Bytes beyond the features and their gradients at the peak of a forward and a backward."""
    leaves = random_inputs(B, 4, torch.float32)
    live = LiveBytes(start=leaves)
    with small_tiles(32, 32, watched_by=live):
        loss(*leaves).backward()
    return live.peak_bytes - 2 * live.start_bytes


def margin_loss(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    return info_nce_loss(q, k, scale, false_negative_margin=0.1, symmetric=True)


def smoothed_loss(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    return clip_loss(q, k, scale, label_smoothing=0.1)


def labelled_loss(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    return sup_con_loss(torch.cat((q, k)), torch.arange(2 * len(q)) // 2, scale)


@pytest.mark.parametrize("loss", [nt_xent_loss, margin_loss, smoothed_loss, labelled_loss])
def test_memory_grows_with_the_batch_and_not_with_its_square(loss: Callable[..., Tensor]) -> None:
    """Elsewhere NT-Xent takes B^3 or four B x B, a margin or smoothing the full logits."""
    small, large = peak_growth(100, loss), peak_growth(200, loss)
    assert 0 < large < 2.2 * small
    assert large < 4 * 200 * 200


def test_the_second_backward_of_a_retained_graph() -> None:
    """Elsewhere gradients are computed in the forward and handed out once."""
    q, k, scale = random_inputs(20, 6, torch.float32)
    loss = clip_loss(q, k, scale)
    loss.backward(retain_graph=True)
    once = q.grad.clone()
    loss.backward()
    assert torch.equal(q.grad, 2 * once)


def test_the_forward_computes_no_gradient() -> None:
    """Elsewhere it does, and an evaluation pays for it."""
    leaves = random_inputs(64, 6, torch.float32)
    products = Products()
    with small_tiles(32, 32, watched_by=products):
        clip_loss(*leaves)
    assert products.flops == 2 * 64 * 64 * 6


def test_symmetric_is_the_mean_of_the_directions() -> None:
    """Elsewhere it is their sum."""
    q, k, scale = random_inputs(30, 6, torch.float64)
    there, back = info_nce_loss(q, k, scale), info_nce_loss(k, q, scale)
    for loss in (clip_loss(q, k, scale), info_nce_loss(q, k, scale, symmetric=True)):
        torch.testing.assert_close(loss, (there + back) / 2)


def test_a_frozen_tower_needs_no_special_call() -> None:
    """Elsewhere features without a graph raise."""
    q, k, scale = random_inputs(30, 6, torch.float64)
    expected = torch.autograd.grad(clip_loss(q, k, scale), k)
    got: Any = torch.autograd.grad(clip_loss(q.detach(), k, scale.item()), k)
    torch.testing.assert_close(got, expected)
