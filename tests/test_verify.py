"""Does `verify` see what is exact, name what is not, and leave everything as it was?"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import make_data, overrides
from torch import Tensor, nn

from gradcache_clip import ByLength, ClipLoss, FrozenTrunk, GradCache
from gradcache_clip.cache import step as engine_step
from gradcache_clip.cli import main
from gradcache_clip.train import verify as command
from gradcache_clip.verification import experiments
from gradcache_clip.verification.compare import verify
from gradcache_clip.verification.report import (
    DIFFERS,
    EXACT,
    ROUNDING,
    SAME_CHUNKS,
    SAME_DRAWS,
    SHOWN_ROWS,
    VerifyReport,
)

ROWS = 22
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}


def mlp(width_in: int, *between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, 16), nn.GELU(), *between, nn.Linear(16, 8))


def batch(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 12), torch.randn(rows, 20)


def tokens(rows: int = ROWS, length: int = 9) -> dict[str, Tensor]:
    mask = (torch.arange(length) < torch.randint(2, length + 1, (rows, 1))).long()
    return {"input_ids": torch.randint(1, 40, (rows, length)) * mask, "attention_mask": mask}


def verify_beside_mlp(encoder: nn.Module, **options: Any) -> VerifyReport:
    return verify(GradCache([encoder, mlp(20)], ClipLoss(), **options), *batch())


def verdicts(report: VerifyReport) -> set[str]:
    return {row.verdict for row in report.rows}


def only_reason(report: VerifyReport) -> str:
    (reason,) = report.reasons
    return reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_an_exact_model(dtype):
    encoders, loss = [mlp(12).to(dtype), mlp(20).to(dtype)], ClipLoss().to(dtype)
    report = verify(GradCache(encoders, loss), *(x.to(dtype) for x in batch()))
    assert report.exact and report.reasons == [] and verdicts(report) == {EXACT}
    errors = [row.error for row in report.rows]
    assert errors == sorted(errors, reverse=True) and 0 < errors[0] < LIMIT[dtype]
    assert report.tolerance == LIMIT[dtype] and report.chunk_sizes == (6, 6)
    shapes = {row.name: row.shape for row in report.rows}
    assert shapes["encoder 1: 0.weight"] == (16, 20) and shapes["loss: log_logit_scale"] == ()
    assert len(shapes) == 9
    lines = str(report).splitlines()
    assert lines[0].startswith("exact: all 9 gradients equal those of the one-shot step")
    assert lines[1].startswith("22 rows in chunks of 6, ") and len(lines) == 2 + 1 + 1 + 9


def test_only_the_worst_rows_are_printed():
    report = verify_beside_mlp(mlp(12, *(nn.LayerNorm(16) for _ in range(6))))
    *rows, last = str(report).splitlines()[4:]
    assert len(rows) == SHOWN_ROWS and last == "and 6 more: exact"


@pytest.mark.parametrize("engine_error", ["a chunk left out", "another chunk's gradient"])
def test_an_engine_that_is_wrong_is_caught(engine_error, monkeypatch):
    if engine_error == "a chunk left out":
        order = engine_step.turns
        monkeypatch.setattr(engine_step, "turns", lambda *a: order(*a)[1:])
    else:
        monkeypatch.setattr(engine_step, "_taken_gradient", lambda leaf, _: leaf.grad.roll(1, 0))
    report = verify_beside_mlp(mlp(12))
    assert not report.exact and DIFFERS in verdicts(report)
    assert "arises in the backward or in the loss" in only_reason(report)
    assert str(report).startswith("not exact: ") and report.rows[0].verdict == DIFFERS


def test_a_gradient_that_is_nothing_but_rounding():
    """Softmax over the columns does not see a common shift of the keys."""

    def rows_only(q: Tensor, k: Tensor) -> Tensor:
        return nn.functional.cross_entropy(q @ k.T, torch.arange(len(q)))

    report = verify(GradCache([mlp(12), mlp(20)], rows_only), *batch())
    assert report.exact and report.reasons == []
    rounded = [row.name for row in report.rows if row.verdict == ROUNDING]
    assert rounded == ["encoder 1: 2.bias"] and report.rows[0].error > 1e-2


def test_dropout_is_compared_over_the_same_chunks():
    # A single layer on a CPU draws over all chunks what it draws over the whole batch.
    report = verify_beside_mlp(mlp(12, nn.Dropout(0.3), nn.Dropout(0.3)))
    assert report.exact and verdicts(report) == {SAME_DRAWS}
    assert report.rows[0].same_chunks_error < 1e-6 < report.rows[0].error
    reason = only_reason(report)
    assert "encoder 0 (Sequential): random layers: compared over the same chunks" in reason
    assert reason.endswith("2 (Dropout), 3 (Dropout)")
    assert "other draws" in str(report)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape[::-1]).T


def test_a_layer_that_draws_in_eval_mode_too():
    report = verify_beside_mlp(mlp(12, Noise()).eval())
    assert report.exact and "2 (Noise) draws in eval mode too" in only_reason(report)


def test_batch_norm_in_train_mode_names_the_layer():
    report = verify_beside_mlp(mlp(12, nn.Dropout(0.3), nn.BatchNorm1d(16)))
    assert not report.exact and verdicts(report) == {SAME_CHUNKS}
    drawn, normed = report.reasons
    assert "random layers" in drawn
    assert "batch norm in train mode" in normed and "3 (BatchNorm1d)" in normed
    assert "changes features by" in normed and report.rows[0].same_chunks_error < 1e-6
    assert verify_beside_mlp(mlp(12, nn.BatchNorm1d(16)).eval()).exact


def test_batch_norm_without_running_statistics_is_one_in_eval_mode_too():
    norm = nn.BatchNorm1d(16, track_running_stats=False)
    assert "2 (BatchNorm1d)" in only_reason(verify_beside_mlp(mlp(12, norm).eval()))


class Scaled(nn.Module):
    """Multiplies its features by random numbers, or by what it counts."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.generator = torch.Generator().manual_seed(1)
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        factors: dict[str, Callable[[], Any]] = {
            "numpy": lambda: torch.from_numpy(np.random.rand(*x.shape)).to(x),
            "python": lambda: random.random(),
            "own": lambda: torch.rand(x.shape, generator=self.generator),
            "calls": lambda: self._count(),
            "total": lambda: self.total.add_(1).item(),
            "grad mode": lambda: 2.0 if torch.is_grad_enabled() else 1.0,
        }
        return x * factors[self.kind]()

    def _count(self) -> int:
        self.calls += 1
        return self.calls


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("numpy", "does not repeat itself.*draws from numpy"),
        ("python", "does not repeat itself.*draws from Python's random"),
        ("own", "does not repeat itself.*a generator of its own"),
        ("calls", "does not repeat itself.*carries state from one call to the next in calls"),
        ("total", "does not repeat itself.*carries state from one call to the next in total"),
        ("grad mode", "computes something else when gradients are enabled"),
    ],
)
def test_a_module_that_cannot_be_replayed_is_named(kind, why):
    report = verify_beside_mlp(mlp(12, nn.Dropout(0.2), Scaled(kind)))
    assert not report.exact and DIFFERS in verdicts(report)
    _, reason = report.reasons
    assert re.match(rf"encoder 0 \(Sequential\): 3 \(Scaled\) {why}", reason), reason


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(12)

    def forward(self, pixels: Tensor, scale: float = 1.0) -> Tensor:
        return self.inner(pixels.mul_(2)) * scale


