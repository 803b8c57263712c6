"""The picture of memory_predicted.py: above, steps on cards; below, the loss alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from memory_axes import (
    INK,
    LOOKS,
    PALE,
    EndLabel,
    bytes_axis,
    label_ends,
    page,
    pairs_axis,
    spread,
)
from results import bytes_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = (0, (4, 3))
# Cards whose memory differs by less share a line.
_SAME_MEMORY = 1.02
# Far above the largest card nothing is of interest but that it is far above.
_SHOWN = 6
# Of a label above the picture, as a ratio of batch sizes.
_LABEL_WIDTH = 4.8


class Planned(NamedTuple):
    """A way to train, as a plan knows it."""

    name: str
    """Of the plan's method."""
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


def draw(rows: Sequence[Predicted], setting: str, stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg and return their paths.

    Dashed lines are the cards' memory; marks on them the largest batch of each method.
    """
    batches = sorted({row.batch_size for row in rows})
    with page((11.0, 10.6), stem) as figure:
        steps = figure.add_axes((0.085, 0.425, 0.70, 0.42))
        loss = figure.add_axes((0.085, 0.105, 0.70, 0.21))
        pairs_axis(steps, batches)
        pairs_axis(loss, batches)
        _draw_steps(steps, [row for row in rows if row.card])
        _draw_losses(loss, [row for row in rows if not row.card])
        _write_words(figure, rows, setting)
    return [stem.with_suffix(".png"), stem.with_suffix(".svg")]


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
    inside = {name: each[-1].predicted_bytes for name, each in lines.items()}
    ends = [
        EndLabel(METHODS[name].label, nbytes, LOOKS[name][0], True)
        for name, nbytes in inside.items()
        if nbytes <= high
    ]
    label_ends(axes, ends, gap=0.1)
    above = {name: _leaves_at(lines[name], high) for name in lines if inside[name] > high}
    names = sorted(above, key=lambda name: above[name])
    places = spread([above[name] for name in names], _LABEL_WIDTH)
    for name, x in zip(names, places, strict=True):
        style = {"color": LOOKS[name][0], "fontsize": 10, "fontweight": "bold", "ha": "center"}
        axes.annotate(METHODS[name].label, (x, high), (0, 4), textcoords="offset points", **style)


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
    axes.axhline(nbytes, color=INK, linewidth=1.1, linestyle=_DASHES, zorder=1)
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
        size = bytes_text(points[-1].predicted_bytes)
        labels.append(EndLabel(f"{label}\n{size}", points[-1].predicted_bytes, color, True))
    sizes = [row.predicted_bytes for row in rows]
    bytes_axis(axes, min(sizes) / 2, 2 * max(sizes))
    label_ends(axes, labels, gap=0.2)
    axes.set_title("The loss alone, with its gradients: counted", loc="left", fontsize=12)


def _write_words(figure: Figure, rows: Sequence[Predicted], setting: str) -> None:
    left, small = 0.02, {"fontsize": 9.5, "color": PALE, "va": "top"}
    figure.text(left, 0.985, finding(rows), fontsize=15, fontweight="bold", va="top", color=INK)
    figure.text(left, 0.925, f"{setting}. Predicted, not measured: no GPU was used.", **small)
    text = (
        "Dashed: memory of a card. Marks on it: the largest batch that fits, with what the "
        "allocator loses to fragments.\nLines: tensors and CUDA context, without those fragments; "
        "a mark may lie left of its line."
    )
    figure.text(left, 0.04, text, **small)


def finding(rows: Sequence[Predicted]) -> str:
    """The title: the largest batch of the first card with and without gradient caching."""
    first = {row.method: row for row in rows if row.card == rows[0].card}
    plain, cached = first["plain"], first["cached"]
    return (
        f"Predicted: {plain.card} holds a plain step of {plain.largest_text} pairs,\n"
        f"with gradcache-clip one of {cached.largest_text}"
    )
