"""Sharded parts whose backward gathers: every rank must run it for the same parts, in one order.

Autograd visits what the features of a rank depend on, newest node first. A part whose output only
some ranks use would gather there alone, and an output that is passed on unchanged would change
the order. Therefore every output gets a node of its own, and the output of the root depends on
those of all parts inside; what nothing is added to stays without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """A tensor behind a node of its own, which also leads to parameters and outputs of parts."""

    @staticmethod
    def forward(ctx: Any, call: _Call, tensor: Tensor, *inside: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        # A parameter may be without its values, and so its shape, when the backward comes.
        ctx.call, ctx.inside = call, [(x, x.shape) if x.is_leaf else None for x in inside]
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.call.reached |= gradient is not None
        # Parameters get zeros: what reduces them takes no gradient that is None. Dense ones, which
        # autograd takes over as they are; others it would copy into the parameter's shape.
        zeros = [None if x is None else x[0].new_zeros(x[1]) for x in ctx.inside]
        return None, gradient, *zeros


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


def _none(_: nn.Module) -> Sequence[Tensor]:
    return ()


@contextmanager
def same_backward(
    roots: Iterable[nn.Module],
    parts: Sequence[nn.Module],
    parameters_of: Callable[[nn.Module], Sequence[Tensor]] = _none,
) -> Iterator[None]:
    """Meanwhile the backward of a root arrives at every part that its forward ran.

    Args:
        roots: modules whose outputs a backward starts from.
        parts: modules that gather, the roots among them.
        parameters_of: parameters that the backward of a part is to arrive at as well.
    """
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
        inside = calls[-1].inside if module in tops else []
        return _through(_Output, calls[-1], output, *inside, *parameters_of(module))

    def left(_module: nn.Module, _args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            inside = [*calls.pop().inside, *_with_graph(output)]
            if calls:
                calls[-1].inside += inside

    with ExitStack() as stack:
        for part in parts:
            # Inside of the hooks that gather, which mark inputs and outputs; `left` sees the marks.
            hooks = (
                part.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
                part.register_forward_hook(leave, prepend=True),
                part.register_forward_hook(left),
            )
            for hook in hooks:
                stack.callback(hook.remove)
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
