"""Run folders, configurations and checkpoints from strangers: nothing runs, one line says why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_run import make_data, overrides
from torch import Tensor

from gradcache_clip.cli import main
from gradcache_clip.train import run as training
from gradcache_clip.train.checkpoint import CheckpointError, load_latest, save_checkpoint
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config, save_config
from gradcache_clip.train.folder_lock import locked
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.programs import program_of
from gradcache_clip.train.run_folder import RunFolder
from gradcache_clip.train.state import TrainState, start

MOMENTS = "image_projection.weight"
SHORT = ("train.seed=1", "optimizer.warmup_steps=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("glyphs"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    output = tmp_path_factory.mktemp("runs") / "run"
    with mock.patch.object(training, "draw_run"):
        training.train(load_config(None, overrides(data, output, "train.steps=2", *SHORT)))
    return output


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be altered."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def settings(data: Path, run: Path, *more: str) -> list[str]:
    """Three steps instead of two, so that one is left."""
    return overrides(data, run, "train.steps=3", *SHORT, "train.resume=true", *more)


def resumed(data: Path, run: Path) -> TrainState:
    program = program_of(load_config(None, settings(data, run)))
    state, _ = start(program, RunFolder(run), Peers())
    return state


def alter(run: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Write the newest checkpoint again, with sizes and digests that agree."""
    checkpoint = load_latest(run / "checkpoints")
    assert checkpoint is not None
    change(checkpoint.modules, checkpoint.state)
    save_checkpoint(
        run / "checkpoints", checkpoint.step, modules=checkpoint.modules, state=checkpoint.state
    )


def moment(key: str, change: Callable[[Tensor], Any]) -> Callable[[Any, Any], None]:
    def changed(_: Any, state: Any) -> None:
        moments = state["optimizer"][MOMENTS]
        moments[key] = change(moments[key])

    return changed


def without(*path: str) -> Callable[[Any, Any], None]:
    def changed(modules: Any, state: Any) -> None:
        place = {"modules": modules, **state}
        for key in path[:-1]:
            place = place[key]
        (state if len(path) == 1 else place).pop(path[-1])

    return changed


def setting(value: Any, *path: str) -> Callable[[Any, Any], None]:
    def changed(modules: Any, state: Any) -> None:
        place: Any = {"modules": modules, "state": state}
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return changed


ALTERED: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "larger moment": (moment("exp_avg", lambda m: torch.zeros(99, 99)), "shape"),
    "smaller moment": (moment("exp_avg_sq", lambda m: m[:1].clone()), "shape"),
    "turned moment": (moment("exp_avg", lambda m: m.T.contiguous()), "shape"),
    "flat moment": (moment("exp_avg", lambda m: m.flatten()), "shape"),
    "whole numbers": (moment("exp_avg", lambda m: m.long()), "floating-point"),
    "steps below 0": (moment("step", lambda m: -m), "number of steps"),
    "steps that are NaN": (moment("step", lambda m: m * torch.nan), "number of steps"),
    "text as a moment": (moment("exp_avg", lambda m: "x"), "a tensor or a number"),
    "no square": (without("optimizer", MOMENTS, "exp_avg_sq"), "exp_avg_sq"),
    "no moments of one": (without("optimizer", MOMENTS), MOMENTS),
    "no optimizer": (without("optimizer"), "optimizer"),
    "moments as a list": (setting([1], "state", "optimizer", MOMENTS), "mapping of moments"),
    "another weight": (setting(torch.ones(3), "modules", "encoder", MOMENTS), "shape"),
    "a weight less": (without("modules", "encoder", MOMENTS), MOMENTS),
    "another scale": (setting(torch.ones(3), "modules", "loss", "log_logit_scale"), "scale"),
    "no loss": (without("modules", "loss"), "loss"),
    "no position": (without("loader"), "loader"),
    "position as text": (setting("here", "state", "loader"), "str"),
    "no generators": (without("rng"), "rng"),
    "a short generator": (setting([{"torch": torch.zeros(3)}], "state", "rng"), "state"),
}


