"""Checkpoints: exact, whole or recognised as damaged, and safe to read from strangers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from gradcache_clip.train.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    capture_rng,
    load_checkpoint,
    load_latest,
    restore_rng,
    save_checkpoint,
    seed_rng,
)
from gradcache_clip.train.checkpoint import files as checkpoint_files


def save(folder: Path, step: int, *, keep: int = 3, value: float | None = None) -> Path:
    fill = float(step if value is None else value)
    weights = {"a": {"weight": torch.full((40, 5), fill)}, "b": {"bias": torch.full((3,), fill)}}
    return save_checkpoint(folder, step, modules=weights, state={"value": fill}, keep=keep)


def value_of_latest(folder: Path) -> tuple[int, float]:
    checkpoint = load_latest(folder)
    assert checkpoint is not None
    value = checkpoint.state["value"]
    assert (checkpoint.modules["a"]["weight"] == value).all()
    assert (checkpoint.modules["b"]["bias"] == value).all()
    return checkpoint.step, value


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class TestExactness:
    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]
    )
    def test_weights_return_bit_for_bit(self, tmp_path: Path, dtype: torch.dtype) -> None:
        weights = {
            "matrix": (torch.randn(7, 3) * 100).to(dtype),
            "scalar": torch.tensor(3).to(dtype),
            "empty": torch.empty(0, 4, dtype=dtype),
            "flags": torch.tensor([True, False]),
        }
        path = save_checkpoint(tmp_path, 0, modules={"m": weights}, state={})
        loaded = load_checkpoint(path).modules["m"]
        assert loaded.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)

    def test_nan_infinity_and_negative_zero_survive(self, tmp_path: Path) -> None:
        tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
        save_checkpoint(tmp_path, 0, modules={"m": {"x": tensor}}, state={"x": tensor})
        checkpoint = load_latest(tmp_path)
        assert checkpoint is not None
        for loaded in (checkpoint.modules["m"]["x"], checkpoint.state["x"]):
            assert torch.equal(loaded.view(torch.int32), tensor.view(torch.int32))

    def test_tied_weights_stay_tied(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        save_checkpoint(tmp_path, 1, modules={"m": model.state_dict()}, state={})
        checkpoint = load_latest(tmp_path)
        assert checkpoint is not None
        loaded = checkpoint.modules["m"]
        assert loaded["0.weight"] is loaded["1.weight"]
        assert torch.equal(loaded["1.weight"], model[0].weight)
        assert not torch.equal(loaded["0.bias"], loaded["1.bias"])

    def test_views_of_one_memory_return_exactly(self, tmp_path: Path) -> None:
        memory = torch.randn(6, 4)
        views = {
            "all": memory,
            "rows": memory[2:5],
            "turned": memory.T,
            "shaped": memory.view(4, 6),
            "strided": memory[:, ::2],
            "broadcast": torch.ones(1).expand(5),
        }
        save_checkpoint(tmp_path, 1, modules={"m": views}, state={})
        checkpoint = load_latest(tmp_path)
        assert checkpoint is not None
        for name, view in views.items():
            assert torch.equal(checkpoint.modules["m"][name], view), name

    def test_loaded_tensors_do_not_depend_on_the_files(self, tmp_path: Path) -> None:
        path = save(tmp_path, 5)
        checkpoint = load_checkpoint(path)
        for file in path.iterdir():
            file.write_bytes(b"\0" * file.stat().st_size)
        assert (checkpoint.modules["a"]["weight"] == 5).all()

    def test_loaded_weights_can_be_saved_again(self, tmp_path: Path) -> None:
        save(tmp_path, 1)
        first = load_latest(tmp_path)
        assert first is not None
        save_checkpoint(tmp_path, 2, modules=first.modules, state=first.state)
        assert value_of_latest(tmp_path) == (2, 1.0)

    def test_optimizer_goes_on_as_if_never_stopped(self, tmp_path: Path) -> None:
        def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
            return model, torch.optim.AdamW(model.parameters(), lr=0.01)

        def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[Tensor]:
            losses = []
            for _ in range(count):
                loss = model(torch.randn(16, 8)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return losses

        model, optimizer = model_and_optimizer()
        steps(model, optimizer, 3)
        moments = {str(key): value for key, value in optimizer.state_dict()["state"].items()}
        state = {"optimizer": moments, "rng": capture_rng()}
        save_checkpoint(tmp_path, 3, modules={"model": model.state_dict()}, state=state)
        expected = steps(model, optimizer, 3)

        model, optimizer = model_and_optimizer()
        checkpoint = load_latest(tmp_path)
        assert checkpoint is not None
        model.load_state_dict(checkpoint.modules["model"])
        moments = {int(key): value for key, value in checkpoint.state["optimizer"].items()}
        settings = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": settings})
        restore_rng(checkpoint.state["rng"])
        assert torch.equal(torch.stack(expected), torch.stack(steps(model, optimizer, 3)))


class TestRandomState:
    def draw(self) -> list[Any]:
        return [
            torch.rand(3).tolist(),
            torch.randn(17).tolist(),
            numpy.random.rand(3).tolist(),
            numpy.random.randn(),
            random.random(),
            random.gauss(0, 1),
        ]

    def test_every_generator_repeats_after_a_seed(self) -> None:
        seed_rng(2**40 + 3)
        expected = self.draw()
        seed_rng(2**40 + 3)
        assert self.draw() == expected
        seed_rng(2**40 + 4)
        assert not any(a == b for a, b in zip(self.draw(), expected, strict=True))

    def test_every_generator_repeats_after_a_round_through_a_file(self, tmp_path: Path) -> None:
        # One Gaussian leaves half a Box-Muller pair behind, which is part of the state.
        numpy.random.randn(), random.gauss(0, 1)
        save_checkpoint(tmp_path, 0, modules={}, state={"rng": capture_rng()})
        expected = self.draw()
        self.draw()
        checkpoint = load_latest(tmp_path)
        assert checkpoint is not None
        restore_rng(checkpoint.state["rng"])
        assert self.draw() == expected

    def test_capture_draws_nothing(self) -> None:
        state = capture_rng()
        expected = self.draw()
        restore_rng(state)
        capture_rng()
        assert self.draw() == expected

    def test_missing_devices_are_said(self) -> None:
        state = capture_rng() | {"cuda": [torch.get_rng_state()] * 99}
        with pytest.warns(RuntimeWarning, match="saved with 99 CUDA devices"):
            restore_rng(state)


class TestWhichCheckpoint:
    def test_nothing_there(self, tmp_path: Path) -> None:
        assert load_latest(tmp_path) is None
        assert load_latest(tmp_path / "missing") is None

    def test_newest_by_number_not_by_name_or_time(self, tmp_path: Path) -> None:
        for step in (99_999_999, 100_000_000, 3):
            save(tmp_path, step, keep=5)
        assert value_of_latest(tmp_path) == (100_000_000, 100_000_000.0)

    def test_keeps_the_last_k(self, tmp_path: Path) -> None:
        for step in range(5):
            save(tmp_path, step, keep=2)
        assert names_in(tmp_path) == ["step-00000003", "step-00000004"]

    def test_damaged_ones_do_not_count_as_kept(self, tmp_path: Path) -> None:
        for step in (1, 2, 3):
            save(tmp_path, step)
        (tmp_path / "step-00000003" / "index.json").unlink()
        save(tmp_path, 4, keep=2)
        assert names_in(tmp_path) == ["step-00000002", "step-00000004"]

    def test_other_files_in_the_folder_are_left_alone(self, tmp_path: Path) -> None:
        for name in ("step-final", "step-", "notes.txt", ".tmp-other", "step-3x"):
            (tmp_path / name).mkdir()
        (tmp_path / "step-00000009").write_text("a file, no folder")
        save(tmp_path, 1, keep=1)
        save(tmp_path, 2, keep=1)
        assert value_of_latest(tmp_path)[0] == 2
        assert len(names_in(tmp_path)) == 7

    def test_same_step_again_replaces(self, tmp_path: Path) -> None:
        save(tmp_path, 1, value=10)
        save(tmp_path, 1, value=20)
        assert value_of_latest(tmp_path) == (1, 20.0)
        assert names_in(tmp_path) == ["step-00000001"]

    def test_an_older_branch_does_not_remove_newer_steps(self, tmp_path: Path) -> None:
        save(tmp_path, 9)
        save(tmp_path, 1, keep=1)
        assert value_of_latest(tmp_path)[0] == 9


def _bit_in(name: str) -> Callable[[Path], None]:
    return lambda folder: flip_a_bit(folder / name)


def _cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _index_of(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "index.json").write_text(content) and None


DAMAGES = {
    "bit in weights": (_bit_in("a.safetensors"), "a.safetensors has other content"),
    "bit in state": (_bit_in("state.json"), "state.json has other content"),
    "bit in moments": (_bit_in("state.safetensors"), "state.safetensors has other content"),
    "cut weights": (_cut("b.safetensors"), "b.safetensors has .* bytes where"),
    "cut index": (_cut("index.json"), "index.json is not JSON"),
    "no state": (_without("state.json"), "state.json is missing"),
    "no index": (_without("index.json"), "index.json is missing"),
    "empty index": (_index_of("{}"), "index.json lacks entries"),
    "list index": (_index_of("[1]"), "index.json lacks entries"),
    "binary index": (_index_of("\x00"), "index.json is not JSON"),
}


class TestDamage:
    @pytest.mark.parametrize("kind", DAMAGES)
    def test_falls_back_and_says_so(self, tmp_path: Path, kind: str) -> None:
        damage, reason = DAMAGES[kind]
        save(tmp_path, 1)
        damage(save(tmp_path, 2))
        with pytest.warns(
            RuntimeWarning, match=f"step-00000002: damaged.*{reason}.*from step-00000001"
        ):
            assert value_of_latest(tmp_path) == (1, 1.0)

    def test_all_damaged_is_an_error(self, tmp_path: Path) -> None:
        for step in (1, 2):
            flip_a_bit(save(tmp_path, step) / "state.json")
        with pytest.raises(DamagedCheckpointError, match=r"2 damaged.*step-00000002.*step-0000000"):
            load_latest(tmp_path)

    def test_a_newer_format_is_not_taken_for_damage(self, tmp_path: Path) -> None:
        save(tmp_path, 1)
        (save(tmp_path, 2) / "index.json").write_text('{"format": 99}')
        with pytest.raises(CheckpointError, match="expected checkpoint format 2, got 99"):
            load_latest(tmp_path)

    def test_index_cannot_point_outside_the_folder(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        index = json.loads((path / "index.json").read_text())
        index["modules"].append("../x")
        index["files"]["../x.safetensors"] = index["files"]["a.safetensors"]
        shutil.copy(path / "a.safetensors", tmp_path / "x.safetensors")
        (path / "index.json").write_text(json.dumps(index))
        with pytest.raises(DamagedCheckpointError, match="lacks entries"):
            load_checkpoint(path)

    def test_wrong_path(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="pass a step-"):
            load_checkpoint(tmp_path / "step-00000001")


class Evil:
    """What an attacker pickles: unpickling it would create the file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


