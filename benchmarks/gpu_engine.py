"""A whole training step on the GPU: time, memory and the largest batch of three ways to train.

    python benchmarks/gpu_engine.py

ViT-B/16 at 224 pixels and CLIP's text tower at 77 tokens, AdamW, bf16: a plain step, one with
activation checkpointing, and gradient caching. Batches double until one does not fit; then the one
half way is tried. Writes gpu_engine.csv into benchmarks/results (or --results).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu_card import Card, Point, section
from torch import Tensor

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.train.towers import DualEncoder, build_towers

FILE = "gpu_engine.csv"
METHODS = "plain", "checkpointed", "cached"
_CONTEXT_LENGTH = 77
_FEATURES = 512


@dataclass(frozen=True)
class Models:
    """Two towers by the names that `gradcache_clip.plan` knows them by."""

    image: str
    text: str
    text_kind: str
    text_kwargs: tuple[tuple[str, Any], ...]
    vocabulary: int
    image_size: int
    chunk_size: int
    batches: tuple[int, int]
    """The first one, and the last one to try."""


LARGE = Models(
    *("vit_base_patch16_224", "clip-text-base", "clip_text_model"),
    text_kwargs=(("max_position_embeddings", 77), ("eos_token_id", 49407)),
    vocabulary=49408,
    image_size=224,
    chunk_size=256,
    batches=(512, 16384),
)
SMALL = Models(
    *("convnext_atto", "bert-tiny", "bert"),
    text_kwargs=(
        *(("num_hidden_layers", 2), ("hidden_size", 128), ("num_attention_heads", 2)),
        *(("intermediate_size", 512), ("max_position_embeddings", 512)),
    ),
    vocabulary=30522,
    image_size=32,
    chunk_size=16,
    batches=(32, 64),
)


@dataclass(frozen=True)
class Trained:
    """One step of one way to train."""

    method: str
    image: str
    text: str
    batch_size: int
    chunk_size: int
    status: str = ""
    milliseconds: float = 0.0
    pairs_per_s: float = 0.0
    peak_bytes: int = 0
    """Live tensors, model, optimizer and batch included."""


def points(card: Card, results: Path) -> Iterator[Point]:
    """Every method at the smallest batch, then at twice that of those that still fit, and so on."""
    models = SMALL if card.small else LARGE
    batch, largest = models.batches
    fitting = dict.fromkeys(METHODS, True)
    while batch <= largest and any(fitting.values()):
        for method in [method for method in METHODS if fitting[method]]:
            outcome: list[dict[str, Any]] = []
            yield _point(card, models, method, batch, outcome)
            fitting[method] = bool(outcome)
            if not outcome and batch > models.batches[0]:
                yield _point(card, models, method, batch * 3 // 4, [])
        batch *= 2


def _point(
    card: Card, models: Models, method: str, batch: int, outcome: list[dict[str, Any]]
) -> Point:
    chunk = models.chunk_size if method == "cached" else batch
    head = Trained(method, models.image, models.text, batch, chunk)

    def measure() -> dict[str, Any]:
        outcome.append(_measure(card, models, head))
        return outcome[-1]

    return Point(head, measure)


def _measure(card: Card, models: Models, head: Trained) -> dict[str, Any]:
    made: list[Callable[[], None]] = []

    def first_steps() -> None:
        made.append(_step(card, models, head))
        # The second one meets the optimizer's states.
        for _ in range(2):
            made[0]()

    peak = card.peak_bytes(first_steps)
    milliseconds = card.time_ms(made[0], rounds=3)
    rate = 1e3 * head.batch_size / milliseconds
    return {"milliseconds": milliseconds, "pairs_per_s": rate, "peak_bytes": peak}


def _step(card: Card, models: Models, head: Trained) -> Callable[[], None]:
    """Gradients of a batch, then AdamW."""
    torch.manual_seed(0)
    with card.device:
        encoder = build_encoder(models)
        inputs = make_inputs(models, head.batch_size)
        loss = ClipLoss(impl=card.impl)
    if head.method == "checkpointed":
        from gradcache_clip.memory.plan_models import checkpoint_blocks

        checkpoint_blocks(encoder)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *loss.parameters()], lr=1e-5)
    gradients = _gradients(encoder, loss, head)
    autocast = partial(torch.autocast, card.device.type, torch.bfloat16)

    def step() -> None:
        with autocast():
            gradients(*inputs)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _gradients(encoder: DualEncoder, loss: ClipLoss, head: Trained) -> Callable[..., object]:
    if head.method == "cached":
        return GradCache(encoder, loss, chunk_size=head.chunk_size)

    def plain(images: Tensor, texts: dict[str, Tensor]) -> None:
        loss(encoder(0, images), encoder(1, texts)).loss.backward()

    return plain


def build_encoder(models: Models) -> DualEncoder:
    """Both towers with random weights, in train mode."""
    config: Any = SimpleNamespace(
        image=models.image,
        image_kwargs={},
        image_pretrained=False,
        image_weights="",
        image_pool="default",
        text=models.text_kind,
        text_kwargs=dict(models.text_kwargs),
        text_pretrained=False,
        text_pool="cls",
        feature_dim=_FEATURES,
        freeze="",
        architecture="dual",
    )
    return build_towers(
        config,
        image_size=models.image_size,
        context_length=_CONTEXT_LENGTH,
        vocab_size=models.vocabulary,
        pad_token_id=0,
    )


def make_inputs(models: Models, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Images (B, 3, H, W), uint8, and token ids and mask (B, L)."""
    size = models.image_size
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)
    ids = torch.randint(models.vocabulary, (batch, _CONTEXT_LENGTH))
    return images, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 if a point failed, 2 if there is no GPU."""
    return section(__doc__, FILE, points, arguments)


if __name__ == "__main__":
    sys.exit(main())
