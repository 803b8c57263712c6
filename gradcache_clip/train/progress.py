"""Progress bar of a run, and a Ctrl-C that loses nothing."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

SAME_INTERRUPT_S = 1.0


def peak_memory_bytes(device: torch.device) -> int:
    """Return peak memory so far: allocated tensors on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB.
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


class TrainingBar:
    """Bar with loss, pairs/s, memory and time left; plain lines if stderr is not a terminal."""

    def __init__(self, steps: int, done: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._steps = steps
        self._task: TaskID = self._progress.add_task(
            "train", total=steps, completed=done, figures=""
        )

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self) -> None:
        self._progress.advance(self._task)

    def show(self, row: dict[str, float]) -> None:
        """Show a log row: loss, accuracy, pairs_per_s and peak_memory_bytes."""
        figures = (
            f"loss {row['loss']:.3f}  accuracy {row['accuracy']:.1%}  "
            f"{row['pairs_per_s']:,.0f} pairs/s  {row['peak_memory_bytes'] / 2**30:.2f} GiB"
        )
        self._progress.update(self._task, figures=figures)
        if not self.console.is_terminal:
            self.console.print(f"step {row['step']:.0f}/{self._steps}  {figures}", highlight=False)


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; the loop ends after the current step."""

    def __init__(self) -> None:
        self.requested = False
        self.interrupted = math.inf

    def __bool__(self) -> bool:
        return self.requested


@contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request to stop; a later SIGINT interrupts at once.

    A SIGINT within a second of the first is the same Ctrl-C, forwarded by a launcher.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        # Python allows signal handlers in the main thread only.
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and time.monotonic() - stop.interrupted > SAME_INTERRUPT_S:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            stop.interrupted = min(stop.interrupted, time.monotonic())
        stop.requested = True

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
