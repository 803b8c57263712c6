from __future__ import annotations

import csv
import json
import os
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_card
import gpu_losses
import gpu_plan
import gpu_suite
import pytest
import torch
import tune_kernels
from plain_gpu_machine import absent, hide_others
from rich.console import Console

from gradcache_clip.kernels.launch_config import LaunchConfig

ROOT = Path(__file__).resolve().parents[1]
FILES = ("gpu_smoke.csv", "gpu_losses.csv", "gpu_engine.csv", "gpu_plan.csv", "tune_kernels.csv")


def test_all_sections_fit_in_eight_minutes() -> None:
    sections = gpu_suite.sections(Path("results"))
    assert sum(section.limit_s for section in sections) <= gpu_suite.LIMIT_S < 480


def test_sections_run_files_that_exist() -> None:
    for section in gpu_suite.sections(Path("results")):
        files = [word for word in section.command if word.endswith(".py")]
        assert files
        for file in files:
            assert (ROOT / file).exists(), file
    tests = gpu_suite.sections(Path("results"))[-1]
    assert sum("kernel_cases" in word for word in tests.command) >= 4


def test_a_section_that_fails_or_hangs_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    hangs = "import time\ntry: time.sleep(60)\nfinally: print('ended in here', flush=True)"
    sections = [
        gpu_suite.Section("fails", (sys.executable, "-c", "print('said'); exit(3)"), 60),
        gpu_suite.Section("hangs", (sys.executable, "-c", hangs), 3),
        gpu_suite.Section("passes", (sys.executable, "-c", "print('done')"), 60),
    ]
    folder = tmp_path / "gpu"
    done = gpu_suite.run_all(sections, folder, Console(quiet=True))
    assert [each.outcome for each in done] == ["exit 3", "ended after 3 s", "passed"]
    record = json.loads((folder / "gpu_suite.json").read_text())
    assert [each["name"] for each in record["sections"]] == ["fails", "hangs", "passes"]
    assert record["origin"]["torch"]
    assert (folder / "logs" / "fails.log").read_text() == "said\n"
    hung = (folder / "logs" / "hangs.log").read_text()
    assert "ended in here" in hung and "KeyboardInterrupt" in hung
    with tarfile.open(tmp_path / "gpu.tar.gz") as packed:
        assert {"gpu/gpu_suite.json", "gpu/logs/hangs.log"} <= set(packed.getnames())


def test_results_so_far_are_packed_while_a_section_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_suite, "_ARCHIVE_EVERY_S", 0.5)
    folder = tmp_path / "gpu"
    writes = f"open({str(folder / 'rows.csv')!r}, 'w').write('1'); import time; time.sleep(2.5)"
    section = gpu_suite.Section("slow", (sys.executable, "-c", writes), 60)
    gpu_suite.run(section, 60, folder)
    with tarfile.open(tmp_path / "gpu.tar.gz") as packed:
        assert "gpu/rows.csv" in packed.getnames()


def test_an_unknown_section_is_named() -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(["--only", "nothing"])


@dataclass(frozen=True)
class Row:
    name: str
    status: str = ""
    value: float = 0.0


def point(measure: Callable[[], dict[str, Any]]) -> gpu_card.Point:
    return gpu_card.Point(Row("a"), measure)


def raising(error: Exception) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        raise error

    return measure


def test_a_point_that_does_not_fit_or_fails_says_so(capsys) -> None:
    card = gpu_card.StandIn()
    assert gpu_card.measured(point(lambda: {"value": 2.0}), card) == Row("a", "measured", 2.0)
    full = gpu_card.measured(point(raising(torch.OutOfMemoryError("full"))), card)
    assert full.status == "out of memory"
    failed = gpu_card.measured(point(raising(ValueError("first line\nsecond"))), card)
    assert failed.status == "ValueError: first line"
    assert "Traceback" in capsys.readouterr().err


def test_an_illegal_access_ends_the_section() -> None:
    """Everything that this process asks of the GPU later on would fail as well."""
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu_card.measured(point(raising(broken)), gpu_card.StandIn())


