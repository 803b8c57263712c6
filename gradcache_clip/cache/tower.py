"""One input of a step and the encoder that it goes through, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradcache_clip.cache.batch_tree import tensors_in
from gradcache_clip.cache.chunks import Chunk, merged, row_count
from gradcache_clip.cache.graph_budget import NO_RETENTION, Retention, SavedBytes
from gradcache_clip.cache.host_inputs import HostInputs, device_for
from gradcache_clip.cache.outputs import WithLosses, check_features, names_in, select
from gradcache_clip.cache.random_state import Draws, accelerators_among
from gradcache_clip.cache.torch_state import (
    forget_autocast_casts,
    has_batch_statistics,
    kernels_as_with_gradients,
)
from gradcache_clip.cache.trunk import FrozenTrunk, call_encoder, run_trunk

Encode = Callable[[nn.Module, Any], Any]

_ONE_LEAF = pytree.tree_flatten(0)[1]


@dataclass
class Tower:
    """An encoder, the inputs of one step, and what the embed left behind for the replay.

    `trainable` is None while it is not known: parameters may live outside the module (a head in
    `get_features`), and one module for all inputs may be frozen for this one. Chunks are then
    embedded with gradients enabled until one has a graph; that of a frozen encoder has none.
    """

    name: str
    module: nn.Module
    bare_module: nn.Module
    encode: Encode
    get_features: Callable[[Any], Any] | None
    inputs: Any
    chunks: list[Chunk]
    trainable: bool | None = None
    embed_chunk_size: int | None = None
    """Rows that the embed runs at once while nothing random is drawn."""
    trunk: FrozenTrunk | None = None
    """Runs once a step; the module is then given its outputs."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of losses that it may return beside its features, by name."""
    passed: Any = None
    """The inputs as they were passed, where `inputs` hold their rows in another order."""
    order: Tensor | None = None
    """(B,) numbers of the rows of `inputs` among those that were passed; None if they agree."""
    replaced: Mapping[int, int] = field(default_factory=dict)
    """By id of a tensor in `inputs`, the id of the one that was passed."""
    losses: tuple[str, ...] = ()
    """Those that it returned, which are the last of `features`."""
    features: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    structure: Any = None
    _kinds: list[tuple[torch.Size, torch.dtype]] = field(default_factory=list)
    """Shape of a row and dtype, for each of `features`."""
    _names: tuple[str, ...] | None = None
    given: Any = None
    """The inputs, also once a trunk has run and its outputs have taken their place."""
    _last_had_graph: bool = False
    _host: HostInputs | None = None

    def __post_init__(self) -> None:
        self.given = self.inputs
        if self.order is None:
            self.passed = self.inputs

    @property
    def embed_together(self) -> int:
        """Chunks that are embedded at once; one if features of a row depend on its chunk."""
        if self.embed_chunk_size is None or any(map(has_batch_statistics, self.modules)):
            return 1
        return max(1, self.embed_chunk_size // max(map(len, self.chunks)))

    def embed(self, retention: Retention = NO_RETENTION) -> None:
        """Run every chunk; keep features, the graphs that `retention` allows, and the RNG."""
        self.run_trunk_once()
        draws = self.draws()
        together = self.embed_together
        with kernels_as_with_gradients(), torch.no_grad():
            if together == 1:
                self._embed_each(draws, retention)
            else:
                self._embed_together(together, draws, retention)

    def draws(self) -> Draws:
        """Start to note which chunks draw random numbers."""
        return Draws(accelerators_among(self.known_tensors()))

    def _embed_each(self, draws: Draws, retention: Retention) -> None:
        copies = self.copies
        for index, chunk in enumerate(self.chunks):
            self._embed(chunk, index, retention)
            if copies and index + 1 < len(self.chunks):
                self.expect(self.chunks[index + 1])
            draws.passed(chunk)
        draws.settle()

    def _embed_together(self, together: int, draws: Draws, retention: Retention) -> None:
        index, drawn = 0, False
        while index < len(self.chunks):
            following = index + self._group_size(index, together, drawn, retention)
            group = self.chunks[index:following]
            chunk = group[0] if len(group) == 1 else merged(group)
            self._embed(chunk, index, retention)
            if drawn and following < len(self.chunks):
                self.expect(self.chunks[following])
            draws.passed(chunk)
            if draws.settle():
                # A replay repeats the draws of a pass only over the very same rows.
                self.chunks[index:following] = [chunk]
                drawn, following = True, index + 1
            index = following

    def run_trunk_once(self) -> None:
        """Run a frozen trunk; from here on the inputs are its outputs."""
        if self.trunk is not None:
            # One module for all inputs hands on what it is given.
            call = call_encoder if self.encode is call_encoder else _call
            self.inputs = run_trunk(
                self.trunk, self.inputs, self.chunks, self.name, call, self.replaced
            )
            for chunk in self.chunks:
                chunk.cost = None

    def _group_size(self, index: int, together: int, drawn: bool, retention: Retention) -> int:
        # The first chunk goes alone: it shows whether the encoder draws random numbers.
        # A graph that is built to see whether there is one has the size of a chunk's.
        # A loss of several chunks together is not what their replays will give.
        if index == 0 or drawn or self.losses or self.trainable is None:
            return 1
        last = min(index + together, len(self.chunks))
        alone = (i for i in range(index, last) if retention.wants_graph(i))
        return max(1, next(alone, last) - index)

    def _embed(self, chunk: Chunk, index: int, retention: Retention) -> None:
        wanted = self.trainable is not False and retention.wants_graph(index)
        with_graph = wanted or self.trainable is None
        # Graphs one after another share their casts, as those of a plain step do.
        if with_graph and not self._last_had_graph:
            forget_autocast_casts()
        self._last_had_graph = with_graph
        if not with_graph:
            self.keep(self.forward(self.bare_module, chunk), chunk)
            return
        measures = retention.measures(index)
        saved = SavedBytes(self.known_tensors() if measures else ())
        with torch.enable_grad(), saved.counting(measures):
            parts = self.forward(self.bare_module, chunk)
        self.keep(parts, chunk)
        if wanted and self.trainable and retention.keeps_graph(index, saved.total):
            chunk.graph = parts

    def forward(self, module: nn.Module, chunk: Chunk) -> list[Tensor]:
        """Compute the flat features of one chunk, and check that they can be cached."""
        features = self._forward(module, chunk)
        given, trainable = self.inputs, bool(self.trainable)
        check_features(features, len(chunk), self.name, given, trainable=trainable)
        return features

    def _forward(self, module: nn.Module, chunk: Chunk) -> list[Tensor]:
        host = self._host
        if host is None or host.inputs is not self.inputs:
            host = self._host_inputs()
        output = self.encode(module, host.take(chunk))
        if type(output) is not Tensor or self.get_features is not None:
            output = self._select(output, chunk)
        # Most often one plain tensor, which needs no walk.
        if type(output) is Tensor:
            self.structure = _ONE_LEAF
            return [output]
        features, self.structure = pytree.tree_flatten(output)
        return features

    @property
    def copies(self) -> bool:
        """Whether chunks come from the host and go to a device."""
        return self._host_inputs().device is not None

    def expect(self, chunk: Chunk) -> None:
        """Copy the chunk to the device meanwhile, if it lies on the host."""
        self._host_inputs().expect(chunk)

    def _host_inputs(self) -> HostInputs:
        if self._host is None or self._host.inputs is not self.inputs:
            parameters = chain.from_iterable(module.parameters() for module in self.modules)
            device = device_for(parameters, self.inputs)
            self._host = HostInputs(self.inputs, device, self.replaced)
        return self._host

    def replay(self, chunk: Chunk) -> list[Tensor]:
        """Run a chunk again, with its graph and with the random numbers of its embed."""
        return self.again(chunk, self.module)

    def again(self, chunk: Chunk, module: nn.Module) -> list[Tensor]:
        """Run a chunk with the random numbers of its embed."""
        if chunk.random_state is not None:
            chunk.random_state.restore()
        # Its embed has told that its features can be cached.
        return self._forward(module, chunk)

    def as_passed(self, feature: Tensor) -> Tensor:
        """Bring rows of `features` into the order in which they were passed."""
        if self.order is None:
            return feature
        return feature.index_select(0, self.order.to(feature.device).argsort())

    def as_held(self, gradient: Tensor | None) -> Tensor | None:
        """Bring rows that stand as they were passed into the order of `features`."""
        if self.order is None or gradient is None:
            return gradient
        return gradient.index_select(0, self.order.to(gradient.device))

    def cached(self, chunk: Chunk) -> list[Tensor]:
        return [feature[chunk.rows] for feature in self.features]

    def known_tensors(self) -> list[Tensor]:
        """List tensors that are in memory whether or not the tower runs."""
        held = (chain(module.parameters(), module.buffers()) for module in self.modules)
        return [*chain.from_iterable(held), *tensors_in(self.inputs)]

    @property
    def modules(self) -> list[nn.Module]:
        """Modules that compute its features: the encoder, and a head in `get_features`."""
        head = self.get_features
        return [self.bare_module, *([head] if isinstance(head, nn.Module) else [])]

    def keep(self, parts: list[Tensor], chunk: Chunk) -> None:
        """Copy a chunk's features out: a view such as [:, 0] would keep all of its tokens alive."""
        if self.trainable is None and any(part.requires_grad for part in parts):
            self.trainable = True
        kinds = [(part.shape[1:], part.dtype) for part in parts]
        if not self.features:
            rows, self._kinds = row_count(self.chunks), kinds
            self.features = [part.new_empty((rows, *part.shape[1:])) for part in parts]
        if kinds != self._kinds:
            raise ValueError(
                f"{self.name}: expected the same feature shapes and dtypes in every chunk, got "
                f"{[(tuple(shape), dtype) for shape, dtype in kinds]} for {chunk.name} after "
                f"{[(tuple(shape), dtype) for shape, dtype in self._kinds]}; pool each sample to a "
                "fixed size"
            )
        for whole, part in zip(self.features, parts, strict=True):
            whole[chunk.rows] = part.detach() if part.requires_grad else part

    def _select(self, output: Any, chunk: Chunk) -> Any:
        chosen = select(output, self.get_features, [*self.weights], len(chunk), self.name)
        names = names_in(chosen)
        if self._names is None:
            self._names = names
            self.losses = tuple(chosen.losses) if isinstance(chosen, WithLosses) else ()
        if names != self._names:
            raise ValueError(
                f"{self.name}: expected the same names in the output of every chunk, got "
                f"{list(names)} for {chunk.name} after {list(self._names)}; return all of them, in "
                "one order, and a zero where a chunk has no such loss"
            )
        return chosen


def _call(function: Callable[..., Any], inputs: Any) -> Any:
    return function(inputs)


def surely_trainable(module: nn.Module, inputs: Any) -> bool:
    """Whether a parameter or an input asks for a gradient; if not, the graph will tell."""
    return any(tensor.requires_grad for tensor in chain(module.parameters(), tensors_in(inputs)))


def device_of(towers: Iterable[Tower]) -> torch.device:
    """Find where a step computes: the accelerator that any tensor is on, or the CPU."""
    devices = (tensor.device for tower in towers for tensor in tower.known_tensors())
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def trained_modules(towers: Iterable[Tower]) -> list[nn.Module]:
    """List encoders as they were given, and modules in `get_features`."""
    return [module for tower in towers for module in (tower.module, *tower.modules[1:])]


def modules_of(towers: Iterable[Tower], loss: Any) -> list[nn.Module]:
    """List every module of a step: those of the towers, and the loss if it is one."""
    return [*trained_modules(towers), *([loss] if isinstance(loss, nn.Module) else [])]
