"""Leaves of an autograd graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor


def leaves_behind(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Every leaf that a backward from `outputs` would give a gradient."""
    nodes = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        nodes.extend(following)
