"""How long the pieces are into which the tokens of samples are cut; needs no Triton."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 128, 16
"""Of a piece in a kernel, whatever its tile: a product of matrices takes 16 rows at least."""


def piece_length(samples: Sequence[int], longest: int, shortest: int = SHORTEST) -> int:
    """The longest power of two that pads at most an eighth more than the shortest one does."""
    lengths = [shortest]
    while 2 * lengths[-1] <= min(longest, LONGEST):
        lengths.append(2 * lengths[-1])
    sizes = {n: n * sum(-(-tokens // n) for tokens in samples) for n in lengths}
    return max(n for n, size in sizes.items() if 8 * size <= 9 * sizes[shortest])
