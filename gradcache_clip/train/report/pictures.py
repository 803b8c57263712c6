"""The pictures of a run: curves, the similarity matrix of held-out pairs, a gallery of queries."""

from __future__ import annotations

from pathlib import Path

import torch

from gradcache_clip.train.config import Config
from gradcache_clip.train.evaluation.held_out import HeldOut
from gradcache_clip.train.evaluation.held_out_texts import HeldOutTexts
from gradcache_clip.train.evaluation.labelled import LabelledImages
from gradcache_clip.train.objective import build_objective
from gradcache_clip.train.report.curves import RunCurve, draw_curves
from gradcache_clip.train.report.gallery import draw_gallery
from gradcache_clip.train.report.metrics_log import read_log
from gradcache_clip.train.report.neighbours import draw_neighbours
from gradcache_clip.train.report.similarity import draw_similarity
from gradcache_clip.train.report.text_gallery import draw_text_gallery
from gradcache_clip.train.run_folder import RunFolder

SIMILARITY_PAIRS = 40


def draw_run(
    run: RunFolder,
    config: Config,
    batch: HeldOut | None,
    held_out: HeldOut | HeldOutTexts | LabelledImages | None,
) -> list[Path]:
    """Draw what there is to draw into `pictures/`; returns the files.

    Args:
        run: its log gives the curves.
        config: of the run.
        batch: pairs of a training batch for similarity.png.
        held_out: the validation set for similarity_held_out.png and gallery.png, texts for
            gallery.png alone, or labelled images for neighbours.png.
    """
    run.pictures.mkdir(exist_ok=True)
    files = [draw_curves([run_curve(run, config)], run.pictures / "curves.png")]
    if batch is not None and len(batch.texts) >= 2:
        path = run.pictures / "similarity.png"
        files.append(_draw_pairs(batch, path, "Pairs of a training batch"))
    if held_out is None:
        return files
    if isinstance(held_out, LabelledImages):
        return [*files, _draw_neighbours(held_out, run, config)]
    if isinstance(held_out, HeldOutTexts):
        path = run.pictures / "gallery.png"
        return [*files, draw_text_gallery(held_out, path, rows=config.evaluation.gallery)]
    if len(held_out.image_ids.unique()) >= 2:
        path = run.pictures / "similarity_held_out.png"
        files.append(_draw_pairs(held_out, path, "Held-out pairs"))
    files.append(
        draw_gallery(
            held_out.image_features,
            held_out.text_features,
            run.pictures / "gallery.png",
            images=list(held_out.thumbnails),
            texts=held_out.texts,
            image_ids=held_out.image_ids,
            text_ids=held_out.text_ids,
            rows=config.evaluation.gallery,
        )
    )
    return files


def _draw_neighbours(held_out: LabelledImages, run: RunFolder, config: Config) -> Path:
    return draw_neighbours(
        held_out.features,
        run.pictures / "neighbours.png",
        images=list(held_out.thumbnails),
        labels=held_out.labels,
        rows=config.evaluation.gallery,
    )


def _draw_pairs(pairs: HeldOut, path: Path, of: str) -> Path:
    images = _images_of_different_groups(pairs)
    texts = [_first_text_of(pairs, image) for image in images]
    return draw_similarity(
        pairs.image_features[images],
        pairs.text_features[texts],
        [pairs.texts[text] for text in texts],
        list(pairs.thumbnails[images]),
        path,
        of=of,
    )


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


def _images_of_different_groups(held_out: HeldOut) -> list[int]:
    """Images drawn at random, at most one of each group, so that only the diagonal is right."""
    order = torch.randperm(len(held_out.image_ids), generator=torch.Generator().manual_seed(0))
    first_of: dict[int, int] = {}
    for row in order.tolist():
        first_of.setdefault(int(held_out.image_ids[row]), row)
    return list(first_of.values())[:SIMILARITY_PAIRS]


def _first_text_of(held_out: HeldOut, image: int) -> int:
    return int((held_out.text_ids == held_out.image_ids[image]).nonzero()[0])
