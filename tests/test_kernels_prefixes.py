"""Runs prefix_kernel_cases.py in Triton's interpreter, and on the GPU where there is one; compiles
the kernels for several architectures, which needs no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_processes import check_fits, printed, run_cases

CASES = "prefix_kernel_cases.py"
RESOURCES = Path(__file__).with_name("prefix_kernel_resources.py")


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
    kernels = printed(RESOURCES, str(architecture))
    assert len(kernels) == 2 * 2 * 2
    for each in kernels:
        check_fits(each, architecture)
