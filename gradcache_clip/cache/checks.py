"""What a step refuses: arguments, features and losses that it cannot be exact with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from gradcache_clip.cache.lengths import ByLength
from gradcache_clip.cache.nested import tensors_in
from gradcache_clip.cache.tower import Tower
from gradcache_clip.distributed.strategies import LocalStrategy, innermost


def checked_encoders(encoders: Any) -> nn.Module | tuple[nn.Module, ...]:
    if isinstance(encoders, nn.Module) and not isinstance(encoders, nn.ModuleList):
        names = list(inspect.signature(innermost(encoders).forward).parameters)
        if names[:1] == ["tower"]:
            return encoders
        raise ValueError(
            f"encoders: expected a sequence of modules or one module with forward(tower, inputs), "
            f"got {type(encoders).__name__} with forward({', '.join(names)}); write "
            "(encoder, encoder) to use one module for two inputs"
        )
    modules = tuple(encoders)
    for index, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"encoders: expected torch.nn.Module, got {type(module).__name__} at {index}; wrap "
                "a function into a module so that its parameters can be found"
            )
    if not modules:
        raise ValueError("encoders: expected at least one module, got none")
    return modules


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


def _is_positive_integer(size: Any) -> bool:
    return isinstance(size, Integral) and not isinstance(size, bool) and int(size) > 0


def one_for_each(given: Any, count: int, name: str) -> list[Any]:
    if not isinstance(given, (list, tuple)):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{name}: expected one for each of {count} inputs, got {len(given)}")
    return list(given)


def checked_sorting(given: Any) -> Any:
    each = given if isinstance(given, (list, tuple)) else [given]
    if not all(sorting is None or isinstance(sorting, ByLength) for sorting in each):
        raise TypeError(
            f"sort_by_length: expected ByLength() or None, or one for each input, got {given!r}; "
            "such as sort_by_length=[None, ByLength()]"
        )
    return given


def one_of(name: str, given: str, choices: tuple[str, ...]) -> str:
    if given not in choices:
        named = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        raise ValueError(f"{name}: expected {named}, got {given!r}")
    return given


def check_strategy(strategy: LocalStrategy, towers: Sequence[Tower]) -> None:
    """Refuse encoders that the strategy would give wrong gradients, and ranks that would hang."""
    heads = [head for tower in towers for head in tower.modules[1:]]
    strategy.check([tower.module for tower in towers], heads)
    if not strategy.collective_forward:
        return
    by_rank = strategy.gathered([(len(tower.chunks), tower.embed_together) for tower in towers])
    for index, tower in enumerate(towers):
        counts = [counts_of_rank[index] for counts_of_rank in by_rank]
        if len(set(counts)) > 1:
            raise ValueError(
                f"{tower.name}: expected as many chunks on every rank, got {counts} (chunks, and "
                f"chunks embedded together) by rank; under {type(strategy).__name__} a forward "
                "waits for all ranks: give each as many rows, and ByLength no max_tokens"
            )


def check_plain_backward(strategy: LocalStrategy, what: str, remedy: str) -> None:
    """Raise where encoders cannot run backward on one rank, or without the strategy's engine."""
    if not strategy.plain_backward:
        raise ValueError(
            f"{what}: expected encoders that a rank can run by itself, got "
            f"{type(strategy).__name__}, under which ranks would wait for each other; {remedy}"
        )


def check_finite(towers: Sequence[Tower], strategy: LocalStrategy) -> None:
    """NaN and infinity are named by encoder and chunk; a good batch costs one wait in all.

    All ranks raise together: one that stopped alone would leave the others waiting for it.
    """
    flags = [
        feature.isfinite().all()
        for tower in towers
        for feature in tower.features
        if feature.is_floating_point()
    ]
    if not flags:
        return
    broken = ~torch.stack([flag.to(flags[0].device) for flag in flags]).all()
    if not strategy.on_any_rank(broken):
        return
    for tower in towers:
        for index, chunk in enumerate(tower.chunks):
            if not all(feature.isfinite().all() for feature in tower.cached(chunk)):
                raise ValueError(
                    f"{tower.name}: expected finite features, got NaN or infinity in chunk {index} "
                    f"of {len(tower.chunks)} ({chunk.name}); nothing was added to .grad. Look at "
                    "these inputs, and at the weights after the last step"
                )
    raise ValueError(
        "features: expected finite values on every rank, got NaN or infinity on another one, whose "
        "error says where; nothing was added to .grad"
    )


def check_inputs(towers: Sequence[Tower]) -> None:
    """The graph of a computed input would be freed by the first of several replays."""
    for tower in towers:
        computed = any(t.requires_grad and not t.is_leaf for t in tensors_in(tower.inputs))
        if computed and len(tower.chunks) > 1:
            raise ValueError(
                f"{tower.name}: expected inputs that are leaves, got a tensor with a graph; put "
                "the module that computed it into the encoder, or pass "
                "x.detach().requires_grad_() and call x.backward() with its .grad afterwards"
            )


def check_unchanged(towers: Sequence[Tower], versions: Sequence[int]) -> None:
    """A loss that writes into the features would be given other features than the replay."""
    now = [feature._version for tower in towers for feature in tower.features]
    if now != list(versions):
        raise ValueError(
            "loss: expected features to be left as they are, got features that the loss changed in "
            "place; let it work on a copy"
        )


def scalar_loss_of(output: Any) -> Tensor:
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(output).__name__
        raise TypeError(
            f"loss: expected a scalar tensor or an object whose .loss is one, got {got}; reduce "
            "the loss to its mean over the batch"
        )
    if not loss.requires_grad:
        raise ValueError(
            "loss: expected a loss that depends on a trainable parameter, got one without a graph; "
            "every encoder is frozen, or the loss detaches its features"
        )
    return loss
