"""Both sides of a case: encoders as a strategy wants them, and as one process has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed_cases import engine_for
from property_cases import Case, Input
from property_models import FEATURES, Body, Encoder, OneForAll, Pairs, encoder_with_trunk
from property_nests import Rows, build, float_tensors
from strategy_wraps import each_in_ddp, each_sharded
from torch import Tensor, nn

from gradcache_clip import ByLength, GradCache
from gradcache_clip.distributed import (
    AllReduceStrategy,
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    LocalStrategy,
)


class Side(nn.Module):
    """Encoders, a head and a loss; all parameters of a step by the same names on both sides."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(case.seed)
        bodies = [_body(case, each.frozen) for each in case.inputs[: 1 if case.tied else None]]
        nests = [each.nest for each in case.inputs]
        if case.encoders == "one":
            encoders: list[nn.Module] = [OneForAll(nests, bodies)]
        else:
            made = encoder_with_trunk if case.encoders == "trunks" else Encoder
            encoders = [made(*pair) for pair in zip(nests, bodies, strict=False)]
        self.encoders = nn.ModuleList(encoders)
        self.head = nn.Linear(FEATURES, FEATURES) if case.head == "module" else None

    def of_inputs(self, case: Case) -> list[nn.Module]:
        return list(self.encoders) * (len(case.inputs) if len(self.encoders) == 1 else 1)


def _body(case: Case, frozen: str) -> Body:
    if case.deepspeed and frozen in ("base", "all"):
        # ZeRO cannot step without any gradient.
        frozen = "branches"
    parts = 1 if case.head == "module" else case.parts
    return Body(always=case.always, noise=case.noise, frozen=frozen, parts=parts)


def get_features(case: Case, side: Side) -> Any:
    return {"no": None, "function": _as_it_is, "module": side.head}[case.head]


def _as_it_is(output: Any) -> Any:
    return output


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class Ours:
    """The cached steps."""

    def __init__(self, case: Case, side: Side, *, checks: bool) -> None:
        self.case, self.side, self.loss = case, side, Pairs(gathers=True)
        self.loss.to(torch.float32 if case.deepspeed else torch.float64)
        self.engine: Any = None
        encoders, strategy = self._wrapped()
        self.cache = GradCache(
            encoders,
            self.loss,
            strategy=strategy,
            chunk_size=[each.chunk for each in case.inputs],
            embed_chunk_size=self._embed_sizes(),
            sort_by_length=[_sorting(each) for each in case.inputs],
            get_features=get_features(case, side),
            memory_budget=case.budget,
            gradient_hooks="error" if case.hooks != "once" else "once",
            check_replay="error" if checks else "off",
            check_rows="error" if checks else "off",
        )

    def _embed_sizes(self) -> list[int] | None:
        if all(each.embed is None for each in self.case.inputs):
            return None
        return [(each.embed or 1) * each.chunk for each in self.case.inputs]

    def _wrapped(self) -> tuple[Any, LocalStrategy]:
        case, encoders = self.case, self.side.of_inputs(self.case)
        if case.deepspeed:
            module, rows = self.side.encoders[0], {"train_micro_batch_size_per_gpu": case.rows}
            self.engine = engine_for(module, int(case.engine[-1]), **rows)
            engines = self.engine if case.encoders == "one" else [self.engine] * len(encoders)
            return engines, DeepSpeedStrategy(self.engine)
        wrap, strategy = _ENGINES[case.engine]
        wrapped = wrap(encoders)
        return (wrapped[0] if case.encoders == "one" else wrapped), strategy()

    def step(self, inputs: Sequence[Any]) -> None:
        self.cache(*inputs, loss_kwargs={"shift": self.case.seed % 3})


_ENGINES: dict[str, tuple[Callable[[list[nn.Module]], Any], Callable[[], LocalStrategy]]] = {
    "Local": (list, LocalStrategy),
    "AllReduce": (list, AllReduceStrategy),
    "DDP": (each_in_ddp, DDPStrategy),
    "DDP views": (partial(each_in_ddp, gradient_as_bucket_view=True), DDPStrategy),
    "DDP finds": (partial(each_in_ddp, find_unused_parameters=True), DDPStrategy),
    "FSDP": (each_sharded, FSDPStrategy),
    "FSDP gathered": (each_sharded, partial(FSDPStrategy, keep_gathered=True)),
}


def _sorting(given: Input) -> ByLength | None:
    columns = ["attention_mask", "input_ids"] if given.names_columns else None
    return None if given.sort is None else ByLength(given.sort or None, columns=columns)


def one_shot(case: Case, side: Side, loss: nn.Module, inputs: Sequence[Any]) -> None:
    """All rows of all ranks through each encoder once."""
    features = []
    for index, (encoder, given) in enumerate(zip(side.of_inputs(case), inputs, strict=True)):
        output = encoder(index, given) if case.encoders == "one" else _called(encoder, given)
        extract = get_features(case, side)
        features.append(output if extract is None else extract(output))
    loss(*features, shift=case.seed % 3).backward()


def _called(encoder: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return encoder(**inputs)
    return encoder(*inputs) if isinstance(inputs, tuple) else encoder(inputs)


def batch(case: Case, step: int, *, everyone: bool) -> list[Any]:
    """The inputs of a step: those of this rank, or of all without `Shared`."""
    start = 0 if everyone else rank() * case.rows
    numbers = range(start, len(case.inputs[0].branches) if everyone else start + case.rows)
    built = []
    for tower, each in enumerate(case.inputs):
        # The second step uses the parameters in another order.
        branches = each.branches if step == 0 else each.branches[::-1]
        rows = Rows(100 * case.seed + step, numbers, branches, tower)
        built.append(build(each.nest, rows, shared=not everyone))
    if case.input_grads:
        for tensor in float_tensors(tuple(built)):
            tensor.requires_grad_()
    return built


def hook(case: Case, side: Side) -> bool:
    """Hooks of both kinds that would do something else on parts; whether there is one."""
    if case.hooks == "no":
        return False
    body = side.encoders[-1].bodies[0] if case.encoders == "one" else _body_of(side.encoders[0])
    first, second = body.base.weight, body.branches[0][0].bias
    if first.requires_grad:
        first.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    if second.requires_grad:
        second.register_post_accumulate_grad_hook(_squared)
    return first.requires_grad or second.requires_grad


def _body_of(encoder: nn.Module) -> Body:
    found = next(part for part in encoder.modules() if isinstance(part, Body))
    return found


def _squared(parameter: Tensor) -> None:
    gradient = parameter.grad
    assert gradient is not None
    gradient.mul_(gradient.abs())
