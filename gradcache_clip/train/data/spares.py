"""Substitutes for broken samples in sets of a few batches, where each row has few of its own."""

from __future__ import annotations

from collections.abc import Callable

from gradcache_clip.train.data.order import MAX_SUBSTITUTES, Order


class Spares:
    """Samples for the rows that find none of their own, another one for each row of a batch.

    All processes find the same without a word between them, because each looks at the whole batch:
    which rows have found a sample, and which samples are left. What is broken once stays so, hence
    every sample is looked at once.

    Args:
        order: of the samples.
        is_good: whether a sample can be read.
    """

    def __init__(self, order: Order, is_good: Callable[[int], bool]) -> None:
        self._order, self._is_good = order, is_good
        self._known: dict[int, bool] = {}
        self._step, self._of_step = -1, dict[int, int]()

    def of(self, step: int, position: int) -> int | None:
        """The sample for a position of a batch, or None where too few are left."""
        order = self._order
        if order.samples > order.batch_size * MAX_SUBSTITUTES:
            # Hundreds in a row were broken: the set is, and not too small.
            return None
        if step != self._step:
            self._step, self._of_step = step, self._dealt_out(step)
        return self._of_step.get(position)

    def _dealt_out(self, step: int) -> dict[int, int]:
        taken, without = set[int](), []
        for position, sample in enumerate(self._order.batch(step).tolist()):
            if self._good(sample):
                continue
            own = self._order.substitutes(step, position)
            if (found := next(filter(self._good, own), None)) is None:
                without.append(position)
            else:
                taken.add(found)
        left = (each for each in self._order.others(step) if each not in taken)
        return dict(zip(without, filter(self._good, left)))  # noqa: B905 (too few may be left)

    def _good(self, sample: int) -> bool:
        if sample not in self._known:
            self._known[sample] = self._is_good(sample)
        return self._known[sample]
