"""The loss that a finished step returns: its `backward` raises and says what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from gradcache_clip.cache.auxiliary import AuxiliaryOutput, LossOnly
from gradcache_clip.cache.batch_tree import map_tensors

_MESSAGE = (
    "loss.backward(): expected no backward after cache(*inputs), which has filled .grad already, "
    "got one; call optimizer.step() next. To scale the loss pass "
    "strategy=LocalStrategy(grad_scaler); to take the backward yourself call "
    "deferred_step(cache, *inputs)"
)
# What trainers do to a loss before its backward.
_STAYS = {
    Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.div, Tensor.__truediv__, Tensor.add,
    Tensor.__add__, Tensor.__radd__, Tensor.mean, Tensor.sum, torch.mul, torch.div, torch.add,
    torch.mean, torch.sum,
}  # fmt: skip


class FinishedLoss(Tensor):
    """A tensor like any other, but for `backward`."""

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            plain = function(*args, **(kwargs or {}))
        # A sum with another loss has a graph, and a backward of its own.
        stays = function in _STAYS and isinstance(plain, Tensor) and not plain.requires_grad
        return plain.as_subclass(cls) if stays else _plain(plain)

    def backward(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(_MESSAGE)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(_plain(self))

    def __format__(self, spec: str) -> str:
        return format(_plain(self), spec)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(_plain(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)


def finished(output: Any, loss: Tensor) -> Any:
    """Detach the result of a step; `loss` is the tensor in it that was minimised."""

    def detached(tensor: Tensor) -> Tensor:
        plain = tensor.detach()
        # A tensor of another class, such as a DTensor, keeps it.
        is_plain_loss = tensor is loss and type(plain) is Tensor
        return plain.as_subclass(FinishedLoss) if is_plain_loss else plain

    if isinstance(output, AuxiliaryOutput):
        return AuxiliaryOutput(*(_detach_all(part, detached) for part in output))
    if isinstance(output, Tensor):
        return LossOnly(detached(output))
    return _detach_all(output, detached)


def _detach_all(output: Any, detached: Callable[[Tensor], Tensor]) -> Any:
    mapped = map_tensors(detached, output)
    if mapped is not output:
        return mapped
    # An object of some other class: its attributes hold the tensors.
    copied = copy.copy(output)
    for name, value in getattr(output, "__dict__", {}).items():
        setattr(copied, name, map_tensors(detached, value))
    return copied


def _plain(value: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor) if isinstance(value, FinishedLoss) else value
