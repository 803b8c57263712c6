"""The comparison of losses: adapters against fp64, verdicts, rows, and the script at toy size."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import contests
import late_interaction
import loss
import loss_peers
import pytest
import retrieval_losses
import torch
from contestant_process import failure_line
from contestants import Contestant, NotOffered
from contests import Turns
from fresh_process import Outcome
from loss_figures import remark
from loss_pairs import (
    PairLoss,
    outputs,
    relative_errors,
    share_of_matmul,
    time_values,
    truth,
)
from loss_peers import CASES, CONTESTANTS, OUTPUTS, PLAIN, make_leaves
from loss_picture import draw, finding
from loss_rows import (
    ErrorRow,
    MemoryRow,
    Results,
    TimeRow,
    bytes_text,
    read_origin,
    read_results,
    time_text,
    write_results,
)
from results import installed, read_rows
from torch import Tensor

_ROOT = Path(__file__).resolve().parent.parent

_OURS, _PLAIN = "gradcache_clip tiled", "plain loss"
_ORIGIN = {
    "device": "cpu",
    "gpu": "",
    "used_threads": "2",
    "machine": "a machine",
    "torch": "2.13.0",
    "commit": "abc",
    "date": "2026-01-01",
}


def _results() -> Results:
    head = {
        _OURS: ("clip", _OURS, "0.1", 4096, 256, "fp32"),
        _PLAIN: ("clip", _PLAIN, "2.13", 4096, 256, "fp32"),
    }
    larger = replace(MemoryRow(*head[_OURS], "measured", 40e6), batch_size=8192)
    return Results(
        times=[
            TimeRow(*head[_OURS], "measured", 100.0, 1.0, 1.0, 1.0, 0.8, 5),
            TimeRow(*head[_PLAIN], "measured", 130.0, 1.3, 1.25, 1.4, 0.6, 5),
        ],
        memory=[
            MemoryRow(*head[_OURS], "measured", 22e6),
            larger,
            MemoryRow(*head[_PLAIN], "measured", 280e6),
            replace(larger, contestant=_PLAIN, peak_growth_bytes=1.05e9),
        ],
        errors=[
            ErrorRow(*head[_OURS], "measured", "gap", 1e-8, 1e-6, 1e-6, 1e-7),
            ErrorRow(*head[_PLAIN], "measured", "gap", 1e-8, 1e-6, 2e-6, math.nan),
        ],
    )


def _half_gradient(_: float) -> Any:
    def loss(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        value = PLAIN["clip"](q, k, scale)
        return value / 2 + value.detach() / 2

    return loss


def _failing(_: float) -> Any:
    raise NotImplementedError("no bfloat16 here\nsecond line")


def _call_instead(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    """No fork."""
    monkeypatch.setattr(loss, "prepare_forks", lambda modules: None)
    monkeypatch.setattr(contests, "call_in_fork", call)


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are measured here, where injected contestants exist."""
    _call_instead(monkeypatch, lambda function, arguments, _: Outcome(function(*arguments)))


def _small(results: Path, *more: str) -> list[str]:
    memory = "--quick --losses clip --batches 64 128 --width 16 --error-batch 64 --jobs 1"
    times = "--time-batch 64 --time-width 16 --rounds 2 --threads 1"
    return [*memory.split(), *times.split(), "--results", str(results), *more]


def test_the_plain_losses_follow_their_formulas():
    B, s, b = 5, 3.0, -2.0
    q, k = (torch.randn(B, 4, dtype=torch.float64) for _ in range(2))
    S = [[s * float(q[i] @ k[j]) for j in range(B)] for i in range(B)]
    rows = [math.log(sum(map(math.exp, S[i]))) - S[i][i] for i in range(B)]
    columns = [math.log(sum(math.exp(S[i][j]) for i in range(B))) - S[j][j] for j in range(B)]
    scale, bias = torch.tensor(s), torch.tensor(b)
    assert float(PLAIN["clip"](q, k, scale)) == pytest.approx((sum(rows) + sum(columns)) / (2 * B))
    signs = [[1 if i == j else -1 for j in range(B)] for i in range(B)]
    terms = (math.log1p(math.exp(-signs[i][j] * (S[i][j] + b))) for i in range(B) for j in range(B))
    assert float(PLAIN["siglip"](q, k, scale, bias)) == pytest.approx(sum(terms) / B)
    z = torch.cat([q, k])
    total = 0.0
    for i in range(2 * B):
        others = [s * float(z[i] @ z[j]) for j in range(2 * B) if j != i]
        total += math.log(sum(map(math.exp, others))) - s * float(z[i] @ z[(i + B) % (2 * B)])
    assert float(PLAIN["nt_xent"](q, k, scale)) == pytest.approx(total / (2 * B))


