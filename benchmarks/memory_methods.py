"""The ways to train that memory_vs_batch.py compares: what they run, and how much work that is.

B pairs a batch, c pairs a chunk, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine_contestants import IMAGE_TEXT, Step
from engine_models import Workload
from memory_models import FEATURES


@dataclass(frozen=True)
class Method:
    """A way to take the gradients of a batch."""

    label: str
    """Its name in tables and pictures."""
    make: Callable[[Workload, int], Step]
    """From the encoders, the batch and c to a step that leaves gradients."""
    chunked: bool = True
    """Whether encoders see c pairs at once; all B if not."""
    checkpointed: bool = False
    """Whether the encoders are built with activation checkpointing."""
    encoder_passes: int = 4
    """Passes over the encoders; a backward counts as two."""
    loss_products: int = 6
    """Multiply-adds of one loss, forward and backward, over B x B x D, times two."""
    loss_every_chunk: bool = False
    """Whether the loss over the batch is computed for each chunk anew."""


METHODS = {
    "plain": Method("plain step", IMAGE_TEXT["plain step"], chunked=False, encoder_passes=3),
    "checkpointed": Method(
        "activation checkpointing", IMAGE_TEXT["plain step"], chunked=False, checkpointed=True
    ),
    "accumulated": Method(
        "open_clip's accumulation", IMAGE_TEXT["open_clip accumulation"], loss_every_chunk=True
    ),
    "published": Method("gradient cache as published", IMAGE_TEXT["gradient cache as published"]),
    "cached": Method("gradcache-clip", IMAGE_TEXT["gradcache-clip"], loss_products=8),
}


def step_flops(name: str, batch_size: int, chunk_size: int, pair_flops: float) -> float:
    """Floating-point operations of one step.

    Args:
        name: one of `METHODS`.
        pair_flops: of one pair going forward through both encoders.

    Example:
        >>> step_flops("plain", 2, 2, 100.0) == 3 * 2 * 100 + 6 * 2**2 * 512
        True
    """
    method = METHODS[name]
    losses = -(-batch_size // chunk_size) if method.loss_every_chunk else 1
    encoders = method.encoder_passes * pair_flops * batch_size
    return encoders + losses * method.loss_products * batch_size**2 * FEATURES
