"""What all benchmarks share: rows and their CSV, Markdown, places of labels."""

from __future__ import annotations

import csv
import doctest
import math
from dataclasses import dataclass, field
from itertools import pairwise

import plots
import pytest
import results
from hypothesis import given
from hypothesis import strategies as st
from plots import Label, label_ends, picture, spread
from results import (
    append_row,
    bytes_text,
    origin_words,
    provenance,
    read_rows,
    table,
    write_rows,
)

_GIB = 2**30


@dataclass(frozen=True)
class Row:
    name: str
    count: int
    error: float = math.nan
    nbytes: int = 0
    is_large: bool = False
    origin: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plain:
    name: str
    share: float


def test_rows_survive_the_csv_with_what_was_not_measured_empty(tmp_path):
    path, where = tmp_path / "new" / "rows.csv", {"commit": "abc"}
    rows = [Row('a "b", c', 1, 0.5, 7, True, where), Row("", 2, origin={"commit": "def"})]
    write_rows(Row, rows, path)
    first, second = read_rows(Row, path)
    assert first == rows[0] and second.origin == {"commit": "def"}
    assert math.isnan(second.error) and (second.name, second.nbytes) == ("", 0)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["name", "count", "error", "nbytes", "is_large", "commit"]
    assert [lines[1][name] for name in ("error", "nbytes", "is_large")] == ["", "", ""]


def test_one_origin_for_all_rows_and_a_heading_without_any(tmp_path):
    path = tmp_path / "rows.csv"
    write_rows(Plain, [Plain("a", 0.0)], path, {"commit": "abc"})
    assert path.read_text() == "name,share,commit\na,0.0,abc\n"
    assert read_rows(Plain, path) == [Plain("a", 0.0)]
    write_rows(Plain, [], path, {"commit": "abc"})
    assert path.read_text() == "name,share,commit\n" and read_rows(Plain, path) == []


def test_a_row_is_added_below_the_others(tmp_path):
    path = tmp_path / "rows.csv"
    for share in (0.25, 0.5):
        append_row(Plain("a", share), path, {"commit": f"c{share}"})
    assert path.read_text() == "name,share,commit\na,0.25,c0.25\na,0.5,c0.5\n"


def test_missing_results_are_named_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.csv: expected .* run without --redraw"):
        read_rows(Plain, tmp_path / "no.csv")


def test_results_say_where_they_are_from():
    assert {"machine", "system", "python", "torch", "commit", "date"} <= set(provenance())
    one = {"machine": "a machine", "torch": "2.6", "commit": "abc", "date": "2026-01-01"}
    both = [one, {**one, "commit": "def"}]
    assert origin_words(both) == "a machine; torch 2.6; commit abc and def, 2026-01-01"


def test_tables_escape_bars():
    assert table(["a"], [["x | y"]]).splitlines()[-1] == "| x \\| y |"


def test_a_terminal_shows_whole_cells_and_no_pictures(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "a-name-of-thirty-characters-0123456789"
    rows = [[f"**{name}**", "x | y", "1"], ["", "b", ""]] * 2
    columns = ["first", *["a column with a long title"] * 5]
    text = table(columns, [[*row, *["a long text in a cell"] * 3] for row in rows])
    results.show(f"## Title\n\n![picture](a.png)\n\n{text}\n\nA sentence.")
    shown = capsys.readouterr().out
    assert "Title" in shown and "A sentence." in shown and "picture" not in shown
    assert "x | y" in shown and "…" not in shown and "**" not in shown


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        *((0, "0 MiB"), (2**20, "1 MiB"), (1.5 * _GIB, "1.50 GiB"), (200 * _GIB, "200 GiB")),
        *((2560 * _GIB, "2.50 TiB"), (999 * 2**20, "999 MiB")),
    ],
)
def test_bytes_read_with_three_figures(nbytes, text):
    assert bytes_text(nbytes) == text


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.2))
def test_labels_keep_their_order_and_their_distance(wanted: list[float], gap: float):
    got = spread(wanted, gap)
    assert all(b - a >= gap * (1 - 1e-6) for a, b in pairwise(sorted(got)))
    assert [place for _, place in sorted(zip(wanted, got, strict=True))] == sorted(got)
    if all(b - a >= gap for a, b in pairwise(sorted(wanted))):
        assert got == pytest.approx(wanted)


def test_labels_stand_beside_their_ends_and_apart(tmp_path):
    with picture(tmp_path / "drawn", (4, 3)) as figure:
        axes = figure.add_axes((0.1, 0.1, 0.6, 0.8))
        axes.set(xlim=(0, 1), ylim=(0, 1))
        label_ends(axes, [Label("low", 1, 0.5, "red"), Label("high", 1, 0.5, "blue")], gap=0.2)
        low, high = axes.texts
    assert low.xyann == pytest.approx((1.015, 0.4)) and high.xyann == pytest.approx((1.015, 0.6))
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "drawn.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("module", [plots, results])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