@pytest.mark.filterwarnings("ignore:.*weights_only.*")
@pytest.mark.parametrize("kind", ALTERED)
def test_an_altered_checkpoint_is_refused(data: Path, run: Path, kind: str) -> None:
    change, message = ALTERED[kind]
    alter(run, change)
    with pytest.raises(CheckpointError, match=f"step-00000002: expected .*{message}"):
        resumed(data, run)


def test_moments_of_a_scale_may_be_negative(data: Path, run: Path) -> None:
    def negative(_: Any, state: Any) -> None:
        moments = state["optimizer"]["log_logit_scale"]
        moments["exp_avg"] = -moments["exp_avg"].abs() - 1

    alter(run, negative)
    assert resumed(data, run).step == 2


def test_a_moment_that_repeats_one_number_gets_room(data: Path, run: Path) -> None:
    """An expanded tensor has the right shape and one element: a fused step would write past it."""
    state = resumed(data, run)
    parameter = dict(state.encoder.named_parameters())[MOMENTS]
    engine = state.engine
    found = engine.state()
    found["optimizer"][MOMENTS]["exp_avg"] = torch.ones(1, 1).expand(parameter.shape)
    engine.load_state(found)
    assert engine.optimizer.state[parameter]["exp_avg"].is_contiguous()


