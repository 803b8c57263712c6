"""Sharded parts whose backward gathers: every rank must run it for the same parts, in one order.

Autograd visits what the features of a rank depend on, newest node first. A part whose output only
some ranks use would gather there alone, and an output that is passed on unchanged would change
the order. Therefore every output gets a node of its own, and the output of the root depends on
those of all parts inside; what nothing is added to stays without a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass
class _Call:
    """One forward of a part: the outputs of parts inside, and whether a gradient arrived."""

    inside: list[Tensor] = field(default_factory=list)
    reached: bool = False


class _Output(torch.autograd.Function):
    """A tensor behind a node of its own, which also leads to the outputs of parts inside."""

    @staticmethod
    def forward(ctx: Any, call: _Call, tensor: Tensor, *inside: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.count = call, len(inside)
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.call.reached |= gradient is not None
        return None, gradient, *[None] * ctx.count


class _Input(torch.autograd.Function):
    """Takes back the zeros that nodes on the way make of a gradient that never arrived."""

    @staticmethod
    def forward(ctx: Any, call: _Call, tensor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.call = call
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, Tensor | None]:
        return None, gradient if ctx.call.reached else None


@contextmanager
def same_backward(roots: Iterable[nn.Module], parts: Sequence[nn.Module]) -> Iterator[None]:
    """Meanwhile the backward of a root arrives at every part that its forward ran."""
    calls: list[_Call] = []
    tops = set(roots)

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        calls.append(_Call())
        return _through(_Input, calls[-1], (args, kwargs))

    def leave(module: nn.Module, _args: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        call = calls.pop()
        output = _through(_Output, call, output, *(call.inside if module in tops else ()))
        if calls:
            calls[-1].inside += [*call.inside, *_with_graph(output)]
        return output

    with ExitStack() as stack:
        for part in parts:
            # Inside of the hooks that gather, which mark inputs and outputs.
            stack.callback(
                part.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove
            )
            stack.callback(part.register_forward_hook(leave, prepend=True).remove)
        yield


def _through(function: Any, call: _Call, nested: Any, *more: Tensor) -> Any:
    """Every tensor with a graph behind a node; `more` hangs on the first that can have one."""
    leaves, structure = tree_flatten(nested)
    for index, leaf in enumerate(leaves):
        differentiable = isinstance(leaf, Tensor) and leaf.is_floating_point()
        if differentiable and (leaf.requires_grad or more):
            leaves[index] = function.apply(call, leaf, *more)
            more = ()
    return tree_unflatten(leaves, structure)


def _with_graph(nested: Any) -> list[Tensor]:
    leaves, _ = tree_flatten(nested)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
