"""Texts alone: one tower that embeds queries and documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import model_validator
from rich.table import Table
from torch import nn

from gradcache_clip.train.config import Config, RetrievalConfig, TextTrainConfig
from gradcache_clip.train.config_data import TextData
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_loss import InfoNCEConfig, TextLoss, build_loss, check_widths
from gradcache_clip.train.config_model import TextTowerConfig
from gradcache_clip.train.config_section import expect
from gradcache_clip.train.data import (
    TextBatch,
    TextLoader,
    TextRows,
    find_text_files,
    read_all_texts,
)
from gradcache_clip.train.evaluation.held_out_texts import HeldOutTexts, embed_held_out_texts
from gradcache_clip.train.evaluation.tables import text_table
from gradcache_clip.train.peers import Peers, rows_per_process
from gradcache_clip.train.programs.program import Program, Step, check_tokenizer, group_ids
from gradcache_clip.train.programs.teacher import TeacherFeatures, distilled_loss
from gradcache_clip.train.report.pictures import draw_text_gallery
from gradcache_clip.train.texts import build_text_encoder
from gradcache_clip.train.tokenizer import Tokenizer


class TextsConfig(Config):
    """Queries and documents."""

    program: Literal["texts"] = "texts"
    """Texts alone."""
    data: TextData = TextData()
    """Lines of texts."""
    model: TextTowerConfig = TextTowerConfig()
    """The text tower; its width is the feature width."""
    loss: TextLoss = InfoNCEConfig()
    """The training objective."""
    train: TextTrainConfig = TextTrainConfig()
    """The loop."""
    evaluation: RetrievalConfig = RetrievalConfig()
    """Retrieval of held-out documents."""

    @model_validator(mode="after")
    def _check_texts(self) -> TextsConfig:
        # Plain accumulation would cut ids like queries, but they hold documents, then negatives.
        expect(self, "train.grad_cache", True, "program=texts")
        check_tokenizer(self.model, self.data.tokenizer)
        return self


class Texts(Program[TextsConfig]):
    """Trains one text tower on queries, their documents and hard negatives."""

    schema = TextsConfig

    def __init__(self, config: TextsConfig) -> None:
        super().__init__(config)
        self._columns = min(3, len(config.data.text_fields))
        self._teacher: TeacherFeatures | None = None

    @property
    def texts_of_inputs(self) -> Sequence[bool]:
        return [True] * self._columns

    def check_data(self) -> None:
        data = self.config.data
        TextRows(data.validation, data.text_fields[:2])

    def loader(self, peers: Peers) -> TextLoader:
        config, data = self.config, self.config.data
        if data.validation:
            _check_apart(data)
        return TextLoader(
            data.train,
            rows_per_process(config.train.batch_size, peers.world_size),
            fields=data.text_fields,
            prompts=data.text_prompts,
            seed=config.train.seed,
            workers=data.workers,
            max_broken_share=data.max_broken_share,
            rank=peers.rank,
            world_size=peers.world_size,
        )

    def texts(self) -> Iterable[str]:
        data = self.config.data
        rows = read_all_texts(data.train, data.text_fields, max_broken_share=data.max_broken_share)
        return (text for row in rows for text in row)

    def encoder(self, tokenizer: Tokenizer | None) -> nn.Module:
        assert tokenizer is not None
        encoder = build_text_encoder(
            self.config.model,
            context_length=self.config.data.context_length,
            vocab_size=tokenizer.vocab_size,
            pad_token_id=tokenizer.pad_token_id,
        )
        check_widths(self.config.loss.matryoshka, encoder.text_tower.width)
        return encoder

    def loss(self) -> nn.Module:
        if not self.config.loss.teacher:
            return build_loss(self.config)
        self._teacher = TeacherFeatures(self.config.loss.teacher)
        return distilled_loss(self.config, self._teacher)

    def inputs(self, batch: TextBatch, tokenizer: Tokenizer | None, device: torch.device) -> Step:
        inputs = tuple(self._tokens(column, tokenizer, device) for column in batch.texts)
        given: dict[str, Any] = {}
        of_queries = self.config.loss.name == "retrieval"
        if of_queries and len(batch.texts) > 2:
            given["negatives_per_query"] = len(batch.texts[2]) // len(batch.texts[0])
        if self.config.loss.positives == "ignore":
            # Those of the documents come first, then those of hard negatives.
            groups = batch.groups[: len(batch.texts[0])] if of_queries else batch.groups
            given["ids"] = group_ids(groups).to(device, non_blocking=True)
        if self._teacher is not None:
            given |= self._teacher.of_batch(batch, self.config.data.text_prompts, device)
        return inputs, given

    @property
    def candidates(self) -> int:
        return super().candidates * (len(self.config.data.text_fields) - 1)

    @property
    def chance_loss(self) -> float | None:
        loss, chance_loss = self.config.loss, super().chance_loss
        if not loss.teacher:
            return chance_loss
        of_documents = max(1, len(loss.matryoshka)) * math.log(self.config.train.batch_size)
        return (chance_loss or math.log(self.candidates)) + loss.teacher_weight * of_documents

    def evaluate(
        self, encoder: Any, tokenizer: Tokenizer | None, peers: Peers
    ) -> HeldOutTexts | None:
        assert tokenizer is not None
        config, data = self.config, self.config.data
        rows = read_all_texts(
            data.validation,
            data.text_fields[:2],
            prompts=data.text_prompts,
            max_broken_share=data.max_broken_share,
        )
        return embed_held_out_texts(
            encoder,
            tokenizer,
            rows,
            self._embedding(peers),
            widths=config.loss.matryoshka,
            recall_at=config.evaluation.recall_at,
        )

    def table(self, evaluated: HeldOutTexts, title: str) -> Table:
        return text_table(evaluated.metrics(), title)

    def draw(self, folder: Path, evaluated: Any | None, preview: Any | None) -> list[Path]:
        if evaluated is None:
            return []
        rows = self.config.evaluation.gallery
        return [draw_text_gallery(evaluated, folder / "gallery.png", rows=rows)]


def _check_apart(data: TextData) -> None:
    held_out = {file.resolve() for file in find_text_files(data.validation)}
    shared = [file for file in find_text_files(data.train) if file.resolve() in held_out]
    if shared:
        raise ConfigError(
            f"data.validation: expected other files than data.train, got {shared[0]} in both; name "
            "files instead of a folder that holds both, or leave data.validation out"
        )
