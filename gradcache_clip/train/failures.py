"""Tells the other processes of a run which one failed and what it was doing, so that all stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

BEAT_S = 0.5
"""Interval in seconds between heartbeats, and between checks for a failure elsewhere."""

SILENT_S = 3.0
"""A process whose heartbeat stops for this long while others wait for it counts as dead."""

ANSWER_S = 10.0
"""A rendezvous store that does not answer for this long counts as gone."""

GRACE_S = 15.0
"""A process stuck in a collective ends itself this long after a failure elsewhere."""

LAST_WORDS_S = 5.0
"""A failing process that receives SIGTERM has this long to report before it exits."""

_STATUS_OF_A_STUCK_PROCESS = 3
_STATUS_OF_SIGTERM = 128 + signal.SIGTERM
_FAILURE = "failure"

Answer = TypeVar("Answer")


class PeerFailure(RuntimeError):
    """Another process of the run failed; the message names it and what it was doing."""


class Terminated(KeyboardInterrupt):
    """This process received SIGTERM, as from a launcher after another process failed."""


class FailureChannel:
    """Shares the first failure and every process's phase through the rendezvous store.

    As a context manager, it reports an error that leaves the context, while a thread watches for
    reports of others: a process that waits in a collective for a failed one may never return.
    SIGTERM, which a launcher sends to the others after a failure, raises `Terminated` inside the
    context.

    Args:
        rank: of this process.
        world_size: number of processes.

    Raises:
        PeerFailure: on leaving the context with an error that another process caused.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.phase = "starting"
        self._rank = rank
        self._world_size = world_size
        self._store = _connect_to_store()
        self._beats = 0
        self._known_failure: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failures", daemon=True)

    def __enter__(self) -> FailureChannel:
        if self._store is not None:
            self._beat()
            self._thread.start()
        self._handler = _on_sigterm(_terminate)
        return self

    def set_phase(self, phase: str) -> None:
        """Set what this process is doing, and publish it in case the process is killed."""
        self.phase = phase
        self._beat()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        _on_sigterm(self._handler if error is None else _end_soon)
        try:
            if error is not None:
                self._report_error(error)
        finally:
            self._over.set()

    def _report_error(self, error: BaseException) -> None:
        """Report this process's own failure; raise PeerFailure if another process caused it."""
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Terminated):
            self._report(f"rank {self._rank} was interrupted while {self.phase}")
            return
        message = self._reported()
        if message is None and _comes_from_a_collective(error):
            message = self._cause_elsewhere() or _timed_out(error)
        what = f"rank {self._rank} {'failed' if message is None else 'stopped'} while {self.phase}"
        self._report(message or f"{what}: {type(error).__name__}: {_first_line(error)}")
        if message is not None:
            raise PeerFailure(f"{what}: {message}") from error
        error.__notes__ = [*getattr(error, "__notes__", []), what]  # type: ignore[attr-defined]

    def _cause_elsewhere(self) -> str | None:
        """Wait for another process's report, else find the one whose heartbeat stopped."""
        beats, end = self._all_beats(), time.monotonic() + SILENT_S
        while time.monotonic() < end:
            if reported := self._reported():
                return reported
            time.sleep(BEAT_S / 2)
        after = self._all_beats()
        if beats is None or after is None:
            return "the process that holds the rendezvous, rank 0 or the launcher, is gone"
        return self._suspect(beats, after)

    def _suspect(self, before: list[str], after: list[str]) -> str | None:
        """Name a process without a heartbeat in between, else one in another phase than this."""
        phases = [beat.partition(" ")[2] for beat in after]
        for rank in range(self._world_size):
            if before[rank] == after[rank]:
                return f"rank {rank} ended without a word while {phases[rank]}"
        for rank, phase in enumerate(phases):
            if phase != self.phase:
                return f"rank {rank} kept the others waiting while {phase}"
        return None

    def _watch(self) -> None:
        while not self._over.wait(BEAT_S):
            self._beat()
            message = self._reported()
            if message is not None and not self._over.wait(GRACE_S):
                line = f"rank {self._rank} ended while {self.phase}: {message}"
                print(line, file=sys.stderr, flush=True)
                # The main thread hangs in a collective and cannot be interrupted.
                os._exit(_STATUS_OF_A_STUCK_PROCESS)

    def _beat(self) -> None:
        self._beats += 1
        self._write(f"beat/{self._rank}", f"{self._beats} {self.phase}")

    def _all_beats(self) -> list[str] | None:
        """Return the last heartbeat of each process; None if the store is gone."""
        found = self._ask(lambda store: store.multi_get(self._all_keys))
        return None if found is None else [beat.decode() for beat in found]

    @property
    def _all_keys(self) -> list[str]:
        return [f"beat/{rank}" for rank in range(self._world_size)]

    def _report(self, message: str) -> None:
        """Report a failure unless there is one already: later failures are its consequences."""
        if self._reported() is None:
            self._write(_FAILURE, message)
            if self._rank == 0:
                # This process may hold the store: give the others time to read it.
                time.sleep(2 * BEAT_S)

    def _reported(self) -> str | None:
        if self._known_failure is None and self._ask(lambda store: store.check([_FAILURE])):
            said = self._ask(lambda store: store.get(_FAILURE))
            self._known_failure = said.decode() if said is not None else None
        return self._known_failure

    def _write(self, key: str, value: str) -> None:
        self._ask(lambda store: store.set(key, value))

    def _ask(self, question: Callable[[dist.Store], Answer]) -> Answer | None:
        """Query the store; None once it is gone with the process or the network that held it."""
        store = self._store
        if store is None:
            return None
        answers: list[Answer] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(question(store))

        # Behind a cut cable the store's socket waits for minutes, whatever its own timeout is.
        thread = threading.Thread(target=ask, name="question", daemon=True)
        thread.start()
        thread.join(ANSWER_S)
        if not answers:
            # Never ask again: torch logs every failed attempt.
            self._store = None
            return None
        return answers[0]


Handler = Callable[[int, FrameType | None], Any] | int | None


def _on_sigterm(handler: Handler) -> Handler:
    """Set the SIGTERM handler and return the previous one. Only the main thread may do so."""
    if handler is None or threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, handler)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


def _end_soon(_number: int, _frame: FrameType | None) -> None:
    timer = threading.Timer(LAST_WORDS_S, os._exit, [_STATUS_OF_SIGTERM])
    timer.daemon = True
    timer.start()


def _connect_to_store() -> dist.Store | None:
    """Open a second connection to the rendezvous store: the process group may block its own.

    Returns None if the processes were not joined through a launcher's variables.
    """
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return None
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=2 * SILENT_S),
    )
    # A launcher that restarts the run keeps its store, with the failure of the last attempt in it.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"gradcache_clip/{attempt}", store)


def _comes_from_a_collective(error: BaseException) -> bool:
    """Return whether another process may have caused the error: a collective, or SIGTERM."""
    if isinstance(error, dist.DistError | Terminated):
        return True
    said = str(error).lower()
    # Of some errors gloo leaves its name out: "Application timeout caused pair closure".
    return isinstance(error, RuntimeError) and ("gloo" in said or "pair closure" in said)


def _timed_out(error: BaseException) -> str | None:
    """Explain a timeout although every process is alive and in the same phase."""
    said = str(error).lower()
    if "timed out" not in said and "timeout" not in said:
        return None
    return (
        "no process has failed, but one kept the others waiting for longer than "
        "distributed.timeout_s; raise it if that one was only slow"
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or "no message").splitlines()[0]
