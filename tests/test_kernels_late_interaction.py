"""Runs late_interaction_kernel_cases.py, and compiles the kernels for every architecture.

The cases run in Triton's interpreter, and on the GPU where there is one. Each process is its own:
Triton reads TRITON_INTERPRET when it is first imported. `python test_kernels_late_interaction.py
90` compiles for one architecture and prints what the machine code uses.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_processes import check_fits, printed, run_cases

CASES = "late_interaction_kernel_cases.py"
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
    assert len(kernels) == sum(len(cases) + 2 for cases in CASES_OF.values())
    for each in kernels:
        check_fits(each, architecture, multiplies=each["kernel"] == "maxima")


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
    from machine_code import compile_kernel

    machine = compile_kernel(kernel, architecture, values, lambda name: _type(name, dtype))
    name = "maxima" if "WITH_INDEX" in values else "gradient"
    print(json.dumps({"kernel": name, "dtype": dtype, **asdict(machine), "values": values}))


def _type(name: str, dtype: str) -> str:
    if name in ("x_ptr", "y_ptr", "gradient_ptr"):
        return {"bfloat16": "*bf16", "float32": "*fp32"}[dtype]
    if name.endswith("index_ptr"):
        return "*i32"
    return "*fp32" if name.endswith("_ptr") else "i32"


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
