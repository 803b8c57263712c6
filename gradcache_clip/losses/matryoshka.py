"""A loss over several prefixes of the features at once. B: rows, D: width."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gradcache_clip.distributed.wrappers import uncompiled
from gradcache_clip.losses.moco import MoCoLoss
from gradcache_clip.losses.options import check_positive, is_positive_int
from gradcache_clip.ops.unit import unit

_POSITIONAL = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
_VARIADIC = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


class MatryoshkaLoss(nn.Module):
    """A weighted sum of one loss over prefixes of the features, so that short ones work as well.

    With loss_d the wrapped loss over F.normalize(features[:, :d], dim=-1):

        loss = sum_p weights[p] * loss_(dims[p])

    Only the arguments that the loss names in `feature_arguments` are cut, passed by position or by
    name: features of the encoders in training. A teacher's features and scores, a guide, masks, a
    bias and the scale stay whole. A loss of your own names its features in the same way:

        class Triplet(nn.Module):
            feature_arguments = "anchors", "positives"

    For `ClipLoss`, `InfoNCELoss`, `RetrievalLoss`, `InBatchDistillationLoss`, `NTXentLoss` and
    `SupConLoss` the products of a prefix continue those of the one before. With impl="tiled" one
    pass over the tiles serves all prefixes, at the flops of the widest. With impl="triton" one pass
    serves all where each row has one positive and all columns compete; with labels, ids or a
    margin, and in a self-contrast, it makes one pass per prefix. Nothing of B x B numbers is stored
    unless impl="reference". Any other loss, such as `SigLipLoss`, is called once per prefix. One
    scale serves all.

    Source: Kusupati et al. 2022, "Matryoshka representation learning", equation 1.

    Args:
        loss: the loss of one width, with its parameters; it must normalise. In momentum contrast
            `MoCoLoss` goes around this one.
        dims: widths of the prefixes, in any order, at most D.
        weights: one per width; 1 each when None.

    Raises:
        TypeError: a loss that is not a module, or does not name its features.
        ValueError: no, repeated or non-positive dims; not as many weights; a loss built with
            normalize=False, or that names features its `forward` does not take by name.

    Example:
        >>> import torch
        >>> from gradcache_clip.losses import ClipLoss
        >>> from gradcache_clip.losses.matryoshka import MatryoshkaLoss
        >>> loss = MatryoshkaLoss(ClipLoss(init_logit_scale=2.0), dims=[4, 1])
        >>> out = loss(torch.eye(4), torch.eye(4))
        >>> print(f"{out.loss:.4f} {out.accuracy:.1f}")
        1.4657 1.0
    """

    def __init__(
        self, loss: nn.Module, dims: Sequence[int], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        _check_loss(loss)
        check_dims(dims, weights)
        weights = [1.0] * len(dims) if weights is None else weights
        self.loss = loss
        self._features, self._in_one_pass = _features_of(loss), _in_one_pass(loss)
        self.dims, self.weights = zip(*sorted(zip(dims, weights, strict=True)), strict=True)

    @property
    def logit_scale(self) -> Any:
        """The scale of the wrapped loss."""
        return self.loss.logit_scale

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Call the wrapped loss for every prefix, and add up.

        Args:
            arguments: positional arguments of the wrapped loss; features as the encoders return
                them, not normalised.
            options: its keyword arguments.

        Returns:
            The output of the wrapped loss for the widest prefix, accuracies included, with the sum
            as `loss`; the sum alone if it returns a tensor.

        Raises:
            TypeError: features that are not floating tensors (..., D), or a loss that returns
                neither a tensor nor a named tuple with a `loss`.
            ValueError: dims beyond the width of the features; and the errors of the wrapped loss.
        """
        self._check_features({**dict(enumerate(arguments)), **options})
        if self._in_one_pass:
            loss: Any = self.loss
            outputs = loss.prefixes(self.dims, *arguments, **options)
        else:
            outputs = [self._of_prefix(width, arguments, options) for width in self.dims]
        total = sum(
            weight * _loss_of(output) for weight, output in zip(self.weights, outputs, strict=True)
        )
        return total if isinstance(outputs[-1], Tensor) else outputs[-1]._replace(loss=total)

    def _check_features(self, given: dict[Any, Any]) -> None:
        for place, name in self._features.items():
            features = given.get(place)
            if features is None:
                continue
            _check_matrix(name, features)
            if self.dims[-1] > (D := features.shape[-1]):
                raise ValueError(
                    f"dims: expected at most the width of {name}, {D}, got {self.dims[-1]}; leave "
                    "out what is wider"
                )

    def _of_prefix(self, width: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        by_position = (self._cut(*each, width) for each in enumerate(arguments))
        by_name = {name: self._cut(name, given, width) for name, given in options.items()}
        return self.loss(*by_position, **by_name)

    def _cut(self, place: int | str, given: Any, width: int) -> Any:
        return given if given is None or place not in self._features else unit(given, width)

    def extra_repr(self) -> str:
        return f"dims={list(self.dims)}, weights={list(self.weights)}"


def _features_of(loss: nn.Module) -> dict[int | str, str]:
    """Map each position and each name that features are passed by to their name."""
    names: Sequence[str] = getattr(loss, "feature_arguments", ())
    if not names:
        raise TypeError(
            "loss: expected one that names its features, as in feature_arguments = ('queries', "
            f"'documents'), got {type(loss).__name__} without; set that on the loss"
        )
    parameters = inspect.signature(uncompiled(loss).forward).parameters.values()
    taken = [each.name for each in parameters if each.kind not in _VARIADIC]
    if not set(names) <= set(taken):
        raise ValueError(
            f"loss: expected feature_arguments among the arguments of {type(loss).__name__}, "
            f"{', '.join(taken)}, got {', '.join(names)}; name those that hold features"
        )
    positional = [each.name for each in parameters if each.kind in _POSITIONAL]
    places: list[tuple[int | str, str]] = [*enumerate(positional), *zip(names, names, strict=True)]
    return {place: name for place, name in places if name in names}


def _in_one_pass(loss: nn.Module) -> bool:
    """Return whether the loss computes all prefixes at once, by the class that has its `forward`.

    A subclass that overrides `forward` alone is called once per prefix.
    """
    owner = next(each for each in type(uncompiled(loss)).__mro__ if "forward" in vars(each))
    return "prefixes" in vars(owner)


def _check_matrix(name: str, features: Any) -> None:
    if not isinstance(features, Tensor):
        got = type(features).__name__
    elif not features.is_floating_point() or features.dim() < 2:
        got = f"{features.dtype} of shape {tuple(features.shape)}"
    else:
        return
    raise TypeError(
        f"{name}: expected a floating tensor of features (..., D), got {got}; pass features as the "
        "encoders return them"
    )


def _loss_of(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if not isinstance(output, tuple) or not hasattr(output, "loss"):
        raise TypeError(
            "loss: expected one that returns a tensor, or a named tuple with a loss, got "
            f"{type(output).__name__}; wrap each term by itself, and add them up"
        )
    return output.loss


def _check_loss(loss: nn.Module) -> None:
    if not isinstance(loss, nn.Module):
        raise TypeError(
            f"loss: expected a module such as ClipLoss(), got {type(loss).__name__}; build it first"
        )
    if isinstance(loss, MoCoLoss):
        raise TypeError(
            "loss: expected the contrast alone, got MoCoLoss, whose queues hold whole keys; write "
            "MoCoLoss(MatryoshkaLoss(InfoNCELoss(), dims), queues)"
        )
    if hasattr(loss, "matryoshka_dims"):
        raise TypeError(
            f"loss: expected a loss of features, got {type(loss).__name__}, which embeds texts; "
            "pass it matryoshka_dims="
        )
    if getattr(loss, "normalize", True) is False:
        raise ValueError(
            "loss: expected one that normalises, got normalize=False; each prefix is normalised "
            "anew: leave normalize=True and pass the features as they are"
        )


def check_dims(dims: Any, weights: Any, *, prefix: str = "") -> None:
    """Raise unless they are different widths, with one weight above zero for each."""
    whole = isinstance(dims, Sequence) and all(map(is_positive_int, dims))
    if not whole or not dims or len(set(dims)) < len(dims):
        raise ValueError(
            f"{prefix}dims: expected different widths of 1 or more, got {dims!r}; for example "
            "[768, 256, 64]"
        )
    if weights is None:
        return
    if not isinstance(weights, Sequence) or len(weights) != len(dims):
        raise ValueError(
            f"{prefix}weights: expected one for each of the {len(dims)} {prefix}dims, got "
            f"{weights!r}; leave them out for 1 each"
        )
    for weight in weights:
        check_positive(f"{prefix}weights", weight, "leave out widths without weight")
