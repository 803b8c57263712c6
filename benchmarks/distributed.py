"""One batch on several processes: what is exchanged, how long it takes, and how exact it is.

    python benchmarks/distributed.py                 # 2 and 4 processes over gloo on this machine
    python benchmarks/distributed.py --quick         # 2 processes, small; under a minute

1. loss: the CLIP loss shared by all ranks ("gather", "ring") beside every rank computing all of it.
2. engine: a cached step under each strategy, beside plain DDP without gradient caching.

Collectives and bytes are counted in one step, times are medians of ratios of neighbouring steps,
gradients are compared with one process that has the whole batch. Processes share the cores, so
times tell of work that is saved, not of a network. Writes distributed.csv into benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp
from distributed_ranks import measure
from results import bytes_text, provenance
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

_FIELDS = ("part", "world", "contestant", "collectives", "bytes_received", "time_ratio", "error")
_TITLES = {
    "loss": "CLIP loss, {loss_rows:,} pairs of width {width} on each process",
    "engine": "ViT and BERT, {engine_rows:,} pairs on each process, chunks of {chunk}",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each number of processes, print the tables and write the CSV."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.world, options.rounds = [2], 2
        options.loss_rows, options.width, options.engine_rows, options.chunk = 512, 64, 8, 4
    rows = _measured(options)
    console = Console(width=max(Console().width, 100))
    for part, title in _TITLES.items():
        console.print(_table(title.format(**vars(options)), [r for r in rows if r["part"] == part]))
    options.results.mkdir(parents=True, exist_ok=True)
    console.print(str(_write(rows, options.results / "distributed.csv")))


def _measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        for world in progress.track(options.world, description="numbers of processes"):
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(measure, (world, folder, vars(options)), nprocs=world)
                found = json.loads((Path(folder) / "found.json").read_text())
            rows += [{"world": world, **row} for row in found]
    return rows


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, box=SIMPLE)
    for heading in ("processes", "", "collectives", "bytes received", "time", "gradient error"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        table.add_row(
            str(row["world"]),
            row["contestant"],
            str(row["collectives"]),
            bytes_text(row["bytes_received"]),
            f"{row['time_ratio']:.2f}",
            f"{row['error']:.0e}",
        )
    return table


def _write(rows: list[dict[str, Any]], path: Path) -> Path:
    origin = provenance()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*_FIELDS, *origin], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**{name: row[name] for name in _FIELDS}, **origin} for row in rows)
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--world", type=int, nargs="+", default=[2, 4], help="numbers of processes")
    add("--quick", action="store_true", help="small, two processes")
    add("--loss-rows", type=int, default=2048, help="pairs on each process, of the loss")
    add("--width", type=int, default=512, help="feature width, of the loss")
    add("--engine-rows", type=int, default=64, help="pairs on each process, of the engine")
    add("--chunk", type=int, default=16, help="chunk size")
    add("--rounds", type=int, default=5, help="timed rounds")
    add("--results", type=Path, default=Path(__file__).parent / "results")
    return parser


if __name__ == "__main__":
    main()
