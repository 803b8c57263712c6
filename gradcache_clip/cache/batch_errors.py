"""Words of errors about inputs that cannot be cut into rows."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """Something inside an input that is cut into rows."""

    path: str
    key: Any
    """Its name in the mapping or dataclass, or its place in the tuple, that holds it."""
    value: Any


def disagreement(name: str, one: Part, other: Part) -> str:
    hint = hint_at_lists(one.value) or hint_at_lists(other.value)
    return (
        f"{name}: expected the same number of rows everywhere, got {len(one.value)} in {one.path} "
        f"and {len(other.value)} in {other.path}; where a sample has several rows, say how many "
        "with Ragged(x, rows_of=...), or with rows=PackedPatches() for packed images, or pass a "
        "list with one dict per sample, which the encoder collates; where every chunk needs all "
        f"of x, pass Shared(x){hint}"
    )


def hint_at_lists(value: Any) -> str:
    """Add to an error where a list of tensors may have been meant as several arguments."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Tensor):
        return ""
    return ". A list holds one sample an element: pass several arguments as a tuple or dict"


def tuple_of_samples(path: str, sample: Any) -> str:
    return (
        f"{path}: expected a list, one sample an element, got a tuple of {type(sample).__name__}, "
        "which stands for several arguments and would reach every chunk whole; pass list(x), or "
        "Shared(x) if every chunk needs all of it"
    )


def unknown(path: str, given: Any) -> str:
    if hasattr(given, "columns"):
        remedy = 'a dict of columns, or one dict per sample, such as df.to_dict("records")'
    elif isinstance(given, (set, frozenset)):
        remedy = "a list in the order of the samples"
    elif hasattr(given, "__iter__") or hasattr(given, "__len__"):
        remedy = "list(x)"
    else:
        remedy = "a list with one element a sample"
    return (
        f"{path}: expected tensors, arrays or lists with one row a sample, got a "
        f"{type(given).__name__}, which would reach every chunk whole; pass {remedy}, or Shared(x) "
        "if every chunk needs all of it"
    )
