"""Everything that needs an NVIDIA GPU, in one call of less than eight minutes.

    python benchmarks/gpu_suite.py               # all sections, on the first GPU
    python benchmarks/gpu_suite.py --only tests  # one of them
    python benchmarks/gpu_suite.py --dry-run     # what would run, and for how long at most

1. tests: every kernel against the reference, on the GPU, in bf16 as well.
2. loss: time, memory and error of the losses beside their peers at batch 65,536.
3. tune: the launch table beside other tiles, warps and stages.

A section that fails or takes too long is recorded as such, and the next one runs. Writes
gpu_suite.json, with the output of each section, and the files of benchmarks/loss.py and
benchmarks/tune_kernels.py into benchmarks/results (or --results).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from results import provenance
from rich.console import Console
from rich.table import Table

_ROOT = Path(__file__).resolve().parents[1]
_KEPT_CHARACTERS = 20_000
LIMIT_S = 470.0


@dataclass(frozen=True)
class Section:
    """A command and the seconds after which it is ended."""

    name: str
    command: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Finished:
    """What became of a section."""

    name: str
    command: str
    outcome: str
    seconds: float
    output: str


def sections(results: Path) -> list[Section]:
    """The sections, the most important first."""
    python, folder = sys.executable, str(results)
    cases = sorted(str(path) for path in (_ROOT / "tests").glob("*_kernel_cases.py"))
    loss = [python, "benchmarks/loss.py", "--device", "cuda", "--results", folder]
    large = ["--batches", "16384", "65536", "--width", "512", "--time-batch", "65536"]
    limits = ["--rounds", "5", "--seconds", "40", "--timeout", "60"]
    return [
        Section("tests", (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cases), 150),
        Section("loss", (*loss, "--losses", "clip", "siglip", *large, *limits), 200),
        Section("tune", (python, "benchmarks/tune_kernels.py", "--results", folder), 120),
    ]


def run(section: Section, limit_s: float) -> Finished:
    """Run one section to its end or its limit; its output goes to the screen as well."""
    start = time.monotonic()
    process = subprocess.Popen(
        section.command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        outcome = "passed" if process.returncode == 0 else f"exit {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        outcome = f"ended after {limit_s:.0f} s"
    seconds = time.monotonic() - start
    command = " ".join(section.command)
    return Finished(section.name, command, outcome, seconds, output[-_KEPT_CHARACTERS:])


def run_all(chosen: Sequence[Section], results: Path, console: Console) -> list[Finished]:
    """Run the sections within the limit of all, and save after each."""
    done: list[Finished] = []
    start = time.monotonic()
    for section in chosen:
        left = LIMIT_S - (time.monotonic() - start)
        console.rule(f"{section.name}: at most {min(left, section.limit_s):.0f} s")
        if left < 1:
            done.append(Finished(section.name, "", "no time left", 0.0, ""))
            continue
        done.append(run(section, min(left, section.limit_s)))
        console.print(done[-1].output, markup=False, highlight=False)
        save(done, results)
    return done


def save(done: Sequence[Finished], results: Path) -> None:
    """Where it ran, and what became of each section."""
    results.mkdir(parents=True, exist_ok=True)
    record = {"origin": {**_gpu(), **provenance()}, "sections": [asdict(each) for each in done]}
    (results / "gpu_suite.json").write_text(json.dumps(record, indent=1) + "\n")


def _gpu() -> dict[str, str]:
    import torch
    import triton

    found = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if found else "none",
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
    }


def _show(done: Sequence[Finished], console: Console) -> None:
    table = Table("section", "outcome", "seconds")
    for each in done:
        table.add_row(each.name, each.outcome, f"{each.seconds:.0f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; 0 if all passed, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="names of sections")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--dry-run", action="store_true", help="show the commands alone")
    options = parser.parse_args(arguments)
    console, every = Console(), sections(options.results)
    chosen = [each for each in every if options.only is None or each.name in options.only]
    if not chosen:
        names = ", ".join(each.name for each in every)
        parser.error(f"--only: expected some of {names}, got {' '.join(options.only)}")
    if options.dry_run:
        for each in chosen:
            console.print(f"{each.name}, {each.limit_s:.0f} s: {' '.join(each.command)}")
        return 0
    if _gpu()["gpu"] == "none":
        console.print("gpu_suite: expected an NVIDIA GPU, got none that this torch can see")
        return 2
    done = run_all(chosen, options.results, console)
    _show(done, console)
    return 0 if all(each.outcome == "passed" for each in done) else 1


if __name__ == "__main__":
    sys.exit(main())
