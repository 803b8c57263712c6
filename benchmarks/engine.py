"""The gradient-caching engine beside the plain step and the other ways to train large batches.

    python benchmarks/engine.py --wordnet /usr/share/wordnet   # about 40 minutes on two cores
    python benchmarks/engine.py --quick                        # small models, under a minute
    python benchmarks/engine.py --overhead                     # 4 alone; the others stay
    python benchmarks/engine.py --redraw                       # table and picture of the last run

1. image-text: a ViT on 64-pixel images and a six-layer text tower.
2. lemma-gloss: WordNet through one encoder of the shape of MiniLM-L6, both directions (needs
   WordNet 3.0's data files, from the Debian package wordnet-base).
3. budget: time of a step against the memory for retained graphs.
4. overhead: linear layers, beside a two-pass loop written by hand.

Memory is the growth of a fresh process's peak; times are medians of ratios of neighbouring steps
in one process; gradients are compared with the first contestant's. Writes engine.json and
engine_budget.{png,svg} into benchmarks/results (or --results).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_points import (
    CONTESTANTS,
    measure_budgets,
    measure_memory,
    measure_overhead,
    measure_times,
)
from fresh_process import Limits, call_in_fresh_process
from results import bytes_text, provenance
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

_WORKLOADS = {"image-text": (512, 32), "lemma-gloss": (2048, 32)}
_OVERHEAD = {"chunks": 64, "chunk_size": 64, "rounds": 300, "seconds": 30.0}
_QUICK = {"image-text": (32, 8), "lemma-gloss": (128, 16)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or with --redraw read, then print the tables and draw."""
    options = _parser().parse_args(arguments)
    console, path = Console(), options.results / "engine.json"
    if not options.redraw:
        options.results.mkdir(parents=True, exist_ok=True)
        if options.overhead:
            record = {**json.loads(path.read_text()), "overhead": _overhead(options)}
        else:
            record = {"origin": provenance(), **_measure(options, console)}
        path.write_text(json.dumps(record, indent=1) + "\n")
    record = json.loads(path.read_text())
    for workload in _WORKLOADS:
        if record.get(workload):
            console.print(_table(workload, record[workload]))
    console.print(_overhead_line(record["overhead"]))
    if not options.overhead:
        for drawn in _draw_budget(record["budget"], options.results / "engine_budget"):
            console.print(str(drawn))


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    sizes = _QUICK if options.quick else _WORKLOADS
    rounds = 2 if options.quick else options.rounds
    common = {"small": options.quick, "wordnet": str(options.wordnet), "rounds": rounds}
    common |= {"seconds": 5.0 if options.quick else options.seconds}
    record: dict[str, Any] = {}
    with Progress(console=console) as progress:
        bar = progress.add_task("measuring", total=None)
        for workload, (batch_size, chunk_size) in sizes.items():
            if workload == "lemma-gloss" and not (options.wordnet / "data.noun").exists():
                console.print(f"lemma-gloss: no WordNet in {options.wordnet}; see --wordnet")
                continue
            given = {**common, "workload": workload, "batch_size": batch_size}
            given["chunk_size"] = chunk_size
            progress.update(bar, description=workload)
            record[workload] = {"batch_size": batch_size, "chunk_size": chunk_size}
            record[workload]["contestants"] = _compare(given, options)
        progress.update(bar, description="budget")
        batch_size, chunk_size = sizes["image-text"]
        given = {**common, "workload": "image-text", "batch_size": batch_size // 2}
        record["budget"] = _values(measure_budgets, {**given, "chunk_size": chunk_size}, options)
        progress.update(bar, description="overhead")
        record["overhead"] = _overhead(options)
    return record


def _overhead(options: argparse.Namespace) -> dict[str, Any]:
    """With an origin of its own, for it may be measured alone."""
    return {"origin": provenance(), **_values(measure_overhead, _OVERHEAD, options)}


def _overhead_line(overhead: dict[str, Any]) -> str:
    return (
        f"linear layers: {overhead['time_ratio']:.2f} times a two-pass loop written by hand, "
        f"{overhead['engine_us_per_chunk']:.0f} us a chunk for {overhead['loop_us_per_chunk']:.0f}"
    )


def _compare(given: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Times and gradients in one process, memory in one each; failures are told."""
    rows = {
        name: _memory({**given, "name": name}, options) for name in CONTESTANTS[given["workload"]]
    }
    names = [name for name, row in rows.items() if "failure" not in row]
    for name, times in _values(measure_times, {**given, "names": names}, options).items():
        rows[name] |= times
    return rows


def _memory(arguments: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    try:
        return _values(measure_memory, arguments, options)
    except RuntimeError as error:
        return {"failure": str(error).strip().splitlines()[-1]}


def _values(function: Any, arguments: dict[str, Any], options: argparse.Namespace) -> Any:
    limits = Limits(seconds=options.timeout, threads=options.threads)
    outcome = call_in_fresh_process(function, arguments, limits)
    if outcome.failure:
        raise RuntimeError(outcome.failure)
    return outcome.values


def _table(workload: str, record: dict[str, Any]) -> Table:
    first = next(iter(record["contestants"]))
    title = f"{workload}: batch {record['batch_size']:,}, chunks of {record['chunk_size']}"
    table = Table(title=title, box=SIMPLE)
    for heading in ("", "peak memory", f"time against\n{first}", "gradient against\nthe first"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in record["contestants"].items():
        if "failure" in row:
            table.add_row(name, row["failure"], "", "")
            continue
        memory, ratio = bytes_text(row["peak_growth_bytes"]), f"{row['time_ratio']:.2f}"
        table.add_row(name, memory, ratio, f"{row['gradient_error']:.0e}")
    return table


def _draw_budget(budget: dict[str, Any], stem: Path) -> list[Path]:
    """Time of a step falls to the plain step's as more graphs are kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = sorted((float(share), row["time_ratio"]) for share, row in budget.items())
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    shares, ratios = zip(*points, strict=True)
    axes.plot([100 * share for share in shares], ratios, "o-", color="#1f6fb2", linewidth=2)
    axes.axhline(1.0, color="#888888", linestyle="--", linewidth=1)
    axes.annotate("plain step", (100, 1.0), (0, 6), textcoords="offset points", ha="right")
    axes.set_xlabel("memory_budget, % of what all graphs of the batch take")
    axes.set_ylabel("time of a step / plain step")
    axes.set_title("What more memory buys: fewer chunks are run twice", loc="left")
    axes.set_ylim(bottom=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return paths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="(default: %(default)s)")
    add("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    add("--seconds", type=float, default=600.0, help="no further round after this (600)")
    add("--timeout", type=float, default=3600.0, help="seconds until a process is ended (3600)")
    add("--threads", type=int, help="threads of torch (all cores)")
    add("--results", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    add("--quick", action="store_true", help="small models, under a minute")
    add("--overhead", action="store_true", help="measure 4 alone, and keep the other results")
    add("--redraw", action="store_true", help="measure nothing; show the last run again")
    return parser


if __name__ == "__main__":
    main()