def test_an_altered_checkpoint_ends_in_one_line(data: Path, run: Path, capsys: Any) -> None:
    alter(run, ALTERED["larger moment"][0])
    (run / "empty.yaml").write_text("{}")
    (run / "empty.yaml").rename(run.parent / "empty.yaml")
    assert main(["train", str(run.parent / "empty.yaml"), *settings(data, run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"expected shape (8, 16) for {MOMENTS}.exp_avg, got shape (99, 99)" in line


FILES = {
    "summary.json": ("[1]", "expected an object, got a list"),
    "tokenizer.json": ("{}", "tokenizer"),
    "metrics.jsonl": ("[]\n", "line 1: expected a JSON object with a step"),
    "config.yaml": ("train: [1]\n", "expected keys with values"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["own", "\x00\n", "[" * 5000 + "\n"], ids=["own", "0", "deep"])
def test_an_altered_file_ends_in_one_line(
    data: Path, run: Path, capsys: Any, name: str, content: str
) -> None:
    text, message = FILES[name]
    (run / name).write_text(text if content == "own" else content)
    config = run.parent / "empty.yaml"
    config.write_text("{}")
    assert main(["train", str(config), *settings(data, run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line or message in line


def written(run: Path, text: str) -> None:
    """Add to the configuration of a run."""
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config + text)


@pytest.mark.parametrize("command", ["evaluate", "verify"])
def test_a_run_folder_runs_no_command(run: Path, tmp_path: Path, capsys: Any, command: str) -> None:
    target = tmp_path / "executed"
    config = json.loads(json.dumps(load_config(run / "config.yaml").model_dump()))
    for name in ("train", "validation"):
        config["data"][name] = f"pipe:touch {target}"
    config["data"]["allow_url_schemes"] = ["pipe"]
    (run / "config.yaml").write_text(json.dumps(config))
    assert main([command, str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected on the command line alone, got ['pipe'] in" in line
    del config["data"]["allow_url_schemes"]
    (run / "config.yaml").write_text(json.dumps(config))
    assert main([command, str(run)]) == 2
    error = capsys.readouterr().err
    assert "expected 'pipe' in it" in error and "on the command line" in error
    assert not target.exists()


def test_the_command_line_allows_what_a_file_cannot(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: {allow_url_schemes: [https, pipe]}")
    for more in ([], ["data.allow_url_schemes=[https]"]):
        with pytest.raises(ConfigError, match=r"command line alone, got \['https', 'pipe'\] in .*y"):
            load_config(file, more)
    file.write_text("data: {allow_url_schemes: []}")
    allowed = load_config(file, ["data.allow_url_schemes=[https]"])
    assert allowed.data.allow_url_schemes == ["https"]
    save_config(allowed, file)
    assert load_config(file).data.allow_url_schemes == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.image=hf-hub:someone/model", "model.image: expected the name of a timm model"),
        ("model.image=local-dir:/tmp/model", "model.image: expected the name of a timm model"),
        ("model.image_kwargs.checkpoint_path=x.pth", "image_kwargs.checkpoint_path: expected siz"),
        ("model.image_kwargs.pretrained_cfg={file: x}", "image_kwargs.pretrained_cfg: expected"),
        ("model.text_kwargs.trust_remote_code=true", "text_kwargs.trust_remote_code: expected"),
        ("model.text_kwargs.auto_map={a: b}", "text_kwargs.auto_map: expected sizes"),
        ("model.text_kwargs.attn_implementation=a/b", "attn_implementation: expected one of eag"),
        ("model.text_kwargs._attn_implementation=a/b", "attn_implementation: expected one of e"),
        ("data.vocab_size=1000000000000", "data.vocab_size: expected at most 16,777,216, got 1"),
        ("train.batch_size=1000000000000", "train.batch_size: expected at most 2,147,483,648"),
        ("train.output=a\0b", "train.output: expected text without null bytes"),
    ],
)
def test_settings_that_name_code_or_cannot_be(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [setting])


def test_resuming_loads_no_weights_that_the_configuration_names(data: Path, run: Path) -> None:
    """Those of the checkpoint are all; the file that training began with may be gone."""
    folder, weights = RunFolder(run), "/nowhere/weights.safetensors"
    config = load_config(run / "config.yaml").updated({"model.image_weights": weights})
    alter(run, setting(weights, "state", "run", "settings", "model.image_weights"))
    assert folder.trained(config).model.image_weights == ""
    program = program_of(config.updated({"train.resume": True, "train.steps": 3}))
    state, _ = start(program, folder, Peers())
    assert state.step == 2


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text", [BOMB, "a: " + "[" * 100_000, "a: " + "{b: " * 1000, "x: " + "y" * 300_000, "&a [*a]"]
)
def test_yaml_that_grows_ends_quickly(tmp_path: Path, text: str) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigError, match=r"bomb\.yaml: expected"):
        load_config(tmp_path / "bomb.yaml")
    assert time.process_time() - began < 5


LINKS = ["summary.json", "config.yaml", "metrics.jsonl", "checkpoints", "pictures", "x.tmp"]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_a_run_folder_is_not_followed(data: Path, run: Path, name: str) -> None:
    outside = run.parent / "outside"
    if (run / name).exists():
        (run / name).rename(outside)
    else:
        outside.mkdir()
    (run / name).symlink_to(outside)
    before = {path: path.stat().st_mtime_ns for path in [outside, *outside.rglob("*")]}
    with pytest.raises(ConfigError, match=f"got the symbolic link .*{name}"):
        training.train(load_config(None, settings(data, run)))
    assert before == {path: path.stat().st_mtime_ns for path in [outside, *outside.rglob("*")]}


def test_two_runs_in_one_folder(data: Path, run: Path) -> None:
    with locked(run), pytest.raises(ConfigError, match=f"process {os.getpid()} on .* trains in"):
        training.train(load_config(None, settings(data, run)))
    with mock.patch.object(training, "draw_run"):
        assert training.train(load_config(None, settings(data, run))).finished


HOLDS = """
import sys, time
from pathlib import Path
from gradcache_clip.train.folder_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=f"process {process.pid} on"),
            locked(tmp_path / "run"),
        ):
            pass
        process.kill()
        process.wait()
    with locked(tmp_path / "run"):
        pass
