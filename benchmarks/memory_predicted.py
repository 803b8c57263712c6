"""Memory of a training step on named GPUs against the batch size, predicted: no GPU is used.

    python benchmarks/memory_predicted.py            # ViT-B/16 + BERT-base, 32 to 1,048,576 pairs
    python benchmarks/memory_predicted.py --quick    # small models and one card, half a minute
    python benchmarks/memory_predicted.py --cards "RTX 3090" 24GB "H100 SXM" --chunk-size 128

`gradcache_clip.plan` traces both models on the meta device and plays the steps through: a plain
step, one with activation checkpointing, open_clip's accumulation and gradient caching, whose batch
waits on the card or on the host. Below, the loss alone: 1,048,576 pairs would take a CPU hours to
run and take no time to count. docs/planning.md says how it counts and what it leaves out.

Writes memory_predicted.csv, .png and .svg into benchmarks/results (or --results).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from memory_predicted_plot import LOSSES, METHODS, Predicted, draw
from results import bytes_text, provenance
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gradcache_clip
from gradcache_clip.memory import Plan, PlanOptions
from gradcache_clip.memory.loss_trace import (
    full_matrix_loss,
    tiled_loss,
    trace_loss,
    workspaces,
)
from gradcache_clip.memory.timeline import Timeline

_FEATURE = torch.bfloat16
_CARDS = ["RTX 4090", "A100 80GB", "H100 SXM", "H200"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict, print the largest batches, and write the files."""
    options = _parser().parse_args(arguments)
    if options.quick:
        _make_quick(options)
    options.results.mkdir(parents=True, exist_ok=True)
    rows, stem = _predict(options), options.results / "memory_predicted"
    _write(rows, options, stem.with_suffix(".csv"))
    Console().print(_table(rows, options))
    for written in (stem.with_suffix(".csv"), *draw(rows, _setting(options), stem)):
        print(written)


def _predict(options: argparse.Namespace) -> list[Predicted]:
    """Every card and method at every batch size, then the losses alone."""
    given = PlanOptions(
        # A plan's curves end at twice its batch.
        batch_size=options.largest // 2,
        chunk_size=options.chunk_size,
        image_size=options.image_size,
        precision="bf16",
    )
    asked = [(card, place) for card in options.cards for place in ("device", "host")]
    rows: list[Predicted] = []
    for card, place in track(asked, "planning", console=Console(stderr=True), transient=True):
        found = gradcache_clip.plan(options.image, options.text, card, replace(given, inputs=place))
        rows += _rows_of(found, options.largest)
    batches = sorted({row.batch_size for row in rows})
    return [*rows, *_losses(batches, given.feature_dim)]


def _rows_of(found: Plan, largest: int) -> Iterator[Predicted]:
    """The methods of a plan that the picture shows; of plans for the host, gradient caching."""
    names = {
        planned: name
        for name, (planned, inputs, _) in METHODS.items()
        if inputs == found.options.inputs
    }
    for method in found.methods:
        if method.name not in names or method.largest_batch is None:
            continue
        card = found.card.name, found.card.memory_bytes, method.largest_batch
        for batch_size, nbytes in method.curve:
            if batch_size <= largest:
                yield Predicted(names[method.name], batch_size, nbytes, *card, method.at_least)


def _losses(batches: Sequence[int], width: int) -> Iterator[Predicted]:
    """The loss alone, forward and backward: features, their gradients and workspaces."""
    for name, loss in zip(LOSSES, (full_matrix_loss(), tiled_loss()), strict=True):
        trace = trace_loss(loss, [(width,)] * 2, features=_FEATURE, dtype=_FEATURE)
        for rows in batches:
            inside = workspaces(rows, rows, width, _FEATURE.itemsize, large=True)
            timeline = Timeline(tags=inside)
            timeline.hold([rows * width * _FEATURE.itemsize] * 2, "feature")
            timeline.run(trace, "forward", "backward", rows=rows)
            yield Predicted(name, rows, timeline.peak().nbytes)


def _write(rows: Sequence[Predicted], options: argparse.Namespace, path: Path) -> None:
    """One row a card, method and batch size; the losses belong to no card."""
    origin = {"setting": _setting(options), **provenance()}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *origin])
        writer.writeheader()
        writer.writerows({**asdict(row), **origin} for row in rows)


def _table(rows: Sequence[Predicted], options: argparse.Namespace) -> Table:
    table = Table(title=f"Largest batch that fits, predicted: {_setting(options)}", box=SIMPLE)
    cards = {row.card: row for row in rows if row.card}
    table.add_column("")
    for name, row in cards.items():
        table.add_column(f"{name}\n{bytes_text(row.card_bytes)}", justify="right")
    for method, (_, _, label) in METHODS.items():
        largest = {row.card: row.largest_text for row in rows if row.method == method}
        table.add_row(label.replace("\n", " "), *(largest.get(name, "") for name in cards))
    return table


def _setting(options: argparse.Namespace) -> str:
    return f"{options.image} + {options.text}, chunks of {options.chunk_size}, bf16, AdamW"


def _make_quick(options: argparse.Namespace) -> None:
    options.image, options.text, options.image_size = "convnext_atto", "bert-tiny", 32
    options.cards, options.largest = options.cards[:1], 65536


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--image", default="vit_base_patch16_224", help="timm name (default: %(default)s)")
    add("--text", default="bert-base", help="as for gradcache-clip plan (default: %(default)s)")
    add("--image-size", type=int, help="pixels of an edge (the model's own)")
    add("--cards", nargs="+", default=_CARDS, help=f"cards or amounts ({', '.join(_CARDS)})")
    add("--chunk-size", type=int, default=64, help="pairs of a chunk (64)")
    add("--largest", type=int, default=2**20, help="largest batch size (1048576)")
    add("--results", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    add("--quick", action="store_true", help="small models and one card, half a minute")
    return parser


if __name__ == "__main__":
    main()
