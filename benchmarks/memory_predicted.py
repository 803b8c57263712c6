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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from plots import (
    DASHES,
    INK,
    LOOKS,
    Label,
    bytes_axis,
    files,
    headline,
    label_ends,
    note,
    pairs_axis,
    picture,
    spread,
)
from results import (
    bytes_text,
    paragraph,
    parser,
    provenance,
    read_csv,
    read_rows,
    show,
    table,
    write_rows,
)
from rich.console import Console
from rich.progress import track

import gradcache_clip
from gradcache_clip.memory import Plan, PlanOptions
from gradcache_clip.memory.loss_trace import (
    full_matrix_loss,
    tiled_loss,
    trace_loss,
    workspaces,
)
from gradcache_clip.memory.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FILE = "memory_predicted.csv"
_FEATURE = torch.bfloat16
_CARDS = ["RTX 4090", "A100 80GB", "H100 SXM", "H200"]
_SHOWN_BATCHES = (1024, 32768, 1048576)
# Cards whose memory differs by less share a line.
_SAME_MEMORY = 1.02
# Far above the largest card nothing is of interest but that it is far above.
_SHOWN = 6
# Of a label above the picture, as a ratio of batch sizes.
_LABEL_WIDTH = 4.8


class Planned(NamedTuple):
    """A way to train, as a plan knows it."""

    name: str
    """Name of the plan's method."""
    inputs: str
    """Where the batch waits."""
    label: str


METHODS = {
    "plain": Planned("plain", "device", "plain step"),
    "checkpointed": Planned("plain, checkpointed", "device", "activation\ncheckpointing"),
    "accumulated": Planned("accumulation as in open_clip", "device", "open_clip's\naccumulation"),
    "cached": Planned("gradient caching", "device", "gradcache-clip,\nbatch on the card"),
    "cached, batch on the host": Planned(
        "gradient caching", "host", "gradcache-clip,\nbatch on the host"
    ),
}
LOSSES = {
    "loss, B x B matrix": ("B x B matrix", LOOKS["plain"][0]),
    "loss, tiles": ("gradcache-clip", LOOKS["cached"][0]),
}


_MARKS = (
    "Dashed: memory of a card. Marks on it: the largest batch that fits, with what the allocator "
    "loses to fragments.\nLines: tensors and CUDA context, without those fragments; a mark may lie "
    "left of its line."
)


