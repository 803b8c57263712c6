"""Runs of recipes/NAME.yaml on drawn characters, shortened until a test has time for them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

from rich.console import Console
from tiny_run import logged

from gradcache_clip.train import run as training
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.run import RunSummary

RECIPES = Path(__file__).parent.parent / "recipes"
SHORT = (
    "data.workers=0",
    "optimizer.warmup_steps=1",
    "train.batch_size=24",
    "train.chunk_size=10",
    "train.steps=4",
    "train.checkpoint_every=1",
    "train.evaluate_every=0",
    "train.device=cpu",
)


def recipe(name: str) -> Path:
    return RECIPES / f"{name}.yaml"


def shortened(data: Path, output: Path, *more: str) -> list[str]:
    places = [f"data.train={data}/train", f"data.validation={data}/validation"]
    return [*SHORT, *places, f"train.output={output}", *more]


def run_recipe(name: str, data: Path, output: Path, *more: str) -> RunSummary:
    """The recipe with fewer steps and pairs; pictures take longer than such a run."""
    config = load_config(recipe(name), shortened(data, output, *more))
    with mock.patch.object(training, "draw_run"):
        return training.train(config, console=Console(quiet=True))


def assert_trains_and_resumes(name: str, data: Path, folder: Path, *more: str) -> RunSummary:
    """A run that is stopped after its second step ends as one that never was, bit for bit."""
    whole = run_recipe(name, data, folder / "whole", *more)
    assert whole.finished and whole.step == 4
    stopped = _stopped_after_two(name, data, folder / "parts", *more)
    assert not stopped.finished and stopped.step == 2
    parts = run_recipe(name, data, folder / "parts", *more, "train.resume=true")
    for figure in ("loss", "accuracy", "grad_norm", "logit_scale"):
        assert logged(folder / "parts", figure) == logged(folder / "whole", figure), figure
    assert parts.metrics == whole.metrics and whole.metrics
    return whole


def _stopped_after_two(name: str, data: Path, output: Path, *more: str) -> RunSummary:
    original, steps = training.take_step, iter(range(1, 5))

    def interrupted(*arguments):
        if next(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    with mock.patch.object(training, "take_step", interrupted):
        return run_recipe(name, data, output, *more)
