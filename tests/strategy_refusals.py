"""Encoders that a strategy would give wrong gradients to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from strategy_steps import PlainClip, global_batch, in_one_graph, rows_of, tower, two_towers
from strategy_wraps import as_they_are, each_in_ddp, sharded
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel as DDP

from gradcache_clip import ClipLoss, GradCache, RetrievalLoss
from gradcache_clip.distributed import (
    AllReduceStrategy,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    LocalStrategy,
)


def refused(encoders: Any, strategy: Any, message: str, **options: Any) -> None:
    """With an error, before any gradient is there."""
    modules = [encoders] if isinstance(encoders, nn.Module) else encoders
    loss = ClipLoss().double()
    cache = GradCache(encoders, loss, strategy=strategy, **{"chunk_size": 3, **options})
    inputs = rows_of(dist.get_rank(), global_batch(0))
    with pytest.raises(ValueError, match=message):
        cache(*inputs)
    assert all(p.grad is None for m in [*modules, loss] for p in m.parameters())


def doubles() -> list[nn.Module]:
    return [module.double() for module in two_towers()]


def wrong_wrappers() -> dict[str, Any]:
    image, text = doubles()
    for strategy in (LocalStrategy(), AllReduceStrategy(), FSDPStrategy()):
        refused([DDP(image), text], strategy, r"encoder 0: .*DistributedDataParallel.*DDPStrategy")
    refused([nn.Sequential(DDP(image)), text], LocalStrategy(), "got a DistributedDataParallel")
    shards, text = doubles()
    sharded(shards)
    for strategy in (LocalStrategy(), AllReduceStrategy(), DDPStrategy()):
        refused([shards, text], strategy, r"encoder 0: .*FSDPModule.*strategy=FSDPStrategy\(\)")
    # A part that is sharded counts as well.
    part, text = doubles()
    fully_shard(part[0])
    refused([part, text], LocalStrategy(), "got a FSDPModule")
    refused([part, text], FSDPStrategy(), "encoder 0: expected an encoder sharded by fully_shard")
    return {}


def not_sharded_as_expected() -> dict[str, Any]:
    image, text = doubles()
    sharded(image)
    refused([image, text], FSDPStrategy(), "encoder 1: expected an encoder sharded by fully_shard")
    left_out, text = doubles()
    fully_shard(left_out, ignored_params={left_out[0].bias})
    refused([left_out, sharded(text)], FSDPStrategy(), "got 0.bias outside of it")
    image, text = doubles()
    fully_shard(image).set_gradient_divide_factor(1.0)
    refused([image, sharded(text)], FSDPStrategy(), r"set_gradient_divide_factor\(1.0\)")
    image, text = doubles()
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("all", "alone"))
    fully_shard(image, mesh=mesh["alone"])
    refused(
        [image, sharded(text)], FSDPStrategy(), "expected a mesh over all 2 ranks, got one over 1"
    )
    head = nn.Linear(8, 4).double()
    image, text = (sharded(module) for module in doubles())
    refused(
        [image, text], FSDPStrategy(), "get_features: .*got weight of Linear", get_features=head
    )
    refused([image, text], FSDPStrategy(), "chunk_size='auto': .*pass a number", chunk_size="auto")
    return {}


def heads_beside_ddp() -> dict[str, Any]:
    head = nn.Linear(8, 4).double()
    wrapped = [DDP(module) for module in doubles()]
    refused(wrapped, DDPStrategy(), "get_features: .*got weight of Linear", get_features=head)
    return {}


def unequal_chunks() -> dict[str, Any]:
    """Ranks with longer texts would take more forwards, and the others hang."""
    torch.manual_seed(7)
    image, text = (sharded(tower(width).double()) for width in (6, 9))
    sizes = 3 + dist.get_rank()
    refused(
        [image, text], FSDPStrategy(), "expected as many chunks on every rank", chunk_size=sizes
    )
    return {}


def other_weights() -> dict[str, Any]:
    torch.manual_seed(dist.get_rank())
    encoders = [tower(6).double(), tower(9).double()]
    refused(encoders, AllReduceStrategy(), "same weights on every rank.*on rank 1")
    encoders = doubles()
    if dist.get_rank() == 1:
        encoders[1][0][0].bias.requires_grad_(False)
    refused(
        encoders,
        AllReduceStrategy(),
        "same trainable parameters on every rank, got 14 on rank 0 and 13",
    )
    encoders = doubles()
    # One bit.
    if dist.get_rank() == 1:
        with torch.no_grad():
            weight = encoders[0][0].weight
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0, dtype=torch.float64))
    refused(
        encoders, AllReduceStrategy(), r"got other values on rank 1 .* in 0.weight of encoder 0"
    )
    return {}


def sparse_gradients() -> dict[str, Any]:
    image, text = doubles()
    text = nn.Sequential(nn.Embedding(5, 8, sparse=True), text)
    refused([image, text], AllReduceStrategy(), "encoder 1: expected dense gradients, got 0 with")
    with pytest.raises(ValueError, match="bucket_bytes: expected a positive number"):
        AllReduceStrategy(bucket_bytes=0)
    with pytest.raises(TypeError, match="engine: expected the engine .*, got Sequential"):
        DeepSpeedStrategy(image)
    return {}


def inputs_with_gradients() -> dict[str, Any]:
    """Their rows would get the gradient times the number of ranks."""
    encoders = doubles()
    cache = GradCache(encoders, ClipLoss().double(), strategy=AllReduceStrategy(), chunk_size=3)
    images, texts = rows_of(dist.get_rank(), global_batch(0))
    with pytest.raises(ValueError, match="encoder 0 .*expected inputs that ask for no gradient"):
        cache(images.requires_grad_(), texts)
    assert all(p.grad is None for p in nn.ModuleList(encoders).parameters())
    # By hand they are right.
    alone = LocalStrategy(reduce_myself=True)
    GradCache(encoders, ClipLoss().double(), strategy=alone, chunk_size=3)(images, texts)
    expected = [inputs.requires_grad_() for inputs in global_batch(0)]
    in_one_graph(encoders, PlainClip().double(), 0, expected, 3)
    torch.testing.assert_close(images.grad, rows_of(dist.get_rank(), [expected[0].grad])[0])
    return {}


def a_learned_argument_of_the_loss() -> dict[str, Any]:
    """Only the gradient of an encoder is reduced: one for each row makes the same bias."""
    encoders, bias, loss = doubles(), nn.Linear(9, 1, bias=False).double(), RetrievalLoss().double()
    images, texts = rows_of(dist.get_rank(), global_batch(0))
    cache = GradCache(encoders, loss, strategy=AllReduceStrategy(), chunk_size=3)
    with pytest.raises(ValueError, match="loss_kwargs: expected a column_bias that asks for no"):
        cache(images, texts, loss_kwargs={"column_bias": bias(texts)})
    towers = [*encoders, bias]
    assert all(p.grad is None for p in nn.ModuleList(towers).parameters())

    def biased(q: Tensor, k: Tensor, bias: Tensor) -> Any:
        return loss(q, k, column_bias=bias)

    cache = GradCache(towers, biased, strategy=AllReduceStrategy(), chunk_size=3)
    cache(images, texts, texts)
    q, k = global_batch(0)
    features = zip(towers, (q, k, k), strict=True)
    rows, columns, added = (part(each) for part, each in features)
    logits = loss.logit_scale * normalize(rows) @ normalize(columns).T + added.T
    truth = cross_entropy(logits, torch.arange(len(q)))
    parameters = list(nn.ModuleList(towers).parameters())
    for parameter, want in zip(parameters, torch.autograd.grad(truth, parameters), strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-10, atol=1e-12)
    return {}


def parameters_of_a_function() -> dict[str, Any]:
    """Nobody would reduce them; afterwards the next step says that gradients are left."""
    for strategy, wrap in ((AllReduceStrategy, as_they_are), (DDPStrategy, each_in_ddp)):
        torch.manual_seed(3)
        head = nn.Linear(8, 4).double()
        hidden = [lambda x, head=head: head(x), None]
        short = nn.Sequential(tower(9), nn.Linear(8, 4)).double()
        encoders = wrap([tower(6).double(), short])
        cache = GradCache(
            encoders, ClipLoss().double(), strategy=strategy(), chunk_size=3, get_features=hidden
        )
        inputs = rows_of(dist.get_rank(), global_batch(0))
        with pytest.raises(ValueError, match="parameters that a module has registered.*reduce"):
            cache(*inputs)
        with pytest.raises(RuntimeError, match=r"call optimizer.zero_grad\(\)"):
            cache(*inputs)
    return {}


def reduced_by_hand() -> dict[str, Any]:
    """Sums over the ranks are the gradient; a rank with NaN stops all of them."""
    encoders, loss = doubles(), ClipLoss().double()
    truth, true_loss = doubles(), PlainClip().double()
    refused(encoders, LocalStrategy(), r"pass strategy=AllReduceStrategy\(\)")
    cache = GradCache(encoders, loss, chunk_size=3, strategy=LocalStrategy(reduce_myself=True))
    batch = global_batch(0)
    cache(*rows_of(dist.get_rank(), batch))
    for parameter in nn.ModuleList(encoders).parameters():
        dist.all_reduce(parameter.grad)
    in_one_graph(truth, true_loss, 0, batch, 3)
    sides = (nn.ModuleList(modules).parameters() for modules in (encoders, truth))
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    images, texts = rows_of(dist.get_rank(), batch)
    if dist.get_rank() == 1:
        images = images * float("nan")
    with pytest.raises(ValueError, match="expected finite"):
        cache(images, texts)
    return {}


REFUSALS = {
    "inputs with gradients": inputs_with_gradients,
    "a learned argument of the loss": a_learned_argument_of_the_loss,
    "parameters of a function": parameters_of_a_function,
    "reduced by hand": reduced_by_hand,
    "wrong wrappers": wrong_wrappers,
    "not sharded as expected": not_sharded_as_expected,
    "heads beside ddp": heads_beside_ddp,
    "unequal chunks": unequal_chunks,
    "other weights": other_weights,
    "sparse gradients": sparse_gradients,
}
