"""Sort rows of unequal length, cut them into chunks, and trim each to its longest row. B rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from gradcache_clip.cache.batch_tree import count_rows, parts_with_rows
from gradcache_clip.cache.chunks import Chunk
from gradcache_clip.cache.columns import Columns, read_columns
from gradcache_clip.cache.masks import trims_of
from gradcache_clip.cache.rows import Rows
from gradcache_clip.cache.sorted_rows import SortedRows

Key = str | int


@dataclass(frozen=True)
class ByLength:
    """Chunks of rows of similar length, the longest first; features return in the caller's order.

    With a mask (B, L) among the inputs, which is one where a row has something, a chunk keeps the
    columns that any of its rows needs: padding may be on either side. Trimmed are the mask, for
    `attention_mask` also `input_ids`, `token_type_ids`, `position_ids` and `inputs_embeds`, for
    `pixel_attention_mask` `pixel_values`, for `patch_valid` `patches` and `patch_coord`, and any
    tensor (B, L, ...) that holds one value wherever the mask is zero. Another tensor of L columns
    is refused until `columns` says which ones to trim. Rows without a one keep all columns.

    Exact for encoders that follow their mask, and for causal ones. The first step embeds a row
    with and without its padding, and raises where that changes its features: an encoder that
    averages over its padding, or numbers columns of rows padded on the left from zero. Strings are
    sorted by characters; whatever tokenizes them pads each chunk by itself.

    Example:
        >>> rows = [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
        >>> ByLength(max_tokens=6).shapes({"attention_mask": torch.tensor(rows)})
        {(1, 4): 1, (2, 3): 1, (1, 1): 1}
    """

    max_tokens: int | Literal["auto"] | None = None
    """Rows of a chunk times its longest row, at most; takes the place of `chunk_size`. "auto"
    measures the first batch, together with `chunk_size="auto"`."""
    length_of: Callable[[Any], Sequence[int] | Tensor] | None = None
    """Lengths of the rows of an input, where neither a mask nor lists tell them."""
    columns: Collection[Key] | None = None
    """Keys of the tensors that are trimmed with the mask, and no others; None decides as above."""
    mask: Key | Collection[Key] | None = field(default=None, kw_only=True)
    """Key of the mask, or of several; None takes `attention_mask`, `pixel_attention_mask` or
    `patch_valid`, whichever is there; with [] nothing is trimmed."""
    pad_to_multiple_of: int = field(default=1, kw_only=True)
    """Columns of a chunk are a multiple of this, or all: a step has few shapes."""
    max_cost: int | Literal["auto"] | None = field(default=None, kw_only=True)
    """As `max_tokens`, in what `cost_of` counts: rows of a chunk times its dearest row, and of
    packed inputs the sum over its rows."""
    cost_of: Callable[[Any], Sequence[float] | Tensor] | None = field(default=None, kw_only=True)
    """Cost of every row of an input: patches, pixels, nodes, squared tokens."""

    def __post_init__(self) -> None:
        _check_keys("columns", self.columns, '["input_ids", "position_ids"]')
        _check_keys("mask", self._masks, '"pixel_attention_mask"')
        _check_count("max_tokens", self.max_tokens, ("auto", None), 16384)
        _check_count("max_cost", self.max_cost, ("auto", None), 16384)
        _check_count("pad_to_multiple_of", self.pad_to_multiple_of, (), 64)
        if self.max_tokens is not None and self.max_cost is not None:
            raise ValueError(
                f"max_cost: expected one budget, got {self.max_cost!r} beside max_tokens="
                f"{self.max_tokens!r}; leave one of them out"
            )
        if self.cost_of is not None and self.max_cost is None:
            raise ValueError(
                "cost_of: expected a budget in what it counts, got none; pass max_cost=, or "
                "length_of= to sort rows by it"
            )

    @property
    def budget(self) -> int | Literal["auto"] | None:
        """`max_tokens` or `max_cost`, whichever was given."""
        return self.max_tokens if self.max_cost is None else self.max_cost

    def with_budget(self, budget: int | None) -> ByLength:
        """Replace the budget; without one, chunks are cut by rows."""
        if self.max_cost is None:
            return replace(self, max_tokens=budget)
        cost_of = None if budget is None else self.cost_of
        return replace(self, max_cost=budget, cost_of=cost_of)

    def halved(self) -> ByLength:
        """Halve the budget."""
        return self.with_budget(max(1, self.budget // 2)) if isinstance(self.budget, int) else self

    def shapes(self, inputs: Any, chunk_size: int = 64) -> dict[tuple[int, ...], int]:
        """Count the chunks of each shape that a batch is cut into: rows, and columns of each mask.

        Args:
            inputs: the batch of one encoder.
            chunk_size: rows of a chunk, where there is no budget.
        """
        rows = self._sorted(inputs, "inputs", inputs)
        masks = [each.trimmed[0] for each in rows.columns]
        counted = Counter[tuple[int, ...]]()
        for chunk in rows.chunks(*self._limits(len(rows.order), chunk_size, 1)):
            kept = [(chunk.columns or {})[mask] for mask in masks]
            shape = len(chunk), *(each.stop - each.start for each in kept)
            counted[shape] += 1
        return dict(counted)

    def chunks(
        self, inputs: Any, chunk_size: int, at_least: int, name: str, passed: Any = None
    ) -> list[Chunk]:
        """Cut the rows of `inputs` by the budget, or by `chunk_size` if there is none.

        `passed` are the inputs as a step is given them, if `rows` has divided them since.
        """
        rows = self._sorted(inputs, name, inputs if passed is None else passed)
        return rows.chunks(*self._limits(len(rows.order), chunk_size, at_least))

    def _limits(self, rows: int, chunk_size: int, at_least: int) -> tuple[int, int | None]:
        """Return the largest number of rows of a chunk, and the largest cost."""
        most = -(-rows // at_least)
        budget = self.budget if isinstance(self.budget, int) else None
        return (min(most, chunk_size) if budget is None else most), budget

    def _sorted(self, inputs: Any, name: str, passed: Any) -> SortedRows:
        columns, entries = self._columns(inputs, name), _entries_of(inputs, name)
        costs = self._numbers("cost_of", inputs, name, passed)
        packed = entries is not None and (costs is not None or not columns)
        lengths = self._numbers("length_of", inputs, name, passed)
        if lengths is None and _has_lengths(inputs):
            lengths = torch.tensor([len(row) for row in inputs])
        if lengths is None and columns:
            lengths = torch.stack([each.stop - each.first for each in columns]).sum(0)
        else:
            lengths = next((each for each in (lengths, entries, costs) if each is not None), None)
            costs = lengths if costs is None else costs
        if lengths is None:
            raise ValueError(
                f"{name}: expected rows whose length is known, by a mask or as a list of strings, "
                f"got {type(inputs).__name__}; pass ByLength(length_of=...), or name the mask with "
                "ByLength(mask=...)"
            )
        order = lengths.argsort(descending=True, stable=True)
        columns = [each.in_order(order) for each in columns]
        costs = None if costs is None else costs[order]
        return SortedRows(order, columns, self.pad_to_multiple_of, costs, packed)

    def _columns(self, inputs: Any, name: str) -> list[Columns]:
        columns = read_columns(trims_of(inputs, self._masks, self.columns, name))
        if self.pad_to_multiple_of > 1 and not columns:
            raise ValueError(
                f"{name}: expected a mask whose columns pad_to_multiple_of="
                f"{self.pad_to_multiple_of} can fill up, got none; name it with ByLength(mask=...)"
            )
        return columns

    def _numbers(self, argument: str, inputs: Any, name: str, passed: Any) -> Tensor | None:
        """Ask a function of the caller for one number a row."""
        function = getattr(self, argument)
        if function is None:
            return None
        rows, numbers = count_rows(inputs, name), torch.as_tensor(function(passed)).detach().cpu()
        if numbers.shape != (rows,):
            raise ValueError(
                f"{name}: expected {argument} to return one number for each of {rows} rows, got "
                f"shape {tuple(numbers.shape)}; return a (B,) tensor or a list"
            )
        usable = numbers.isfinite() & (numbers >= 0)
        if not usable.all():
            raise ValueError(
                f"{name}: expected {argument} to return finite numbers of 0 or more, got "
                f"{numbers[~usable][0].item()}; count what a row has"
            )
        return numbers.double()

    @property
    def _masks(self) -> Collection[Key] | None:
        return [self.mask] if isinstance(self.mask, (str, int)) else self.mask


def _has_lengths(inputs: Any) -> bool:
    """Whether it is a list of strings, tensors or other sequences."""
    return isinstance(inputs, list) and all(
        hasattr(row, "__len__") and not isinstance(row, Mapping) for row in inputs
    )


def _entries_of(inputs: Any, name: str) -> Tensor | None:
    """Count the entries of each row in all packed parts; None if there are none."""
    packed = [p.value.lengths for p in parts_with_rows(inputs, name) if isinstance(p.value, Rows)]
    return torch.tensor(packed, dtype=torch.float64).sum(0) if packed else None


def _check_keys(argument: str, keys: Any, example: str) -> None:
    is_collection = isinstance(keys, Collection) and not isinstance(keys, str)
    if keys is None or (is_collection and all(isinstance(key, (str, int)) for key in keys)):
        return
    raise TypeError(
        f"{argument}: expected keys of tensors, or None, got {keys!r}; such as {argument}={example}"
    )


def _check_count(argument: str, count: Any, others: tuple[Any, ...], example: int) -> None:
    whole = isinstance(count, Integral) and not isinstance(count, bool)
    if not (whole and int(count) > 0) and count not in others:
        named = "".join(f", {other!r}" for other in others[:-1]) + " or None" * bool(others)
        raise ValueError(
            f"{argument}: expected a positive integer{named}, got {count!r}; such as "
            f"{argument}={example}"
        )
