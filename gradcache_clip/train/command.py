"""The `train` command, and error handling shared by all commands."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from gradcache_clip.train.run import RunSummary

INTERRUPTED = 130


class CommandError(Exception):
    """An expected failure: its message explains it, so no traceback is shown."""


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train`: a configuration file and overrides."""
    parser.add_argument("config", type=Path, help="YAML file; see examples/demo.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="SECTION.KEY=VALUE",
        help="such as train.batch_size=4096 model.image=vit_tiny_patch16_224",
    )
    add_traceback_option(parser)
    parser.set_defaults(run=run_train)


def add_traceback_option(parser: argparse.ArgumentParser) -> None:
    """Add `--traceback`, which may stand before or after the name of a command."""
    parser.add_argument(
        "--traceback",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show where an error came from",
    )


def run_train(arguments: argparse.Namespace) -> int:
    """Train, print the outcome, and return the exit status."""
    from gradcache_clip.train.config_file import load_config
    from gradcache_clip.train.device import is_first_process
    from gradcache_clip.train.run import train

    summary = train(load_config(arguments.config, arguments.overrides))
    if is_first_process():
        _show(summary)
    return 0 if summary.finished else INTERRUPTED


def _show(summary: RunSummary) -> None:
    print(f"{summary.output}: step {summary.step}, {summary.pairs_per_s:,.0f} pairs/s")
    for reason, count in summary.skipped.items():
        print(f"skipped {count:,} broken samples: {reason}")


def run_command(arguments: argparse.Namespace, *, name: str) -> int:
    """Run `arguments.run(arguments)` and return the exit status.

    An expected error prints one line on stderr and returns 2; with `--traceback` it is raised. Any
    other error is a bug and is raised.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    run: Callable[[argparse.Namespace], int] = arguments.run
    with _noting_interrupts() as interrupts:
        try:
            return run(arguments)
        except BaseException as error:
            # Some libraries make another error of an interrupt, or a panic.
            if not (interrupts or isinstance(error, KeyboardInterrupt)):
                return _said(error, arguments, name)
    print(f"{name}: interrupted", file=sys.stderr)
    return INTERRUPTED


def end(status: int) -> NoReturn:
    """End the process. All is said and saved by now, so an interrupt changes nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Collect each SIGINT that raises KeyboardInterrupt."""
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, _frame: FrameType | None) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    if not main or before is not signal.default_int_handler:
        yield noted
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _said(error: BaseException, arguments: argparse.Namespace, name: str) -> int:
    """Print an expected error in a line; raise any other."""
    if getattr(arguments, "traceback", False) or not _is_expected(error):
        raise error
    notes = getattr(error, "__notes__", [])
    print(": ".join([name, *notes, _explained(error)]), file=sys.stderr)
    return 2


def _is_expected(error: BaseException) -> bool:
    from gradcache_clip.cache import ReplayMismatchError

    if isinstance(error, ModuleNotFoundError):
        return _package(error) != "gradcache_clip"
    own = (*_loaded("checkpoint", "CheckpointError"), *_loaded("failures", "PeerFailure"))
    expected = isinstance(error, (CommandError, ValueError, OSError, ReplayMismatchError, *own))
    return expected or _is_out_of_memory(error)


def _loaded(module: str, name: str) -> tuple[type[BaseException], ...]:
    # A module that was never loaded (its extras may be missing) cannot have raised its error.
    error = getattr(sys.modules.get(f"gradcache_clip.train.{module}"), name, None)
    return (error,) if error else ()


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    # The CPU's allocator has no error of its own.
    of_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return of_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def _package(error: ModuleNotFoundError) -> str:
    return (error.name or str(error)).split(".")[0]


def _explained(error: BaseException) -> str:
    message = _printable(str(error)) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{_package(error)}: expected it to be installed for this command, got none; "
            'pip install "gradcache-clip[train]"'
        )
    if _is_out_of_memory(error):
        first = (str(error) or "out of memory").splitlines()[0]
        return f"memory: expected a chunk to fit, got {first!r}; lower train.chunk_size"
    if isinstance(error, OSError) and error.strerror:
        return _of_system(error)
    return message


def _of_system(error: OSError) -> str:
    words = error.strerror or ""
    if ": expected " in words:
        return _printable(words)
    name = "files" if error.filename is None else _printable(str(error.filename))
    return (
        f"{name}: expected a file or folder that can be used, got {words!r}; check the "
        "path, its permissions and the disk"
    )


def _printable(text: str) -> str:
    """One line; names from strangers must not steer a terminal."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
