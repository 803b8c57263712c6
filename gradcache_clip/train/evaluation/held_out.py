"""Held-out pairs through both towers: features, who belongs to whom, and recall."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcache_clip.train.config import Config, EvaluationConfig
from gradcache_clip.train.data import Batch, DecodedSample, LoaderOptions, read_all
from gradcache_clip.train.evaluation.embed import embed_dataset
from gradcache_clip.train.evaluation.features import Features, features_of
from gradcache_clip.train.evaluation.folds import recall_in_folds
from gradcache_clip.train.evaluation.recall import RetrievalMetrics
from gradcache_clip.train.evaluation.sharding import interleave, shard_batches
from gradcache_clip.train.modalities import IMAGE, TEXT
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.precision import autocast
from gradcache_clip.train.tokenizer import Tokenizer

_THUMBNAIL_SIZE = 64


@dataclass(frozen=True)
class HeldOut:
    """Features of a validation set, or of some pairs of a batch. N images, M texts.

    Args:
        image_features, text_features: of N and M samples, vectors L2-normalised fp32, on the CPU.
        image_ids, text_ids: (N,) and (M,); equal where image and text belong together.
        image_captions: the first caption of each image.
        texts: M captions.
        thumbnails: uint8 (N, 3, height, width), at most 64 pixels.
    """

    image_features: Features
    text_features: Features
    image_ids: Tensor
    text_ids: Tensor
    image_captions: list[str]
    texts: list[str]
    thumbnails: Tensor

    def scalars(self, evaluation: EvaluationConfig) -> dict[str, float]:
        """What is logged of it."""
        return self.metrics(evaluation.recall_at, evaluation.folds).to_scalars()

    def metrics(self, ks: Iterable[int], folds: int = 1) -> RetrievalMetrics:
        """Recall@k in both directions, or its mean over consecutive folds of the images."""
        return recall_in_folds(
            self.image_features,
            self.text_features,
            image_ids=self.image_ids,
            text_ids=self.text_ids,
            folds=folds,
            ks=tuple(ks),
        )


def embed_held_out(
    encoder: nn.Module, tokenizer: Tokenizer, config: Config, peers: Peers | None = None
) -> HeldOut | None:
    """Embed every validation image and every different caption once, in evaluation mode.

    Images of one group share its captions: each is a right answer for all of them. Several
    processes embed a batch in turn, and all of them call this function.

    Args:
        encoder: called as `encoder(tower, inputs)`.
        tokenizer, config: of the run.
        peers: the processes; this one alone when None.

    Returns:
        The features, on the first process; None on the others.

    Raises:
        FileNotFoundError, ValueError: the validation set is missing, empty or broken.
    """
    peers = peers or Peers()
    device = next(encoder.parameters()).device
    size = config.evaluation.batch_size
    options = reading_options(config)
    samples: list[tuple[str, tuple[str, ...]]] = []
    thumbnails: list[Tensor] = []

    def image_batches() -> Iterator[Tensor]:
        for batch in batched(read_all(config.data.validation, options=options), size):
            samples.extend((sample.group, sample.captions) for sample in batch)
            images = torch.stack([sample.image for sample in batch])
            if peers.is_first:
                thumbnails.append(thumbnails_of(images))
            yield images

    def embedded(tower: int, batches: Iterator[Any], name: str) -> list[list[Tensor]]:
        mine = (_to(device, batch) for batch in shard_batches(batches, peers))
        parts = embed_dataset(
            partial(encoder, tower), mine, description=name, progress=peers.is_first
        )
        return peers.gather_to_rank0([part.cpu() for part in parts])

    with evaluating(encoder), autocast(config.train.precision, device):
        images = embedded(IMAGE, image_batches(), "images")
        ids, texts, text_ids = _texts_of(samples)
        tokens = (tokenizer(chunk) for chunk in batched(iter(texts), size))
        text_features = embedded(TEXT, tokens, "texts")
    if not peers.is_first:
        return None
    return HeldOut(
        image_features=_joined(images, size, len(samples)),
        text_features=_joined(text_features, size, len(texts)),
        image_ids=ids,
        text_ids=text_ids,
        image_captions=[captions[0] for _, captions in samples],
        texts=texts,
        thumbnails=torch.cat(thumbnails),
    )


@torch.no_grad()
def embed_batch(
    encoder: nn.Module, tokenizer: Tokenizer, config: Config, batch: Batch, pairs: int
) -> HeldOut:
    """The first pairs of different groups in a training batch, so that only row i suits text i."""
    first_of: dict[str, int] = {}
    for row, group in enumerate(batch.groups):
        first_of.setdefault(group, row)
    rows = list(first_of.values())[:pairs]
    captions = [batch.captions[row] for row in rows]
    device = next(encoder.parameters()).device
    with evaluating(encoder), autocast(config.train.precision, device):
        images = encoder(IMAGE, batch.images[rows].to(device))
        texts = encoder(TEXT, _to(device, tokenizer(captions)))
    ids = torch.arange(len(rows))
    thumbnails = thumbnails_of(batch.images[rows])
    features = features_of(images), features_of(texts)
    return HeldOut(*features, ids, ids, captions, captions, thumbnails)


@contextmanager
def evaluating(encoder: nn.Module) -> Iterator[None]:
    """In evaluation mode inside the block."""
    was_training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(was_training)


def _to(device: torch.device, inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def reading_options(config: Config) -> LoaderOptions:
    """How samples are read for evaluation."""
    return LoaderOptions(
        image_size=config.data.image_size,
        captions=config.data.views == 1,
        max_broken_share=config.data.max_broken_share,
        allow_url_schemes=tuple(config.data.allow_url_schemes),
    )


def _texts_of(samples: list[tuple[str, tuple[str, ...]]]) -> tuple[Tensor, list[str], Tensor]:
    """Ids of the images, the different texts of all groups, and the ids of those."""
    numbers: dict[str, int] = {}
    owners: dict[tuple[int, str], None] = {}
    image_ids = []
    for group, captions in samples:
        number = numbers.setdefault(group, len(numbers))
        image_ids.append(number)
        owners.update(dict.fromkeys((number, caption) for caption in captions))
    texts = [caption for _, caption in owners]
    text_ids = torch.tensor([number for number, _ in owners])
    return torch.tensor(image_ids), texts, text_ids


def batched(items: Iterator[DecodedSample] | Iterator[str], size: int) -> Iterator[list]:
    """Lists of `size` items; the last may be shorter."""
    while batch := list(islice(items, size)):
        yield batch


def _joined(parts: list[list[Tensor]], size: int, rows: int) -> Features:
    """The features of all rows, from the parts of them that each process has embedded."""
    return features_of(tuple(interleave(part, size, rows) for part in zip(*parts, strict=True)))


def thumbnails_of(images: Tensor) -> Tensor:
    """uint8 (N, 3, height, width), made smaller where larger than a thumbnail."""
    if max(images.shape[-2:]) <= _THUMBNAIL_SIZE:
        return images
    small = F.interpolate(images.float(), size=_THUMBNAIL_SIZE, mode="area")
    return small.round().to(torch.uint8)
