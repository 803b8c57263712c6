"""Losses that encoders return beside their features, and losses in parts."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from auxiliary_models import (
    ROWS,
    WEIGHT,
    Balanced,
    Contrast,
    WithRouter,
    batch,
    one_shot,
    two_encoders,
)
from one_shot import gradient_errors, twins, worst
from torch import Tensor, nn

from gradcache_clip import (
    AuxiliaryOutput,
    ByLength,
    GradCache,
    ReplayMismatchError,
    deferred_step,
    verify,
)
from gradcache_clip.cache import auxiliary
from gradcache_clip.distributed import LocalStrategy
from gradcache_clip.memory import count_cached_step, count_plain_step

LOSSES = {"router": WEIGHT}


def cached(modules: list[nn.Module], **options: Any) -> GradCache:
    options = {"chunk_size": 4, "auxiliary_losses": LOSSES, **options}
    return GradCache(modules[:2], modules[2], **options)


def triple(*args: Any, **options: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    return twins(*two_encoders(*args, **options), Contrast().double())


def error(ours: list[nn.Module], truth: list[nn.Module]) -> float:
    return worst(gradient_errors(ours, truth))[1]


SETTINGS = {
    "chunks of unequal size": {},
    "one for each": {"chunk_size": (3, 22)},
    "all graphs kept": {"memory_budget": 10**9},
    "some graphs kept": {"memory_budget": 6000},
    "embedded together": {"embed_chunk_size": 8},
    "halved": {"chunk_size": 100},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_a_mean_over_rows_is_exact(options):
    ours, truth = triple()
    out = cached(ours, **options)(*batch())
    expected = one_shot(truth[:2], truth[2], batch())
    assert isinstance(out, AuxiliaryOutput) and not out.loss.requires_grad
    assert abs(out.loss - expected) < 1e-12
    assert error(ours, truth) < 1e-10


def test_chunks_are_not_weighted_alike(monkeypatch: pytest.MonkeyPatch):
    """The mutation that the tests above catch: chunks of 4, 4, ... and 2 rows count as one each."""

    def by_number(loss: Tensor | None, like: Tensor) -> Tensor:
        chunks = torch.stack([part.mean() for part in loss.split(4)])
        return torch.stack([chunks.sum(), *loss.new_tensor([len(chunks), 1])])

    monkeypatch.setattr(auxiliary, "_sum_and_rows", by_number)
    ours, truth = triple()
    cached(ours)(*batch())
    one_shot(truth[:2], truth[2], batch())
    assert error(ours, truth) > 1e-3


def test_parts_come_back_detached_for_the_log():
    ours, truth = triple()
    out = cached(ours)(*batch())
    routers = [encoder(x)["router"] for encoder, x in zip(truth[:2], batch(), strict=True)]
    assert abs(out.auxiliary["router"] - sum(routers)) < 1e-12
    assert abs(out.output["loss"] + WEIGHT * sum(routers) - out.loss) < 1e-12
    assert 0 <= out.output["accuracy"] <= 1
    parts = [out.loss, *out.auxiliary.values(), *out.output.values()]
    assert not any(part.requires_grad for part in parts)
    with pytest.raises(RuntimeError, match="expected no backward"):
        out.loss.backward()


def test_a_weight_of_zero_is_for_the_log_alone():
    ours, truth = triple()
    out = cached(ours, auxiliary_losses={"router": 0.0})(*batch())
    assert out.auxiliary["router"] > 0 and float(out.loss) == float(out.output["loss"])
    sides = [encoder(x) for encoder, x in zip(truth[:2], batch(), strict=True)]
    (truth[2](*sides)["loss"] + 0 * (sides[0]["router"] + sides[1]["router"])).backward()
    assert error(ours, truth) < 1e-10


def test_dropout_repeats_its_draws():
    ours, truth = triple(dropout=0.4)
    torch.manual_seed(11)
    out = cached(ours)(*batch())
    torch.manual_seed(11)
    expected = one_shot(truth[:2], truth[2], batch(), chunk=4)
    assert abs(out.loss - expected) < 1e-12 and error(ours, truth) < 1e-10


def test_rows_sorted_by_length():
    """Chunks hold rows from all over the batch."""

    class Lengths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = WithRouter(6)

        def forward(self, rows: list[Tensor]) -> dict[str, Tensor]:
            return self.inner(torch.stack([row.reshape(-1, 6).mean(0) for row in rows]))

    encoders = [Lengths().double(), two_encoders()[1]]
    ours, truth = twins(*encoders, Contrast().double())
    lengths = torch.randint(1, 5, (ROWS,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [torch.randn(6 * n, dtype=torch.float64) for n in lengths]
    out = cached(ours, sort_by_length=[ByLength(), None])(rows, batch()[1])
    sides = [truth[0](rows), truth[1](batch()[1])]
    loss = truth[2](*sides)["loss"] + WEIGHT * (sides[0]["router"] + sides[1]["router"])
    loss.backward()
    assert abs(out.loss - loss) < 1e-12 and error(ours, truth) < 1e-10


def test_deferred_step():
    ours, truth = triple()
    out = deferred_step(cached(ours), *batch())
    assert out.loss.requires_grad and out.output["loss"].requires_grad
    (3 * out.loss).backward()
    one_shot(truth[:2], truth[2], batch())
    for parameter in nn.ModuleList(truth).parameters():
        parameter.grad *= 3
    assert error(ours, truth) < 1e-10


def test_deferred_step_without_gradients():
    ours, truth = triple()
    with torch.no_grad():
        out = deferred_step(cached(ours), *batch())
    assert abs(out.loss - one_shot(truth[:2], truth[2], batch())) < 1e-12


def test_features_without_a_gradient_beside_a_loss_with_one():
    """The head is frozen and the loss of the features a constant: only the router trains."""
    ours, truth = triple()
    options = {"auxiliary_losses": LOSSES, "chunk_size": 4}
    GradCache(ours[:2], lambda *_: torch.zeros(()), **options)(*batch())
    total = sum(encoder(x)["router"] for encoder, x in zip(truth[:2], batch(), strict=True))
    (WEIGHT * total).backward()
    assert ours[0].head.weight.grad is None
    assert error(ours, truth) < 1e-10


class LossAlone(WithRouter):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"router": super().forward(x)["router"]}


def test_an_encoder_may_return_losses_alone():
    ours, truth = twins(two_encoders(LossAlone)[0])
    GradCache(ours, lambda given: torch.tensor(len(given)), chunk_size=4, auxiliary_losses=LOSSES)(
        batch()[0]
    )
    (WEIGHT * truth[0](batch()[0])["router"]).backward()
    assert error(ours, truth) < 1e-10


def test_a_frozen_encoder_counts_without_a_gradient():
    ours, truth = triple()
    for modules in (ours, truth):
        modules[1].requires_grad_(False)
    out = cached(ours)(*batch())
    assert abs(out.loss - one_shot(truth[:2], truth[2], batch())) < 1e-12
    assert error(ours, truth) < 1e-10


class Pair(nn.Module):
    def __init__(self, encoders: list[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, tower: int, x: Tensor) -> Any:
        return self.encoders[tower](x)


def test_one_module_for_all_inputs():
    ours, truth = triple()
    pair = Pair(ours[:2])
    GradCache(pair, ours[2], chunk_size=4, auxiliary_losses=LOSSES)(*batch())
    one_shot(truth[:2], truth[2], batch())
    assert error(ours, truth) < 1e-10


def test_a_loss_of_the_raw_output_beside_chosen_features():
    ours, truth = triple()

    def features(output: dict[str, Tensor]) -> Tensor:
        return output["embedding"]

    def loss(q: Tensor, k: Tensor) -> Any:
        return ours[2]({"embedding": q}, {"embedding": k})

    GradCache(ours[:2], loss, chunk_size=4, get_features=features, auxiliary_losses=LOSSES)(
        *batch()
    )
    one_shot(truth[:2], truth[2], batch())
    assert error(ours, truth) < 1e-10


def test_autocast_and_a_scaler():
    ours, truth = twins(*(module.float() for module in (*two_encoders(), Contrast())))
    inputs = [x.float() for x in batch()]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", torch.bfloat16):
        cached(ours, strategy=LocalStrategy(scaler))(*inputs)
        sides = [encoder(x) for encoder, x in zip(truth[:2], inputs, strict=True)]
        total = truth[2](*sides)["loss"] + WEIGHT * (sides[0]["router"] + sides[1]["router"])
    total.backward()
    for parameter in nn.ModuleList(truth).parameters():
        parameter.grad *= 1024
    assert error(ours, truth) < 2e-2


class Decayed(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return {"embedding": super().forward(x), "router": self.weight.square().sum()}


def test_small_weights_of_16_bit_models_do_not_vanish():
    """A row's share of the gradient, 1e-3 / 65536, is less than 16 bits hold."""
    encoder, x = Decayed(6, 4).half(), torch.zeros(65536, 6).half()
    options = {"chunk_size": 16384, "auxiliary_losses": {"router": 1e-3}, "check_rows": "off"}
    GradCache([encoder], lambda given: 0 * given["embedding"].float().sum(), **options)(x)
    expected = 2e-3 * encoder.weight.detach().float()
    assert float((encoder.weight.grad.float() - expected).norm() / expected.norm()) < 1e-3