class TestUntrusted:
    @pytest.mark.parametrize("name", ["state.safetensors", "a.safetensors", "state.json"])
    @pytest.mark.parametrize("form", ["torch.save", "bare pickle"])
    def test_a_malicious_file_runs_nothing(self, tmp_path: Path, form: str, name: str) -> None:
        run, target = tmp_path / "run", tmp_path / "executed"
        path = save(run, 2)
        if form == "torch.save":
            torch.save({"x": Evil(target)}, path / name)
        else:
            (path / name).write_bytes(pickle.dumps({"x": Evil(target)}, protocol=2))
        make_index_agree(path, name)
        for load in (lambda: load_checkpoint(path), lambda: load_latest(run)):
            with pytest.raises(DamagedCheckpointError, match=f"{name}|not a readable safetensors"):
                load()
        assert not target.exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"value": {"$tensor": "state[0]"}}', "names no tensor"),
            ('{"value": {"$tensor": [1]}}', "names no tensor"),
            ("[" * 100_000, "is not JSON"),
            ("9" * 10_000, "is not JSON"),
            ("[]", "holds a list"),
            ("\udcff", "is not JSON"),
        ],
    )
    def test_a_state_that_is_none(self, tmp_path: Path, content: str, message: str) -> None:
        path = save(tmp_path, 1)
        (path / "state.json").write_text(content, errors="surrogateescape")
        make_index_agree(path, "state.json")
        with pytest.raises(DamagedCheckpointError, match=message):
            load_checkpoint(path)


