"""The comparison of two commits: one bit of one weight is a difference, a new name is none."""

from __future__ import annotations

import json
from pathlib import Path

import compare_commits
import numpy as np
import pytest
import short_runs
from safetensors.numpy import save_file

WEIGHTS = np.linspace(-1, 1, 12, dtype=np.float32)


def write_run(folder: Path, weights: np.ndarray = WEIGHTS, name: str = "w", loss: float = 2.5):
    """A run of two steps."""
    figures = {"accuracy": 0.5, "grad_norm": 1.0, "logit_scale": 14.0}
    for step in (1, 2):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        save_file({name: weights, "other": WEIGHTS + step}, checkpoint / "encoder.safetensors")
    rows = [{"step": step, "loss": loss, **figures} for step in (1, 2)]
    rows.append({"step": 2, "recall": 0.1})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"metrics": {"recall": 0.1}}))


def equal(monkeypatch: pytest.MonkeyPatch, **changes: object) -> bool:
    """What `main` says of two runs, the second of which is changed."""

    def train(side, recipe, data, output):
        write_run(output, **(changes if output.name.endswith("b") else {}))
        return True

    monkeypatch.setattr(compare_commits, "_train", train)
    return not compare_commits.main([".", ".", "--recipes", "clip"])


def test_equal_runs_are_equal_whatever_their_tensors_are_called(monkeypatch, capsys):
    assert equal(monkeypatch) and equal(monkeypatch, name="x")
    assert "named in B alone: 1, such as encoder: x" in capsys.readouterr().out


def test_the_last_bit_of_a_weight_is_a_difference(monkeypatch, capsys):
    moved = WEIGHTS.copy()
    moved[-1] = np.nextafter(moved[-1], np.float32(2))
    assert not equal(monkeypatch, weights=moved)
    assert "differ by 1.2e-07, most in encoder: w" in capsys.readouterr().out


def test_a_loss_is_a_difference(monkeypatch, capsys):
    assert not equal(monkeypatch, loss=2.75)
    assert "differs by 2.5e-01" in capsys.readouterr().out


def test_settings_are_those_of_the_checkout(tmp_path):
    """A commit from before short_runs.py gets ours; keys of another name are replaced by hand."""
    more = {"overrides": ("train.rows=10",), "without": ("train.chunk_size",)}
    places = tmp_path / "data", tmp_path / "run"
    found = compare_commits.Side("A", tmp_path, **more).settings("clip", *places)
    assert found[-1] == "train.rows=10" and "train.batch_size=24" in found
    assert set(short_runs.settings("clip", *places)) - set(found) == {"train.chunk_size=10"}
    own = tmp_path / "benchmarks" / "short_runs.py"
    own.parent.mkdir()
    own.write_text("def settings(recipe, data, output):\n    return ['train.rows=3']\n")
    assert compare_commits.Side("A", tmp_path).settings("clip", *places)[0] == "train.rows=3"
