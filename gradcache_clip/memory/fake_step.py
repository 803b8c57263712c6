"""Runs a training step on fake tensors: shapes and dtypes without memory.

B rows of the batch in question; example inputs may have any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.func import functional_call
from torch.utils import _pytree as pytree

from gradcache_clip.cache.batch_tree import count_rows, map_tensors, repeat_rows, tensors_in
from gradcache_clip.cache.checks import one_for_each
from gradcache_clip.cache.chunks import Chunk, even_chunks, row_count
from gradcache_clip.cache.gradient_hooks import HeldHooks
from gradcache_clip.cache.graph_budget import GraphBudget
from gradcache_clip.cache.own_rows import with_own_rows
from gradcache_clip.cache.random_state import Draws
from gradcache_clip.cache.settings import History, Settings
from gradcache_clip.cache.step import CachedStep
from gradcache_clip.cache.torch_state import forget_autocast_casts
from gradcache_clip.cache.tower import Encode, Tower, surely_trainable
from gradcache_clip.cache.trunk import call_encoder
from gradcache_clip.distributed.strategies import LocalStrategy
from gradcache_clip.memory.running_module import naming_modules

_NEEDS_DATA = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

Mark = Callable[[Iterable[Tensor], str], None]
GetFeatures = Callable[[Any], Any] | Sequence[Callable[[Any], Any] | None]


class Keeping(NamedTuple):
    """Options of a counted step: feature extraction, and optimizer states per parameter."""

    features: GetFeatures | None
    optimizer_states: int
    auxiliary_losses: Mapping[str, float]


class FakeStep:
    """Fake twins of all parameters, and towers that run on them. Created inside `FakeTensorMode`.

    The modules themselves are unchanged: no parameter is copied or replaced.

    Attributes:
        state: fake parameters and buffers, each once.
        optimizer: fake optimizer states, `keeping.optimizer_states` for each trainable parameter.
        inputs: fake inputs of B rows.
        towers: one for each input, over fake inputs.
        device_types: of all these, and "cpu".
    """

    def __init__(
        self,
        encoders: nn.Module | Sequence[nn.Module],
        loss: Callable[..., Any],
        example_inputs: Sequence[Any],
        batch_size: int,
        keeping: Keeping,
    ) -> None:
        self._fakes: dict[int, Tensor] = {}
        self._losses = keeping.auxiliary_losses
        modules = _one_for_each_input(encoders, len(example_inputs))
        self.loss = _FakeTwin(loss, self._fakes) if isinstance(loss, nn.Module) else loss
        inputs = [
            _expand(given, batch_size, f"input {index}")
            for index, given in enumerate(example_inputs)
        ]
        extractors = one_for_each(keeping.features, len(example_inputs), "get_features")
        self.towers = []
        for index, (module, given) in enumerate(zip(modules, inputs, strict=True)):
            twin = _FakeTwin(module, self._fakes)
            encode = _encode_with(twin, index if isinstance(encoders, nn.Module) else None)
            name, chunks = (
                f"encoder {index} ({type(module).__name__})",
                [Chunk(slice(0, batch_size))],
            )
            features = extractors[index]
            # The twin has no parameters of its own, whose device (e.g. meta) inputs would move to.
            weights = keeping.auxiliary_losses
            tower = _FakeTower(name, module, twin, encode, features, given, chunks, weights=weights)
            # As in the engine: a single module may be frozen for some inputs only.
            if not isinstance(encoders, nn.Module) and surely_trainable(module, given):
                tower.trainable = True
            self.towers.append(tower)
        self.state = list(self._fakes.values())
        self.trainable = [tensor for tensor in self.state if tensor.requires_grad]
        states = range(keeping.optimizer_states)
        self.optimizer = [torch.empty_like(tensor) for tensor in self.trainable for _ in states]
        self.inputs = list(tensors_in(inputs))
        self.device_types = {tensor.device.type for tensor in (*self.state, *self.inputs)} | {"cpu"}

    @property
    def plan(self) -> Settings:
        """Settings of a step on fake tensors."""
        modules = tuple(tower.module for tower in self.towers)
        return Settings(
            modules,
            self.loss,
            auxiliary_losses=self._losses,
            strategy=_OnFakes(),
            check_replay="off",
            check_rows="off",
        )

    def cached(self, chunk_size: int, mark: Mark) -> CachedStep:
        """Return the engine's step over at most three chunks of each tower, keeping one graph."""
        for tower in self.towers:
            tower.chunks, tower.mark = _three_at_most(tower.chunks, chunk_size), mark

        def marked_loss(*features: Any) -> Any:
            for leaf in pytree.tree_leaves(features):
                if leaf.requires_grad:
                    mark_gradient(leaf, mark, "feature")
            return self.loss(*features)

        plan = replace(self.plan, loss=marked_loss)
        budget = GraphBudget(None, torch.device("cpu"))
        # Looks of a first step ask whether leaves are the module's own; fakes are not.
        history = History(stepped=True)
        return CachedStep(plan, [*self.towers], HeldHooks(), budget, history)