def test_a_step_starts_again_after_running_out_of_memory():
    ours, truth = triple()
    forward, sizes = WithRouter.forward, []

    def small(self: WithRouter, x: Tensor) -> Any:
        sizes.append(len(x))
        if len(x) > 5:
            raise torch.OutOfMemoryError("no room")
        return forward(self, x)

    with mock.patch.object(WithRouter, "forward", small), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cached(ours, chunk_size=10)(*batch())
    one_shot(truth[:2], truth[2], batch())
    assert max(sizes) == 10 and error(ours, truth) < 1e-10


def test_a_replay_with_another_auxiliary_loss_is_noticed():
    class Moves(WithRouter):
        calls = 0

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            Moves.calls += 1
            output = super().forward(x)
            return {**output, "router": output["router"] * Moves.calls}

    ours, _ = triple(Moves)
    with pytest.raises(ReplayMismatchError):
        cached(ours, check_rows="off")(*batch())


def test_a_product_over_the_batch_is_the_mean_of_the_chunks_and_says_so():
    ours, truth = triple(Balanced)
    with pytest.warns(UserWarning, match=r"loss 'router' is not a mean over rows.*its sums per"):
        out = cached(ours)(*batch())
    assert abs(out.loss - one_shot(truth[:2], truth[2], batch(), chunk=4)) < 1e-12
    assert error(ours, truth) < 1e-10


