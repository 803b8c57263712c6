"""What the prefix kernels use of an architecture, from machine code compiled without a GPU.

test_kernels_prefixes.py runs this file in a process of its own, where kernels are not interpreted.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from machine_code import compile_kernel

from gradcache_clip.kernels.launch_config import launch_options, table_entry
from gradcache_clip.kernels.prefix_gradient import _prefix_gradient_kernel
from gradcache_clip.kernels.prefix_statistics import (
    Segments,
    _prefix_statistics_kernel,
    prefix_config,
)

SHORT = {"bfloat16": "bf16", "float32": "fp32"}
WIDTHS = (32, 64), (64, 128, 256, 512, 768, 1024)


def report(kernel: Any, architecture: int, dtype: str, widths: tuple[int, ...]) -> None:
    config = prefix_config(table_entry(architecture, getattr(torch, dtype)), getattr(torch, dtype))
    values = launch_options(config) | {"ENDS": Segments(widths, config.BLOCK_D).ends}
    machine = compile_kernel(kernel, architecture, values, lambda name: _type(name, SHORT[dtype]))
    named = {"kernel": kernel.__name__, "dtype": dtype, "widths": widths}
    print(json.dumps({**named, **asdict(machine)}))


def _type(name: str, dtype: str) -> str:
    if name in ("q_ptr", "k_ptr", "gradient_ptr"):
        return f"*{dtype}"
    return "*fp32" if name.endswith("_ptr") else "i32"


if __name__ == "__main__":
    for case in product((_prefix_statistics_kernel, _prefix_gradient_kernel), SHORT, WIDTHS):
        report(case[0], int(sys.argv[1]), *case[1:])
