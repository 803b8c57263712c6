"""The log of a run: JSON lines and TensorBoard scalars, each step exactly once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gradcache_clip.train.atomic_file import naming, replacing
from gradcache_clip.train.report.event_file import EventFile

FILE_NAME = "metrics.jsonl"
_MOST_STEPS = 2**53
_MOST_BYTES = 2**30
Number = int | float | Tensor


class MetricsLog:
    """Appends to `folder/metrics.jsonl` and to TensorBoard events in `folder/tensorboard/`.

    A line reads {"step": 120, "loss": 3.1, "pairs_per_s": 5210.0} and is flushed at once. NaN and
    infinity, which JSON lacks, become null. Names end in their unit: _ms, _bytes, _per_s.

    Args:
        folder: the run's folder, created if missing.
        resume_step: step of the checkpoint that training resumes from. Later lines, and a last one
            that was cut off, are removed; TensorBoard hides its own.
        tensorboard: also write TensorBoard events.

    Raises:
        ValueError: an existing file holds lines that are not log entries.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     with MetricsLog(run, tensorboard=False) as log:
        ...         log.write(1, {"loss": 6.9})
        ...     read_log(run)
        [{'step': 1, 'loss': 6.9}]
    """

    def __init__(
        self, folder: str | Path, *, resume_step: int = 0, tensorboard: bool = True
    ) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        if path.exists():
            _cut_after(path, resume_step)
        self._path, self._file = path, path.open("a", encoding="utf-8")
        self._events = (
            EventFile(folder / "tensorboard", step=resume_step + 1) if tensorboard else None
        )

    def write(self, step: int, values: Mapping[str, Number]) -> None:
        """Log `values`, numbers or 0-dim tensors, under `step`."""
        numbers = {name: _number(name, value) for name, value in values.items()}
        row = {
            name: value if math.isfinite(value) else None
            for name, value in ({"step": step} | numbers).items()
        }
        with naming(self._path):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        if self._events is not None:
            self._events.add(step, numbers)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a log, oldest first, without a last line that was cut off.

    Args:
        path: the run's folder or its metrics.jsonl.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: a complete line is not an entry; the message names it.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(
            f"{path}: expected at most {_MOST_BYTES:,} bytes, got {path.stat().st_size:,}; move it "
            "away to go on with a new log"
        )
    lines = path.read_bytes().split(b"\n")
    # Text after the last line break was never completed, whether or not it parses.
    return [_row(path, number, line) for number, line in enumerate(lines[:-1], start=1)]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not _is_entry(row):
        raise ValueError(
            f"{path}, line {number}: expected a JSON object with a step and numbers, got "
            f"{line[:60]!r}; remove that line"
        )
    return row


def _is_entry(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    numbers = all(value is None or type(value) in (int, float) for value in row.values())
    return numbers and 0 <= row["step"] <= _MOST_STEPS


def _cut_after(path: Path, step: int) -> None:
    """Keep lines up to `step`. Renaming is atomic, so a kill leaves the old file or the new one."""
    rows = [row for row in read_log(path) if row["step"] <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _number(name: str, value: Number) -> int | float:
    number = value.item() if isinstance(value, Tensor) else value
    if not isinstance(number, int | float):
        raise ValueError(f"{name}: expected a number, got {value!r}; log texts elsewhere")
    return number
