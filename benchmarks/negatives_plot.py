"""The picture of negatives.py: held-out R@1 against the number of pairs that compete."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from negatives_experiments import EXPERIMENTS, Experiment
from negatives_rows import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"forward": "#0f766e", "backward": "#c2410c"}
_GREY = "#57534e"
Panel = list[Summary]


def draw(found: Sequence[Summary], stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg and return their paths; one panel a data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(found)
    style = {"font.size": 11.5, "svg.hashsalt": "negatives", "font.family": "DejaVu Sans"}
    with pyplot.rc_context(style):
        inches = (max(2.0 + 4.6 * len(panels), 8.4), 6.0)
        figure, axes = pyplot.subplots(1, len(panels), figsize=inches, squeeze=False)
        for each, panel in zip(axes[0], panels, strict=True):
            _draw_panel(each, panel)
        _write_titles(figure, panels)
        figure.subplots_adjust(left=0.08, right=0.9, top=0.72, bottom=0.25, wspace=0.45)
        paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
        figure.savefig(paths[0], dpi=160)
        figure.savefig(paths[1], metadata={"Date": None})
        pyplot.close(figure)
    return paths


def finding(panel: Panel) -> str:
    """What the largest number of competing pairs gives over the smallest, one data set."""
    few, many = panel[0], panel[-1]
    below, above = (100 * _mean(each) for each in (few, many))
    return (
        f"{above:.0f} % right with {many.first.block_size:,}, {below:.0f} % with "
        f"{few.first.block_size:,}"
    )


def _mean(found: Summary) -> float:
    """R@1 over both directions."""
    return (found.mean("forward") + found.mean("backward")) / 2


def _panels(found: Sequence[Summary]) -> list[Panel]:
    return [list(group) for _, group in groupby(found, key=lambda each: each.first.data)]


def _draw_panel(axes: Axes, panel: Panel) -> None:
    experiment = EXPERIMENTS[panel[0].first.data]
    first, second = experiment.sides
    names = {"forward": f"{first} →\n{second}", "backward": f"{second} →\n{first}"}
    for direction, name in names.items():
        _draw_direction(axes, panel, direction)
        _label_end(axes, panel, direction, name)
    _draw_chance(axes, panel[0])
    _label_axes(axes, panel, experiment)


def _draw_direction(axes: Axes, panel: Panel, direction: str) -> None:
    """The mean as a line, a bar of one standard deviation each way, and a dot for each seed."""
    blocks = [each.first.block_size for each in panel]
    means = [100 * each.mean(direction) for each in panel]
    bars = [100 * each.deviation(direction) for each in panel]
    color = _COLORS[direction]
    axes.errorbar(blocks, means, yerr=bars, color=color, linewidth=2.5, capsize=4, elinewidth=1.5)
    for block, each in zip(blocks, panel, strict=True):
        recalls = [100 * recall for recall in each.recalls(direction)]
        axes.plot([block] * len(recalls), recalls, "o", color=color, markersize=4, alpha=0.5)


def _label_end(axes: Axes, panel: Panel, direction: str, name: str) -> None:
    last, other = panel[-1], {"forward": "backward", "backward": "forward"}[direction]
    is_upper = last.mean(direction) >= last.mean(other)
    axes.annotate(
        name,
        (last.first.block_size, 100 * last.mean(direction)),
        xytext=(10, 4 if is_upper else -4),
        textcoords="offset points",
        color=_COLORS[direction],
        fontweight="bold",
        fontsize=10.5,
        va="bottom" if is_upper else "top",
        annotation_clip=False,
    )


def _draw_chance(axes: Axes, found: Summary) -> None:
    chance = 100 * (found.first.forward_chance + found.first.backward_chance) / 2
    axes.axhline(chance, color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"chance: {chance:.2g} %",
        (found.first.block_size, chance),
        xytext=(0, 5),
        textcoords="offset points",
        color=_GREY,
        fontsize=10,
    )


def _label_axes(axes: Axes, panel: Panel, experiment: Experiment) -> None:
    blocks = [each.first.block_size for each in panel]
    batch_size = panel[0].first.batch_size
    axes.set_xscale("log", base=2)
    axes.set_xticks(blocks, [_tick(block, batch_size) for block in blocks])
    axes.minorticks_off()
    axes.set_xlim(blocks[0] / 1.4, blocks[-1] * 1.4)
    top = max(each.mean(way) + each.deviation(way) for each in panel for way in _COLORS)
    axes.set_ylim(0, min(118 * top, 103))
    axes.set_ylabel("right at the first place (R@1), %")
    axes.set_xlabel("pairs that compete in one softmax")
    axes.set_title(f"{experiment.title}: {experiment.held_out}\n{finding(panel)}", **_panel_title())
    axes.grid(axis="y", color="#e7e5e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _panel_title() -> dict[str, object]:
    return {"loc": "left", "fontsize": 10.5, "color": "#1c1917"}


def _tick(block: int, batch_size: int) -> str:
    return f"{block:,}" + ("\nthe batch" if block == batch_size else "")


def _write_titles(figure: Figure, panels: list[Panel]) -> None:
    one = panels[0][-1].first
    seeds = len(panels[0][-1].rows)
    title = "What negatives are worth: retrieval of what was never seen"
    figure.text(0.02, 0.965, title, fontsize=15, fontweight="bold", va="top")
    figure.text(
        0.02,
        0.895,
        f"Same first weights, data, order and learning rate, {one.steps:,} steps of "
        f"{one.batch_size:,} pairs in the same memory;\nonly the negatives differ",
        color=_GREY,
        va="top",
    )
    notes = (
        "Left: what plain gradient accumulation over chunks of so many pairs trains.\n"
        "Right end, the whole batch: what gradient caching trains, in the memory of one chunk.\n"
        + (f"Lines: mean of {seeds} seeds; bars: one standard deviation." if seeds > 1 else "")
    )
    figure.text(0.02, 0.03, notes, fontsize=9.5, color=_GREY)
