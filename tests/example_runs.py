"""Programs of examples/, each in a process that forks from the test's, imports and all."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
PATIENCE_S = 300


@dataclass(frozen=True)
class Ran:
    """What came of a program, as `subprocess.run` returns it."""

    returncode: int | None
    stdout: str
    stderr: str


def run_example(name: str, *arguments: str, folder: Path) -> Ran:
    """Run `examples/NAME.py` in `folder`."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_run, args=(name, arguments, folder))
    process.start()
    process.join(PATIENCE_S)
    process.kill()
    process.join()
    said = [(folder / stream).read_text() for stream in ("stdout", "stderr")]
    return Ran(process.exitcode, *said)


def _run(name: str, arguments: tuple[str, ...], folder: Path) -> None:
    # Threads of a pool do not survive a fork.
    torch.set_num_threads(1)
    warnings.resetwarnings()
    os.chdir(folder)
    sys.argv = [str(EXAMPLES / f"{name}.py"), *arguments]
    sys.path.insert(0, str(EXAMPLES))
    with Path("stdout").open("w") as sys.stdout, Path("stderr").open("w") as sys.stderr:
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.stdout.flush()
