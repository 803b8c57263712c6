"""A plain and a cached training step, pass by pass: what runs when, and what is in memory.

    python benchmarks/step_picture.py            # a ViT and a BERT, 128 pairs, chunks of 32

Both steps run for real on this machine; every pass of an encoder is timed, and the bytes of live
tensors are counted after every op. Counting slows small ops down, so the time axis tells the order
and the share of the passes, not a speed. Writes step.png and step.svg into docs/images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from engine_steps import Workload, image_text
from plots import MATRIX, OURS, files, picture
from torch import Tensor, nn

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.distributed import LocalStrategy
from gradcache_clip.memory import LiveBytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOWERS = ("image encoder", "text encoder", "loss")
ALL = "all"
COLORS = {
    "forward without graph": "#38bdf8",
    "forward with graph": OURS,
    "backward": MATRIX,
}


@dataclass
class Recording:
    """Passes, and memory over time, of one step; seconds since its start, bytes above its start."""

    passes: list[tuple[str, str, float, float]] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    def now(self) -> float:
        return time.perf_counter() - self.start

    @contextmanager
    def during(self, tower: str, kind: str) -> Any:
        begin = self.now()
        yield
        self.passes.append((tower, kind, begin, self.now()))


class Watched(nn.Module):
    """A module whose forward passes are recorded."""

    def __init__(self, module: nn.Module, name: str, recording: Recording) -> None:
        super().__init__()
        self.module, self.name, self.recording = module, name, recording

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kind = "forward with graph" if torch.is_grad_enabled() else "forward without graph"
        with self.recording.during(self.name, kind):
            return self.module(*args, **kwargs)


class WatchedStrategy(LocalStrategy):
    """Backwards of chunks and of the loss, recorded."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def backward_of_loss(self, loss: Tensor, features: Sequence[Tensor]) -> None:
        with self.recording.during("loss", "backward"):
            super().backward_of_loss(loss, features)

    def backward(self, features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        # The replay before it says whose it is.
        with self.recording.during(self.recording.passes[-1][0], "backward"):
            super().backward(features, gradients)


def main(arguments: Sequence[str] | None = None) -> None:
    """Record both steps and draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=128, help="pairs (128)")
    parser.add_argument("--chunk-size", type=int, default=32, help="pairs of a chunk (32)")
    parser.add_argument("--small", action="store_true", help="two layers instead of twelve and six")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder")
    options = parser.parse_args(arguments)
    work = image_text(options.batch_size, small=options.small)
    plain = recorded(work, lambda towers, log: plain_step(towers, work.inputs, log))
    cached = recorded(
        work, lambda towers, log: cached_step(towers, work.inputs, log, options.chunk_size)
    )
    options.out.mkdir(parents=True, exist_ok=True)
    for path in draw(plain, cached, options):
        print(path)


def recorded(work: Workload, step: Callable[[list[nn.Module], Recording], None]) -> Recording:
    """One step, after one that nobody watches: the first allocates what later ones find."""
    step(list(work.encoders), Recording())
    nn.ModuleList(work.encoders).zero_grad()
    log = Recording()
    towers = [Watched(m, name, log) for m, name in zip(work.encoders, TOWERS, strict=False)]
    log.start = time.perf_counter()
    # What was there before, parameters and inputs, does not count.
    with LiveBytes(on_op=lambda total: log.memory.append((log.now(), total))):
        step(towers, log)
    nn.ModuleList(work.encoders).zero_grad()
    return log


def plain_step(towers: list[nn.Module], inputs: Any, log: Recording) -> None:
    """Everything in one graph."""
    features = [
        tower(**given) if isinstance(given, dict) else tower(given)
        for tower, given in zip(towers, inputs, strict=True)
    ]
    loss = Watched(ClipLoss(impl="reference"), "loss", log)(*features).loss
    with log.during(ALL, "backward"):
        loss.backward()


def cached_step(towers: list[nn.Module], inputs: Any, log: Recording, chunk_size: int) -> None:
    """Embed, loss, replay."""
    loss = Watched(ClipLoss(), "loss", log)
    strategy = WatchedStrategy(log)
    GradCache(towers, loss, chunk_size=chunk_size, strategy=strategy)(*inputs)


def draw(plain: Recording, cached: Recording, options: argparse.Namespace) -> list[Path]:
    """Two columns, plain and cached; passes above, memory below, on the same scales."""
    titles = (
        f"Plain step, {options.batch_size} pairs",
        f"Gradient caching, {options.batch_size} pairs in chunks of {options.chunk_size}",
    )
    stem = options.out / "step"
    with picture(stem, (11, 5.4)) as figure:
        grid = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=[1, 1.4])
        for column, (log, title) in enumerate(zip((plain, cached), titles, strict=True)):
            draw_passes(grid[0][column], log, title)
            draw_memory(grid[1][column], log)
        grid[1][0].set_ylabel("activations and gradients, MiB")
        handles = [grid[0][0].barh(0, 0, color=color) for color in COLORS.values()]
        figure.legend(handles, list(COLORS), loc="lower center", ncols=3, frameon=False)
        figure.subplots_adjust(left=0.12, right=0.98, top=0.92, bottom=0.16, hspace=0.08)
    return files(stem)


def draw_passes(axes: Axes, log: Recording, title: str) -> None:
    """A bar for each pass, in the row of its encoder or over all rows."""
    for tower, kind, begin, end in log.passes:
        row = 0 if tower == ALL else len(TOWERS) - 1 - TOWERS.index(tower)
        rows = len(TOWERS) - 1 if tower == ALL else 0
        place = (row - 0.36, rows + 0.72)
        axes.broken_barh([(begin, end - begin)], place, color=COLORS[kind], edgecolor="white")
    axes.set_yticks(range(len(TOWERS)), reversed(TOWERS))
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0, labelbottom=False)


def draw_memory(axes: Axes, log: Recording) -> None:
    """Bytes over time, with the peak written beside it."""
    times = [at for at, _ in log.memory]
    sizes = [nbytes / 2**20 for _, nbytes in log.memory]
    axes.fill_between(
        times, sizes, step="post", color="#94a3b8", alpha=0.5, linewidth=0, rasterized=True
    )
    peak = max(range(len(sizes)), key=sizes.__getitem__)
    axes.annotate(
        f"{sizes[peak]:,.0f} MiB",
        (times[peak], sizes[peak]),
        xytext=(4, 2),
        textcoords="offset points",
        fontweight="bold",
    )
    axes.set_xlabel("time in the step")
    axes.set_xticks([])
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
