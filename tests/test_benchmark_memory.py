"""Memory against the batch size: what is run, taken over, written and drawn."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import memory_steps
import memory_vs_batch
import pytest
from fresh_process import Limits, Outcome
from memory_steps import METHODS, SIZES, count_pair_flops, count_step, step_flops
from memory_vs_batch import Row, draw, find_earlier, finding
from results import provenance, read_rows, write_rows

_ROOT = Path(__file__).resolve().parent.parent

_GIB, _MLP = 2**30, SIZES["mlp"]


_OPTIONS = "--size mlp --smallest 8 --largest 100 --chunk-size 16 --cap-gib 0.1"


def _rows() -> list[Row]:
    rows, origin = [], {**provenance(), "settings": "3 steps", "code": "abc"}
    for batch in (64, 128, 256, 512):
        counted = batch * _GIB // 64
        base = Row("plain", batch, batch, "two encoders", 4 * _GIB, counted, 50 * 2**20)
        base = replace(base, origin=origin)
        status = "measured" if batch < 256 else "not run: would take about 7 minutes"
        measured = {"peak_growth_bytes": counted + 2**20, "step_ms": 100.25, "steps": 3}
        if batch > 256:
            status = "over cap"
        rows.append(replace(base, status=status, **(measured if status == "measured" else {})))
        cached = replace(base, method="cached", chunk_size=64, counted_bytes=700 * 2**20)
        cached = replace(cached, status="measured", peak_growth_bytes=_GIB, step_ms=20.5, steps=3)
        rows.append(replace(cached, cached_over_plain_time=1.25 if batch == 64 else 0.0))
    return rows


def test_redrawing_without_a_csv_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="run without --redraw"):
        memory_vs_batch.main(["--redraw", "--results", str(tmp_path)])


def test_a_measured_point_is_found_again_unless_something_that_counts_changed():
    earlier = _rows()
    wanted = replace(earlier[0], status="", peak_growth_bytes=0, cap_bytes=1, counted_bytes=1)
    assert find_earlier(wanted, earlier) == earlier[0]
    later = {**wanted.origin, "date": "2030-01-01", "commit": "fff+"}
    assert find_earlier(replace(wanted, origin=later), earlier) == earlier[0]
    for name in ("code", "settings", "torch", "machine"):
        changed = {**wanted.origin, name: "another"}
        assert find_earlier(replace(wanted, origin=changed), earlier) is None
    for change in ({"batch_size": 65}, {"chunk_size": 2}, {"encoders": "x"}, {"method": "other"}):
        assert find_earlier(replace(wanted, **change), earlier) is None
    assert find_earlier(replace(earlier[4], status=""), earlier) is None, "it was not run"


def test_the_tables_say_what_was_measured_and_what_was_not(tmp_path, capsys):
    write_rows(Row, _rows(), tmp_path / "memory_vs_batch.csv")
    memory_vs_batch.main(["--redraw", "--results", str(tmp_path)])
    text = capsys.readouterr().out
    assert "1.00 GiB" in text and "over cap; 8.00 GiB counted" in text
    assert "0.10" in text and "0.02" in text and "1.25" in text
    assert "plain step, 256: not run: would take about 7 minutes\n" in text
    assert "plain step, 512: over cap\n" in text and "gradcache-clip, 64" not in text


def test_the_picture_says_the_finding_and_what_its_marks_mean(tmp_path):
    assert "Batch 512 takes 1.00 GiB with gradcache-clip" in finding(_rows())
    assert "a plain step would take 8.00 GiB" in finding(_rows())
    assert finding([row for row in _rows() if row.method == "cached"]) == "Batch 512 takes 1.00 GiB"
    png, svg = draw(_rows(), tmp_path / "picture")
    assert png.read_bytes().startswith(b"\x89PNG") and svg.read_text().startswith("<?xml")
    assert "Hollow cross" in svg.read_text() and "Hollow circle" in svg.read_text()
    measured = [replace(row, status="measured", peak_growth_bytes=2**30) for row in _rows()]
    _, without = draw(measured, tmp_path / "measured")
    assert "Hollow" not in without.read_text()
    (tmp_path / "other").mkdir()
    again = draw(_rows(), tmp_path / "other" / "picture")[1]
    assert again.read_text() == svg.read_text(), "the same rows give the same file"


def test_points_that_did_not_run_are_hollow_marks_at_their_counted_bytes():
    from matplotlib.figure import Figure
    from memory_vs_batch import _draw_method

    axes = Figure().add_subplot()
    _draw_method(axes, [row for row in _rows() if row.method == "plain"])
    line, measured, too_large, not_run = axes.lines
    assert list(line.get_ydata()) == [batch * _GIB // 64 for batch in (64, 128, 256, 512)]
    assert list(measured.get_ydata()) == [_GIB + 2**20, 2 * _GIB + 2**20]
    assert (list(too_large.get_xdata()), too_large.get_marker()) == ([512], "X")
    assert (list(not_run.get_xdata()), list(not_run.get_ydata())) == ([256], [4 * _GIB])
    faces = [each.get_markerfacecolor() for each in (measured, too_large, not_run)]
    assert faces[0] == line.get_color() and faces[1:] == ["white", "white"]


def test_examples_in_docstrings():
    found = doctest.testmod(memory_steps)
    assert found.attempted and not found.failed


class _Machine:
    """Stands for the fresh processes: what they would return, and which were asked for."""

    def __init__(self, failures: dict[tuple[str, int], str] | None = None) -> None:
        self.failures, self.asked = failures or {}, list[tuple[str, int]]()
        self.step_ms, self.ends_at = 1.5, None

    def __call__(self, function: Any, point: dict[str, Any], limits: Limits) -> Outcome:
        if function.__name__ == "measure_pair":
            return Outcome({"cached_over_plain_time": 1.25})
        key = point["method"], point["batch_size"]
        if key == self.ends_at:
            raise KeyboardInterrupt
        self.asked.append(key)
        if key in self.failures:
            return Outcome(failure=self.failures[key])
        return Outcome({"peak_growth_bytes": 2**20, "step_ms": self.step_ms, "steps": 2})


@cache
def _counted(method: str, batch_size: int, chunk_size: int) -> Any:
    return count_step(method, _MLP, batch_size, chunk_size)


def _count(method: str, size: Any, batch_size: int, chunk_size: int) -> Any:
    assert size is _MLP
    return _counted(method, batch_size, chunk_size)


@pytest.fixture
def machine(monkeypatch):
    """The plan alone: nothing is measured or drawn; each point is counted once for all tests."""
    found = _Machine()
    monkeypatch.setattr(memory_vs_batch, "call_in_fresh_process", found)
    monkeypatch.setattr(
        memory_vs_batch, "count_step", lambda name, _, *point: _counted(name, *point)
    )
    monkeypatch.setattr(memory_vs_batch, "draw", lambda rows, stem: [])
    return found


def _run(tmp_path: Path, *more: str) -> dict[str, list[Row]]:
    memory_vs_batch.main([*_OPTIONS.split(), *more, "--results", str(tmp_path)])
    rows = read_rows(Row, tmp_path / "memory_vs_batch.csv")
    return {name: [row for row in rows if row.method == name] for name in METHODS}


def test_every_point_gets_a_row_whether_it_ran_or_not(tmp_path, machine):
    machine.failures = {("plain", 32): "out of memory", ("published", 64): "timed out"}
    rows = _run(tmp_path)
    assert {tuple(row.batch_size for row in each) for each in rows.values()} == {(8, 16, 32, 64)}
    told = [row.status for row in rows["plain"]]
    assert told == [*["measured"] * 2, "out of memory", "not run: batch 32 out of memory"]
    assert [row.status for row in rows["published"]] == [*["measured"] * 3, "timed out"]
    assert [row.status for row in rows["cached"]] == ["measured"] * 4
    assert [row.chunk_size for row in rows["accumulated"]] == [8, 16, 16, 16]
    assert [row.chunk_size for row in rows["checkpointed"]] == [8, 16, 32, 64]
    assert [row.cached_over_plain_time for row in rows["cached"]] == [1.25, 1.25, 0, 0]


def test_a_step_over_the_cap_or_the_budget_is_not_run(tmp_path, machine):
    rows = _run(tmp_path / "cap", "--cap-gib", "0.001")
    assert {row.status for each in rows.values() for row in each} == {"over cap"}
    assert machine.asked == []
    machine.step_ms = 3 * 60e3
    rows = _run(tmp_path / "budget", "--minutes", "20", "--plain-up-to", "16")
    pair = count_pair_flops(_MLP)
    minutes = 3 * step_flops("cached", 64, 16, pair) / step_flops("cached", 32, 16, pair)
    assert minutes < 20 and rows["cached"][-1].measured
    assert rows["plain"][2].status == "not run: above --plain-up-to 16"
    rows = _run(tmp_path / "short", "--cached-minutes", "5")
    minutes = 3 * step_flops("cached", 64, 16, pair) / step_flops("cached", 8, 8, pair)
    assert rows["cached"][-1].status == f"not run: would take about {minutes:.0f} minutes"
    assert rows["cached"][-1].counted_bytes > 0


def test_a_run_goes_on_where_an_interrupted_one_ended(tmp_path, machine):
    machine.ends_at = "cached", 16
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path)
    first = list(machine.asked)
    assert len(first) == 2 * len(METHODS) - 1
    machine.ends_at, machine.asked = None, []
    machine.step_ms = 2.5
    rows = _run(tmp_path)
    assert len(machine.asked) == 4 * len(METHODS) - len(first)
    assert not set(first) & set(machine.asked)
    assert [row.step_ms for row in rows["cached"]] == [1.5, 2.5, 2.5, 2.5]
    machine.asked = []
    _run(tmp_path, "--fresh")
    assert len(machine.asked) == 4 * len(METHODS)
    machine.asked = []
    _run(tmp_path, "--steps", "7")
    assert len(machine.asked) == 4 * len(METHODS), "other settings are other points"


def test_an_interrupted_second_run_keeps_what_the_first_one_measured(tmp_path, machine):
    _run(tmp_path)
    path = tmp_path / "memory_vs_batch.csv"
    missing = "plain", 16
    kept = [r for r in read_rows(Row, path) if (r.method, r.batch_size) != missing]
    write_rows(Row, kept, path)
    machine.ends_at, machine.asked = missing, []
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path)
    assert machine.asked == [] and len(read_rows(Row, path)) == 4 * len(METHODS) - 1
    machine.ends_at = None
    _run(tmp_path)
    assert machine.asked == [missing] and len(read_rows(Row, path)) == 4 * len(METHODS)


def test_methods_can_be_chosen(tmp_path, machine):
    rows = _run(tmp_path, "--methods", "plain", "cached", "--factor", "4")
    assert [row.batch_size for row in rows["cached"]] == [8, 32]
    assert not rows["published"] and {name for name, _ in machine.asked} == {"plain", "cached"}
    with pytest.raises(SystemExit):
        memory_vs_batch.main(["--methods", "unknown"])


@pytest.mark.slow
def test_the_script_writes_tables_csv_and_pictures(tmp_path):
    options = "--size mlp --smallest 8 --largest 8 --chunk-size 4 --steps 1 --threads 1"
    options += " --methods plain cached"
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
    rows = read_rows(Row, tmp_path / "memory_vs_batch.csv")
    assert [row.method for row in rows] == ["plain", "cached"]
    for row in rows:
        assert row.measured and row.step_ms > 0
        assert row.counted_bytes > row.floor_bytes > 0 and row.peak_growth_bytes > 0
    assert rows[-1].cached_over_plain_time > 0
