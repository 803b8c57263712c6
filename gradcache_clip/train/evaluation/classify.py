"""Classification by features: k nearest neighbours and a linear probe.

N images to classify, M labelled images, C classes, D feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradcache_clip.train.evaluation.ranking import check_features, check_ids, check_sizes

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# L2 penalty, gradient tolerance and maximum number of iterations of the probe.
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
    """Classify images by a vote of their k nearest neighbours among labelled images.

    A neighbour with cosine similarity s votes for its class with weight exp(s / temperature).

    Args:
        features: of the images to classify.
        bank: features of the labelled images.
        labels: classes of the labelled images, 0 to C - 1.
        k: number of neighbours; all of the bank if it has fewer.
        temperature: of the weights.

    Returns:
        The class of each image.

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
        # Relative to the nearest neighbour, whose weight is 1, so that not all can underflow.
        return np.exp((distances[:, :1] - distances) / temperature)

    neighbours = KNeighborsClassifier(
        min(k, len(bank)), weights=weights, metric="cosine", algorithm="brute"
    )
    return _predict(neighbours, features, bank, labels)


def linear_probe(
    features: Float[Tensor, "n d"], bank: Float[Tensor, "m d"], labels: Int[Tensor, " m"]
) -> Int[Tensor, " n"]:
    """Classify images by logistic regression fitted on labelled images.

    Features are standardised over the bank. The classifier minimises the mean cross-entropy plus
    0.0005 times the squared weights, by Newton steps over the whole bank starting from zero, so it
    is deterministic. With two classes it has one weight vector.

    Args:
        features: of the images to classify.
        bank: features of the labelled images.
        labels: classes of the labelled images, 0 to C - 1.

    Returns:
        The class of each image.

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
    # scikit-learn minimises C times the sum of losses plus half of the squared weights. Run until
    # convergence, so that classes do not depend on the last digits of features.
    regression = LogisticRegression(
        C=1 / (_PENALTY * len(bank)),
        solver="newton-cg",
        tol=_TOLERANCE,
        max_iter=_MOST_PASSES,
    )
    return _predict(make_pipeline(StandardScaler(), regression), features, bank, labels)


def _predict(classifier: Any, features: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """Fit a scikit-learn classifier on the bank and predict the classes of the features."""
    known, asked = (each.double().numpy(force=True) for each in (bank, features))
    classifier.fit(known, labels.numpy(force=True))
    return torch.from_numpy(classifier.predict(asked)).to(labels.device)


def _check(features: Tensor, bank: Tensor, labels: Tensor) -> None:
    check_features("features", features, _TILE)
    check_features("bank", bank, _TILE)
    check_sizes("features", features, "bank", bank)
    check_ids("labels", labels, bank)
    check_ids("labels", labels, bank, below=int(labels.max()) + 1)
