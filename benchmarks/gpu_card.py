"""The GPU that gpu_suite.py measures on, a CPU that stands in for it, and how results are kept."""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from results import append_row, parser, provenance

MEASURED, OUT_OF_MEMORY = "measured", "out of memory"
LEAST_MS = 5.0
"""Shorter steps are repeated until they took this long: clocks and launches blur them."""
MOST_MS = 1500.0
_ROUNDS = 7
_FAILING_POINT = 2


class Card:
    """The first GPU.

    Attributes:
        impl: implementation of the losses that is measured.
        architecture: 80 for compute capability 8.0.
        small: whether sizes shrink to what a CPU does in seconds.
    """

    impl = "triton"
    small = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.properties = torch.cuda.get_device_properties(self.device)
        self.name: str = self.properties.name
        self.architecture: int = 10 * self.properties.major + self.properties.minor
        self.memory_bytes: int = self.properties.total_memory
        # Twice the L2: whatever a step finds there is gone.
        self._flush = torch.empty(2 * self.properties.L2_cache_size, dtype=torch.uint8).to(
            self.device
        )

    def origin(self) -> dict[str, str]:
        """Columns of every row: where it was measured."""
        return {"gpu": self.name, "cuda": str(torch.version.cuda), **provenance()}

    def time_ms(self, step: Callable[[], object], rounds: int = _ROUNDS) -> float:
        """Median time of a step with a cold L2, after two steps that compile and warm up.

        A step under `LEAST_MS` runs several times a round, one after the other; one over
        `MOST_MS` is not timed again.
        """
        for _ in range(2):
            first = self._round_ms(step, 1)
        if first > MOST_MS:
            return first
        calls = max(1, round(LEAST_MS / max(first, 1e-3)))
        return median(self._round_ms(step, calls) / calls for _ in range(rounds))

    def _round_ms(self, step: Callable[[], object], calls: int) -> float:
        self._flush.zero_()
        begin, end = self._event(), self._event()
        begin.record()
        for _ in range(calls):
            step()
        end.record()
        self._synchronize()
        return begin.elapsed_time(end)

    def peak_bytes(self, step: Callable[[], object]) -> int:
        """How far live tensors rise above what is there before the step."""
        self.release()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        self._synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def release(self) -> None:
        """Return unused memory, so that one point does not take it from the next."""
        gc.collect()
        torch.cuda.empty_cache()

    def _event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def _synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


class Event(Protocol):
    """A mark in the stream of a device."""

    def record(self) -> None: ...

    def elapsed_time(self, end: Any) -> float: ...


class StandIn(Card):
    """The CPU in place of a GPU: the same path through every section, at sizes of seconds."""

    impl = "tiled"
    small = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.name, self.architecture = "stand-in: CPU", 80
        self.memory_bytes = 2**30
        self._flush = torch.empty(2**20, dtype=torch.uint8)

    def peak_bytes(self, step: Callable[[], object]) -> int:
        from gradcache_clip.memory import LiveBytes

        with LiveBytes() as live:
            step()
        return live.peak_bytes

    def release(self) -> None:
        gc.collect()

    def _event(self) -> Event:
        return _Clock()

    def _synchronize(self) -> None:
        pass


class _Clock:
    """Stands in for a CUDA event: a CPU has done what was asked before it returns."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: _Clock) -> float:
        return 1e3 * (end.seconds - self.seconds)


# A section: points that are measured one by one


@dataclass(frozen=True)
class Point:
    """A row without its values, and the call that returns them by name.

    Attributes:
        row: a dataclass with a field `status`.
    """

    row: Any
    measure: Callable[[], dict[str, Any]]


def section(
    doc: str | None,
    file: str,
    points: Callable[[Card, Path], Iterable[Point]],
    arguments: Sequence[str] | None,
    *,
    may_fail: bool = False,
) -> int:
    """Measure the points of a section until its seconds are up; the exit status of its command.

    Each row is in the file as soon as it is measured. A point that fails is a row that says so.

    Args:
        file: name of the CSV in the folder of results.
        points: from the card and the folder of results.
        may_fail: whether the section has done its work if one of them was measured.
    """
    options = _options(doc, arguments)
    if not (options.stand_in or torch.cuda.is_available()):
        print(f"{file}: expected an NVIDIA GPU, got none that this torch can see")
        return 2
    card = StandIn() if options.stand_in else Card()
    end, statuses = time.monotonic() + options.seconds, list[str]()
    options.results.mkdir(parents=True, exist_ok=True)
    for number, point in enumerate(points(card, options.results), 1):
        if time.monotonic() > end:
            print(f"{options.seconds:.0f} seconds are up; further points were left out")
            break
        if options.stand_in == "failing" and number == _FAILING_POINT:
            point = replace(point, measure=_fail)
        if number == 1:
            # What is imported by now is garbage for none of the collections between points.
            gc.freeze()
        row = measured(point, card)
        append_row(row, options.results / file, card.origin())
        print(_line(row), flush=True)
        statuses.append(row.status)
    enough = any if may_fail else all
    return int(not enough(status in (MEASURED, OUT_OF_MEMORY) for status in statuses))


def measured(point: Point, card: Card) -> Any:
    """The row with its values; without them, if the point does not fit or fails."""
    try:
        return replace(point.row, status=MEASURED, **point.measure())
    except torch.OutOfMemoryError:
        return replace(point.row, status=OUT_OF_MEMORY)
    except Exception as error:
        traceback.print_exc()
        if _is_lasting(error):
            raise
        said = str(error).strip().splitlines()[:1]
        return replace(point.row, status=": ".join([type(error).__name__, *said])[:200])
    finally:
        card.release()


def _is_lasting(error: Exception) -> bool:
    """After an illegal access, whatever this process asks of the GPU fails."""
    return "CUDA error" in str(error)


def _line(row: Any) -> str:
    """What differs from a field's default, with four figures."""
    values = [(each.default, getattr(row, each.name)) for each in fields(row)]
    shown = (value for default, value in values if value != default)
    return ", ".join(f"{v:,.4g}" if isinstance(v, float) else str(v) for v in shown)


def _fail() -> dict[str, Any]:
    raise RuntimeError("the stand-in was asked to fail here")


def _options(doc: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser(doc or "")
    made.add_argument("--seconds", type=float, default=120.0, help="for all points (120)")
    stand_in = {"nargs": "?", "const": "whole", "choices": ("whole", "failing")}
    text = "run on the CPU at small sizes; with `failing`, the second point of each section fails"
    made.add_argument("--stand-in", help=text, **stand_in)
    return made.parse_args(arguments)


def unit_rows(card: Card, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows of length one, made on the card, that require a gradient."""
    made = torch.randn(rows, width, device=card.device)
    return torch.nn.functional.normalize(made, dim=1).to(dtype).requires_grad_()
