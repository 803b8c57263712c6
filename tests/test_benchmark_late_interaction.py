"""The late-interaction benchmark: its contestants agree, and its table tells who could not run."""

from __future__ import annotations

from pathlib import Path

import late_interaction
import pytest
from contestant_process import measure_point, measure_times
from late_interaction import Row, TokenLoss
from results import write_rows

TASK = TokenLoss("short", "fp32", "cpu", shortest=2, longest=9)
NAMES = "MaxSimLoss", "MaxSimLoss, packed", "plain PyTorch"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_whole_matrix(name: str):
    found = measure_point(TASK, name, 5, with_errors=True)
    assert found["memory"] >= 0
    assert found["errors"][""]["error"] < 1e-5
    assert found["errors"][""]["factor"] == pytest.approx(1, abs=1e-5)


def test_contestants_take_turns():
    steps = measure_times(TASK, NAMES, 5, rounds=2, seconds=60.0, products=1)["steps"]
    assert {name: len(each) for name, each in steps.items()} == dict.fromkeys(NAMES, 2)


def test_what_failed_is_told(tmp_path: Path):
    head = "ColBERT", 32
    rows = [
        Row(*head, "MaxSimLoss", "2.0", "measured", 2**24, 250.0, 1.0, 1e-7, 1.0),
        Row(*head, "PyLate CachedContrastive", "1.6.0", "measured", 2**26, 725.0, 2.9, 1e-7, 8.0),
        Row(*head, "late-interaction-kernels maxsim", "", "not installed"),
    ]
    write_rows(Row, rows, tmp_path / "late_interaction.csv")
    page = late_interaction.section(tmp_path)
    assert "| MaxSimLoss | 16 MiB | 250 | 1.00 | 1 |" in page
    assert "| PyLate CachedContrastive 1.6.0 | 64 MiB | 725 | 2.90 | 8 |" in page
    assert "| late-interaction-kernels maxsim | not installed |" in page
