"""What the generated texts are made of: rows of results, Markdown tables, where rows are from."""

from __future__ import annotations

import csv
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

UNMEASURED = "(not measured yet)"
"""What a block says until its results are there."""
_LIBRARIES = ("torch", "triton", "timm", "transformers")
_WIDTH = 100


def read_csv(results: Path, name: str) -> list[dict[str, str]]:
    """The lines of a CSV in the folder of results.

    Raises:
        FileNotFoundError: there is none; the message says what writes it.
    """
    with _existing(results, name).open(newline="") as file:
        return list(csv.DictReader(file))


def read_json(results: Path, name: str) -> dict[str, Any]:
    """A JSON object in the folder of results; raises as `read_csv`."""
    return json.loads(_existing(results, name).read_text())


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """A Markdown table.

    Args:
        align: "l" or "r" for each column; the first one left and the others right if empty.

    Example:
        >>> print(table(["loss", "memory"], [["CLIP", "49 MB"]]))
        | loss | memory |
        |:--|--:|
        | CLIP | 49 MB |
    """
    align = align or "l" + "r" * (len(head) - 1)
    ruler = "".join(":--|" if each == "l" else "--:|" for each in align)
    return "\n".join([_line(head), f"|{ruler}", *map(_line, rows)])


def paragraph(text: str) -> str:
    """The text in lines of at most 100 characters."""
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def bold(text: str) -> str:
    """Example:
    >>> bold("1.00"), bold("")
    ('**1.00**', '')
    """
    return f"**{text}**" if text else ""


def origin_words(rows: Iterable[Mapping[str, str]]) -> str:
    """Machine, versions, commit and date of results; where they differ, all that occur.

    Example:
        >>> row = {"machine": "a laptop", "torch": "2.6", "commit": "abc", "date": "today"}
        >>> origin_words([row])
        'a laptop; torch 2.6; commit abc, today'
    """
    rows = list(rows)
    machine = _values(rows, "gpu") or _values(rows, "machine")
    versions = [f"{name} {_values(rows, name)}" for name in _LIBRARIES if _values(rows, name)]
    if python := _values(rows, "python"):
        versions.insert(0, f"Python {python}")
    measured = f"commit {_values(rows, 'commit')}, {_values(rows, 'date')}"
    return "; ".join(filter(None, [machine, ", ".join(versions), measured]))


def _values(rows: Sequence[Mapping[str, str]], name: str) -> str:
    return " and ".join(dict.fromkeys(row[name] for row in rows if row.get(name)))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _existing(results: Path, name: str) -> Path:
    path = results / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: expected the results of a benchmark, found none; "
            "`python benchmarks/run_all.py --list` says which one writes it"
        )
    return path
