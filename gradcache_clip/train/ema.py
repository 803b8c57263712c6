"""Exponential moving average of a model's weights, for evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3


def moving_average(model: nn.Module, decay: float) -> ModelEmaV3:
    """Return a copy of the model that holds moving averages of its weights and buffers.

    Update number n (from 1) computes

        average = d * average + (1 - d) * weights,    d = min(decay, (1 + n) / (10 + n))

    so the random initial weights fade within the first steps. Create the average before an engine
    casts the model to half precision: it keeps the dtype that it starts with.

    Source:
        Polyak and Juditsky 1992; the warm-up is TensorFlow's ExponentialMovingAverage(num_updates).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> average = moving_average(model, 0.999)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> update_average(average, model, 1)
        >>> bool(average.module.weight.abs().sum() > 0)
        True
    """
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_gamma=9, warmup_power=1)


def update_average(average: ModelEmaV3, model: nn.Module, update: int) -> None:
    """Update the average after optimizer step number `update`, counted from 1."""
    # timm's warm-up at step s, with gamma and power from above, is (s - 1) / (s + 8).
    average.update(model, step=update + 2)
