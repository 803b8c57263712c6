"""Pictures of benchmarks: their style, and axes and labels that several of them have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PALE, GRID = "#222222", "#57534e", "#e7e5e4"
OURS, CHUNKED, MATRIX = "#0f766e", "#2563eb", "#c2410c"
DASHES = (0, (4, 3))
# Okabe and Ito's colours, which colour-blind people tell apart; each with a shape of its own.
LOOKS = {
    "plain": ("#d55e00", "o"),
    "checkpointed": ("#b8860b", "s"),
    "accumulated": ("#a8578a", "^"),
    "published": ("#0072b2", "D"),
    "cached": ("#00795c", "o"),
    "cached, batch on the host": ("#33a98c", "o"),
}
_LEFT = 0.02
_MOST_TICKS = 11


class Label(NamedTuple):
    """A text beside the end of a line, which is at (x, y)."""

    text: str
    x: float
    y: float
    color: str
    bold: bool = False


@contextmanager
def picture(stem: Path, inches: tuple[float, float], layout: str | None = None) -> Iterator[Figure]:
    """A figure that is written to STEM.png and STEM.svg, the same bytes for the same rows."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"font.size": 11, "svg.hashsalt": stem.name, "font.family": "DejaVu Sans"}
    with rc_context(style):
        figure = Figure(figsize=inches, layout=layout)
        yield figure
        png, svg = files(stem)
        figure.savefig(png, dpi=150)
        figure.savefig(svg, metadata={"Date": None})


def files(stem: Path) -> list[Path]:
    """The files that `picture` writes."""
    return [stem.with_suffix(suffix) for suffix in (".png", ".svg")]


def headline(figure: Figure, text: str, y: float = 0.975) -> None:
    """The finding, in the upper left corner."""
    figure.text(_LEFT, y, text, fontsize=15, fontweight="bold", va="top", color=INK)


def note(figure: Figure, text: str, y: float) -> None:
    """Small print that begins at this height."""
    figure.text(_LEFT, y, text, fontsize=9.5, color=PALE, va="top")


def tidy(axes: Axes, grid: str = "both") -> None:
    """A pale grid, no small ticks, and no frame above and on the right."""
    axes.minorticks_off()
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def pairs_axis(axes: Axes, batches: Sequence[int]) -> None:
    """Batch sizes, doubled from tick to tick."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [pairs_text(batch) for batch in batches])
    axes.set_xlim(batches[0] / 1.3, batches[-1] * 1.3)
    axes.set_xlabel("batch size: image-text pairs in one step (1k = 1,024)")
    tidy(axes)


def bytes_axis(axes: Axes, low: float, high: float) -> None:
    """Bytes from low to high, with ticks at powers of two."""
    axes.set_yscale("log", base=2)
    powers = [2**power for power in range(60) if low <= 2**power <= high]
    ticks = powers[:: 1 + len(powers) // _MOST_TICKS]
    axes.set_yticks(ticks, [tick_text(tick) for tick in ticks])
    axes.set_ylim(low, high)
    tidy(axes)


def label_ends(
    axes: Axes, labels: Iterable[Label], gap: float, *, at: float = 1.015, tied: bool = False
) -> None:
    """Write labels at the right, each as near to its line's end as the others let it.

    Args:
        gap: least distance of two labels, as a share of the axes' height.
        at: where they begin, as a share of the axes' width.
        tied: draw a thin line from each label to its end.
    """
    labels = list(labels)
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((label.x, label.y))[1]) for label in labels]
    heights = spread([min(max(height, 0.0), 1.0) for height in wanted], gap)
    for label, height in zip(labels, heights, strict=True):
        tie = {"arrowstyle": "-", "color": label.color, "lw": 0.6, "relpos": (0, 0.5)}
        style: dict[str, Any] = {"color": label.color, "va": "center", "linespacing": 1.05}
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(at, height),
            textcoords="axes fraction",
            fontsize=10.5,
            fontweight="bold" if label.bold else "normal",
            annotation_clip=False,
            arrowprops=tie if tied else None,
            **style,
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places as near to the wanted ones as a gap between neighbours allows, in their order.

    Those that are too close share a middle, so that none is moved further than it must be.

    Example:
        >>> spread([8.0, 1.0], 2.0), spread([4.0, 4.0], 2.0)
        ([8.0, 1.0], [3.0, 5.0])
    """
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    blocks: list[list[float]] = []
    for rank, place in enumerate(order):
        # Less their rank, labels may coincide but not cross: neighbours that would are averaged.
        blocks.append([wanted[place] - gap * rank])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    flat = [_mean(block) for block in blocks for _ in block]
    places = [0.0] * len(wanted)
    for rank, place in enumerate(order):
        places[place] = flat[rank] + gap * rank
    return places


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def pairs_text(batch: int) -> str:
    """Example:
    >>> pairs_text(512), pairs_text(4096), pairs_text(1_048_576)
    ('512', '4k', '1M')
    """
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if batch >= size and batch % size == 0:
            return f"{batch // size}{unit}"
    return str(batch)


def tick_text(nbytes: int) -> str:
    """Example:
    >>> tick_text(2**29), tick_text(2**32), tick_text(2**41)
    ('512 MiB', '4 GiB', '2 TiB')
    """
    for unit, size in (("TiB", 2**40), ("GiB", 2**30)):
        if nbytes >= size:
            return f"{nbytes / size:g} {unit}"
    return f"{nbytes / 2**20:g} MiB"
