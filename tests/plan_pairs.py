"""Small pairs, once real on the CPU and once as a plan traces them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradcache_clip import ClipLoss, GradCache, LateInteractionLoss
from gradcache_clip.cache.batch_tree import take_rows
from gradcache_clip.memory import LiveBytes
from gradcache_clip.memory.cards import Card
from gradcache_clip.memory.loss_trace import FullMatrixLoss, FullTokenLoss
from gradcache_clip.memory.plan_models import Sizes, build_on_meta, checkpoint_blocks
from gradcache_clip.memory.plan_options import PlanOptions
from gradcache_clip.memory.plan_work import work_of
from gradcache_clip.memory.schedules import Work
from gradcache_clip.train.config_model import DualConfig
from gradcache_clip.train.token_towers import TokenEncoder, TokenLoss
from gradcache_clip.train.towers import DualEncoder, build_towers

SIZES = Sizes(image_size=32, context_length=12, vocab_size=100)
CARD = Card("test", 24 * 2**30)
_IMAGES: dict[str, dict[str, Any]] = {
    "vit": {
        "image": "vit_tiny_patch16_224",
        "image_kwargs": {"depth": 2, "embed_dim": 48, "num_heads": 2},
    },
    "convnext": {"image": "convnext_atto", "image_kwargs": {"depths": (1, 1, 1, 1)}},
    "resnet": {"image": "resnet10t"},
}


def model_config(image: str, dropout: float = 0.1) -> DualConfig:
    """A small pair; BERT on the text side."""
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    return DualConfig(**_IMAGES[image], text="bert", text_kwargs=text, feature_dim=24)


def traced(
    model: DualConfig,
    *,
    device_kind: Any = "cpu",
    checkpointed: bool = False,
    tokens: bool = False,
    **more: Any,
):
    """Its work, with the kernels of a device; tensors are not rounded."""
    import dataclasses

    encoder = build_on_meta(model, SIZES)
    if tokens:
        with torch.device("meta"):
            encoder = TokenEncoder(encoder, SIZES.context_length)
    if checkpointed:
        checkpoint_blocks(encoder)
    options = PlanOptions(**({"precision": "fp32", "optimizer": "sgd"} | more))
    work: Work = work_of(encoder, SIZES, options, CARD, device_kind=device_kind)
    nothing = {"statistics workspace": 0, "gradient workspace": 0}
    return dataclasses.replace(
        work, rounded=False, workspaces=lambda rows: nothing, reserved_bytes=()
    )


def real(model: DualConfig, *, tokens: bool = False) -> DualEncoder:
    """The same pair with weights."""
    pair = build_towers(
        model,
        image_size=SIZES.image_size,
        context_length=SIZES.context_length,
        vocab_size=SIZES.vocab_size,
        pad_token_id=0,
    )
    return TokenEncoder(pair, SIZES.context_length) if tokens else pair


def batch(rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Images, and texts with padding."""
    ids = torch.randint(SIZES.vocab_size, (rows, SIZES.context_length))
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    images = torch.randint(255, (rows, 3, 32, 32), dtype=torch.uint8)
    return images, {"input_ids": ids, "attention_mask": mask}


def measured(encoder: DualEncoder, kind: str, rows: int, chunk: int, *, autocast: bool) -> int:
    """Peak of live bytes of a real step."""
    images, texts = batch(rows)
    start = [*encoder.parameters(), *encoder.buffers(), images, *texts.values()]
    amp = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=autocast)
    tokens = isinstance(encoder, TokenEncoder)
    with LiveBytes(start=start) as live:
        if kind == "plain":
            with amp():
                full = FullTokenLoss() if tokens else FullMatrixLoss()
                loss = full(encoder(0, images), encoder(1, texts))
            loss.backward()
        elif kind == "accumulated":
            _accumulate(encoder, images, texts, chunk, amp)
        else:
            budget = 2**40 if kind == "all kept" else None
            with amp():
                tiled = TokenLoss(LateInteractionLoss()) if tokens else ClipLoss()
                cache = GradCache(encoder, tiled, chunk_size=chunk, memory_budget=budget)
                cache(images, texts)
    for parameter in encoder.parameters():
        parameter.grad = None
    return live.peak_bytes


def _accumulate(encoder: DualEncoder, images: Tensor, texts: Any, chunk: int, amp: Any) -> None:
    """Features of all rows first, then every chunk against all of them."""
    loss, starts = FullMatrixLoss(), range(0, len(images), chunk)
    inputs = [take_rows((images, texts), start, start + chunk) for start in starts]
    with torch.no_grad(), amp():
        features = [[encoder(tower, given[tower]) for given in inputs] for tower in (0, 1)]
    for place, given in enumerate(inputs):
        with amp():
            value = loss(
                *(
                    torch.cat([*done[:place], encoder(tower, given[tower]), *done[place + 1 :]])
                    for tower, done in enumerate(features)
                )
            )
        value.backward()
        del value
