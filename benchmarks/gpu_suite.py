"""Everything that needs an NVIDIA GPU, in one call of less than eight minutes.

    python benchmarks/gpu_suite.py                         # all sections, on the first GPU
    python benchmarks/gpu_suite.py --only smoke losses     # some of them
    python benchmarks/gpu_suite.py --dry-run               # what would run, and for how long
    python benchmarks/gpu_suite.py --dry-run --stand-in    # all of it on the CPU, at small sizes

1. smoke: every loss against fp64 in bf16, fp32 and fp16.
2. losses: their time and memory beside torch's own, peers that are installed, a matrix product.
3. engine: a step of ViT-B/16 and a text tower, plain, checkpointed and cached; largest batches.
4. plan: what `gradcache-clip plan` predicts beside the memory of those steps.
5. tune: the launch table beside other tiles, warps, registers and workspaces.
6. tests: the kernel tests, in twelve processes.

Needs torch 2.8 or newer with its Triton, timm, transformers, rich, psutil, pytest and pytest-xdist;
`plan` needs pydantic. Without a network, carry what is missing as wheels. The package installs
itself where it lies: no build environment, no dependencies.

Every result is in the folder gpu of benchmarks/results (or --results) as soon as it is measured,
and that folder in gpu.tar.gz beside it, packed anew at least once a minute. A section that fails,
hangs or is killed loses itself only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from results import ROOT, installed, parser, provenance, write_json
from rich.console import Console
from rich.table import Table
from watched_process import run_watched

LIMIT_S = 470.0
_ARCHIVE_EVERY_S = 60.0
_PROCESSES = 12
_SHOWN_LINES = 40
# A section ends by itself before it is ended: the last point takes as long as it takes.
_MARGIN_S = 10.0
_PACKAGE = "gradcache-clip"


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


def sections(results: Path, stand_in: str = "") -> list[Section]:
    """The sections, the most important first.

    Args:
        stand_in: "whole" or "failing", as for the sections; empty on a GPU.
    """
    limits = {"smoke": 70, "losses": 130, "engine": 110, "plan": 30, "tune": 60}
    files = {name: f"gpu_{name}.py" for name in limits} | {"tune": "tune_kernels.py"}
    shared = ("--results", str(results), *(("--stand-in", stand_in) if stand_in else ()))
    made = [
        Section(
            name,
            (
                *(sys.executable, f"benchmarks/{files[name]}", *shared),
                *("--seconds", f"{limit - _MARGIN_S:.0f}"),
            ),
            limit,
        )
        for name, limit in limits.items()
    ]
    return [*made, Section("tests", _tests(stand_in), 70)]


def _tests(stand_in: str) -> tuple[str, ...]:
    """The kernel tests on the GPU; for the stand-in those of one file that need no kernel."""
    files = sorted(str(path) for path in (ROOT / "tests").glob("*_kernel_cases.py"))
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    if not stand_in:
        return (*command, "-n", str(min(_PROCESSES, os.cpu_count() or 1)), *files)
    chosen = "no_such_case" if stand_in == "failing" else "workspace"
    return ("env", "TRITON_INTERPRET=1", *command, files[0], "-k", chosen)


def run(section: Section, limit_s: float, results: Path) -> Finished:
    """Run one section to its end or its limit; what it prints is in logs/NAME.log."""
    start = time.monotonic()
    log = results / "logs" / f"{section.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    archived = start

    def watch() -> None:
        nonlocal archived
        now = time.monotonic()
        if now - archived > _ARCHIVE_EVERY_S:
            archive(results)
            archived = now
        if now - start > limit_s:
            raise TimeoutError

    try:
        status = run_watched(section.command, log, ROOT, watch)
        outcome = "passed" if status == 0 else f"exit {status}"
    except TimeoutError:
        outcome = f"ended after {limit_s:.0f} s"
    seconds = time.monotonic() - start
    return Finished(section.name, " ".join(section.command), outcome, seconds)


def run_all(chosen: Sequence[Section], results: Path, console: Console) -> list[Finished]:
    """Run the sections within the limit of all, and save after each."""
    done: list[Finished] = []
    start = time.monotonic()
    for section in chosen:
        left = LIMIT_S - (time.monotonic() - start)
        console.rule(f"{section.name}: at most {min(left, section.limit_s):.0f} s")
        if left < 1:
            done.append(Finished(section.name, "", "no time left", 0.0))
            continue
        done.append(run(section, min(left, section.limit_s), results))
        log = (results / "logs" / f"{section.name}.log").read_text(errors="replace")
        lines = log.splitlines()[-_SHOWN_LINES:]
        console.print("\n".join(lines), markup=False, highlight=False)
        save(done, results)
    return done


def save(done: Sequence[Finished], results: Path) -> Path:
    """Where it ran and what became of each section, in gpu_suite.json; then the archive."""
    record = {"origin": {**_gpu(), **provenance()}, "sections": [asdict(each) for each in done]}
    write_json(record, results / "gpu_suite.json")
    return archive(results)


def archive(results: Path) -> Path:
    """Pack the folder as it is now into FOLDER.tar.gz, which is whole at any time."""
    path = results.with_name(f"{results.name}.tar.gz")
    unfinished = path.with_suffix(".new")
    with tarfile.open(unfinished, "w:gz") as packed:
        packed.add(results, results.name)
    return unfinished.replace(path)


def install() -> Section:
    """Install the package from its folder, without a network."""
    quiet = ("--quiet", "--disable-pip-version-check")
    command = ("pip", "install", *quiet, "--no-deps", "--no-build-isolation", "-e", ".")
    return Section("install", (sys.executable, "-m", *command), 60)


def _gpu() -> dict[str, str]:
    import torch

    found = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if found else "none",
        "cuda": str(torch.version.cuda),
        "triton": installed("triton") or installed("pytorch-triton"),
    }


def _show(done: Sequence[Finished], console: Console) -> None:
    table = Table("section", "outcome", "seconds")
    for each in done:
        table.add_row(each.name, each.outcome, f"{each.seconds:.0f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; 0 if all passed, 1 if one did not, 2 if there is no GPU."""
    options = _options(arguments)
    console = Console()
    every = sections(options.folder, options.stand_in or "")
    chosen = [each for each in every if options.only is None or each.name in options.only]
    if options.dry_run and not options.stand_in:
        for each in chosen:
            console.print(f"{each.name}, {each.limit_s:.0f} s: {' '.join(each.command)}")
        return 0
    if not options.stand_in and _gpu()["gpu"] == "none":
        console.print("gpu_suite: expected an NVIDIA GPU, got none that this torch can see")
        return 2
    if not installed(_PACKAGE):
        chosen = [install(), *chosen]
    done = run_all(chosen, options.folder, console)
    _show(done, console)
    console.print(f"Results: {archive(options.folder)}")
    return 0 if all(each.outcome == "passed" for each in done) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    names = [section.name for section in sections(Path())]
    made.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    made.add_argument("--dry-run", action="store_true", help="show the commands alone")
    text = "run on the CPU at small sizes; with `failing`, something fails in each section"
    stand_in = {"nargs": "?", "const": "whole", "choices": ("whole", "failing")}
    made.add_argument("--stand-in", help=text, **stand_in)
    options = made.parse_args(arguments)
    options.folder = options.results.resolve() / "gpu"
    return options


if __name__ == "__main__":
    sys.exit(main())
