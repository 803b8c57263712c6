from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console
from tiny_run import logged, overrides

from gradcache_clip.cli import main
from gradcache_clip.train import fit
from gradcache_clip.train import run as training
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.run import RunSummary, train
from gradcache_clip.train.state import TrainState


def run(data: Path, output: Path, *more: str) -> RunSummary:
    """Pictures take longer than such a run."""
    with mock.patch.object(training, "draw_run"):
        return train(load_config(None, overrides(data, output, *more)))


def start(data: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gradcache_clip.cli", "train", str(output) + ".yaml"]
    config = Path(f"{output}.yaml")
    config.write_text("{}")
    return subprocess.Popen(
        [*command, *overrides(data, output, *more)],
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (output / "checkpoints").exists() or step not in logged(output, "loss"):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunSummary]:
    """A run that was never stopped."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    return output, train(load_config(None, overrides(data, output)))


def test_a_run_leaves_everything_behind(whole):
    output, summary = whole
    assert summary.finished and summary.step == 8
    names = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    for expected in ("config.yaml", "tokenizer.json", "metrics.jsonl", "summary.json"):
        assert expected in names
    assert any(name.startswith("checkpoints/step-") for name in names)
    assert any("tfevents" in name for name in names)
    for picture in ("curves", "similarity", "similarity_held_out", "gallery"):
        assert f"pictures/{picture}.png" in names
    assert json.loads((output / "summary.json").read_text())["step"] == 8
    assert set(logged(output, "loss")) == set(range(1, 9))
    assert 0 <= summary.metrics["image_to_text_recall_at_1"] <= 1
    assert list(logged(output, "image_to_text_recall_at_1")) == [8]


def test_the_config_that_was_run_is_saved(whole):
    output, _ = whole
    assert load_config(output / "config.yaml").train.batch_size == 24


def test_the_loss_falls(data, tmp_path):
    summary = run(
        data, tmp_path / "run", "train.steps=40", "optimizer.learning_rate=0.01",
        "optimizer.weight_decay=0", "data.random_crop=1", "train.ema_decay=0",
    )  # fmt: skip
    losses = logged(tmp_path / "run", "loss")
    assert summary.loss < losses[1] - 0.5


def test_ctrl_c_saves_and_says_how_to_resume(data, tmp_path):
    output = tmp_path / "run"
    process = start(data, output, "train.steps=2000", "train.checkpoint_every=1")
    wait_for_step(output, 3, process)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"gradcache-clip train {output}/config.yaml train.resume=true" in messages
    step = max(logged(output, "loss"))
    assert (output / "checkpoints" / f"step-{step:08d}").is_dir()
    assert not json.loads((output / "summary.json").read_text())["finished"]
    resumed = run(data, output, "train.checkpoint_every=1", f"train.steps={step + 1}",
                  "train.resume=true")  # fmt: skip
    assert resumed.finished and resumed.step == step + 1


@pytest.mark.parametrize("name", ["save", "_log_row"])
def test_ctrl_c_anywhere_in_a_step_still_saves(data, tmp_path, monkeypatch, name):
    output = tmp_path / "a run"
    place = TrainState if name == "save" else fit
    original = getattr(place, name)

    def interrupted(state, *arguments):
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(state, *arguments)

    monkeypatch.setattr(place, name, interrupted)
    console = Console(file=io.StringIO())
    config = load_config(None, overrides(data, output, "train.checkpoint_every=3"))
    summary = train(config, console=console)
    assert (summary.step, summary.finished) == (3, False)
    assert (output / "checkpoints" / "step-00000003").is_dir()
    assert f"train '{output}/config.yaml' train.resume=true" in console.file.getvalue()


def test_an_error_in_the_middle_saves_what_was_trained(data, tmp_path, monkeypatch):
    original = training.take_step

    def fails(backward, *arguments):
        fails.calls += 1
        if fails.calls == 5:
            raise ValueError("a bad batch")
        return original(backward, *arguments)

    fails.calls = 0
    monkeypatch.setattr(training, "take_step", fails)
    with pytest.raises(ValueError, match="a bad batch"):
        run(data, tmp_path / "run", "train.checkpoint_every=0")
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()


def test_weights_that_are_nan_are_never_saved(data, tmp_path, monkeypatch):
    original = training.take_step

    def poisons(backward, *arguments):
        result = original(backward, *arguments)
        poisons.calls += 1
        if poisons.calls == 3:
            with torch.no_grad():
                arguments[2].param_groups[0]["params"][0].view(-1)[0] = float("nan")
        return result

    poisons.calls = 0
    monkeypatch.setattr(training, "take_step", poisons)
    with pytest.raises(ValueError, match=r"weights: expected finite numbers after step 3.*in imag"):
        run(data, tmp_path / "run", "train.checkpoint_every=1")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002"]


def test_validation_data_are_looked_for_before_training(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(data, tmp_path / "run", f"data.validation={tmp_path}/nowhere")
    assert not (tmp_path / "run").exists()


def test_a_failed_evaluation_loses_no_training(data, tmp_path):
    (tmp_path / "empty").mkdir()
    with tarfile.open(tmp_path / "empty" / "shard-0.tar", "w"):
        pass
    with pytest.raises(ValueError, match="at least one sample"):
        run(data, tmp_path / "run", f"data.validation={tmp_path}/empty", "train.steps=3")
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()


def test_rates_leave_out_what_is_no_training():
    meter = fit.Meter()
    time.sleep(0.05)
    meter.count(10)
    with meter.paused():
        time.sleep(0.5)
    time.sleep(0.05)
    meter.count(10)
    rates = meter.rates()
    assert 100 <= rates["step_ms"] * 2 < 400
    assert rates["pairs_per_s"] == pytest.approx(20_000 / (2 * rates["step_ms"]))
    assert meter.samples == 20


def test_a_finished_run_that_is_resumed_keeps_its_summary(whole, data):
    output, summary = whole
    again = run(data, output, "train.resume=true")
    assert again == summary
    assert set(logged(output, "loss")) == set(range(1, 9))


def test_a_longer_run_is_resumed_from_its_own_config(data, tmp_path):
    run(data, tmp_path / "run", "train.steps=3")
    run(data, tmp_path / "run", "train.steps=5", "train.resume=true")
    assert load_config(tmp_path / "run" / "config.yaml").train.steps == 5


def test_resuming_where_no_run_is(data, tmp_path):
    with pytest.raises(ConfigError, match="expected the folder of a run, got .*typo"):
        run(data, tmp_path / "typo", "train.resume=true")
    assert not (tmp_path / "typo").exists()


def test_a_config_of_another_program_is_left_alone(data, tmp_path):
    (tmp_path / "config.yaml").write_text("other_tool: 1\n")
    with pytest.raises(ConfigError, match="holds other files"):
        run(data, tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "other_tool: 1\n"


def test_broken_samples_are_counted_in_the_summary(data, tmp_path):
    shards = tmp_path / "train"
    shutil.copytree(data / "train", shards)
    (shards / "manifest.json").unlink()
    with tarfile.open(next(shards.glob("*.tar")), "a") as archive:
        for name, content in (("bad.png", b"no image"), ("bad.txt", b"a caption")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    summary = run(data, tmp_path / "run", f"data.train={shards}", "train.steps=16")
    assert list(summary.skipped) == ["undecodable image"] and sum(summary.skipped.values()) >= 1


def test_an_existing_run_is_never_overwritten(whole, data):
    output, _ = whole
    before = (output / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a run; continue it with train\.resume=true"):
        run(data, output)
    with pytest.raises(ConfigError, match=r"other values: train\.batch_size 24 -> 16"):
        run(data, output, "train.resume=true", "train.batch_size=16")
    assert (output / "metrics.jsonl").read_bytes() == before


def test_a_start_that_failed_leaves_nothing_in_the_way(data, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(ValueError, match="vit_tiny_patch16_224"):
        run(data, output, "model.image=vit_tiny_patch16_242")
    assert not output.exists()
    with pytest.raises(ValueError, match="batch_size: expected a data set of one batch"):
        run(data, output, "train.batch_size=100000")
    assert run(data, output, "train.steps=3").finished


def test_a_folder_with_other_files_is_left_alone(data, tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(ConfigError, match="holds other files"):
        run(data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.train=nowhere/shards", "nowhere/shards"),
        ("optimizer.warmup_steps=8", "warmup_steps: expected 0 to less than the 8 steps"),
        ("train.batch_size=100000", "batch_size: expected a data set of one batch or more"),
        ("model.image=vit_tiny_patch16_242", "vit_tiny_patch16_224"),
        ("train.device=cuda:77", "train.device: expected a device of this machine, got 'cuda:77'"),
    ],
)
def test_mistakes_end_with_one_line(data, tmp_path, capsys, change, message):
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    assert main(["train", str(config), *overrides(data, tmp_path / "run", change)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_chunk_negatives_average_the_losses_of_the_chunks(data, tmp_path):
    """At a scale near zero a loss is the logarithm of the number of pairs that compete."""
    more = ["train.steps=3", "train.chunk_size=12", "loss.init_logit_scale=0.01"]
    run(data, tmp_path / "chunk", *more, "train.grad_cache=false")
    run(data, tmp_path / "batch", *more)
    chunk, batch = (logged(tmp_path / name, "loss")[1] for name in ("chunk", "batch"))
    assert chunk == pytest.approx(math.log(12), abs=0.01)
    assert batch == pytest.approx(math.log(24), abs=0.01)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains(data, tmp_path, precision):
    summary = run(data, tmp_path / "run", f"train.precision={precision}", "train.steps=3")
    assert summary.finished and 0 < summary.loss < 10


def test_evaluate_prints_recall_and_zero_shot(whole, capsys):
    output, summary = whole
    assert main(["evaluate", str(output), "--zero-shot", "the character {}"]) == 0
    printed = capsys.readouterr().out
    expected = summary.metrics["text_to_image_recall_at_1"]
    assert "R@1" in printed and f"{expected:.1%}" in printed
    assert "zero-shot accuracy among the first 5" in printed


def test_evaluate_of_no_run(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "has no config.yaml" in capsys.readouterr().err


DEMO = Path(__file__).parent.parent / "examples" / "demo.yaml"


def test_a_run_of_an_older_version_ends_in_one_line(data, tmp_path, capsys):
    run_folder = tmp_path / "old"
    (run_folder / "checkpoints").mkdir(parents=True)
    (run_folder / "config.yaml").write_text("train: {negatives: batch, inputs: device}")
    resume = ["train", str(DEMO), f"train.output={run_folder}", "train.resume=true"]
    for command in (["evaluate", str(run_folder)], ["verify", str(run_folder)], resume):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "expected a run of this version" in line
        assert "train.negatives: no such key; it is called train.grad_cache now" in line
