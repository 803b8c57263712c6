"""Faults of an engine, as a mistake in a later edit would make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gradcache_clip.cache import batch_tree
from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.tower import Tower
from gradcache_clip.distributed.strategies import LocalStrategy
from gradcache_clip.distributed.unreached import reach

CACHE, DISTRIBUTED = "gradcache_clip.cache", "gradcache_clip.distributed"
Change = Callable[[], AbstractContextManager[object]]


@contextmanager
def around(target: str, change: Callable[..., Any]) -> Iterator[None]:
    """`change` is called with what was there and its arguments."""
    original = resolve_name(target)
    with mock.patch(target, lambda *args, **kwargs: change(original, *args, **kwargs)):
        yield


# One process.


def drops_a_replay(original: Any, *args: Any) -> Any:
    order = original(*args)
    return order[:-1] if len(order) > 1 else order


def drops_kept_graphs(original: Any, *args: Any) -> Any:
    return [group for group in original(*args) if not (len(group) == 1 and group[0][1].graph)]


def replays_with_new_numbers(_: Any, tower: Tower, chunk: Chunk) -> Any:
    return tower._forward(tower.module, chunk)


def cuts(original: Any, inputs: Any, chunk: Chunk, change: Callable[[Any], Any]) -> Any:
    """The second part with rows is cut in another way."""
    seen = iter(range(100))
    cut, has_rows = batch_tree._cut, batch_tree._has_rows
    taken: list[int] = []

    def other(given: Any, take: Callable[[Any], Any]) -> Any:
        if not isinstance(given, batch_tree.Shared) and has_rows(given):
            taken.append(next(seen))
            return change(take(given)) if taken[-1] == 1 else take(given)
        return cut(given, take)

    with mock.patch.object(batch_tree, "_cut", other):
        return original(inputs, chunk)


def rolled(rows: Any) -> Any:
    if isinstance(rows, list):
        return [*rows[1:], *rows[:1]]
    if isinstance(rows, Tensor):
        return rows.roll(1, 0)
    return rows[::-1].copy()


def too_few(rows: Any) -> Any:
    """The last row twice in place of the one before it."""
    if len(rows) == 1:
        return rows
    if isinstance(rows, list):
        return [*rows[:-2], rows[-1], rows[-1]]
    places = [*range(len(rows) - 2), len(rows) - 1, len(rows) - 1]
    return rows[places]


def shared_is_cut(original: Any, inputs: Any, take: Callable[[Any], Any]) -> Any:
    return original(inputs.value if isinstance(inputs, batch_tree.Shared) else inputs, take)


def as_it_came(original: Any, tower: Tower, rows: Any) -> Any:
    return rows


def trims_one_column_more(original: Any, *args: Any) -> Any:
    chunks = original(*args)
    return [
        replace(
            c,
            columns=c.columns
            and {each: slice(s.start, max(1, s.stop - 1)) for each, s in c.columns.items()},
        )
        for c in chunks
    ]


def all_is_padding(original: Any, kept: Tensor, parts: Sequence[Any]) -> list[Tensor]:
    return [torch.ones((), dtype=torch.bool) for _ in original(kept, parts)]


def draws_unnoticed(original: Any, draws: Any) -> bool:
    original(draws)
    return False


def hooks_on_parts(original: Any, mode: str, *args: Any) -> Any:
    return original("every_chunk", *args)


def with_gradients(change: Callable[[Any], None]) -> Change:
    """Cached gradients are changed before the replay."""

    def replay(original: Any, step: Any) -> Any:
        change([tower for tower in step.towers if tower.trainable])
        return original(step)

    return partial(around, f"{CACHE}.step.CachedStep.replay", replay)


def of_first_tower(towers: Sequence[Tower]) -> None:
    for tower in towers[1:]:
        tower.gradients = towers[0].gradients


def of_other_rows(towers: Sequence[Tower]) -> None:
    for tower in towers:
        tower.gradients = [None if g is None else g.roll(1, 0) for g in tower.gradients]


def first_feature_alone(towers: Sequence[Tower]) -> None:
    for tower in towers:
        tower.gradients = [tower.gradients[0], *[None] * (len(tower.gradients) - 1)]


def decided_by_first_chunk(original: Any, tower: Tower, chunk: Chunk, index: int, *a: Any) -> None:
    original(tower, chunk, index, *a)
    if tower.trainable is None:
        tower.trainable = False


def earlier_gradients_lost(original: Any, snapshot: Any) -> None:
    snapshot._aside.clear()


def loss_parameters_left_out(_: Any, strategy: Any, loss: Tensor, features: Any) -> None:
    leaves = [feature for feature in features if feature.requires_grad]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient


# Several.


def own_gradients(_: Any, strategy: LocalStrategy, *args: Any) -> None:
    LocalStrategy.backward(strategy, *args)


def one(*_: Any) -> float:
    return 1.0


def nothing(*_: Any, **__: Any) -> None:
    return None


def zeros_made_late(original: Any, strategy: Any, *args: Any) -> None:
    strategy._zeros = [reach(parameters) for _, parameters in strategy._finishing[:-1]]
    original(strategy, *args)


def reaches_the_first(original: Any, parameters: Sequence[Tensor], **options: Any) -> Tensor:
    return original(parameters[:1], **options)


def none_unused(*_: Any) -> list[Tensor]:
    return []


def missing_everywhere(_: Any, parameters: Sequence[Tensor], unused: Any) -> list[Tensor]:
    return [parameter for parameter in parameters if id(parameter) in unused]


def of_this_rank(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter.grad is not None]


def found_here(_: Any, strategy: LocalStrategy, found: bool, device: Any) -> bool:
    return found


@contextmanager
def without(*_: Any) -> Iterator[None]:
    yield


def every_replay_is_the_last(original: Any, strategy: Any, modules: Any, finished: Any) -> Any:
    return original(strategy, modules, {*modules})


def halves(original: Any, strategy: Any, features: Any, gradients: Sequence[Tensor]) -> None:
    original(strategy, features, [gradient / 2 for gradient in gradients])


def summed(original: Any, bucket: Sequence[Any]) -> None:
    original(bucket)
    for parameter in bucket:
        parameter.grad.mul_(2)
