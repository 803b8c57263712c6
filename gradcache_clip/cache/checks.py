"""Refuse arguments, features and losses that a step cannot be exact with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradcache_clip.cache.batch_tree import tensors_in
from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.tower import Tower
from gradcache_clip.distributed.graph import leaves_behind
from gradcache_clip.distributed.strategies import LocalStrategy


def one_for_each(given: Any, count: int, name: str) -> list[Any]:
    if not isinstance(given, (list, tuple)):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{name}: expected one for each of {count} inputs, got {len(given)}")
    return list(given)


def module_for_each(encoders: nn.Module | Sequence[nn.Module], count: int) -> list[nn.Module]:
    if isinstance(encoders, nn.Module):
        return [encoders] * count
    if len(encoders) != count:
        raise ValueError(
            f"inputs: expected {len(encoders)}, one for each encoder, got {count}; an encoder with "
            "several arguments takes them as one tuple or dict"
        )
    return list(encoders)


def one_of(name: str, given: str, choices: tuple[str, ...]) -> str:
    if given not in choices:
        named = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        raise ValueError(f"{name}: expected {named}, got {given!r}")
    return given


def check_strategy(strategy: LocalStrategy, towers: Sequence[Tower]) -> None:
    """Refuse encoders that the strategy would give wrong gradients, and ranks that would hang."""
    heads = [head for tower in towers for head in tower.modules[1:]]
    strategy.check([tower.module for tower in towers], heads)
    if strategy.talks and strategy.reduces:
        _refuse_input_gradients(strategy, towers)
    if strategy.collective_forward:
        check_same_chunks(strategy, towers)


def check_same_chunks(strategy: LocalStrategy, towers: Sequence[Tower]) -> None:
    """Raise, on every rank, if ranks would take different numbers of forwards."""
    by_rank = strategy.gathered([(len(tower.chunks), tower.embed_together) for tower in towers])
    for index, tower in enumerate(towers):
        counts = [counts_of_rank[index] for counts_of_rank in by_rank]
        if len(set(counts)) > 1:
            raise ValueError(
                f"{tower.name}: expected as many chunks on every rank, got {counts} (chunks, and "
                f"chunks embedded together) by rank; under {type(strategy).__name__} a forward "
                "waits for all ranks: give each as many rows, ByLength no max_tokens, and "
                "embed_chunk_size only to encoders that draw random numbers in all chunks or none"
            )


def _refuse_input_gradients(strategy: LocalStrategy, towers: Sequence[Tower]) -> None:
    for tower in towers:
        if any(tensor.requires_grad for tensor in tensors_in(tower.passed)):
            raise ValueError(
                f"{tower.name}: expected inputs that ask for no gradient, got one with "
                f"requires_grad=True under {type(strategy).__name__} over several processes, where "
                "its gradient would come out multiplied by their number; make it a parameter of "
                "the encoder, or pass x.detach()"
            )


def check_loss_arguments(strategy: LocalStrategy, loss_kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of the loss whose gradients nobody reduces.

    That of a single number, such as a scale, is complete on every rank.
    """
    if not (strategy.talks and strategy.reduces):
        return
    for name, given in loss_kwargs.items():
        tensors = (each for each in pytree.tree_leaves(given) if isinstance(each, Tensor))
        if any(each.requires_grad and each.numel() > 1 for each in tensors):
            raise ValueError(
                f"loss_kwargs: expected a {name} that asks for no gradient, got one with "
                f"requires_grad=True, which {type(strategy).__name__} would not reduce over the "
                "processes; let one more encoder compute it, whose features the loss takes as "
                f"{name}, or pass {name}.detach()"
            )


def check_leaves(
    tower: Tower, chunk: Chunk, leaves: Iterable[Tensor], strategy: LocalStrategy
) -> None:
    """Refuse parameters that a strategy does not know of, and so would not reduce."""
    if not (strategy.talks and strategy.reduces):
        return
    known = {id(leaf) for module in tower.modules for leaf in strategy.leaves(module)}
    hidden = [leaf for leaf in leaves if id(leaf) not in known]
    looks = bool(hidden)
    if strategy.collective_forward:
        looks = strategy.anywhere(looks, tower.features[0].device)
    if not looks:
        return
    # What a forward makes, such as embeddings that peft lets ask for gradients, is new each time.
    again = {id(leaf) for leaf in leaves_behind(tower.again(chunk, tower.bare_module))}
    for leaf in hidden:
        if id(leaf) in again:
            raise ValueError(
                f"{tower.name}: expected parameters that a module has registered, got a tensor of "
                f"shape {tuple(leaf.shape)} that only a function or attribute holds, and whose "
                f"gradient {type(strategy).__name__} would not reduce; make it a parameter of the "
                "encoder, or of a module in get_features"
            )


