"""Batches of new sizes reuse compiled kernels: Triton's cache has one entry for all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
PROGRAM = """
import torch, kernel_keys
from torch.nn.functional import normalize
from gradcache_clip import ClipLoss, InfoNCELoss, LateInteractionLoss, SigLipLoss
from gradcache_clip.ops import clip_loss
kernel_keys.record()

def features(B, D, *more):
    # Slices, as a flat buffer holds them: addresses of any alignment.
    rows = torch.randn(B * D + B)[B:].view(B, D)
    return normalize(rows, dim=1).requires_grad_()

def step(B, D):
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

step(33, 48)
before = len(kernel_keys.KEYS)
for B, D in ((2, 16), (32, 64), (47, 40), (64, 96)):
    step(B, D)
print("before", before, "after", len(kernel_keys.KEYS))
"""


def test_a_new_size_compiles_nothing() -> None:
    places = ":".join(map(str, (HERE.parent, HERE)))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PYTHONPATH": places, "TRITON_INTERPRET": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    _, before, _, after = done.stdout.split()
    assert int(before) > 12 and before == after
