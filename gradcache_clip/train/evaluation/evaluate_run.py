"""Evaluation of a run that was trained before."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gradcache_clip.train.config import Config, ConfigError
from gradcache_clip.train.evaluation.features import TokenFeatures, features_of
from gradcache_clip.train.evaluation.held_out import HeldOut, embed_held_out
from gradcache_clip.train.evaluation.labelled import LabelMetrics, check_labels, embed_labelled
from gradcache_clip.train.evaluation.recall import RetrievalMetrics, embed_dataset
from gradcache_clip.train.evaluation.zero_shot import (
    prompts_of,
    zero_shot_by_tokens,
    zero_shot_classification,
    zero_shot_classifier,
)
from gradcache_clip.train.run_folder import existing_run
from gradcache_clip.train.session import load_trained
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
) -> RetrievalMetrics | LabelMetrics:
    """Retrieval on held-out pairs with a run's newest checkpoint, printed as a table.

    For a run over views of images: how far the features of its tower tell classes apart.

    Args:
        run_folder: the `train.output` of the run.
        data: shards to evaluate on; those of the run's `data.validation` when None.
        device: where to run; an accelerator where there is one when None.
        folds: consecutive parts of the images over which recall is averaged (COCO 1K: 5); those of
            the run's `evaluation.folds` when None.
        templates: with any, images are also classified by their first captions put into them.

    Raises:
        ConfigError: the folder holds no run, no checkpoint, or no validation data is known; or
            templates are given for a run without captions.
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
            "data.validation: expected shards to evaluate on, got none; pass --data SHARDS"
        )
    if templates and config.data.views == 2:
        raise ConfigError(
            f"templates: expected none for {run.path}, whose run has learned no texts, got "
            f"{len(templates)}; leave them out"
        )
    if config.data.views == 2:
        check_labels(config)
    encoder, tokenizer, step = load_trained(config, run)
    console = console or Console()
    if tokenizer is None:
        labelled = embed_labelled(encoder, config)
        assert labelled is not None
        console.print(_label_table(labelled.metrics, f"{run.path}, step {step}"))
        return labelled.metrics
    held_out = embed_held_out(encoder, tokenizer, config)
    assert held_out is not None
    metrics = held_out.metrics(config.evaluation.recall_at, config.evaluation.folds)
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
    table = Table("direction", title=title)
    for k in metrics.image_to_text.recall:
        table.add_column(f"R@{k}", justify="right")
    first = min(metrics.image_to_text.chance)
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
