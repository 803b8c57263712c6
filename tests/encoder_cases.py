"""A cached step of each encoder under a strategy, beside one process with the rows of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import strategy_steps as steps
import torch
import torch.distributed as dist
from deepspeed_cases import engine_for, gradients_of
from encoder_models import ENCODERS, ROWS, Pair
from one_shot import twins, worst
from packed_inputs import compute_in_double
from strategy_wraps import as_they_are, each_in_ddp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.cache.batch_tree import map_tensors, take_rows
from gradcache_clip.cache.trunk import call_encoder
from gradcache_clip.distributed import (
    AllReduceStrategy,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    LocalStrategy,
    gather_rows,
    world_size,
)

CHUNK = 2
FEATURES = "image_embeds", "text_embeds", "audio_embeds", "pooler_output"
# A key bias moves no softmax: its gradient is zero but for rounding.
ZERO = "key.bias", "k_proj.bias"


class Total(nn.Module):
    """The loss of a pair, with the scale of its contrastive part."""

    def __init__(self, contrast: nn.Module, pair: Pair, gather: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.contrast, self.pair, self.gather = contrast, pair, gather

    def forward(self, *features: Any) -> Tensor:
        return self.pair.loss(self._contrasted, self.gather)(*features)

    def _contrasted(self, *features: Tensor) -> Tensor:
        output = self.contrast(*features)
        return output if isinstance(output, Tensor) else output.loss


class Towers(nn.Module):
    """All encoders behind one forward, as a DeepSpeed engine wants them."""

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(encoders)

    def forward(self, tower: int, inputs: Any) -> Any:
        return call_encoder(self.towers[tower], inputs)


def in_groups(encoders: list[nn.Module]) -> list[nn.Module]:
    """Layers, and what is left, as groups; weights in four bits stay whole."""
    for encoder in {id(encoder): encoder for encoder in encoders}.values():
        whole = {p for p in encoder.parameters() if not p.is_floating_point()}
        for layer in encoder.modules():
            if type(layer) is nn.Linear:
                fully_shard(layer)
        fully_shard(encoder, ignored_params=whole)
    return encoders


def in_one_graph(encoders: Sequence[nn.Module], loss: nn.Module, pair: Pair) -> None:
    """The step over all rows, with the random numbers of each rank's chunks if there are any."""
    outputs: list[list[Any]] = [[] for _ in encoders]
    ranks, size = (world_size(), CHUNK) if pair.draws else (1, ROWS)
    for rank in range(ranks):
        steps.seed(0, rank)
        starts = range(rank * ROWS // ranks, (rank + 1) * ROWS // ranks, size)
        for output, encoder, given in zip(outputs, encoders, pair.inputs, strict=True):
            cut = [take_rows(given, at, at + size) for at in starts] if pair.draws else [given]
            output += [call_encoder(encoder, rows) for rows in cut]
    value = loss(*map(_features, outputs))
    for name, weight in pair.auxiliary.items():
        value = value + weight * outputs[0][0][name]
    value.backward()


def _features(outputs: list[Any]) -> Any:
    found = []
    for output in outputs:
        named = [output[key] for key in FEATURES if isinstance(output, Mapping) and key in output]
        found.append(named[0] if named else output)
    return torch.cat(found) if len(found) > 1 else found[0]


def rows_of_rank(pair: Pair) -> list[Any]:
    own = ROWS // world_size()
    start = own * (dist.get_rank() if dist.is_initialized() else 0)
    both = zip(pair.inputs, pair.rows, strict=True)
    divided = [given if division is None else division(given) for given, division in both]
    return [take_rows(given, start, start + own) for given in divided]


def in_double(pair: Pair, encoders: Sequence[nn.Module], patch: pytest.MonkeyPatch) -> Pair:
    """Let encoders compute in fp64, if no weight is in four bits; the pair with such numbers."""
    if pair.four_bits:
        return pair
    for encoder in encoders:
        compute_in_double(encoder.double(), patch)
    return pair.with_inputs([map_tensors(_double, given) for given in pair.inputs])


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def options_of(pair: Pair) -> dict[str, Any]:
    auxiliary = dict(pair.auxiliary) or None
    return {"chunk_size": CHUNK, "rows": [*pair.rows], "auxiliary_losses": auxiliary}


def plainly(
    name: str, wrap: Callable[[list[nn.Module]], Any], strategy: Callable[[], Any], all_alike: bool
) -> dict[str, Any]:
    """Under a strategy that leaves the modules as they are, in fp64."""
    torch.manual_seed(0)
    pair = ENCODERS[name](all_alike)
    ours, truth = twins(*pair.encoders)
    loss, true_loss = ClipLoss(), steps.PlainClip()
    with pytest.MonkeyPatch.context() as patch:
        pair = in_double(pair, [*ours, *truth, loss, true_loss], patch)
        total, true_total = Total(loss, pair, gather_rows), Total(true_loss, pair, lambda x: x)
        in_one_graph(truth, true_total, pair)
        cache = GradCache(wrap(ours), total, strategy=strategy(), **options_of(pair))
        steps.seed(0, dist.get_rank() if dist.is_initialized() else 0)
        cache(*rows_of_rank(pair))
        errors = steps.errors_of(nn.ModuleList([*ours, total]), nn.ModuleList([*truth, true_total]))
    return _worst(errors)


def under_zero(name: str, stage: int) -> dict[str, Any]:
    """In fp32, which DeepSpeed wants, beside fp64."""
    torch.manual_seed(0)
    pair = ENCODERS[name](stage >= 2)
    ours, truth = twins(*pair.encoders)
    loss, true_loss = ClipLoss(), steps.PlainClip()
    with pytest.MonkeyPatch.context() as patch:
        wide = in_double(pair, [*truth, true_loss], patch)
        in_one_graph(truth, Total(true_loss, wide, lambda x: x), wide)
    engine = engine_for(Towers(ours), stage)
    total, strategy = Total(loss, pair, gather_rows), DeepSpeedStrategy(engine)
    steps.seed(0, dist.get_rank())
    GradCache(engine, total, strategy=strategy, **options_of(pair))(*rows_of_rank(pair))
    found = {**gradients_of(engine), "scale": loss.log_logit_scale.grad}
    engine.step()
    expected = {n: p.grad for n, p in Towers(truth).named_parameters() if p.requires_grad}
    expected["scale"] = true_loss.log_logit_scale.grad
    assert found.keys() == expected.keys()
    return _worst({key: float((found[key] - g).norm() / g.norm()) for key, g in expected.items()})


def _worst(errors: Mapping[str, float]) -> dict[str, Any]:
    shown = {name.replace("/", "."): error for name, error in errors.items()}
    parameter, error = worst({k: v for k, v in shown.items() if not k.endswith(ZERO)})
    return {"error": error, "parameter": parameter}


STRATEGIES: dict[str, Callable[..., dict[str, Any]]] = {
    "AllReduce": partial(plainly, wrap=as_they_are, strategy=AllReduceStrategy, all_alike=False),
    "DDP": partial(plainly, wrap=each_in_ddp, strategy=DDPStrategy, all_alike=False),
    "FSDP": partial(plainly, wrap=in_groups, strategy=FSDPStrategy, all_alike=True),
    "ZeRO-1": partial(under_zero, stage=1),
    "ZeRO-3": partial(under_zero, stage=3),
}


# Images on one rank alone, and embeddings that a checkpointed LoRA lets ask for gradients.
QUICK = "Qwen3 + LoRA, left, dropout under AllReduce", "Qwen2.5-VL, 0 to 2 images under DDP"


def alone(name: str) -> dict[str, Any]:
    return plainly(name, as_they_are, LocalStrategy, all_alike=False)


def cases(*, quick: bool) -> dict[str, Any]:
    every = {
        f"{name} under {strategy}": partial(run, name)
        for strategy, run in STRATEGIES.items()
        for name in ENCODERS
    }
    return {name: case for name, case in every.items() if (name in QUICK) is quick}


def limit_of(name: str, strategy: str) -> float:
    """DeepSpeed and bitsandbytes compute in fp32."""
    return 1e-5 if "ZeRO" in strategy or "nf4" in name else 1e-10
