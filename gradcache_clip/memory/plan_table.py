"""Prints a plan as tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradcache_clip.memory.plan_options import Method, Plan

_WORDS = {"momentum": "SGD with momentum", "adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Print the memory of a step, the largest batch of each way to train, and the least time."""
    console = console or Console()
    console.print(Text(headline(plan), style="bold"), soft_wrap=True)
    console.print(Text(setting(plan), style="dim"), soft_wrap=True)
    console.print(_memory_table(plan))
    console.print(_methods_table(plan))
    for line in _lines(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def headline(plan: Plan) -> str:
    """Say in one line whether the step fits; both amounts include the CUDA context."""
    options, card = plan.options, plan.card
    cards = f"{options.world_size} x {card.name}" if options.world_size > 1 else card.name
    verdict = "fits" if plan.fits else "does not fit"
    amounts = f"{gib(plan.total_bytes)} of {gib(card.memory_bytes)}"
    return f"Batch {options.batch_size:,} {verdict} on {cards}: {amounts}"


def setting(plan: Plan) -> str:
    """Describe models, chunk, precision and optimizer in one line."""
    options = plan.options
    parts = [
        f"{plan.image} ({plan.image_parameters / 1e6:.1f} M) + "
        f"{plan.text} ({plan.text_parameters / 1e6:.1f} M)",
        f"chunks of {options.chunk_size:,}",
        options.precision,
        _WORDS.get(options.optimizer, options.optimizer),
    ]
    if options.world_size > 1:
        parts.append(
            f"{options.world_size} processes, ZeRO-{options.zero}" if options.zero else "DDP"
        )
    if options.checkpointing:
        parts.append("activation checkpointing")
    if min(options.image_trainable, options.text_trainable) < 1:
        parts.append(f"{plan.trained_parameters / 1e6:.1f} M parameters trained")
    return ", ".join(parts)


def gib(nbytes: float) -> str:
    """Format bytes as GiB."""
    return f"{nbytes / 2**30:,.2f} GiB"


def _memory_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="one step, on each card", title_justify="left")
    table.add_column("memory")
    table.add_column("", justify="right")
    table.add_column("", style="dim")
    for name, nbytes, note in _memory_rows(plan):
        style = "bold" if name == "total" else ""
        table.add_row(Text(name, style=style), Text(gib(nbytes), style=style), note)
    return table


def _memory_rows(plan: Plan) -> Iterator[tuple[str, int, str]]:
    options, stored = plan.options, {"device": "the whole batch is stored on the card"}
    yield "parameters", plan.parameter_bytes, "fp32"
    buckets = options.world_size > 1 and options.zero == 0
    yield "gradients", plan.gradient_bytes, "DDP's buckets take the same again" * buckets
    yield "optimizer states", plan.optimizer_bytes, "and the averaged weights" * options.ema
    yield "inputs", plan.input_bytes, stored.get(options.batch_device, "two chunks at a time")
    yield "features", plan.feature_bytes, "of the whole batch, with gradients"
    yield "loss workspace", plan.loss_bytes, "while the loss runs"
    yield "one chunk's graph, image", plan.image_graph_bytes, "kept for its backward"
    alone = "not at the same time as image" if options.world_size == 1 else "along with image"
    yield "one chunk's graph, text", plan.text_graph_bytes, alone
    images, texts = plan.kept_chunks
    if images or texts:
        graphs = images * plan.image_graph_bytes + texts * plan.text_graph_bytes
        yield "graphs kept", graphs, f"of {images:,} + {texts:,} more chunks, not replayed"
    yield "peak of the embed", plan.embed_peak_bytes, "all tensors alive"
    yield "peak of the loss", plan.loss_peak_bytes, ""
    yield "peak of the replay", plan.replay_peak_bytes, ""
    yield "allocator", plan.allocator_bytes, "segments beyond the largest peak"
    yield "CUDA context", options.context_bytes, "outside of the allocator"
    yield "total", plan.total_bytes, "fits" if plan.fits else "does not fit"


def _methods_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="largest batch that fits", title_justify="left")
    table.add_column("way to train")
    table.add_column("batch", justify="right")
    table.add_column("", style="dim")
    for method in plan.methods:
        table.add_row(method.name, batch_text(method), method.note)
    return table


def batch_text(method: Method) -> str:
    """Format the largest batch for people."""
    if method.largest_batch is None:
        return "unknown"
    prefix = "over " if method.at_least else ""
    return f"{prefix}{method.largest_batch:,}" if method.largest_batch else "none"


def _lines(plan: Plan) -> Iterator[str]:
    chunk = f"{plan.largest_chunk:,}" if plan.largest_chunk else "none: not even a chunk of one"
    yield f"Largest chunk with which batch {plan.options.batch_size:,} fits: {chunk}."
    share = f"{100 * plan.recomputed_share:.0f} %"
    if not plan.fits and plan.options.batch_device == "device":
        yield f"Inputs take {gib(plan.input_bytes)} of it: --batch-device host copies by chunks."
    yield f"A step is {plan.flops / 1e12:,.1f} Tflop on each card, {share} of it for the replay."
    if plan.least_step_ms is None:
        what = plan.options.precision if plan.card.tflops else "any precision"
        yield f"The matrix rate of {plan.card.name} in {what} is unknown, so no time is given."
    else:
        pairs = plan.options.batch_size / plan.least_step_ms * 1e3
        yield (
            f"At the full matrix rate of {plan.card.name} it takes {_duration(plan.least_step_ms)} "
            f"({pairs:,.0f} pairs/s): an upper bound of speed that no step reaches."
        )
    yield (
        f"Sizes are extrapolated, tensor by tensor, from chunks of 8 and 16 rows on the meta "
        f"device; planned in {plan.seconds:.1f} s."
    )


def _duration(ms: float) -> str:
    return f"{ms:,.0f} ms" if ms < 10_000 else f"{ms / 1e3:,.1f} s"
