"""The memory benchmark end to end at toy size, and the discipline of its fresh processes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT / "benchmarks"))

from fresh_process import (  # noqa: E402
    Limits,
    Outcome,
    call_in_fresh_process,
    interleaved_times_ms,
    provenance,
)
from memory_plot import draw, finding  # noqa: E402
from memory_rows import Row, bytes_text, read_rows, write_rows  # noqa: E402

_GIB = 2**30


def add(arguments: dict[str, Any]) -> dict[str, Any]:
    print("libraries may print before the result")
    return {"sum": arguments["a"] + arguments["b"], "process": os.getpid()}


def allocate(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"bytes": len(bytearray(arguments["bytes"]))}


def sleep(arguments: dict[str, Any]) -> dict[str, Any]:
    time.sleep(arguments["seconds"])
    return {}


def fail(_: dict[str, Any]) -> dict[str, Any]:
    raise KeyError("no such encoder")


def _rows() -> list[Row]:
    rows = []
    for batch_size in (64, 128, 256):
        counted = batch_size * _GIB // 64
        plain = Row("plain", batch_size, batch_size, "two encoders", 2 * _GIB, counted)
        rows.append(replace(plain, status="measured" if counted <= 2 * _GIB else "over cap"))
        cached = Row("cached", batch_size, 64, "two encoders", 2 * _GIB, 700 * 2**20)
        rows.append(replace(cached, status="measured", peak_growth_bytes=_GIB, step_ms=20.5))
    return rows


def test_a_fresh_process_returns_what_the_function_returned():
    outcome = call_in_fresh_process(add, {"a": 2, "b": 3})
    assert outcome.failure == ""
    assert outcome.values["sum"] == 5
    assert outcome.values["process"] != os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux alone")
def test_more_memory_than_allowed_is_an_outcome_and_less_is_none():
    limits = Limits(data_bytes=_GIB // 4)
    assert call_in_fresh_process(allocate, {"bytes": _GIB}, limits).failure == "out of memory"
    assert call_in_fresh_process(allocate, {"bytes": 2**20}, limits).values == {"bytes": 2**20}


def test_too_long_a_step_is_an_outcome():
    assert call_in_fresh_process(sleep, {"seconds": 60}, Limits(seconds=1)).failure == "timed out"


def test_any_other_failure_shows_its_traceback():
    with pytest.raises(RuntimeError, match="no such encoder"):
        call_in_fresh_process(fail, {})


def test_steps_take_turns_and_the_warm_up_is_dropped():
    order: list[str] = []
    rounds = interleaved_times_ms([lambda: order.append("a"), lambda: order.append("b")], 2, 60)
    assert order == ["a", "b"] * 3
    assert len(rounds) == 2 and all(len(durations) == 2 for durations in rounds)
    assert len(interleaved_times_ms([lambda: time.sleep(0.02)], 5, 0.01)) == 1


def test_rows_survive_the_csv(tmp_path):
    path = tmp_path / "rows.csv"
    write_rows(_rows(), provenance(), path)
    assert read_rows(path) == _rows()
    with path.open(newline="") as file:
        first = next(csv.DictReader(file))
    assert all(first[name] for name in ("machine", "torch", "commit", "date"))
    assert first["step_ms"] == "", "what was not measured is empty, not zero"


def test_redrawing_without_a_csv_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="run without --redraw"):
        read_rows(tmp_path / "rows.csv")


def test_the_picture_says_the_finding_and_marks_what_does_not_fit(tmp_path):
    assert "At batch 256 the tensors of plain training take 4.00 GiB" in finding(_rows())
    assert "gradient caching 700 MiB" in finding(_rows())
    png, svg = draw(_rows(), tmp_path / "picture")
    assert png.read_bytes().startswith(b"\x89PNG") and svg.read_text().startswith("<?xml")
    fitting = [replace(row, cap_bytes=64 * _GIB, status="measured") for row in _rows()]
    _, without = draw(fitting, tmp_path / "fitting")
    assert "Crosses" in svg.read_text() and "Crosses" not in without.read_text()


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 MiB"), (2**20, "1 MiB"), (1.5 * _GIB, "1.50 GiB"), (200 * _GIB, "200 GiB")],
)
def test_bytes_read_with_three_figures(nbytes, text):
    assert bytes_text(nbytes) == text


def test_every_point_gets_a_row_whether_it_ran_or_not(tmp_path, monkeypatch):
    import memory_vs_batch

    def outcome(function: Any, point: dict[str, Any], limits: Limits) -> Outcome:
        if function.__name__ == "measure_pair":
            return Outcome({"cached_over_plain_time": 1.25})
        if (point["method"], point["batch_size"]) == ("plain", 32):
            return Outcome(failure="out of memory")
        return Outcome({"peak_growth_bytes": 2**20, "step_ms": 1.5, "steps": 2})

    monkeypatch.setattr(memory_vs_batch, "call_in_fresh_process", outcome)
    options = "--size mlp --smallest 8 --plain-up-to 32 --largest 100 --chunk-size 16 --cap-gib 0.1"
    memory_vs_batch.main([*options.split(), "--results", str(tmp_path)])
    rows = read_rows(tmp_path / "memory_vs_batch.csv")
    plain, cached = ([row for row in rows if row.method == m] for m in ("plain", "cached"))
    assert [row.batch_size for row in plain] == [8, 16, 32, 64]
    assert [row.status for row in plain] == ["measured", "measured", "out of memory", "not run"]
    assert [row.status for row in cached] == ["measured"] * 4
    assert [row.chunk_size for row in cached] == [8, 16, 16, 16]
    assert [row.cached_over_plain_time for row in cached] == [1.25, 1.25, 0, 0]
    memory_vs_batch.main([*options.split(), "--cap-gib", "0.001", "--results", str(tmp_path)])
    assert {row.status for row in read_rows(tmp_path / "memory_vs_batch.csv")} == {"over cap"}


@pytest.mark.slow
def test_the_script_writes_table_csv_and_pictures(tmp_path):
    options = "--size mlp --smallest 8 --largest 8 --chunk-size 4 --steps 1 --threads 1"
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "COLUMNS": "120",
    }
    script = str(_ROOT / "benchmarks" / "memory_vs_batch.py")
    done = subprocess.run(
        [sys.executable, script, *options.split(), "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "two MLPs" in done.stdout and str(tmp_path / "memory_vs_batch.png") in done.stdout
    assert (tmp_path / "memory_vs_batch.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "memory_vs_batch.svg").stat().st_size > 1000
    plain, cached = read_rows(tmp_path / "memory_vs_batch.csv")
    assert (plain.method, cached.method) == ("plain", "cached")
    for row in (plain, cached):
        assert row.status == "measured"
        assert row.counted_bytes > 0 and row.peak_growth_bytes > 0 and row.step_ms > 0
    assert cached.cached_over_plain_time > 0
