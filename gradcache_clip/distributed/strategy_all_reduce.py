"""Encoders without any wrapper, whose gradients are reduced together at the end of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradcache_clip.distributed.collectives import world_size
from gradcache_clip.distributed.many_ranks import ManyRanks
from gradcache_clip.distributed.wrappers import refuse_wrappers

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class AllReduceStrategy(ManyRanks):
    """Plain encoders: one averaging all-reduce of all gradients at the end of a step.

    Gradients of the encoders, and of modules in `get_features`, are copied into a few flat
    buckets, averaged over the ranks and copied back; a parameter that two encoders share goes once.
    Where a rank has no gradient for a parameter and another has one, it counts as zero; where no
    rank has one, `.grad` stays None. Gradients that were there before, equal on every rank, stay
    right. Nothing overlaps with the backward, which DDP does; in return there is no wrapper, no
    second copy of the gradients but for one bucket, and a replay of any encoder in any order.

    The loss must be that of the global batch on every rank, as for `DDPStrategy`. Unlike DDP, which
    broadcasts the weights of rank 0, this changes no weights: ranks that start from other weights
    are refused at the first step.

    Args:
        grad_scaler: scales the loss; every rank must scale alike, which they do when all of them
            call `step` and `update`.
        bucket_bytes: most bytes of gradients that are reduced, and copied, at a time.

    Example:
        >>> import torch
        >>> from gradcache_clip import ClipLoss, GradCache
        >>> from gradcache_clip.distributed import AllReduceStrategy
        >>> encoders = torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)
        >>> strategy = AllReduceStrategy()
        >>> cache = GradCache(encoders, ClipLoss(), chunk_size=16, strategy=strategy)
        >>> out = cache(torch.randn(64, 8), torch.randn(64, 6))
    """

    def __init__(
        self,
        grad_scaler: torch.amp.GradScaler | None = None,
        *,
        bucket_bytes: int = 256 * 2**20,
    ) -> None:
        super().__init__(grad_scaler)
        if bucket_bytes < 1:
            raise ValueError(
                f"bucket_bytes: expected a positive number of bytes, got {bucket_bytes}; leave it "
                "out for 256 MiB"
            )
        self.bucket_bytes = bucket_bytes
        self._agreed: list[nn.Parameter] = []

    def check(self, modules: Sequence[nn.Module], heads: Sequence[nn.Module] = ()) -> None:
        """Refuse what this would reduce twice, cannot reduce, or would mix up between ranks.

        Raises:
            ValueError: an encoder is wrapped or sharded, has sparse gradients, or has other
                parameters, or other values in them, than on another rank (raised on every rank).
        """
        refuse_wrappers([*modules, *heads], self)
        _refuse_sparse([*modules, *heads])
        named = _trainable([*modules, *heads])
        parameters = [parameter for _, parameter in named]
        same = len(parameters) == len(self._agreed)
        if not same or any(a is not b for a, b in zip(parameters, self._agreed, strict=True)):
            _check_same_everywhere(self.gathered(_described(named)))
            self._agreed = parameters

    @contextmanager
    def step_context(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        yield
        parameters = [parameter for _, parameter in _trainable(modules)]
        if parameters and world_size() > 1:
            for bucket in _buckets(_with_gradient_anywhere(parameters), self.bucket_bytes):
                _average(bucket)


def _trainable(modules: Iterable[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """Parameters that ask for a gradient, each once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for index, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                found.setdefault(id(parameter), (f"{name} of encoder {index}", parameter))
    return list(found.values())


def _with_gradient_anywhere(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters that some rank has a gradient for; the same list on every rank."""
    has = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
    anywhere = has.to(torch.int32)
    dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    return [p for p, wanted in zip(parameters, anywhere.tolist(), strict=True) if wanted]


def _buckets(parameters: Iterable[nn.Parameter], most_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device together, in order, up to a number of bytes."""
    filling: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        bucket = filling.setdefault((parameter.dtype, parameter.device), [])
        if bucket and sum(p.nbytes for p in bucket) + parameter.nbytes > most_bytes:
            yield bucket.copy()
            bucket.clear()
        bucket.append(parameter)
    yield from filling.values()


@torch.no_grad()
def _average(bucket: Sequence[nn.Parameter]) -> None:
    flat = torch.cat([_flat_gradient(parameter) for parameter in bucket])
    # Divided first, for a sum over many ranks might leave the range of 16 bits.
    flat.div_(world_size())
    dist.all_reduce(flat)
    for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(part.view(parameter.shape))


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    return parameter.new_zeros(parameter.numel()) if gradient is None else gradient.reshape(-1)


def _refuse_sparse(modules: Iterable[nn.Module]) -> None:
    for index, module in enumerate(modules):
        for name, part in module.named_modules():
            embeds = isinstance(part, (nn.Embedding, nn.EmbeddingBag))
            if embeds and part.sparse and part.weight.requires_grad:
                raise ValueError(
                    f"encoder {index}: expected dense gradients, got {name or 'an embedding'} with "
                    "sparse=True, whose gradients fit in no bucket; leave sparse out"
                )


def _described(
    named: Sequence[tuple[str, nn.Parameter]],
) -> list[tuple[str, tuple[int, ...], str, int]]:
    """Name, shape, dtype and sum of bits, equal on every rank; float sums depend on order."""
    sums = [_sum_of_bits(parameter) for _, parameter in named]
    # Stacked, so that the host waits for the devices once.
    bits = torch.stack([each.to(sums[0].device) for each in sums]).tolist() if sums else []
    return [
        (name, tuple(parameter.shape), str(parameter.dtype), total)
        for (name, parameter), total in zip(named, bits, strict=True)
    ]


def _sum_of_bits(parameter: nn.Parameter) -> Tensor:
    bits = parameter.detach().contiguous().view(_INTEGERS[parameter.element_size()])
    return bits.sum(dtype=torch.int64)


def _check_same_everywhere(by_rank: Sequence[Sequence[tuple]]) -> None:
    for rank, theirs in enumerate(by_rank):
        if len(theirs) != len(by_rank[0]):
            raise ValueError(
                "encoders: expected the same trainable parameters on every rank, got "
                f"{len(by_rank[0])} on rank 0 and {len(theirs)} on rank {rank}; build and freeze "
                "the model alike everywhere"
            )
        for mine, other in zip(by_rank[0], theirs, strict=True):
            if mine != other:
                what = "values" if mine[:3] == other[:3] else f"{mine[:3]} and {other[:3]}"
                raise ValueError(
                    f"encoders: expected the same weights on every rank, got other {what} on rank "
                    f"{rank} than on rank 0 in {mine[0]}; load the same checkpoint everywhere, or "
                    "seed alike before building the model"
                )
