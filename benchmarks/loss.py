"""Every loss of gradcache_clip beside its peers: memory, time and error.

    python benchmarks/loss.py                  # fp32 on the CPU; 45 minutes on two cores
    python benchmarks/loss.py --quick          # small batches; two minutes
    python benchmarks/loss.py --losses clip hardness colbert    # these
    python benchmarks/loss.py --full           # also times ours and torch's at batch 65,536
    python benchmarks/loss.py --device cuda    # bf16 on a GPU; --dtype fp32 for the other
    python benchmarks/loss.py --redraw         # tables and pictures of the last CSVs

The CLIP, sigmoid and NT-Xent losses; objectives of retrieval; MaxSim with hard negatives. Beside
them the losses as a person writes them and what libraries offer: pip install ".[peers]", and
pylate late-interaction-kernels. One that is not installed is listed as such. Memory is measured in
a process of its own for each contestant and batch, times in interleaved rounds of all contestants
in one process, errors against fp64 at the same numbers.

Writes loss_DEVICE_DTYPE_{times,memory,errors}.csv, loss_DEVICE_DTYPE_LOSS.{png,svg},
retrieval_losses.csv and late_interaction.csv into benchmarks/results, with --quick into
runs/benchmarks-quick (or --results). They hold the losses of the last run alone.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import late_interaction
import loss_figures
import loss_pairs
import loss_rows
import retrieval_losses
import torch
from contestants import Contestant
from contests import (
    MEASURED,
    Contest,
    Found,
    file,
    fitting,
    points,
    take_turns,
    write_file,
)
from fresh_process import prepare_forks
from loss_picture import draw_all
from loss_rows import FULL_BATCH, read_results, stem
from results import QUICK, RESULTS, available_bytes, parser, provenance, show
from rich.console import Console
from rich.progress import Progress

# A call takes minutes at that batch, so only ours is timed there and what torch itself offers.
_FULL_RIVAL = "torch linear_cross_entropy x 2"
_SLOW_IMPORT = "sentence_transformers.sentence_transformer.losses"
_IMPORTED_BY = {"sentence-transformers", "pylate"}
_QUICK = {
    "batches": [4096],
    "width": 64,
    "error_batch": 256,
    "time_batch": 2048,
    "time_width": 64,
    "rounds": 3,
    "seconds": 15.0,
    # On a busy machine several would wait for each other.
    "threads": 1,
    "jobs": os.cpu_count() or 1,
}


@dataclass(frozen=True)
class Part:
    """Losses that share their inputs and files."""

    title: str
    names: tuple[str, ...]
    contests: Callable[[argparse.Namespace], list[Contest]]
    write: Callable[[Iterable[Found], argparse.Namespace, Mapping[str, str]], object]
    files: Callable[[Path, str, str], list[Path]]
    section: Callable[[Path, str, str], str]


def _of_one_file(title: str, module: Any) -> Part:
    def files(*place: Any) -> list[Path]:
        return [file(module.STEM, *place)]

    write = partial(write_file, module.Row, module.STEM)
    return Part(title, tuple(module.NAMES), module.contests, write, files, module.section)


PAIRS = Part(
    "Losses of pairs",
    loss_pairs.NAMES,
    loss_pairs.contests,
    loss_pairs.write,
    loss_rows.files,
    loss_figures.section,
)
PARTS = (
    PAIRS,
    _of_one_file("Objectives of retrieval", retrieval_losses),
    _of_one_file("Late interaction", late_interaction),
)
_NAMES = [name for part in PARTS for name in part.names]


def measure(parts: Sequence[Part], options: argparse.Namespace) -> None:
    """Memory and errors of all, then times of those that ran and fit.

    Files are written after each contestant, so that an interrupted run leaves what there is.
    """
    contests = {contest: part for part in parts for contest in part.contests(options)}
    entries = [(contest, one) for contest in contests for one in _entered(contest, options)]
    origin, found = _origin(options), list[Found]()

    def save(part: Part) -> None:
        part.write([each for each in found if contests[each.contest] is part], options, origin)

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("imports", total=len(entries) + len(contests))
        prepare_forks(_imports([one for _, one in entries], options.device))

        def point(entry: tuple[Contest, Contestant]) -> Found:
            title, name = entry[0].task.title, entry[1].name
            progress.update(task, description=f"memory, errors: {title}: {name}")
            return points(*entry, options)

        with ThreadPoolExecutor(options.jobs) as pool:
            for each in pool.map(point, entries):
                found.append(each)
                save(contests[each.contest])
                progress.advance(task)
        for contest, part in contests.items():
            progress.update(task, description=f"times: {contest.task.title}, all in turns")
            _time(contest, [each for each in found if each.contest is contest], options)
            save(part)
            progress.advance(task)


def _entered(contest: Contest, options: argparse.Namespace) -> list[Contestant]:
    """Those of --only; ours is always there to compare with."""
    words = [word.lower() for word in options.only or [""]]
    return [
        one
        for one in contest.task.contestants()
        if one.name == contest.ours or any(word in one.name.lower() for word in words)
    ]


def _imports(entered: Iterable[Contestant], device: str) -> list[str]:
    """Modules to import once for all processes."""
    is_needed = any(one.package in _IMPORTED_BY for one in entered)
    # On a GPU the import might start CUDA, which forks cannot use afterwards.
    return [_SLOW_IMPORT] if is_needed and device == "cpu" else []


def _time(contest: Contest, found: list[Found], options: argparse.Namespace) -> None:
    """Time all at the batch for times, and with --full two of them at a huge one."""
    take_turns(contest, fitting(contest, found, options), contest.time_size, options)
    if options.full and contest.task.title == "clip":
        names = contest.ours, _FULL_RIVAL
        few = [each for each in found if each.contestant.name in names and each.largest()]
        # The warm-up of a step this long counts, so one call each; the product needs more.
        take_turns(contest, few, FULL_BATCH, options, products=20, seconds=1.0)


# The command


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or with --redraw read, then print the tables and write the files."""
    options = _parser().parse_args(arguments)
    _complete(options)
    options.results.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if set(part.names) & set(options.losses)]
    place = options.results, options.device, options.dtype
    if options.redraw:
        parts = [part for part in parts if _is_there(part, options)] or parts[:1]
    else:
        measure(parts, options)
    for part in parts:
        show(f"## {part.title}\n\n{part.section(*place)}")
    if PAIRS in parts:
        for row in read_results(stem(*place)).times:
            if row.batch_size == FULL_BATCH and row.status == MEASURED:
                rate = f"{row.share_of_matmul:.0%} of the rate of a matrix product"
                took = f"{row.milliseconds / 1e3:.1f} s"
                print(f"{row.contestant} at batch {FULL_BATCH:,}: {rate}, {took}")
        print(*draw_all(*place), sep="\n")
    print(*(path for part in parts for path in part.files(*place)), sep="\n")


