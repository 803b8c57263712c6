"""The state of an optimizer by the names of parameters, whoever holds which part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Named = Iterable[tuple[str, nn.Parameter]]
StateByName = dict[str, dict[str, Any]]


def _as_it_is(value: Any, parameter: nn.Parameter) -> Any:
    return value


def state_by_name(
    optimizer: torch.optim.Optimizer,
    named: Named,
    whole: Callable[[Any], Any] = lambda value: value,
) -> StateByName:
    """Name of a parameter -> its moments and its count of steps.

    Args:
        optimizer: over some of the parameters.
        named: parameters with their names.
        whole: makes the whole of a value of which this process may hold a part.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> sorted(state_by_name(optimizer, layer.named_parameters())["weight"])
        ['exp_avg', 'exp_avg_sq', 'step']
    """
    return {
        name: {key: whole(value) for key, value in optimizer.state[parameter].items()}
        for name, parameter in named
        if parameter in optimizer.state
    }


def load_state_by_name(
    optimizer: torch.optim.Optimizer,
    named: Named,
    saved: Mapping[str, Mapping[str, Any]],
    part: Callable[[Any, nn.Parameter], Any] = _as_it_is,
) -> None:
    """Give an optimizer what `state_by_name` returned; its settings stay as they are.

    Args:
        optimizer: over the same parameters as the saved one, or some of them.
        named: parameters with their names.
        saved: state by name.
        part: makes of a whole value what this process holds of it.

    Raises:
        ValueError: a parameter of the optimizer has no saved state, while others have one.
    """
    names = {id(parameter): name for name, parameter in named}
    state = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        name = names[id(parameter)]
        if saved and name not in saved:
            raise ValueError(
                f"optimizer state: expected moments of {name}, got none in the checkpoint; resume "
                "with the engine that wrote it, or start a new run"
            )
        if saved:
            state[index] = {key: _part_of(v, parameter, part) for key, v in saved[name].items()}
    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": settings})


def _part_of(value: Any, parameter: nn.Parameter, part: Callable[[Any, nn.Parameter], Any]) -> Any:
    shaped = isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0
    return part(value, parameter) if shaped else value
