"""Training runs in several processes that fork from one which has imported all they need."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import pytest
import torch
from gloo_processes import forkserver
from rich.console import Console
from tiny_run import NO_DROPOUT, logged, overrides
from torch import Tensor

from gradcache_clip.train import run as training
from gradcache_clip.train.checkpoint import load_latest
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.failures import PeerFailure

# Dropout would differ: each rank draws its own masks.
SAME_BATCHES = (*NO_DROPOUT, "train.batch_size=64", "train.checkpoint_every=0")

# DeepSpeed compiles an extension the first time that a machine runs it.
PATIENCE_S = 240

Fault = Callable[[int, int], None]
"""Called with rank and step in the middle of each step."""


def alone(data: Path, output: Path, *more: str) -> Path:
    """A run of one process, with the batches that any number of ranks share out."""
    settings = overrides(data, output, *SAME_BATCHES, *more)
    # Pictures take longer than such a run.
    with mock.patch.object(training, "draw_run"):
        training.train(load_config(None, settings), console=Console(quiet=True))
    return output


def weights(run: Path) -> dict[str, Tensor]:
    """Of the newest checkpoint."""
    checkpoint = load_latest(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint.modules["encoder"] | checkpoint.modules["loss"]


def assert_same_run(got: Path, expected: Path) -> None:
    """Losses of every step and weights at the end, to 1e-5."""
    for step, loss in logged(expected, "loss").items():
        assert logged(got, "loss")[step] == pytest.approx(loss, abs=1e-5), step
    assert weights(got).keys() == weights(expected).keys()
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(got)[name], value, rtol=1e-5, atol=1e-5, msg=name)


def in_processes(
    world: int, data: Path, output: Path, *more: str, fault: Fault | None = None
) -> list[str]:
    """Train one run in `world` processes; what came of each, "finished" or an error."""
    context, settings, port = forkserver(), overrides(data, output, *more), _free_port()
    started = []
    for rank in range(world):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_train, args=(rank, world, port, settings, fault, send))
        process.start()
        send.close()
        started.append((process, receive))
    return [_outcome(process, receive) for process, receive in started]


def fails_on_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, 2):
        raise ValueError("a bad batch")


def killed_on_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, 2):
        os.kill(os.getpid(), signal.SIGKILL)


def late_on_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, 2):
        time.sleep(7)


def interrupted_on_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, 2):
        os.kill(os.getpid(), signal.SIGINT)


def interrupted_at_once(rank: int, step: int) -> None:
    if (rank, step) == (1, 1):
        os.kill(os.getpid(), signal.SIGINT)


def terminated_on_all(rank: int, step: int) -> None:
    if step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def _train(
    rank: int, world: int, port: int, settings: list[str], fault: Fault | None, send: Connection
) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    training.draw_run = lambda *_: []
    if fault is not None:
        inject(rank, fault)
    try:
        summary = training.train(load_config(None, settings), console=Console(quiet=True))
        send.send("finished" if summary.finished else f"stopped after {summary.step}")
    except PeerFailure as error:
        send.send(f"PeerFailure: {error}")
    except BaseException as error:
        traceback.print_exc()
        send.send(f"{type(error).__name__}: {error}")


def inject(rank: int, fault: Fault) -> None:
    """Call `fault` once in every step, behind its number."""
    original, steps = training.take_step, iter(range(1, 1000))

    def take_step(*arguments):
        fault(rank, next(steps))
        return original(*arguments)

    training.take_step = take_step


def _outcome(process: multiprocessing.Process, receive: Connection) -> str:
    try:
        outcome = receive.recv() if receive.poll(PATIENCE_S) else "hangs"
    except EOFError:
        outcome = "died"
    process.join(10)
    process.kill()
    return outcome


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
