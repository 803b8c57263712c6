"""Exponential moving average of a model's weights, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages everything floating in `model.state_dict()`; copies the rest.

    After update number n (from 1)

        average = d * average + (1 - d) * weights,    d = min(decay, (1 + n) / (10 + n))

    so that the random start is forgotten within the first steps. Averages are kept in fp32 (fp64
    for fp64 weights), on the weights' device.

    Args:
        model: the module that is trained; its weights are the first average.
        decay: between 0 and 1, e.g. 0.999. It averages over about 1 / (1 - decay) steps.

    Raises:
        ValueError: `decay` is outside its range.

    Source:
        Polyak and Juditsky 1992; the warm-up is TensorFlow's ExponentialMovingAverage(num_updates).

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> ema = Ema(model, decay=0.5)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> ema.update(model)
        >>> with ema.swapped_into(model):
        ...     bool(model.weight.abs().sum() > 0)
        True
        >>> model.weight.tolist()
        [[0.0, 0.0]]
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(
                f"ema_decay: expected a number between 0 and 1, got {decay}; "
                "pass e.g. train.ema_decay=0.999, or 0 for no average"
            )
        self.decay = decay
        self.updates = 0
        self._averages = {
            name: tensor.detach().to(_average_dtype(tensor), copy=True)
            for name, tensor in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights; call it after each optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, tensor in model.state_dict().items():
            average = self._averages[name]
            if average.is_floating_point():
                average.lerp_(tensor.to(average.dtype), 1.0 - decay)
            else:
                average.copy_(tensor)

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Give the model its averaged weights inside the block, and its own back after it."""
        tensors = model.state_dict()
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        try:
            _copy_into(tensors, self._averages)
            yield
        finally:
            _copy_into(tensors, own)

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """The averages and the number of updates, as tensors and an integer."""
        return {"updates": self.updates, "averages": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, int | Mapping[str, Tensor]]) -> None:
        """Restore what `state_dict` returned, for the same architecture.

        Raises:
            ValueError: the saved names or shapes are not those of the model.
        """
        updates, averages = state["updates"], state["averages"]
        if not isinstance(updates, int) or not isinstance(averages, Mapping):
            raise ValueError(
                "ema state: expected {'updates': int, 'averages': tensors by name}, "
                f"got {type(updates).__name__} and {type(averages).__name__}; "
                "pass what Ema.state_dict returned"
            )
        _check_same_shapes(self._averages, averages)
        _copy_into(self._averages, averages)
        self.updates = updates


def _average_dtype(tensor: Tensor) -> torch.dtype:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half else tensor.dtype


@torch.no_grad()
def _copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(sources[name])


def _check_same_shapes(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    found = {name: tuple(tensor.shape) for name, tensor in got.items()}
    different = sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )
    if different:
        name = different[0]
        raise ValueError(
            f"ema state: expected {name} of shape {wanted.get(name)}, got {found.get(name)} "
            f"({len(different)} such entries); load it into the architecture that was saved"
        )