def test_an_input_changed_in_place_is_named():
    images, texts = batch()
    before = images.clone()
    report = verify(
        GradCache([Doubles(), mlp(20)], ClipLoss()), {"pixels": images, "scale": 1.0}, texts
    )
    assert not report.exact and "input 0['pixels'] is changed in place" in only_reason(report)
    assert torch.equal(images, before)


class Centred(nn.Module):
    """Its own code, between two layers, looks at all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x - x.mean(0))


def test_rows_that_look_at_other_rows_name_whose_code_does():
    report = verify_beside_mlp(nn.Sequential(nn.Identity(), Centred(), nn.Dropout(0.2)))
    assert not report.exact and SAME_CHUNKS in verdicts(report)
    _, reason = report.reasons
    assert "rows look at other rows" in reason and "first in 1 (Centred); compute" in reason


def test_get_features_that_look_at_other_rows_are_named():
    report = verify_beside_mlp(mlp(12), get_features=[lambda x: x - x.mean(0), None])
    assert "first in get_features; compute each row from itself alone" in only_reason(report)


class Pooled(nn.Module):
    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        self.table, self.out, self.masked = nn.Embedding(40, 16), nn.Linear(16, 8), masked

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden, kept = self.table(input_ids), attention_mask[..., None].float()
        if not self.masked:
            return self.out(hidden.mean(1))
        return self.out((hidden * kept).sum(1) / kept.sum(1))


def test_padding_that_counts():
    inputs = torch.randn(ROWS, 12), tokens()
    for masked in (True, False):
        encoders = [mlp(12), Pooled(masked=masked)]
        cache = GradCache(encoders, ClipLoss(), sort_by_length=[None, ByLength(max_tokens=500)])
        report = verify(cache, *inputs)
        assert report.exact == masked
    reason = only_reason(report)
    assert "encoder 1 (Pooled): padding counts" in reason and "in the encoder (Pooled)" in reason
    assert "when input 1['input_ids'], input 1['attention_mask'] keep only" in reason


def test_a_hook_on_a_gradient_is_named():
    encoder = mlp(12)
    encoder[0].bias.register_hook(lambda gradient: gradient / gradient.norm())
    report = verify_beside_mlp(encoder, gradient_hooks="every_chunk")
    named = "the gradient of encoder 0: 0.bias, run with gradient_hooks='every_chunk'"
    assert not report.exact and named in only_reason(report)
    assert [row.name for row in report.rows if row.verdict == DIFFERS] == ["encoder 0: 0.bias"]


def test_an_experiment_that_fails_hides_no_difference(monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room for another pass")

    monkeypatch.setattr(experiments, "watch", fail)
    report = verify_beside_mlp(mlp(12, Scaled("calls")))
    failed = "diagnosis stopped early (MemoryError: no room for another pass)"
    assert not report.exact and failed in report.reasons[0]


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList([mlp(12), mlp(20)])

    def forward(self, tower: int, inputs: Tensor) -> Tensor:
        return self.towers[tower](inputs)


def test_one_module_for_all_inputs_and_one_module_twice():
    report = verify(GradCache(Both(), ClipLoss(), chunk_size=(3, 5)), *batch())
    assert report.exact and report.chunk_sizes == (3, 5)
    assert {"towers.0.0.weight", "towers.1.0.weight"} < {row.name for row in report.rows}
    shared = mlp(12)
    inputs = torch.randn(ROWS, 12), torch.randn(ROWS, 12)
    report = verify(GradCache([shared, shared], ClipLoss()), *inputs)
    assert report.exact and len(report.rows) == 5


def test_frozen_parts_and_parameters_that_only_a_function_knows():
    frozen, partly, head = mlp(12).requires_grad_(False), mlp(20), nn.Linear(8, 8)
    partly[0].requires_grad_(False)
    cache = GradCache([frozen, partly], ClipLoss(), get_features=[lambda x: head(x), None])
    report = verify(cache, *batch())
    assert report.exact and len(report.rows) == 5
    assert {row.shape for row in report.rows if "of a function" in row.name} == {(8, 8), (8,)}
    trunk = FrozenTrunk(nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.3)), mlp(16))
    trunk.trunk.requires_grad_(False)
    assert verify_beside_mlp(trunk).exact


def test_state_of_a_frozen_encoder_matters_over_chunks_alone():
    report = verify_beside_mlp(mlp(12, Scaled("calls")).requires_grad_(False))
    assert verdicts(report) == {SAME_CHUNKS}
    assert "2 (Scaled) does not repeat itself" in only_reason(report)
    encoders = [mlp(12, Scaled("calls")).requires_grad_(False), mlp(20, *[nn.Dropout(0.3)] * 2)]
    report = verify(GradCache(encoders, ClipLoss()), *batch())
    assert not report.exact and len(report.reasons) == 2


def test_inputs_that_ask_for_a_gradient():
    images, texts = batch()
    report = verify(GradCache([mlp(12), mlp(20)], ClipLoss()), images.requires_grad_(), texts)
    assert report.exact and "input 0" in {row.name for row in report.rows}
    assert images.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    with torch.autocast("cpu", dtype):
        report = verify_beside_mlp(mlp(12, nn.LayerNorm(16)))
    assert report.exact and report.precision == str(dtype).removeprefix("torch.")
    assert max(row.same_chunks_error for row in report.rows) < 1e-6 < report.rows[0].error


class Everything(nn.Module):
    """Changes whatever an encoder may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(12), nn.Dropout(0.1)
        self.inner, self.kinds = Doubles(), nn.ModuleList(map(Scaled, ("numpy", "python", "own")))
        self.counts = nn.ModuleList(map(Scaled, ("calls", "total")))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        self.seen = True
        self.drop.training = not self.drop.training
        features = self.inner(x)
        x = self.drop(self.norm(x))
        for module in (*self.kinds, *self.counts):
            features = module(features)
        return features + x[:, :8]


