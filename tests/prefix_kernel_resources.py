"""What the prefix kernels use of an architecture, from machine code compiled without a GPU.

test_kernels_prefixes.py runs this file in a process of its own, where kernels are not interpreted.
"""

from __future__ import annotations

import json
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from kernel_resources import LIMITS, MATRIX_INSTRUCTION, _cuobjdump, re

from gradcache_clip.kernels.launch_config import launch_options, table_entry
from gradcache_clip.kernels.prefix_gradient import _prefix_gradient_kernel
from gradcache_clip.kernels.prefix_statistics import (
    Segments,
    _prefix_statistics_kernel,
    prefix_config,
)

SHORT = {"bfloat16": "bf16", "float32": "fp32"}
WIDTHS = (32, 64), (64, 128, 256, 512, 768, 1024)


def compiled(kernel: Any, architecture: int, dtype: str, widths: tuple[int, ...]) -> Any:
    config = prefix_config(table_entry(architecture, getattr(torch, dtype)), getattr(torch, dtype))
    launch = launch_options(config) | {"ENDS": Segments(widths, config.BLOCK_D).ends}
    names = kernel.arg_names
    constants = {(names.index(name),): v for name, v in launch.items() if name in names}
    signature = {name: _type(name, SHORT[dtype], launch) for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name.endswith("_ptr") or name == "D"
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {name: v for name, v in launch.items() if name not in names}
    return compile(source, GPUTarget("cuda", architecture, 32), options)


def _type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in ("q_ptr", "k_ptr", "gradient_ptr"):
        return f"*{dtype}"
    return "*fp32" if name.endswith("_ptr") else "i32"


def resources(
    kernel: Any, architecture: int, dtype: str, widths: tuple[int, ...]
) -> dict[str, Any]:
    machine = compiled(kernel, architecture, dtype, widths)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        instructions = _cuobjdump("-sass", file.name)
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": kernel.__name__,
        "dtype": dtype,
        "widths": widths,
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": machine.metadata.shared,
        "shared_limit_bytes": LIMITS[architecture].block_kib * 1024,
        "matrix_instructions": sorted(set(MATRIX_INSTRUCTION.findall(instructions))),
    }


if __name__ == "__main__":
    every = product((_prefix_statistics_kernel, _prefix_gradient_kernel), SHORT, WIDTHS)
    print(json.dumps([resources(k, int(sys.argv[1]), dtype, w) for k, dtype, w in every]))
