"""Evaluation of an image tower by classifying held-out images with labelled training images.

N held-out images, M training images, C width of the tower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.evaluation.classify import knn_classify, linear_probe
from gradcache_clip.train.evaluation.embed import EmbedOptions, embed_rows
from gradcache_clip.train.evaluation.held_out import thumbnail

if TYPE_CHECKING:
    from gradcache_clip.train.data import DecodedSample

# Number of images to search for a label.
_SEARCHED = 100


@dataclass(frozen=True)
class LabelMetrics:
    """Accuracy on held-out images, 0 to 1."""

    knn_accuracy: float
    """Accuracy of k nearest neighbours among the training images."""
    probe_accuracy: float
    """Accuracy of a linear probe fitted on the training images."""
    label_chance: float
    """Accuracy of always predicting the most frequent training class."""
    images: int
    classes: int
    """Number of training classes."""

    def to_scalars(self) -> dict[str, float]:
        """Return the accuracies by name, for a log."""
        return {name: share for name, share in asdict(self).items() if isinstance(share, float)}


@dataclass(frozen=True)
class LabelledImages:
    """Features and classes of held-out images, and the accuracy of classifying them.

    Args:
        features: (N, C), L2-normalised, fp32 on the CPU; of the tower without its projection.
        labels: N class names.
        thumbnails: uint8 (N, 3, height, width), at most 64 pixels.
        accuracy: of classification by the training images.
    """

    features: Tensor
    labels: list[str]
    thumbnails: Tensor
    accuracy: LabelMetrics

    def metrics(self) -> LabelMetrics:
        """Return accuracies and counts."""
        return self.accuracy

    def scalars(self) -> dict[str, float]:
        """Return the accuracies by name, for the log."""
        return self.accuracy.to_scalars()


def embed_labelled(
    tower: nn.Module,
    held_out: Iterable[DecodedSample],
    known: Iterable[DecodedSample],
    options: EmbedOptions,
    *,
    neighbours: int = 20,
) -> LabelledImages | None:
    """Embed held-out and training images in evaluation mode, and classify the former by the latter.

    Images without a label are skipped. Called by all processes of `options.peers` together.

    Args:
        tower: images -> features.
        held_out: images to classify; consumed once.
        known: training images; consumed once.
        options: batch size, precision and processes.
        neighbours: k of the k nearest neighbours.

    Returns:
        The held-out images on rank 0, None on other ranks.

    Raises:
        ValueError: a set without labelled images; call `check_labels` before training.
    """
    features, labels, thumbnails = _embed(tower, held_out, options, shown=True)
    known_features, known_labels, _ = _embed(tower, known, options, shown=False)
    if features is None or known_features is None:
        return None
    metrics = _metrics(features, labels, known_features, known_labels, neighbours)
    return LabelledImages(F.normalize(features, dim=1), labels, torch.stack(thumbnails), metrics)


def check_labels(samples: Iterable[DecodedSample], source: str) -> None:
    """Raise ConfigError unless one of the first images of `source` has a label."""
    if not any(sample.label for sample in islice(samples, _SEARCHED)):
        raise ConfigError(
            f"label: expected labelled images in {source} to evaluate views by, got none; write "
            '{"label": "cat"} into KEY.json, or leave data.validation out'
        )


def _embed(
    tower: nn.Module, samples: Iterable[DecodedSample], options: EmbedOptions, *, shown: bool
) -> tuple[Tensor | None, list[str], list[Tensor]]:
    """Return features, labels and, if `shown`, thumbnails; a training set has too many of them."""
    labels: list[str] = []
    thumbnails: list[Tensor] = []

    def images() -> Iterator[Tensor]:
        for sample in samples:
            if sample.label:
                labels.append(sample.label)
                if shown and options.peers.is_first:
                    thumbnails.append(thumbnail(sample.image))
                yield sample.image

    parts = embed_rows(tower, images(), torch.stack, options, description="images")
    return None if parts is None else parts[0].float(), labels, thumbnails


def _metrics(
    features: Tensor,
    labels: Sequence[str],
    known_features: Tensor,
    known_labels: Sequence[str],
    neighbours: int,
) -> LabelMetrics:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(known_labels))}
    classes = torch.tensor([numbers[name] for name in known_labels])
    # -1: a class without training images cannot be predicted.
    truth = torch.tensor([numbers.get(name, -1) for name in labels])
    sides = features, known_features, classes
    [(most_frequent, _)] = Counter(known_labels).most_common(1)
    return LabelMetrics(
        knn_accuracy=_share(knn_classify(*sides, k=neighbours) == truth),
        probe_accuracy=_share(linear_probe(*sides) == truth),
        label_chance=labels.count(most_frequent) / len(labels),
        images=len(labels),
        classes=len(numbers),
    )


def _share(right: Tensor) -> float:
    return float(right.double().mean())
