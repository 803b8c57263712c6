"""Computes the answers of a plan from traces: memory, largest sizes, least time of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn

from gradcache_clip.memory.cards import Card
from gradcache_clip.memory.plan_options import Method, PlanOptions
from gradcache_clip.memory.plan_search import LARGEST_ROWS, fits, largest_that_fits
from gradcache_clip.memory.plan_work import Traced
from gradcache_clip.memory.schedules import (
    Kept,
    TowerWork,
    Work,
    accumulated_step,
    all_kept,
    cached_step,
    graph_bytes,
    kept_within,
    plain_step,
)
from gradcache_clip.memory.timeline import Peak, Timeline
from gradcache_clip.train.towers import DualEncoder

PHASES = ("embed", "loss", "replay")
_LEAST_CURVE = 65536


def parameters_of(encoder: DualEncoder) -> dict[str, Any]:
    """Return parameter counts of each tower with its projection, and of what is trained."""
    return {
        "image_parameters": _numbers([encoder.image_tower, encoder.image_projection]),
        "text_parameters": _numbers([encoder.text_tower, encoder.text_projection]),
        "trained_parameters": sum(p.numel() for p in encoder.parameters() if p.requires_grad),
    }


def memory_of(work: Work, options: PlanOptions, capacity: int) -> dict[str, Any]:
    """Return the fields of a plan about the memory of a cached step."""
    kept = kept_chunks(work, options, capacity)
    step = cached_step(work, options.rows, options.chunk_size, kept=kept)
    peak, phases = step.peak(), {name: step.peak_of(name) for name in PHASES}
    # Without a limit if the step does not fit, to show how much it needs.
    reserved = max(peak.nbytes, step.reserved(capacity if fits(step, capacity) else None))
    image, text = work.towers
    chunk, features = min(options.chunk_size, options.rows), _features_of(work, options)
    return {
        "parameter_bytes": int(sum(work.parameter_bytes) * work.shares.get("parameter", 1)),
        "gradient_bytes": int(work.gradient_bytes * work.shares.get("gradient", 1)),
        "optimizer_bytes": int(sum(work.optimizer_bytes) * work.shares.get("optimizer", 1)),
        "input_bytes": peak.by_kind.get("input", 0),
        "feature_bytes": features,
        "loss_bytes": _beside_features(phases["loss"], step, features // 2),
        "image_graph_bytes": graph_bytes(image, chunk),
        "text_graph_bytes": graph_bytes(text, chunk),
        "kept_chunks": kept,
        **{f"{name}_peak_bytes": found.nbytes for name, found in phases.items()},
        "peak_phase": peak.phase,
        "peak_bytes": peak.nbytes,
        "kinds_by_phase": {name: found.by_kind for name, found in phases.items()},
        "allocator_bytes": reserved - peak.nbytes,
        "total_bytes": reserved + options.context_bytes,
        "fits": reserved <= capacity,
    }


def kept_chunks(work: Work, options: PlanOptions, capacity: int) -> Kept:
    """Return how many further chunks of each tower the budget can keep graphs of."""
    if options.memory_budget is None:
        return 0, 0
    within = partial(kept_within, work, options.rows, options.chunk_size)
    if options.budget_bytes is not None:
        return within(options.budget_bytes)
    # "auto": the largest budget in sixteenths of the card whose step still fits, by simulation.
    step = partial(cached_step, work, options.rows, options.chunk_size)
    counts = (within(capacity * share // 16) for share in range(16, 0, -1))
    return next((kept for kept in counts if fits(step(kept=kept), capacity)), (0, 0))


def largest_chunk(work: Work, options: PlanOptions, capacity: int) -> int:
    """Return the largest chunk with which the batch fits."""
    return largest_that_fits(partial(cached_step, work, options.rows), capacity, options.rows)


def methods_of(traced: Traced, options: PlanOptions, capacity: int) -> tuple[Method, ...]:
    """Return the largest batch of each way to train, and its memory by batch size."""
    chunk = options.chunk_size
    steps: dict[str, Callable[[int], Timeline] | None] = {
        "plain": partial(_with_chunk, plain_step, traced.plain, chunk),
        "plain, checkpointed": None
        if traced.checkpointed is None
        else partial(_with_chunk, plain_step, traced.checkpointed, chunk),
        "accumulation as in open_clip": partial(_with_chunk, accumulated_step, traced.step, chunk),
        "gradient caching": partial(_with_chunk, cached_step, traced.step, chunk),
        "gradient caching, all graphs kept": partial(_all_kept, traced.step, chunk),
    }
    return tuple(
        Method(name, None, note=traced.note)
        if step is None
        else _method(name, step, options, capacity)
        for name, step in steps.items()
    )


def speed_of(work: Work, options: PlanOptions, card: Card, capacity: int) -> dict[str, Any]:
    """Return flops of a cached step on one card, and its time at the card's full matrix rate."""
    kept, once, again = kept_chunks(work, options, capacity), 0.0, 0.0
    last = (options.rows - 1) % options.chunk_size + 1
    for tower, chunks in zip(work.towers, kept, strict=True):
        forward, backward = (_flops(tower, name, options) for name in ("forward", "backward"))
        once += forward + backward
        in_any_case = last if tower is work.towers[-1] and options.world_size == 1 else 0
        spared = chunks * options.chunk_size + in_any_case
        again += forward * (1 - min(1.0, spared / options.rows))
    # Flops per pair and feature. On several processes the backward recomputes S for each side.
    loss = (8 if options.world_size == 1 else 10) * options.rows * options.batch_size
    once += loss * work.pair_flops
    rate = card.rate(options.precision)
    return {
        "flops": once + again,
        "least_step_ms": rate and 1e3 * (once + again) / rate,
        "recomputed_share": again / (once + again),
    }


def _with_chunk(step: Callable[..., Timeline], work: Work, chunk: int, rows: int) -> Timeline:
    return step(work, rows, chunk)


def _all_kept(work: Work, chunk: int, rows: int) -> Timeline:
    return cached_step(work, rows, chunk, kept=all_kept(work, rows, chunk))


def _method(
    name: str, step: Callable[[int], Timeline], options: PlanOptions, capacity: int
) -> Method:
    rows = largest_that_fits(step, capacity, LARGEST_ROWS)
    top = max(_LEAST_CURVE, 2 * options.batch_size)
    batches = [32 * 2**power for power in range(40) if 32 * 2**power <= top]
    curve = [
        (batch, step(batch // options.world_size).peak().nbytes + options.context_bytes)
        for batch in batches
        if batch >= 2 * options.world_size
    ]
    return Method(
        name, rows * options.world_size, at_least=rows == LARGEST_ROWS, curve=tuple(curve)
    )


def _flops(tower: TowerWork, name: str, options: PlanOptions) -> float:
    """Return flops over all rows; recomputation by activation checkpoints counts as backward."""
    return tower.trace.flops(f"{name} replay", options.rows)


def _beside_features(loss: Peak, step: Timeline, gradients: int) -> int:
    """Return the memory that the loss adds: workspaces, vectors and copies of the features."""
    return max(0, loss.nbytes - step.live_at("loss") - gradients)


def _features_of(work: Work, options: PlanOptions) -> int:
    """Return the bytes of both towers' features and their gradients."""
    return 2 * options.rows * sum(tower.feature_bytes for tower in work.towers)


def _numbers(modules: Iterable[nn.Module] | Sequence[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
