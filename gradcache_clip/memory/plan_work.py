"""Traces the work of a step: both towers and the losses of a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.memory.cards import Card
from gradcache_clip.memory.device_rules import DeviceKind, DeviceRules
from gradcache_clip.memory.loss_trace import (
    full_matrix_loss,
    tiled_loss,
    token_workspaces,
    trace_loss,
    workspaces,
)
from gradcache_clip.memory.plan_models import Sizes, checkpoint_blocks
from gradcache_clip.memory.plan_options import OPTIMIZER_STATES, PlanOptions
from gradcache_clip.memory.schedules import TowerWork, Work
from gradcache_clip.memory.tower_trace import Pass, trace_tower
from gradcache_clip.train.token_towers import TokenEncoder, Tokens
from gradcache_clip.train.towers import DualEncoder

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# cuBLAS's workspace from torch's allocator, by torch's defaults in KiB: ":4096:2:16:8", and
# ":4096:8" from Hopper on.
_CUBLAS_BYTES = {False: (2 * 4096 + 8 * 16) * 1024, True: 8 * 4096 * 1024}
_HOPPER = 90

_ALL: tuple[Pass, ...] = ("plain", "replay")
_PLAIN: tuple[Pass, ...] = ("plain",)


@dataclass(frozen=True)
class Traced:
    """Work of one pair of towers, with and without activation checkpointing."""

    step: Work
    """As in the options."""
    plain: Work
    """Without checkpointing, for a plain step."""
    checkpointed: Work | None
    """With checkpointing; None if a tower does not support it."""
    note: str = ""
    """Why it does not."""


def trace_all(encoder: DualEncoder, sizes: Sizes, options: PlanOptions, card: Card) -> Traced:
    """Trace both towers as they are and checkpointed. Leaves checkpointing enabled.

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
    rows = [tower.feature_bytes for tower in plain.towers]
    towers = towers_of(encoder, sizes, rows, options, _ALL if asked else _PLAIN)
    checkpointed = replace(plain, towers=towers)
    return Traced(checkpointed if asked else plain, plain, checkpointed)


def work_of(
    encoder: DualEncoder,
    sizes: Sizes,
    options: PlanOptions,
    card: Card,
    *,
    passes: Sequence[Pass] = _ALL,
    device_kind: DeviceKind = "cuda",
) -> Work:
    """Trace all parts of a step; each part runs at two or three numbers of rows."""
    dtype, tokens = _AUTOCAST.get(options.precision), isinstance(encoder, TokenEncoder)
    with DeviceRules(device_kind, dtype), torch.no_grad():
        features = [encode(inputs(2)) for encode, inputs, _ in _passes(encoder, sizes)]
    shapes, numbers = [tuple(each.shape[1:]) for each in features], features[0].dtype
    row_bytes = [math.prod(shape) * numbers.itemsize for shape in shapes]
    losses = [
        trace_loss(loss, shapes, features=numbers, device_kind=device_kind, dtype=dtype)
        for loss in (tiled_loss(tokens=tokens), full_matrix_loss(tokens=tokens))
    ]
    trained = [p.numel() * p.element_size() for p in encoder.parameters() if p.requires_grad]
    every = [t.numel() * t.element_size() for t in [*encoder.parameters(), *encoder.buffers()]]
    states = [n for n in trained for _ in range(OPTIMIZER_STATES[options.optimizer])]
    *lengths, width = (*(shape[0] for shape in shapes if tokens), shapes[0][-1])

    def open_sizes(rows: int) -> dict[str, int]:
        sides, large = (rows, rows * options.world_size), card.large_workspace
        if tokens:
            pair = lengths[0], lengths[1]
            return token_workspaces(*sides, pair, width, numbers.itemsize, large=large)
        return workspaces(*sides, width, numbers.itemsize, large=large)

    return Work(
        towers=towers_of(encoder, sizes, row_bytes, options, passes, device_kind=device_kind),
        loss=losses[0],
        full_loss=losses[1],
        parameter_bytes=tuple(every),
        optimizer_bytes=(*states, *(every if options.ema else ())),
        gradient_bytes=sum(trained),
        pair_flops=width * math.prod(lengths),
        workspaces=open_sizes,
        shares=_shares(options),
        world_size=options.world_size,
        reserved_bytes=_reserved(encoder, options, card, trained),
        inputs_on_device=options.batch_device == "device",
    )


def towers_of(
    encoder: DualEncoder,
    sizes: Sizes,
    feature_bytes: Sequence[int],
    options: PlanOptions,
    passes: Sequence[Pass],
    *,
    device_kind: DeviceKind = "cuda",
) -> tuple[TowerWork, TowerWork]:
    """Trace both towers; `feature_bytes` are the bytes of one row of each one's features."""
    dtype = _AUTOCAST.get(options.precision)
    towers = []
    passed = zip(_passes(encoder, sizes), feature_bytes, strict=True)
    for (encode, inputs, nbytes), row in passed:
        trace = trace_tower(
            encode, encoder, inputs, device_kind=device_kind, dtype=dtype, passes=passes
        )
        towers.append(TowerWork(trace, trainable=True, input_bytes=nbytes, feature_bytes=row))
    return towers[0], towers[1]


def _passes(
    encoder: DualEncoder, sizes: Sizes
) -> list[tuple[Callable[[Any], Tensor], Callable[[int], Any], int]]:
    """Return for each tower: its encoder, a function that makes n rows of inputs, bytes per row."""

    def encode_text(texts: Any) -> Tensor:
        found: Any = encoder.encode_text(texts)
        vectors: Tensor = found.vectors if isinstance(found, Tokens) else found
        return vectors

    return [
        (encoder.encode_image, sizes.images, sizes.image_bytes),
        (encode_text, sizes.texts, sizes.text_bytes),
    ]


def _shares(options: PlanOptions) -> dict[str, float]:
    kinds = ("optimizer", "gradient", "parameter")[: options.zero]
    return {kind: 1 / options.world_size for kind in kinds if options.world_size > 1}


def _reserved(
    encoder: DualEncoder, options: PlanOptions, card: Card, trained: Sequence[int]
) -> tuple[tuple[str, int], ...]:
    """Return memory that libraries hold throughout: cuBLAS, DDP's buckets, ZeRO-3's parameters."""
    held = [("workspace", _CUBLAS_BYTES[card.capability >= _HOPPER])]
    if options.world_size > 1 and options.zero == 0:
        held.append(("gradient", sum(trained)))
    if options.world_size > 1 and options.zero == 3:
        largest = max(
            sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
            for module in encoder.modules()
        )
        # The current layer, and the next one prefetched.
        held.append(("gathered parameters", 2 * largest))
    return tuple(held)
