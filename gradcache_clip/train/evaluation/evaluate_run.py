"""Evaluation of a run that was trained before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gradcache_clip.train.config import Config, ConfigError
from gradcache_clip.train.evaluation.embed import embed_dataset
from gradcache_clip.train.evaluation.features import TokenFeatures, features_of
from gradcache_clip.train.evaluation.held_out import HeldOut
from gradcache_clip.train.evaluation.held_out_texts import HeldOutTexts, TextMetrics
from gradcache_clip.train.evaluation.labelled import LabelledImages, LabelMetrics
from gradcache_clip.train.evaluation.recall import DirectionMetrics, RetrievalMetrics
from gradcache_clip.train.evaluation.zero_shot import (
    prompts_of,
    zero_shot_by_tokens,
    zero_shot_classification,
    zero_shot_classifier,
)
from gradcache_clip.train.run_folder import existing_run
from gradcache_clip.train.session import load_trained
from gradcache_clip.train.task import task_of
from gradcache_clip.train.tokenizer import Tokenizer
from gradcache_clip.train.towers import DualEncoder


def evaluate_run(
    run_folder: str | Path,
    *,
    data: str | None = None,
    templates: tuple[str, ...] = (),
    device: str | None = None,
    folds: int | None = None,
    console: Console | None = None,
) -> RetrievalMetrics | TextMetrics | LabelMetrics:
    """Retrieval on held-out pairs with a run's newest checkpoint, printed as a table.

    For a run over views of images: how far the features of its tower tell classes apart. For one
    over texts: how well queries find their document, by the width that is compared.

    Args:
        run_folder: the `train.output` of the run.
        data: shards, or lines of texts; those of the run's `data.validation` when None.
        device: where to run; an accelerator where there is one when None.
        folds: consecutive parts of the images over which recall is averaged (COCO 1K: 5); those of
            the run's `evaluation.folds` when None.
        templates: with any, images are also classified by their first captions put into them.

    Raises:
        ConfigError: the folder holds no run, no checkpoint, or no validation data is known; or
            templates are given for a run without images and captions.
    """
    run, config = existing_run(run_folder)
    config.train.device = device or "auto"
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=data))
    if folds is not None:
        evaluation = dataclasses.replace(config.evaluation, folds=folds)
        config = dataclasses.replace(config, evaluation=evaluation)
    if not config.data.validation:
        raise ConfigError(
            "data.validation: expected something to evaluate on, got none; pass --data DATA"
        )
    if templates and (config.data.views == 2 or config.data.text_fields):
        raise ConfigError(
            f"templates: expected none for {run.path}, whose run has learned no images and their "
            f"captions, got {len(templates)}; leave them out"
        )
    task = task_of(config)
    task.check_validation()
    encoder, tokenizer, step = load_trained(config, run)
    console = console or Console()
    held_out = task.embed_held_out(encoder, tokenizer)
    if isinstance(held_out, LabelledImages):
        console.print(_label_table(held_out.metrics, f"{run.path}, step {step}"))
        return held_out.metrics
    if isinstance(held_out, HeldOutTexts):
        found = held_out.metrics()
        console.print(_text_table(found, f"{run.path}, step {step}"))
        return found
    assert held_out is not None and tokenizer is not None
    metrics = held_out.metrics()
    of_folds = f", mean of {config.evaluation.folds} folds" if config.evaluation.folds > 1 else ""
    console.print(_table(metrics, f"{run.path}, step {step}{of_folds}"))
    if templates:
        for k, share in _zero_shot(encoder, tokenizer, config, held_out, templates).items():
            console.print(f"zero-shot accuracy among the first {k}: {share:.1%}")
    return metrics


def _label_table(metrics: LabelMetrics, title: str) -> Table:
    table = Table(title=title)
    names = ("nearest images", "linear classifier", "most frequent class", "images", "classes")
    for name in names:
        table.add_column(name, justify="right")
    shares = (metrics.knn_accuracy, metrics.probe_accuracy, metrics.label_chance)
    counts = (metrics.images, metrics.classes)
    table.add_row(*(f"{share:.1%}" for share in shares), *(f"{count:,}" for count in counts))
    return table


def _table(metrics: RetrievalMetrics, title: str) -> Table:
    ways = {"image to text": metrics.image_to_text, "text to image": metrics.text_to_image}
    return _recall_table("direction", ways, title)


def _text_table(metrics: TextMetrics, title: str) -> Table:
    ways = {f"first {width:,}": found for width, found in metrics.by_width.items()}
    return _recall_table("numbers", ways, f"query to document: {title}")


def _recall_table(heading: str, ways: Mapping[str, DirectionMetrics], title: str) -> Table:
    one = next(iter(ways.values()))
    table = Table(heading, title=title)
    for k in one.recall:
        table.add_column(f"R@{k}", justify="right")
    first = min(one.chance)
    for name in (f"chance R@{first}", "median rank", "candidates"):
        table.add_column(name, justify="right")
    for name, way in ways.items():
        recalls = (f"{share:.1%}" for share in way.recall.values())
        chance = f"{way.chance[first]:.2%}"
        table.add_row(name, *recalls, chance, f"{way.median_rank:.0f}", f"{way.candidates:,}")
    return table


@torch.no_grad()
def _zero_shot(
    encoder: DualEncoder,
    tokenizer: Tokenizer,
    config: Config,
    held_out: HeldOut,
    templates: tuple[str, ...],
) -> dict[int, float]:
    device, size = next(encoder.parameters()).device, config.evaluation.batch_size
    encoder.eval()

    def encode(texts: list[str]) -> Any:
        tokens = {name: tensor.to(device) for name, tensor in tokenizer(texts).items()}
        return encoder.encode_text(tokens)

    numbers = {name: n for n, name in enumerate(dict.fromkeys(held_out.image_captions))}
    labels = torch.tensor([numbers[caption] for caption in held_out.image_captions])
    images = held_out.image_features
    if isinstance(images, TokenFeatures):
        prompts = prompts_of(list(numbers), templates)
        batches = (prompts[start : start + size] for start in range(0, len(prompts), size))
        texts = features_of(embed_dataset(encode, batches, description="prompts"))
        assert isinstance(texts, TokenFeatures)
        return zero_shot_by_tokens(images, labels, texts, templates=len(templates))
    classes = zero_shot_classifier(
        lambda texts: encode(texts).cpu(), list(numbers), templates, batch_size=size
    )
    return zero_shot_classification(images, labels, classes)
