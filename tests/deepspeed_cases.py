"""Cases for DeepSpeedStrategy, under ZeRO 0 to 3; each runs on every rank."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from itertools import chain
from typing import Any
from unittest import mock

import pytest
import strategy_steps as steps
import torch
import torch.distributed as dist
from packaging.version import Version
from strategy_steps import ROWS, WIDTHS, OneModule, rows_of, two_towers
from strategy_wraps import REDUCE, Counted
from torch import Tensor, nn

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.cache.checks import loss_in
from gradcache_clip.distributed import DeepSpeedStrategy, gather_rows
from gradcache_clip.ops import clip_loss

DEEPSPEED = importlib.util.find_spec("deepspeed")
NEEDS_DEEPSPEED = pytest.mark.skipif(
    DEEPSPEED is None,
    reason="needs DeepSpeed: pip install 'gradcache-clip[deepspeed]'",
)
# Earlier releases are refused under two settings; see `lost_reductions`.
REDUCES_ALL = bool(DEEPSPEED) and Version(version("deepspeed")) >= Version("0.19.8")
LR = 0.1
# What is scaled in fp16 is tried with gradients of features that would otherwise vanish there.
TINY = 1e-5
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 14.2857


def _yes(_: Any) -> bool:
    return True


class Encoder(nn.Module):
    """One for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = steps.tower(6)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def both_towers(dropout: float = 0.0) -> nn.Module:
    return OneModule(two_towers(dropout))


def frozen_text() -> nn.Module:
    return OneModule(steps.with_frozen_text())


def with_scale() -> nn.Module:
    """DeepSpeed takes no parameter without a dimension."""
    return OneModule(two_towers(), torch.tensor([SCALE]).log())


def tied() -> nn.Module:
    torch.manual_seed(7)
    return Encoder()


def engine_for(model: nn.Module, stage: int, precision: str = "fp32", **settings: Any) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own optimizer for the host would have to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        # Only what is tiny stays gathered under ZeRO-3.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
        **settings,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32" if stage else "bf16"}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 16}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR / (TINY if precision == "fp16" else 1.0))
    # It would compile a collective for CPUs.
    with (
        mock.patch.object(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None),
        mock.patch("deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported", _yes),
    ):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def weights_of(engine: Any, stage: int, precision: str) -> dict[str, Tensor]:
    """The trained weights in full and in 32 bits."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    if stage == 0 and precision != "fp32":
        masters = chain(*engine.optimizer.fp32_groups)
        return {name: p.detach().double().clone() for name, p in zip(named, masters, strict=True)}
    full = (lambda p: p.detach()) if stage == 0 else safe_get_full_fp32_param
    return {name: full(p).double().clone() for name, p in named.items()}


def loss_that_reads(engine: Any) -> Callable[[Tensor, Tensor], Tensor]:
    import deepspeed

    def loss(q: Tensor, k: Tensor) -> Tensor:
        q, k = (gather_rows(nn.functional.normalize(x)) for x in (q, k))
        scale = engine.module.log_logit_scale
        with deepspeed.zero.GatheredParameters([scale]):
            return clip_loss(q, k, scale.float().exp().squeeze())

    return loss


def gradients_of(engine: Any) -> dict[str, Tensor]:
    """As they lie before `engine.step()`; scaled, in fp16."""
    from deepspeed.utils import safe_get_full_grad

    named = engine.module.named_parameters()
    return {name: safe_get_full_grad(p).double().clone() for name, p in named if p.requires_grad}


def three_steps(
    stage: int,
    build: Callable[[], nn.Module] = both_towers,
    precision: str = "fp32",
    *,
    chunk: int = 3,
    zero: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Gradients, and changes of weights under SGD, beside one process in 64 bits."""
    model, truth = build(), build().double()
    encoder = isinstance(model, Encoder)
    settings = {"zero_optimization": {"stage": stage, **zero}} if zero else {}
    engine = engine_for(model, stage, precision, **settings)
    inside, true_loss = hasattr(truth, "log_logit_scale"), steps.PlainClip().double()
    loss = loss_that_reads(engine) if inside else ClipLoss()
    of_cache = (
        (lambda *features: loss_in(loss(*features), "loss") * TINY) if precision == "fp16" else loss
    )
    if inside:
        true_loss.log_logit_scale = truth.log_logit_scale
    encoders = [engine, engine] if encoder else engine
    cache = GradCache(
        encoders, of_cache, chunk_size=chunk, strategy=DeepSpeedStrategy(engine), **options
    )
    worst: dict[str, tuple[str, float]] = {}
    for step in range(3):
        batch = steps.global_batch(step, (6, 6) if encoder else WIDTHS)
        steps.seed(step, dist.get_rank())
        before = weights_of(engine, stage, precision)
        with torch.no_grad():
            for name, weight in before.items():
                truth.get_parameter(name).copy_(weight)
        truth.zero_grad()
        true_loss.zero_grad()
        if not inside:
            loss.zero_grad()
        local = rows_of(dist.get_rank(), batch)
        out = cache(*(inputs.to(DTYPES[precision]) for inputs in local))
        found = {"gradient": gradients_of(engine)} if precision == "fp32" else {}
        engine.step()
        after = weights_of(engine, stage, precision)
        found["change"] = {name: (before[name] - after[name]) / LR for name in before}
        towers = [truth, truth] if encoder else truth.towers
        value = steps.in_one_graph(towers, true_loss, step, batch, chunk)
        expected = {n: p.grad for n, p in truth.named_parameters() if p.grad is not None}
        tiny = TINY if precision == "fp16" else 1.0
        found["loss"], of_loss = {"loss": out.loss.double() / tiny}, {"loss": value}
        if not inside:
            found["scale"] = {"scale": loss.log_logit_scale.grad.double() / tiny}
            of_loss["scale"] = true_loss.log_logit_scale.grad
        for what, values in found.items():
            error = _worst(values, of_loss if what in of_loss else expected)
            worst[what] = max(worst.get(what, ("", 0.0)), error, key=lambda pair: pair[1])
    return {what: error for what, (_, error) in worst.items()} | {
        "parameter": worst["gradient" if precision == "fp32" else "change"][0]
    }


