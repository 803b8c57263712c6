from __future__ import annotations

import json
import sys
from pathlib import Path

import gpu_suite
import pytest
import tune_kernels
from rich.console import Console

from gradcache_clip.kernels.launch_config import LaunchConfig

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_all_sections_fit_in_eight_minutes() -> None:
    sections = gpu_suite.sections(Path("results"))
    assert sum(section.limit_s for section in sections) <= gpu_suite.LIMIT_S < 480


def test_sections_run_files_that_exist() -> None:
    for section in gpu_suite.sections(Path("results")):
        files = [word for word in section.command if word.endswith(".py")]
        assert files
        for file in files:
            assert (BENCHMARKS.parent / file).exists(), file
    tests = gpu_suite.sections(Path("results"))[0]
    assert sum("kernel_cases" in word for word in tests.command) >= 4


def test_a_section_that_fails_or_hangs_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    sections = [
        gpu_suite.Section("fails", (sys.executable, "-c", "print('said'); exit(3)"), 60),
        gpu_suite.Section("hangs", (sys.executable, "-c", "import time; time.sleep(60)"), 0.5),
        gpu_suite.Section("passes", (sys.executable, "-c", "print('done')"), 60),
    ]
    done = gpu_suite.run_all(sections, tmp_path, Console(quiet=True))
    assert [each.outcome for each in done] == ["exit 3", "ended after 0 s", "passed"]
    record = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert [each["name"] for each in record["sections"]] == ["fails", "hangs", "passes"]
    assert "said" in record["sections"][0]["output"] and record["origin"]["torch"]


def test_an_unknown_section_is_named() -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(["--only", "nothing"])


def test_candidates_start_with_the_entry_and_differ_from_it_in_one_choice() -> None:
    entry = LaunchConfig(128, 128, 64, 8, 3)
    first, *others = tune_kernels.candidates(entry)
    assert first == entry and len(others) == len(set(others)) >= 10
    for other in others:
        names = ("BLOCK_D", "num_warps", "num_stages", "GROUP_M")
        changed = sum(getattr(other, name) != getattr(entry, name) for name in names)
        tile = (other.BLOCK_M, other.BLOCK_N) != (entry.BLOCK_M, entry.BLOCK_N)
        assert changed + tile == 1