def make_index_agree(path: Path, name: str) -> None:
    index = json.loads((path / "index.json").read_text())
    content = (path / name).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    index["files"][name] = {"bytes": len(content), "sha256": sha256}
    (path / "index.json").write_text(json.dumps(index))


class TestArguments:
    @pytest.mark.parametrize(
        ("value", "place"),
        [
            (numpy.float64(1), r"state\['x'\].*got numpy.float64"),
            (numpy.ones(2), r"state\['x'\].*got numpy.ndarray.*torch.from_numpy"),
            ([{"y": Path("z")}], r"state\['x'\]\[0\]\['y'\].*pathlib"),
            ({"a": {"b": object()}}, r"state\['x'\]\['a'\]\['b'\].*got object"),
            ({1: 2}, r"a key of state\['x'\].*got 1"),
            ({"$tensor": "y"}, r"a key of state\['x'\].*no \$"),
            (b"bytes", r"state\['x'\].*got bytes"),
            (torch.ones(2, device="meta"), r"state\['x'\]: expected a dense tensor with data"),
        ],
    )
    def test_what_could_not_be_read_back_is_refused(
        self, tmp_path: Path, value: Any, place: str
    ) -> None:
        with pytest.raises(ValueError, match=place):
            save_checkpoint(tmp_path, 1, modules={}, state={"x": value})
        assert names_in(tmp_path) == []

    def test_what_is_allowed_can_be_read_back(self, tmp_path: Path) -> None:
        state = {
            "a": (1, 2.5, "é", None, True, 10**30, float("inf")),
            "b": OrderedDict(c=[torch.ones(2)], d={}),
            "d": nn.Parameter(torch.ones(2)),
        }
        save_checkpoint(tmp_path, 1, modules={}, state=state)
        checkpoint = load_latest(tmp_path)
        assert checkpoint is not None
        assert checkpoint.state["a"] == [*state["a"]]
        assert torch.equal(checkpoint.state["b"]["c"][0], torch.ones(2))
        assert type(checkpoint.state["d"]) is Tensor

    @pytest.mark.parametrize("name", ["", "a/b", "..", "a b", ".hidden", "a\n", "state"])
    def test_module_names_that_are_no_file_names(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match="modules: expected names of letters"):
            save_checkpoint(tmp_path, 1, modules={name: {}}, state={})

    @pytest.mark.parametrize(
        "value", [3, torch.ones(2, device="meta"), torch.ones(2, 2).to_sparse()]
    )
    def test_weights_that_are_no_dense_tensors(self, tmp_path: Path, value: Any) -> None:
        with pytest.raises(ValueError, match=r"modules\['m'\]\['w'\]: expected a dense tensor"):
            save_checkpoint(tmp_path, 1, modules={"m": {"w": value}}, state={})

    @pytest.mark.parametrize(("step", "keep", "name"), [(-1, 1, "step"), (1, 0, "keep")])
    def test_numbers(self, tmp_path: Path, step: int, keep: int, name: str) -> None:
        with pytest.raises(ValueError, match=name):
            save_checkpoint(tmp_path, step, modules={}, state={}, keep=keep)


