"""`gradcache-clip evaluate`: evaluate a finished or interrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gradcache_clip.train.config import Config
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.evaluation.embed import embed_dataset
from gradcache_clip.train.evaluation.features import TokenFeatures, features_of
from gradcache_clip.train.evaluation.held_out import HeldOut
from gradcache_clip.train.evaluation.held_out_texts import TextMetrics
from gradcache_clip.train.evaluation.labelled import LabelMetrics
from gradcache_clip.train.evaluation.recall import RetrievalMetrics
from gradcache_clip.train.evaluation.zero_shot import (
    prompts_of,
    zero_shot_by_tokens,
    zero_shot_classification,
    zero_shot_classifier,
)
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.programs import program_of
from gradcache_clip.train.run_folder import existing_run
from gradcache_clip.train.state import load_trained
from gradcache_clip.train.tokenizer import Tokenizer
from gradcache_clip.train.towers import DualEncoder


def evaluate_run(
    run_folder: str | Path,
    *,
    data: str | None = None,
    templates: tuple[str, ...] = (),
    device: str | None = None,
    folds: int | None = None,
    allow_url_schemes: tuple[str, ...] = (),
    console: Console | None = None,
) -> RetrievalMetrics | TextMetrics | LabelMetrics:
    """Evaluate the newest checkpoint of a run on held-out data, and print a table.

    Measures retrieval in both directions for pairs, classification by the features of the tower
    for views, and retrieval of documents by queries, per feature width, for texts.

    Args:
        run_folder: the `train.output` of the run.
        data: held-out data; the run's `data.validation` when None.
        device: as `train.device`; "auto" when None.
        folds: consecutive parts of the images to average recall over (COCO 1K: 5); the run's
            `evaluation.folds` when None.
        allow_url_schemes: URL schemes to open besides local files; the run's own configuration
            cannot allow any.
        templates: if given, also classify images zero-shot by their first captions put into these.

    Raises:
        ConfigError: the folder holds no run or no checkpoint, no validation data is known, or
            templates are given for a run without captions.
    """
    run, config = existing_run(run_folder)
    changes = {"data.allow_url_schemes": list(allow_url_schemes)} if allow_url_schemes else {}
    program = program_of(_changed(config.updated(changes), data, device, folds))
    config = program.config
    if not config.data.validation:
        raise ConfigError(
            "data.validation: expected something to evaluate on, got none; pass --data DATA"
        )
    if templates and config.program != "pairs":
        raise ConfigError(
            f"templates: expected none for {run.path}, which was trained on {config.program} and "
            f"not on captioned images, got {len(templates)}; leave them out"
        )
    program.check_data()
    encoder, tokenizer, step = load_trained(program, run)
    console = console or Console()
    found: Any = program.evaluate(encoder, tokenizer, Peers())
    console.print(program.table(found, f"{run.path}, step {step}"))
    if templates:
        assert tokenizer is not None
        for k, share in _zero_shot(encoder, tokenizer, config, found, templates).items():
            console.print(f"zero-shot accuracy among the first {k}: {share:.1%}")
    metrics: RetrievalMetrics | TextMetrics | LabelMetrics = found.metrics()
    return metrics


def _changed(config: Config, data: str | None, device: str | None, folds: int | None) -> Config:
    changes: dict[str, Any] = {"train.device": device or "auto"}
    if data is not None:
        changes["data.validation"] = data
    if folds is not None:
        if config.program != "pairs":
            raise ConfigError(
                f"folds: expected none for a run over {config.program}, got {folds}; leave it out"
            )
        changes["evaluation.folds"] = folds
    return config.updated(changes)


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

    # The classes are the distinct first captions.
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
