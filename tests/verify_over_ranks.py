"""What `verify` says over several ranks; each check runs on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from losses_over_ranks import CASES, WIDTH, Case, Place, whole_batch
from rank_processes import Check
from strategy_steps import OneModule, PlainClip, global_batch, rows_of, two_towers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradcache_clip import ClipLoss, GradCache, VerifyReport, verify
from gradcache_clip.distributed import (
    AllReduceStrategy,
    DDPStrategy,
    LocalStrategy,
    gather_rows,
    strategy_all_reduce,
)
from gradcache_clip.verification.loss import WRONG_LOSS
from gradcache_clip.verification.report import DIFFERS, EXACT, ROUNDING

OURS = (
    *("clip labels and ids", "info_nce margin both ways", "nt_xent debiased", "siglip"),
    *("late_interaction masks", "matryoshka info_nce margin"),
)


def report_of(
    loss: Any,
    strategy: LocalStrategy | None = None,
    *,
    wrap: Callable[[list[nn.Module]], Any] = list,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> VerifyReport:
    encoders = wrap([encoder.to(dtype) for encoder in two_towers()])
    if isinstance(loss, nn.Module):
        loss = loss.to(dtype)
    cache = GradCache(encoders, loss, strategy=strategy or AllReduceStrategy(), **options)
    return verify(cache, *(x.to(dtype) for x in rows_of(dist.get_rank(), global_batch(0))))


def clip(q: Tensor, k: Tensor) -> Tensor:
    """Over the rows it is given."""
    q, k = F.normalize(q), F.normalize(k)
    return F.cross_entropy(7 * q @ k.T, torch.arange(len(q)))


def gathered(q: Tensor, k: Tensor) -> Tensor:
    return clip(gather_rows(q), gather_rows(k))


def averaged_value(q: Tensor, k: Tensor) -> Tensor:
    """Local negatives, and a value that hides it."""
    loss = clip(q, k)
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return loss + (mean / dist.get_world_size() - loss).detach()


def summing_backward(q: Tensor, k: Tensor) -> Tensor:
    return clip(torch.cat(dist_nn.all_gather(q)), torch.cat(dist_nn.all_gather(k)))


def keys_without_gradient(q: Tensor, k: Tensor) -> Tensor:
    keys = [torch.empty_like(k) for _ in range(dist.get_world_size())]
    dist.all_gather(keys, k.detach())
    return clip(gather_rows(q), torch.cat(keys))


def detached_weights(q: Tensor, k: Tensor) -> Tensor:
    q, k = gather_rows(q), gather_rows(k)
    logits = q @ k.T
    hardness = logits.detach().sigmoid()
    return -((hardness * logits.log_softmax(1)).diag()).mean()


class OwnScale(nn.Module):
    """The value of the global loss; each rank gives the scale the gradient of its own rows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        own = self.scale * (q * k).sum().detach()
        return gathered(q, k) + own - own.detach()


def in_ddp(encoders: list[nn.Module]) -> list[nn.Module]:
    return [DistributedDataParallel(encoder) for encoder in encoders]


def right(loss: Any, **options: Any) -> None:
    report = report_of(loss, **options)
    assert report.exact, str(report)
    assert report.reasons == report.notes == [] and report.summed_over == 1
    assert {row.verdict for row in report.rows} <= {EXACT, ROUNDING}


def right_of_ours(case: Case) -> None:
    """Jumps at a margin are not taken for mistakes."""
    given = Place.in_group(None).share(whole_batch(case, dist.get_world_size(), torch.float32))
    features = {name: x for name, x in given.items() if x.is_floating_point()}
    loss = case.build(group=None)

    def named(*embedded: Tensor, **others: Tensor) -> Any:
        return loss(**dict(zip(features, embedded, strict=True)), **others)

    torch.manual_seed(0)
    encoders = [nn.Linear(WIDTH, WIDTH) for _ in features]
    for encoder in encoders:
        nn.init.eye_(encoder.weight)
    others = {name: x for name, x in given.items() if name not in features}
    cache = GradCache(encoders, named, strategy=AllReduceStrategy())
    report = verify(cache, *features.values(), loss_kwargs=others)
    assert report.exact and report.reasons == report.notes == [], str(report)


def wrong(loss: Any, said: str, headline: str = WRONG_LOSS, **options: Any) -> None:
    report = report_of(loss, **options)
    assert not report.exact and said in report.reasons[0], str(report)
    assert report.headline.startswith(f"not exact: {headline}"), report.headline


def noted(loss: Any, said: str) -> None:
    report = report_of(loss)
    assert report.exact and report.reasons == [], str(report)
    (note,) = report.notes
    assert said in note and f"- {note}" in str(report), note


def no_strategy() -> None:
    with pytest.raises(ValueError, match=r"strategy: .*AllReduceStrategy\(\)"):
        report_of(gathered, LocalStrategy())


def reduced_by_hand() -> None:
    report = report_of(ClipLoss(), LocalStrategy(reduce_myself=True))
    assert report.exact and report.reasons == [] and report.summed_over == dist.get_world_size()
    assert "sum it over the processes, do not average" in report.headline


