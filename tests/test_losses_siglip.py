"""SigLipLoss: open_clip's call, its parameters, the engine around it, and two processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_shot import gradient_errors, one_shot, twins, worst
from siglip_inputs import plain_loss
from torch import Tensor, nn

from gradcache_clip import GradCache
from gradcache_clip.losses.clip import ContrastiveOutput
from gradcache_clip.losses.siglip import SigLipLoss


def features(rows: int = 9, texts: int | None = None) -> tuple[Tensor, Tensor]:
    """Not of unit length."""
    sizes = rows, texts or rows
    return tuple(torch.randn(n, 7, dtype=torch.float64, requires_grad=True) for n in sizes)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_loss_and_gradients_equal_open_clip(impl: Any) -> None:
    images, texts = features()
    loss = SigLipLoss(impl=impl).double()
    out = loss(images, texts)
    unit = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    truth = plain_loss(*unit, loss.log_logit_scale.exp(), loss.logit_bias)
    torch.testing.assert_close(out.loss, truth, rtol=1e-12, atol=0)
    leaves = [images, texts, *loss.parameters()]
    expected = torch.autograd.grad(truth, leaves)
    for a, b in zip(torch.autograd.grad(out.loss, leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_starts_where_siglip_starts() -> None:
    loss = SigLipLoss()
    assert {name: p.item() for name, p in loss.named_parameters()} == {
        "log_logit_scale": pytest.approx(math.log(10)),
        "logit_bias": -10,
    }
    custom = SigLipLoss(init_logit_scale=3.0, init_logit_bias=1)
    assert (custom.logit_scale.item(), custom.logit_bias.item()) == (pytest.approx(3.0), 1.0)


def test_open_clips_call() -> None:
    """Features of unit length, the exponentiated scale and the bias of the model, by position."""
    images, texts = (F.normalize(x, dim=1) for x in features())
    scale, bias = torch.tensor([4.0, -2.0], dtype=torch.float64, requires_grad=True).unbind()
    loss = SigLipLoss()
    out = loss(images, texts, scale, bias)
    torch.testing.assert_close(out.loss, plain_loss(images, texts, scale, bias))
    out.loss.backward()
    assert all(p.grad is None for p in loss.parameters())
    scale_alone = loss(images, texts, scale).loss
    torch.testing.assert_close(scale_alone, plain_loss(images, texts, scale, loss.logit_bias))


def test_no_bound_but_on_request() -> None:
    images, texts = features()
    for bound, expected in ((None, 400.0), (20.0, 20.0)):
        loss = SigLipLoss(max_logit_scale=bound)
        with torch.no_grad():
            loss.log_logit_scale.fill_(math.log(400.0))
        loss(images, texts).loss.backward()
        assert loss.logit_scale.item() == pytest.approx(expected)
        assert loss.log_logit_scale.grad.abs() > 0
    with pytest.raises(ValueError, match="init_logit_scale: expected 0 < init_logit_scale"):
        SigLipLoss(init_logit_scale=0)


def test_features_may_come_normalised() -> None:
    images, texts = (F.normalize(x, dim=1) for x in features())
    with_it, without = SigLipLoss()(images, texts), SigLipLoss(normalize=False)(images, texts)
    torch.testing.assert_close(with_it.loss, without.loss)


def test_a_single_pair_is_legitimate() -> None:
    out = SigLipLoss()(torch.ones(1, 3), torch.ones(1, 3))
    assert isinstance(out, ContrastiveOutput)
    assert out.loss.item() == pytest.approx(math.log(2))
    assert out.accuracy == 1


def test_labels_and_captions_of_one_image() -> None:
    images, texts = features(4, 6)
    owner = torch.tensor([0, 0, 1, 2, 3, 3])
    loss = SigLipLoss().double()
    out = loss(images, texts, labels=(torch.arange(4), owner))
    logits = 10 * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T - 10
    signs = torch.where(torch.arange(4)[:, None] == owner, 1, -1)
    torch.testing.assert_close(out.loss, F.softplus(-signs * logits).sum() / 4)
    repeated, labels = images[owner], owner
    out = loss(repeated, texts, labels=labels)
    pairs = loss(repeated, texts, labels=(labels, labels))
    assert all(torch.equal(a, b) for a, b in zip(out, pairs, strict=True))
    assert out.loss != loss(repeated, texts).loss


def test_accuracy_counts_both_directions() -> None:
    images = torch.eye(4)
    out = SigLipLoss()(images, torch.eye(4)[[0, 1, 3, 2]])
    assert out.image_to_text_accuracy == out.text_to_image_accuracy == out.accuracy == 0.5
    one_text_wins = torch.eye(4)[[0, 0, 0, 0]] + 0.1 * torch.eye(4)
    out = SigLipLoss()(images, one_text_wins)
    assert (out.image_to_text_accuracy, out.text_to_image_accuracy) == (1.0, 0.25)


ROWS = torch.arange(4)


@pytest.mark.parametrize(
    ("images", "texts", "labels", "message"),
    [
        (torch.ones(4, 3), torch.ones(5, 3), None, r"text_features: expected the shape"),
        (torch.ones(4, 3, 2), torch.ones(4, 3), None, r"image_features: expected a .*\(B, D\)"),
        (torch.ones(4, 3), torch.ones(4, 3), ROWS[:3], r"labels: expected shape \(4,\)"),
        (torch.ones(4, 3), torch.ones(5, 3), (ROWS, ROWS), r"labels\[1\]: expected shape \(5,\)"),
        (torch.ones(4, 3), torch.ones(4), (ROWS, ROWS), r"text_features: expected a non-empty"),
        (torch.ones(4, 3), torch.ones(4, 2), (ROWS, ROWS), "expected the width"),
        (torch.ones(4, 3), torch.ones(4, 3), [ROWS], "labels: expected one vector or a pair"),
    ],
)
def test_bad_input_is_named(images: Tensor, texts: Tensor, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SigLipLoss()(images, texts, labels=labels)


def towers() -> tuple[nn.Module, nn.Module, SigLipLoss]:
    torch.manual_seed(7)
    image = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 8))
    text = nn.Sequential(nn.Linear(9, 24), nn.GELU(), nn.Linear(24, 8))
    return image.double(), text.double(), SigLipLoss().double()


def batch(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(rows, w, generator=generator).double() for w in (6, 9))


def test_gradient_caching_around_it() -> None:
    ours, truth = twins(*towers())
    inputs = batch(20)
    out = GradCache(ours[:2], ours[2], chunk_size=6)(*inputs)
    expected = one_shot(truth[:2], truth[2], inputs)
    torch.testing.assert_close(out.loss, expected.loss.detach(), rtol=1e-12, atol=0)
    name, error = worst(gradient_errors(ours, truth))
    assert error < 1e-10, (name, error)
