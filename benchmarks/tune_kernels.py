"""The launch table beside other tiles, warps and stages, on the GPU that is here.

    python benchmarks/tune_kernels.py                       # bf16, batch 32,768, width 512
    python benchmarks/tune_kernels.py --dtype fp32 --seconds 300

Times the CLIP loss forward, and forward with backward, for the table's entry and its neighbours,
until the seconds are up. Quotes 2 B^2 D flops for the forward and 8 B^2 D for both. Writes
tune_kernels.csv into benchmarks/results (or --results); the table is kernels/launch_config.py.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from results import provenance
from rich.console import Console
from rich.table import Table

from gradcache_clip.kernels import launch_config as table
from gradcache_clip.kernels.launch_config import LaunchConfig
from gradcache_clip.ops import clip_loss

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TILES = ((128, 128), (256, 128), (128, 256), (64, 128), (128, 64), (64, 64))
_DEPTHS = (32, 64, 128)
_WARPS = (4, 8, 16)
_STAGES = (2, 3, 4)


@dataclass(frozen=True)
class Tuned:
    """One configuration and how fast it is."""

    config: str
    forward_ms: float = 0.0
    both_ms: float = 0.0
    forward_tflop_per_s: float = 0.0
    both_tflop_per_s: float = 0.0
    failure: str = ""


def candidates(entry: LaunchConfig) -> Iterator[LaunchConfig]:
    """The entry, then all that differ from it in one thing; and 256 rows with twice the warps."""
    yield entry
    changes = [{"BLOCK_M": m, "BLOCK_N": n} for m, n in _TILES]
    changes += [{"BLOCK_D": depth} for depth in _DEPTHS]
    changes += [{"num_warps": warps} for warps in _WARPS]
    changes += [{"num_stages": stages} for stages in _STAGES]
    changes += [{"GROUP_M": group} for group in (4, 16)]
    changes += [{"max_registers": bound} for bound in (None, 128, 168)]
    changes += [{"workspace_bytes": mib * 2**20} for mib in (64, 128, 256, 512)]
    changes += [{"BLOCK_M": 256, "num_warps": 16, "max_registers": None}]
    seen = {entry}
    for change in changes:
        neighbour = replace(entry, **change)
        if neighbour not in seen:
            seen.add(neighbour)
            yield neighbour


def measure(config: LaunchConfig, key: tuple[int, int], q: torch.Tensor, k: torch.Tensor) -> Tuned:
    """Times with this configuration in the table's place."""
    usual, table._TABLE[key] = table._TABLE[key], config
    name, (B, D) = _name(config), q.shape
    try:
        with torch.no_grad():
            forward = _median_ms(lambda: clip_loss(q, k, 50.0, impl="triton"))
        both = _median_ms(lambda: torch.autograd.grad(clip_loss(q, k, 50.0, impl="triton"), (q, k)))
    except Exception as error:  # Out of resources, or what a compiler says: the next one may run.
        return Tuned(name, failure=f"{type(error).__name__}: {error}".splitlines()[0][:80])
    finally:
        table._TABLE[key] = usual
    flops = B * B * D / 1e9
    return Tuned(name, forward, both, 2 * flops / forward, 8 * flops / both)


def _median_ms(step: Callable[[], object], repeats: int = 5) -> float:
    step()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def _name(config: LaunchConfig) -> str:
    tile = f"{config.BLOCK_M} x {config.BLOCK_N} x {config.BLOCK_D}"
    shape = f"{config.num_warps} warps, {config.num_stages} stages, group {config.GROUP_M}"
    bounds = f"{config.max_registers or 'any'} registers, {config.workspace_bytes >> 20} MiB"
    return f"{tile}, {shape}, {bounds}"


def show(rows: Sequence[Tuned], console: Console) -> None:
    """Fastest first; the entry of the table is marked."""
    shown = Table("tile", "forward ms", "TFLOP/s", "with backward ms", "TFLOP/s", "")
    order = sorted(rows, key=lambda row: row.both_ms or float("inf"))
    for row in order:
        numbers = (row.forward_ms, row.forward_tflop_per_s, row.both_ms, row.both_tflop_per_s)
        remark = row.failure or ("table" if row is rows[0] else "")
        shown.add_row(row.config, *(f"{n:.2f}" if n else "" for n in numbers), remark)
    console.print(shown)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure until the time is up; 2 if there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, default=32768, help="pairs (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="features (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=100.0, help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options, console = parser.parse_args(arguments), Console(width=120)
    if not torch.cuda.is_available():
        console.print("tune_kernels: expected an NVIDIA GPU, got none that this torch can see")
        return 2
    major, minor = torch.cuda.get_device_capability()
    known = max(each for each in table.ARCHITECTURES if each <= 10 * major + minor)
    key = known, 32 if options.dtype == "fp32" else 16
    shape = options.batch, options.width
    q, k = (_unit(shape, _DTYPES[options.dtype]) for _ in range(2))
    start, rows = time.monotonic(), []
    for config in candidates(table._TABLE[key]):
        if rows and time.monotonic() - start > options.seconds:
            break
        rows.append(measure(config, key, q, k))
        console.print(rows[-1])
    options.results.mkdir(parents=True, exist_ok=True)
    with (options.results / "tune_kernels.csv").open("w", newline="") as file:
        where = {"gpu": torch.cuda.get_device_name(), "dtype": options.dtype}
        where |= {"batch": options.batch, "width": options.width}
        origin = provenance()
        writer = csv.DictWriter(file, [*where, *asdict(rows[0]), *origin])
        writer.writeheader()
        writer.writerows({**where, **asdict(row), **origin} for row in rows)
    show(rows, console)
    return 0


def _unit(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    features = torch.nn.functional.normalize(torch.randn(shape, device="cuda"), dim=1)
    return features.to(dtype).requires_grad_()


if __name__ == "__main__":
    sys.exit(main())
