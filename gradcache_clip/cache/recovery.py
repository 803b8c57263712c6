"""Undo a step that ran out of memory, so that it can start again with smaller chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gradcache_clip.cache.batch_tree import tensors_in
from gradcache_clip.cache.random_state import RandomState, accelerators_among
from gradcache_clip.cache.tower import Tower


class StepSnapshot:
    """State that a step changes: gradients, random generators, running statistics of norms.

    Gradients that exist are set aside, not copied, and added again at the end of the step; until
    then a second set of gradients is alive.
    """

    def __init__(self, modules: Iterable[nn.Module], towers: Sequence[Tower]) -> None:
        self.changed: str | None = None
        """Changes of this step that cannot be undone, as an error says them."""
        self._modules = list({id(module): module for module in modules}.values())
        inputs = [tensor for tower in towers for tensor in tensors_in(tower.passed)]
        parameters = (p for module in self._modules for p in module.parameters())
        self._aside: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.set_aside(chain(parameters, inputs))
        known = (tensor for tower in towers for tensor in tower.known_tensors())
        self._devices = accelerators_among(known)
        self._random_state = RandomState.capture(self._devices)
        self._statistics = {id(b): (b, b.clone()) for b in _running_statistics(self._modules)}
        # The buffers themselves: the id of one that is gone may come again.
        self._versions = {id(b): (b, b._version) for m in self._modules for b in m.buffers()}

    def set_aside(self, leaves: Iterable[Tensor]) -> None:
        """Keep gradients that exist out of what this step adds up."""
        for leaf in leaves:
            if leaf.requires_grad and leaf.is_leaf and id(leaf) not in self._aside:
                self._aside[id(leaf)] = leaf, leaf.grad
                leaf.grad = None

    def taken_back(self, leaf: Tensor) -> Tensor | None:
        """Return the gradient from before the step, and no longer keep it aside."""
        _, earlier = self._aside.pop(id(leaf), (leaf, None))
        return earlier

    def undo(self, phase: str, reason: str, tried: Sequence[int]) -> None:
        """Go back to the start of the step, or raise an error that says why not.

        Raises:
            torch.OutOfMemoryError: chunks of one row do not fit, or a buffer cannot be restored.
        """
        self.drop()
        if changed := self.changed or self._changed_buffer():
            raise torch.OutOfMemoryError(
                f"GradCache: out of memory in the {phase}, and the step cannot start again because "
                f"{changed}; choose a smaller chunk_size. {reason}"
            )
        if tried[-1] <= 1:
            sizes = ", ".join(map(str, tried))
            raise torch.OutOfMemoryError(
                f"GradCache: expected chunks of one row to fit, got no memory in the {phase} with "
                f"any of chunk_size {sizes}; take smaller inputs, activation checkpointing, or a "
                f"smaller batch. {reason}"
            )
        self.restore()
        if any(device.type == "cuda" for device in self._devices):
            # Smaller chunks must not meet the fragments of larger ones.
            torch.cuda.empty_cache()

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Put earlier gradients back after a step, also after an error."""
        try:
            yield
        except BaseException:
            self.drop()
            raise
        finally:
            self.finish()

    def drop(self) -> None:
        """Drop the gradients of this step."""
        for leaf, _ in self._aside.values():
            leaf.grad = None

    @torch.no_grad()
    def restore(self) -> None:
        """Drop this step's gradients; put back generators and running statistics."""
        self.drop()
        self._random_state.restore()
        for buffer, before in self._statistics.values():
            buffer.copy_(before)

    @torch.no_grad()
    def finish(self) -> None:
        """Add the gradients that were there before."""
        for leaf, earlier in self._aside.values():
            if earlier is not None:
                leaf.grad = earlier if leaf.grad is None else earlier.add_(leaf.grad)
        self._aside.clear()

    def _changed_buffer(self) -> str | None:
        for module in self._modules:
            for name, buffer in module.named_buffers():
                _, before = self._versions.get(id(buffer), (buffer, -1))
                changed = buffer._version != before
                if changed and id(buffer) not in self._statistics:
                    return f"it had changed the buffer {name} of {type(module).__name__}"
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of a device or of the host, had nothing left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _running_statistics(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        for child in module.modules():
            if isinstance(child, _NormBase) and child.training:
                yield from child.buffers(recurse=False)
