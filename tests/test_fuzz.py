"""Hostile files of every kind: none may crash, hang, take a gigabyte, or end in a traceback.

The files are read by a child process, which is started again if it dies. The cases are the same in
each run; `pytest -m fuzz --hypothesis-seed=7` looks for others.
"""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_cases import CASES
from hypothesis import HealthCheck, given, settings

pytestmark = pytest.mark.fuzz

LIMIT_S = 20
START_S = 120
CHILD = Path(__file__).with_name("fuzz_child.py")


class Child:
    """A process that reads hostile files, with the counts of its answers."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.most_bytes = 0
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, kind: str, content: bytes) -> str:
        """What became of a case."""
        process = self._process or self._started()
        assert process.stdin is not None
        process.stdin.write(struct.pack("<II", len(kind), len(content)))
        process.stdin.write(kind.encode() + content)
        process.stdin.flush()
        found = self._answer(LIMIT_S)
        self.counts[kind, found.partition(":")[0]] += 1
        return found

    def measure(self) -> None:
        """Note the most memory that the process has ever held."""
        number = self._process.pid if self._process else 0
        if (status := Path(f"/proc/{number}/status")).exists():
            (line,) = (each for each in status.read_text().splitlines() if "VmHWM" in each)
            self.most_bytes = max(self.most_bytes, 1024 * int(line.split()[1]))

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(CHILD.parent), str(CHILD.parent.parent), *sys.path])
        self._process = subprocess.Popen(
            [sys.executable, str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        assert self._answer(START_S) == "ready"
        return self._process

    def _answer(self, limit_s: float) -> str:
        try:
            (size,) = struct.unpack("<I", self._read(4, limit_s))
            return self._read(size, limit_s).decode()
        except TimeoutError:
            self.close()
            return f"hang: no answer within {limit_s} s"
        except EOFError:
            assert self._process is not None
            status = self._process.wait()
            self.close()
            return f"crash: status {status}"

    def _read(self, size: int, limit_s: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        found = b""
        while len(found) < size:
            if not select.select([self._process.stdout], [], [], limit_s)[0]:
                raise TimeoutError
            if not (data := self._process.stdout.read(size - len(found))):
                raise EOFError
            found += data
        return found


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.close()


def campaign(child: Child, **options: Any) -> Callable[[], None]:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(deadline=None, database=None, suppress_health_check=checks, **options)
    @given(case=CASES)
    def run(case: tuple[str, bytes]) -> None:
        found = child.ask(*case)
        assert found == "accepted" or found.startswith("refused: "), found

    return run


def lines(child: Child) -> list[str]:
    """The counts of a campaign, by kind."""
    counts = child.counts
    rows = [
        f"{kind:<14}{counts[kind, 'accepted']:>10,}{counts[kind, 'refused']:>10,}"
        for kind in sorted({kind for kind, _ in counts})
    ]
    head = f"{'':<14}{'accepted':>10}{'refused':>10}"
    total = f"{sum(counts.values()):,} cases"
    return [head, *rows, f"{total}, at most {child.most_bytes / 2**30:.2f} GiB with all libraries"]


@pytest.mark.parametrize("cases", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_hostile_files_are_read_or_refused(
    child: Child, request: pytest.FixtureRequest, record_property: Any, cases: int
) -> None:
    seed = request.config.getoption("--hypothesis-seed")
    child.counts.clear()
    try:
        campaign(child, max_examples=cases, derandomize=seed is None)()
    finally:
        child.measure()
        record_property("fuzz", lines(child))
    assert sum(child.counts.values()) >= cases