@pytest.mark.parametrize(("milliseconds", "calls"), [(1.0, 2 + 7 * 5), (20.0, 2 + 7), (2000.0, 2)])
def test_short_steps_run_several_times_a_round_and_long_ones_once(
    milliseconds: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu_card.time, "perf_counter", lambda: now[0])
    made = []

    def step() -> None:
        made.append(1)
        now[0] += milliseconds / 1e3

    assert gpu_card.StandIn().time_ms(step) == pytest.approx(milliseconds)
    assert len(made) == calls


def test_the_page_shows_rates_and_what_did_not_fit(tmp_path: Path) -> None:
    rows = [
        gpu_losses.Timed(*("matrix product",) * 2, "", "bf16", 64, 8, "measured", 1.0, 700.0),
        gpu_losses.Timed("clip", "ours", "1", "bf16", 64, 8, "measured", 2.0, 600.0, 3 * 2**20),
        gpu_losses.Timed("clip", "plain loss", "1", "bf16", 64, 8, "out of memory"),
    ]
    gpu_card.append_row(rows[0], tmp_path / gpu_losses.FILE, {})
    for row in rows[1:]:
        gpu_card.append_row(row, tmp_path / gpu_losses.FILE, {})
    page = gpu_losses.page(tmp_path)
    assert "| matrix product | 1, 700 |" in page
    assert "| ours | 2, 600, 3 MiB |" in page and "| plain loss | out of memory |" in page


def test_candidates_start_with_the_entry_and_differ_from_it_in_one_choice_then_in_two() -> None:
    entry = LaunchConfig(128, 128, 64, 8, 3)
    first, *others = tune_kernels.candidates(entry)
    assert first == entry and len(others) == len(set(others)) > 100
    counts = []
    for other in others:
        names = ("BLOCK_D", "num_warps", "num_stages", "max_registers", "GROUP_M")
        changed = sum(getattr(other, n) != getattr(entry, n) for n in (*names, "workspace_bytes"))
        counts.append(changed + ((other.BLOCK_M, other.BLOCK_N) != (entry.BLOCK_M, entry.BLOCK_N)))
    assert counts == sorted(counts) and {*counts} == {1, 2}


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs the modules of all distributions")
def test_hidden_packages_include_what_such_a_machine_lacks() -> None:
    modules, distributions = absent()
    assert {"webdataset", "omegaconf", "deepspeed", "open_clip", "datasets"} <= modules
    assert not {"torch", "timm", "transformers", "rich", "pytest", "gradcache_clip"} & modules
    assert {"deepspeed", "open-clip-torch"} <= distributions


@pytest.mark.slow
def test_a_failure_in_each_section_loses_that_point_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the packages of a plain machine."""
    hidden = hide_others(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", f"{hidden}{os.pathsep}{ROOT}")
    assert gpu_suite.main(["--stand-in", "failing", "--results", str(tmp_path)]) == 1
    record = json.loads((tmp_path / "gpu" / "gpu_suite.json").read_text())
    # Tuning has done its work where some configuration ran.
    outcomes = {each["name"]: each["outcome"] for each in record["sections"]}
    assert outcomes.pop("tune") == "passed"
    assert all(outcome.startswith("exit") for outcome in outcomes.values()), outcomes
    for name in FILES:
        first, second, *others = lines(tmp_path / "gpu" / name)
        assert first["status"] == "measured" and "asked to fail here" in second["status"]
        assert others and all(row["status"] == "measured" for row in others), name
        section = "tune" if name.startswith("tune") else name[4:-4]
        log = (tmp_path / "gpu" / "logs" / f"{section}.log").read_text()
        assert "Traceback" in log
    steps = lines(tmp_path / "gpu" / gpu_plan.STEPS)
    assert {row["method"] for row in steps} == {"plain", "checkpointed", "cached"}
    assert "| cached, chunks of 16 | 64 |" in gpu_plan.page(tmp_path / "gpu")
    with tarfile.open(tmp_path / "gpu.tar.gz") as packed:
        assert {f"gpu/{name}" for name in FILES} <= set(packed.getnames())
