"""Held-out pairs through both towers: features, who belongs to whom, and recall."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from gradcache_clip.train.config import Config
from gradcache_clip.train.data import Batch, DecodedSample, LoaderOptions, read_all
from gradcache_clip.train.evaluation.recall import RetrievalMetrics, embed_dataset, recall_at_k
from gradcache_clip.train.step import autocast
from gradcache_clip.train.tokenizer import Tokenizer
from gradcache_clip.train.towers import DualEncoder

_THUMBNAIL_SIZE = 64


@dataclass(frozen=True)
class HeldOut:
    """Features of a validation set, or of some pairs of a batch. N images, M texts, D width.

    Args:
        image_features, text_features: (N, D) and (M, D), L2-normalised fp32, on the CPU.
        image_ids, text_ids: (N,) and (M,); equal where image and text belong together.
        image_captions: the first caption of each image.
        texts: M captions.
        thumbnails: uint8 (N, 3, height, width), at most 64 pixels.
    """

    image_features: Tensor
    text_features: Tensor
    image_ids: Tensor
    text_ids: Tensor
    image_captions: list[str]
    texts: list[str]
    thumbnails: Tensor

    def metrics(self, ks: Iterable[int]) -> RetrievalMetrics:
        """Recall@k in both directions."""
        return recall_at_k(
            self.image_features,
            self.text_features,
            image_ids=self.image_ids,
            text_ids=self.text_ids,
            ks=tuple(ks),
        )


def embed_held_out(encoder: DualEncoder, tokenizer: Tokenizer, config: Config) -> HeldOut:
    """Embed every validation image and every different caption once, in evaluation mode.

    Images of one group share its captions: each is a right answer for all of them.

    Raises:
        FileNotFoundError, ValueError: the validation set is missing, empty or broken.
    """
    device = next(encoder.parameters()).device
    size = config.evaluation.batch_size
    samples: list[tuple[str, tuple[str, ...]]] = []
    thumbnails: list[Tensor] = []

    def image_batches() -> Iterator[Tensor]:
        for batch in _batched(read_all(config.data.validation, options=_options(config)), size):
            samples.extend((sample.group, sample.captions) for sample in batch)
            images = torch.stack([sample.image for sample in batch])
            thumbnails.append(_thumbnails(images))
            yield images.to(device)

    was_training = encoder.training
    encoder.eval()
    try:
        with autocast(config.train.precision, device):
            (images,) = embed_dataset(encoder.encode_image, image_batches(), description="images")
            ids, texts, text_ids = _texts_of(samples)
            tokens = (tokenizer(chunk) for chunk in _batched(iter(texts), size))
            batches = ({name: t.to(device) for name, t in batch.items()} for batch in tokens)
            (text_features,) = embed_dataset(
                encoder.encode_text, batches, total=len(texts), description="texts"
            )
    finally:
        encoder.train(was_training)
    return HeldOut(
        image_features=_unit(images),
        text_features=_unit(text_features),
        image_ids=ids,
        text_ids=text_ids,
        image_captions=[captions[0] for _, captions in samples],
        texts=texts,
        thumbnails=torch.cat(thumbnails),
    )


@torch.no_grad()
def embed_batch(
    encoder: DualEncoder, tokenizer: Tokenizer, config: Config, batch: Batch, pairs: int
) -> HeldOut:
    """The first pairs of different groups in a training batch, so that only row i suits text i."""
    first_of: dict[str, int] = {}
    for row, group in enumerate(batch.groups):
        first_of.setdefault(group, row)
    rows = list(first_of.values())[:pairs]
    captions = [batch.captions[row] for row in rows]
    device = next(encoder.parameters()).device
    tokens = {name: tensor.to(device) for name, tensor in tokenizer(captions).items()}
    was_training = encoder.training
    encoder.eval()
    try:
        with autocast(config.train.precision, device):
            images = encoder.encode_image(batch.images[rows].to(device))
            texts = encoder.encode_text(tokens)
    finally:
        encoder.train(was_training)
    ids = torch.arange(len(rows))
    thumbnails = _thumbnails(batch.images[rows])
    return HeldOut(_unit(images), _unit(texts), ids, ids, captions, captions, thumbnails)


def _options(config: Config) -> LoaderOptions:
    return LoaderOptions(
        image_size=config.data.image_size,
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


def _batched(items: Iterator[DecodedSample] | Iterator[str], size: int) -> Iterator[list]:
    while batch := list(islice(items, size)):
        yield batch


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1).cpu()


def _thumbnails(images: Tensor) -> Tensor:
    if max(images.shape[-2:]) <= _THUMBNAIL_SIZE:
        return images
    small = F.interpolate(images.float(), size=_THUMBNAIL_SIZE, mode="area")
    return small.round().to(torch.uint8)
