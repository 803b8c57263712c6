"""Check the arguments of `GradCache`; each error says what to pass instead."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from torch import nn

from gradcache_clip.cache.lengths import ByLength
from gradcache_clip.cache.methods import feature_methods, is_pair, remedy
from gradcache_clip.distributed.strategies import LocalStrategy, innermost

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Names of the GradCache package, and what to write for them here.
_OF_GRADCACHE = {
    "models": "encoders=(query_encoder, passage_encoder)",
    "chunk_sizes": "chunk_size=64, or one for each input",
    "loss_fn": "loss=InfoNCELoss(), or a function of the features of all inputs",
    "get_rep_fn": "get_features=function, which takes an encoder's output",
    "split_input_fn": "no function: tensors, dicts and tuples are cut, and anything else is passed "
    "as a list with one element a sample",
    "fp16": "strategy=LocalStrategy(grad_scaler), and call it inside torch.autocast",
    "scaler": "strategy=LocalStrategy(grad_scaler)",
}


def names_checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Wrap a function so that an unknown keyword raises an error that names the nearest one."""
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in kwargs:
            if name not in names:
                raise TypeError(_unknown_argument(name, names))
        return function(*args, **kwargs)

    return checked


def _unknown_argument(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    valid = near[0] + "=" if near else ", ".join(each for each in names if each != "self")
    remedy = f"write {_OF_GRADCACHE[name]}" if name in _OF_GRADCACHE else f"did you mean {valid}?"
    return f"GradCache: expected arguments that it has, got {name}=; {remedy}"


def refuse_keywords(given: Mapping[str, Any], call: str = "cache") -> None:
    """Refuse keywords of a call: arguments of the loss belong into `loss_kwargs`."""
    if "no_sync_except_last" in given:
        raise TypeError(
            f"{call}(...): expected inputs and loss_kwargs, got no_sync_except_last=; pass "
            "strategy=DDPStrategy() to GradCache, which exchanges gradients once a step"
        )
    if given:
        raise TypeError(
            f"{call}(...): expected inputs and loss_kwargs, got {', '.join(given)}; pass arguments "
            f"of the loss as loss_kwargs={{{', '.join(f'{name!r}: ...' for name in given)}}}, and "
            "inputs in the order of the encoders"
        )


def checked_encoders(encoders: Any) -> nn.Module | tuple[nn.Module, ...]:
    if isinstance(encoders, nn.Module) and not isinstance(encoders, nn.ModuleList):
        names = list(inspect.signature(innermost(encoders).forward).parameters)
        if names[:1] == ["tower"]:
            return encoders
        raise ValueError(
            f"encoders: expected a sequence of modules or one module with forward(tower, inputs), "
            f"got {type(encoders).__name__} with forward({', '.join(names)}); "
            f"{_as_one_encoder(innermost(encoders))}"
        )
    if isinstance(encoders, str) or not isinstance(encoders, (Sequence, nn.ModuleList)):
        raise TypeError(
            f"encoders: expected a sequence of torch.nn.Module, got {_named(encoders)}; pass "
            "(image_encoder, text_encoder), or (encoder, encoder) to use one for two inputs"
        )
    modules = tuple(encoders)
    for index, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"encoders: expected torch.nn.Module, got {_named(module)} at {index}; wrap "
                "a function into a module so that its parameters can be found, and the methods of "
                "a model with methods(model, ...)"
            )
        if is_pair(innermost(module)) and any(each is module for each in modules[:index]):
            raise ValueError(
                f"encoders: expected encoders of one input each, got {type(module).__name__} "
                f"twice, whose forward takes all of them; {_as_one_encoder(innermost(module))}"
            )
    if not modules:
        raise ValueError("encoders: expected at least one module, got none")
    return modules


def _as_one_encoder(module: nn.Module) -> str:
    if len(feature_methods(module)) > 1:
        return f"pass {remedy(module)}, one method for each input"
    return "write (encoder, encoder) to use one module for two inputs"


def _named(given: Any) -> str:
    """Describe a value in an error: itself if it is short, else its type."""
    plain = given is None or isinstance(given, (bool, int, float, str, type))
    return repr(given) if plain else type(given).__name__


def checked_loss(loss: Any) -> Callable[..., Any]:
    if not callable(loss) or isinstance(loss, type):
        raise TypeError(
            f"loss: expected a function or module on the features of all inputs, got "
            f"{_named(loss)}; such as ClipLoss()"
        )
    return loss


