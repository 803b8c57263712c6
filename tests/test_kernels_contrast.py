"""Runs contrast_kernel_cases.py: in Triton's interpreter, and on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from kernel_processes import run_cases

CASES = "contrast_kernel_cases.py"


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_cases(CASES, interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_the_gpu() -> None:
    pytest.importorskip("triton")
    run_cases(CASES, interpreted=False)
