"""Runs prefix_kernel_cases.py: in Triton's interpreter, and on the GPU where there is one.

Each runs in its own process. Triton reads TRITON_INTERPRET when it is first imported, and another
test of this process may have imported it, or need it, the other way. So does the compilation for
every architecture, which needs no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("prefix_kernel_cases.py")
RESOURCES = Path(__file__).with_name("prefix_kernel_resources.py")
# Where three passes of tf32 are faster than fp32 on the ordinary cores.
TF32_PAYS = (80, 90, 100)
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


def run_cases(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        command, env=environment, cwd=CASES.parent.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_cases(os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_the_gpu() -> None:
    pytest.importorskip("triton")
    run_cases({name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"})


@pytest.mark.parametrize("architecture", [86, 90, 100])
def test_fits_and_uses_the_matrix_units(architecture: int) -> None:
    pytest.importorskip("triton")
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(RESOURCES), str(architecture)],
        env=environment | {"PYTHONPATH": str(CASES.parents[1])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert len(measured) == 2 * 2 * 2
    for each in measured:
        print(each)
        assert each["spilled_bytes"] == 0 and each["registers"] <= 255
        assert each["shared_bytes"] <= each["shared_limit_bytes"]
        if each["dtype"] != "float32" or architecture in TF32_PAYS:
            assert each["matrix_instructions"] == [TENSOR_CORES[architecture]]
