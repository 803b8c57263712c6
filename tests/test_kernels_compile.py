"""The kernels as machine code for every architecture of the table, compiled without a GPU.

Compilation happens in a process of its own, where TRITON_INTERPRET is not set. With -s each test
prints its part of the table of `python benchmarks/kernel_resources.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "kernel_resources.py"
# Where three passes of tf32 are faster than fp32 on the ordinary cores.
TF32_PAYS = (80, 90, 100)
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


def measured(architecture: int) -> list[dict[str, Any]]:
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), "--architecture", str(architecture), "--json"],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("architecture", sorted(TENSOR_CORES))
def test_fits_and_uses_the_matrix_units(architecture: int) -> None:
    pytest.importorskip("triton")
    kernels = measured(architecture)
    dtypes = {"bfloat16", "float16", "float32"}
    compiled = {(each["case"]["dtype"], each["case"]["kernel"]) for each in kernels}
    expected = {(dtype, kernel) for dtype in dtypes for kernel in ("statistics", "gradient")}
    assert compiled == {*expected, ("float32", "merge")}
    for each in kernels:
        case = each["case"]
        print(case, {name: value for name, value in each.items() if name != "case"})
        on_tensor_cores = case["dtype"] != "float32" or architecture in TF32_PAYS
        if on_tensor_cores and case["kernel"] != "merge":
            assert each["matrix_instructions"] == [TENSOR_CORES[architecture]]
        assert each["spilled_bytes"] == 0
        assert each["registers"] <= 255
        assert each["shared_bytes"] <= each["shared_limit_bytes"]
        assert each["blocks_per_multiprocessor"] >= 1
