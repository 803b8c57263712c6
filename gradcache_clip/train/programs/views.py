"""Two views of each image, without captions: SimCLR, and MoCo with one modality."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from rich.table import Table
from torch import nn

from gradcache_clip.train.config import Config, EvaluationConfig
from gradcache_clip.train.config_data import ImageData
from gradcache_clip.train.config_loss import (
    MoCoConfig,
    NTXentConfig,
    ViewLoss,
    build_loss,
    check_widths,
)
from gradcache_clip.train.config_model import ViewConfig
from gradcache_clip.train.config_section import Section, changeable, expect
from gradcache_clip.train.data import Batch, ImageCaptionLoader
from gradcache_clip.train.data.augment import Augmentation
from gradcache_clip.train.data.shard_urls import find_shards
from gradcache_clip.train.evaluation.labelled import LabelledImages, check_labels, embed_labelled
from gradcache_clip.train.evaluation.tables import label_table
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.programs.momentum_queue import MomentumQueue, check_queue
from gradcache_clip.train.programs.program import Program, Step, image_loader, read_samples
from gradcache_clip.train.report.pictures import draw_neighbours
from gradcache_clip.train.tokenizer import Tokenizer
from gradcache_clip.train.views import build_view_encoder


class AugmentConfig(Section):
    """Augmentations of a view, besides its crop (`data.random_crop`).

    Defaults follow appendix A of SimCLR; MoCo v2 has `color_jitter: 0.5`.
    """

    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""

    color_jitter: float = Field(1.0, ge=0, le=1)
    """Strength of the colour jitter, 0 to 1."""

    grey: float = Field(0.2, ge=0, le=1)
    """Probability of conversion to greyscale."""

    blur: float = Field(0.5, ge=0, le=1)
    """Probability of a Gaussian blur."""


class LabelEvaluation(EvaluationConfig):
    """Classification of validation images by labelled training images."""

    knn_k: int = changeable(20, ge=1)
    """Number of nearest training images that vote on the label of a held-out image."""


class ViewsConfig(Config):
    """Two views of an image."""

    program: Literal["views"] = "views"
    """Two views of each image."""
    data: ImageData = ImageData()
    """Shards of images."""
    augment: AugmentConfig = AugmentConfig()
    """How the views differ."""
    model: ViewConfig = ViewConfig()
    """The image tower."""
    loss: ViewLoss = NTXentConfig()
    """The training objective."""
    evaluation: LabelEvaluation = LabelEvaluation()
    """Classification of held-out images."""

    @model_validator(mode="after")
    def _check_views(self) -> ViewsConfig:
        check_widths(getattr(self.loss, "matryoshka", []), self.model.feature_dim)
        check_queue(self)
        # Evaluation calls the tower without its wrapper, which needs unsharded weights.
        expect(self, "distributed.strategy", "ddp", "program=views")
        return self


class Views(Program[ViewsConfig]):
    """Trains one image tower on two augmented views of each image."""

    schema = ViewsConfig
    reads_texts = False

    def __init__(self, config: ViewsConfig) -> None:
        super().__init__(config)
        is_moco = isinstance(config.loss, MoCoConfig)
        self._queue = MomentumQueue(config, towers=1) if is_moco else None

    @property
    def image_size(self) -> int:
        return self.config.data.image_size

    def check_data(self) -> None:
        data = self.config.data
        find_shards(data.validation, allow_url_schemes=data.allow_url_schemes)
        for source in (data.validation, data.train):
            check_labels(read_samples(source, data), source)

    def loader(self, peers: Peers) -> ImageCaptionLoader:
        views = Augmentation(**self.config.augment.model_dump())
        return image_loader(self.config, self.config.data, peers, views=views)

    def encoder(self, tokenizer: Tokenizer | None) -> nn.Module:
        tower = build_view_encoder(self.config.model, image_size=self.config.data.image_size)
        return tower if self._queue is None else self._queue.encoder(tower)

    def loss(self) -> nn.Module:
        return build_loss(self.config, self._wrapped)

    def _wrapped(self, loss: Any) -> nn.Module:
        if self._queue is not None:
            return self._queue.loss(loss, self.config.model.feature_dim)
        plain: nn.Module = loss
        return plain

    def inputs(self, batch: Batch, tokenizer: Tokenizer | None, device: torch.device) -> Step:
        images = batch.images.to(self._batch_device(device), non_blocking=True)
        first, second = images.unbind(1)
        if self._queue is None:
            return (first, second), {}
        kwargs = self._queue.loss_kwargs(len(batch), device)
        return self._queue.inputs((first,), (second,)), kwargs

    def after_step(self, encoder: nn.Module, loss: nn.Module) -> None:
        if self._queue is not None:
            self._queue.after_step(encoder, loss)

    @property
    def candidates(self) -> int:
        if self._queue is not None:
            return self._queue.candidates
        return 2 * super().candidates - 1

    def evaluate(
        self, encoder: Any, tokenizer: Tokenizer | None, peers: Peers
    ) -> LabelledImages | None:
        data = self.config.data
        return embed_labelled(
            encoder.image_tower,
            read_samples(data.validation, data),
            read_samples(data.train, data),
            self._embedding(peers),
            neighbours=self.config.evaluation.knn_k,
        )

    def table(self, evaluated: LabelledImages, title: str) -> Table:
        return label_table(evaluated.metrics(), title)

    def draw(self, folder: Path, evaluated: Any | None, preview: Any | None) -> list[Path]:
        if evaluated is None:
            return []
        rows = self.config.evaluation.gallery
        return [draw_neighbours(evaluated, folder / "neighbours.png", rows=rows)]