def state_of(modules: nn.Module) -> list[Any]:
    numbers = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()]
    own = [m.generator.get_state() for m in modules.modules() if isinstance(m, Scaled)]
    calls = [m.calls for m in modules.modules() if isinstance(m, Scaled)]
    flags = [m.training for m in modules.modules()]
    return [*numbers, own, calls, flags, copy.deepcopy(modules.state_dict())]


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(fails):
    modules = nn.ModuleList([Everything(), mlp(20), ClipLoss()])
    *encoders, loss = modules
    for parameter in encoders[1].parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = [parameter.grad for parameter in modules.parameters()]
    values = [None if gradient is None else gradient.clone() for gradient in gradients]
    images, texts = batch()
    before, inputs = state_of(modules), (images.clone(), texts.clone())

    def broken(*features: Tensor) -> Tensor:
        raise ZeroDivisionError

    cache = GradCache(encoders, broken if fails else loss)
    if fails:
        with pytest.raises(ZeroDivisionError):
            verify(cache, images, texts)
    else:
        assert not verify(cache, images, texts).exact
    torch.testing.assert_close(state_of(modules), before, rtol=0, atol=0)
    torch.testing.assert_close((images, texts), inputs, rtol=0, atol=0)
    now = [parameter.grad for parameter in modules.parameters()]
    assert all(a is b for a, b in zip(now, gradients, strict=True))
    torch.testing.assert_close(now, values, rtol=0, atol=0)
    assert encoders[0].last.shape == (1,) and not hasattr(encoders[0], "seen")