def _worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, float]:
    assert found.keys() <= expected.keys() | {"scale"}, found.keys() ^ expected.keys()
    errors = {
        name: float((value - expected[name]).norm() / expected[name].norm())
        for name, value in found.items()
    }
    return max(errors.items(), key=lambda pair: pair[1])


def ten_steps(stage: int) -> dict[str, Any]:
    """How far ten steps move each weight, beside one process that goes its own way in 64 bits."""
    start, truth = both_towers(), both_towers().double()
    loss, true_loss = ClipLoss(), steps.PlainClip().double()
    engine = engine_for(both_towers(), stage)
    cache = GradCache(engine, loss, chunk_size=3, strategy=DeepSpeedStrategy(engine))
    sgd = torch.optim.SGD(truth.parameters(), lr=LR)
    losses = []
    for step in range(10):
        batch = steps.global_batch(step)
        out = cache(*(inputs.float() for inputs in rows_of(dist.get_rank(), batch)))
        engine.step()
        value = steps.in_one_graph(truth.towers, true_loss, step, batch, 3)
        sgd.step()
        sgd.zero_grad()
        losses.append(float((out.loss.double() - value).abs() / value))
    weights = weights_of(engine, stage, "fp32")
    moved = {n: w - start.get_parameter(n).detach().double() for n, w in weights.items()}
    expected = {n: p.detach() - start.get_parameter(n) for n, p in truth.named_parameters()}
    name, error = _worst(moved, expected)
    return {"change": error, "parameter": name, "loss": max(losses)}


def float_cache(engine: Any, **options: Any) -> GradCache:
    options = {"chunk_size": 3, "strategy": DeepSpeedStrategy(engine), **options}
    return GradCache(engine, ClipLoss(), **options)


def local_floats(step: int = 0) -> list[Tensor]:
    return [inputs.float() for inputs in rows_of(dist.get_rank(), steps.global_batch(step))]


def reductions(stage: int) -> dict[str, Any]:
    """All-reduces of gradients in one step with four replays of each tower, two of them joint."""
    engine = engine_for(both_towers(), stage)
    cache = float_cache(engine)
    with Counted(REDUCE) as counted:
        cache(*local_floats())
    engine.step()
    return {"reductions": counted.calls}


# What a quick run takes of the cases below.
QUICK = (
    *("two towers", "one chunk", "graphs kept", "scale inside", "reductions"),
    *("ZeRO-1: bf16", "ZeRO-2: offload", "tied, bf16, overlap"),
)


def deepspeed_cases(world: int) -> dict[str, Any]:
    if world > 2:
        return {f"ZeRO-{stage}: ten steps": partial(ten_steps, stage) for stage in range(4)}
    cases: dict[str, Any] = {}
    for stage in range(4):
        case = partial(three_steps, stage)
        cases[f"ZeRO-{stage}: two towers"] = case
        if world == 1:
            continue
        cases[f"ZeRO-{stage}: tied"] = partial(case, tied)
        cases[f"ZeRO-{stage}: frozen text"] = partial(case, frozen_text)
        cases[f"ZeRO-{stage}: scale in the engine"] = partial(case, with_scale)
        cases[f"ZeRO-{stage}: dropout"] = partial(case, partial(both_towers, 0.3))
        cases[f"ZeRO-{stage}: one chunk"] = partial(case, chunk=100)
        cases[f"ZeRO-{stage}: graphs kept"] = partial(case, chunk=1, memory_budget=10**9)
        cases[f"ZeRO-{stage}: bf16"] = partial(case, with_scale, "bf16")
        if stage:
            cases[f"ZeRO-{stage}: fp16"] = partial(case, precision="fp16")
            cases[f"ZeRO-{stage}: fp16, scale inside"] = partial(case, with_scale, "fp16")
        if stage < 3:
            cases[f"ZeRO-{stage}: reductions"] = partial(reductions, stage)
    cases["ZeRO-3: scale after two chunks"] = partial(three_steps, 3, with_scale, chunk=5)
    for stage in (1, 2):
        case, overlap = partial(three_steps, stage), {"overlap_comm": True}
        cases[f"ZeRO-{stage}: overlap"] = partial(case, with_scale, zero=overlap)
        cases[f"ZeRO-{stage}: offload"] = partial(case, zero=OFFLOAD)
        if stage == 2 or REDUCES_ALL:
            cases[f"ZeRO-{stage}: bf16, offload"] = partial(case, with_scale, "bf16", zero=OFFLOAD)
        if REDUCES_ALL:
            cases[f"ZeRO-{stage}: in pieces"] = partial(case, zero={"contiguous_gradients": False})
        cases[f"ZeRO-{stage}: bf16, scale outside"] = partial(case, precision="bf16")
        cases[f"ZeRO-{stage}: tied, bf16, overlap"] = partial(case, tied, "bf16", zero=overlap)
    return cases
