"""The programs in examples/ run."""

from __future__ import annotations

import importlib.util
import io
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import make_data, overrides

from gradcache_clip.train import run as training
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.run import train

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_minimal_loop(tmp_path: Path):
    make_data(tmp_path, characters=220)
    command = [sys.executable, str(EXAMPLES / "minimal_loop.py"), str(tmp_path / "train"), "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("step 0  loss 6.")


def test_minimal_loop_is_short():
    assert len((EXAMPLES / "minimal_loop.py").read_text().splitlines()) <= 50


def test_the_demo_compares_two_runs(tmp_path: Path):
    data = make_data(tmp_path / "data")
    cached, accumulated = tmp_path / "run", tmp_path / "run" / "accumulated"
    for output, caching in ((cached, "true"), (accumulated, "false")):
        more = ["train.steps=3", f"train.grad_cache={caching}"]
        train(load_config(None, overrides(data, output, *more)))
    console = Console(file=io.StringIO(), width=200)
    _demo().report(cached, accumulated, console)
    printed = console.file.getvalue()
    assert "cached, batch of 24" in printed and "accumulated, chunks of 10" in printed
    assert "R@1 text → image" in (cached / "table.md").read_text(encoding="utf-8")
    assert "tensors of a plain step" in printed


def test_the_demo_ends_where_its_data_cannot_be_made(monkeypatch: pytest.MonkeyPatch):
    demo, commands = _demo(), []
    monkeypatch.setattr(demo.subprocess, "call", lambda command: commands.append(command) or 2)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--data", "glyphs"])
    assert demo.main() == 2
    assert commands == [[sys.executable, str(EXAMPLES / "data" / "glyphs.py"), "data/glyphs"]]


def test_the_demo_recipe_loads():
    config = load_config(EXAMPLES / "demo.yaml")
    assert (config.train.batch_size, config.train.grad_cache) == (1024, True)


def test_the_deepspeed_example_hands_both_files_on(monkeypatch):
    given = []
    monkeypatch.setattr(training, "train", lambda config: given.append(config) or Finished())
    files = ["--config", str(EXAMPLES / "demo.yaml"), "--deepspeed_config", "ds.json"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--local_rank=1", *files, "train.steps=20"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLES / "deepspeed" / "train.py"))
    (config,) = given
    assert (config.train.batch_size, config.train.steps) == (1024, 20)
    assert config.distributed.strategy == "deepspeed"
    assert config.distributed.deepspeed_config == "ds.json"


class Finished:
    finished = True


def _demo():
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