def a_scale_that_would_be_summed_twice() -> None:
    """It is a parameter of the encoder, and complete on every rank."""
    loss, module = PlainClip(), OneModule(two_towers(), torch.tensor(2.0)).double()

    def over_ranks(q: Tensor, k: Tensor) -> Tensor:
        loss.log_logit_scale = module.log_logit_scale
        return loss(gather_rows(q), gather_rows(k))

    for strategy in (AllReduceStrategy(), LocalStrategy(reduce_myself=True)):
        cache = GradCache(module, over_ranks, strategy=strategy)
        report = verify(cache, *rows_of(dist.get_rank(), global_batch(0)))
        wrong_rows = [row.name for row in report.rows if row.verdict == DIFFERS]
        assert wrong_rows == ["log_logit_scale"] * strategy.reduce_myself, str(report)


def weights_that_differ() -> None:
    encoders = [encoder.double() for encoder in two_towers()]
    with torch.no_grad():
        next(encoders[0].parameters()).add_(dist.get_rank())
    cache = GradCache(encoders, gathered, strategy=LocalStrategy(reduce_myself=True))
    with pytest.raises(ValueError, match="expected the same weights on every rank"):
        verify(cache, *rows_of(dist.get_rank(), global_batch(0)))


def a_head_that_only_a_function_knows() -> None:
    torch.manual_seed(3)
    head = nn.Linear(8, 8).double()
    said = "expected a parameter of a module, got one that only a function knows"
    heads = [lambda x: head(x), None]
    wrong(gathered, said, "2 of 16 gradients differ", get_features=heads)


def a_strategy_that_reduces_wrongly() -> None:
    """The plain step is summed by verify itself, so both cannot be wrong alike."""
    average = strategy_all_reduce._average

    def twice(bucket: Any) -> None:
        average(bucket)
        for parameter in bucket:
            parameter.grad.mul_(2)

    with mock.patch.object(strategy_all_reduce, "_average", twice):
        report = report_of(gathered)
    assert not report.exact and {row.verdict for row in report.rows} == {DIFFERS}


def inputs_with_gradients() -> None:
    """Those of a rank's own rows; nobody sums them."""
    encoders, strategy = two_towers(), LocalStrategy(reduce_myself=True)
    cache = GradCache([e.double() for e in encoders], ClipLoss().double(), strategy=strategy)
    images, texts = rows_of(dist.get_rank(), global_batch(0))
    report = verify(cache, images.requires_grad_(), texts)
    assert report.exact and "input 0" in {row.name for row in report.rows}, str(report)


def a_nan_on_one_rank() -> None:
    images, texts = rows_of(dist.get_rank(), global_batch(0))
    if dist.get_rank() == 1:
        images[0] = float("nan")
    cache = GradCache(
        [encoder.double() for encoder in two_towers()], gathered, strategy=AllReduceStrategy()
    )
    with pytest.raises(ValueError, match="expected a finite gradient of the one-shot step"):
        verify(cache, images, texts)


def a_hook_that_steps() -> None:
    encoders, loss = [encoder.double() for encoder in two_towers()], ClipLoss().double()
    weights = [p for module in (*encoders, loss) for p in module.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    before = [weight.detach().clone() for weight in weights]
    for strategy in (AllReduceStrategy(), LocalStrategy(reduce_myself=True)):
        mode = "every_chunk" if strategy.reduce_myself else "once"
        cache = GradCache(encoders, loss, strategy=strategy, gradient_hooks=mode)
        report = verify(cache, *rows_of(dist.get_rank(), global_batch(0)))
        assert all(map(torch.equal, weights, before)) and not optimizer.state
        assert report.exact != strategy.reduce_myself, str(report)


def hooks_on_the_sum() -> None:
    """Not on what a rank contributes to it."""
    for mode in ("once", "every_chunk"):
        encoders = [encoder.double() for encoder in two_towers()]
        bias = encoders[0][0].bias
        bias.register_hook(lambda gradient: gradient / gradient.norm())
        strategy = AllReduceStrategy()
        cache = GradCache(encoders, gathered, strategy=strategy, gradient_hooks=mode)
        report = verify(cache, *rows_of(dist.get_rank(), global_batch(0)))
        differs = [row.name for row in report.rows if row.verdict == DIFFERS]
        assert differs == ["encoder 0: 0.bias"] * (mode == "every_chunk"), str(report)


def suite() -> Iterator[tuple[str, Check]]:
    twice = f"the gradient is {dist.get_world_size()} times too large"
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        yield f"right, {dtype}", partial(right, ClipLoss(), dtype=dtype)
        yield f"summing backward, {dtype}", partial(wrong, summing_backward, twice, dtype=dtype)
    for case in CASES:
        if case.name in OURS:
            yield case.name, partial(right_of_ours, case)
    yield "gather_rows", partial(right, gathered)
    yield "DDP", partial(right, ClipLoss(), strategy=DDPStrategy(), wrap=in_ddp)
    yield "local loss", partial(wrong, clip, "loss: expected the same value on every rank")
    yield "averaged value", partial(wrong, averaged_value, twice)
    yield "own scale", partial(wrong, OwnScale(), "loss: scale: expected the same gradient")
    yield "keys without gradient", partial(noted, keys_without_gradient, "its gradient predicts")
    yield "detached weights", partial(noted, detached_weights, "right where it detaches features")
    for check in (
        no_strategy,
        reduced_by_hand,
        a_scale_that_would_be_summed_twice,
        weights_that_differ,
        a_head_that_only_a_function_knows,
        a_strategy_that_reduces_wrongly,
        a_nan_on_one_rank,
        inputs_with_gradients,
        a_hook_that_steps,
        hooks_on_the_sum,
    ):
        yield check.__name__, check
