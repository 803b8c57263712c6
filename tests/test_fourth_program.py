"""The program of docs/architecture.md: one file and one line make a program of one's own."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import logged

from gradcache_clip.train import programs
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.run import train

PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
CODE = re.compile(r"<!-- test: fourth program -->\n```python\n(.*?)```", re.S)


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = CODE.findall(PAGE.read_text(encoding="utf-8"))
    file = tmp_path / "digits.py"
    file.write_text(code)
    name = "gradcache_clip.train.programs.digits"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(programs.PROGRAMS, "digits", "Digits")


def settings(output: Path, *more: str) -> list[str]:
    sizes = ["train.batch_size=256", "train.chunk_size=48", "optimizer.warmup_steps=1"]
    return [
        "program=digits",
        *sizes,
        *("train.steps=12", "optimizer.learning_rate=0.01", "train.device=cpu"),
        f"train.output={output}",
        *more,
    ]


@pytest.mark.usefixtures("digits")
def test_the_program_of_the_page_trains_and_resumes(tmp_path: Path) -> None:
    run, quiet = tmp_path / "run", Console(quiet=True)
    more = ["train.checkpoint_every=5", "train.keep_checkpoints=9"]
    assert train(load_config(None, settings(run, *more)), console=quiet).finished
    losses = logged(run, "loss")
    assert losses[12] < losses[1] - 0.3
    assert (run / "pictures" / "curves.png").exists()
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    more += ["train.resume=true", "data.workers=2"]
    assert train(load_config(None, settings(run, *more)), console=quiet).step == 12
    assert logged(run, "loss") == losses


@pytest.mark.usefixtures("digits")
def test_its_configuration_is_its_own(tmp_path: Path) -> None:
    assert load_config(None, settings(tmp_path, "model.hidden=8")).model.hidden == 8
    with pytest.raises(ConfigError, match=r"model.image: no such key with program=digits"):
        load_config(None, settings(tmp_path, "model.image=convnext_atto"))
