"""Images and their captions: CLIP, SigLIP, FILIP, LiT, BEiT-3, and MoCo with two modalities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import model_validator
from rich.table import Table
from torch import Tensor, nn

from gradcache_clip.losses import LateInteractionLoss
from gradcache_clip.train.config import Config, RetrievalConfig, TextTrainConfig
from gradcache_clip.train.config_data import PairData
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_loss import (
    ClipConfig,
    LateInteractionConfig,
    MoCoConfig,
    PairLoss,
    build_loss,
    check_widths,
)
from gradcache_clip.train.config_model import DualConfig, PairModel
from gradcache_clip.train.config_section import changeable, expect
from gradcache_clip.train.data import Batch, ImageCaptionLoader, read_captions
from gradcache_clip.train.data.shard_urls import find_shards
from gradcache_clip.train.evaluation.held_out import HeldOut, embed_batch, embed_held_out
from gradcache_clip.train.evaluation.tables import pair_table
from gradcache_clip.train.frozen_features import FrozenFeatures
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.programs.momentum_queue import MomentumQueue, check_queue
from gradcache_clip.train.programs.program import (
    Context,
    Program,
    Step,
    check_tokenizer,
    group_ids,
    image_loader,
    read_samples,
)
from gradcache_clip.train.report.pictures import SIMILARITY_PAIRS, draw_gallery, draw_similarity
from gradcache_clip.train.token_towers import TokenEncoder, TokenLoss
from gradcache_clip.train.tokenizer import Tokenizer
from gradcache_clip.train.towers import build_towers

# The argument of the losses that takes the group ids, by `loss.positives`.
_ARGUMENT = {"group": "labels", "ignore": "ids"}


class PairEvaluation(RetrievalConfig):
    """Retrieval on the validation pairs."""

    folds: int = changeable(1, ge=1)
    """Number of consecutive parts of the validation images to average over; 5 for COCO 1K."""


class PairsConfig(Config):
    """Images and captions."""

    program: Literal["pairs"] = "pairs"
    """Images and captions."""
    data: PairData = PairData()
    """Shards and how they are read."""
    model: PairModel = DualConfig()
    """The towers."""
    loss: PairLoss = ClipConfig()
    """The training objective."""
    train: TextTrainConfig = TextTrainConfig()
    """The loop."""
    evaluation: PairEvaluation = PairEvaluation()
    """Retrieval on held-out pairs."""

    @model_validator(mode="after")
    def _check_pairs(self) -> PairsConfig:
        check_widths(getattr(self.loss, "matryoshka", []), self.model.feature_dim)
        check_queue(self)
        if isinstance(self.loss, LateInteractionConfig):
            # The Multiway Transformer returns one vector per image or text.
            expect(self, "model.architecture", "dual", "loss.name=late_interaction")
        if isinstance(self.loss, MoCoConfig):
            expect(self, "train.sort_by_length", False, "loss.name=moco")
        if isinstance(self.model, DualConfig):
            self._check_towers(self.model)
        return self

    def _check_towers(self, model: DualConfig) -> None:
        if isinstance(self.loss, MoCoConfig):
            expect(self, "model.freeze", "", "loss.name=moco")
        check_tokenizer(model, self.data.tokenizer)
        if model.frozen_features:
            # Features are cached by pixels, which random crops change in every epoch.
            expect(self, "data.random_crop", 1.0, "model.frozen_features")
            expect(self, "distributed.strategy", "ddp", "model.frozen_features")
            if self.loss.name not in ("clip", "siglip"):
                raise ConfigError(
                    f"loss.name: expected clip or siglip with model.frozen_features, got "
                    f"{self.loss.name!r}; change one of the two"
                )


class Pairs(Program[PairsConfig]):
    """Trains an image tower and a text tower on images with captions."""

    schema = PairsConfig

    def __init__(self, config: PairsConfig) -> None:
        super().__init__(config)
        is_moco = isinstance(config.loss, MoCoConfig)
        self._queue = MomentumQueue(config, towers=2) if is_moco else None
        self._features: FrozenFeatures | None = None

    @property
    def image_size(self) -> int:
        return self.config.data.image_size

    @property
    def texts_of_inputs(self) -> Sequence[bool]:
        return False, True

    def check_data(self) -> None:
        data = self.config.data
        find_shards(data.validation, allow_url_schemes=data.allow_url_schemes)

    def loader(self, peers: Peers) -> ImageCaptionLoader:
        return image_loader(self.config, self.config.data, peers, captions=True)

    def texts(self) -> Iterable[str]:
        data = self.config.data
        return read_captions(data.train, allow_url_schemes=data.allow_url_schemes)

    def encoder(self, tokenizer: Tokenizer | None) -> nn.Module:
        assert tokenizer is not None
        data, loss = self.config.data, self.config.loss
        towers = build_towers(
            self.config.model,
            image_size=data.image_size,
            context_length=data.context_length,
            vocab_size=tokenizer.vocab_size,
            pad_token_id=tokenizer.pad_token_id,
        )
        if self._queue is not None:
            return self._queue.encoder(towers)
        is_late = isinstance(loss, LateInteractionConfig)
        return TokenEncoder(towers, data.context_length) if is_late else towers

    def loss(self) -> nn.Module:
        return build_loss(self.config, self._wrapped)

    def _wrapped(self, loss: Any) -> nn.Module:
        if self._queue is not None:
            return self._queue.loss(loss, self.config.model.feature_dim)
        return TokenLoss(loss) if isinstance(loss, LateInteractionLoss) else loss

    def begin(self, encoder: Any, rank: int, context: Context) -> None:
        folder = getattr(self.config.model, "frozen_features", "")
        if folder:
            self._features = FrozenFeatures(
                encoder.image_tower,
                Path(folder),
                rank=rank,
                chunk_size=self.config.train.chunk_size,
                context=context,
                setting=f"{self.config.data.image_size} {self.config.train.precision}",
            )

    def inputs(self, batch: Batch, tokenizer: Tokenizer | None, device: torch.device) -> Step:
        images = batch.images if self._features is None else self._features.of(batch.images)
        images = images.to(self._batch_device(device), non_blocking=True)
        pair = images, self._tokens(batch.captions, tokenizer, device)
        if self._queue is not None:
            kwargs = self._queue.loss_kwargs(len(batch), device)
            return self._queue.inputs(pair, pair), kwargs
        return pair, self._loss_kwargs(batch.groups, device)

    def _loss_kwargs(self, groups: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        name = _ARGUMENT.get(getattr(self.config.loss, "positives", ""))
        return {name: group_ids(groups).to(device, non_blocking=True)} if name else {}

    def after_step(self, encoder: nn.Module, loss: nn.Module) -> None:
        if self._queue is not None:
            self._queue.after_step(encoder, loss)

    def on_save(self) -> None:
        if self._features is not None:
            self._features.save()

    @property
    def candidates(self) -> int:
        return super().candidates if self._queue is None else self._queue.candidates

    def evaluate(self, encoder: Any, tokenizer: Tokenizer | None, peers: Peers) -> HeldOut | None:
        assert tokenizer is not None
        evaluation = self.config.evaluation
        return embed_held_out(
            encoder,
            tokenizer,
            read_samples(self.config.data.validation, self.config.data, captions=True),
            self._embedding(peers),
            recall_at=evaluation.recall_at,
            folds=evaluation.folds,
        )

    def table(self, evaluated: HeldOut, title: str) -> Table:
        folds = self.config.evaluation.folds
        of_folds = f", mean of {folds} folds" if folds > 1 else ""
        return pair_table(evaluated.metrics(), f"{title}{of_folds}")

    def preview(
        self, encoder: Any, tokenizer: Tokenizer | None, batches: Iterator[Batch]
    ) -> HeldOut:
        assert tokenizer is not None
        precision = self.config.train.precision
        return embed_batch(encoder, tokenizer, next(batches), SIMILARITY_PAIRS, precision=precision)

    def draw(self, folder: Path, evaluated: Any | None, preview: Any | None) -> list[Path]:
        files = []
        if preview is not None and len(preview.texts) >= 2:
            path = folder / "similarity.png"
            files.append(draw_similarity(preview, path, of="Pairs of a training batch"))
        if evaluated is None:
            return files
        if len(evaluated.image_ids.unique()) >= 2:
            files.append(draw_similarity(evaluated, folder / "similarity_held_out.png"))
        rows = self.config.evaluation.gallery
        return [*files, draw_gallery(evaluated, folder / "gallery.png", rows=rows)]
