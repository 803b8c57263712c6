"""Cases that only sharded encoders have; each runs on every rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import pytest
import strategy_steps as steps
import torch
import torch.distributed as dist
from one_shot import worst
from strategy_steps import optimizer_steps, rows_of, two_towers
from strategy_wraps import GATHER, Counted, each_sharded, sharded
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.debug import CommDebugMode

from gradcache_clip import ClipLoss, FrozenTrunk, GradCache
from gradcache_clip.cache.graph_budget import SavedBytes
from gradcache_clip.distributed import FSDPStrategy


def mixed_precision(keep_gathered: bool) -> dict[str, Any]:
    """bf16 weights in embed and replay alike, gradients of all chunks added up in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    seen: list[torch.dtype] = []
    ours, truth = two_towers(), two_towers()
    for encoder in ours:
        sharded(encoder, mp_policy=policy)
        encoder.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    loss, true_loss = ClipLoss(), steps.PlainClip()
    strategy = FSDPStrategy(keep_gathered=keep_gathered)
    cache = GradCache(ours, loss, chunk_size=3, strategy=strategy, check_rows="off")
    batch = [inputs.float() for inputs in steps.global_batch(0)]
    cache(*rows_of(dist.get_rank(), batch))
    steps.in_one_graph(truth, true_loss, 0, batch, 3)
    # Embed and replay of every chunk of two towers, but for the one graph that is kept.
    chunks = -(-steps.ROWS // dist.get_world_size() // 3)
    assert seen == (4 * chunks - 1) * [torch.bfloat16], seen
    errors = steps.errors_of(nn.ModuleList(ours), nn.ModuleList(truth).double())
    return {"error": worst(errors)[1], "parameter": worst(errors)[0]}


def gathered_once() -> dict[str, Any]:
    """All-gathers of a step with and without keeping the parameters, and shards afterwards."""
    counts = {}
    for keep in (False, True):
        encoders = each_sharded([module.double() for module in two_towers()])
        strategy = FSDPStrategy(keep_gathered=keep)
        cache = GradCache(encoders, ClipLoss().double(), chunk_size=3, strategy=strategy)
        for step in range(2):
            with Counted(GATHER) as counted:
                cache(*rows_of(dist.get_rank(), steps.global_batch(step)))
            counts[str(keep)] = counted.calls
        assert all(hasattr(p, "full_tensor") for e in encoders for p in e.parameters())
        layers = (m for e in encoders for m in e.modules() if isinstance(m, nn.Linear))
        for group in (g for layer in layers for g in layer._get_fsdp_state()._fsdp_param_groups):
            assert group.reshard_after_backward and group.post_forward_mesh_info is not None
    return counts


def norm_of_all_shards() -> dict[str, Any]:
    """The norm of all gradients, sharded and whole, after one collective."""
    encoders, loss = each_sharded([module.double() for module in two_towers()]), ClipLoss().double()
    strategy = FSDPStrategy()
    GradCache(encoders, loss, chunk_size=3, strategy=strategy)(
        *rows_of(dist.get_rank(), steps.global_batch(0))
    )
    modules = [*encoders, loss]
    gradients = [steps.full(p.grad) for module in modules for p in module.parameters()]
    with CommDebugMode() as collectives:
        norm = strategy.clip(modules, max_norm=0.0)
        nothing = strategy.clip([nn.Linear(2, 2)], max_norm=1.0)
    assert collectives.get_total_counts() == (dist.get_world_size() > 1)
    assert nothing == 0
    expected = nn.utils.get_total_norm(gradients)
    return {"error": float((norm - expected).abs() / expected)}


def requests_to_the_store() -> dict[str, Any]:
    """A rank that waits for a late one leaves the store alone."""
    encoders = each_sharded([module.double() for module in two_towers()])
    cache = GradCache(encoders, ClipLoss().double(), chunk_size=100, strategy=FSDPStrategy())
    late = [0.5 * dist.get_rank()]
    encoders[0].register_forward_pre_hook(lambda *_: time.sleep(late.pop()) if late else None)
    requests: list[str] = []
    with ExitStack() as stack:
        for name in ("add", "check", "get", "set", "wait"):
            original = getattr(dist.Store, name)

            def counted(*args: Any, name: str = name, original: Any = original) -> Any:
                requests.append(name)
                return original(*args)

            stack.enter_context(mock.patch.object(dist.Store, name, counted))
        cache(*rows_of(dist.get_rank(), steps.global_batch(0)))
    # Four for each of seven parts and for the end, of the two forwards that check rows, of the
    # embed and of the replay, and a few that torch makes.
    assert len(requests) < 200, len(requests)
    return {}


def after_an_error(keep_gathered: bool) -> dict[str, Any]:
    """A step that broke off in its replay leaves nothing behind for the next one."""
    broken = [True]

    class Breaks(FSDPStrategy):
        def backward(self, features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
            super().backward(features, gradients)
            if broken and len(seen) == 2:
                raise KeyboardInterrupt
            seen.append(len(features))

    seen: list[int] = []
    strategy = Breaks(keep_gathered=keep_gathered)
    ours, truth = [[m.double() for m in two_towers()] for _ in range(2)]
    cache = GradCache(each_sharded(ours), ClipLoss().double(), chunk_size=1, strategy=strategy)
    batch = steps.global_batch(0)
    with pytest.raises(KeyboardInterrupt):
        cache(*rows_of(dist.get_rank(), batch))
    broken.clear()
    assert all(p.grad is None for m in ours for p in m.parameters())
    with pytest.raises(RuntimeError, match=r"call optimizer.zero_grad\(\)"):
        cache(*rows_of(dist.get_rank(), batch))
    cache.loss.zero_grad()
    cache(*rows_of(dist.get_rank(), batch))
    steps.in_one_graph(truth, steps.PlainClip().double(), 0, batch, 1)
    return {"error": worst(steps.errors_of(nn.ModuleList(ours), nn.ModuleList(truth)))[1]}


def frozen_shards() -> dict[str, Any]:
    """A frozen encoder stays gathered after its embed, but not after the step."""
    for keep in (False, True):
        image, text = (module.double() for module in two_towers())
        sharded(text.requires_grad_(False))
        strategy = FSDPStrategy(keep_gathered=keep)
        cache = GradCache(
            [sharded(image), text], ClipLoss().double(), chunk_size=3, strategy=strategy
        )
        cache(*rows_of(dist.get_rank(), steps.global_batch(0)))
        assert all(hasattr(p, "full_tensor") for m in (image, text) for p in m.parameters())
        assert all(p.grad is None for p in text.parameters())
    return {}


def with_trunk() -> list[nn.Module]:
    torch.manual_seed(7)
    trunk = nn.Linear(6, 9).requires_grad_(False)
    return [FrozenTrunk(trunk, steps.tower(9)), steps.tower(9)]


def budgets_that_differ() -> dict[str, Any]:
    """Each rank has room for another number of graphs, and all keep as many as the poorest."""
    ours, truth = [[m.double() for m in two_towers()] for _ in range(2)]
    calls: list[int] = []
    for encoder in ours:
        encoder.register_forward_hook(lambda *_: calls.append(1))
    richest = 20_000
    cache = GradCache(
        each_sharded(ours),
        ClipLoss().double(),
        chunk_size=1,
        strategy=FSDPStrategy(),
        memory_budget=richest // (1 + dist.get_rank()),
    )
    cache(*rows_of(dist.get_rank(), steps.global_batch(0)))
    everywhere = cache.strategy.gathered(len(calls))
    chunks = steps.ROWS // dist.get_world_size()
    assert len({*everywhere}) == 1 and 2 * chunks < len(calls) < 4 * chunks - 1, everywhere
    steps.in_one_graph(truth, steps.PlainClip().double(), 0, steps.global_batch(0), 1)
    return {"error": worst(steps.errors_of(nn.ModuleList(ours), nn.ModuleList(truth)))[1]}


def graph_bytes() -> dict[str, Any]:
    """What a graph is taken to need does not include the parameters that were gathered for it."""
    totals = []
    for wrap in (lambda encoder: encoder, sharded):
        encoder, inputs = wrap(two_towers()[0]), torch.randn(4, 6)
        saved = SavedBytes([*encoder.parameters(), inputs])
        with saved.counting(True):
            encoder(inputs)
        totals.append(saved.total)
    assert totals[0] == totals[1] > 0, totals
    return {}


def frozen_trunk() -> dict[str, Any]:
    """It runs apart from its head, and its weights are gathered for that too."""
    return optimizer_steps(with_trunk, each_sharded, FSDPStrategy())


def fsdp_cases() -> dict[str, Any]:
    cases: dict[str, Any] = {
        "FSDP: gathers": gathered_once,
        "FSDP: graph bytes": graph_bytes,
        "FSDP: norm": norm_of_all_shards,
        "FSDP: requests": requests_to_the_store,
        "FSDP: frozen trunk": frozen_trunk,
        "FSDP: frozen shards": frozen_shards,
        "FSDP: budgets that differ": budgets_that_differ,
    }
    for keep in (False, True):
        cases[f"FSDP: bf16, gathered {keep}"] = partial(mixed_precision, keep)
        cases[f"FSDP: after an error, gathered {keep}"] = partial(after_an_error, keep)
    return cases
