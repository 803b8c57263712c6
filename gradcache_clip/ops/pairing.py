"""Which logits are positives, which compete, and what one pass over them leaves.

M rows q_i, N columns k_j, S_ij = logit_scale <q_i, k_j>.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


# Of the fields of `Pairing`: those that are vectors, rows and columns in turn.
_VECTORS: Final = 14


class Pairing(NamedTuple):
    """The rules of a contrast, applied inside each tile; no M x N mask exists.

    Without labels the only positive of row i is column (i + positive_shift) mod N. With labels
    every column of an equal label is one. All other columns are negatives, except those that leave
    the competition: equal ids, other groups, logits or guides above a threshold, and the row itself
    in a self-contrast.
    """

    row_labels: Int[Tensor, " m"] | None = None
    column_labels: Int[Tensor, " n"] | None = None
    row_ids: Int[Tensor, " m"] | None = None
    column_ids: Int[Tensor, " n"] | None = None
    row_threshold: Float[Tensor, " m"] | None = None
    """Logits above it are no negatives of their row; only without labels."""
    column_threshold: Float[Tensor, " n"] | None = None
    row_groups: Int[Tensor, " m"] | None = None
    column_groups: Int[Tensor, " n"] | None = None
    """Only rows and columns of one group compete."""
    row_bias: Float[Tensor, " m"] | None = None
    """A constant that is added to the logits of the row."""
    column_bias: Float[Tensor, " n"] | None = None
    """Added to the logits of the column; in the dtype of the logits. It may require a gradient."""
    row_guide: Float[Tensor, "g m"] | None = None
    column_guide: Float[Tensor, "g n"] | None = None
    """Features of another model, one column for each row of q and of k."""
    row_guide_threshold: Float[Tensor, " m"] | None = None
    """Columns whose guide has a larger product with the row's are no negatives of the row; only
    without labels."""
    column_guide_threshold: Float[Tensor, " n"] | None = None
    positive_shift: int = 0
    """Beyond all columns, as `without_positives` sets it, no row has a positive."""
    both_ways: bool = True
    """Whether rows compete for each column as well."""
    self_contrast: bool = False
    """k is q: S is symmetric, its diagonal is left out, and one gradient serves both sides."""
    maxima: bool = True
    """Whether row_max and column_max must be maxima, as accuracies need, or may be near them."""

    def packed(self) -> tuple[list[Tensor | None], list[int]]:
        """Return the vectors, detached, and the four numbers, as torch.library takes them."""
        vectors = [None if vector is None else vector.detach() for vector in self[:_VECTORS]]
        return vectors, [int(number) for number in self[_VECTORS:]]

    @staticmethod
    def unpacked(vectors: Sequence[Tensor | None], numbers: Sequence[int]) -> Pairing:
        """Invert `packed`."""
        shift, *flags = numbers
        options: list[Any] = [*vectors, shift, *(bool(flag) for flag in flags)]
        return Pairing(*options)

    def of_block(self, rows: slice, columns: slice) -> Pairing:
        """Keep these rows and columns; shift and flags stay."""
        places = rows, columns
        vectors: list[Any] = [
            None if vector is None else vector[..., places[index % 2]]
            for index, vector in enumerate(self[:_VECTORS])
        ]
        rules: list[Any] = [*vectors, *self[_VECTORS:]]
        return Pairing(*rules)

    def of_prefixes(self, count: int) -> list[Pairing]:
        """Return the rules of each of `count` prefixes, which differ in their thresholds."""
        rows, columns = self.row_threshold, self.column_threshold
        return [
            self._replace(
                row_threshold=None if rows is None else rows[index],
                column_threshold=None if columns is None else columns[index],
            )
            for index in range(count)
        ]

    def transposed(self) -> Pairing:
        """Swap rows and columns."""
        rules: list[Any] = [*(self[index ^ 1] for index in range(_VECTORS)), *self[_VECTORS:]]
        return Pairing(*rules)

    def with_columns(self, order: Int[Tensor, " n"] | None) -> Pairing:
        """Make column `order[j]` column j; without an order return the rules as they are."""
        if order is None:
            return self
        rules: list[Any] = [
            vector[..., order] if vector is not None and index % 2 == 1 else vector
            for index, vector in enumerate(self[:_VECTORS])
        ]
        rules += self[_VECTORS:]
        return Pairing(*rules)

    def without_positives(self, M: int, N: int) -> Pairing:
        """Return the rules of M rows and N columns without a pair, unless labels make one."""
        return self._replace(positive_shift=2 * (M + N), self_contrast=False)


class Statistics(NamedTuple):
    """Statistics of each row and, both ways, of each column after one pass over the logits.

    Without labels the sums run over the negatives alone, so that a small loss keeps its digits;
    with labels they run over positives and negatives. Only `positive` and `sum` carry gradients: a
    maximum is a reference point whose choice changes no loss. What a contrast lacks is empty.
    """

    row_positive: Float[Tensor, " m"]
    """The positive logit; with labels the sum of the positive logits."""
    row_max: Float[Tensor, " m"]
    row_sum: Float[Tensor, " m"]
    """Sum of exp(S_ij - row_max_i)."""
    row_hardest_negative: Float[Tensor, " m"]
    """The largest logit of a negative; only with labels, for without them it is row_max."""
    column_positive: Float[Tensor, " n"]
    """Only with labels."""
    column_max: Float[Tensor, " n"]
    column_sum: Float[Tensor, " n"]
    column_hardest_negative: Float[Tensor, " n"]

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """The fields without a gradient."""
        return (
            self.row_max,
            self.row_hardest_negative,
            self.column_max,
            self.column_hardest_negative,
        )

    def with_columns(self, order: Int[Tensor, " n"]) -> Statistics:
        """Make column `order[j]` column j."""
        columns = (each[..., order] if each.numel() else each for each in self[4:])
        return Statistics(*self[:4], *columns)

    def unstacked(self) -> list[Statistics]:
        """Split along the leading dimension, that of prefixes."""
        return [Statistics(*each) for each in zip(*(x.unbind() for x in self), strict=True)]


class SideGradient(NamedTuple):
    """The backward's view of the rows, or of the columns: G_ij = exp(S_ij - max) dsum."""

    max: Float[Tensor, " m"]
    dsum: Float[Tensor, " m"]
    dpositive: Float[Tensor, " m"]

    def of(self, where: slice) -> SideGradient:
        """Keep these rows; what is empty stays so."""
        return SideGradient(*(each[..., where] for each in self))

    def unstacked(self) -> list[SideGradient]:
        """Split along the leading dimension, that of prefixes."""
        return [SideGradient(*each) for each in zip(*self, strict=True)]

    @staticmethod
    def zeros(like: Tensor, size: int) -> SideGradient:
        """Return `size` rows without a gradient: a direction that a loss does not have."""
        zeros = like.new_zeros((*like.shape[:-1], size))
        # exp(S - inf) is 0 whatever S is.
        return SideGradient(zeros + math.inf, zeros, zeros)


# Of q, k and logit_scale: which gradients are needed, and the gradients, None where not needed.
Needs = tuple[bool, bool, bool]
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]
