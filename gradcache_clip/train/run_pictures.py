"""Draws the pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradcache_clip.train.programs import program_of
from gradcache_clip.train.programs.program import Program
from gradcache_clip.train.report.curves import RunCurve, draw_curves
from gradcache_clip.train.report.metrics_log import read_log
from gradcache_clip.train.run_folder import RunFolder


def draw_run(
    run: RunFolder, program: Program[Any], evaluated: Any | None, preview: Any | None
) -> list[Path]:
    """Draw curves of the log, a training batch and held-out samples into `pictures/`."""
    run.pictures.mkdir(exist_ok=True)
    curves = draw_curves([run_curve(run, program.config)], run.pictures / "curves.png")
    return [curves, *program.draw(run.pictures, evaluated, preview)]


def run_curve(run: RunFolder, config: Any, name: str | None = None) -> RunCurve:
    """Return the log of a run as a curve, labelled with the size of its softmax."""
    train, program = config.train, program_of(config)
    name = name or (
        f"cached, batch of {train.batch_size:,}"
        if train.grad_cache
        else f"accumulated, chunks of {train.chunk_size:,}"
    )
    return RunCurve(name, read_log(run.path), program.candidates, program.chance_loss)