def test_the_cache_is_as_before(tmp_path):
    record = tmp_path / "chunks.json"
    cache = GradCache([mlp(12), mlp(20)], ClipLoss(), chunk_size="auto", chunk_record=record)
    settings = dict(vars(cache))
    assert verify(cache, *batch()).chunk_sizes == (6, 6)
    assert vars(cache) == settings and not record.exists()


def test_what_is_refused():
    cache = GradCache([mlp(12), mlp(20)], ClipLoss())
    images, texts = batch()
    with pytest.raises(ValueError, match="inputs: expected 2, one for each encoder, got 1"):
        verify(cache, images)
    with (
        pytest.raises(RuntimeError, match="verify: expected gradients to be enabled"),
        torch.no_grad(),
    ):
        verify(cache, images, texts)
    images[3] = float("nan")
    with pytest.raises(ValueError, match="encoder 0: .*expected a finite gradient of the one-shot"):
        verify(cache, images, texts)
    assert all(p.grad is None for e in cache.encoders for p in e.parameters())


def test_compiled_encoders_are_looked_into():
    encoder = torch.compile(mlp(12, nn.BatchNorm1d(16)), backend="eager")
    assert "2 (BatchNorm1d)" in only_reason(verify_beside_mlp(encoder))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A configuration for towers with dropout, as the command takes it."""
    folder = tmp_path_factory.mktemp("verify")
    data, config = make_data(folder / "data"), folder / "config.yaml"
    config.write_text("{}")
    return [str(config), *overrides(data, folder / "run")]


def test_the_command_on_an_exact_model(run, capsys):
    assert main(["verify", *run, "train.precision=fp16", "--rows", "10"]) == 0
    out = capsys.readouterr().out
    assert "10 rows in chunks of 4, float16" in out and "random layers" in out
    assert out.splitlines()[-1].startswith("exact: all 42 gradients equal")
    assert not Path(run[-1].partition("=")[2]).exists()


def test_the_command_names_batch_norm(run, capsys):
    resnet = "model.image_kwargs={channels: [8, 8, 8, 8], stem_width: 8}"
    arguments = [*run, "model.image=resnet10t", resnet, "data.image_size=32", "--rows", "8"]
    assert main(["verify", *arguments]) == 1
    out = capsys.readouterr().out
    assert "image_tower.backbone.conv1.1 (BatchNorm2d)" in out
    assert out.splitlines()[-1].startswith("not exact: ") and "exact (same chunks)" in out
    assert max(map(len, out.splitlines()[:20])) <= 80


def test_the_command_on_a_run(run, capsys):
    folder = run[-1].partition("=")[2]
    assert main(["train", *run, "train.steps=3"]) == 0
    assert main(["verify", folder, "--rows", "8"]) == 0
    assert f"{folder}, step 3" in capsys.readouterr().out.replace("\n", "")
    assert main(["verify", folder, "model.feature_dim=4", "--rows", "8"]) == 2
    assert "model: expected the towers of the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "1"], "--rows: expected at least 2, got 1"),
        (["--rows", "4000"], "lower --rows or add samples"),
        (["train.grad_cache=false"], "train.grad_cache: expected true, got false"),
    ],
)
def test_mistakes_end_with_one_line(arguments, said, run, capsys):
    assert main(["verify", *run, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_batch_that_does_not_fit_says_what_to_lower(run, monkeypatch, capsys):
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(command, "verify", fail)
    assert main(["verify", *run, "--rows", "8"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pass fewer with --rows" in line