def test_a_mean_over_rows_raises_no_warning_and_chunks_of_one_row_neither():
    for chunk in (1, 4):
        cached(triple()[0], chunk_size=chunk)(*batch())


@pytest.mark.parametrize("kind", [WithRouter, Balanced])
def test_verify_reports_losses_that_depend_on_the_cut(kind):
    report = verify(cached(triple(kind)[0]), *batch())
    assert report.exact == (kind is WithRouter)
    said = [reason for reason in report.reasons if "'router' is not a mean over rows" in reason]
    assert len(said) == 2 * (kind is Balanced) == len(report.reasons)


def test_counted_steps():
    ours, _ = triple()
    given = ours[:2], ours[2], batch(), 64
    plain = count_plain_step(*given, auxiliary_losses=LOSSES)
    counted = count_cached_step(*given, 8, auxiliary_losses=LOSSES)
    assert 0 < counted.activation_bytes < plain.activation_bytes
    with pytest.raises(TypeError, match="expected a weight for every loss"):
        count_cached_step(*given, 8)


# Losses in parts


def test_a_dict_of_parts():
    ours, truth = triple()
    for encoder in (*ours[:2], *truth[:2]):
        encoder.forward = lambda x, e=encoder: {"embedding": e.head(e.layers(x))}
    out = GradCache(ours[:2], ours[2], chunk_size=4)(*batch())
    sides = [encoder(x) for encoder, x in zip(truth[:2], batch(), strict=True)]
    expected = truth[2](*sides)
    expected["loss"].backward()
    assert set(out) == {"loss", "accuracy"} and not out["loss"].requires_grad
    assert abs(out["loss"] - expected["loss"]) < 1e-12
    assert error(ours, truth) < 1e-10
    with pytest.raises(RuntimeError, match="expected no backward"):
        out["loss"].backward()


