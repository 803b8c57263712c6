"""Evaluation of held-out image-caption pairs: features of both towers, and recall."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcache_clip.train.data import DecodedSample
from gradcache_clip.train.evaluation.embed import EmbedOptions, embed_rows
from gradcache_clip.train.evaluation.features import Features, features_of
from gradcache_clip.train.evaluation.folds import recall_in_folds
from gradcache_clip.train.evaluation.recall import RetrievalMetrics
from gradcache_clip.train.modalities import IMAGE, TEXT

if TYPE_CHECKING:
    from gradcache_clip.train.data import Batch
    from gradcache_clip.train.tokenizer import Tokenizer

_THUMBNAIL_SIZE = 64


@dataclass(frozen=True)
class HeldOut:
    """Features of a validation set, or of some pairs of a batch. N images, M texts.

    Args:
        image_features, text_features: of N and M samples, L2-normalised, fp32 on the CPU.
        image_ids, text_ids: (N,) and (M,); equal where image and text belong together.
        image_captions: the first caption of each image.
        texts: M captions.
        thumbnails: uint8 (N, 3, height, width), at most 64 pixels.
        recall_at: depths k of recall@k.
        folds: consecutive parts of the images over which recall is averaged.
    """

    image_features: Features
    text_features: Features
    image_ids: Tensor
    text_ids: Tensor
    image_captions: list[str]
    texts: list[str]
    thumbnails: Tensor
    recall_at: Sequence[int] = (1, 5, 10)
    folds: int = 1

    def scalars(self) -> dict[str, float]:
        """Return recall and ranks by name, for the log."""
        return self.metrics().to_scalars()

    def metrics(self) -> RetrievalMetrics:
        """Compute recall@k in both directions."""
        return recall_in_folds(
            self.image_features,
            self.text_features,
            image_ids=self.image_ids,
            text_ids=self.text_ids,
            folds=self.folds,
            ks=self.recall_at,
        )


def embed_held_out(
    encoder: nn.Module,
    tokenizer: Tokenizer,
    samples: Iterable[DecodedSample],
    options: EmbedOptions,
    *,
    recall_at: Sequence[int] = (1, 5, 10),
    folds: int = 1,
) -> HeldOut | None:
    """Embed every image and every distinct caption once, in evaluation mode.

    Images of one group share its captions: each caption is correct for all of them. Called by all
    processes of `options.peers` together.

    Args:
        encoder: called as `encoder(tower, inputs)`.
        tokenizer: texts -> inputs of the text tower.
        samples: consumed once.
        options: batch size, precision and processes.
        recall_at, folds: see `HeldOut`.

    Returns:
        The features on rank 0, None on other ranks.

    Raises:
        ValueError: there are no samples.
    """
    groups: list[tuple[str, tuple[str, ...]]] = []
    thumbnails: list[Tensor] = []

    def images() -> Iterator[Tensor]:
        for sample in samples:
            groups.append((sample.group, sample.captions))
            if options.peers.is_first:
                thumbnails.append(thumbnail(sample.image))
            yield sample.image

    image_parts = embed_rows(
        encoder, images(), torch.stack, options, tower=IMAGE, description="images"
    )
    image_ids, texts, text_ids = _texts_of(groups)
    text_parts = embed_rows(encoder, texts, tokenizer, options, tower=TEXT, description="texts")
    if image_parts is None or text_parts is None:
        return None
    return HeldOut(
        image_features=features_of(image_parts),
        text_features=features_of(text_parts),
        image_ids=image_ids,
        text_ids=text_ids,
        image_captions=[captions[0] for _, captions in groups],
        texts=texts,
        thumbnails=torch.stack(thumbnails),
        recall_at=recall_at,
        folds=folds,
    )


def embed_batch(
    encoder: nn.Module, tokenizer: Tokenizer, batch: Batch, pairs: int, *, precision: str = "fp32"
) -> HeldOut:
    """Embed the first pairs of different groups of a training batch; only text i fits image i."""
    first_of: dict[str, int] = {}
    for row, group in enumerate(batch.groups):
        first_of.setdefault(group, row)
    samples = [
        DecodedSample(batch.images[row], (batch.captions[row],), key="", group=group)
        for group, row in list(first_of.items())[:pairs]
    ]
    options = EmbedOptions(pairs, precision, progress=False)
    held_out = embed_held_out(encoder, tokenizer, samples, options)
    assert held_out is not None
    return held_out


def _texts_of(groups: list[tuple[str, tuple[str, ...]]]) -> tuple[Tensor, list[str], Tensor]:
    """Return ids of the images, the distinct texts of all groups, and the ids of these texts."""
    numbers: dict[str, int] = {}
    # A dict as an ordered set, so that a group's equal captions are embedded once.
    owners: dict[tuple[int, str], None] = {}
    image_ids = []
    for group, captions in groups:
        number = numbers.setdefault(group, len(numbers))
        image_ids.append(number)
        owners.update(dict.fromkeys((number, caption) for caption in captions))
    texts = [caption for _, caption in owners]
    text_ids = torch.tensor([number for number, _ in owners])
    return torch.tensor(image_ids), texts, text_ids


def thumbnail(image: Tensor) -> Tensor:
    """Shrink a uint8 (3, height, width) image to at most 64 pixels."""
    if max(image.shape[-2:]) <= _THUMBNAIL_SIZE:
        return image
    small = F.interpolate(image[None].float(), size=_THUMBNAIL_SIZE, mode="area")
    return small[0].round().to(torch.uint8)
