"""Tiny runs in processes of their own, for faults, and what must come of them."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from gloo_processes import forkserver
from processes import _free_port
from tiny_run import logged, overrides

from gradcache_clip.cli import main
from gradcache_clip.train import run as training
from gradcache_clip.train.checkpoint import load_latest

STEPS = 8
SETTINGS = (f"train.steps={STEPS}", "train.checkpoint_every=1", "train.keep_checkpoints=3")
# A run takes a second or two.
PATIENCE_S = 120

Prepare = Callable[[int], None]
"""Called with the rank of a process before it trains."""


@dataclass
class Case:
    """One run, to be hurt and resumed."""

    data: Path
    output: Path
    draw: random.Random
    expected: Path
    """The same run, which nothing happened to."""
    seconds: float
    """How long that took."""
    more: tuple[str, ...] = ()
    world: int = 1
    said: list[Path] = field(default_factory=list)
    """What each process said."""

    def start(self, *more: str, prepare: Prepare | None = None) -> list[BaseProcess]:
        """Train in processes; resume what is there."""
        if (self.output / "config.yaml").is_file():
            more = (*more, "train.resume=true")
        settings = overrides(self.data, self.output, *SETTINGS, *self.more, *more)
        port = _free_port() if self.world > 1 else 0
        folder = self.output.parent
        first = len(self.said)
        self.said += [folder / f"said-{first + rank}" for rank in range(self.world)]
        context, started = forkserver(), []
        for rank in range(self.world):
            place = (rank, self.world, port)
            arguments = (place, settings, self.said[first + rank], prepare)
            started.append(context.Process(target=train, args=arguments))
            started[-1].start()
        return started

    def run(self, *more: str, prepare: Prepare | None = None) -> int | None:
        """Train in one process to the end; the exit status."""
        (process,) = self.start(*more, prepare=prepare)
        return ended(process)

    def moment(self) -> None:
        """Wait for a random part of the run that was started last."""
        while not self.said[-1].exists():
            time.sleep(0.01)
        time.sleep(self.draw.uniform(0, self.seconds))

    def last_words(self) -> str:
        """What the process that was started last has said."""
        return self.said[-1].read_text()

    def kept_quiet(self) -> bool:
        """Whether no process has shown a traceback."""
        return not any("Traceback" in said.read_text() for said in self.said)

    def resumed_exactly(self) -> bool:
        """Go on to the end without faults; whether nothing tells that there was one."""
        statuses = [ended(process) for process in self.start()]
        return statuses == [0] * self.world and same(self.output, self.expected)


def ended(process: BaseProcess) -> int | None:
    """Exit status; None for a process that had to be ended."""
    process.join(PATIENCE_S)
    status = process.exitcode
    process.kill()
    return status


def train(
    place: tuple[int, int, int], settings: Sequence[str], said: Path, prepare: Prepare | None
) -> None:
    """`gradcache-clip train`, whose words go to a file."""
    silent = said.with_suffix(".silent")
    with silent.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.resetwarnings()
    # That of a command; here the server's would be inherited.
    multiprocessing.set_start_method("fork", force=True)
    rank, world, port = place
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    training.draw_run = lambda *_: []
    if prepare is not None:
        prepare(rank)
    config = said.with_suffix(".yaml")
    config.write_text("{}")
    # From here on a signal meets our own code.
    silent.rename(said)
    sys.exit(main(["train", str(config), *settings]))


def in_step(step: int, fault: Callable[[], None], rank: int = 0) -> Prepare:
    """Let a fault happen in a step of one rank."""
    return partial(_in_step, step, fault, rank)


def _in_step(step: int, fault: Callable[[], None], of: int, rank: int) -> None:
    original, taken = training.take_step, iter(range(1, 10**6))

    def take_step(*arguments):
        if (next(taken), rank) == (step, of):
            fault()
        return original(*arguments)

    training.take_step = take_step


def same(run: Path, expected: Path) -> bool:
    """Whether all that was logged and all that was learned is equal bit for bit."""
    names = "loss", "grad_norm", "logit_scale", "learning_rate", "text_to_image_mean_rank"
    for name in names:
        if logged(run, name) != logged(expected, name):
            return False
    ours, theirs = (load_latest(path / "checkpoints") for path in (run, expected))
    assert ours is not None and theirs is not None
    return all(
        torch.equal(ours.modules[module][name], value)
        for module, weights in theirs.modules.items()
        for name, value in weights.items()
    )


def reference(data: Path, folder: Path, *more: str, world: int = 1) -> tuple[Path, float]:
    """A run that nothing happens to, and how long it takes."""
    case = Case(data, folder / "whole", random.Random(0), folder, 0.0, more, world)
    case.run() if world == 1 else [ended(process) for process in case.start()]
    shutil.rmtree(folder / "whole")
    # The second is not the first of its server.
    start = time.monotonic()
    statuses = [ended(process) for process in case.start()]
    assert statuses == [0] * world, case.last_words()
    return folder / "whole", time.monotonic() - start
