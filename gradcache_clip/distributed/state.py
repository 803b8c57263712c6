"""Weights and optimizer state by name, whatever wraps, shards or holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gradcache_clip.distributed.collectives import world_size
from gradcache_clip.distributed.wrappers import DDP, DEEPSPEED, is_kind

StateByName = dict[str, dict[str, Any]]
"""Name of a parameter -> its moments and its count of steps; empty where it was never stepped."""


# Adam, AdamW and NAdam begin with these; others are compared among parameters alone.
_ADAM = frozenset({"exp_avg", "exp_avg_sq", "step"})
_OF_EACH_WEIGHT = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"})


def rank0_keeps(value: Tensor) -> Tensor:
    """The value on the CPU of rank 0; other ranks drop it and get an empty one."""
    if world_size() > 1 and dist.get_rank() > 0:
        return value.new_empty(0)
    return value.cpu()


def trained_parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Parameters of all modules that ask for a gradient, each once."""
    found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return list(found.values())


def trained_by_name(modules: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """The same by name, as if nothing were wrapped.

    Raises:
        ValueError: two parameters have the same name.
    """
    named: dict[str, nn.Parameter] = {}
    trained = {id(parameter) for parameter in trained_parameters(modules)}
    for module in modules:
        for long_name, parameter in module.named_parameters():
            if id(parameter) not in trained:
                continue
            trained.discard(id(parameter))
            name = plain_name(module, long_name)
            if name in named:
                raise ValueError(
                    f"modules: expected each name once, got two parameters named {name}; put the "
                    "modules into one torch.nn.ModuleDict, which gives them different names"
                )
            named[name] = parameter
    return named


def plain_name(module: nn.Module, name: str) -> str:
    """Name of a parameter as if nothing around it were wrapped or compiled."""
    return ".".join(_plain_parts(module, name.split(".")))


def _plain_parts(module: Any, parts: Sequence[str]) -> Iterator[str]:
    for part in parts:
        wrapper = is_kind(module, DDP) or is_kind(module, DEEPSPEED)
        if not (part == "_orig_mod" or (wrapper and part == "module")):
            yield part
        module = getattr(module, part, None)


def checked_weights(module: nn.Module, weights: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name in the module's state dict -> the value to load, and the value that is there.

    Raises:
        ValueError: other names, or other shapes, than the module has.
    """
    state = {n: (plain_name(module, n), v) for n, v in module.state_dict(keep_vars=True).items()}
    if different := {name for name, _ in state.values()} ^ weights.keys():
        raise ValueError(
            f"weights: expected those of this module, got {len(different)} names that only one of "
            f"both has, such as {min(different)}; load the weights into the module that wrote them"
        )
    for name, value in state.values():
        if isinstance(value, Tensor) and _shape(value) != tuple(weights[name].shape):
            raise ValueError(
                f"weights: expected {name} of shape {_shape(value)}, got "
                f"{tuple(weights[name].shape)}; load the weights into the module that wrote them"
            )
    return {long_name: (weights[name], value) for long_name, (name, value) in state.items()}


def _shape(value: Tensor) -> tuple[int, ...]:
    """Under ZeRO-3 a parameter is empty, and knows how large it is when gathered."""
    return tuple(getattr(value, "ds_shape", value.shape))


def check_optimizer(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Raise unless the optimizer steps these parameters, no less and no more.

    Raises:
        ValueError: it lacks a trainable parameter, or has one of another module.
    """
    groups = optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"] if p.requires_grad}
    trained = {id(parameter) for parameter in parameters}
    if held != trained:
        raise ValueError(
            f"optimizer: expected the {len(trained)} trainable parameters of modules, got "
            f"{len(held & trained)} of them and {len(held - trained)} others; pass all that it "
            "steps as modules, and freeze what it should not step"
        )


def check_max_norm(max_norm: float) -> None:
    """Raise for a bound that gradients cannot be clipped to.

    Raises:
        ValueError: it is negative or NaN.
    """
    if not max_norm >= 0:
        raise ValueError(
            f"max_norm: expected a norm above 0, or 0 for no clipping, got {max_norm}; change it"
        )


def state_by_name(
    optimizer: Optimizer, named: Mapping[str, nn.Parameter], whole: Callable[[Tensor], Tensor]
) -> StateByName:
    """State of an optimizer by the names of its parameters.

    Args:
        optimizer: over these parameters.
        named: parameters by name.
        whole: makes the whole of a tensor of which this process may hold a part.
    """
    return {
        name: {
            key: whole(value) if isinstance(value, Tensor) else value
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        for name, parameter in named.items()
    }


def load_state_by_name(
    optimizer: Optimizer,
    named: Mapping[str, nn.Parameter],
    saved: Mapping[str, Mapping[str, Any]],
    part: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Give an optimizer what `state_by_name` returned; its settings stay as they are.

    Args:
        optimizer: over the same parameters as the saved one, or some of them.
        named: parameters by name.
        saved: state by name; empty for an optimizer that has not stepped.
        part: makes of a whole tensor what this process holds of it, as of the second.

    Raises:
        ValueError: a parameter of the optimizer has no saved state, while others have one.
    """
    check_moments(optimizer, named, saved)
    names = {id(parameter): name for name, parameter in named.items()}
    state = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        if saved and parameter.requires_grad:
            values = saved_of(saved, names[id(parameter)])
            if values:
                state[index] = {key: _part_of(v, parameter, part) for key, v in values.items()}
    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": settings})


def check_moments(
    optimizer: Optimizer, named: Mapping[str, nn.Parameter], saved: Mapping[str, Any]
) -> None:
    """Raise unless saved moments fit the parameters that they belong to.

    Fused optimizers write through moments without looking at their size.

    Raises:
        ValueError: other names of moments than the optimizer makes or than other parameters have,
            another shape than the parameter has, or a value that is no finite number of steps.
    """
    expected = _ADAM if isinstance(optimizer, torch.optim.Adam) else None
    for name, parameter in named.items():
        values = saved_of(saved, name) if saved else {}
        if not isinstance(values, Mapping):
            raise _unfit(name, "a mapping of moments", type(values).__name__)
        if values and expected is not None and not expected <= values.keys():
            raise _unfit(name, f"{', '.join(sorted(expected))}", ", ".join(sorted(values)))
        expected = frozenset(values) if values and expected is None else expected
        for key, value in values.items():
            _check_moment(name, key, value, _shape(parameter))


def _check_moment(name: str, key: str, value: Any, shape: tuple[int, ...]) -> None:
    of_each_weight = key in _OF_EACH_WEIGHT
    if not isinstance(value, Tensor):
        if of_each_weight or not isinstance(value, int | float):
            raise _unfit(f"{name}.{key}", "a tensor or a number", type(value).__name__)
        return
    # Counts and factors are single numbers, whatever the parameter is.
    if (value.dim() or of_each_weight) and tuple(value.shape) != shape:
        raise _unfit(f"{name}.{key}", f"shape {shape}", f"shape {tuple(value.shape)}")
    if value.layout is not torch.strided or (value.dim() and not value.is_floating_point()):
        raise _unfit(f"{name}.{key}", "floating-point numbers", f"{value.dtype}, {value.layout}")
    if key == "step" and (value.dim() or not (value.isfinite() and value >= 0)):
        raise _unfit(f"{name}.{key}", "a number of steps", str(value.tolist()))


def _unfit(name: str, expected: str, got: str) -> ValueError:
    return ValueError(
        f"optimizer state: expected {expected} for {name}, got {got}; load a checkpoint that this "
        "run has written"
    )


def saved_of(saved: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The saved state of one parameter.

    Raises:
        ValueError: there is none.
    """
    if name not in saved:
        raise ValueError(
            f"optimizer state: expected moments of {name}, got none in the checkpoint; resume "
            "with the strategy that wrote it, or start a new run"
        )
    return saved[name]


def _part_of(value: Any, parameter: Tensor, part: Callable[[Tensor, Tensor], Tensor]) -> Any:
    shaped = isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0
    # Views that repeat one number have the right shape and no room for others.
    return part(value.contiguous(), parameter) if shaped else value
