"""Kernels in processes of their own, because Triton reads TRITON_INTERPRET when first imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Shared memory of a block in KiB, and the matrix instruction.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
# Where three passes of tf32 are faster than fp32 on the ordinary cores.
TF32_PAYS = (80, 90, 100)


def run_cases(name: str, *, interpreted: bool) -> None:
    """Run a file of cases with pytest, in the interpreter or on the GPU; every one must pass."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpreted:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout, result.stdout
    # On a GPU a case may say that only the interpreter has what it tests.
    assert not interpreted or "skipped" not in result.stdout, result.stdout


def printed(script: Path, *arguments: str) -> list[Any]:
    """The JSON lines that a script prints in a process where kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "error", str(script), *arguments],
        env=environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def check_fits(each: dict[str, Any], architecture: int, *, multiplies: bool = True) -> None:
    """No spills, within the limits and, if it multiplies matrices, on the matrix units."""
    print(each)
    assert each["spilled_bytes"] == 0, each
    assert each["registers"] <= 255, each
    assert each["shared_bytes"] <= SHARED_KIB[architecture] * 1024, each
    if multiplies and (each["dtype"] != "float32" or architecture in TF32_PAYS):
        assert each["matrix_instructions"] == [TENSOR_CORES[architecture]], each
