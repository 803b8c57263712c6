"""Batches of new sizes reuse compiled kernels: Triton's cache has one entry for all of them.

test_kernels.py runs this file in the interpreter, whose launches kernel_keys.py knows.
"""

from __future__ import annotations

import kernel_keys
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from gradcache_clip import ClipLoss, InfoNCELoss, LateInteractionLoss, SigLipLoss
from gradcache_clip.kernels.launch_config import INTERPRETED
from gradcache_clip.ops import clip_loss


def features(B: int, D: int) -> Tensor:
    """Slices, as a flat buffer holds them: addresses of any alignment."""
    rows = torch.randn(B * D + B)[B:].view(B, D)
    return normalize(rows, dim=1).requires_grad_()


def step(B: int, D: int) -> None:
    q, k, tokens = features(B, D), features(B, D), torch.randn(B, 3, D, requires_grad=True)
    scale = torch.randn(B)[B // 2].abs()
    losses = [
        clip_loss(q, k, scale, impl="triton"),
        ClipLoss(impl="triton")(q, k, labels=torch.arange(2 * B)[B:] // 2).loss,
        SigLipLoss(impl="triton")(q, k).loss,
        LateInteractionLoss(impl="triton")(tokens, tokens * 2).loss,
    ]
    widths = [D // 3, D // 2, D]
    losses += [each.loss for each in InfoNCELoss(impl="triton").prefixes(widths, q, k)]
    torch.stack(losses).sum().backward()


@pytest.mark.skipif(not INTERPRETED, reason="counts launches of the interpreter")
def test_a_new_size_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: set[tuple[str, str]] = set()
    monkeypatch.setattr(kernel_keys, "KEYS", keys)
    monkeypatch.setattr(kernel_keys, "_counting", True)
    kernel_keys.record()
    step(33, 48)
    before = len(keys)
    for B, D in ((2, 16), (47, 40), (64, 96)):
        step(B, D)
    assert before > 12 and before == len(keys)
