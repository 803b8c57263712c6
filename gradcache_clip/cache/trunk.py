"""An encoder in two parts: a frozen trunk that runs once, and a head that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradcache_clip.cache.chunks import Chunk, row_count
from gradcache_clip.cache.host_inputs import HostInputs, device_for


def call_encoder(encoder: Callable[..., Any], inputs: Any) -> Any:
    """Call an encoder: a mapping becomes keyword arguments, a tuple positional ones."""
    if isinstance(inputs, Tensor):
        # Most inputs are, and an abstract class is slow to ask.
        return encoder(inputs)
    if isinstance(inputs, Mapping):
        return encoder(**inputs)
    if isinstance(inputs, tuple):
        return encoder(*inputs)
    return encoder(inputs)


@dataclass
class TrunkOutput:
    """Output of a trunk at its boundary; a `FrozenTrunk` given this runs its head alone."""

    parts: tuple[Tensor, ...]
    """Its tensors, one row a sample each."""
    rebuild: Callable[[tuple[Tensor, ...]], Any]
    """Puts them back into what the trunk returned."""


class FrozenTrunk(nn.Module):
    """`head(trunk(x))` whose trunk has no trainable parameters.

    `GradCache` runs the trunk over the batch once and keeps its outputs, of B rows, until the end
    of the step; only the head is replayed. Cut where the output is small, after pooling if that
    is frozen too.

    Args:
        trunk: frozen module, called as the encoder would be. Its parameters are not frozen here.
        head: trained module, called with the output of the trunk.

    One module for all inputs says with a method `frozen_trunk(tower)` which tower has one, and
    passes what that tower is given on to it.

    Raises:
        ValueError: at the call, if a parameter of the trunk asks for a gradient.

    Example:
        >>> import torch
        >>> from gradcache_clip import ClipLoss, FrozenTrunk, GradCache
        >>> trunk, head = torch.nn.Linear(8, 6), torch.nn.Linear(6, 4)
        >>> encoder = FrozenTrunk(trunk.requires_grad_(False), head)
        >>> cache = GradCache((encoder, torch.nn.Linear(5, 4)), ClipLoss())
        >>> out = cache(torch.randn(16, 8), torch.randn(16, 5))
        >>> head.weight.grad.shape
        torch.Size([4, 6])
    """

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], TrunkOutput):
            return self.head(args[0].rebuild(args[0].parts))
        return self.head(self.through_trunk(*args, **kwargs))

    def through_trunk(self, *args: Any, **kwargs: Any) -> Any:
        """Run the trunk without a graph."""
        trained = [name for name, p in self.trunk.named_parameters() if p.requires_grad]
        if trained:
            raise ValueError(
                f"trunk: expected frozen parameters, got {trained[0]} and {len(trained) - 1} more "
                "that ask for gradients; call trunk.requires_grad_(False), or move them to the head"
            )
        with torch.no_grad():
            return self.trunk(*args, **kwargs)


def frozen_trunk_of(module: nn.Module, tower: int | None) -> FrozenTrunk | None:
    """Return a module that is a `FrozenTrunk`, or the one that it names for a tower."""
    if isinstance(module, FrozenTrunk) or tower is None:
        return module if isinstance(module, FrozenTrunk) else None
    named: Callable[[int], FrozenTrunk | None] | None = getattr(module, "frozen_trunk", None)
    return None if named is None else named(tower)


def run_trunk(
    encoder: FrozenTrunk,
    inputs: Any,
    chunks: Sequence[Chunk],
    name: str,
    call: Callable[[Callable[..., Any], Any], Any],
    passed: Mapping[int, int],
) -> TrunkOutput:
    """Run the trunk over all rows, chunk by chunk; return outputs in the order of the rows."""
    wholes: list[Tensor] = []
    structure: Any = None
    host = HostInputs(inputs, device_for(encoder.parameters(), inputs), passed)
    for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
        output = call(encoder.through_trunk, host.take(chunk))
        if following is not None:
            host.expect(following)
        parts, structure = pytree.tree_flatten(output)
        _check_parts(parts, name)
        if not wholes:
            rows = row_count(chunks)
            wholes = [part.new_empty((rows, *part.shape[1:])) for part in parts]
        for whole, part in zip(wholes, parts, strict=True):
            if part.shape != (len(chunk), *whole.shape[1:]):
                raise ValueError(
                    f"{name}: expected trunk outputs with one row a sample, of one shape, got "
                    f"{tuple(part.shape)} for {chunk.name} after {tuple(whole.shape[1:])} a row; "
                    "pool in the trunk, or leave sort_by_length out"
                )
            whole[chunk.rows] = part
    # Behind a function, for a structure is a nest that must not be cut into rows.
    return TrunkOutput(tuple(wholes), partial(pytree.tree_unflatten, treespec=structure))


def _check_parts(parts: Sequence[Any], name: str) -> None:
    for part in parts or [None]:
        if not isinstance(part, Tensor) or part.dim() == 0:
            got = "a 0-dim tensor" if isinstance(part, Tensor) else type(part).__name__
            raise TypeError(
                f"{name}: expected trunk outputs, tensors with one row a sample, got {got}; let "
                "the trunk return only what the head needs"
            )
