"""One input of a step and the encoder that it goes through, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradcache_clip.cache.nested import take_rows, tensors_in
from gradcache_clip.cache.random_state import RandomState, accelerators_among
from gradcache_clip.cache.settings import kernels_as_with_gradients

_MODEL_OUTPUT_FIELDS = ("image_embeds", "text_embeds", "sentence_embedding", "pooler_output")

Encode = Callable[[nn.Module, Any], Any]


def call_encoder(module: nn.Module, inputs: Any) -> Any:
    """Mappings become keyword arguments, tuples positional ones, the rest one argument."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    if isinstance(inputs, tuple):
        return module(*inputs)
    return module(inputs)


@dataclass
class Tower:
    """An encoder, the inputs of one step, and what the embed left behind for the replay.

    `trainable` is None while it is not known: parameters may live outside the module (a head in
    `get_features`), and one module for all inputs may be frozen for this one. The first chunk is
    then embedded with its graph, which tells.
    """

    name: str
    module: nn.Module
    bare_module: nn.Module
    encode: Encode
    get_features: Callable[[Any], Any] | None
    inputs: Any
    bounds: list[tuple[int, int]]
    trainable: bool | None = None
    features: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    random_states: list[RandomState | None] = field(default_factory=list)
    structure: Any = None

    def embed(self) -> None:
        """Run every chunk without a graph; keep the features and, where drawn from, the RNG."""
        tensors = chain(self.module.parameters(), self.module.buffers(), tensors_in(self.inputs))
        devices = accelerators_among(tensors)
        before = RandomState.capture(devices)
        with kernels_as_with_gradients():
            for index in range(len(self.bounds)):
                with torch.set_grad_enabled(self.trainable is None):
                    self.keep(self.forward(self.bare_module, index), index)
                after = RandomState.capture(devices)
                self.random_states.append(None if after.equals(before) else before)
                before = after

    def forward(self, module: nn.Module, index: int) -> list[Tensor]:
        """Features of one chunk, flat."""
        start, stop = self.bounds[index]
        output = self.encode(module, take_rows(self.inputs, start, stop))
        features, structure = pytree.tree_flatten(self._select(output))
        self._check_features(features, stop - start)
        self.structure = structure
        return features

    def replay(self, index: int) -> list[Tensor]:
        """The same chunk again, with its graph and with the random numbers of its embed."""
        state = self.random_states[index]
        if state is not None:
            state.restore()
        return self.forward(self.module, index)

    def cached(self, index: int) -> list[Tensor]:
        start, stop = self.bounds[index]
        return [feature[start:stop] for feature in self.features]

    def gradients_of(self, index: int) -> list[Tensor | None]:
        start, stop = self.bounds[index]
        return [None if grad is None else grad[start:stop] for grad in self.gradients]

    @torch.no_grad()
    def keep(self, parts: list[Tensor], index: int) -> None:
        """Copy a chunk's features out: a view such as [:, 0] would keep all of its tokens alive."""
        if self.trainable is None:
            self.trainable = any(part.requires_grad for part in parts)
        if not self.features:
            rows = self.bounds[-1][1]
            self.features = [part.new_empty((rows, *part.shape[1:])) for part in parts]
        kinds = [(whole.shape[1:], whole.dtype) for whole in self.features]
        if kinds != [(part.shape[1:], part.dtype) for part in parts]:
            raise ValueError(
                f"{self.name}: expected the same feature shapes and dtypes in every chunk, got "
                f"{[(tuple(p.shape[1:]), p.dtype) for p in parts]} in chunk {index} after "
                f"{[(tuple(shape), dtype) for shape, dtype in kinds]}; pool each sample to a fixed "
                "size"
            )
        start, stop = self.bounds[index]
        for whole, part in zip(self.features, parts, strict=True):
            whole[start:stop].copy_(part)

    def _select(self, output: Any) -> Any:
        if self.get_features is not None:
            return self.get_features(output)
        if not isinstance(output, Mapping):
            return output
        for name in _MODEL_OUTPUT_FIELDS:
            if isinstance(output.get(name), Tensor):
                return output[name]
        raise TypeError(
            f"{self.name}: expected features (a tensor or a tuple of tensors), got "
            f"{type(output).__name__} with {', '.join(map(str, output))}; say which with "
            "get_features, such as get_features=lambda output: output.last_hidden_state[:, 0]"
        )

    def _check_features(self, features: list[Any], rows: int) -> None:
        for feature in features or [None]:
            if not isinstance(feature, Tensor) or feature.is_complex():
                got = f"{feature.dtype}" if isinstance(feature, Tensor) else type(feature).__name__
                raise TypeError(
                    f"{self.name}: expected features (a real tensor or a tuple of them), got "
                    f"{got}; extract them with get_features"
                )
            if feature.dim() == 0 or len(feature) != rows:
                raise ValueError(
                    f"{self.name}: expected features with {rows} rows, one for each sample of the "
                    f"chunk, got shape {tuple(feature.shape)}; give get_features a function that "
                    "returns one row a sample, and pass inputs as tensors or lists"
                )


def surely_trainable(module: nn.Module, inputs: Any) -> bool:
    """Whether a parameter or an input asks for a gradient; if not, the graph will tell."""
    return any(tensor.requires_grad for tensor in chain(module.parameters(), tensors_in(inputs)))


def chunk_bounds(rows: int, chunk_size: int, at_least: int = 1) -> list[tuple[int, int]]:
    """Row ranges of the chunks, at least `at_least` of them where the rows suffice."""
    size = min(chunk_size, max(1, math.ceil(rows / at_least)))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]
