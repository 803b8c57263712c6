"""Losses of prefixes in one pass, and the same losses once for each normalised prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from clip_inputs import Case, case
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache_clip import ClipLoss, InfoNCELoss, NTXentLoss, SupConLoss
from gradcache_clip.ops import contrast
from gradcache_clip.ops.prefixes_tiled import prefix_gradient_tiled, prefix_statistics_tiled
from gradcache_clip.ops.tiles import TileShape

_LOSSES: dict[str, Callable[..., Any]] = {
    "clip": ClipLoss,
    "info_nce": InfoNCELoss,
    "nt_xent": NTXentLoss,
    "sup_con": SupConLoss,
}
# What a call of the losses takes; all else belongs to the loss.
_GIVEN = {"labels", "ids", "logit_scale"}


def prefix_losses(
    build: Callable[..., Any], widths: Sequence[int], *features: Tensor, **options: Any
) -> list[Any]:
    """One result for each width of a loss that is built with those of `options` that it takes."""
    given = {name: options.pop(name) for name in _GIVEN & options.keys()}
    return build(**options).prefixes(widths, *features, **given)


class Summed(NamedTuple):
    loss: Tensor
    accuracies: list[Tensor]


def summed(results: Sequence[Any], widths: Sequence[int]) -> Summed:
    """Weights 1, 2, ... for the widths. At width 1 all cosines are 1 or -1: rounding ranks them."""
    loss = sum(weight * each.loss for weight, each in enumerate(results, 1))
    ranked = [each for each, width in zip(results, widths, strict=True) if width > 1]
    return Summed(loss, [a for each in ranked for a in each[1:] if a is not None])


def prefix_case(
    name: str, B: int, widths: Sequence[int], D: int, dtype: torch.dtype = torch.float64
) -> tuple[Case, Callable[..., Summed]]:
    """A loss in one pass over rows of any length, and the same loss once for each prefix."""
    given = case(name, B, D, dtype)
    call: Any = given.call
    build = _LOSSES[name.partition(",")[0]]
    of_call = {name: value for name, value in call.keywords.items() if name in _GIVEN}
    of_loss = {name: value for name, value in call.keywords.items() if name not in _GIVEN}
    # Built here, because torch.compile cannot trace how parameters are made.
    losses: dict[str, Any] = {impl: build(impl=impl, **of_loss) for impl in ("tiled", "reference")}

    def together(*leaves: Tensor, impl: Any = "tiled") -> Summed:
        *features, logit_scale = leaves
        results = losses[impl].prefixes(widths, *features, logit_scale=logit_scale, **of_call)
        return summed(results, widths)

    def separate(*leaves: Tensor, impl: Any = "reference") -> Summed:
        def unit(width: int) -> Iterator[Tensor]:
            return (normalize(x[..., :width], dim=-1) for x in leaves[:-1])

        results = [call(*unit(width), leaves[-1], impl=impl) for width in widths]
        return summed(results, widths)

    lengths = [torch.rand(*x.shape[:-1], 1, dtype=dtype) + 0.1 for x in given.leaves[:-1]]
    longer = [x.detach() * y for x, y in zip(given.leaves, lengths, strict=False)]
    return Case(together, []).with_leaves(*longer, given.leaves[-1]), separate


def outcome(
    call: Callable[..., Summed], leaves: Sequence[Tensor], *, outer: float = 1.0, **options: Any
) -> list[Tensor]:
    """Loss, gradients of outer * loss, accuracies."""
    result = call(*leaves, **options)
    gradients = torch.autograd.grad(outer * result.loss, tuple(leaves), allow_unused=True)
    return [result.loss.detach(), *(g for g in gradients if g is not None), *result.accuracies]


@contextmanager
def small_tiles(edge: int, *, watched_by: TorchDispatchMode | None = None) -> Iterator[None]:
    """impl="tiled" with these tiles; a dispatch mode is entered inside the ops, too."""

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if watched_by is None:
                return function(*arguments, shape=TileShape(edge, edge))
            with watched_by:
                return function(*arguments, shape=TileShape(edge, edge))

        return run

    with (
        patch.dict(contrast._PREFIX_STATISTICS, tiled=watched(prefix_statistics_tiled)),
        patch.dict(contrast._PREFIX_GRADIENT, tiled=watched(prefix_gradient_tiled)),
    ):
        if watched_by is None:
            yield
        else:
            with watched_by:
                yield
