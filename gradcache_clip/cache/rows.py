"""Rows that are not cut along dimension 0: the protocol, and parts with several entries a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.cache.nests import children_of, is_array, is_tensor_collection, with_children

Counts = Sequence[int] | Tensor
"""How many entries each row has, (B,)."""


class Rows(ABC):
    """A part of an input that says itself what its rows are.

    Chunks, sorting, copies to the device and all checks ask for these four and nothing else.
    Subclasses are dataclasses: tensors in their fields are found, and moved, as those of any input.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Count the rows."""

    @abstractmethod
    def take(self, rows: slice | Sequence[int]) -> Rows:
        """Take rows, in that order."""

    @property
    @abstractmethod
    def value(self) -> Any:
        """The encoder is given this."""

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Cost of each row: its entries, tokens or nodes."""


class Spans:
    """Consecutive entries along a dimension, a stretch of them for each row."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.bounds = [0, *accumulate(self.lengths)]

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: slice | Sequence[int]) -> Spans:
        if isinstance(rows, slice):
            return Spans(self.lengths[rows])
        return Spans([self.lengths[row] for row in rows])

    def cut(self, values: Any, rows: slice | Sequence[int], dim: int = 0) -> Any:
        """Take the entries of rows; entries that follow each other are a view."""
        runs = [slice(start, stop) for start, stop in self._runs(rows)]
        # Lists take one index, not a tuple.
        indices = [tuple([slice(None)] * dim + [run]) if dim else run for run in runs]
        parts = [values[index] for index in indices]
        return parts[0] if len(parts) == 1 else _joined(parts, dim)

    def _runs(self, rows: slice | Sequence[int]) -> list[tuple[int, int]]:
        """Where the entries of rows start and stop, those of neighbours in one piece."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            return [(self.bounds[start], self.bounds[stop])]
        runs: list[tuple[int, int]] = []
        for row in rows:
            start, stop = self.bounds[row], self.bounds[row + 1]
            if runs and runs[-1][1] == start:
                runs[-1] = runs[-1][0], stop
            else:
                runs.append((start, stop))
        return runs


def _joined(parts: list[Any], dim: int) -> Any:
    first = parts[0]
    if isinstance(first, Tensor) or is_tensor_collection(first):
        return torch.cat(parts, dim)
    if is_array(first):
        import numpy

        return numpy.concatenate(parts, dim)
    return list(chain.from_iterable(parts))


@dataclass(frozen=True, eq=False)
class Entries(Rows):
    """A tensor, array or list with any number of entries for each row."""

    values: Any
    spans: Spans

    def __len__(self) -> int:
        return len(self.spans)

    def take(self, rows: slice | Sequence[int]) -> Entries:
        return Entries(self.spans.cut(self.values, rows), self.spans.take(rows))

    @property
    def value(self) -> Any:
        return self.values

    @property
    def lengths(self) -> list[int]:
        return self.spans.lengths


@dataclass(frozen=True, eq=False, init=False)
class Ragged:
    """An input of which some parts have none, one or several entries for each row.

    A chunk gets the entries of its rows, in their order, and everything else one row a sample as
    without it. Parts of which it has no entry are left out of a mapping, as processors do.

    Args:
        inputs: what the encoder takes, a mapping, tuple or dataclass.
        rows_of: by the key of a part, how many of its entries belong to each row, (B,).

    Raises:
        ValueError, TypeError: a key that `inputs` lacks; counts that do not add up to the entries.

    Example:
        >>> import torch
        >>> from gradcache_clip import ClipLoss, GradCache, Ragged
        >>> class Posts(torch.nn.Linear):
        ...     def forward(self, title, images_per_post, images=None):
        ...         post = torch.arange(len(title)).repeat_interleave(images_per_post)
        ...         if images is not None:
        ...             title = title.index_add(0, post, images)
        ...         return super().forward(title)
        >>> encoders = Posts(8, 4), torch.nn.Linear(6, 4)
        >>> cache = GradCache(encoders, ClipLoss(), chunk_size=2)
        >>> counts = torch.tensor([2, 0, 1, 0, 0])
        >>> posts = {"title": torch.randn(5, 8), "images_per_post": counts}
        >>> posts["images"] = torch.randn(3, 8)
        >>> out = cache(Ragged(posts, rows_of={"images": counts}), torch.randn(5, 6))
    """

    nest: Any

    def __init__(self, inputs: Any, rows_of: Mapping[Any, Counts]) -> None:
        children = children_of(inputs)
        missing = [key for key in rows_of if key not in dict(children)]
        if missing or not rows_of:
            raise ValueError(
                f"rows_of: expected keys of inputs, {[key for key, _ in children]}, got "
                f"{missing or 'none'}; name the parts that have other than one entry a row"
            )
        spans = {key: spans_of(counts, f"rows_of[{key!r}]") for key, counts in rows_of.items()}
        if len({len(each) for each in spans.values()}) > 1:
            raise ValueError(
                "rows_of: expected as many counts for every part, one for each row, got "
                f"{ {key: len(each) for key, each in spans.items()} }; give the counts of all rows"
            )
        parts = [
            _entries(key, part, spans[key]) if key in spans else part for key, part in children
        ]
        object.__setattr__(self, "nest", with_children(inputs, parts))

    def without_empty(self, cut: Any) -> Any:
        """Leave parts without any entry out of a mapping."""
        if isinstance(cut, MutableMapping):
            for key, part in children_of(self.nest):
                if isinstance(part, Entries) and not len(cut[key]):
                    del cut[key]
        return cut


def _entries(key: Any, part: Any, spans: Spans) -> Entries:
    countable = isinstance(part, list) or getattr(part, "ndim", None) or is_tensor_collection(part)
    if not countable:
        raise TypeError(
            f"{key}: expected a tensor, array or list with entries of rows, got "
            f"{type(part).__name__}; leave it out of rows_of"
        )
    if len(part) != spans.bounds[-1]:
        raise ValueError(
            f"{key}: expected {spans.bounds[-1]} entries, the sum of the counts of {len(spans)} "
            f"rows, got {len(part)}; count the entries of every row"
        )
    return Entries(part, spans)


def spans_of(counts: Counts, name: str) -> Spans:
    """Read how many entries each row has."""
    given = torch.as_tensor(counts)
    if given.ndim != 1 or given.is_floating_point() or given.is_complex():
        raise TypeError(
            f"{name}: expected one integer for each row, got shape {tuple(given.shape)} and "
            f"{given.dtype}; such as torch.tensor([2, 0, 1])"
        )
    lengths = given.tolist()
    if not lengths or min(lengths) < 0:
        raise ValueError(
            f"{name}: expected counts of 0 or more, got {min(lengths, default='none')}; count the "
            "entries of every row"
        )
    return Spans(list(map(int, lengths)))