class DiskFull:
    """Lets `allowed` operations of a save through, then fails like a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import safetensors.torch

        self.allowed = 10**9
        self.done = 0
        self.number = errno.ENOSPC
        for owner, name in [
            (os, "fsync"),
            (os, "mkdir"),
            (Path, "rename"),
            (safetensors.torch, "save_file"),
            (Path, "write_text"),
        ]:
            monkeypatch.setattr(owner, name, self.limited(getattr(owner, name)))

    def limited(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.done >= self.allowed:
                # As on a full disk: part of a file is there, and the error may hide its number.
                if operation.__name__ == "save_file":
                    Path(arguments[1]).write_bytes(b"half")
                    raise RuntimeError("unexpected pos 576 vs 534") from OSError(
                        self.number, os.strerror(self.number)
                    )
                raise OSError(self.number, os.strerror(self.number))
            self.done += 1
            return operation(*arguments, **options)

        return call


class TestDiskFull:
    def operations_of_a_save(self, tmp_path: Path, disk: DiskFull, *, step: int) -> int:
        save(tmp_path / "count", 1)
        disk.done = 0
        save(tmp_path / "count", step)
        return disk.done

    @pytest.mark.parametrize("step", [1, 2])
    def test_at_every_point_the_previous_checkpoint_survives(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        disk = DiskFull(monkeypatch)
        # Saved again at the same step, the replaced one is removed by one more rename at the end.
        count = self.operations_of_a_save(tmp_path, disk, step=step) - (step == 1)
        assert count > 10
        for point in range(count):
            run = tmp_path / f"run-{point}"
            disk.allowed = 10**9
            save(run, 1, keep=1)
            disk.done, disk.allowed = 0, point
            with pytest.raises(OSError, match="expected about .* bytes .* free") as caught:
                save(run, step, value=7, keep=1)
            assert caught.value.errno == errno.ENOSPC
            assert "step-00000001" in str(caught.value) or step == 2
            # Only the flush of the parent folder comes after the new one has its name.
            last = point == count - 1
            assert value_of_latest(run) == ((step, 7.0) if last else (1, 1.0)), point
            assert not [name for name in names_in(run) if name.startswith(".")]
            disk.allowed = 10**9
            save(run, 3, keep=1)
            assert names_in(run) == ["step-00000003"]

    def test_a_replaced_checkpoint_gets_its_name_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, 1)
        rename = Path.rename

        def refuse_the_new_one(source: Path, target: Path) -> None:
            if ".tmp-" in str(source):
                raise OSError(errno.ENOSPC, "full")
            rename(source, target)

        monkeypatch.setattr(Path, "rename", refuse_the_new_one)
        with pytest.raises(OSError, match="step-00000001 is untouched"):
            save(tmp_path, 1, value=7)
        assert names_in(tmp_path) == ["step-00000001"]
        assert value_of_latest(tmp_path) == (1, 1.0)

    def test_quota_counts_as_full_and_other_errors_keep_their_own_text(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        disk = DiskFull(monkeypatch)
        disk.allowed, disk.number = 3, errno.EDQUOT
        with pytest.raises(OSError, match="there was no earlier checkpoint"):
            save(tmp_path / "run", 1)
        disk.done, disk.number = 0, errno.EIO
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            save(tmp_path / "run", 1)
        assert names_in(tmp_path / "run") == []

    def test_interrupt_in_a_save_leaves_no_temporary_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, 1)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            save(tmp_path, 2)
        assert names_in(tmp_path) == ["step-00000001"]

    def test_an_old_checkpoint_that_cannot_be_removed_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, 1)

        def refuse(path: Path) -> None:
            raise PermissionError(errno.EACCES, "no", str(path))

        monkeypatch.setattr(shutil, "rmtree", refuse)
        with pytest.warns(RuntimeWarning, match="could not be removed"):
            save(tmp_path, 2, keep=1)
        assert value_of_latest(tmp_path) == (2, 2.0)

    def test_folders_that_cannot_be_flushed_are_tolerated(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_: int) -> None:
            raise OSError(errno.EINVAL, "not supported")

        monkeypatch.setattr(os, "fsync", refuse)
        checkpoint_files.sync(tmp_path)
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="not supported"):
            checkpoint_files.sync(tmp_path / "file")


KILLED_AT_EVERY_POINT = """
import os, signal, sys, shutil
from pathlib import Path
import torch
import safetensors.torch
from gradcache_clip.train.checkpoint import save_checkpoint

