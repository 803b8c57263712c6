"""The `train` command, and error handling shared by all commands."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

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
    try:
        return run(arguments)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    # Evaluated only once something was raised, so that a successful command imports nothing for it.
    except _expected_errors() as error:
        if getattr(arguments, "traceback", False) or _is_own_module_missing(error):
            raise
        notes = getattr(error, "__notes__", [])
        print(": ".join([name, *notes, _explained(error)]), file=sys.stderr)
        return 2


def _expected_errors() -> tuple[type[BaseException], ...]:
    import torch

    from gradcache_clip.cache import ReplayMismatchError

    always = (CommandError, ValueError, OSError, ModuleNotFoundError, MemoryError)
    own = (*_loaded("checkpoint", "CheckpointError"), *_loaded("failures", "PeerFailure"))
    return (*always, torch.OutOfMemoryError, ReplayMismatchError, *own)


def _loaded(module: str, name: str) -> tuple[type[BaseException], ...]:
    # A module that was never loaded (its extras may be missing) cannot have raised its error.
    error = getattr(sys.modules.get(f"gradcache_clip.train.{module}"), name, None)
    return (error,) if error else ()


def _is_own_module_missing(error: BaseException) -> bool:
    return isinstance(error, ModuleNotFoundError) and _package(error) == "gradcache_clip"


def _package(error: ModuleNotFoundError) -> str:
    return (error.name or str(error)).split(".")[0]


def _explained(error: BaseException) -> str:
    import torch

    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{_package(error)}: expected it to be installed for this command, got none; "
            'pip install "gradcache-clip[train]"'
        )
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        first = (str(error) or "out of memory").splitlines()[0]
        return f"memory: expected a chunk to fit, got {first!r}; lower train.chunk_size"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return (
            f"{error.filename}: expected a file or folder that can be used, got "
            f"{error.strerror!r}; check the path, its permissions and the disk"
        )
    return message
