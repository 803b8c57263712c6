"""A loss over several prefixes of the features at once. B: rows, D: width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from gradcache_clip.ops.unit import unit


@runtime_checkable
class _OnePass(Protocol):
    """A loss that computes all prefixes at once."""

    def prefixes(self, widths: Sequence[int], *features: Any, **options: Any) -> list[Any]: ...


class MatryoshkaLoss(nn.Module):
    """A weighted sum of one loss over prefixes of the features, so that short ones work as well.

    With loss_d the wrapped loss over F.normalize(features[:, :d], dim=-1):

        loss = sum_p weights[p] * loss_(dims[p])

    For `ClipLoss`, `InfoNCELoss`, `NTXentLoss` and `SupConLoss` the products of a prefix continue
    those of the one before. With impl="tiled" one pass over the tiles serves all prefixes, at the
    flops of the widest. With impl="triton" one pass serves all where each row has one positive
    and all columns compete; with labels, ids or a margin, and in a self-contrast, it makes one pass
    per prefix. Nothing of B x B numbers is stored unless impl="reference". Any other loss,
    such as `SigLipLoss`, is called once per prefix. One scale serves all.

    Source: Kusupati et al. 2022, "Matryoshka representation learning", equation 1.

    Args:
        loss: the loss of one width, with its parameters; it must normalise.
        dims: widths of the prefixes, in any order, at most D.
        weights: one per width; 1 each when None.

    Raises:
        TypeError: a loss that is not a module.
        ValueError: no, repeated or non-positive dims; not as many weights; a loss built with
            normalize=False.

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
        weights = [1.0] * len(dims) if weights is None else list(weights)
        _check_dims(dims, weights)
        self.loss = loss
        self.dims, self.weights = zip(*sorted(zip(dims, weights, strict=True)), strict=True)

    @property
    def logit_scale(self) -> Any:
        """The scale of the wrapped loss."""
        return self.loss.logit_scale

    def forward(self, *features: Any, **options: Any) -> Any:
        """Call the wrapped loss for every prefix, and add up.

        Args:
            features: positional arguments of the wrapped loss; features are (B, D), not normalised.
            options: its keyword arguments.

        Returns:
            The output of the wrapped loss for the widest prefix, accuracies included, with the sum
            as `loss`; the sum alone if it returns a tensor.

        Raises:
            ValueError: dims beyond D; and the errors of the wrapped loss.
        """
        self._check_features(features)
        if isinstance(self.loss, _OnePass):
            outputs = self.loss.prefixes(self.dims, *features, **options)
        else:
            outputs = [self._of_prefix(width, features, options) for width in self.dims]
        total = sum(
            weight * (output if isinstance(output, Tensor) else output.loss)
            for weight, output in zip(self.weights, outputs, strict=True)
        )
        return total if isinstance(outputs[-1], Tensor) else outputs[-1]._replace(loss=total)

    def _check_features(self, features: tuple[Any, ...]) -> None:
        D = min((each.shape[-1] for each in features if _is_matrix(each)), default=self.dims[-1])
        if self.dims[-1] > D:
            raise ValueError(
                f"dims: expected at most the width of the features, {D}, got {self.dims[-1]}; "
                "leave out what is wider"
            )

    def _of_prefix(self, width: int, features: tuple[Any, ...], options: dict[str, Any]) -> Any:
        cut = (unit(each, width) if _is_matrix(each) else each for each in features)
        return self.loss(*cut, **options)

    def extra_repr(self) -> str:
        return f"dims={list(self.dims)}, weights={list(self.weights)}"


def _is_matrix(given: Any) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point() and given.dim() > 1


def _check_loss(loss: nn.Module) -> None:
    if not isinstance(loss, nn.Module):
        raise TypeError(
            f"loss: expected a module such as ClipLoss(), got {type(loss).__name__}; build it first"
        )
    if getattr(loss, "normalize", True) is False:
        raise ValueError(
            "loss: expected one that normalises, got normalize=False; each prefix is normalised "
            "anew: leave normalize=True and pass the features as they are"
        )


def _check_dims(dims: Sequence[int], weights: Sequence[float]) -> None:
    if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
        raise ValueError(
            f"dims: expected different widths of 1 or more, got {list(dims)}; "
            "for example [64, 128, 256, 512]"
        )
    if len(weights) != len(dims):
        raise ValueError(
            f"weights: expected one for each of the {len(dims)} dims, got {len(weights)}; "
            "leave them out for 1 each"
        )
