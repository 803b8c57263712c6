"""One writer for a folder at a time, in whichever process and on whichever machine."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gradcache_clip.train.config_errors import ConfigError

LOCK_NAME = ".lock"

_held: set[IO[str]] = set()


def _let_go() -> None:
    """A process that was forked must not hold what the one that trains holds, and outlive it."""
    for file in _held:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made where it is missing, until the context ends.

    The operating system lets the lock go when its process ends, however it does. Where there are
    no such locks (Windows, some network file systems), nothing is held.

    Raises:
        ConfigError: another process holds it; the message names host and process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | _no_follow(), 0o666)
    with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
        if not _try_lock(file):
            raise ConfigError(
                f"train.output: expected a folder that no other run writes to, got {folder}, which "
                f"{_holder(file)} trains in; wait for it, stop it, or choose another folder"
            )
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "process": os.getpid()}, file)
        file.flush()
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)
        file.truncate(0)


def _no_follow() -> int:
    return getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def _try_lock(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _holder(file: IO[str]) -> str:
    try:
        found = json.loads(file.read(1000))
        return f"process {int(found['process'])} on {str(found['host'])[:100]!r}"
    except (KeyError, TypeError, ValueError, RecursionError):
        return "another process"
