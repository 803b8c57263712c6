"""Tiles of sm_90 and sm_100 that are not ragged, against the reference in fp64.

test_kernels.py runs this file in the interpreter, and on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from clip_inputs import ROUNDED_LOGIT, loss_and_gradients, random_inputs
from torch import Tensor

from gradcache_clip import ClipLoss
from gradcache_clip.kernels import (
    contrast_gradient,
    contrast_statistics,
    prefix_gradient,
    prefix_statistics,
    sigmoid,
)
from gradcache_clip.kernels.launch_config import INTERPRETED, prefix_entry, table_entry
from gradcache_clip.ops import clip_loss, clip_loss_with_accuracy, siglip_loss

DEVICE = "cpu" if INTERPRETED else "cuda"
# Whole tiles in both directions; the interpreter takes a quarter of the time for half as many.
B, D = (1024 if INTERPRETED else 2048), 512


def launch_as_on(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        entry = partial(table_entry, architecture, torch.float16)
        for module in (contrast_gradient, contrast_statistics, sigmoid):
            monkeypatch.setattr(module, "launch_config", lambda _, **rules: entry(**rules))
        of_prefixes = partial(prefix_entry, architecture, torch.float16)
        for module in (prefix_gradient, prefix_statistics):
            monkeypatch.setattr(module, "prefix_config", lambda _, **way: of_prefixes(**way))


def clip_with_maxima(q: Tensor, k: Tensor, scale: Tensor, impl: str) -> Tensor:
    return clip_loss_with_accuracy(q, k, scale, impl=impl).loss


def sigmoid_loss(q: Tensor, k: Tensor, scale: Tensor, impl: str) -> Tensor:
    return siglip_loss(q, k, scale, -5.0, impl=impl)


def prefixes(q: Tensor, k: Tensor, scale: Tensor, impl: str) -> Tensor:
    each = ClipLoss(impl=impl).prefixes([128, 512], q, k, scale)
    return torch.stack([one.loss for one in each]).sum()


@pytest.mark.parametrize("loss", [clip_loss, clip_with_maxima, sigmoid_loss, prefixes])
def test_whole_tiles(loss: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    launch_as_on(90, monkeypatch)
    equals_the_reference(loss)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has launches of its own")
def test_whole_tiles_of_sm_100(monkeypatch: pytest.MonkeyPatch) -> None:
    launch_as_on(100, monkeypatch)
    equals_the_reference(clip_loss)


def equals_the_reference(loss: Callable[..., Tensor]) -> None:
    inputs = random_inputs(B, D, torch.float16, device=DEVICE)
    got = loss_and_gradients(partial(loss, impl="triton"), inputs)
    expected = loss_and_gradients(partial(loss, impl="reference"), inputs.to(torch.float64))
    tolerance = 8 * torch.finfo(torch.float16).eps + ROUNDED_LOGIT
    for value, want in zip(got, expected, strict=True):
        scale = want.abs().max().clamp_min(1e-3)
        assert ((value.double() - want).abs().max() / scale).item() < tolerance
