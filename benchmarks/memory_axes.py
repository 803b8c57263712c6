"""What the pictures of memory against batch size share: axes, and labels beside the lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PALE, GRID = "#222222", "#666666", "#e7e5e4"
# Okabe and Ito's colours, which colour-blind people tell apart; each with a shape of its own.
LOOKS = {
    "plain": ("#d55e00", "o"),
    "checkpointed": ("#b8860b", "s"),
    "accumulated": ("#a8578a", "^"),
    "published": ("#0072b2", "D"),
    "cached": ("#00795c", "o"),
    "cached, batch on the host": ("#33a98c", "o"),
}
_MOST_TICKS = 11


class EndLabel(NamedTuple):
    """A text beside the right end of a line."""

    text: str
    y: float
    color: str
    bold: bool = False


@contextmanager
def page(inches: tuple[float, float], stem: Path) -> Iterator[Figure]:
    """A figure that is written to STEM.png and STEM.svg, the same bytes for the same rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 11, "svg.hashsalt": stem.name, "font.family": "DejaVu Sans"}
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=inches)
        yield figure
        figure.savefig(stem.with_suffix(".png"), dpi=150)
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        pyplot.close(figure)


def pairs_axis(axes: Axes, batches: Sequence[int]) -> None:
    """Batch sizes, doubled from tick to tick."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [pairs_text(batch) for batch in batches])
    axes.set_xlim(batches[0] / 1.3, batches[-1] * 1.3)
    axes.set_xlabel("batch size: image-text pairs in one step (1k = 1,024)")
    _tidy(axes)


def bytes_axis(axes: Axes, low: float, high: float) -> None:
    """Bytes from low to high, with ticks at powers of two."""
    axes.set_yscale("log", base=2)
    powers = [2**power for power in range(60) if low <= 2**power <= high]
    ticks = powers[:: 1 + len(powers) // _MOST_TICKS]
    axes.set_yticks(ticks, [tick_text(tick) for tick in ticks])
    axes.set_ylim(low, high)
    _tidy(axes)


def label_ends(axes: Axes, labels: Sequence[EndLabel], gap: float) -> None:
    """Write labels at the right, each as near to its line's end as the others let it.

    Args:
        gap: least distance of two labels, as a share of the axes' height.
    """
    low, high = axes.get_ylim()
    in_order = sorted(labels, key=lambda label: label.y)
    transform = axes.get_yaxis_transform()
    wanted = [min(max(label.y, low), high) for label in in_order]
    for label, y in zip(in_order, spread(wanted, (high / low) ** gap), strict=True):
        weight = "bold" if label.bold else "normal"
        style = {"color": label.color, "va": "center", "fontweight": weight, "linespacing": 1.05}
        axes.text(1.015, y, label.text, transform=transform, clip_on=False, **style)


def spread(values: Sequence[float], factor: float) -> list[float]:
    """Ascending positive values, moved so that each is at least `factor` times the one before.

    Values that are too close share a middle, so that none is moved further than it must be.

    Example:
        >>> spread([1.0, 8.0], 2.0), spread([4.0, 4.0], 4.0)
        ([1.0, 8.0], [2.0, 8.0])
    """
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _first(groups[-1], factor) < factor * _last(groups[-2], factor):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [
        _first(group, factor) * factor**place for group in groups for place in range(len(group))
    ]


def pairs_text(batch: int) -> str:
    """512, 4k or 1M.

    Example:
        >>> pairs_text(512), pairs_text(4096), pairs_text(1_048_576)
        ('512', '4k', '1M')
    """
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if batch >= size and batch % size == 0:
            return f"{batch // size}{unit}"
    return str(batch)


def tick_text(nbytes: int) -> str:
    """Whole MiB, GiB or TiB.

    Example:
        >>> tick_text(2**29), tick_text(2**32), tick_text(2**41)
        ('512 MiB', '4 GiB', '2 TiB')
    """
    for unit, size in (("TiB", 2**40), ("GiB", 2**30)):
        if nbytes >= size:
            return f"{nbytes / size:g} {unit}"
    return f"{nbytes / 2**20:g} MiB"


def _first(group: Sequence[float], factor: float) -> float:
    """Where the first of a group goes for its middle to stay where it is."""
    middle = 1.0
    for value in group:
        middle *= value ** (1 / len(group))
    return middle / factor ** ((len(group) - 1) / 2)


def _last(group: Sequence[float], factor: float) -> float:
    return _first(group, factor) * factor ** (len(group) - 1)


def _tidy(axes: Axes) -> None:
    axes.minorticks_off()
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
