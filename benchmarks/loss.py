"""The contrastive losses of gradcache_clip beside every peer: time, memory and error.

    python benchmarks/loss.py                  # fp32 on the CPU; half an hour on two cores
    python benchmarks/loss.py --quick          # the CLIP loss at small batches; under a minute
    python benchmarks/loss.py --full           # also times ours and torch's at batch 65,536
    python benchmarks/loss.py --device cuda    # bf16 on a GPU; --dtype fp32 for the other
    python benchmarks/loss.py --redraw         # tables and pictures of the last CSVs

Peers come with pip install ".[peers]"; one that is not installed is listed as such. Memory is
measured in a fresh process for each contestant and batch, times in interleaved rounds of all
contestants in one process, errors against fp64 at the same numbers.

Writes loss_DEVICE_DTYPE_{times,memory,errors}.csv and loss_DEVICE_DTYPE_LOSS.{png,svg} into
benchmarks/results (or --results).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fresh_process import available_bytes, provenance
from loss_plot import draw
from loss_rows import read_origin, read_results, write_results
from loss_run import FULL_BATCH, TITLES, measure
from loss_table import show_tables
from rich.console import Console

# A table cut off on the right would hide who is wrong.
_WIDTH = 150

_QUICK = {
    "losses": ["clip"],
    "batches": [1024],
    "width": 64,
    "error_batch": 256,
    "time_batch": 1024,
    "time_width": 64,
    "rounds": 3,
    "jobs": os.cpu_count() or 1,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or with --redraw read, then print the tables and write the files."""
    options = _parser().parse_args(arguments)
    _complete(options)
    options.results.mkdir(parents=True, exist_ok=True)
    stem = options.results / f"loss_{options.device}_{options.dtype}"
    if not options.redraw:
        measure(options, partial(write_results, origin=_origin(options), stem=stem))
    results, origin = read_results(stem), read_origin(stem)
    show_tables(results, origin, Console(width=max(Console().width, _WIDTH)))
    for loss in TITLES:
        if (own := results.of(loss)).memory:
            for path in draw(loss, own, origin, stem.with_name(f"{stem.name}_{loss}")):
                print(path)


def _origin(options: argparse.Namespace) -> dict[str, str]:
    import torch

    gpu = torch.cuda.get_device_name() if options.device == "cuda" else ""
    shown = {"device": options.device, "gpu": gpu, "used_threads": str(options.threads)}
    return {**shown, **provenance()}


def _complete(options: argparse.Namespace) -> None:
    """Values that depend on others; what the caller gave stays."""
    usual = {
        "losses": list(TITLES),
        "dtype": "bf16" if options.device == "cuda" else "fp32",
        "batches": [2048, 4096, 8192, 16384],
        "width": 256,
        "error_batch": 8192 if options.device == "cuda" else 2048,
        "time_batch": 8192,
        "time_width": 512,
        "rounds": 5,
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
    import torch

    return torch.cuda.mem_get_info()[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--losses", nargs="+", choices=TITLES, help="(all; clip with --quick)")
    add("--only", nargs="+", help="contestants whose names contain one of these, and ours")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="(fp32 on the CPU, bf16 on a GPU)")
    add("--batches", type=int, nargs="+", help="pairs, for memory (2048 4096 8192 16384)")
    add("--width", type=int, help="features a vector, for memory and errors (256)")
    add("--error-batch", type=int, help="pairs, for errors (2048 on the CPU, 8192 on a GPU)")
    add("--time-batch", type=int, help="pairs, for times; NT-Xent gets half everywhere (8192)")
    add("--time-width", type=int, help="features a vector, for times (512)")
    add("--rounds", type=int, help="timed rounds (5)")
    add("--seconds", type=float, default=900.0, help="no further round of a loss after this (900)")
    add("--timeout", type=float, default=1800.0, help="seconds until a process is ended (1800)")
    add("--threads", type=int, help="threads of torch (all cores)")
    add("--jobs", type=int, help="memory points at a time; times always run alone (1)")
    add("--cap-gib", type=float, help="memory a point may use; by default 80 %% of what is free")
    add("--results", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    add("--quick", action="store_true", help="small batches, under a minute")
    add("--full", action="store_true", help=f"the CLIP loss at batch {FULL_BATCH:,}; minutes more")
    add("--redraw", action="store_true", help="measure nothing; show the CSVs of --results again")
    return parser


if __name__ == "__main__":
    main()
