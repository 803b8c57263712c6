"""Interface between a training program and the loop: samples, encoder, loss and evaluation."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn

from gradcache_clip.cache import ByLength
from gradcache_clip.train.config import Config, TextTrainConfig
from gradcache_clip.train.config_data import ImageData
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_model import TextTowerConfig
from gradcache_clip.train.data import (
    DecodedSample,
    ImageCaptionLoader,
    LoaderOptions,
    read_all,
)
from gradcache_clip.train.data.augment import Augmentation
from gradcache_clip.train.evaluation.embed import EmbedOptions
from gradcache_clip.train.peers import Peers, rows_per_process
from gradcache_clip.train.tokenizer import Tokenizer

Settings = TypeVar("Settings", bound=Config)

Context = Callable[[], AbstractContextManager[Any]]
"""Returns the context that encoders run in, such as autocast."""

Step = tuple[tuple[Any, ...], dict[str, Any]]
"""Inputs of each tower, and further arguments of the loss."""


class Evaluated(Protocol):
    """Result of an evaluation."""

    def scalars(self) -> dict[str, float]:
        """Return metrics by name, for the log."""


class Program(ABC, Generic[Settings]):
    """One kind of training. Every process of a run builds its own.

    The loop calls `encoder(tower, inputs)` once for each entry of the inputs, and the loss with the
    features of all of them.

    Args:
        config: of the run.
    """

    schema: ClassVar[type[Config]]
    """Configuration class of this program."""

    reads_texts: ClassVar[bool] = True
    """Whether the program needs a tokenizer."""

    def __init__(self, config: Settings) -> None:
        self.config = config

    @property
    def image_size(self) -> int | None:
        """Height and width in pixels; None without images."""
        return None

    @abstractmethod
    def check_data(self) -> None:
        """Raise unless the validation set can be evaluated on; called only if there is one."""

    @abstractmethod
    def loader(self, peers: Peers) -> Any:
        """Return an endless loader of this process's training batches."""

    def texts(self) -> Iterable[str]:
        """Yield the texts of the training set, to train a tokenizer on."""
        raise NotImplementedError

    @abstractmethod
    def encoder(self, tokenizer: Tokenizer | None) -> nn.Module:
        """Build the encoder, with random or pretrained weights, in train mode."""

    @abstractmethod
    def loss(self) -> nn.Module:
        """Build the loss over the whole batch of all processes."""

    @abstractmethod
    def inputs(self, batch: Any, tokenizer: Tokenizer | None, device: torch.device) -> Step:
        """Convert a batch into inputs of the encoder and arguments of the loss."""

    def begin(self, encoder: Any, rank: int, context: Context) -> None:
        """Called once before the first step; `context` is the one that encoders run in."""

    def after_step(self, encoder: nn.Module, loss: nn.Module) -> None:
        """Called after each optimizer step."""

    def on_save(self) -> None:
        """Called with each checkpoint, to write files that live outside of it."""

    @abstractmethod
    def evaluate(self, encoder: Any, tokenizer: Tokenizer | None, peers: Peers) -> Evaluated | None:
        """Evaluate the validation set on all processes; returns None except on rank 0."""

    @abstractmethod
    def table(self, evaluated: Any, title: str) -> Table:
        """Return the result of an evaluation as a table."""

    def preview(
        self, encoder: Any, tokenizer: Tokenizer | None, batches: Iterator[Any]
    ) -> Any | None:
        """Embed some samples of the next training batch, for a picture."""
        return None

    @abstractmethod
    def draw(self, folder: Path, evaluated: Any | None, preview: Any | None) -> list[Path]:
        """Draw pictures of an evaluation and a preview into a folder; returns the files."""

    @property
    def texts_of_inputs(self) -> Sequence[bool]:
        """For each input, whether it holds texts, which may be sorted by length."""
        return ()

    @property
    def candidates(self) -> int:
        """Number of candidates that each sample is compared with."""
        train = self.config.train
        return train.batch_size if train.grad_cache else train.chunk_size

    @property
    def chance_loss(self) -> float | None:
        """Loss of chance, that of equal logits; None if it is log(candidates)."""
        chance_loss: float | None = self.config.loss.chance_loss(self.candidates)
        return chance_loss

    @property
    def sort_by_length(self) -> list[ByLength | None] | None:
        """How to cut each input into chunks; see `GradCache`."""
        train = self.config.train
        if not (isinstance(train, TextTrainConfig) and train.sort_by_length):
            return None
        by_length = ByLength(train.chunk_tokens or None)
        return [by_length if is_text else None for is_text in self.texts_of_inputs]

    def _embedding(self, peers: Peers) -> EmbedOptions:
        """Return the options for embedding held-out samples."""
        config = self.config
        return EmbedOptions(config.evaluation.batch_size, config.train.precision, peers)

    def _batch_device(self, device: torch.device) -> torch.device:
        on_host = self.config.train.batch_device == "host"
        return torch.device("cpu") if on_host else device

    def _tokens(
        self, texts: Sequence[str], tokenizer: Tokenizer | None, device: torch.device
    ) -> dict[str, Tensor]:
        assert tokenizer is not None
        # One shape for torch.compile, which would compile again for each other one.
        tokens = tokenizer(texts, pad_to_context=self.config.train.compile)
        return to_device(tokens, self._batch_device(device))


def image_loader(
    config: Config,
    data: ImageData,
    peers: Peers,
    *,
    captions: bool = False,
    views: Augmentation | None = None,
) -> ImageCaptionLoader:
    """Return an endless loader of this process's batches of images."""
    options = LoaderOptions(
        image_size=data.image_size,
        crop_scale=(data.random_crop, 1.0) if data.random_crop < 1 else None,
        augmentation=views,
        captions=captions,
        seed=config.train.seed,
        workers=data.workers,
        shuffle_buffer=data.shuffle_buffer,
        max_broken_share=data.max_broken_share,
        allow_url_schemes=tuple(data.allow_url_schemes),
    )
    return ImageCaptionLoader(
        data.train,
        rows_per_process(config.train.batch_size, peers.world_size),
        options=options,
        rank=peers.rank,
        world_size=peers.world_size,
    )


def read_samples(
    source: str, data: ImageData, *, captions: bool = False
) -> Iterator[DecodedSample]:
    """Yield all samples of a source once, for evaluation."""
    options = LoaderOptions(
        image_size=data.image_size,
        captions=captions,
        max_broken_share=data.max_broken_share,
        allow_url_schemes=tuple(data.allow_url_schemes),
    )
    return read_all(source, options=options)


def check_tokenizer(model: TextTowerConfig, tokenizer: str) -> None:
    """Raise ConfigError if a pretrained text tower would get token ids of another tokenizer."""
    if model.text_pretrained and tokenizer == "train":
        raise ConfigError(
            "data.tokenizer: expected the tokenizer of the pretrained model.text "
            "(model.text_pretrained=true), got 'train', which learns a new one; use "
            f"data.tokenizer={model.text}"
        )


def to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy tensors to a device asynchronously."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def group_ids(groups: Sequence[str]) -> Tensor:
    """Hash group names to int64 ids (B,), equal for equal names on every process.

    Python's own hash is salted per process. Two different names collide with probability 2^-64.

    Example:
        >>> numbers = group_ids(["cat", "dog", "cat"])
        >>> bool(numbers[0] == numbers[2]), bool(numbers[0] == numbers[1])
        (True, False)
    """
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in groups)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
