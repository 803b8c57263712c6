"""Makes `<name>_loss` out of `<name>_loss_with_accuracy`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from inspect import signature
from typing import ParamSpec, Protocol

from torch import Tensor

_P = ParamSpec("_P")


class _HasLoss(Protocol):
    @property
    def loss(self) -> Tensor: ...


def loss_alone(
    with_accuracy: Callable[_P, _HasLoss], body: Callable[..., _HasLoss] | None = None
) -> Callable[_P, Tensor]:
    """Return a function of the same arguments that returns the loss alone.

    A `body` takes these arguments and `maxima`, whether it is to find what accuracies need.
    """
    compute = with_accuracy if body is None else partial(body, maxima=False)

    @wraps(with_accuracy)
    def loss(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        return compute(*args, **kwargs).loss

    name = with_accuracy.__name__
    loss.__name__ = loss.__qualname__ = name.removesuffix("_with_accuracy")
    loss.__doc__ = f"Return the loss of `{name}` alone; same arguments, errors and source."
    alone = signature(with_accuracy).replace(return_annotation="Float[Tensor, '']")
    loss.__signature__ = alone  # type: ignore[attr-defined]
    return loss