def checked_strategy(strategy: Any) -> LocalStrategy:
    if strategy is None:
        return LocalStrategy()
    if not isinstance(strategy, LocalStrategy):
        raise TypeError(
            f"strategy: expected LocalStrategy(), AllReduceStrategy(), DDPStrategy(), "
            f"FSDPStrategy(), DeepSpeedStrategy(engine) or None, got {_named(strategy)}; pass an "
            "instance"
        )
    return strategy


def checked_get_features(get_features: Any) -> Any:
    each = get_features if isinstance(get_features, (list, tuple)) else [get_features]
    for given in each:
        if given is not None and not callable(given):
            raise TypeError(
                f"get_features: expected a function of an encoder's output, or None, got "
                f"{_named(given)}; such as get_features=lambda output: output.pooler_output"
            )
    return get_features


def checked_auxiliary_losses(given: Any) -> dict[str, float]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not given:
        raise TypeError(
            f"auxiliary_losses: expected weights by name, got {_named(given)}; such as "
            'auxiliary_losses={"router": 0.01}, or None'
        )
    for name, weight in given.items():
        is_weight = isinstance(weight, Real) and not isinstance(weight, bool)
        if not isinstance(name, str) or not is_weight or not math.isfinite(weight):
            raise ValueError(
                f"auxiliary_losses: expected names with finite numbers as weights, got "
                f"{name!r}: {_named(weight)}; such as {{'router': 0.01}}"
            )
    return {name: float(weight) for name, weight in given.items()}


def checked_loss_key(given: Any) -> str:
    if not isinstance(given, str):
        raise TypeError(
            f"loss_key: expected the name of the part that is minimised, got {_named(given)}; such "
            'as loss_key="total"'
        )
    return given


def checked_embed_chunk_size(embed: Any, chunk_size: Any, sort_by_length: Any) -> Any:
    """Require multiples of `chunk_size`, where "auto" and budgets leave it known."""
    if embed is None:
        return None
    embed = checked_chunk_size(embed, "embed_chunk_size")
    if chunk_size == "auto":
        return embed
    given = [embed, chunk_size, sort_by_length]
    count = max((len(each) for each in given if isinstance(each, (list, tuple))), default=1)
    columns = [each if isinstance(each, (list, tuple)) else [each] * count for each in given]
    for together, size, sorting in zip(*columns, strict=False):
        by_tokens = sorting is not None and sorting.budget is not None
        if not by_tokens and together % size:
            raise ValueError(
                f"embed_chunk_size: expected a multiple of chunk_size={size}, got {together}; such "
                f"as embed_chunk_size={size * max(2, round(together / size))}"
            )
    return embed


def checked_chunk_size(
    chunk_size: int | Sequence[int], name: str = "chunk_size"
) -> int | tuple[int, ...]:
    several = isinstance(chunk_size, (list, tuple))
    sizes = tuple(chunk_size) if isinstance(chunk_size, (list, tuple)) else (chunk_size,)
    if not sizes or not all(_is_positive_integer(size) for size in sizes):
        raise ValueError(
            f"{name}: expected a positive integer, or one for each input, got {chunk_size!r}; "
            f'take the largest that fits in memory, such as {name}=64, or chunk_size="auto"'
        )
    integers = tuple(int(size) for size in sizes)
    return integers if several else integers[0]


def checked_division(rows: Any) -> Any:
    each = rows if isinstance(rows, (list, tuple)) else [rows]
    for given in each:
        if given is not None and (isinstance(given, type) or not callable(given)):
            raise TypeError(
                f"rows: expected PackedPatches(), PackedTokens(), another function of an input, or "
                f"None, or one for each input, got {_named(given)}; such as "
                "rows=[PackedPatches(), None]"
            )
    return rows


def _is_positive_integer(size: Any) -> bool:
    return isinstance(size, Integral) and not isinstance(size, bool) and int(size) > 0


def checked_sorting(given: Any, chunk_size: Any) -> Any:
    each = given if isinstance(given, (list, tuple)) else [given]
    if not all(sorting is None or isinstance(sorting, ByLength) for sorting in each):
        raise TypeError(
            f"sort_by_length: expected ByLength() or None, or one for each input, got {given!r}; "
            "such as sort_by_length=[None, ByLength()]"
        )
    if chunk_size != "auto" and any(sorting and sorting.budget == "auto" for sorting in each):
        raise ValueError(
            f'sort_by_length: expected chunk_size="auto" beside a budget that is "auto", got '
            f'chunk_size={chunk_size!r}; pass chunk_size="auto", or a number as the budget'
        )
    return given