def check_plain_backward(strategy: LocalStrategy, what: str, remedy: str) -> None:
    """Raise where encoders cannot run backward on one rank, or without the strategy's engine."""
    if not strategy.plain_backward:
        raise ValueError(
            f"{what}: expected encoders that a rank can run by itself, got "
            f"{type(strategy).__name__}, under which ranks would wait for each other; {remedy}"
        )


def all_finite(towers: Sequence[Tower]) -> Tensor | None:
    """Compute, without waiting for it, whether all features are finite; None if there are none."""
    flags = [
        # The extremes, which pass NaN on, cost one pass and no mask.
        torch.stack(feature.aminmax()).isfinite().all()
        for tower in towers
        for feature in tower.features
        if feature.is_floating_point() and feature.numel()
    ]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).all() if flags else None


def check_finite(finite: Tensor | None, towers: Sequence[Tower], strategy: LocalStrategy) -> None:
    """Refuse NaN and infinity, by encoder and chunk; a good batch costs one synchronisation.

    All ranks raise together: one that stopped alone would leave the others waiting for it.
    """
    if finite is None or not strategy.on_any_rank(~finite):
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
    """Refuse meta tensors, inference tensors, and graphs that the first replay would free."""
    for tower in towers:
        tensors = list(tensors_in(tower.passed))
        _check_tensors(tower, tensors)
        computed = any(tensor.requires_grad and not tensor.is_leaf for tensor in tensors)
        if computed and len(tower.chunks) > 1:
            raise ValueError(
                f"{tower.name}: expected inputs that are leaves, got a tensor with a graph; put "
                "the module that computed it into the encoder, or pass "
                "x.detach().requires_grad_() and call x.backward() with its .grad afterwards"
            )


def _check_tensors(tower: Tower, tensors: Sequence[Tensor]) -> None:
    replayed = tower.trainable and tower.trunk is None and not torch.is_inference_mode_enabled()
    for tensor in tensors:
        if tensor.is_meta:
            raise ValueError(
                f"{tower.name}: expected inputs with values, got a tensor on the meta device; pass "
                "data, or plan memory with gradcache_clip.memory.count_cached_step"
            )
        if replayed and tensor.is_inference():
            raise ValueError(
                f"{tower.name}: expected inputs that a backward can use, got a tensor made inside "
                "torch.inference_mode(); pass x.clone(), or make it inside torch.no_grad()"
            )


def check_no_partial_gradients(modules: Sequence[nn.Module], strategy: LocalStrategy) -> None:
    """Refuse to add to the partial gradients of a step that was interrupted."""
    left = [p for module in modules for p in module.parameters() if p.grad is not None]
    found = any(bool(parameter.grad.any()) for parameter in left if parameter.grad is not None)
    if strategy.anywhere(found, left[0].device if left else torch.device("cpu")):
        raise RuntimeError(
            "GradCache: expected gradients of whole steps in .grad, got what the last step had "
            "added when it was broken off; call optimizer.zero_grad() and take the step again"
        )


def check_unchanged(features: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Refuse a loss that changes features in place: the replay would not see the change."""
    if [feature._version for feature in features] != list(versions):
        raise ValueError(
            "loss: expected features to be left as they are, got features that the loss changed in "
            "place; let it work on a copy"
        )


def loss_in(output: Any, key: str) -> Tensor:
    """Take the loss out of what a loss function returned."""
    if isinstance(output, Mapping):
        loss = output.get(key)
    else:
        loss = output if isinstance(output, Tensor) else getattr(output, key, None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(output).__name__
        parts = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise TypeError(
            f"loss: expected a scalar tensor, an object whose .{key} is one or a dict of parts "
            f"with {key!r}, got {got}{parts}; reduce the loss to its mean over the batch, and say "
            "with loss_key which part is minimised"
        )
    return loss


def check_loss_graph(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise ValueError(
            "loss: expected a loss that depends on a trainable parameter, got one without a graph; "
            "every encoder is frozen, or the loss detaches its features"
        )
