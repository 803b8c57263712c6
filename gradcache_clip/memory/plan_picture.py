"""Draws a plan: memory by kind, and memory against batch size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gradcache_clip.memory.plan_options import Method, Plan
from gradcache_clip.memory.plan_table import batch_text, gib, headline, setting
from gradcache_clip.train.report.style import INK, PALE, new_figure, save_figure, settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GIB = 2**30
_SHOWN = 32
_PARTS = (
    ("parameters", ("parameter", "gathered parameters"), "#1e3a5f"),
    ("optimizer states", ("optimizer",), "#3b6ea5"),
    ("gradients", ("gradient",), "#7fa8d1"),
    ("inputs", ("input",), "#a8a29e"),
    ("features", ("feature",), "#0f766e"),
    ("activations", ("activation", "attention", "kept graphs"), "#c2410c"),
    ("autocast copies", ("cast",), "#f0a868"),
    ("workspaces", ("workspace", "statistics workspace", "gradient workspace"), "#7b5aa6"),
)
_COLORS = ("#c2410c", "#d9a441", "#7b5aa6", "#0f766e", "#5fb3a8")


def draw_plan(plan: Plan, folder: str | Path, name: str = "plan") -> list[Path]:
    """Draw a plan to NAME.png and NAME.svg in a folder, which is created if missing.

    Above: the peaks of embed, loss and replay on one card, by kind. Below: bytes of tensors and
    context against the batch size, on logarithmic axes, with a line per way to train.
    """
    with settings():
        figure = new_figure(1000, 860)
        figure.set_layout_engine("none")
        figure.text(0.03, 0.965, headline(plan), fontsize=15, fontweight="bold", va="top")
        figure.text(0.03, 0.925, setting(plan), color=PALE, va="top")
        _draw_bars(figure.add_axes((0.11, 0.66, 0.84, 0.21)), plan)
        _draw_curves(figure.add_axes((0.11, 0.09, 0.60, 0.42)), plan)
        _draw_note(figure)
        stem = Path(folder) / name
        paths = [save_figure(figure, stem.with_suffix(".png"))]
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    return [*paths, stem.with_suffix(".svg")]


def _draw_bars(axes: Axes, plan: Plan) -> None:
    for row, kinds in enumerate(plan.kinds_by_phase.values()):
        left = 0.0
        for label, names, color in _PARTS:
            width = sum(kinds.get(kind, 0) for kind in names) / _GIB
            axes.barh(row, width, left=left, color=color, label=label if row == 0 else None)
            left += width
        axes.text(left, row, f" {left:,.1f} GiB", va="center", color=INK)
    axes.set_yticks(range(len(plan.kinds_by_phase)), list(plan.kinds_by_phase))
    axes.invert_yaxis()
    room = (plan.card.memory_bytes - plan.options.context_bytes) / _GIB
    axes.axvline(room, color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.text(room, -0.62, f"{plan.card.name} ", ha="right", va="bottom", color=INK)
    axes.set_xlim(0, 1.08 * max(room, *(sum(k.values()) / _GIB for k in _phases(plan))))
    axes.set_xlabel("GiB of tensors at the peak of each part of a step")
    style = {"frameon": False, "fontsize": 9, "columnspacing": 1.2, "handlelength": 1.2}
    axes.legend(ncols=8, loc="upper center", bbox_to_anchor=(0.47, -0.3), **style)
    _tidy(axes)


def _phases(plan: Plan) -> list[dict[str, int]]:
    return list(plan.kinds_by_phase.values())


def _draw_curves(axes: Axes, plan: Plan) -> None:
    for method, color in zip(plan.methods, _COLORS, strict=True):
        if method.curve:
            _draw_curve(axes, method, color)
    memory = plan.card.memory_bytes
    axes.axhline(memory, color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
    first = min(batch for method in plan.methods for batch, _ in method.curve)
    label = f"{plan.card.name}: {gib(memory)}"
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.annotate(label, (first, memory), (0, 5), textcoords="offset points", color=INK, bbox=box)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    _label_curves(axes, plan)
    _tidy(axes)


def _draw_curve(axes: Axes, method: Method, color: str) -> None:
    batches, sizes = zip(*method.curve, strict=True)
    width = 2.8 if method.name == "gradient caching" else 1.6
    style = (0, (3, 1.5)) if method.name.endswith("kept") else "solid"
    axes.plot(batches, sizes, color=color, linewidth=width, linestyle=style)


def _label_curves(axes: Axes, plan: Plan) -> None:
    batches = sorted({batch for method in plan.methods for batch, _ in method.curve})
    axes.set_xticks(batches, [_short(batch) for batch in batches], fontsize=9)
    low, high = axes.get_ylim()
    # Cut the axis: how far a method exceeds the card does not matter.
    high = min(high, _SHOWN * plan.card.memory_bytes)
    axes.set_ylim(low, high)
    powers = [2**power for power in range(28, 60) if low <= 2**power <= high]
    ticks = powers[:: 1 + len(powers) // 9]
    axes.set_yticks(ticks, [f"{tick / _GIB:,g} GiB" for tick in ticks], fontsize=9)
    axes.minorticks_off()
    axes.set_xlabel("batch size (image-text pairs)")
    axes.text(1.04, 1.0, "largest batch that fits", transform=axes.transAxes, color=PALE, va="top")
    for row, (method, color) in enumerate(zip(plan.methods, _COLORS, strict=True)):
        axes.text(
            1.04,
            0.9 - 0.16 * row,
            f"{batch_text(method)}\n{method.name}",
            transform=axes.transAxes,
            color=color,
            va="top",
            fontweight="bold",
            fontsize=9.5,
        )


def _short(batch: int) -> str:
    return f"{batch // 1024}k" if batch >= 1024 else str(batch)


def _draw_note(figure: Figure) -> None:
    text = "Lines: tensors and CUDA context, without the allocator's fragmentation."
    figure.text(0.03, 0.015, text, fontsize=9, color=PALE)


def _tidy(axes: Axes) -> None:
    axes.grid(color="#e7e5e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
