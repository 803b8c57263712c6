"""Two steps of a case beside the one-shot step of one process, on this rank or on each."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import strategy_steps as steps
import torch
import torch.distributed as dist
from deepspeed_cases import LR, weights_of
from property_cases import Case, kinds_in
from property_models import Noise, Pairs
from property_nests import float_tensors
from property_sides import Ours, Side, batch, hook, one_shot, rank
from torch import Tensor, nn

from gradcache_clip.distributed import world_size

FP64, FP32 = 1e-10, 1e-4
OURS = (ValueError, TypeError, RuntimeError)


def run(case: Case, *, checks: bool = True) -> str:
    """ "exact", "refused: ..." or "wrong: ..."; with `checks` as a user meets the engine.

    Every rank must call this. What is neither is raised: an error that is none of ours.
    """
    dtype = torch.float32 if case.deepspeed else torch.float64
    side = Side(case).to(dtype)
    truth, true_loss = copy.deepcopy(side).double(), Pairs(gathers=False).double()
    try:
        ours = Ours(case, side, checks=checks)
    except OURS as error:
        return _refusal(case, error, unchanged=True)
    hooked = hook(case, side)
    hook(case, truth)
    compare = _zero_step if case.deepspeed else _step
    steps_of = partial(compare, case, ours, truth, true_loss)
    states = _optimizers(ours, truth, true_loss)
    for step in range(2):
        if (outcome := steps_of(step, states)) != "exact":
            return outcome
    return _wrong(case, hooked) or "exact"


def _wrong(case: Case, hooked: bool) -> str:
    """Where a step should have been refused."""
    if case.hooks == "error" and hooked:
        return "wrong: hooks on gradients were not refused"
    if case.head == "module" and case.engine not in ("Local", "AllReduce"):
        return "wrong: a head that nobody reduces was not refused"
    return ""


def _optimizers(ours: Ours, truth: Side, true_loss: nn.Module) -> list[torch.optim.Optimizer]:
    """Weight decay tells a gradient of zero from none."""
    sides = nn.ModuleList([ours.side, ours.loss]), nn.ModuleList([truth, true_loss])
    return [
        torch.optim.SGD(side.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) for side in sides
    ]


def _step(
    case: Case,
    ours: Ours,
    truth: Side,
    true_loss: nn.Module,
    step: int,
    optimizers: Sequence[torch.optim.Optimizer],
) -> str:
    inputs, whole = batch(case, step, everyone=False), batch(case, step, everyone=True)
    if refusal := _refused(case, ours, inputs, step):
        return refusal
    _repeat_noise(ours.side, truth)
    one_shot(case, truth, true_loss, whole)
    found = _gradients(nn.ModuleList([ours.side, ours.loss]))
    expected = _gradients(nn.ModuleList([truth, true_loss]))
    if case.input_grads:
        for place, pair in enumerate(zip(*map(_flat, (inputs, whole)), strict=True)):
            found[f"input {place}"], expected[f"input {place}"] = (x.grad for x in pair)
    for optimizer in optimizers:
        optimizer.step()
        if not case.keep:
            optimizer.zero_grad()
    return _compared(found, expected, FP64, step)


def _flat(inputs: Sequence[Any]) -> list[Tensor]:
    return float_tensors(tuple(inputs))


def _zero_step(
    case: Case, ours: Ours, truth: Side, true_loss: nn.Module, step: int, _: object
) -> str:
    """Gradients are what plain SGD makes of them, for the engine keeps them to itself."""
    stage = int(case.engine[-1])
    before = weights_of(ours.engine, stage, "fp32")
    truth.encoders[0].load_state_dict(before, strict=False)
    inputs, whole = batch(case, step, everyone=False), batch(case, step, everyone=True)
    if refusal := _refused(case, ours, inputs, step):
        return refusal
    ours.engine.step()
    after = weights_of(ours.engine, stage, "fp32")
    _repeat_noise(ours.side, truth)
    truth.zero_grad()
    true_loss.zero_grad()
    one_shot(case, truth, true_loss, whole)
    found: dict[str, Tensor | None] = {n: (before[n] - after[n]) / LR for n in before}
    expected = {n: truth.encoders[0].get_parameter(n).grad for n in before}
    expected = {n: torch.zeros_like(found[n]) if g is None else g for n, g in expected.items()}
    found["scale"], expected["scale"] = ours.loss.log_scale.grad, true_loss.log_scale.grad
    ours.loss.zero_grad()
    return _compared(found, expected, FP32, step)


def _gradients(side: nn.Module) -> dict[str, Tensor | None]:
    """By name, in full; sharded ones are gathered, so every rank must call this."""
    return {
        name: None if p.grad is None else steps.full(p.grad).clone()
        for name, p in side.named_parameters()
    }


def _compared(
    found: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    tolerance: float,
    step: int,
) -> str:
    """The same verdict on every rank."""
    sizes = [float(gradient.norm()) for gradient in expected.values() if gradient is not None]
    # A weight in 32 bits knows its last change only so well.
    floor = max(1e-2, 1e-2 * max(sizes)) if tolerance > FP64 else 1e-4 * max(sizes)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    wrong = [
        f"{name}: {error:.1e}"
        for name in found
        if not (error := _error(found[name], expected[name], floor)) <= tolerance
    ]
    wrong = next(filter(None, _everywhere(wrong)), [])
    return f"wrong: step {step}: {', '.join(wrong[:4])}" if wrong else "exact"


def _error(found: Tensor | None, expected: Tensor | None, floor: float) -> float:
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    return float((found.double() - expected).norm() / max(float(expected.norm()), floor))


def _repeat_noise(side: Side, truth: Side) -> None:
    """One graph over all rows drops what the ranks dropped in the embed of each row."""
    noises = [[m for m in each.modules() if isinstance(m, Noise)] for each in (side, truth)]
    for mine, theirs in zip(*noises, strict=True):
        theirs.given = {}
        for drawn in _everywhere(mine.drawn):
            theirs.given |= drawn
        mine.drawn = {}


def _everywhere(value: Any) -> list[Any]:
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _refused(case: Case, ours: Ours, inputs: Sequence[Any], step: int) -> str:
    """Take a cached step; empty if that went well, on every rank."""
    parameters = [*ours.side.parameters(), *ours.loss.parameters()]
    # Drawn alike and not, so that ranks differ.
    torch.manual_seed(1000 * step + rank())
    before = [None if p.grad is None else _local(p.grad).clone() for p in parameters]
    try:
        ours.step(inputs)
    except OURS as error:
        after = [p.grad for p in parameters]
        same = all(
            (a is None) == (b is None) and (b is None or torch.equal(_local(a), b))
            for a, b in zip(after, before, strict=True)
        )
        return _refusal(case, error, unchanged=same)
    if any(_everywhere("")):
        return "wrong: an error on another rank alone"
    return ""


def _local(gradient: Any) -> Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _refusal(case: Case, error: Exception, *, unchanged: bool) -> str:
    """An error that this case may end in, on every rank; others are raised."""
    message = str(error)
    if not any(re.search(pattern, message, re.DOTALL) for pattern in expected_errors(case)):
        raise error
    if not all(_everywhere(message)):
        return "wrong: an error on some ranks alone"
    return f"refused: {message}" if unchanged else f"wrong: .grad changed before {message}"


def expected_errors(case: Case) -> Iterator[str]:
    """Patterns of what this case may be refused with."""
    kinds = {kind for each in case.inputs for kind in kinds_in(each.nest)}
    sorts = [each.sort for each in case.inputs if each.sort is not None]
    waits = case.world > 1 and case.engine in ("FSDP", "ZeRO-2", "ZeRO-3")
    if kinds & {"tuple", "named"}:
        yield "expected a list(, one sample an element| of strings), got a tuple.*pass list"
    if sorts:
        yield "expected rows whose length is known.*got.*pass ByLength"
        if "tokens and columns" in kinds:
            yield "expected one value wherever attention_mask is zero.*got.*pass ByLength"
    if case.hooks != "no":
        yield "expected parameters without hooks.*got.*pass gradient_hooks"
    if case.head == "module":
        yield "get_features: expected no trainable parameters.*got.*make the head a part"
    if case.engine == "DDP finds":
        yield "expected DistributedDataParallel without find_unused_parameters, got.*leave it out"
    if waits and not (case.always and case.noise != "branch"):
        yield "expected every rank to run the same modules.*got.*take"
    waits_or_gathers = waits or (case.world > 1 and case.engine == "FSDP gathered")
    if waits_or_gathers and (any(sorts) or case.noise == "branch"):
        yield "expected as many chunks on every rank, got.*give each as many rows"
