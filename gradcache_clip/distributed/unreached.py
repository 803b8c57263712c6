"""Parameters that the last backward of a step does not reach, on this rank or on any.

A reducer waits for every parameter, and all ranks must reduce the same ones. Which a rank has used
depends on its rows: a chunk without images, a branch that only some data take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradcache_clip.distributed.collectives import world_size


class Reach(torch.autograd.Function):
    """A zero whose backward arrives at every parameter and adds nothing to its gradient.

    Autograd then runs the accumulation node of each parameter, and with it a reducer's hook, once
    all real contributions are there. `with_zeros` asks for a gradient of zeros where there is no
    other, for hooks that cannot take None.
    """

    @staticmethod
    def forward(ctx: Any, with_zeros: Sequence[bool], *parameters: Tensor) -> Tensor:
        pairs = zip(with_zeros, parameters, strict=True)
        ctx.like = [parameter if wanted else None for wanted, parameter in pairs]
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        zeros = [None if like is None else like.new_zeros(()).expand_as(like) for like in ctx.like]
        return (None, *zeros)


def reach(parameters: Sequence[Tensor], *, with_zeros: bool = False) -> Tensor:
    """A scalar to run backward from together with everything else."""
    wanted = [with_zeros or bool(parameter._backward_hooks) for parameter in parameters]
    zero: Tensor = Reach.apply(wanted, *parameters)
    return zero


@contextmanager
def unused_stay_none(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Around the backward that reduces: parameters that no rank has used keep `.grad` None.

    A reducer would give them zeros, with which an optimizer still decays weights and moments. The
    ranks exchange one flag per parameter; only a rank that missed one waits for the answer.
    """
    unknown = {id(p): p for p in parameters if p.grad is None}

    def note(parameter: Tensor) -> None:
        # Autograd also calls this where nothing arrived.
        if parameter.grad is not None:
            unknown.pop(id(parameter), None)

    handles = [p.register_post_accumulate_grad_hook(note) for p in unknown.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for parameter in without_use(parameters, unknown):
        parameter.grad = None


def without_use(parameters: Sequence[Tensor], unused: Any) -> list[Tensor]:
    """Parameters that no rank has used; `unused` holds the ids of those that this one has not.

    Every rank must call this with the same parameters, in the same order.
    """
    missing = [parameter for parameter in parameters if id(parameter) in unused]
    if world_size() == 1:
        return missing
    used = torch.tensor(
        [id(parameter) not in unused for parameter in parameters],
        dtype=torch.int32,
        device=parameters[0].device,
    )
    work = dist.all_reduce(used, dist.ReduceOp.MAX, async_op=True)
    if not missing:
        return []
    work.wait()
    anywhere = dict(zip(map(id, parameters), used.tolist(), strict=True))
    return [parameter for parameter in missing if not anywhere[id(parameter)]]
