"""Runs siglip_kernel_cases.py, and compiles the kernel for every architecture.

The cases run in Triton's interpreter, and on the GPU where there is one. Each process is its own:
Triton reads TRITON_INTERPRET when it is first imported. `python test_kernels_siglip.py 90` compiles
for one architecture and prints what the machine code uses.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
CASES = Path(__file__).with_name("siglip_kernel_cases.py")
# Shared memory of a block in KiB, and the matrix instruction; fp32 only where tf32 pays.
ARCHITECTURES = {
    80: (163, "HMMA", True),
    86: (99, "HMMA", False),
    89: (99, "HMMA", False),
    90: (227, "HGMMA", True),
    100: (227, "UTCHMMA", True),
    120: (99, "HMMA", False),
}
DTYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
# Triton makes constants of arguments that are one.
SINGLE = "rows", "columns", "M", "N"


def run_cases(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout, result.stdout
    if "TRITON_INTERPRET" in environment:
        assert "skipped" not in result.stdout, result.stdout


def not_interpreted() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_cases(os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_the_gpu() -> None:
    pytest.importorskip("triton")
    run_cases(not_interpreted())


@pytest.mark.parametrize("architecture", [86, 90, 100])
def test_fits_and_uses_the_matrix_units(architecture: int) -> None:
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-W", "error", __file__, str(architecture)],
        env=not_interpreted() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == len(list(variants())) + 2
    limit, instruction, fp32_on_matrix_units = ARCHITECTURES[architecture]
    for each in kernels:
        print(each)
        assert each["spilled_bytes"] == 0, each
        assert each["registers"] <= 255
        assert each["shared_bytes"] <= limit * 1024
        if each["dtype"] != "float32" or fp32_on_matrix_units:
            assert each["matrix_instructions"] == [instruction], each


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
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gradcache_clip.kernels.sigmoid_tile import sigmoid_kernel

    values = _launch(architecture, dtype, switches) | sizes
    names = sigmoid_kernel.arg_names
    constants = {name: value for name, value in values.items() if name in names}
    options = {name: value for name, value in values.items() if name not in names}
    types = {name: "constexpr" if name in constants else _type(name, dtype) for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name.endswith("_ptr") or name == "D"
    }
    by_index = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(sigmoid_kernel, types, by_index, aligned)
    compiled = triton_compile(source, GPUTarget("cuda", architecture, 32), options)
    usage, instructions = (
        _dump(option, compiled.asm["cubin"]) for option in ("-res-usage", "-sass")
    )
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    report = {
        "dtype": dtype,
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": sorted(set(re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", instructions))),
        "constants": constants,
    }
    print(json.dumps(report))


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


def _dump(option: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
