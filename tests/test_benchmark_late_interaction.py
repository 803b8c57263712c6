"""The late-interaction benchmark: its contestants agree, and its table tells who could not run."""

from __future__ import annotations

from pathlib import Path

import late_interaction
import pytest
from late_interaction import Row, measure_point, measure_times
from results import write_rows

SHAPE = {"queries": 5, "shortest": 2, "longest": 9}
NAMES = "MaxSimLoss", "MaxSimLoss, packed", "plain PyTorch"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_whole_matrix(name: str):
    found = measure_point({"shape": SHAPE, "name": name})
    assert found["error"] < 1e-5
    assert found["factor"] == pytest.approx(1, abs=1e-5)


def test_contestants_take_turns():
    given = {"shape": SHAPE, "names": [*NAMES], "rounds": 2, "seconds": 60.0}
    assert [len(each) for each in measure_times(given)["rounds"]] == [3, 3]


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
