"""Rooms, files and lines of the code, and how many files a step passes through.

    python benchmarks/code_size.py                    # this checkout
    python benchmarks/code_size.py --against c3e3e84  # beside a commit

1. rooms: files and lines of Python, and files over 320 lines.
2. step: functions, files, calls and changes of file within the package, in one cached step of two
   linear layers over 64 pairs in chunks of 16. The second step is counted: the first looks closer.
3. commands: seconds until `--help` is printed, the median of five.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from results import show, table

ROOT = Path(__file__).parent.parent
LONGEST = 320
HELPS = ("--help", "plan --help")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", metavar="COMMIT", help="count this commit beside the checkout")
    options = parser.parse_args(arguments)
    sides = {"now": measure(ROOT)}
    if options.against:
        with checkout(options.against) as folder:
            sides = {options.against: measure(folder), **sides}
    for title, rows in tables(sides).items():
        show(f"{title}\n\n{table(['', *sides], rows)}\n")


def measure(folder: Path) -> dict[str, Any]:
    """Everything about one checkout."""
    return {
        "rooms": rooms(folder),
        "step": json.loads(_run(folder, "-c", _STEP)),
        "seconds": {command: _seconds(folder, command) for command in HELPS},
    }


def rooms(folder: Path) -> dict[str, list[int]]:
    """Room -> lines of each of its files."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if (
            path.is_symlink()
            or parts[0].startswith(".")
            or parts[:2] == ("gradcache_clip", "kernels")
        ):
            continue
        room = "/".join(parts[:2]) if parts[0] == "gradcache_clip" and len(parts) > 2 else parts[0]
        found.setdefault(room, []).append(path.read_text().count("\n"))
    return found


def tables(sides: dict[str, dict[str, Any]]) -> dict[str, list[list[str]]]:
    """The rows of each table, one column per side."""
    names = sorted({room for side in sides.values() for room in side["rooms"]})
    of_rooms = [
        [name, *(_size(side["rooms"].get(name, [])) for side in sides.values())] for name in names
    ]
    keys = next(iter(sides.values()))["step"]
    of_step = [[key, *(f"{side['step'][key]:,}" for side in sides.values())] for key in keys]
    of_commands = [
        [
            f"gradcache-clip {command}",
            *(f"{side['seconds'][command]:.2f} s" for side in sides.values()),
        ]
        for command in HELPS
    ]
    return {
        "Rooms: lines in files (too long)": of_rooms,
        "One step": of_step,
        "Commands": of_commands,
    }


def _size(lines: Sequence[int]) -> str:
    long = sum(count > LONGEST for count in lines)
    return f"{sum(lines):,} in {len(lines)}" + (f" ({long})" if long else "")


# Runs in a process of its own, in either checkout.
_STEP = """
import json, sys, torch
from collections import Counter
from gradcache_clip import ClipLoss, GradCache
cache = GradCache((torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)), ClipLoss(), chunk_size=16)
inputs = torch.randn(64, 8), torch.randn(64, 6)
cache(*inputs)
calls, changes, last = Counter(), 0, None
def watch(frame, event, _):
    global changes, last
    file = frame.f_code.co_filename
    if event == "call" and "gradcache_clip" in file:
        calls[file, frame.f_code.co_name, frame.f_code.co_firstlineno] += 1
        changes, last = changes + (file != last), file
sys.setprofile(watch)
cache(*inputs)
sys.setprofile(None)
print(json.dumps({"files": len({file for file, *_ in calls}), "functions": len(calls),
                  "calls": sum(calls.values()), "changes of file": changes}))
"""


def _run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout


def _seconds(folder: Path, command: str) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _run(folder, "-m", "gradcache_clip.cli", *command.split())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """The files of a commit, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", commit], cwd=ROOT, check=True, capture_output=True
        ).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        yield Path(folder)


if __name__ == "__main__":
    main()
