"""Naming the classes of images by their features: nearest neighbours and a linear probe.

N images, M images of the training set, C classes, D feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradcache_clip.train.evaluation.ranking import check_features, check_ids, check_sizes

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# The probe's L2 penalty, gradient tolerance and limit of iterations.
_PENALTY = 1e-3
_TOLERANCE, _MOST_PASSES = 1e-6, 1000
_TILE = 1024


def knn_classify(
    features: Float[Tensor, "n d"],
    bank: Float[Tensor, "m d"],
    labels: Int[Tensor, " m"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Int[Tensor, " n"]:
    """The class of each image by its k nearest neighbours in a bank of known ones.

    A neighbour of cosine similarity s votes for its class with weight exp(s / temperature).

    Args:
        features: of the images to name.
        bank: of images whose class is known.
        labels: their classes, 0 to C - 1.
        k: neighbours that vote; all of the bank if it has fewer.
        temperature: of the weights.

    Raises:
        ValueError: empty sets, shapes that do not fit, NaN or infinite features.

    Source:
        Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination",
        section 3.4; with k = 20 as in DINO (Caron et al. 2021).

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_classify(torch.tensor([[0.2, 1.0]]), bank, torch.tensor([0, 0, 1]), k=3)
        tensor([1])
    """
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    _check(features, bank, labels)

    def weights(distances: Any) -> Any:
        # The nearest one votes with weight 1, so that the weights cannot all underflow.
        return np.exp((distances[:, :1] - distances) / temperature)

    neighbours = KNeighborsClassifier(
        min(k, len(bank)), weights=weights, metric="cosine", algorithm="brute"
    )
    return _named(neighbours, features, bank, labels)


def linear_probe(
    features: Float[Tensor, "n d"], bank: Float[Tensor, "m d"], labels: Int[Tensor, " m"]
) -> Int[Tensor, " n"]:
    """The class of each image by logistic regression on a bank of known ones.

    Features are brought to mean 0 and deviation 1 over the bank; the classifier minimises the mean
    cross-entropy plus 0.0005 times the squared weights by Newton steps over the whole bank, from
    zero, so it draws nothing at random. Between two classes its weights are one vector.

    Args:
        features: of the images to name.
        bank: of images whose class is known.
        labels: their classes, 0 to C - 1.

    Raises:
        ValueError: empty sets, shapes that do not fit, NaN or infinite features.

    Source:
        Chen et al. 2020 (SimCLR), appendix B.8 (logistic regression on frozen features).

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> linear_probe(torch.tensor([[0.2, 1.0]]), bank, torch.tensor([0, 0, 1]))
        tensor([1])
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _check(features, bank, labels)
    if len(labels.unique()) == 1:
        return labels[:1].repeat(len(features))
    # scikit-learn weighs the sum over the bank against half of the squared weights. It runs until
    # converged, so that no class depends on the last digits of features.
    regression = LogisticRegression(
        C=1 / (_PENALTY * len(bank)),
        solver="newton-cg",
        tol=_TOLERANCE,
        max_iter=_MOST_PASSES,
    )
    return _named(make_pipeline(StandardScaler(), regression), features, bank, labels)


def _named(classifier: Any, features: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """Fit a scikit-learn classifier to the bank and name the features."""
    known, asked = (each.double().numpy(force=True) for each in (bank, features))
    classifier.fit(known, labels.numpy(force=True))
    return torch.from_numpy(classifier.predict(asked)).to(labels.device)


def _check(features: Tensor, bank: Tensor, labels: Tensor) -> None:
    check_features("features", features, _TILE)
    check_features("bank", bank, _TILE)
    check_sizes("features", features, "bank", bank)
    check_ids("labels", labels, bank)
    check_ids("labels", labels, bank, below=int(labels.max()) + 1)
