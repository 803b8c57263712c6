"""The kernels as machine code for every architecture of the table, compiled without a GPU.

Compilation happens in a process of its own, where TRITON_INTERPRET is not set. With -s each test
prints its part of the table of `python benchmarks/kernel_resources.py`.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from kernel_processes import TENSOR_CORES, TF32_PAYS, printed

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kernel_resources.py"
TILE_KERNELS = ("statistics", "gradient")


def measured(architecture: int, dtypes: list[str], variants: list[str]) -> list[dict[str, Any]]:
    options = ["--architecture", str(architecture), "--dtype", *dtypes, "--variant", *variants]
    (kernels,) = printed(SCRIPT, "--json", *options)
    return kernels


def compiled(kernels: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    cases = (each["case"] for each in kernels)
    return {(case["dtype"], case["variant"], case["kernel"]) for case in cases}


def check(each: dict[str, Any]) -> None:
    case = each["case"]
    print(case, {name: value for name, value in each.items() if name != "case"})
    on_tensor_cores = case["dtype"] != "float32" or case["architecture"] in TF32_PAYS
    if on_tensor_cores and case["kernel"] != "merge":
        assert each["matrix_instructions"] == [TENSOR_CORES[case["architecture"]]], case
    assert each["spilled_bytes"] == 0, case
    assert each["registers"] <= 255, case
    assert each["shared_bytes"] <= each["shared_limit_bytes"], case
    assert each["blocks_per_multiprocessor"] >= 1, case


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(each, marks=[] if each in (80, 90) else pytest.mark.slow)
        for each in sorted(TENSOR_CORES)
    ],
)
def test_the_plain_contrast_fits_and_uses_the_matrix_units(architecture: int) -> None:
    pytest.importorskip("triton")
    dtypes = ["bfloat16", "float16", "float32"]
    kernels = measured(architecture, dtypes, ["plain"])
    expected = {(dtype, "plain", kernel) for dtype in dtypes for kernel in TILE_KERNELS}
    assert compiled(kernels) == {*expected, ("float32", "plain", "merge")}
    for each in kernels:
        check(each)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [86, 90])
def test_the_costliest_variants_fit_and_use_the_matrix_units(architecture: int) -> None:
    """Least shared memory, and least registers a thread; `kernel_resources.py` prints all.

    Machine code of bf16 and fp16 differs in one conversion, so one stands for both.
    """
    pytest.importorskip("triton")
    dtypes, variants = ["bfloat16", "float32"], ["labels", "labels, ids", "ids, thresholds"]
    kernels = measured(architecture, dtypes, variants)
    tiles = set(product(dtypes, variants, TILE_KERNELS))
    assert compiled(kernels) == {*tiles, ("float32", "labels", "merge")}
    for each in kernels:
        check(each)
