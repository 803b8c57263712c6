"""Files that are whole or as they were before, and never written through a link."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SUFFIX = ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new file's path in the same folder; it takes the place of `path` at the end.

    What a killed process left of this is removed first: a folder has one writer at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in filter(is_temporary, path.parent.glob(f".{path.name}.*")):
        leftover.unlink(missing_ok=True)
    # Made with a name that nobody can know before, and never through a link.
    descriptor, name = tempfile.mkstemp(_SUFFIX, f".{path.name}.", path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        with naming(path):
            yield temporary
            _flush(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file in what the operating system says of it: writing to an open one names none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_temporary(path: Path) -> bool:
    """Return whether `replacing` gave this path."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
