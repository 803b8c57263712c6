"""How commands end: one line and status 2 for what a person can mend, a traceback for bugs."""

from __future__ import annotations

import logging
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gradcache_clip.cache import ReplayMismatchError
from gradcache_clip.cli import main
from gradcache_clip.train import command
from gradcache_clip.train import evaluate as evaluate_module
from gradcache_clip.train import run as training
from gradcache_clip.train.checkpoint import CheckpointError, DamagedCheckpointError
from gradcache_clip.train.config_errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text("{}")
    return str(path)


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


def last_line(text: str) -> str:
    """The one line there is."""
    (line,) = text.splitlines()
    return line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("train.steps: no"), "gradcache-clip: train.steps: no"),
        (ValueError("two\nlines"), "gradcache-clip: two lines"),
        (ValueError(), "gradcache-clip: ValueError"),
        (FileNotFoundError("shards: none"), "gradcache-clip: shards: none"),
        (CheckpointError("run/checkpoints: none is good"), "gradcache-clip: run/checkpoints: none"),
        (DamagedCheckpointError("step-1: cut"), "gradcache-clip: step-1: cut"),
        (ReplayMismatchError("chunk 3"), "gradcache-clip: chunk 3"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "memory.'; lower train.chunk_size"),
        (MemoryError(), "lower train.chunk_size"),
        (ModuleNotFoundError("No module", name="timm.models"), "timm: expected it to be installed"),
        (ModuleNotFoundError("No module", name="omegaconf"), 'pip install "gradcache-clip[train]"'),
    ],
)
def test_expected_errors_end_with_one_line(
    error: Exception, said: str, config: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(training, "train", failing(error))
    assert main(["train", config]) == 2
    line = last_line(capsys.readouterr().err)
    assert line.startswith("gradcache-clip: ") and said in line


@pytest.mark.parametrize("arguments", [["--traceback", "train"], ["train", "--traceback"]])
def test_a_traceback_on_request(
    arguments: list[str], config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "train", failing(CheckpointError("cut")))
    with pytest.raises(CheckpointError):
        main([*arguments, config])


@pytest.mark.parametrize(
    "bug",
    [
        RuntimeError("shapes differ"),
        KeyError("name"),
        ModuleNotFoundError("No module", name="gradcache_clip.nope"),
    ],
)
def test_bugs_keep_their_traceback(
    bug: Exception, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "train", failing(bug))
    with pytest.raises(type(bug)):
        main(["train", config])


def test_an_interrupt_is_no_error(config: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(training, "train", failing(KeyboardInterrupt()))
    assert main(["train", config]) == 130
    assert last_line(capsys.readouterr().err) == "gradcache-clip: interrupted"


def test_before_checkpoints_are_loaded_there_are_no_errors_of_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "gradcache_clip.train.checkpoint")
    assert command._loaded("checkpoint", "CheckpointError") == ()


def run_module(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """As `python -m gradcache_clip.train` does; the exit code."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    # At its end a process no longer hears interrupts; this one goes on.
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("gradcache_clip.train", run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, handler)
    return ended.value.code


@pytest.mark.parametrize("arguments", [["nope.yaml", "train.steps=3"], ["nope.yaml"]])
def test_the_module_ends_like_the_command(arguments: list[str], monkeypatch, capsys) -> None:
    assert run_module(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    line = last_line(printed.err)
    assert line.startswith("python -m gradcache_clip.train: config: expected a YAML file, got nope")


def test_the_module_has_help_and_needs_a_config(monkeypatch, capsys) -> None:
    assert run_module(monkeypatch, "--help") == 0
    assert "SECTION.KEY=VALUE" in capsys.readouterr().out
    assert run_module(monkeypatch) == 2


def test_the_device_of_an_evaluation_may_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        evaluate_module, "evaluate_run", lambda run, **options: calls.append((run, options))
    )
    assert main(["evaluate", str(tmp_path), "--device", "cpu"]) == 0
    assert main(["evaluate", str(tmp_path), "--data", "x", "--zero-shot", "a {}"]) == 0
    plain = {
        **{"data": None, "templates": (), "device": None, "folds": None},
        "allow_url_schemes": (),
    }
    assert calls == [
        (tmp_path, {**plain, "device": "cpu"}),
        (tmp_path, {**plain, "data": "x", "templates": ("a {}",)}),
    ]


def test_other_libraries_speak_only_when_needed(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])

    def chatter(*args: object) -> None:
        logging.getLogger("another.library").info("hello")
        logging.getLogger("another.library").warning("mind this")
        raise ConfigError("stop")

    monkeypatch.setattr(training, "train", chatter)
    assert main(["train", config]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error == ["WARNING: mind this", "gradcache-clip: stop"]


def test_an_interrupt_when_all_is_done_changes_nothing(tmp_path: Path) -> None:
    """Libraries clean up as a process ends; a Ctrl-C there printed a traceback, or killed it."""
    interrupt = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    run = "from gradcache_clip.cli import command; command()"
    missing = str(tmp_path / "missing")
    program = [sys.executable, "-c", f"{interrupt}; {run}", "data", "folder", missing, missing]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "folder: expected a folder of images" in last_line(done.stderr)
