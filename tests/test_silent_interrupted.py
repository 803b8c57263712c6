"""A step that is broken off leaves `.grad` as it was, or the next step says that it did not.

And the loss of a step that is done: a number, whose backward says what to do instead.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from interrupted_cases import Interrupts, Loss, gradients, interrupted_cases, same
from one_shot import gradient_errors, one_shot, twins, worst
from strategy_processes import result_of, run_cases
from torch import Tensor, nn

from gradcache_clip import GradCache, deferred_step
from gradcache_clip.cache.finished_loss import FinishedLoss

ROWS, CHUNK, CHUNKS = 14, 4, 4


def batch(step: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(ROWS, w, generator=generator, dtype=torch.float64) for w in (7, 5)]


def pair() -> tuple[list[nn.Module], list[nn.Module]]:
    encoders = [
        Interrupts(nn.Sequential(nn.Linear(w, 9), nn.GELU(), nn.Linear(9, 6))) for w in (7, 5)
    ]
    return twins(*(module.double() for module in (*encoders, Loss())))


PLACES = {
    "embed": (1, 2, False),
    "loss": (0, 0, False),
    "replay": (0, CHUNKS + 2, False),
    "backward": (0, CHUNKS + 2, True),
    "last replay": (1, 2 * CHUNKS - 1, True),
}


def break_off(cache: GradCache, ours: list[nn.Module], place: str, call: Any) -> None:
    tower, number, backward = PLACES[place]
    ours[2].interrupts = place == "loss"
    ours[tower].arm(number, backward=backward)
    with pytest.raises(KeyboardInterrupt):
        call(cache)
    ours[tower].arm(0)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("on_out_of_memory", ["halve", "raise"])
@pytest.mark.parametrize("place", PLACES)
def test_on_one_process(place, on_out_of_memory, earlier):
    ours, truth = pair()
    options = {"on_out_of_memory": on_out_of_memory, "check_rows": "off"}
    cache = GradCache(ours[:2], ours[2], chunk_size=CHUNK, **options)
    if earlier:
        cache(*batch(1))
        one_shot(truth[:2], truth[2], batch(1))
    before = gradients(nn.ModuleList(ours))
    break_off(cache, ours, place, lambda cache: cache(*batch()))
    unchanged = all(map(same, before, gradients(nn.ModuleList(ours))))
    assert unchanged or (on_out_of_memory == "raise" and place not in ("embed", "loss"))
    if on_out_of_memory == "raise" and place != "embed" and (earlier or not unchanged):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="whole steps in .grad.*optimizer.zero_grad()"):
                cache(*batch())
        for modules in (ours, truth):
            nn.ModuleList(modules).zero_grad()
    cache(*batch())
    one_shot(truth[:2], truth[2], batch())
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


@pytest.mark.parametrize("place", ["replay", "backward", "last replay"])
def test_a_deferred_step(place):
    ours, truth = pair()
    cache = GradCache(ours[:2], ours[2], chunk_size=CHUNK, check_rows="off")
    break_off(cache, ours, place, lambda cache: deferred_step(cache, *batch()).loss.backward())
    with pytest.raises(RuntimeError, match="broken off; call optimizer.zero_grad()"):
        deferred_step(cache, *batch())
    nn.ModuleList(ours).zero_grad()
    deferred_step(cache, *batch()).loss.backward()
    one_shot(truth[:2], truth[2], batch())
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


def test_gradients_that_are_zero_may_stay():
    ours, truth = pair()
    options = {"on_out_of_memory": "raise", "check_rows": "off"}
    cache = GradCache(ours[:2], ours[2], chunk_size=CHUNK, **options)
    break_off(cache, ours, "backward", lambda cache: cache(*batch()))
    nn.ModuleList(ours).zero_grad(set_to_none=False)
    cache(*batch())
    one_shot(truth[:2], truth[2], batch())
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


@pytest.mark.parametrize("on_out_of_memory", ["halve", "raise"])
def test_a_replay_that_differs_is_a_step_broken_off(on_out_of_memory):
    ours, _ = pair()
    noise = [torch.zeros(()), torch.ones(())]

    class Changes(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return ours[0](rows) + noise[torch.is_grad_enabled()]

    encoder = Changes()
    encoder.inner = ours[0]
    options = {"on_out_of_memory": on_out_of_memory, "check_rows": "off"}
    cache = GradCache([encoder, ours[1]], ours[2], chunk_size=CHUNK, **options)
    with pytest.raises(RuntimeError, match="repeat the embed"):
        cache(*batch())
    noise[1] = noise[0]
    if on_out_of_memory == "raise":
        with pytest.raises(RuntimeError, match="broken off; call optimizer.zero_grad()"):
            cache(*batch())
    else:
        assert all(p.grad is None for p in nn.ModuleList(ours).parameters())
        cache(*batch())


@pytest.fixture
def loss() -> Tensor:
    ours, _ = pair()
    out = GradCache(ours[:2], ours[2], chunk_size=CHUNK, check_rows="off")(*batch())
    assert type(out.loss) is FinishedLoss
    return out.loss


SAYS = r"loss.backward\(\): expected no backward after cache.*optimizer.step\(\).*deferred_step"


@pytest.mark.parametrize(
    "prepare",
    [
        lambda loss: loss,
        lambda loss: loss / 4,
        lambda loss: 0.5 * loss,
        lambda loss: loss * torch.tensor(2.0),
        lambda loss: loss.mean(),
        lambda loss: loss + 1,
        lambda loss: torch.div(loss, 3),
        lambda loss: (loss / 2).sum(),
    ],
)
def test_backward_says_what_to_do(loss, prepare):
    with pytest.raises(RuntimeError, match=SAYS):
        prepare(loss).backward()


def test_backward_of_a_scaled_loss(loss):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with pytest.raises(RuntimeError, match=SAYS):
        scaler.scale(loss).backward()


def test_a_bare_tensor_of_a_loss_function():
    ours, _ = pair()
    out = GradCache(ours[:2], lambda a, b: (a * b).sum(), chunk_size=CHUNK, check_rows="off")(
        *batch()
    )
    with pytest.raises(RuntimeError, match=SAYS):
        out.loss.backward()


def test_a_second_loss_has_a_backward_of_its_own(loss):
    weight = nn.Parameter(torch.ones(3))
    for total in (loss + weight.sum(), weight.sum() + loss, loss * weight.sum()):
        total.backward()
    expected = torch.full((3,), 2 + float(loss))
    torch.testing.assert_close(weight.grad, expected)


def test_it_is_a_number_like_any_other(loss):
    plain = loss.detach()
    assert type(plain) is Tensor and not loss.requires_grad
    assert float(loss) == loss.item() == plain.item()
    assert np.asarray(loss) == loss.numpy() == plain.numpy()
    assert repr(loss) == repr(plain) and f"{loss:.3f}" == f"{plain:.3f}"
    assert type(copy.deepcopy(loss)) is type(loss.clone()) is type(loss.cpu()) is Tensor
    assert torch.equal(pickle.loads(pickle.dumps(loss)), plain)
    assert torch.equal(torch.stack([loss, plain]), torch.stack([plain, plain]))
    assert bool(loss == plain) and loss.isfinite()


def test_it_is_saved_as_a_tensor(loss):
    file = io.BytesIO()
    torch.save({"loss": loss}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)["loss"]
    assert type(found) is Tensor and torch.equal(found, loss.detach())


@pytest.mark.distributed
def test_over_ranks(tmp_path):
    cases = interrupted_cases()
    results = run_cases(cases, 2, tmp_path)
    for case in cases:
        found = result_of(results, case)
        assert found.get("error", 0.0) < 1e-10, (case, found)
        # In 32 bits, by what plain SGD changes.
        assert found.get("change", 0.0) < 1e-4, (case, found)
