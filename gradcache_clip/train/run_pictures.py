"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path

from gradcache_clip.train.config import Config
from gradcache_clip.train.evaluation.held_out import HeldOut
from gradcache_clip.train.evaluation.held_out_texts import HeldOutTexts
from gradcache_clip.train.evaluation.labelled import LabelledImages
from gradcache_clip.train.objective import build_objective
from gradcache_clip.train.report.curves import RunCurve, draw_curves
from gradcache_clip.train.report.metrics_log import read_log
from gradcache_clip.train.report.pictures import (
    draw_gallery,
    draw_neighbours,
    draw_similarity,
    draw_text_gallery,
)
from gradcache_clip.train.run_folder import RunFolder


def draw_run(
    run: RunFolder,
    config: Config,
    batch: HeldOut | None,
    held_out: HeldOut | HeldOutTexts | LabelledImages | None,
) -> list[Path]:
    """Draw the log, a training batch and the held-out samples into `pictures/`."""
    folder, rows = run.pictures, config.evaluation.gallery
    files = [draw_curves([run_curve(run, config)], folder / "curves.png")]
    if batch is not None and len(batch.texts) >= 2:
        of = "Pairs of a training batch"
        files.append(draw_similarity(batch, folder / "similarity.png", of=of))
    if isinstance(held_out, LabelledImages):
        files.append(draw_neighbours(held_out, folder / "neighbours.png", rows=rows))
    elif isinstance(held_out, HeldOutTexts):
        files.append(draw_text_gallery(held_out, folder / "gallery.png", rows=rows))
    elif held_out is not None:
        if len(held_out.image_ids.unique()) >= 2:
            files.append(draw_similarity(held_out, folder / "similarity_held_out.png"))
        files.append(draw_gallery(held_out, folder / "gallery.png", rows=rows))
    return files


def run_curve(run: RunFolder, config: Config, name: str | None = None) -> RunCurve:
    """The log of a run, labelled with its batch, or its chunks where the softmax ends there."""
    train = config.train
    name = name or (
        f"cached, batch of {train.batch_size:,}"
        if train.negatives == "batch"
        else f"accumulated, chunks of {train.chunk_size:,}"
    )
    objective = build_objective(config)
    return RunCurve(name, read_log(run.path), objective.candidates, objective.guess)
