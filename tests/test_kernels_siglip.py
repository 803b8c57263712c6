"""Runs siglip_kernel_cases.py, and compiles the kernel for every architecture.

The cases run in Triton's interpreter, and on the GPU where there is one. Each process is its own:
Triton reads TRITON_INTERPRET when it is first imported. `python test_kernels_siglip.py 90` compiles
for one architecture and prints what the machine code uses.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_processes import check_fits, printed, run_cases

CASES = "siglip_kernel_cases.py"
DTYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
# Triton makes constants of arguments that are one.
SINGLE = "rows", "columns", "M", "N"


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_cases(CASES, interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_the_gpu() -> None:
    pytest.importorskip("triton")
    run_cases(CASES, interpreted=False)


@pytest.mark.parametrize(
    "architecture",
    [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (86, 100))],
)
def test_fits_and_uses_the_matrix_units(architecture: int) -> None:
    pytest.importorskip("triton")
    kernels = printed(Path(__file__), str(architecture))
    assert len(kernels) == len(list(variants())) + 2
    for each in kernels:
        check_fits(each, architecture)


def variants() -> Iterator[tuple[str, dict[str, bool]]]:
    """Training with and without labels and accuracy; the scale's gradient, and the loss alone."""
    for labels, edge in product((False, True), repeat=2):
        where = {"LABELS": labels, "EDGE": edge, "SUMS": True, "GRADIENT": True}
        for dtype, best in product(("bfloat16", "float32"), (False, True)):
            yield dtype, where | {"BEST": best}
    inner = {"LABELS": False, "EDGE": False}
    yield "float16", inner | {"SUMS": True, "GRADIENT": True, "BEST": False}
    yield "bfloat16", inner | {"SUMS": True, "GRADIENT": False, "BEST": False}
    yield "bfloat16", inner | {"SUMS": False, "GRADIENT": False, "BEST": True}
    yield "bfloat16", inner | {"SUMS": False, "GRADIENT": False, "BEST": False}


def compile_all(architecture: int) -> None:
    """Print one JSON line for each kernel."""
    for dtype, switches in variants():
        _report(architecture, dtype, switches, {})
    for edge in (False, True):
        switches = {"LABELS": True, "EDGE": edge, "SUMS": True, "GRADIENT": True, "BEST": True}
        _report(architecture, "bfloat16", switches, dict.fromkeys(SINGLE, 1))


def _report(
    architecture: int, dtype: str, switches: dict[str, bool], sizes: dict[str, int]
) -> None:
    from machine_code import compile_kernel

    from gradcache_clip.kernels.sigmoid_tile import sigmoid_kernel

    values = _launch(architecture, dtype, switches) | sizes
    machine = compile_kernel(sigmoid_kernel, architecture, values, lambda name: _type(name, dtype))
    print(json.dumps({"dtype": dtype, **asdict(machine), "values": values}))


def _launch(architecture: int, dtype: str, switches: dict[str, bool]) -> dict[str, Any]:
    """Compile-time arguments and options, as the launcher gives them."""
    from gradcache_clip.kernels import sigmoid
    from gradcache_clip.kernels.launch_config import (
        FLOAT16_GRADIENT_SCALE,
        launch_options,
        table_entry,
    )

    tiles = sigmoid._tiles(
        table_entry(architecture, getattr(torch, dtype)),
        compares=switches["LABELS"] and switches["BEST"],
    )
    scale = FLOAT16_GRADIENT_SCALE if dtype == "float16" else 1.0
    options = launch_options(tiles.edge if switches["EDGE"] else tiles.inner)
    return options | switches | {"PARTS": tiles.parts, "GRADIENT_SCALE": scale}


def _type(name: str, dtype: str) -> str:
    if name in ("q_ptr", "k_ptr", "gradient_ptr"):
        return DTYPES[dtype]
    if name.endswith("label_ptr"):
        return "*i64"
    return "*fp32" if name.endswith("_ptr") else "i32"


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
