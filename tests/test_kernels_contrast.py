"""Runs contrast_kernel_cases.py: in Triton's interpreter, and on the GPU where there is one.

Each runs in its own process. Triton reads TRITON_INTERPRET when it is first imported, and another
test of this process may have imported it, or need it, the other way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("contrast_kernel_cases.py")


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
