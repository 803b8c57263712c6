"""When one process of a run fails, the others learn which and what it was doing, and stop too."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

BEAT_S = 0.5
"""Seconds between two signs of life, and between two looks at what the others say."""

SILENT_S = 3.0
"""A process that gives no sign of life for so long, while others wait for it, is gone."""

GRACE_S = 15.0
"""After a failure elsewhere, a process that cannot leave what it waits for is ended."""

LAST_WORDS_S = 5.0
"""A process that has learned of a failure has so long to say so when it is told to end."""

_STATUS_OF_A_STUCK_PROCESS = 3
_STATUS_OF_SIGTERM = 128 + signal.SIGTERM
_FAILURE = "failure"

Answer = TypeVar("Answer")


class PeerFailure(RuntimeError):
    """Another process of the run has failed; the message names it and what it was doing."""


class Terminated(KeyboardInterrupt):
    """This process was told to end by SIGTERM, as a launcher does when another one has failed."""


class FailureChannel:
    """A key in the store of the rendezvous for the first failure, and one a process for its phase.

    As a context, it passes on what ends it with an error, and a thread looks out for what others
    have passed on: a process that waits for a failed one inside a collective may never return.
    SIGTERM, by which a launcher then ends the others, raises `Terminated` inside the context.

    Args:
        rank: of this process.
        world_size: number of processes.

    Raises:
        PeerFailure: on leaving the context with an error that comes of another process's failure.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.phase = "starting"
        self._rank = rank
        self._world_size = world_size
        self._store = _own_connection()
        self._beats = 0
        self._heard: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_out, name="failures", daemon=True)

    def __enter__(self) -> FailureChannel:
        if self._store is not None:
            self._beat()
            self._thread.start()
        self._handler = _on_sigterm(_terminate)
        return self

    def set_phase(self, phase: str) -> None:
        """Note what this process is doing, also where it can say nothing later."""
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
                self._pass_on(error)
        finally:
            self._over.set()

    def _pass_on(self, error: BaseException) -> None:
        """Tell the others of a failure that is this process's own; raise one that is not."""
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Terminated):
            self._tell(f"rank {self._rank} was interrupted while {self.phase}")
            return
        message = self._told()
        if message is None and _is_of_a_collective(error):
            message = self._cause_elsewhere() or _timed_out(error)
        what = f"rank {self._rank} {'failed' if message is None else 'stopped'} while {self.phase}"
        self._tell(message or f"{what}: {type(error).__name__}: {_first_line(error)}")
        if message is not None:
            raise PeerFailure(f"{what}: {message}") from error
        error.__notes__ = [*getattr(error, "__notes__", []), what]  # type: ignore[attr-defined]

    def _cause_elsewhere(self) -> str | None:
        """What another says within some seconds, or that it says nothing any more."""
        beats, end = self._all_beats(), time.monotonic() + SILENT_S
        while time.monotonic() < end:
            if told := self._told():
                return told
            time.sleep(BEAT_S / 2)
        after = self._all_beats()
        if beats is None or after is None:
            return "the process that holds the rendezvous, rank 0 or the launcher, is gone"
        return self._of_others(beats, after)

    def _of_others(self, before: list[str], after: list[str]) -> str | None:
        """Who gave no sign of life in between, or else does something else than this process."""
        phases = [beat.partition(" ")[2] for beat in after]
        for rank in range(self._world_size):
            if before[rank] == after[rank]:
                return f"rank {rank} ended without a word while {phases[rank]}"
        for rank, phase in enumerate(phases):
            if phase != self.phase:
                return f"rank {rank} kept the others waiting while {phase}"
        return None

    def _look_out(self) -> None:
        while not self._over.wait(BEAT_S):
            self._beat()
            message = self._told()
            if message is not None and not self._over.wait(GRACE_S):
                line = f"rank {self._rank} ended while {self.phase}: {message}"
                print(line, file=sys.stderr, flush=True)
                os._exit(_STATUS_OF_A_STUCK_PROCESS)

    def _beat(self) -> None:
        self._beats += 1
        self._write(f"beat/{self._rank}", f"{self._beats} {self.phase}")

    def _all_beats(self) -> list[str] | None:
        """The last sign of life of each process; None where the store is gone."""
        found = self._ask(lambda store: store.multi_get(self._all_keys))
        return None if found is None else [beat.decode() for beat in found]

    @property
    def _all_keys(self) -> list[str]:
        return [f"beat/{rank}" for rank in range(self._world_size)]

    def _tell(self, message: str) -> None:
        """Pass on the first failure; later ones come of it."""
        if self._told() is None:
            self._write(_FAILURE, message)
            if self._rank == 0:
                # The store may end with this process: the others need time to look.
                time.sleep(2 * BEAT_S)

    def _told(self) -> str | None:
        if self._heard is None and self._ask(lambda store: store.check([_FAILURE])):
            said = self._ask(lambda store: store.get(_FAILURE))
            self._heard = said.decode() if said is not None else None
        return self._heard

    def _write(self, key: str, value: str) -> None:
        self._ask(lambda store: store.set(key, value))

    def _ask(self, question: Callable[[dist.Store], Answer]) -> Answer | None:
        """None once the store is gone, with the process that held it; torch logs each attempt."""
        store = self._store
        if store is None:
            return None
        try:
            return question(store)
        except RuntimeError:
            self._store = None
            return None


Handler = Callable[[int, FrameType | None], Any] | int | None


def _on_sigterm(handler: Handler) -> Handler:
    """Set what SIGTERM does; returns what it did. Python lets the main thread alone do so."""
    if handler is None or threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, handler)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


def _end_soon(_number: int, _frame: FrameType | None) -> None:
    timer = threading.Timer(LAST_WORDS_S, os._exit, [_STATUS_OF_SIGTERM])
    timer.daemon = True
    timer.start()


def _own_connection() -> dist.Store | None:
    """To the store of the rendezvous: the process group may be waiting on its own connection.

    None where the caller has joined the processes by other means than a launcher's variables.
    """
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return None
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=2 * SILENT_S),
    )
    # A launcher that starts the run again keeps its store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"gradcache_clip/{attempt}", store)


def _is_of_a_collective(error: BaseException) -> bool:
    """What torch raises when the other end of a collective is gone or late, and on SIGTERM."""
    if isinstance(error, dist.DistError | Terminated):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def _timed_out(error: BaseException) -> str | None:
    """Where all are alive and do the same, as far as anybody knows."""
    if "timed out" not in str(error).lower():
        return None
    return (
        "no process has failed, but one kept the others waiting for longer than "
        "distributed.timeout_s; raise it if that one was only slow"
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or "no message").splitlines()[0]
