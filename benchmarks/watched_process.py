"""A command with its output in a file, that ends together with all it started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

_LOOK_EVERY_S = 0.5
_PATIENCE_S = 10.0


def run_watched(
    command: Sequence[str], log: Path, checkout: Path, watch: Callable[[], object]
) -> int:
    """Run to the end and return the exit status; `watch` is called twice a second.

    The command imports what lies in `checkout`, whatever else is installed. If `watch` or a signal
    raises here (Ctrl-C), the command and all processes that it started are ended first.

    Args:
        log: file for what it prints, errors included; overwritten.
    """
    paths = [str(checkout), os.environ.get("PYTHONPATH", "")]
    # A table cut off on the right would be lost.
    environment = os.environ | {
        "COLUMNS": "160",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    # A shell starts what runs in the background deaf to interrupts, and its children with it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=checkout,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            while not _has_ended(process, _LOOK_EVERY_S):
                watch()
        finally:
            _end(process)
    return process.returncode


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole session to stop, then insist."""
    if process.poll() is None:
        _signal(process, signal.SIGINT)
        _has_ended(process, _PATIENCE_S)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _has_ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.poll() is not None
