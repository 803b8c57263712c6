"""Evaluation of a run that was trained before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gradcache_clip.train.config import Config, ConfigError
from gradcache_clip.train.evaluation.held_out import HeldOut, embed_held_out
from gradcache_clip.train.evaluation.recall import RetrievalMetrics
from gradcache_clip.train.evaluation.zero_shot import zero_shot_classification, zero_shot_classifier
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
    console: Console | None = None,
) -> RetrievalMetrics:
    """Retrieval on held-out pairs with a run's newest checkpoint, printed as a table.

    Args:
        run_folder: the `train.output` of the run.
        data: shards to evaluate on; those of the run's `data.validation` when None.
        device: where to run; an accelerator where there is one when None.
        templates: with any, images are also classified by their first captions put into them.

    Raises:
        ConfigError: the folder holds no run, no checkpoint, or no validation data is known.
    """
    run, config = existing_run(run_folder)
    config.train.device = device or "auto"
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=data))
    if not config.data.validation:
        raise ConfigError(
            "data.validation: expected shards to evaluate on, got none; pass --data SHARDS"
        )
    encoder, tokenizer, step = load_trained(config, run)
    held_out = embed_held_out(encoder, tokenizer, config)
    assert held_out is not None
    metrics = held_out.metrics(config.evaluation.recall_at)
    console = console or Console()
    console.print(_table(metrics, f"{run.path}, step {step}"))
    if templates:
        for k, share in _zero_shot(encoder, tokenizer, config, held_out, templates).items():
            console.print(f"zero-shot accuracy among the first {k}: {share:.1%}")
    return metrics


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
    device = next(encoder.parameters()).device
    encoder.eval()

    def encode(texts: list[str]) -> Tensor:
        tokens = {name: tensor.to(device) for name, tensor in tokenizer(texts).items()}
        return encoder.encode_text(tokens).cpu()

    numbers = {name: n for n, name in enumerate(dict.fromkeys(held_out.image_captions))}
    classes = zero_shot_classifier(
        encode, list(numbers), templates, batch_size=config.evaluation.batch_size
    )
    labels = torch.tensor([numbers[caption] for caption in held_out.image_captions])
    return zero_shot_classification(held_out.image_features, labels, classes)