def mark_gradient(leaf: Tensor, mark: Mark, kind: str) -> None:
    """Mark the gradient of a leaf as soon as it is accumulated."""
    leaf.register_post_accumulate_grad_hook(
        lambda leaf: mark([leaf.grad] if leaf.grad is not None else [], kind)
    )


class _FakeTower(Tower):
    """Marks features as they are stored, and captures no random state, which has no fake values."""

    mark: Mark

    def keep(self, parts: list[Tensor], chunk: Chunk) -> None:
        super().keep(parts, chunk)
        self.mark(self.features, "feature")

    def draws(self) -> Draws:
        return _NothingDrawn(())


class _NothingDrawn(Draws):
    """Skips comparisons of random states, whose values fake tensors do not have."""

    def passed(self, chunk: Any) -> None:
        pass

    def settle(self) -> bool:
        return False


class _OnFakes(LocalStrategy):
    def on_any_rank(self, flag: Tensor) -> bool:
        """Return False: fake features are never NaN."""
        return False


def _three_at_most(chunks: Sequence[Chunk], chunk_size: int) -> list[Chunk]:
    """Return the first two chunks and the last one, which determines the number of rows."""
    cut = even_chunks(row_count(chunks), chunk_size)
    return [*cut[:2], *cut[2:][-1:]]


@contextmanager
def fake_tensors(encoders: nn.Module | Sequence[nn.Module], loss: Any) -> Iterator[None]:
    """Enter `FakeTensorMode`, with errors that name the module that needs data.

    Raises:
        ValueError: a module branches on tensor values, or uses an op with data-dependent shapes.
    """
    roots = {"encoder": encoders} if isinstance(encoders, nn.Module) else dict(_named(encoders))
    if isinstance(loss, nn.Module):
        roots["loss"] = loss
    try:
        # allow_non_fake_inputs converts constants that are neither parameters nor buffers.
        with naming_modules(roots, _NEEDS_DATA), FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        forget_autocast_casts()


class _FakeTwin(nn.Module):
    """Runs a module on fake parameters, sharing those that `fakes` already holds."""

    def __init__(self, module: nn.Module, fakes: dict[int, Tensor]) -> None:
        super().__init__()
        # In a tuple, so that nn.Module does not register it as a child.
        self.original = (module,)
        named = chain(
            module.named_parameters(remove_duplicate=False),
            module.named_buffers(remove_duplicate=False),
        )
        self.fakes = {name: fakes.setdefault(id(real), _twin_of(real)) for name, real in named}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.original[0], self.fakes, args, kwargs)


def _twin_of(real: Tensor) -> Tensor:
    fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=_device_of(real))
    return fake.requires_grad_(real.requires_grad)


def _device_of(tensor: Tensor) -> torch.device:
    """Return the tensor's device; modules on the meta device count as on the CPU."""
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _encode_with(twin: nn.Module, tower: int | None) -> Encode:
    if tower is None:
        return lambda _, inputs: call_encoder(twin, inputs)
    return lambda _, inputs: twin(tower, inputs)


def _one_for_each_input(encoders: nn.Module | Sequence[nn.Module], count: int) -> list[nn.Module]:
    modules = [encoders] * count if isinstance(encoders, nn.Module) else list(encoders)
    if len(modules) != count:
        raise ValueError(
            f"example_inputs: expected {len(modules)}, one for each encoder, got {count}; an "
            "encoder with several arguments takes them as one tuple or dict"
        )
    return modules


def _expand(example: Any, batch_size: int, name: str) -> Any:
    """Return the same structure with `batch_size` rows of fake tensors."""
    count_rows(example, name)
    fakes = map_tensors(_fake, with_own_rows(example, name))
    return repeat_rows(fakes, batch_size)


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=_device_of(tensor))


def _named(encoders: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    return ((f"encoder {index}", module) for index, module in enumerate(encoders))
