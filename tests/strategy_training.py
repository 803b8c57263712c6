"""Clipping, steps and state of strategies, beside one process in 64 bits; runs on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import strategy_steps as steps
import torch
import torch.distributed as dist
from deepspeed_cases import LR, both_towers, engine_for
from strategy_steps import OneModule, rows_of, two_towers
from strategy_wraps import as_they_are, each_in_ddp, each_sharded, one_in_ddp, one_root
from torch import Tensor, nn

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.distributed import (
    AllReduceStrategy,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    LocalStrategy,
)

MAX_NORM = 0.5
"""Less than the norm of every step."""
# One step each, from what the one before has saved.
TURNS: list[tuple[Callable[[], Any], Callable[[list[nn.Module]], Any]]] = [
    (DDPStrategy, each_in_ddp),
    (FSDPStrategy, each_sharded),
    (partial(FSDPStrategy, keep_gathered=True), one_root),
    (partial(LocalStrategy, reduce_myself=True), as_they_are),
    (DDPStrategy, one_in_ddp),
    (AllReduceStrategy, as_they_are),
]


def adamw(*modules: nn.Module) -> torch.optim.Optimizer:
    """Sharded parameters and plain ones in groups of their own."""
    return torch.optim.AdamW([{"params": module.parameters()} for module in modules], lr=0.01)


def of_rank_0(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def worst_of(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    errors = ((found[name] - expected[name]).norm() / expected[name].norm() for name in expected)
    return float(max(errors))


def in_turn() -> dict[str, Any]:
    truth = nn.ModuleList([OneModule(two_towers()), steps.PlainClip()]).double()
    optimizer, saved, errors = adamw(*truth), None, []
    for step, (strategy, wrap) in enumerate(TURNS):
        batch = steps.global_batch(step)
        steps.in_one_graph(truth[0].towers, truth[1], step, batch, 3)
        norm = nn.utils.clip_grad_norm_(truth.parameters(), MAX_NORM)
        assert norm > MAX_NORM
        optimizer.step()
        optimizer.zero_grad()
        found, saved = one_turn(strategy(), wrap, batch, saved)
        weights = worst_of(
            saved["encoder"] | saved["loss"], truth[0].state_dict() | truth[1].state_dict()
        )
        errors.append(max(float((found - norm).abs() / norm), weights))
    return {"errors": errors}


def one_turn(
    strategy: Any, wrap: Callable[[list[nn.Module]], Any], batch: list[Tensor], saved: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The norm of a step, and what is saved after it."""
    encoders, loss = wrap([module.double() for module in two_towers()]), ClipLoss().double()
    # Wrappers outside of all, and inside.
    both = (
        nn.ModuleDict({"towers": nn.ModuleList(encoders)})
        if isinstance(encoders, list)
        else encoders
    )
    modules, optimizer = [both, loss], adamw(both, loss)
    if saved is not None:
        strategy.load_weights(both, saved["encoder"])
        loss.load_state_dict(saved["loss"])
        strategy.load_state(optimizer, modules, saved["state"])
    GradCache(encoders, loss, strategy=strategy, chunk_size=3)(*rows_of(dist.get_rank(), batch))
    if type(strategy) is LocalStrategy:
        for parameter in both.parameters():
            dist.all_reduce(parameter.grad)
    norm = strategy.step(optimizer, modules, MAX_NORM)
    weights, state = strategy.weights(both), strategy.state(optimizer, modules)
    if isinstance(strategy, FSDPStrategy) and dist.get_rank() > 0:
        moments = [moment["exp_avg"] for name, moment in state["optimizer"].items() if "." in name]
        assert not any(value.numel() for value in [*weights.values(), *moments])
    parts = {"encoder": weights, "loss": loss.state_dict(), "state": state}
    return norm, of_rank_0(parts)


