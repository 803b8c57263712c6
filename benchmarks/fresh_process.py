"""One measurement in a process of its own: nothing that ran before can blur it.

Run as a script, this file is the child of `call_in_fresh_process`: it reads JSON from stdin, calls
one function of one file and prints what it returned as JSON. `call_in_fork` is for many short
measurements, which need not import anything again.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Messages of torch, NumPy and the C++ library when an allocation fails.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "MemoryError")
_KILLED = -9
_FORKS = get_context("forkserver")
# Two threads that poll for the end of one process would lose its exit code.
_FORKING = Lock()


@dataclass(frozen=True)
class Outcome:
    """Values that a fresh process returned, or its failure: "out of memory" or "timed out"."""

    values: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Limits:
    """Resources that a fresh process may use."""

    seconds: float = 1800.0
    """Wall clock; the process is ended beyond it and counts as "timed out"."""
    data_bytes: int | None = None
    """Private memory on top of what the process holds once its file is imported (Linux)."""
    threads: int | None = None
    """Threads for BLAS and torch; what they choose when None."""


def call_in_fresh_process(
    function: Callable[[dict[str, Any]], dict[str, Any]],
    arguments: dict[str, Any],
    limits: Limits = Limits(),
) -> Outcome:
    """`function(arguments)` in a new Python process; both dicts must survive JSON.

    Args:
        function: a function at the top level of a file, found again by its name.

    Raises:
        RuntimeError: the process failed for another reason than memory or time; with its stderr.
    """
    request = {"arguments": arguments, "data_bytes": limits.data_bytes}
    source = inspect.getsourcefile(function)
    command = [sys.executable, __file__, str(source), function.__name__]
    environment = dict(os.environ)
    if limits.threads:
        environment |= {"OMP_NUM_THREADS": str(limits.threads)}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment,
            timeout=limits.seconds,
        )
    except subprocess.TimeoutExpired:
        return Outcome(failure="timed out")
    if done.returncode == 0:
        return Outcome(values=json.loads(done.stdout.splitlines()[-1]))
    if done.returncode == _KILLED or any(word in done.stderr for word in _OUT_OF_MEMORY):
        return Outcome(failure="out of memory")
    raise RuntimeError(
        f"{function.__name__}: expected exit code 0, got {done.returncode}:\n{done.stderr[-2000:]}"
    )


def call_in_fork(
    function: Callable[..., dict[str, Any]], arguments: Sequence[Any], limits: Limits
) -> Outcome:
    """`function(*arguments)` in a process forked from the server of `prepare_forks`.

    Whatever happens there is an outcome: the failure of a process that died is the last line it
    wrote.
    """
    receiver, sender = _FORKS.Pipe(duplex=False)
    with NamedTemporaryFile("r", errors="replace") as written:
        given = function, tuple(arguments), limits, sender, written.name
        process = _FORKS.Process(target=_answer, args=given)
        with _FORKING:
            process.start()
        sender.close()
        try:
            if not receiver.poll(limits.seconds):
                return Outcome(failure="timed out")
            return Outcome(values=receiver.recv())
        except EOFError:
            with _FORKING:
                process.join()
            return Outcome(failure=_last_words(process.exitcode, written.read()))
        finally:
            with _FORKING:
                process.kill()
                process.join()


def prepare_forks(modules: Sequence[str]) -> None:
    """Start a server that imports modules and computes nothing, for processes to be forked from.

    If an import ends the server, a new one imports torch alone, and forks import what they need.
    """
    for preloaded in (["torch", *modules], ["torch"]):
        _FORKS.set_forkserver_preload(preloaded)
        with _silent():
            ensure_running()
        with suppress(EOFError, OSError):
            call_in_fork(dict, (), Limits())
            return


def _answer(
    function: Callable[..., dict[str, Any]],
    arguments: tuple[Any, ...],
    limits: Limits,
    sender: Connection,
    words: str,
) -> None:
    """In the fork: send what the function returns; what it prints goes to a file."""
    descriptor = os.open(words, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    if limits.threads:
        import torch

        torch.set_num_threads(limits.threads)
    limit_data(limits.data_bytes)
    sender.send(function(*arguments))


def _last_words(code: int | None, written: str) -> str:
    if code == _KILLED or any(word in written for word in _OUT_OF_MEMORY):
        return "out of memory"
    lines = written.strip().splitlines() or [f"expected exit code 0, got {code}"]
    return lines[-1]


@contextmanager
def _silent() -> Iterator[None]:
    """Processes started inside inherit no terminal to write to."""
    kept = [(standard, os.dup(standard)) for standard in (1, 2)]
    null = os.open(os.devnull, os.O_WRONLY)
    for standard, _ in kept:
        os.dup2(null, standard)
    try:
        yield
    finally:
        for standard, copy in kept:
            os.dup2(copy, standard)
            os.close(copy)
        os.close(null)


class PeakGrowth:
    """Context that measures how far resident memory rose above its level on entry.

    Attributes:
        bytes: the peak minus the level on entry, known after the context.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> PeakGrowth:
        from gradcache_clip.memory import reset_peak_resident_bytes, resident_bytes

        _give_back_freed_memory()
        # Where the peak cannot be reset it is that of the imports at least, and they are small.
        reset_peak_resident_bytes()
        self._before = resident_bytes()
        return self

    def __exit__(self, *_: object) -> None:
        from gradcache_clip.memory import peak_resident_bytes

        self.bytes = peak_resident_bytes() - self._before


def interleaved_times_ms(
    steps: Sequence[Callable[[], object]], count: int, seconds: float
) -> list[tuple[float, ...]]:
    """Milliseconds of up to `count` rounds in which the steps take turns, after a warm-up round.

    Taking turns lets a busy machine slow all steps alike. A warm-up that alone took `seconds` is
    returned as the only round: steps that long are not blurred by a cold start. No further round
    is started once all together took `seconds`.
    """
    begin = time.perf_counter()
    warm_up = tuple(map(_time_ms, steps))
    rounds: list[tuple[float, ...]] = []
    while len(rounds) < count and time.perf_counter() - begin < seconds:
        rounds.append(tuple(map(_time_ms, steps)))
    return rounds or [warm_up]


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return median(time / other for time, other in zip(times, others, strict=True))


def distance(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference of all gradients, over the norm of the expected ones."""
    pairs = zip(got, expected, strict=True)
    difference = sum((g - e).double().square().sum() for g, e in pairs)
    return float((difference / sum(e.double().square().sum() for e in expected)) ** 0.5)


def from_zero(step: Callable[[], float], leaves: Iterable[Tensor]) -> Callable[[], float]:
    """The step, with the gradients of the leaves forgotten before."""
    leaves = list(leaves)

    def stepped() -> float:
        for leaf in leaves:
            leaf.grad = None
        return step()

    return stepped


def _give_back_freed_memory() -> None:
    """Freed memory that the allocator keeps is resident, and a step would grow into it unseen."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _time_ms(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return (time.perf_counter() - begin) * 1e3


def limit_data(data_bytes: int | None) -> None:
    """Let allocations fail beyond a limit, as they would on a smaller machine."""
    if data_bytes is None or sys.platform != "linux":
        return
    import resource

    status = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1]) for line in status if line.startswith("VmData:")) * 1024
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + data_bytes, hard))


def _main(path: str, name: str) -> None:
    request = json.load(sys.stdin)
    spec = spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    # dataclasses look their module up by name while the file is being executed.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    limit_data(request["data_bytes"])
    print(json.dumps(getattr(module, name)(request["arguments"])))


if __name__ == "__main__":
    _main(*sys.argv[1:3])
