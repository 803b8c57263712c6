"""Runs late_interaction_kernel_cases.py, and compiles the kernels for every architecture.

The cases run in Triton's interpreter, and on the GPU where there is one. Each process is its own:
Triton reads TRITON_INTERPRET when it is first imported. `python test_kernels_late_interaction.py
90` compiles for one architecture and prints what the machine code uses.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
CASES = Path(__file__).with_name("late_interaction_kernel_cases.py")
# Shared memory of a block in KiB, and the matrix instruction; fp32 only where tf32 pays.
ARCHITECTURES = {
    80: (163, "HMMA", True),
    86: (99, "HMMA", False),
    89: (99, "HMMA", False),
    90: (227, "HGMMA", True),
    100: (227, "UTCHMMA", True),
    120: (99, "HMMA", False),
}
SIZES = "images", "texts", "P", "R"
# Pieces of image and of text tokens, with winners, and sizes of one, which Triton makes constants.
CASES_OF = {
    "bfloat16": [
        (64, 32, False, False),
        (64, 32, True, False),
        (16, 16, True, False),
        (128, 128, True, False),
        (16, 16, True, True),
    ],
    "float32": [(64, 32, True, False), (16, 16, True, False)],
}


def run_cases(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout


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
    assert len(kernels) == sum(len(cases) + 2 for cases in CASES_OF.values())
    limit, instruction, fp32_on_matrix_units = ARCHITECTURES[architecture]
    for each in kernels:
        print(each)
        assert each["spilled_bytes"] == 0, each
        assert each["registers"] <= 255
        assert each["shared_bytes"] <= limit * 1024
        if each["kernel"] == "maxima" and (each["dtype"] != "float32" or fp32_on_matrix_units):
            assert each["matrix_instructions"] == [instruction], each


def compile_all(architecture: int) -> None:
    """Print one JSON line for each kernel."""
    from gradcache_clip.kernels import late_interaction as module
    from gradcache_clip.kernels.launch_config import launch_options, table_entry

    for dtype, cases in CASES_OF.items():
        config = table_entry(architecture, getattr(torch, dtype))
        for block_p, block_r, with_index, single in cases:
            tile = module.tile_config(config, with_index=with_index)
            constants = launch_options(tile) | {"BOTH_WAYS": True, "WITH_INDEX": with_index}
            constants["BLOCK_P"] = module.piece_length(block_p, config.BLOCK_M)
            constants["BLOCK_R"] = module.piece_length(block_r, config.BLOCK_N)
            constants |= dict.fromkeys(SIZES, 1) if single else {}
            _report(module._token_maxima_kernel, architecture, dtype, constants)
        for single in (False, True):
            constants = {"BOTH_WAYS": True, "GRADIENT_SCALE": 1.0}
            constants |= {"BLOCK_M": module._WRITE_M, "BLOCK_N": module._WRITE_N}
            constants |= dict.fromkeys(SIZES, 1) if single else {}
            _report(module._token_gradient_kernel, architecture, dtype, constants)


def _report(kernel: Any, architecture: int, dtype: str, values: dict[str, Any]) -> None:
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {name: value for name, value in values.items() if name in names}
    options = {name: value for name, value in values.items() if name not in names}
    types = {name: "constexpr" if name in constants else _type(name, dtype) for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name.endswith("_ptr") or name == "D"
    }
    by_index = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, by_index, aligned)
    options.setdefault("enable_fp_fusion", True)
    compiled = triton_compile(source, GPUTarget("cuda", architecture, 32), options)
    usage, instructions = (
        _dump(option, compiled.asm["cubin"]) for option in ("-res-usage", "-sass")
    )
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    found = set(re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", instructions))
    report = {
        "kernel": "maxima" if "WITH_INDEX" in constants else "gradient",
        "dtype": dtype,
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": sorted(found),
        "constants": constants,
    }
    print(json.dumps(report))


def _type(name: str, dtype: str) -> str:
    if name in ("x_ptr", "y_ptr", "gradient_ptr"):
        return {"bfloat16": "*bf16", "float32": "*fp32"}[dtype]
    if name.endswith("index_ptr"):
        return "*i32"
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
