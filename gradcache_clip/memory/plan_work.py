"""The work of a step, traced from both towers and the losses of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gradcache_clip.memory.cards import Card
from gradcache_clip.memory.device_rules import World
from gradcache_clip.memory.loss_trace import (
    feature_dtype,
    full_matrix_loss,
    tiled_loss,
    trace_loss,
    workspaces,
)
from gradcache_clip.memory.plan_models import Sizes, checkpoint_blocks
from gradcache_clip.memory.plan_options import OPTIMIZER_STATES, PlanOptions
from gradcache_clip.memory.schedules import TowerWork, Work
from gradcache_clip.memory.tower_trace import Pass, trace_tower
from gradcache_clip.train.towers import DualEncoder

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What cuBLAS takes through torch's allocator: ":4096:2:16:8", and ":4096:8" from Hopper on, in KiB.
_CUBLAS_BYTES = {False: (2 * 4096 + 8 * 16) * 1024, True: 8 * 4096 * 1024}
_HOPPER = 90

_ALL: tuple[Pass, ...] = ("plain", "replay")
_PLAIN: tuple[Pass, ...] = ("plain",)


@dataclass(frozen=True)
class Traced:
    """The work of one pair, with and without activation checkpointing."""

    step: Work
    """As the options ask for it."""
    plain: Work
    """Without checkpointing, for a plain step."""
    checkpointed: Work | None
    """With it; None where a tower does not support it."""
    note: str = ""
    """Then, why."""


def trace_all(encoder: DualEncoder, sizes: Sizes, options: PlanOptions, card: Card) -> Traced:
    """Trace both towers as they are and checkpointed, which they are from here on.

    Raises:
        ValueError: the options ask for checkpointing and a tower does not support it.
    """
    asked = options.checkpointing
    plain = work_of(encoder, sizes, options, card, passes=_PLAIN if asked else _ALL)
    try:
        checkpoint_blocks(encoder)
    except ValueError as error:
        if asked:
            raise
        return Traced(plain, plain, None, str(error))
    towers = towers_of(encoder, sizes, options, _ALL if asked else _PLAIN)
    checkpointed = replace(plain, towers=towers)
    return Traced(checkpointed if asked else plain, plain, checkpointed)


def work_of(
    encoder: DualEncoder,
    sizes: Sizes,
    options: PlanOptions,
    card: Card,
    *,
    passes: Sequence[Pass] = _ALL,
    world: World = "cuda",
) -> Work:
    """Trace everything that a step is made of; the layers run for two numbers of rows."""
    dtype = _AUTOCAST.get(options.precision)
    features = feature_dtype(lambda: encoder.encode_text(sizes.texts(2)), world, dtype)
    width = encoder.image_projection.out_features
    losses = [
        trace_loss(loss, width, features=features, world=world, dtype=dtype)
        for loss in (tiled_loss(), full_matrix_loss())
    ]
    trained = [p.numel() * p.element_size() for p in encoder.parameters() if p.requires_grad]
    every = [t.numel() * t.element_size() for t in [*encoder.parameters(), *encoder.buffers()]]
    states = [n for n in trained for _ in range(OPTIMIZER_STATES[options.optimizer])]
    large, processes = card.large_workspace, options.world

    def open_sizes(rows: int) -> dict[str, int]:
        return workspaces(rows, rows * processes, width, features.itemsize, large=large)

    return Work(
        towers=towers_of(encoder, sizes, options, passes, world=world),
        loss=losses[0],
        full_loss=losses[1],
        parameter_bytes=tuple(every),
        optimizer_bytes=(*states, *(every if options.ema else ())),
        gradient_bytes=sum(trained),
        feature_row_bytes=width * features.itemsize,
        workspaces=open_sizes,
        shares=_shares(options),
        world=processes,
        reserved_bytes=_reserved(encoder, options, card, trained),
        inputs_on_device=options.inputs == "device",
    )


def towers_of(
    encoder: DualEncoder,
    sizes: Sizes,
    options: PlanOptions,
    passes: Sequence[Pass],
    *,
    world: World = "cuda",
) -> tuple[TowerWork, TowerWork]:
    """Both towers, traced."""
    dtype = _AUTOCAST.get(options.precision)
    towers = (
        (encoder.encode_image, sizes.images, sizes.image_bytes),
        (encoder.encode_text, sizes.texts, sizes.text_bytes),
    )
    image, text = (
        TowerWork(
            trace_tower(encode, encoder, inputs, world=world, dtype=dtype, passes=passes),
            trainable=True,
            input_bytes=nbytes,
        )
        for encode, inputs, nbytes in towers
    )
    return image, text


def _shares(options: PlanOptions) -> dict[str, float]:
    kinds = ("optimizer", "gradient", "parameter")[: options.zero]
    return {kind: 1 / options.world for kind in kinds if options.world > 1}


def _reserved(
    encoder: DualEncoder, options: PlanOptions, card: Card, trained: Sequence[int]
) -> tuple[tuple[str, int], ...]:
    """What libraries hold throughout: cuBLAS, the buckets of DDP, parameters gathered by ZeRO-3."""
    held = [("workspace", _CUBLAS_BYTES[card.capability >= _HOPPER])]
    if options.world > 1 and options.zero == 0:
        held.append(("gradient", sum(trained)))
    if options.world > 1 and options.zero == 3:
        largest = max(
            sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
            for module in encoder.modules()
        )
        held.append(("gathered parameters", 2 * largest))
    return tuple(held)
