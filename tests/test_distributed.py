"""Two processes over gloo give the gradients of one process with the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from gloo_processes import start
from one_shot import gradient_errors, one_shot, worst
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.distributed import (
    AllReduceStrategy,
    DDPStrategy,
    LocalStrategy,
    gather_rows,
    world_size,
)

WORLD, LOCAL = 2, 10


def tower(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 8))


def build() -> tuple[nn.Module, nn.Module, ClipLoss]:
    torch.manual_seed(7)
    return tower(6).double(), tower(9).double(), ClipLoss().double()


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    rows = WORLD * LOCAL
    return tuple(torch.randn(rows, w, generator=generator).double() for w in (6, 9))


class OneModule(nn.Module):
    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.towers = nn.ModuleList([image, text])

    def forward(self, tower: int, inputs: Tensor) -> Tensor:
        return self.towers[tower](inputs)


def in_two_processes(check: Callable[[int], None]) -> None:
    start(with_rank, WORLD, check)


def with_rank(check: Callable[[int], None]) -> None:
    check(dist.get_rank())


def counted_reductions(module: DDP) -> list[int]:
    sizes: list[int] = []

    def hook(state, bucket):  # DDP rejects annotations that are strings
        sizes.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer().div_(WORLD), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    module.register_comm_hook(None, hook)
    return sizes


def compare_three_steps(rank: int, wrap_together: bool) -> None:
    image, text, loss = build()
    true_image, true_text, true_loss = build()
    if wrap_together:
        wrapped = [DDP(OneModule(image, text))]
        cache = GradCache(wrapped[0], loss, chunk_size=4, strategy=DDPStrategy())
    else:
        wrapped = [DDP(image), DDP(text)]
        cache = GradCache(wrapped, loss, chunk_size=(4, 100), strategy=DDPStrategy())
    counts = [counted_reductions(module) for module in wrapped]
    ours, truth = [image, text, loss], [true_image, true_text, true_loss]
    optimizers = [torch.optim.SGD(nn.ModuleList(m).parameters(), 0.1) for m in (ours, truth)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        inputs = global_batch(step)
        out = cache(*(x[rank * LOCAL : (rank + 1) * LOCAL] for x in inputs))
        # The truth is one process: its loss must not gather.
        true_loss.group = dist.new_group([rank], use_local_synchronization=True)
        expected = one_shot([true_image, true_text], true_loss, inputs)
        torch.testing.assert_close(out.loss, expected.loss.detach(), rtol=1e-12, atol=0)
        name, error = worst(gradient_errors(ours, truth))
        assert error < 1e-10, (step, name, error)
        assert all(len(sizes) == step + 1 for sizes in counts), counts
        for optimizer in optimizers:
            optimizer.step()


def separate_wrappers(rank: int) -> None:
    compare_three_steps(rank, wrap_together=False)


def one_wrapper(rank: int) -> None:
    compare_three_steps(rank, wrap_together=True)


def unequal_rows(rank: int) -> None:
    with pytest.raises(ValueError, match=r"same number of rows on every rank, got \[2, 3\]"):
        gather_rows(torch.ones(2 + rank, 4))


def unequal_dtypes(rank: int) -> None:
    features = torch.ones(2, 4, dtype=(torch.float32, torch.float16)[rank])
    with pytest.raises(ValueError, match=r"same width and dtype.*float32.*float16"):
        gather_rows(features)


def nan_on_one_rank_stops_all(rank: int) -> None:
    image, text, loss = build()
    cache = GradCache([DDP(image), DDP(text)], loss, chunk_size=4, strategy=DDPStrategy())
    images, texts = global_batch(0)
    if rank == 1:
        images = images * float("nan")
    with pytest.raises(ValueError, match=("another one", r"encoder 0 .*chunk 0")[rank]):
        cache(images[:LOCAL], texts[:LOCAL])
    assert all(p.grad is None for p in [*image.parameters(), *loss.parameters()])


def wrong_wrappers_are_refused(rank: int) -> None:
    image, text, loss = build()
    inputs = [x[:LOCAL] for x in global_batch(0)]

    def refused(encoders: object, message: str, strategy: object = None) -> None:
        cache = GradCache(encoders, loss, chunk_size=4, strategy=strategy or DDPStrategy())
        with pytest.raises(ValueError, match=message):
            cache(*inputs)

    refused([DDP(image), text], "encoder 1: expected an encoder in DistributedDataParallel")
    refused([DDP(image), DDP(text)], r"pass strategy=DDPStrategy\(\)", LocalStrategy())
    together = OneModule(image, text)
    refused(DDP(together, find_unused_parameters=True), "without find_unused_parameters")
    refused([DDP(image, static_graph=True), DDP(text)], "without static_graph")
    refused([torch.compile(DDP(image)), DDP(text)], "inside torch.compile")
    alone = dist.new_group([rank], use_local_synchronization=True)
    refused([DDP(image, process_group=alone), DDP(text)], "expected a wrapper over all 2 ranks")


CHECKS = [
    separate_wrappers,
    one_wrapper,
    unequal_rows,
    unequal_dtypes,
    nan_on_one_rank_stops_all,
    wrong_wrappers_are_refused,
]


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(check):
    in_two_processes(check)


def test_data_parallel_is_refused():
    image, text, loss = build()
    # In use by this process alone, on any number of devices.
    for encoders in ([nn.DataParallel(image), text], [nn.Sequential(nn.DataParallel(image)), text]):
        cache = GradCache(encoders, loss, chunk_size=4)
        with pytest.raises(ValueError, match=r"encoder 0: .*DataParallel.*random.*torchrun"):
            cache(*global_batch(0))


class Waits(TorchDispatchMode):
    """How often the host asks for a number that a device may still compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_comparing_weights_waits_once_for_all_parameters():
    counts = []
    for layers in (1, 10):
        encoders = [nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers))) for _ in range(2)]
        cache = GradCache(encoders, ClipLoss(), chunk_size=4, strategy=AllReduceStrategy())
        with Waits() as waits:
            cache(torch.randn(8, 6), torch.randn(8, 6))
        counts.append(waits.count)
    assert counts[0] == counts[1], counts


def test_one_process_gathers_nothing():
    features = torch.ones(3, 4, requires_grad=True)
    assert world_size() == 1
    assert gather_rows(features) is features
