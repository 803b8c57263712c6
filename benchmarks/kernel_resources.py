"""What the kernels use of each GPU architecture, read from compiled machine code without a GPU.

    python benchmarks/kernel_resources.py [--architecture 90 ...] [--json]

Prints, for each architecture, dtype and kernel: registers a thread, bytes spilled, shared memory a
block and its limit, the matrix instructions found, and how many blocks fit a multiprocessor.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from gradcache_clip.kernels.clip_gradient import _clip_gradient_kernel
from gradcache_clip.kernels.clip_statistics import _clip_statistics_kernel, _merge_kernel
from gradcache_clip.kernels.launch_config import (
    ARCHITECTURES,
    FLOAT16_GRADIENT_SCALE,
    launch_options,
    table_entry,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX_INSTRUCTION = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
REGISTERS_OF_MULTIPROCESSOR = 65536


@dataclass(frozen=True)
class Limits:
    """Shared memory (KiB) and threads of one architecture."""

    block_kib: int
    multiprocessor_kib: int
    threads: int


LIMITS = {
    80: Limits(163, 164, 2048),
    86: Limits(99, 100, 1536),
    89: Limits(99, 100, 1536),
    90: Limits(227, 228, 2048),
    100: Limits(227, 228, 2048),
    120: Limits(99, 100, 1536),
}


@dataclass(frozen=True)
class Case:
    """One kernel as it would be launched."""

    architecture: int
    dtype: str
    kernel: str


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses."""

    case: Case
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    matrix_instructions: list[str]
    blocks_per_multiprocessor: int


KERNELS: dict[str, JITFunction] = {
    "statistics": _clip_statistics_kernel,
    "gradient": _clip_gradient_kernel,
    "merge": _merge_kernel,
}
DTYPES = ("bfloat16", "float16", "float32")


def cases(architecture: int) -> list[Case]:
    tiles = [
        Case(architecture, dtype, kernel)
        for dtype in DTYPES
        for kernel in ("statistics", "gradient")
    ]
    return [*tiles, Case(architecture, "float32", "merge")]


def measure(case: Case) -> Resources:
    """Compile one kernel for its architecture and read the machine code."""
    compiled = _compile(case)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        instructions = _cuobjdump("-sass", file.name)
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    limits = LIMITS[case.architecture]
    shared = compiled.metadata.shared
    threads = 32 * compiled.metadata.num_warps
    return Resources(
        case=case,
        registers=used["REG"],
        spilled_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=shared,
        shared_limit_bytes=limits.block_kib * 1024,
        matrix_instructions=sorted(set(MATRIX_INSTRUCTION.findall(instructions))),
        blocks_per_multiprocessor=_blocks(limits, used["REG"], shared, threads),
    )


def _compile(case: Case) -> Any:
    kernel, dtype = KERNELS[case.kernel], getattr(torch, case.dtype)
    constants, options = _constants(case, dtype)
    signature = {
        name: "constexpr" if name in constants else _argument_type(name, dtype)
        for name in kernel.arg_names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or name == "D"
    }
    by_index = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, by_index, aligned)
    return triton.compile(source, GPUTarget("cuda", case.architecture, 32), options)


def _constants(case: Case, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments of the kernel, and options of the compiler."""
    if case.kernel == "merge":
        return {"WIDTH": 32, "DEPTH": 64}, {"enable_fp_fusion": True}
    launch = launch_options(table_entry(case.architecture, dtype))
    if case.kernel == "gradient":
        launch["GRADIENT_SCALE"] = FLOAT16_GRADIENT_SCALE if dtype == torch.float16 else 1.0
    names = KERNELS[case.kernel].arg_names
    constants = {name: value for name, value in launch.items() if name in names}
    return constants, {name: value for name, value in launch.items() if name not in names}


def _argument_type(name: str, dtype: torch.dtype) -> str:
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    if name in ("q_ptr", "k_ptr", "gradient_ptr"):
        return f"*{short}"
    return "*fp32" if name.endswith("_ptr") else "i32"


def _cuobjdump(option: str, path: str) -> str:
    command = [str(TOOLS / "cuobjdump"), option, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _blocks(limits: Limits, registers: int, shared_bytes: int, threads: int) -> int:
    """Blocks resident on a multiprocessor; each reserves 1 KiB of shared memory for the system."""
    by_registers = REGISTERS_OF_MULTIPROCESSOR // (-(-registers // 8) * 8 * threads)
    by_shared = limits.multiprocessor_kib * 1024 // (shared_bytes + 1024)
    return min(by_registers, by_shared, limits.threads // threads)


def _table(measured: list[Resources]) -> Table:
    table = Table(title=f"Triton {triton.__version__}: resources of the kernels")
    for heading in ("sm", "dtype", "kernel", "tile", "warps", "regs", "spilled"):
        table.add_column(heading, justify="right")
    for heading in ("shared KiB", "limit", "matrix units", "blocks"):
        table.add_column(heading, justify="right")
    for each in measured:
        table.add_row(*_row(each))
    return table


def _row(each: Resources) -> Iterator[str]:
    case = each.case
    config = table_entry(case.architecture, getattr(torch, case.dtype))
    merge = case.kernel == "merge"
    yield from (str(case.architecture), case.dtype, case.kernel)
    yield "-" if merge else f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_D}"
    yield "4" if merge else str(config.num_warps)
    yield from (str(each.registers), str(each.spilled_bytes), f"{each.shared_bytes / 1024:.0f}")
    yield f"{each.shared_limit_bytes // 1024}"
    yield " ".join(each.matrix_instructions) or "-"
    yield str(each.blocks_per_multiprocessor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--architecture", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list, no table")
    options = parser.parse_args()
    todo = [case for architecture in options.architecture for case in cases(architecture)]
    if options.json:
        print(json.dumps([asdict(measure(case)) for case in todo]))
        return
    measured = [measure(case) for case in track(todo, "compiling")]
    Console(width=120).print(_table(measured))


if __name__ == "__main__":
    main()
