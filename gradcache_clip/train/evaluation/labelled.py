"""Images of known classes through an image tower: how far its features tell the classes apart.

N held-out images, M images of the training set, C width of the tower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from gradcache_clip.train.config import Config, ConfigError, EvaluationConfig
from gradcache_clip.train.data import read_all
from gradcache_clip.train.evaluation.classify import linear_probe, vote_of_neighbours
from gradcache_clip.train.evaluation.embed import embed_dataset
from gradcache_clip.train.evaluation.held_out import (
    batched,
    evaluating,
    reading_options,
    thumbnails_of,
)
from gradcache_clip.train.evaluation.sharding import interleave, shard_batches
from gradcache_clip.train.momentum import MomentumEncoder
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.precision import autocast
from gradcache_clip.train.views import ViewEncoder

# Images of a set, in search of a label.
_LOOKED_AT = 100


@dataclass(frozen=True)
class LabelMetrics:
    """Shares of held-out images whose class is named rightly, 0 to 1."""

    knn_accuracy: float
    """By the nearest images of the training set."""
    probe_accuracy: float
    """By a linear classifier of the training set."""
    label_chance: float
    """By naming the training set's most frequent class each time."""
    images: int
    classes: int
    """Of the training set."""

    def to_scalars(self) -> dict[str, float]:
        """For a log."""
        names = ("knn_accuracy", "probe_accuracy", "label_chance")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class LabelledImages:
    """The held-out images of a run over views, and what their features are worth.

    Args:
        features: (N, C), L2-normalised fp32, on the CPU; of the tower, without its projection.
        labels: N names of classes.
        thumbnails: uint8 (N, 3, height, width), at most 64 pixels.
        metrics: with the training set as what is known.
    """

    features: Tensor
    labels: list[str]
    thumbnails: Tensor
    metrics: LabelMetrics

    def scalars(self, evaluation: EvaluationConfig) -> dict[str, float]:
        """What is logged of it."""
        return self.metrics.to_scalars()


def embed_labelled(
    encoder: ViewEncoder | MomentumEncoder, config: Config, peers: Peers | None = None
) -> LabelledImages | None:
    """The tower's features of validation and training set, and how the one names the other.

    Images without a label are left out. Several processes embed a batch in turn, and all of them
    call this function.

    Args:
        encoder: its `image_tower` is evaluated.
        config: of the run.
        peers: the processes; this one alone when None.

    Returns:
        The held-out images, on the first process; None on the others.

    Raises:
        FileNotFoundError, ValueError: a set is missing, empty or broken. That it has labels is for
            `check_labels` to say, once and before anything is trained.
    """
    peers, data = peers or Peers(), config.data
    held_out, known = (
        _embed(encoder, source, config, peers) for source in (data.validation, data.train)
    )
    if held_out is None or known is None:
        return None
    metrics = _metrics(held_out, known, config.evaluation.neighbours)
    unit = F.normalize(held_out.features, dim=1)
    return LabelledImages(unit, held_out.labels, held_out.thumbnails, metrics)


def check_labels(config: Config) -> None:
    """Raise unless the first images of both sets, or some of them, say what they are.

    Raises:
        ConfigError: no label among them.
    """
    for source in (config.data.validation, config.data.train):
        first = islice(read_all(source, options=reading_options(config)), _LOOKED_AT)
        if not any(sample.label for sample in first):
            raise ConfigError(
                f"label: expected the class of images in {source}, by which views are evaluated, "
                'got none; write {"label": "cat"} into KEY.json, or leave data.validation out'
            )


@dataclass(frozen=True)
class _Embedded:
    features: Tensor
    labels: list[str]
    thumbnails: Tensor


def _embed(
    encoder: ViewEncoder | MomentumEncoder, source: str, config: Config, peers: Peers
) -> _Embedded | None:
    tower, size = encoder.image_tower, config.evaluation.batch_size
    device = next(tower.parameters()).device
    labels: list[str] = []
    thumbnails: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        samples = read_all(source, options=reading_options(config))
        for batch in batched((sample for sample in samples if sample.label), size):
            labels.extend(sample.label for sample in batch)
            images = torch.stack([sample.image for sample in batch])
            # The training set is shown nowhere, and may be large.
            if peers.is_first and source == config.data.validation:
                thumbnails.append(thumbnails_of(images))
            yield images

    mine = (images.to(device) for images in shard_batches(batches(), peers))
    with evaluating(encoder), autocast(config.train.precision, device):
        (features,) = embed_dataset(tower, mine, description="images", progress=peers.is_first)
    collected = peers.gather_to_rank0(features.float().cpu())
    if not peers.is_first:
        return None
    shown = torch.cat(thumbnails) if thumbnails else torch.empty(0)
    return _Embedded(interleave(collected, size, len(labels)), labels, shown)


def _metrics(held_out: _Embedded, known: _Embedded, neighbours: int) -> LabelMetrics:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(known.labels))}
    labels = torch.tensor([numbers[name] for name in known.labels])
    # A class that training has no image of is never right.
    truth = torch.tensor([numbers.get(name, -1) for name in held_out.labels])
    sides = held_out.features, known.features, labels
    return LabelMetrics(
        knn_accuracy=_share(vote_of_neighbours(*sides, k=neighbours), truth),
        probe_accuracy=_share(linear_probe(*sides), truth),
        label_chance=_chance(held_out.labels, known.labels),
        images=len(held_out.labels),
        classes=len(numbers),
    )


def _share(named: Tensor, truth: Tensor) -> float:
    return float((named == truth).double().mean())


def _chance(held_out: Sequence[str], known: Sequence[str]) -> float:
    [(most_frequent, _)] = Counter(known).most_common(1)
    return held_out.count(most_frequent) / len(held_out)