@dataclass(frozen=True)
class Predicted:
    """Memory of one method at one batch size, on a card, or of a loss alone."""

    method: str
    """One of `METHODS` or `LOSSES`."""
    batch_size: int
    predicted_bytes: int
    """Tensors and CUDA context; of a loss alone, tensors."""
    card: str = ""
    card_bytes: int = 0
    largest_batch: int = 0
    """With which the method fits the card, the allocator's fragmentation included."""
    at_least: bool = False
    """Whether the search for it ended there."""

    @property
    def largest_text(self) -> str:
        return f"{'over ' * self.at_least}{self.largest_batch:,}" if self.largest_batch else "none"


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict, write the files and print the largest batches."""
    options = _parser().parse_args(arguments)
    if options.quick:
        _make_quick(options)
    rows, stem = _predict(options), options.results / "memory_predicted"
    origin = {"setting": _setting(options), **provenance()}
    path = write_rows(Predicted, rows, options.results / _FILE, origin)
    show(section(options.results))
    for written in (path, *draw(rows, _setting(options), stem)):
        print(written)


# Predicting


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
        planned = replace(given, batch_device=place)
        found = gradcache_clip.plan(options.image, options.text, card, planned)
        rows += _rows_of(found, options.largest)
    batches = sorted({row.batch_size for row in rows})
    return [*rows, *_losses(batches, given.feature_dim)]


def _rows_of(found: Plan, largest: int) -> Iterator[Predicted]:
    """The methods of a plan that the picture shows; of plans for the host, gradient caching."""
    names = {
        planned: name
        for name, (planned, inputs, _) in METHODS.items()
        if inputs == found.options.batch_device
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


def _setting(options: argparse.Namespace) -> str:
    return f"{options.image} + {options.text}, chunks of {options.chunk_size}, bf16, AdamW"


def _make_quick(options: argparse.Namespace) -> None:
    options.image, options.text, options.image_size = "convnext_atto", "bert-tiny", 32
    options.cards, options.largest = options.cards[:1], 65536


# The section of docs/benchmarks.md


def section(results: Path) -> str:
    """The largest batch of every way to train on every card, and the loss alone."""
    rows, setting = read_rows(Predicted, results / _FILE), read_csv(results / _FILE)[0]["setting"]
    cards = {row.card: row.card_bytes for row in rows if row.card}
    largest = {(row.method, row.card): row.largest_text for row in rows if row.card}
    lines = [
        [
            METHODS[method].label.replace("\n", " "),
            *(largest.get((method, card), "") for card in cards),
        ]
        for method in dict.fromkeys(method for method, _ in largest)
    ]
    head = ["", *(f"{card}, {bytes_text(held)}" for card, held in cards.items())]
    text = f"Predicted from traces of the models, not measured: {setting}. Largest batch:"
    alone = "The loss alone, forward and backward, with the features and their gradients:"
    return f"{paragraph(text)}\n\n{table(head, lines)}\n\n{alone}\n\n{_losses_table(rows)}"


def _losses_table(rows: Sequence[Predicted]) -> str:
    """Rows are batch sizes, columns the two ways to evaluate it."""
    held = {(row.method, row.batch_size): row.predicted_bytes for row in rows if not row.card}
    lines = [
        [f"{batch:,}", *(bytes_text(held[name, batch]) for name in LOSSES)]
        for batch in _SHOWN_BATCHES
        if ("loss, tiles", batch) in held
    ]
    return table(["pairs", "with the B x B matrix", "in tiles"], lines, "rrr")


# The picture: above, steps on cards; below, the loss alone


def draw(rows: Sequence[Predicted], setting: str, stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg and return their paths.

    Dashed lines are the cards' memory; marks on them the largest batch of each method.
    """
    batches = sorted({row.batch_size for row in rows})
    with picture(stem, (11.0, 10.6)) as figure:
        steps = figure.add_axes((0.085, 0.425, 0.70, 0.42))
        loss = figure.add_axes((0.085, 0.105, 0.70, 0.21))
        pairs_axis(steps, batches)
        pairs_axis(loss, batches)
        _draw_steps(steps, [row for row in rows if row.card])
        _draw_losses(loss, [row for row in rows if not row.card])
        headline(figure, finding(rows), y=0.985)
        note(figure, f"{setting}. Predicted, not measured: no GPU was used.", y=0.925)
        note(figure, _MARKS, y=0.04)
    return files(stem)


def _draw_steps(axes: Axes, rows: Sequence[Predicted]) -> None:
    # Apart from the loss kernels' workspaces, curves are the same on every card.
    lines = {
        method: [row for row in rows if row.method == method and row.card == rows[0].card]
        for method in METHODS
    }
    for method, points in lines.items():
        style = "--" if method.endswith("host") else "-"
        _draw_line(axes, points, LOOKS[method][0], style)
    largest = max(row.card_bytes for row in rows)
    bytes_axis(axes, min(row.predicted_bytes for row in rows) / 1.5, _SHOWN * largest)
    for group in _cards(rows):
        _draw_card(axes, group)
    _label_lines(axes, lines)
    axes.set_title("One training step, on one card", loc="left", fontsize=12)


def _draw_line(axes: Axes, points: Sequence[Predicted], color: str, style: str = "-") -> None:
    batches, sizes = zip(*((each.batch_size, each.predicted_bytes) for each in points), strict=True)
    axes.plot(batches, sizes, color=color, linewidth=2.2, linestyle=style)


def _label_lines(axes: Axes, lines: Mapping[str, Sequence[Predicted]]) -> None:
    """Label a line at its end, or above the picture if it leaves it there."""
    _, high = axes.get_ylim()
    ends = {name: points[-1] for name, points in lines.items()}
    inside = [
        Label(METHODS[name].label, end.batch_size, end.predicted_bytes, LOOKS[name][0], True)
        for name, end in ends.items()
        if end.predicted_bytes <= high
    ]
    label_ends(axes, inside, gap=0.1)
    above = {
        name: log(_leaves_at(lines[name], high))
        for name, end in ends.items()
        if end.predicted_bytes > high
    }
    for name, x in zip(above, spread(list(above.values()), log(_LABEL_WIDTH)), strict=True):
        style = {"color": LOOKS[name][0], "fontsize": 10, "fontweight": "bold", "ha": "center"}
        place, offset = (exp(x), high), (0, 4)
        axes.annotate(METHODS[name].label, place, offset, textcoords="offset points", **style)


