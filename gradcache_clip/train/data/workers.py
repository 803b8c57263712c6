"""Worker processes that read ahead, and a word when one of them stops or ends."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any, cast

import psutil
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from gradcache_clip.train.data.pieces import Piece

TIMEOUT_S = 600.0
"""Seconds that a batch may wait for a worker, unless a run says otherwise."""

_SIGCHLD = getattr(signal, "SIGCHLD", None)


def pieces_of_workers(
    dataset: Dataset[Piece | Exception],
    sampler: Sampler[Any] | None = None,
    *,
    workers: int,
    batch_size: int,
    piece_rows: int,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[Piece | Exception]:
    """Pieces that workers make, one batch ahead, or an error that one of them met.

    Without workers this process makes them. Random numbers and signals are left to it.

    Raises:
        ChildProcessError: a worker was killed, or sent nothing for `timeout_s`.
    """
    ahead = -(-batch_size // (piece_rows * max(1, workers)))
    loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=max(2, ahead) if workers else None,
        collate_fn=_unchanged,
        # Else it would draw from torch's own generator and alter the dropout of a resumed run.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_parent,
    )
    if not workers:
        yield from loader
        return
    with ExitStack() as at_end:
        with _signals_put_off():
            watched = _Watched(loader, timeout_s)
            at_end.callback(watched.end)
        yield from watched


class _Watched:
    """The pieces of a loader with workers, while a thread watches how long they take.

    torch raises from a signal handler as soon as a worker dies, even between an optimizer's step
    and the count of it. Here that is raised while a piece is awaited, and at no other time.
    """

    def __init__(self, loader: DataLoader[Any], timeout_s: float) -> None:
        handler = _on_sigchld(signal.SIG_DFL)
        self._iterator = cast("Any", iter(loader))
        _on_sigchld(handler)
        self._workers = self._iterator._workers
        self._timeout_s = timeout_s
        self._awaited: int | None = None
        self._late = ""
        self._over = threading.Event()
        # Else the interpreter would wait at its end for workers, which ignore its polite signal. At
        # 10 it closes the queues that tell them to end.
        self._end_once = Finalize(None, self._end, exitpriority=11)
        threading.Thread(target=self._watch, name="workers", daemon=True).start()

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from map(self._next, itertools.count())
        except (RuntimeError, ConnectionError, EOFError) as error:
            self._await_a_death()
            if not (self._late or self._ended()):
                raise
            raise self._error() from error

    def end(self) -> None:
        """End the workers, also one that is stopped and hears no polite signal."""
        with _signals_put_off():
            self._end_once()

    def _end(self) -> None:
        self._over.set()
        self._iterator._shutdown_workers()
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()
                worker.join()

    def _next(self, number: int) -> Any:
        handler = _on_sigchld(self._on_death)
        try:
            # One that died earlier sends no signal now.
            self._raise_if_ended()
            self._awaited = number
            return next(self._iterator)
        finally:
            self._awaited = None
            _on_sigchld(handler)

    def _await_a_death(self) -> None:
        """The system closes what a process had open before it tells how the process ended."""
        closed = wait([worker.sentinel for worker in self._workers], timeout=1)
        for worker in self._workers:
            if worker.sentinel in closed:
                worker.join()

    def _watch(self) -> None:
        tick, before, waited = min(1.0, self._timeout_s / 8), None, 0.0
        while not self._over.wait(tick):
            # Ticks and no clock: a run that was suspended has not waited.
            awaited = self._awaited
            waited = waited + tick if awaited is not None and awaited == before else 0.0
            before = awaited
            if waited + 2 * tick >= self._timeout_s:
                self._late = ", ".join(map(_described, self._workers))
                # This process may sit in the middle of a message, which only a death ends.
                for worker in self._workers:
                    worker.kill()
                return

    def _on_death(self, *_: object) -> None:
        if self._awaited is not None:
            self._raise_if_ended()

    def _raise_if_ended(self) -> None:
        if self._ended():
            raise self._error()

    def _ended(self) -> list[str]:
        return [_described(worker) for worker in self._workers if worker.exitcode]

    def _error(self) -> ChildProcessError:
        if self._late:
            return ChildProcessError(
                f"data.workers: expected samples within distributed.timeout_s={self._timeout_s:g}, "
                f"got none ({self._late}); look at the storage of the data, continue what is "
                "stopped, or raise distributed.timeout_s"
            )
        return ChildProcessError(
            f"data.workers: expected {len(self._workers)} processes that read, got one that ended "
            f"({', '.join(self._ended())}); if the system killed it for its memory, lower "
            "data.workers or train.batch_size"
        )


def _described(worker: Any) -> str:
    code = worker.exitcode
    if code is None:
        try:
            return f"process {worker.pid} is {psutil.Process(worker.pid).status()}"
        except psutil.Error:
            return f"process {worker.pid} is gone"
    how = signal.Signals(-code).name if code < 0 else f"status {code}"
    return f"process {worker.pid} ended by {how}"


@contextmanager
def _signals_put_off() -> Iterator[None]:
    """Handle SIGINT and SIGTERM at the end, not while processes start or are ended.

    What a handler raises in the middle of a fork is printed by Python, and lost. Raised while
    workers are told to end it would leave some of them alive.
    """
    noted: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        noted.append(number)

    # None stands for a handler that is not Python's.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not None]
    handlers = [_on_signal(number, note) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            _on_signal(number, handler)
        for each in dict.fromkeys(noted):
            signal.raise_signal(each)


def _on_sigchld(handler: Any) -> Any:
    return _on_signal(_SIGCHLD, handler) if _SIGCHLD else None


def _on_signal(number: int, handler: Any) -> Any:
    """Set the handler and return the one before. Only the main thread may do so."""
    main = threading.current_thread() is threading.main_thread()
    return signal.signal(number, handler) if main and handler is not None else None


def _unchanged(piece: Any) -> Any:
    return piece


def _leave_signals_to_the_parent(_worker: int) -> None:
    """A signal to the whole process group must not kill what the parent still reads from."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
