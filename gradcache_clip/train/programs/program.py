"""What a training program is to the loop: samples, encoder, loss and evaluation of one kind."""

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
"""Makes the context that encoders run in, such as autocast."""

Step = tuple[tuple[Any, ...], dict[str, Any]]
"""What each tower takes, and what the loss is told beside the features."""


class Evaluated(Protocol):
    """Features of a validation set, and what they are worth."""

    def scalars(self) -> dict[str, float]:
        """Names and figures for the log."""


class Program(ABC, Generic[Settings]):
    """One kind of training, built anew in each process of a run.

    The loop calls an encoder as `encoder(tower, inputs)`, once for each entry of the inputs, and
    the loss with the features of all.

    Args:
        config: of the run.
    """

    schema: ClassVar[type[Config]]
    """The configuration that this program reads."""

    reads_texts: ClassVar[bool] = True
    """Whether it needs a tokenizer."""

    def __init__(self, config: Settings) -> None:
        self.config = config

    @property
    def image_size(self) -> int | None:
        """Height and width in pixels; None where there are no images."""
        return None

    @abstractmethod
    def check_data(self) -> None:
        """Raise unless there is something to evaluate on, where a validation set is named."""

    @abstractmethod
    def loader(self, peers: Peers) -> Any:
        """Training batches of this process."""

    def texts(self) -> Iterable[str]:
        """The training set's texts, for learning a tokenizer."""
        raise NotImplementedError

    @abstractmethod
    def encoder(self, tokenizer: Tokenizer | None) -> nn.Module:
        """With fresh or pretrained weights, in train mode."""

    @abstractmethod
    def loss(self) -> nn.Module:
        """Over the whole batch of all processes."""

    @abstractmethod
    def inputs(self, batch: Any, tokenizer: Tokenizer | None, device: torch.device) -> Step:
        """A batch as the encoder and the loss take it."""

    def begin(self, encoder: Any, rank: int, context: Context) -> None:
        """Called once before the first step, with the context that encoders run in."""

    def after_step(self, encoder: nn.Module, loss: nn.Module) -> None:
        """Called after each optimizer step."""

    def on_save(self) -> None:
        """Called with each checkpoint: write what is kept beside it."""

    @abstractmethod
    def evaluate(self, encoder: Any, tokenizer: Tokenizer | None, peers: Peers) -> Evaluated | None:
        """The validation set, embedded by all processes, on the first; None elsewhere."""

    @abstractmethod
    def table(self, evaluated: Any, title: str) -> Table:
        """What came of an evaluation."""

    def preview(
        self, encoder: Any, tokenizer: Tokenizer | None, batches: Iterator[Any]
    ) -> Any | None:
        """Some samples of the next training batch, embedded for a picture."""
        return None

    @abstractmethod
    def draw(self, folder: Path, evaluated: Any | None, preview: Any | None) -> list[Path]:
        """Draw what was evaluated into a folder; returns the files."""

    @property
    def texts_of_inputs(self) -> Sequence[bool]:
        """Whether each input holds texts, which may be sorted by length."""
        return ()

    @property
    def candidates(self) -> int:
        """Among how many an input looks for its partner."""
        train = self.config.train
        return train.batch_size if train.grad_cache else train.chunk_size

    @property
    def chance_loss(self) -> float | None:
        """Loss of a model that knows nothing; None for the logarithm of `candidates`."""
        chance_loss: float | None = self.config.loss.chance_loss(self.candidates)
        return chance_loss

    @property
    def sort_by_length(self) -> list[ByLength | None] | None:
        """How chunks of each input are cut."""
        train = self.config.train
        if not (isinstance(train, TextTrainConfig) and train.sort_by_length):
            return None
        by_length = ByLength(train.chunk_tokens or None)
        return [by_length if is_text else None for is_text in self.texts_of_inputs]

    def _embedding(self, peers: Peers) -> EmbedOptions:
        """How held-out samples are embedded."""
        config = self.config
        return EmbedOptions(config.evaluation.batch_size, config.train.precision, peers)

    def _batch_device(self, device: torch.device) -> torch.device:
        on_host = self.config.train.batch_device == "host"
        return torch.device("cpu") if on_host else device

    def _tokens(
        self, texts: Sequence[str], tokenizer: Tokenizer | None, device: torch.device
    ) -> dict[str, Tensor]:
        assert tokenizer is not None
        # torch.compile wants one shape.
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
    """Batches of images of this process, for ever."""
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
        on_every_rank=peers.all,
    )


def read_samples(
    source: str, data: ImageData, *, captions: bool = False
) -> Iterator[DecodedSample]:
    """All samples of a source, for evaluation."""
    options = LoaderOptions(
        image_size=data.image_size,
        captions=captions,
        max_broken_share=data.max_broken_share,
        allow_url_schemes=tuple(data.allow_url_schemes),
    )
    return read_all(source, options=options)


def check_tokenizer(model: TextTowerConfig, tokenizer: str) -> None:
    """Raise ConfigError if a pretrained text tower would read tokens that it never learned."""
    if model.text_pretrained and tokenizer == "train":
        raise ConfigError(
            "data.tokenizer: expected the one that the weights of model.text were trained with "
            "(model.text_pretrained=true), got 'train', which learns another; use "
            f"data.tokenizer={model.text}"
        )


def to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies on a device; nothing waits for them."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def group_ids(groups: Sequence[str]) -> Tensor:
    """int64 (B,), equal for equal names on every process.

    Two different names share a number once in 2^64 pairs of names.

    Example:
        >>> numbers = group_ids(["cat", "dog", "cat"])
        >>> bool(numbers[0] == numbers[2]), bool(numbers[0] == numbers[1])
        (True, False)
    """
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in groups)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
