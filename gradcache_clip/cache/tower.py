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
    """An encoder, the inputs of one step, and what the embed left behind for the replay."""

    name: str
    module: nn.Module
    bare_module: nn.Module
    encode: Encode
    get_features: Callable[[Any], Any] | None
    inputs: Any
    bounds: list[tuple[int, int]]
    trainable: bool = True
    features: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    random_states: list[RandomState | None] = field(default_factory=list)
    structure: Any = None

    def __post_init__(self) -> None:
        parameters = self.module.parameters()
        self.trainable = any(
            tensor.requires_grad for tensor in chain(parameters, tensors_in(self.inputs))
        )

    def embed(self) -> None:
        """Run every chunk without a graph; keep the features and, where drawn from, the RNG."""
        tensors = chain(self.module.parameters(), self.module.buffers(), tensors_in(self.inputs))
        devices = accelerators_among(tensors)
        chunks: list[list[Tensor]] = []
        before = RandomState.capture(devices)
        with torch.no_grad():
            for index in range(len(self.bounds)):
                chunks.append(self.forward(self.bare_module, index))
                after = RandomState.capture(devices)
                self.random_states.append(None if after.equals(before) else before)
                before = after
        self.features = [torch.cat(parts) for parts in zip(*chunks, strict=True)]

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
            if not isinstance(feature, Tensor):
                raise TypeError(
                    f"{self.name}: expected features (a tensor or a tuple of tensors), got "
                    f"{type(feature).__name__}; extract them with get_features"
                )
            if feature.dim() == 0 or len(feature) != rows:
                raise ValueError(
                    f"{self.name}: expected features with {rows} rows, one for each sample of the "
                    f"chunk, got shape {tuple(feature.shape)}; give get_features a function that "
                    "returns one row a sample, and cut inputs that are not tensors or lists"
                )


def chunk_bounds(rows: int, chunk_size: int, at_least: int = 1) -> list[tuple[int, int]]:
    """Row ranges of the chunks, at least `at_least` of them where the rows suffice."""
    size = min(chunk_size, max(1, math.ceil(rows / at_least)))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]