def _is_there(part: Part, options: argparse.Namespace) -> bool:
    paths = part.files(options.results, options.device, options.dtype)
    return all(path.exists() for path in paths)


def _origin(options: argparse.Namespace) -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else ""
    shown = {"device": options.device, "gpu": gpu, "used_threads": str(options.threads)}
    return {**shown, **provenance()}


def _complete(options: argparse.Namespace) -> None:
    """Values that depend on others; what the caller gave stays."""
    usual = {
        "results": QUICK if options.quick else RESULTS,
        "losses": _NAMES,
        "dtype": "bf16" if options.device == "cuda" else "fp32",
        "batches": [2048, 4096, 8192, 16384],
        "width": 256,
        "error_batch": 8192 if options.device == "cuda" else 2048,
        "time_batch": 8192,
        "time_width": 512,
        "rounds": 5,
        "seconds": 300.0,
        "threads": os.cpu_count() or 1,
        "jobs": 1,
    }
    for name, value in {**usual, **(_QUICK if options.quick else {})}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.cap = int(options.cap_gib * 2**30) if options.cap_gib else int(0.8 * _free(options))


def _free(options: argparse.Namespace) -> int:
    if options.device == "cpu":
        return available_bytes() // options.jobs
    return torch.cuda.mem_get_info()[0]


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.set_defaults(results=None)
    add = made.add_argument
    add("--losses", nargs="+", choices=_NAMES, metavar="LOSS", help=f"{', '.join(_NAMES)} (all)")
    add("--only", nargs="+", help="contestants whose names contain one of these, and ours")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="(fp32 on the CPU, bf16 on a GPU)")
    add("--rounds", type=int, help="timed rounds (5)")
    add("--seconds", type=float, help="no further round after this (300; 15 with --quick)")
    add("--timeout", type=float, default=1800.0, help="seconds until a process is ended (1800)")
    add("--threads", type=int, help="threads of torch (all cores; one with --quick)")
    add("--jobs", type=int, help="memory points at a time; times always run alone (1)")
    add("--cap-gib", type=float, help="memory a point may use; by default 80 %% of what is free")
    add("--quick", action="store_true", help="small batches; two minutes on two cores")
    add("--full", action="store_true", help=f"the CLIP loss at batch {FULL_BATCH:,}; minutes more")
    add("--redraw", action="store_true", help="measure nothing; show the CSVs of --results again")
    sizes = made.add_argument_group("sizes of the CLIP, sigmoid and NT-Xent losses")
    add = sizes.add_argument
    add("--batches", type=int, nargs="+", help="pairs, for memory (2048 4096 8192 16384)")
    add("--width", type=int, help="features a vector, for memory and errors (256)")
    add("--error-batch", type=int, help="pairs, for errors (2048 on the CPU, 8192 on a GPU)")
    add("--time-batch", type=int, help="pairs, for times; NT-Xent gets half everywhere (8192)")
    add("--time-width", type=int, help="features a vector, for times (512)")
    return made


if __name__ == "__main__":
    main()
