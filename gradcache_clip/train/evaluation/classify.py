"""What features of images know of classes: a vote of neighbours, and a linear classifier.

N images, M images of the training set, C classes, D feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gradcache_clip.train.evaluation.ranking import check_features, check_ids, check_sizes
from gradcache_clip.train.evaluation.recall import retrieve

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Of the probe: L2 on its weights, and the passes over all features that it may take.
_PENALTY = 1e-3
_MOST_PASSES = 200
_TILE = 1024


@torch.no_grad()
def vote_of_neighbours(
    features: Float[Tensor, "n d"],
    bank: Float[Tensor, "m d"],
    labels: Int[Tensor, " m"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    tile: int = _TILE,
) -> Int[Tensor, " n"]:
    """The class of each image by its k nearest neighbours in a bank of known ones.

    A neighbour of cosine similarity s votes for its class with weight exp(s / temperature). No
    N x M matrix is held beyond a tile.

    Args:
        features: of the images to name.
        bank: of images whose class is known.
        labels: their classes, 0 to C - 1.
        k: neighbours that vote; with fewer in the bank, all.
        temperature: see above.
        tile: edge of the blocks of the similarity matrix.

    Raises:
        ValueError: empty sets, shapes that do not fit, NaN or infinite features, or k below 1.

    Source:
        Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination",
        section 3.4; with k = 20 as in DINO (Caron et al. 2021).

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> vote_of_neighbours(torch.tensor([[0.2, 1.0]]), bank, torch.tensor([0, 0, 1]), k=3)
        tensor([1])
    """
    _check(features, bank, labels)
    unit, known = F.normalize(features.float(), dim=1), F.normalize(bank.float(), dim=1)
    found = retrieve(unit, known, k, tile=tile)
    votes = unit.new_zeros(len(unit), int(labels.max()) + 1)
    # The nearest one votes with weight 1, so that no exponential overflows.
    weights = ((found.scores - found.scores[:, :1]) / temperature).exp()
    return votes.scatter_add_(1, labels[found.indices], weights).argmax(1)


def linear_probe(
    features: Float[Tensor, "n d"], bank: Float[Tensor, "m d"], labels: Int[Tensor, " m"]
) -> Int[Tensor, " n"]:
    """The class of each image by logistic regression on a bank of known ones.

    Features are brought to mean 0 and deviation 1 over the bank; the classifier minimises the
    cross-entropy and a small L2 penalty by L-BFGS over the whole bank, from zero, so it draws
    nothing at random.

    Args:
        features: of the images to name.
        bank: of images whose class is known.
        labels: their classes, 0 to C - 1.

    Raises:
        ValueError: empty sets, shapes that do not fit, NaN or infinite features.

    Source:
        Chen et al. 2020 (SimCLR), appendix B.8 (L-BFGS on frozen features).

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> linear_probe(torch.tensor([[0.2, 1.0]]), bank, torch.tensor([0, 0, 1]))
        tensor([1])
    """
    _check(features, bank, labels)
    mean, deviation = bank.float().mean(0), bank.float().std(0, correction=0).clamp_min(1e-6)
    known, asked = ((each.float() - mean) / deviation for each in (bank, features))
    with torch.enable_grad():
        weight, bias = _fitted(known, labels)
    return (asked @ weight.T + bias).argmax(1)


def _fitted(known: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) of a linear classifier."""
    classes = int(labels.max()) + 1
    weight = known.new_zeros(classes, known.shape[1], requires_grad=True)
    bias = known.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_MOST_PASSES, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(known, weight, bias), labels)
        loss = loss + _PENALTY / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _check(features: Tensor, bank: Tensor, labels: Tensor) -> None:
    check_features("features", features, _TILE)
    check_features("bank", bank, _TILE)
    check_sizes("features", features, "bank", bank)
    check_ids("labels", labels, bank)
    check_ids("labels", labels, bank, below=int(labels.max()) + 1)
