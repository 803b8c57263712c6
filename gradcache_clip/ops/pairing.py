"""Which logits are positives, which compete, and what one pass over them leaves.

M rows q_i, N columns k_j, S_ij = logit_scale <q_i, k_j>.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Pairing(NamedTuple):
    """The rules of a contrast. They hold inside a tile; no M x N mask exists.

    Without labels the only positive of row i is column (i + positive_shift) mod N. With labels
    every column of an equal label is one. All other columns are negatives, but for those that leave
    the competition: equal ids, logits above a threshold, and the row itself in a self-contrast.
    """

    row_labels: Int[Tensor, " m"] | None = None
    column_labels: Int[Tensor, " n"] | None = None
    row_ids: Int[Tensor, " m"] | None = None
    column_ids: Int[Tensor, " n"] | None = None
    row_threshold: Float[Tensor, " m"] | None = None
    """Logits above it are no negatives of their row; only without labels."""
    column_threshold: Float[Tensor, " n"] | None = None
    positive_shift: int = 0
    """Far outside of the columns, see `without_positives`, no row has a positive."""
    both_ways: bool = True
    """Whether rows compete for each column as well."""
    self_contrast: bool = False
    """k is q: S is symmetric, its diagonal is out, and one gradient serves both sides."""

    def packed(self) -> tuple[list[Tensor | None], list[int]]:
        """The six vectors and the three numbers, as an op of torch.library takes them."""
        vectors: list[Any] = list(self[:6])
        return vectors, [self.positive_shift, int(self.both_ways), int(self.self_contrast)]

    def of_block(self, rows: slice, columns: slice) -> Pairing:
        """The rules of these rows and columns alone; shift and flags stay."""
        places = rows, columns
        vectors: list[Any] = [
            None if vector is None else vector[..., places[index % 2]]
            for index, vector in enumerate(self[:6])
        ]
        rules: list[Any] = [*vectors, *self[6:]]
        return Pairing(*rules)

    def transposed(self) -> Pairing:
        """Rows as columns and the reverse."""
        rules: list[Any] = [*(self[index ^ 1] for index in range(6)), *self[6:]]
        return Pairing(*rules)

    def with_columns(self, order: Int[Tensor, " n"] | None) -> Pairing:
        """Column `order[j]` as column j; without an order the rules as they are."""
        if order is None:
            return self
        rules: list[Any] = [
            vector[..., order] if vector is not None and index % 2 == 1 else vector
            for index, vector in enumerate(self[:6])
        ]
        rules += self[6:]
        return Pairing(*rules)

    def without_positives(self, M: int, N: int) -> Pairing:
        """The rules of M rows and N columns that hold no pair, unless labels make one."""
        return self._replace(positive_shift=2 * (M + N), self_contrast=False)

    @staticmethod
    def unpacked(vectors: Sequence[Tensor | None], rules: Sequence[int]) -> Pairing:
        """The inverse of `packed`."""
        shift, both_ways, self_contrast = rules
        options: list[Any] = [*vectors, shift, bool(both_ways), bool(self_contrast)]
        return Pairing(*options)


class Statistics(NamedTuple):
    """What one pass over the logits leaves of each row and, both ways, of each column.

    Without labels the sums run over the negatives alone, so that a small loss keeps its digits;
    with labels they run over positives and negatives. Only `positive` and `sum` carry gradients: a
    maximum is a reference point whose choice changes no loss. What a contrast lacks is empty.
    """

    row_positive: Float[Tensor, " m"]
    """The positive logit, or with labels the sum of the positive logits."""
    row_max: Float[Tensor, " m"]
    row_sum: Float[Tensor, " m"]
    """Sum of exp(S_ij - row_max_i)."""
    row_rival: Float[Tensor, " m"]
    """With labels the largest logit of a negative; without, row_max is that."""
    column_positive: Float[Tensor, " n"]
    """Only with labels."""
    column_max: Float[Tensor, " n"]
    column_sum: Float[Tensor, " n"]
    column_rival: Float[Tensor, " n"]

    def with_columns(self, order: Int[Tensor, " n"]) -> Statistics:
        """Column `order[j]` as column j."""
        columns = (each[..., order] if each.numel() else each for each in self[4:])
        return Statistics(*self[:4], *columns)


class SideGradient(NamedTuple):
    """What the backward knows of the rows, or of the columns: G_ij = exp(S_ij - max) dsum."""

    max: Float[Tensor, " m"]
    dsum: Float[Tensor, " m"]
    dpositive: Float[Tensor, " m"]

    def of(self, where: slice) -> SideGradient:
        """Of these rows alone; what is empty stays so."""
        return SideGradient(*(each[..., where] for each in self))

    @staticmethod
    def silent(like: Tensor, size: int) -> SideGradient:
        """Of `size` rows that sum nothing: a direction that a loss does not have."""
        zeros = like.new_zeros((*like.shape[:-1], size))
        return SideGradient(zeros + math.inf, zeros, zeros)


# Of q, k and logit_scale: which gradients are needed, and the gradients, None where not needed.
Needs = tuple[bool, bool, bool]
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]