def parts(features: Tensor, power: int = 2) -> dict[str, Any]:
    total = features.pow(power).mean()
    return {"total": total, "logs": {"size": features.detach().abs().mean()}, "name": "power"}


def test_another_key_is_minimised():
    encoder = nn.Linear(6, 4).double()
    x = batch()[0]
    cache = GradCache([encoder], parts, chunk_size=4, loss_key="total")
    out = cache(x, loss_kwargs={"power": 4})
    mine = encoder.weight.grad.clone()
    assert out["name"] == "power" and not out["logs"]["size"].requires_grad
    for step in (
        deferred_step(cache, x, loss_kwargs={"power": 4})["total"],
        parts(encoder(x), 4)["total"],
    ):
        encoder.zero_grad()
        step.backward()
        torch.testing.assert_close(encoder.weight.grad, mine, rtol=1e-10, atol=0)
    assert verify(cache, x, loss_kwargs={"power": 4}).exact


def test_parts_without_the_key():
    cache = GradCache([nn.Linear(6, 4).double()], parts, chunk_size=4)
    with pytest.raises(TypeError, match=r"with 'loss', got dict with total, logs.*loss_key"):
        cache(batch()[0])
    with pytest.raises(TypeError, match="loss_key: expected the name of the part"):
        GradCache([nn.Linear(6, 4)], parts, loss_key=None)


def test_keywords_of_a_deferred_step_are_arguments_of_the_loss():
    cache = GradCache([nn.Linear(6, 4).double()], parts, chunk_size=4, loss_key="total")
    with pytest.raises(TypeError, match=r"^deferred_step\(.*loss_kwargs={'power': \.\.\.}"):
        deferred_step(cache, batch()[0], power=3)


# Wrong use


class Gives(nn.Module):
    def __init__(self, *outputs: Any) -> None:
        super().__init__()
        self.layer, self.outputs, self.calls = nn.Linear(6, 4).double(), outputs, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        given = self.outputs[min(self.calls, len(self.outputs)) - 1]
        return given(self.layer(x))


def named(**values: Any) -> Any:
    return lambda h: {"h": h, **{k: v(h) if callable(v) else v for k, v in values.items()}}


REFUSED = {
    "no weight": ([named(other=Tensor.mean)], TypeError, r"weight for every.*'other'.*\['r'\]"),
    "no such loss": ([named()], ValueError, "auxiliary_losses: expected names.*'r', which none"),
    "one per row": ([named(r=lambda h: h.sum(1))], TypeError, r"0-dim.*shape \(4,\).*adds up"),
    "a number": ([named(r=0.5)], TypeError, "'r' of auxiliary_losses to be a 0-dim.*got 0.5"),
    "an integer": ([named(r=torch.tensor(1))], TypeError, r"shape \(\) of torch.int64"),
    "in a tuple": ([lambda h: (h, h.mean())], ValueError, r"shape \(\).*top of a dict"),
    "in some chunks": ([named(r=Tensor.mean), named()], ValueError, r"same names.*a zero where"),
    "another order": (
        [named(a=Tensor.sin, r=Tensor.mean), lambda h: {"a": h, "h": h, "r": h.mean()}],
        ValueError,
        r"same names.*\['a', 'h', 'r'\] for rows 4 to 7 after \['h', 'a', 'r'\]",
    ),
    "not finite": ([named(r=lambda h: h.mean() / 0)], ValueError, "expected finite features"),
}  # fmt: skip


@pytest.mark.parametrize(("outputs", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_right_is_refused_before_a_gradient_changes(outputs, kind, message):
    encoder = Gives(*outputs)
    cache = GradCache(
        [encoder], lambda given: given["h"].mean(), chunk_size=4, auxiliary_losses={"r": 0.1}
    )
    with pytest.raises(kind, match=message):
        cache(batch()[0])
    assert encoder.layer.weight.grad is None


@pytest.mark.parametrize(
    "weights",
    [{}, ["router"], 0.1, {"router": "0.1"}, {"router": float("nan")}, {"router": True}, {1: 0.1}],
)
def test_weights_that_are_none(weights):
    with pytest.raises((TypeError, ValueError), match="auxiliary_losses: expected.*such as"):
        GradCache(two_encoders(), Contrast(), auxiliary_losses=weights)