def under_deepspeed(stage: int) -> dict[str, Any]:
    """Two steps that DeepSpeed clips by the norm of its own gradients, the scale along with it."""
    engine, truth = engine_for(both_towers(), stage, gradient_clipping=MAX_NORM), both_towers()
    loss, true_loss = ClipLoss(), steps.PlainClip().double()
    optimizer = torch.optim.SGD(loss.parameters(), lr=LR)
    sgd = torch.optim.SGD([*truth.double().parameters(), *true_loss.parameters()], lr=LR)
    strategy = DeepSpeedStrategy(engine)
    cache, errors = GradCache(engine, loss, chunk_size=3, strategy=strategy), []
    with pytest.raises(ValueError, match=r"max_norm: expected 0.5, the gradient_clipping .* got 0"):
        strategy.step(optimizer, [engine, loss])
    with pytest.raises(ValueError, match="optimizer: expected one over the 1 trainable parameters"):
        strategy.step(None, [engine, loss], MAX_NORM)
    with pytest.raises(ValueError, match=r"clip: expected step\(\) under DeepSpeedStrategy"):
        strategy.clip([engine, loss], MAX_NORM)
    for step in range(2):
        batch = steps.global_batch(step)
        optimizer.zero_grad()
        cache(*(inputs.float() for inputs in rows_of(dist.get_rank(), batch)))
        norm = strategy.step(optimizer, [engine, loss], MAX_NORM)
        sgd.zero_grad()
        steps.in_one_graph(truth.towers, true_loss, step, batch, 3)
        inside = nn.utils.clip_grad_norm_(truth.parameters(), MAX_NORM)
        assert inside > MAX_NORM
        outside = true_loss.log_logit_scale.grad.clone()
        true_loss.log_logit_scale.grad *= MAX_NORM / (inside + 1e-6)
        sgd.step()
        weights = of_rank_0(strategy.weights(engine)) | loss.state_dict()
        expected = truth.state_dict() | true_loss.state_dict()
        whole = torch.hypot(inside, outside)
        errors += [float((norm - whole).abs() / whole), worst_of(weights, expected)]
    return {"errors": errors}


def with_its_own_scheduler() -> dict[str, Any]:
    """It sets the rate, which what is outside of the engine follows, and goes on where it was."""
    warm_up = {"warmup_max_lr": 0.5, "warmup_num_steps": 4, "warmup_type": "linear"}
    scheduler = {"scheduler": {"type": "WarmupLR", "params": warm_up}}
    loss, saved, rates = ClipLoss(), None, []
    for turn in range(2):
        engine = engine_for(both_towers(), 1, **scheduler)
        strategy, optimizer = DeepSpeedStrategy(engine), torch.optim.SGD(loss.parameters(), lr=1.0)
        if saved is not None:
            strategy.load_state(optimizer, [engine, loss], saved)
        cache = GradCache(engine, loss, chunk_size=3, strategy=strategy)
        batch = rows_of(dist.get_rank(), steps.global_batch(turn))
        optimizer.zero_grad()
        cache(*(inputs.float() for inputs in batch))
        strategy.step(optimizer, [engine, loss])
        strategy.set_learning_rate(optimizer, 7.0)
        rates.append(engine.optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[0]["lr"] == rates[-1]
        saved = strategy.state(optimizer, [engine, loss])
    assert rates == [0.0, 0.125]
    return {"errors": [0.0]}


def refused_when_sharded() -> dict[str, Any]:
    [encoder, _], loss = each_sharded(two_towers()), ClipLoss()
    modules, optimizer = [encoder, loss], adamw(encoder, loss)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="grad_scaler: expected none under FSDPStrategy"):
        FSDPStrategy(scaler).step(optimizer, modules)
    weights = {name: value.full_tensor() for name, value in encoder.state_dict().items()}
    weights["0.weight"] = torch.cat([weights["0.weight"]] * 2)
    with pytest.raises(ValueError, match=r"expected 0.weight of shape \(24, 6\), got \(48, 6\)"):
        FSDPStrategy().load_weights(encoder, weights)
    # Nothing has a gradient yet.
    assert FSDPStrategy().clip(modules, 1.0) == 0
    return {}


def training_cases() -> dict[str, Any]:
    return {"strategies in turn": in_turn, "refused when sharded": refused_when_sharded}


def deepspeed_training() -> dict[str, Any]:
    cases = {f"ZeRO-{stage}: clipped": partial(under_deepspeed, stage) for stage in range(4)}
    return {**cases, "ZeRO-1: own scheduler": with_its_own_scheduler}
