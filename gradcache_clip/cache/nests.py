"""Containers inside an input, and types of other libraries, told without importing them."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def children_of(inputs: Any) -> list[tuple[Any, Any]]:
    """List keys and parts of a mapping, tuple or dataclass; anything else has none."""
    if isinstance(inputs, Mapping):
        return list(inputs.items())
    if isinstance(inputs, tuple):
        return list(enumerate(inputs))
    if is_dataclass(inputs):
        return [(field.name, getattr(inputs, field.name)) for field in dataclasses.fields(inputs)]
    if is_graph_batch(inputs):
        return list(inputs.to_dict().items())
    return []


def map_children(inputs: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to every part of a container; anything else is returned as it is."""
    if type(inputs) is dict:
        return {key: function(child) for key, child in inputs.items()}
    children = children_of(inputs)
    return with_children(inputs, [function(child) for _, child in children]) if children else inputs


def with_children(inputs: Any, parts: Sequence[Any]) -> Any:
    """Put other parts into the same kind of container."""
    if isinstance(inputs, tuple):
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else tuple(parts)
    if type(inputs) is dict:
        return dict(zip(inputs, parts, strict=True))
    # A shallow copy keeps the class (BatchEncoding, a frozen dataclass) and all that is not a part.
    copied = copy.copy(inputs)
    for (key, _), part in zip(children_of(inputs), parts, strict=True):
        if isinstance(inputs, Mapping):
            copied[key] = part
        else:
            object.__setattr__(copied, key, part)
    return copied


def is_dataclass(inputs: Any) -> bool:
    return dataclasses.is_dataclass(inputs) and not isinstance(inputs, type)


def is_array(inputs: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(inputs, (numpy.ndarray, numpy.generic))


def is_tensor_collection(inputs: Any) -> bool:
    """Whether `inputs` is a TensorDict or a tensorclass."""
    library = sys.modules.get("tensordict")
    return library is not None and library.is_tensor_collection(inputs)


def is_graph_batch(inputs: Any) -> bool:
    """Whether `inputs` is a `Batch` of PyTorch Geometric."""
    library = sys.modules.get("torch_geometric.data")
    return library is not None and isinstance(inputs, library.Batch)
