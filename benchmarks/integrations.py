"""The drop-ins for other libraries, each beside what the library itself offers.

    python benchmarks/integrations.py --wordnet /usr/share/wordnet   # some minutes on two cores
    python benchmarks/integrations.py --quick                        # small sizes, some two minutes
    python benchmarks/integrations.py --redraw                       # the table of the last run

Of each case: how far loss and gradients are from the library's, the time of a step against its
step (both in one process, taking turns), and the growth of a fresh process's peak memory. Writes
integrations.csv into benchmarks/results (or --results). Cases are in integrations_cases.py.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, get_type_hints

from fresh_process import (
    Limits,
    PeakGrowth,
    call_in_fresh_process,
    interleaved_times_ms,
)
from integrations_cases import CASES, OURS, THEIRS, Run
from results import bytes_text, provenance
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """What was measured of a case."""

    drop_in: str
    beside: str
    pairs: int
    loss_error: float
    """Relative difference of the two losses."""
    gradient_error: float
    """Of all gradients as one vector."""
    time_ratio: float
    """Step of the library over step of the drop-in: the median of rounds."""
    step_ms: float
    """Median time of a step of the drop-in."""
    rounds: int
    peak_growth_bytes: int
    """Of the drop-in."""
    their_peak_growth_bytes: int


def measure_memory(arguments: dict[str, Any]) -> dict[str, Any]:
    """Peak growth of one side's step, after a small step of its own."""
    case, folder = CASES[arguments["case"]], Path(arguments["wordnet"])
    case.build(arguments["side"], case.few, folder).step()
    run = case.build(arguments["side"], arguments["pairs"], folder)
    with PeakGrowth() as peak:
        run.step()
    return {"bytes": peak.bytes}


def measure_times(arguments: dict[str, Any]) -> dict[str, Any]:
    """Interleaved times of both sides, and how far the drop-in is from the library."""
    case, folder = CASES[arguments["case"]], Path(arguments["wordnet"])
    ours, theirs = (case.build(side, arguments["pairs"], folder) for side in (OURS, THEIRS))
    loss, their_loss = ours.step(), theirs.step()
    error = _distance(ours.leaves, theirs.leaves)
    steps = [_stepping(run) for run in (ours, theirs)]
    rounds = interleaved_times_ms(steps, arguments["rounds"], arguments["seconds"])
    return {
        "loss_error": abs(loss - their_loss) / abs(their_loss),
        "gradient_error": error,
        "time_ratio": median(their / our for our, their in rounds),
        "step_ms": median(our for our, _ in rounds),
        "rounds": len(rounds),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or with --redraw read, then print the table."""
    options = _parser().parse_args(arguments)
    console, path = Console(), options.results / "integrations.csv"
    if not options.redraw:
        options.results.mkdir(parents=True, exist_ok=True)
        _write([_measured(name, options) for name in _chosen(options, console)], path)
    console.print(_table(_read(path)))


def _chosen(options: argparse.Namespace, console: Console) -> list[str]:
    if "sentences" in options.cases and not (options.wordnet / "data.noun").exists():
        console.print(f"sentences: no WordNet in {options.wordnet}; see --wordnet")
        return [name for name in options.cases if name != "sentences"]
    return list(options.cases)


def _measured(name: str, options: argparse.Namespace) -> Row:
    case = CASES[name]
    given = {"case": name, "wordnet": str(options.wordnet), "rounds": options.rounds}
    given |= {"pairs": case.few if options.quick else case.pairs, "seconds": options.seconds}
    limits = Limits(threads=options.threads)
    peaks = []
    for side in (OURS, THEIRS):
        outcome = call_in_fresh_process(measure_memory, {**given, "side": side}, limits)
        peaks.append(outcome.values["bytes"])
    times = call_in_fresh_process(measure_times, given, limits).values
    return Row(
        case.drop_in,
        case.beside,
        given["pairs"],
        **times,
        peak_growth_bytes=peaks[0],
        their_peak_growth_bytes=peaks[1],
    )


def _stepping(run: Run) -> Callable[[], float]:
    def stepped() -> float:
        for leaf in run.leaves:
            leaf.grad = None
        return run.step()

    return stepped


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Of the gradients of two equal models, relative, as one vector each."""
    pairs = [(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True) if b.grad is not None]
    difference = sum((a - b).double().square().sum() for a, b in pairs)
    return float((difference / sum(b.double().square().sum() for _, b in pairs)).sqrt())


def _write(rows: Sequence[Row], path: Path) -> None:
    origin = provenance()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(Row)), *origin])
        writer.writeheader()
        writer.writerows({**asdict(row), **origin} for row in rows)


def _read(path: Path) -> list[Row]:
    types = get_type_hints(Row)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [Row(**{name: types[name](line[name]) for name in types}) for line in lines]


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="drop-ins beside the libraries' own", box=SIMPLE)
    errors = ("loss\ndiffers by", "gradients\ndiffer by")
    table.add_column("drop-in\nbeside", overflow="fold")
    for heading in ("pairs", *errors, "their time\nover ours", "memory\ntheirs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.drop_in.split('.', 1)[1]}\n{row.beside}",
            f"{row.pairs:,}",
            f"{row.loss_error:.0e}",
            f"{row.gradient_error:.0e}",
            f"{row.time_ratio:.2f}",
            f"{bytes_text(row.peak_growth_bytes)}\n{bytes_text(row.their_peak_growth_bytes)}",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)} (all)")
    add("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="(default: %(default)s)")
    add("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    add("--seconds", type=float, default=120.0, help="no further round after this (120)")
    add("--threads", type=int, help="threads of torch (all cores)")
    add("--results", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    add("--quick", action="store_true", help="small sizes, some two minutes")
    add("--redraw", action="store_true", help="measure nothing; show the last run again")
    return parser


if __name__ == "__main__":
    main()
