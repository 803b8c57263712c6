"""Runs the cases of the kernels, and compiles the kernels for every architecture.

The cases (FAMILY_kernel_cases.py) run in Triton's interpreter, and on the GPU where there is one.
They have a process of their own: Triton reads TRITON_INTERPRET when it is first imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).parent
FAMILIES = "contrast", "late_interaction", "prefix", "siglip"
# That the cases may compile on a GPU; new sizes, widths and addresses need none.
MOST_KERNELS = 150
# Shared memory of a block in KiB, and the matrix instruction.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
# Where three passes of tf32 are faster than fp32 on the ordinary cores.
TF32_PAYS = (80, 90, 100)


def run(*command: str, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    places = HERE.parent, HERE.parent / "benchmarks", HERE
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, places))}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment | variables,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def interpreted(*families: str) -> str:
    """Run these cases in one process, which imports once and patches Triton's language once."""
    files = [str(HERE / f"{family}_kernel_cases.py") for family in families]
    plugins = "-p", "no:cacheprovider", "-p", "kernel_keys", "-p", "fast_interpreter"
    variables = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    printed = run("-m", "pytest", *files, "-q", *plugins, **variables)
    assert " passed" in printed and "skipped" not in printed, printed
    return printed


def test_in_the_interpreter() -> None:
    printed = interpreted(*FAMILIES, "sizes")
    compiled = int(printed.split("compiled kernels: ")[1].split()[0])
    assert compiled <= MOST_KERNELS, "each is a compilation on the GPU"


@pytest.mark.slow
def test_whole_tiles_in_the_interpreter() -> None:
    interpreted("steady")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("family", [*FAMILIES, "steady"])
def test_on_the_gpu(family: str) -> None:
    """A case may say that only the interpreter has what it tests."""
    file = str(HERE / f"{family}_kernel_cases.py")
    printed = run("-m", "pytest", file, "-q", "-p", "no:cacheprovider")
    assert " passed" in printed, printed


def check_all_fit(architecture: int, which: str) -> Counter[str]:
    """Within the limits and, if it multiplies matrices, on the matrix units."""
    printed = run("-W", "error", str(HERE / "compiled_kernels.py"), str(architecture), which)
    kernels: list[dict[str, Any]] = [json.loads(line) for line in printed.splitlines()]
    for each in kernels:
        # Triton 3.7, that of torch 2.13, stores two registers of two kernels, outside their loops.
        assert each["spilled_bytes"] <= 8 and each["narrow_stores"] == 0, each
        assert each["registers"] <= 255, each
        # What losses of two sides launch loads rows and columns through descriptors.
        described = (
            architecture in (90, 100) and each["dtype"] != "float32" and each.get("described")
        )
        assert each["descriptor_loads"] == (2 if described else 0), each
        assert each["shared_bytes"] <= SHARED_KIB[architecture] * 1024, each
        assert each.get("blocks_per_multiprocessor", 1) >= 1, each
        if each["multiplies"] and (each["dtype"] != "float32" or architecture in TF32_PAYS):
            assert each["matrix_instructions"] == [TENSOR_CORES[architecture]], each
    return Counter(each["family"] for each in kernels)


def test_some_kernels_fit_and_use_the_matrix_units() -> None:
    found = check_all_fit(90, "few")
    assert found == {"contrast": 5, "prefix": 2, "siglip": 2, "tokens": 2}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [86, 90])
def test_all_kernels_fit_and_use_the_matrix_units(architecture: int) -> None:
    found = check_all_fit(architecture, "all")
    assert found == {"contrast": 9, "prefix": 4, "siglip": 14, "tokens": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "kernels"),
    [
        (80, {"contrast": 9}),
        (89, {"contrast": 9}),
        (100, {"contrast": 11}),
        (120, {"contrast": 9, "tokens": 1}),
    ],
)
def test_plain_contrasts_fit_and_use_the_matrix_units(
    architecture: int, kernels: dict[str, int]
) -> None:
    assert check_all_fit(architecture, "contrast") == kernels


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [86, 90])
def test_the_costliest_contrasts_fit_and_use_the_matrix_units(architecture: int) -> None:
    assert check_all_fit(architecture, "variants") == {"contrast": 2 * (2 + 2 + 4) + 1}