def _leaves_at(points: Sequence[Predicted], high: float) -> float:
    """The batch size at which a rising line reaches `high`, on logarithmic axes."""
    before, after = next(
        (a, b) for a, b in pairwise(points) if a.predicted_bytes <= high < b.predicted_bytes
    )
    share = log(high / before.predicted_bytes) / log(after.predicted_bytes / before.predicted_bytes)
    return before.batch_size * (after.batch_size / before.batch_size) ** share


def _cards(rows: Sequence[Predicted]) -> list[list[Predicted]]:
    """The rows by card, those of cards with about the same memory together; smallest first."""
    groups: list[list[Predicted]] = []
    for row in sorted(rows, key=lambda row: row.card_bytes):
        if groups and row.card_bytes <= _SAME_MEMORY * groups[-1][0].card_bytes:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _draw_card(axes: Axes, rows: Sequence[Predicted]) -> None:
    """A line at a card's memory, and on it the largest batch of each method."""
    names, nbytes = " and ".join(dict.fromkeys(row.card for row in rows)), rows[0].card_bytes
    axes.axhline(nbytes, color=INK, linewidth=1.1, linestyle=DASHES, zorder=1)
    # Several names take a line of their own, so that they end before the marks.
    text = f"{names}:{chr(10) if ' and ' in names else ' '}{bytes_text(nbytes)}"
    place = axes.get_xlim()[0], nbytes
    axes.annotate(text, place, (3, 4), textcoords="offset points", color=INK, fontsize=9.5)
    largest = {row.method: row for row in rows if row.card == rows[0].card}
    for method, row in largest.items():
        if row.largest_batch and not row.at_least:
            _mark(axes, row, LOOKS[method])


def _mark(axes: Axes, row: Predicted, look: tuple[str, str]) -> None:
    color, marker = look
    if row.largest_batch > axes.get_xlim()[1]:
        return
    place = row.largest_batch, row.card_bytes
    axes.plot(*place, marker, color=color, markersize=7.5, markeredgecolor="white", zorder=4)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
    style = {"color": color, "fontsize": 9, "fontweight": "bold", "bbox": box}
    near_the_edge = 2 * row.largest_batch > axes.get_xlim()[1]
    where, side = ((-5, 6), "right") if near_the_edge else ((4, -12), "left")
    text = f"{row.largest_batch:,}"
    axes.annotate(text, place, where, textcoords="offset points", ha=side, **style)


def _draw_losses(axes: Axes, rows: Sequence[Predicted]) -> None:
    labels = []
    for name, (label, color) in LOSSES.items():
        points = [row for row in rows if row.method == name]
        _draw_line(axes, points, color)
        end = points[-1]
        text = f"{label}\n{bytes_text(end.predicted_bytes)}"
        labels.append(Label(text, end.batch_size, end.predicted_bytes, color, True))
    sizes = [row.predicted_bytes for row in rows]
    bytes_axis(axes, min(sizes) / 2, 2 * max(sizes))
    label_ends(axes, labels, gap=0.2)
    axes.set_title("The loss alone, with its gradients: counted", loc="left", fontsize=12)


def finding(rows: Sequence[Predicted]) -> str:
    """The title: the largest batch of the first card with and without gradient caching."""
    first = {row.method: row for row in rows if row.card == rows[0].card}
    plain, cached = first["plain"], first["cached"]
    return (
        f"Predicted: {plain.card} holds a plain step of {plain.largest_text} pairs,\n"
        f"with gradcache-clip one of {cached.largest_text}"
    )


# The command


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    add = made.add_argument
    add("--image", default="vit_base_patch16_224", help="timm name (default: %(default)s)")
    add("--text", default="bert-base", help="as for gradcache-clip plan (default: %(default)s)")
    add("--image-size", type=int, help="pixels of an edge (the model's own)")
    add("--cards", nargs="+", default=_CARDS, help=f"cards or amounts ({', '.join(_CARDS)})")
    add("--chunk-size", type=int, default=64, help="pairs of a chunk (64)")
    add("--largest", type=int, default=2**20, help="largest batch size (1048576)")
    add("--quick", action="store_true", help="small models and one card, half a minute")
    return made


if __name__ == "__main__":
    main()
