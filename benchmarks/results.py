"""Results of benchmarks: rows in CSV, records in JSON, where they come from, Markdown of them."""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK = ROOT / "runs" / "benchmarks-quick"
"""Results of quick runs, which no page shows."""
FOLDER = "../benchmarks/results"
"""The same, seen from a page in docs."""
UNMEASURED = "(not measured yet)"
"""Stands in a page until its results are there."""
_LIBRARIES = ("torch", "triton", "timm", "transformers")
_WIDTH = 100
_TERMINAL = 150
AnyRow = TypeVar("AnyRow")


def parser(doc: str) -> argparse.ArgumentParser:
    """A command line with the module's docstring as its help, and --results."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    return made


# Rows and records


def write_rows(
    kind: type[AnyRow], rows: Iterable[AnyRow], path: Path, origin: Mapping[str, str] | None = None
) -> Path:
    """Write a CSV of dataclasses; values equal to their default were not measured, stay empty.

    Args:
        origin: further columns of every line; by default, the field `origin` of each row.
    """
    lines = [_line(row, origin) for row in rows]
    own = [each.name for each in fields(kind) if each.name != "origin"]
    return write_csv(lines, path, [*own, *(origin or {})])


def write_csv(lines: Sequence[Mapping[str, Any]], path: Path, first: Sequence[str] = ()) -> Path:
    """Write lines as they are, under all of their names, some of which come first."""
    names = dict.fromkeys([*first, *(name for line in lines for name in line)])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return path


def append_row(row: object, path: Path, origin: Mapping[str, str]) -> None:
    """Add one line to a CSV; the first one writes the header."""
    line = _line(row, origin)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(line), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(line)


def read_rows(kind: type[AnyRow], path: Path) -> list[AnyRow]:
    """The rows of a CSV as dataclasses; columns that are no fields go to `origin`, if it is one.

    Raises:
        FileNotFoundError: nothing was measured yet.
    """
    types = get_type_hints(kind)
    with_origin = "origin" in types
    rows = []
    for line in read_csv(path):
        known = {name: text for name, text in line.items() if name in types}
        values: dict[str, Any] = {
            name: _parsed(types[name], text)
            for name, text in known.items()
            if text or types[name] is str
        }
        if with_origin:
            values["origin"] = {name: line[name] for name in line if name not in known}
        rows.append(kind(**values))
    return rows


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV as they are; raises as `read_rows`."""
    with _existing(path).open(newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises as `read_rows`."""
    return json.loads(_existing(path).read_text())


def write_json(record: Mapping[str, Any], path: Path, indent: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=indent) + "\n")


def _line(row: object, origin: Mapping[str, str] | None) -> dict[str, Any]:
    values = asdict(row)  # type: ignore[call-overload]
    own = values.pop("origin", {})
    defaults = {each.name: each.default for each in fields(row)}  # type: ignore[arg-type]
    shown = {
        name: "" if value != value or value == defaults[name] else value
        for name, value in values.items()
    }
    return {**shown, **(own if origin is None else origin)}


def _parsed(kind: Any, text: str) -> Any:
    return text == "True" if kind is bool else kind(text)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: expected the results of a benchmark, got none; run without --redraw "
            "(`python benchmarks/run_all.py --list` says which benchmark writes them)"
        )
    return path


# Where results come from


def provenance() -> dict[str, str]:
    """Columns for every row of a result: machine, versions, commit and date (UTC)."""
    return {
        "machine": f"{_processor()}, {os.cpu_count()} threads, {_memory_gib():.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "timm", "transformers")},
        "commit": _commit(),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
    }


def installed(distribution: str) -> str:
    """Its version; empty if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def available_bytes() -> int:
    """Physical memory that could be used now without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


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
    return "; ".join(filter(None, [machine, ", ".join(versions), measured_words(rows)]))


def measured_words(rows: Sequence[Mapping[str, str]]) -> str:
    """Commit and date of results, all that occur."""
    return f"commit {_values(rows, 'commit')}, {_values(rows, 'date')}"


def _values(rows: Sequence[Mapping[str, str]], name: str) -> str:
    return " and ".join(dict.fromkeys(row[name] for row in rows if row.get(name)))


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _memory_gib() -> float:
    import psutil

    return psutil.virtual_memory().total / 2**30


def _commit() -> str:
    """Short hash of the checkout; a "+" marks changes not committed, other than of results."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# Markdown


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
    return "\n".join([_cells(head), f"|{ruler}", *map(_cells, rows)])


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def paragraph(text: str) -> str:
    """The text in lines of at most 100 characters."""
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def bold(text: str) -> str:
    """Example:
    >>> bold("1.00"), bold("")
    ('**1.00**', '')
    """
    return f"**{text}**" if text else ""


def power(error: float) -> str:
    """Example:
    >>> power(2.3e-7), power(0.0)
    ('2e-07', '0')
    """
    return f"{error:.0e}" if error else "0"


def bytes_text(nbytes: float) -> str:
    """Three figures with a binary unit, such as 2.50 TiB, 1.31 GiB or 348 MiB."""
    if nbytes >= 1000 * 2**30:
        return f"{nbytes / 2**40:#.3g} TiB".replace(". ", " ")
    if nbytes >= 1000 * 2**20:
        return f"{nbytes / 2**30:#.3g} GiB".replace(". ", " ")
    return f"{nbytes / 2**20:.0f} MiB"


def show(text: str) -> None:
    """Print Markdown in a terminal, but for its pictures; no cell is cut off."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(width=max(Console().width, _TERMINAL))
    text = "\n".join(line for line in text.splitlines() if not line.startswith("!["))
    for is_table, group in groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        lines = list(group)
        console.print(_drawn(*lines) if is_table else Markdown("\n".join(lines)))


def _drawn(head: str, ruler: str, *rows: str) -> Any:
    """A Markdown table as rich draws it."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    def cells(line: str) -> list[Text]:
        plain = line[2:-2].replace("**", "").replace("`", "").split(" | ")
        return [Text(cell.replace("\\|", "|")) for cell in plain]

    drawn = Table(box=SIMPLE)
    for title, side in zip(cells(head), ruler.strip("|").split("|"), strict=True):
        drawn.add_column(title, justify="right" if side == "--:" else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*cells(row))
    return drawn
