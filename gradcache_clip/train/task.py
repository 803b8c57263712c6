"""What the samples of a run are: how they are read, encoded, and what is measured of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from gradcache_clip.train.config import Config, ConfigError
from gradcache_clip.train.data import (
    DecodedSample,
    ImageCaptionLoader,
    LoaderOptions,
    read_all,
    read_captions,
)
from gradcache_clip.train.data.augment import Augmentation
from gradcache_clip.train.data.resumable import ResumableLoader
from gradcache_clip.train.data.shard_urls import find_shards
from gradcache_clip.train.data.text_lines import TextLines, find_text_files, read_all_texts
from gradcache_clip.train.data.text_loader import TextLoader
from gradcache_clip.train.engine import rows_of_a_process
from gradcache_clip.train.evaluation.embed import EmbedOptions
from gradcache_clip.train.evaluation.held_out import HeldOut, embed_batch, embed_held_out
from gradcache_clip.train.evaluation.held_out_texts import HeldOutTexts, embed_held_out_texts
from gradcache_clip.train.evaluation.labelled import LabelledImages, check_labels, embed_labelled
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.texts import build_text_encoder
from gradcache_clip.train.tokenizer import Tokenizer
from gradcache_clip.train.towers import build_towers
from gradcache_clip.train.views import build_view_encoder

Evaluated = HeldOut | HeldOutTexts | LabelledImages


class Task:
    """Images and their captions. Others say what they do differently.

    Args:
        config: of the run.
    """

    has_images = has_texts = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def check_validation(self) -> None:
        """Raise FileNotFoundError or ValueError unless there is something to evaluate on."""
        data = self.config.data
        find_shards(data.validation, allow_url_schemes=data.allow_url_schemes)

    def loader(self, peers: Peers) -> ResumableLoader:
        """Training batches of this process."""
        config, data = self.config, self.config.data
        options = LoaderOptions(
            image_size=data.image_size,
            crop_scale=(data.random_crop, 1.0) if data.random_crop < 1 else None,
            augmentation=self._augmentation(),
            captions=self.has_texts,
            seed=config.train.seed,
            workers=data.workers,
            shuffle_buffer=data.shuffle_buffer,
            max_broken_share=data.max_broken_share,
            allow_url_schemes=tuple(data.allow_url_schemes),
        )
        return ImageCaptionLoader(
            data.train,
            rows_of_a_process(config, peers.world_size),
            options=options,
            rank=peers.rank,
            world_size=peers.world_size,
            on_every_rank=peers.all,
        )

    def _augmentation(self) -> Augmentation | None:
        return None

    def texts(self) -> Iterable[str]:
        """Of the training set, for learning a tokenizer."""
        data = self.config.data
        return read_captions(data.train, allow_url_schemes=data.allow_url_schemes)

    def towers(self, tokenizer: Tokenizer | None) -> Any:
        """With fresh or pretrained weights."""
        assert tokenizer is not None
        size = self.config.data.image_size
        return build_towers(self.config.model, image_size=size, **self._sizes(tokenizer))

    def _sizes(self, tokenizer: Tokenizer) -> dict[str, int]:
        return {
            "context_length": self.config.data.context_length,
            "vocab_size": tokenizer.vocab_size,
            "pad_token_id": tokenizer.pad_token_id,
        }

    def embed_held_out(
        self, encoder: Any, tokenizer: Tokenizer | None, peers: Peers | None = None
    ) -> Evaluated | None:
        """The validation set, embedded by all processes, on the first."""
        assert tokenizer is not None
        evaluation = self.config.evaluation
        return embed_held_out(
            encoder,
            tokenizer,
            self.samples(self.config.data.validation),
            self.embedding(peers),
            recall_at=evaluation.recall_at,
            folds=evaluation.folds,
        )

    def samples(self, source: str) -> Iterator[DecodedSample]:
        """All samples of a source, for evaluation."""
        data = self.config.data
        options = LoaderOptions(
            image_size=data.image_size,
            captions=self.has_texts,
            max_broken_share=data.max_broken_share,
            allow_url_schemes=tuple(data.allow_url_schemes),
        )
        return read_all(source, options=options)

    def embedding(self, peers: Peers | None) -> EmbedOptions:
        """How held-out samples are embedded."""
        config = self.config
        return EmbedOptions(config.evaluation.batch_size, config.train.precision, peers or Peers())

    def embed_batch(
        self, encoder: Any, tokenizer: Tokenizer | None, batches: Iterator[Any], pairs: int
    ) -> HeldOut | None:
        """Some pairs of the next training batch, for a picture; None where there is none."""
        assert tokenizer is not None
        precision = self.config.train.precision
        return embed_batch(encoder, tokenizer, next(batches), pairs, precision=precision)


class Views(Task):
    """Two views of each image, and its label for evaluation."""

    has_texts = False

    def check_validation(self) -> None:
        super().check_validation()
        for source in (self.config.data.validation, self.config.data.train):
            check_labels(self.samples(source), source)

    def _augmentation(self) -> Augmentation:
        return Augmentation(**vars(self.config.augment))

    def towers(self, tokenizer: Tokenizer | None) -> Any:
        return build_view_encoder(self.config.model, image_size=self.config.data.image_size)

    def embed_held_out(
        self, encoder: Any, tokenizer: Tokenizer | None, peers: Peers | None = None
    ) -> LabelledImages | None:
        data = self.config.data
        return embed_labelled(
            encoder.image_tower,
            self.samples(data.validation),
            self.samples(data.train),
            self.embedding(peers),
            neighbours=self.config.evaluation.neighbours,
        )

    def embed_batch(
        self, encoder: Any, tokenizer: Tokenizer | None, batches: Iterator[Any], pairs: int
    ) -> None:
        return None


class Texts(Task):
    """Queries, their documents, and perhaps hard negatives; no images."""

    has_images = False

    def check_validation(self) -> None:
        data = self.config.data
        TextLines(data.validation, data.text_fields[:2])

    def _check_apart(self) -> None:
        data = self.config.data
        held_out = {file.resolve() for file in find_text_files(data.validation)}
        shared = [file for file in find_text_files(data.train) if file.resolve() in held_out]
        if shared:
            raise ConfigError(
                f"data.validation: expected other files than those of data.train, got {shared[0]} "
                "in both; name a file where a folder holds both, or leave data.validation out"
            )

    def loader(self, peers: Peers) -> ResumableLoader:
        config, data = self.config, self.config.data
        if data.validation:
            self._check_apart()
        return TextLoader(
            data.train,
            rows_of_a_process(config, peers.world_size),
            fields=data.text_fields,
            prompts=data.text_prompts,
            seed=config.train.seed,
            workers=data.workers,
            max_broken_share=data.max_broken_share,
            rank=peers.rank,
            world_size=peers.world_size,
            on_every_rank=peers.all,
        )

    def texts(self) -> Iterable[str]:
        data = self.config.data
        share = data.max_broken_share
        for row in read_all_texts(data.train, data.text_fields, max_broken_share=share):
            yield from row

    def towers(self, tokenizer: Tokenizer | None) -> Any:
        assert tokenizer is not None
        return build_text_encoder(self.config.model, **self._sizes(tokenizer))

    def embed_held_out(
        self, encoder: Any, tokenizer: Tokenizer | None, peers: Peers | None = None
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
            self.embedding(peers),
            widths=config.loss.matryoshka,
            recall_at=config.evaluation.recall_at,
        )

    def embed_batch(
        self, encoder: Any, tokenizer: Tokenizer | None, batches: Iterator[Any], pairs: int
    ) -> None:
        return None


def task_of(config: Config) -> Task:
    """What the data of a configuration are."""
    if config.data.text_fields:
        return Texts(config)
    return Views(config) if config.data.views == 2 else Task(config)