def test_the_cases_are_what_they_say():
    def cosines(case: str) -> Tensor:
        q, k, *_ = make_leaves("clip", CASES[case], 64, 128, "fp32", "cpu")
        return (q.float() @ k.float().T).detach()

    assert cosines("random").abs().max() < 0.5
    assert (cosines("gap") + 0.6).abs().max() < 0.15
    assert (cosines("near") - 0.9).abs().max() < 0.15
    assert cosines("slipped").argmax(dim=1).tolist() == [*range(1, 64), 0]
    again = make_leaves("clip", CASES["gap"], 64, 128, "fp32", "cpu")
    assert torch.equal(again[0], make_leaves("clip", CASES["gap"], 64, 128, "fp32", "cpu")[0])
    assert make_leaves("clip", CASES["near"], 4, 8, "fp32", "cpu")[0].dtype == torch.bfloat16


def _parameters() -> list[Any]:
    slow = "torch_compile"
    return [
        pytest.param(
            one, id=f"{one.loss}-{one.name}", marks=[pytest.mark.slow] if slow in one.name else []
        )
        for one in CONTESTANTS
    ]


@pytest.mark.parametrize("contestant", _parameters())
def test_adapters_agree_with_fp64_where_the_peer_is_right(contestant: Contestant):
    if obstacle := contestant.obstacle("cpu"):
        pytest.skip(obstacle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            task = PairLoss(contestant.loss, "fp32", "cpu", width=32, error_batch=65)
            found = {case: task.errors(contestant, case) for case in CASES}
        except NotOffered as reason:
            pytest.skip(str(reason))
    for case in ("random", "gap"):
        assert max(found[case].values()) < 1e-4, f"{case}: {found[case]}"
        assert {"loss", "dq", "dk"} <= set(found[case])
    if contestant.name.startswith("gradcache_clip"):
        assert set(found["near"]) == set(OUTPUTS[contestant.loss])
        assert max(found["slipped"].values()) < 1e-4 and max(found["near"].values()) < 1e-2


def test_a_normalisation_inside_is_part_of_the_truth():
    leaves = make_leaves("clip", CASES["random"], 8, 4, "fp32", "cpu")
    exact = truth("clip", leaves, normalised=True)
    assert (exact[1] * leaves[0]).sum(dim=1).abs().max() < 1e-6
    assert (truth("clip", leaves, normalised=False)[1] * leaves[0]).sum(dim=1).abs().max() > 1e-3


def test_a_missing_gradient_of_the_features_is_an_error():
    leaves = make_leaves("clip", CASES["random"], 8, 4, "fp32", "cpu")
    got = outputs(lambda q, k, scale: PLAIN["clip"](q, k.detach(), scale), leaves)
    assert got[2] is None
    with pytest.raises(ValueError, match="dk: expected a gradient, got none"):
        relative_errors("clip", got, truth("clip", leaves, normalised=False))


@pytest.mark.usefixtures("same_process")
def test_a_wrong_contestant_is_called_wrong_and_a_failing_one_says_why(
    tmp_path, monkeypatch, capsys
):
    mine = [
        Contestant("half the gradient", "clip", _half_gradient),
        Contestant("not a number", "clip", lambda _: lambda q, k, s: (q * k).sum() * s / 0),
        Contestant("unable", "clip", _failing),
        Contestant("nowhere", "clip", _failing, package="no-such-package"),
        Contestant("elsewhere", "clip", _failing, devices=("cuda",)),
    ]
    known = [one for one in CONTESTANTS if one.name in (_OURS, _PLAIN)]
    monkeypatch.setattr(loss_peers, "CONTESTANTS", [*known, *mine])
    loss.main(_small(tmp_path))
    shown = " ".join(capsys.readouterr().out.split())
    assert "WRONG in random (d" in shown and "half the gradient" in shown
    assert "NotImplementedError: no bfloat16 here" in shown and "second line" not in shown
    assert "not installed" in shown
    assert "Not here: elsewhere (needs an NVIDIA GPU)" in shown
    results = read_results(tmp_path / "loss_cpu_fp32")
    wrong = {row.contestant for row in results.errors if row.is_wrong()}
    assert wrong == {"half the gradient", "not a number"}
    half = next(row for row in results.errors if row.contestant == "half the gradient")
    assert half.dq_error == pytest.approx(0.5, abs=1e-3) and half.loss_error < 1e-6
    assert remark("clip", "half the gradient", results).count("(d") == len(CASES)
    assert "loss not finite" in remark("clip", "not a number", results)
    assert "WRONG" not in remark("clip", _OURS, results) + remark("clip", _PLAIN, results)
    timed = {row.contestant for row in results.times if row.status == "measured"}
    assert timed == {_OURS, _PLAIN, "half the gradient", "not a number"}


@pytest.mark.usefixtures("same_process")
def test_one_command_shows_every_loss_and_a_failure_ends_no_other(tmp_path, monkeypatch, capsys):
    def failing(objective: str) -> Any:
        raise NotImplementedError(f"no {objective}")

    monkeypatch.setattr(retrieval_losses, "_QUICK_PAIRS", 32)
    monkeypatch.setattr(retrieval_losses, "_cached", failing)
    monkeypatch.setitem(late_interaction._SHAPES, "ColBERT", ((2, 9), 5, 3))
    chosen = ("--losses", "siglip", "hardness", "groups_bias", "colbert")
    loss.main([*_small(tmp_path), *chosen])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Sigmoid loss" in shown and "CLIP loss" not in shown
    version = installed("sentence-transformers")
    why = f"{version} NotImplementedError: no hardness" if version else "not installed"
    assert f"hardness 32 sentence-transformers cached {why}" in shown
    rows = read_rows(retrieval_losses.Row, tmp_path / "retrieval_losses.csv")
    ran = [(row.objective, row.contestant) for row in rows if row.status == "measured"]
    names = "gradcache_clip", "plain PyTorch"
    assert ran == [(each, name) for each in ("hardness", "groups, bias") for name in names]
    assert all(row.error < 1e-5 and row.milliseconds > 0 for row in rows if row.error)
    tokens = read_rows(late_interaction.Row, tmp_path / "late_interaction.csv")
    assert [(row.shape, row.queries) for row in tokens] == [("ColBERT", 3)] * 5
    assert "needs an NVIDIA GPU" in {row.status for row in tokens}
    with pytest.raises(SystemExit):
        loss.main(["--losses", "none", "--results", str(tmp_path)])
    assert "query_to_document" in capsys.readouterr().err


def test_what_would_not_fit_is_neither_run_nor_timed(tmp_path, monkeypatch, capsys):
    asked: list[tuple[str, int]] = []

    def call(function: Any, arguments: tuple[Any, ...], limits: Any) -> Outcome:
        if function.__name__ == "measure_times":
            assert arguments[1] == [_OURS]
            return Outcome({"steps": {_OURS: [2.0]}, "products": {_OURS: [1.0]}})
        _, name, batch_size, _ = arguments
        asked.append((name, batch_size))
        return Outcome({"memory": 4 * (batch_size**2 if name == _PLAIN else 1)})

    _call_instead(monkeypatch, call)
    sizes = ["--batches", "64", "128", "1024", "2048", "--time-batch", "4096", "--cap-gib", "0.001"]
    loss.main(_small(tmp_path, "--only", "plain", *sizes))
    assert [batch for name, batch in asked if name == _PLAIN] == [64, 128]
    results = read_results(tmp_path / "loss_cpu_fp32")
    plain = [(row.batch_size, row.status) for row in results.memory if row.contestant == _PLAIN]
    assert plain == [(64, "measured"), (128, "measured"), (1024, "over cap")]
    assert {row.contestant: row.status for row in results.times}[_PLAIN] == "over cap"
    shown = next(line for line in capsys.readouterr().out.splitlines() if f" {_PLAIN}" in line)
    assert "too large" in shown and "over cap" in shown


def test_a_process_that_died_is_shown_with_its_last_line(tmp_path, monkeypatch, capsys):
    _call_instead(monkeypatch, lambda *_: Outcome(failure="illegal access"))
    loss.main(_small(tmp_path, "--only", "plain"))
    assert " ".join(capsys.readouterr().out.split()).count("illegal access") == 2


def test_results_survive_their_csv_with_these_columns(tmp_path):
    paths = write_results(_results(), _ORIGIN, tmp_path / "loss")
    again = read_results(tmp_path / "loss")
    assert again.times == _results().times and again.memory == _results().memory
    assert repr(again.errors) == repr(_results().errors), "not a number is not equal to itself"
    assert read_origin(tmp_path / "loss") == _ORIGIN
    first = "loss,contestant,version,batch_size,width,dtype,status,"
    own = {
        "times": "milliseconds,time_over_ours,lowest_ratio,highest_ratio,share_of_matmul,rounds",
        "memory": "peak_growth_bytes",
        "errors": "case,loss_error,dq_error,dk_error,dscale_error,dbias_error",
    }
    for path, kind in zip(paths, own, strict=True):
        heading = path.read_text().splitlines()[0]
        assert heading == f"{first}{own[kind]},{','.join(_ORIGIN)}" and kind in path.name
    with paths[2].open(newline="") as file:
        assert list(csv.DictReader(file))[1]["dscale_error"] == "", "unknown is empty, not zero"


def test_redrawing_without_a_csv_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="run without --redraw"):
        loss.main(["--redraw", "--results", str(tmp_path)])
    monkeypatch.setattr(loss, "QUICK", tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        loss.main(["--redraw", "--quick"])


def test_ratios_are_taken_within_a_round():
    # The second round ran on a machine half as fast.
    own = (10.0, 20.0, 10.0)
    turns = Turns("measured", (20.0, 40.0, 30.0), own, products=(2.0, 4.0, 2.0))
    found = time_values("clip", 4096, 64, turns)
    assert (found["time_over_ours"], found["lowest_ratio"], found["highest_ratio"]) == (2, 2, 3)
    assert found["share_of_matmul"] == pytest.approx(0.4)
    assert found["milliseconds"] == 30 and found["rounds"] == 3


def test_the_share_counts_the_same_operations_for_all():
    # At the edge of the product, 8 B^2 D are four products.
    assert share_of_matmul("clip", 4096, 64, 1.0, 4.0) == pytest.approx(1)
    assert share_of_matmul("siglip", 4096, 64, 1.0, 3.0) == pytest.approx(1)
    assert share_of_matmul("nt_xent", 4096, 64, 1.0, 8.0) == pytest.approx(1)


def test_the_picture_says_the_finding(tmp_path):
    title = finding("clip", _results(), "cpu")
    assert title == (
        "CLIP loss: 40 MB instead of 1.05 GB at batch 8,192, 1.30 times as fast as the plain loss"
    )
    results = _results()
    results.errors[1] = replace(results.errors[1], dq_error=math.inf)
    png, svg = draw("clip", results, _ORIGIN, tmp_path / "picture")
    assert png.read_bytes().startswith(b"\x89PNG")
    drawn = svg.read_text()
    assert "plain loss (WRONG)" in drawn and "80% of matmul" in drawn
    assert "1.30 x ours" in drawn and "one B x B matrix" in drawn
    assert draw("siglip", _results().of("siglip"), _ORIGIN, tmp_path / "none") == []
    results.memory[0] = replace(results.memory[0], peak_growth_bytes=0.0)
    assert len(draw("clip", results, _ORIGIN, tmp_path / "no growth")) == 2


def test_memory_is_that_of_the_largest_batch_or_why_there_is_none():
    results = _results()
    results.memory[-1] = replace(results.memory[-1], status="over cap", peak_growth_bytes=math.nan)
    assert results.memory_at_largest()[_OURS].batch_size == 8192
    assert results.memory_at_largest()[_PLAIN].status == "over cap"


def test_texts():
    assert [bytes_text(n) for n in (0, 46e6, 4.25e9)] == ["0 MB", "46 MB", "4.25 GB"]
    assert [time_text(t) for t in (3412, 327.4, 26.14)] == ["3.41 s", "327 ms", "26.1 ms"]
    assert failure_line(RuntimeError("can't allocate memory")) == "out of memory"
    assert failure_line(ValueError("bad\nmore")) == "ValueError: bad"
    assert failure_line(AssertionError()) == "AssertionError"
    assert failure_line(NotOffered("3.3.0 has no chunks")) == "3.3.0 has no chunks"


@pytest.mark.slow
def test_quick_end_to_end_in_fresh_processes(tmp_path):
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    script = str(_ROOT / "benchmarks" / "loss.py")
    options = _small(tmp_path, "--only", "plain", "--batches", "2048", "--jobs", "2")
    options += ["--losses", "clip", "hardness"]
    done = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "CLIP loss" in done.stdout and "matrix product" in done.stdout
    results = read_results(tmp_path / "loss_cpu_fp32")
    rows = (*results.memory, *results.times, *results.errors)
    assert {row.status for row in rows} == {"measured"}
    memory = results.memory_at_largest()
    matrix = 4 * 2048**2
    assert memory[_PLAIN].peak_growth_bytes > 2 * matrix > 0
    assert memory[_OURS].peak_growth_bytes < memory[_PLAIN].peak_growth_bytes / 2
    assert len(results.errors) == 2 * len(CASES)
    png = tmp_path / "loss_cpu_fp32_clip.png"
    assert str(png) in done.stdout and png.read_bytes().startswith(b"\x89PNG")
    ours, plain = read_rows(retrieval_losses.Row, tmp_path / "retrieval_losses.csv")
    assert 0 < ours.memory_bytes < plain.memory_bytes and plain.error < 1e-6
    redrawn = subprocess.run(
        [sys.executable, script, "--redraw", "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert redrawn.returncode == 0 and redrawn.stdout == done.stdout
