"""Checks that several processes over gloo run one after another, and what failed in which."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from gloo_processes import start

Check = Callable[[], None]
Suite = Callable[[], Iterator[tuple[str, Check]]]

# A rank that waits for one that has given up.
_PATIENCE = timedelta(seconds=20)


def failures(
    suite: Suite, world: int, folder: Path, *, start_method: str = "forkserver"
) -> list[str]:
    """Run a suite in `world` processes; one line for each rank and check that failed.

    A check that fails an assertion lets the others go on. After any other error the rank is out of
    step with the others, and gives up.
    """
    start(_run, world, suite, folder, patience=_PATIENCE, start_method=start_method)
    found: list[str] = []
    for rank in range(world):
        report = json.loads((folder / f"rank-{rank}.json").read_text())
        found += (f"rank {rank} of {world}: {line}" for line in report)
    return found


def _run(suite: Suite, folder: Path) -> None:
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(list(_failed(suite))))


def _failed(suite: Suite) -> Iterator[str]:
    for name, check in suite():
        what, gives_up = _outcome(check)
        if what:
            yield f"{name}: {what}"
        if gives_up:
            return


def _outcome(check: Check) -> tuple[str, bool]:
    """What went wrong, empty if nothing did, and whether the rank is out of step."""
    try:
        check()
    except (AssertionError, pytest.fail.Exception) as error:
        return f"{str(error)[:400]}\n{traceback.format_exc(limit=-1)}", False
    except Exception:
        return traceback.format_exc(limit=-4), True
    return "", False