# A killed process loses nothing that it has written, so here a flush is only a place to die at.
os.fsync = lambda descriptor: None

def save(folder, step, fill):
    weights = {"a": {"weight": torch.full((40, 5), fill)}, "b": {"bias": torch.full((3,), fill)}}
    save_checkpoint(folder, step, modules=weights, state={"value": fill}, keep=1)

def die_at(point):
    left = [point]
    def wrap(owner, name):
        operation = getattr(owner, name)
        def call(*arguments, **options):
            if left[0] == 0:
                if name == "save_file":
                    Path(arguments[1]).write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return operation(*arguments, **options)
        setattr(owner, name, call)
    for owner, names in ((os, "fsync mkdir rename unlink rmdir"),
                         (safetensors.torch, "save_file"), (Path, "write_text")):
        for name in names.split():
            wrap(owner, name)

def killed(folder, step, point):
    save(folder, 1, 1.0)
    child = os.fork()
    if child == 0:
        die_at(point)
        save(folder, step, 7.0)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

for step in (1, 2):
    point = 0
    while killed(f"{sys.argv[1]}/{step}-{point:03d}", step, point):
        point += 1
    assert point > 14, point
"""


def test_kill_9_at_every_point_of_a_save(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_AT_EVERY_POINT, str(tmp_path)]
    subprocess.run(command, check=True, timeout=60)
    seen = set()
    for run in sorted(tmp_path.iterdir()):
        new_step = int(run.name[0])
        seen.add(value_of_latest(run))
        assert value_of_latest(run) in {(1, 1.0), (new_step, 7.0)}, run.name
        save(run, 3, keep=1)
        assert names_in(run) == ["step-00000003"]
    assert seen == {(1, 1.0), (1, 7.0), (2, 7.0)}


REALLY_FULL = """
import errno, sys, os, torch
from gradcache_clip.train.checkpoint import load_latest, save_checkpoint
for weights, state in ((1_000_000, 1), (1, 1_000_000)):
    folder = f"{sys.argv[1]}/{weights}"
    save_checkpoint(folder, 1, modules={"m": {"w": torch.ones(2)}}, state={})
    try:
        save_checkpoint(folder, 2, modules={"m": {"w": torch.ones(weights)}},
                        state={"s": torch.ones(state)})
    except OSError as error:
        assert error.errno == errno.ENOSPC and "step-00000001 is untouched" in str(error), error
    else:
        raise AssertionError("the disk was not full")
    assert load_latest(folder).step == 1
    assert os.listdir(folder) == ["step-00000001"]
print("survived")
"""


def test_on_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=2m tmpfs "{tmp_path}"'
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*own_mounts, mount]).returncode:
        pytest.skip("needs the right to mount a small file system")
    run = [*own_mounts, f'{mount} && "{sys.executable}" - "{tmp_path}"']
    result = subprocess.run(run, input=REALLY_FULL, capture_output=True, text=True, timeout=60)
    assert result.stdout == "survived\n", result.stderr


def test_damage_warnings_are_the_only_ones(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_latest(tmp_path)
    assert not caught
