from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradcache_clip import (
    ClipLoss,
    InfoNCELoss,
    LateInteractionLoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
)
from gradcache_clip.losses.scaled import ScaledLoss, ScaleOptions


def by_the_equations(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Cosine similarities, cross-entropy over rows and over columns, mean: a loop, in fp64."""
    images, texts = images.double(), texts.double()
    size = len(images)
    cosine = [[(a @ b) / (a.norm() * b.norm()) for b in texts.unbind()] for a in images.unbind()]
    logits = torch.stack([torch.stack(row) for row in cosine]) * logit_scale.double()
    image_to_text = -sum(logits[i, i] - logits[i, :].exp().sum().log() for i in range(size)) / size
    text_to_image = -sum(logits[i, i] - logits[:, i].exp().sum().log() for i in range(size)) / size
    return (image_to_text + text_to_image) / 2


def features(dtype: torch.dtype = torch.float64, rows: int = 9) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(rows, 7, dtype=dtype, requires_grad=True) for _ in range(2))


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_loss_and_gradients_equal_the_equations(impl):
    images, texts = features()
    loss = ClipLoss(impl=impl).double()
    ours = torch.autograd.grad(loss(images, texts).loss, [images, texts, loss.log_logit_scale])
    truth_loss = by_the_equations(images, texts, loss.logit_scale)
    truth = torch.autograd.grad(truth_loss, [images, texts, loss.log_logit_scale])
    torch.testing.assert_close(loss(images, texts).loss, truth_loss, rtol=1e-12, atol=0)
    for got, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_starts_where_clip_starts():
    loss = ClipLoss()
    assert loss.log_logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert loss.logit_scale.item() == pytest.approx(1 / 0.07)


def test_the_scale_is_held_at_its_bound_and_can_come_back():
    loss, (images, texts) = ClipLoss(max_logit_scale=20.0), features(torch.float32)
    with torch.no_grad():
        loss.log_logit_scale.fill_(math.log(400.0))
    out = loss(images, texts)
    torch.testing.assert_close(loss.logit_scale.item(), 20.0)
    out.loss.backward()
    assert loss.log_logit_scale.grad.abs() > 0


def test_a_scale_of_the_callers_own():
    images, texts = features()
    out = ClipLoss()(images, texts, torch.tensor(3.0).double())
    torch.testing.assert_close(out.loss, by_the_equations(images, texts, torch.tensor(3.0)))


def test_features_may_come_normalised():
    images, texts = (F.normalize(x, dim=1) for x in features())
    with_it, without = ClipLoss()(images, texts), ClipLoss(normalize=False)(images, texts)
    torch.testing.assert_close(with_it.loss, without.loss)


def test_fp16_features_whose_norm_overflows():
    images = (torch.randn(8, 512) * 5000).half().requires_grad_()
    out = ClipLoss()(images, images)
    assert out.loss < 1e-3 and out.accuracy == 1
    zero = torch.randn(8, 16).half()
    zero[0] = 0
    torch.testing.assert_close(
        ClipLoss()(zero, zero).loss, ClipLoss()(zero.float(), zero.float()).loss, rtol=1e-3, atol=0
    )


def test_accuracy_counts_both_directions():
    images = torch.eye(4)
    texts = torch.eye(4)[[0, 1, 3, 2]]
    out = ClipLoss()(images, texts)
    assert out.image_to_text_accuracy == out.text_to_image_accuracy == out.accuracy == 0.5
    one_text_wins = torch.eye(4)[[0, 0, 0, 0]] + 0.1 * torch.eye(4)
    out = ClipLoss()(images, one_text_wins)
    assert (out.image_to_text_accuracy, out.text_to_image_accuracy) == (1.0, 0.25)
    assert out.accuracy == 0.625


def test_chance_level():
    out = ClipLoss()(torch.ones(8, 3), torch.ones(8, 3))
    torch.testing.assert_close(out.loss.item(), math.log(8))
    assert out.accuracy == 0, "a tie is no win"


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (torch.ones(4, 3), torch.ones(5, 3), r"text_features: expected the shape.*\(4, 3\)"),
        (torch.ones(4, 3), torch.ones(4, 2), "project both to the same width"),
        (torch.ones(4, 3, 2), torch.ones(4, 3), r"image_features: expected a non-empty \(B, D\)"),
        (torch.ones(1, 3), torch.ones(1, 3), "batch: expected at least 2 pairs, got 1"),
    ],
)
def test_bad_features(images, texts, message):
    with pytest.raises(ValueError, match=message):
        ClipLoss()(images, texts)


def test_features_that_are_no_tensor():
    with pytest.raises(TypeError, match="text_features: expected a tensor, got list"):
        ClipLoss()(torch.ones(4, 3), [1, 2])


@pytest.mark.parametrize("scale", [0.0, -1.0, 101.0])
def test_bad_scale(scale):
    with pytest.raises(ValueError, match="init_logit_scale: expected 0 < init_logit_scale"):
        ClipLoss(init_logit_scale=scale)


def test_every_loss_takes_the_keywords_of_the_base():
    """`ScaleOptions` is what type checkers read; the base is what a call reaches."""
    taken = set(inspect.signature(ScaledLoss.__init__).parameters) - {"self"}
    assert set(ScaleOptions.__annotations__) == taken
    options = {"init_logit_scale": 2.0, "max_logit_scale": 3.0, "normalize": False,
               "impl": "tiled", "group": None, "exchange": "ring"}  # fmt: skip
    assert set(options) == taken
    for build in (ClipLoss, SigLipLoss, InfoNCELoss, NTXentLoss, SupConLoss, LateInteractionLoss):
        loss = build(**options)
        assert (loss.normalize, loss.impl, loss.exchange) == (False, "tiled", "ring")
        assert math.isclose(loss.logit_scale.item(), 2.0, rel_tol=1e-6)
        assert math.isclose(loss.max_log_logit_scale, math.log(3.0))
        with pytest.raises(TypeError, match="normalise"):
            build(normalise=False)
