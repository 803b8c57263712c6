"""Run folders, configurations and checkpoints from strangers: nothing runs, one line says why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_checkpoint import make_index_agree
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
    "one number as a moment": (moment("exp_avg", lambda m: m.sum()), "shape"),
    "a bare number as a moment": (moment("exp_avg_sq", lambda m: 1.0), "a tensor or a number"),
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


NEWEST = "checkpoints/step-00000002"


def rewritten(name: str, *path: str | int, to: Any) -> Callable[[Path], None]:
    """Change one value in a JSON file; a state's size and digest then agree."""

    def change(run: Path) -> None:
        found = json.loads((run / name).read_text())
        place = found
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to
        (run / name).write_text(json.dumps(found))
        if name == f"{NEWEST}/state.json":
            make_index_agree(run / NEWEST, "state.json")

    return change


def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
        make(run / name)

    return change


def in_state(*path: str | int, to: Any) -> Callable[[Path], None]:
    return rewritten(f"{NEWEST}/state.json", *path, to=to)


def in_tokenizer(*path: str, to: Any) -> Callable[[Path], None]:
    return rewritten("tokenizer.json", *path, to=to)


PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
NUMPY = ("rng", 0, "numpy")
DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "negative position": (in_state("loader", "position", "step", to=-1), "expected counts"),
    "text as position": (in_state("loader", "position", "step", to="x"), "expected counts"),
    "half a step": (in_state("loader", "position", "step", to=1.5), "expected counts"),
    "text as a count": (in_state("loader", "tally", "seen", to="x"), "expected counts"),
    "reasons as counts": (in_state("loader", "tally", "broken", to={"a": "b"}), "expected counts"),
    "no generators": (in_state("rng", to=[]), "generators of each rank"),
    "beyond the generator": (in_state(*NUMPY, "position", to=10**6), "624 words and a position"),
    "text as a draw": (in_state("rng", 0, "python", "gauss", to="x"), "a number or None as gauss"),
    "no moments": (in_state("optimizer", to=[]), "moments of every parameter"),
    "another rate": (
        in_state("run", "settings", "optimizer.learning_rate", to=1.0),
        "expected optimizer.learning_rate=1.0, got 0.001",
    ),
    "a number as summary": (rewritten("summary.json", "skipped", to=3), "got 3 for skipped"),
    "text as a rate": (rewritten("summary.json", "pairs_per_s", to="x"), "got 'x' for pairs_per_s"),
    "a folder as summary": (replaced("summary.json", Path.mkdir), "another kind of entry"),
    "a pipe as log": (replaced("metrics.jsonl", os.mkfifo), "another kind of entry"),
    "text as a loss": (
        lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": "x"}\n') and None,
        "a step and numbers",
    ),
    "a file as checkpoints": (replaced("checkpoints", Path.touch), "another kind of entry"),
    "a number as settings": (
        lambda run: (run / "config.yaml").write_text("5") and None,
        "config.yaml: expected YAML, got an error",
    ),
    "a panic": (in_tokenizer("normalizer", to=PRECOMPILED), "tokenizer.json' (Precompiled: Error"),
    "a panic in texts": (
        in_tokenizer("post_processor", "special_tokens", to={}),
        "expected it to encode texts",
    ),
    "no ids": (in_tokenizer("post_processor", "single", to=[]), "expected ids below"),
    "ids of no word": (
        in_tokenizer("post_processor", "special_tokens", "[CLS]", "ids", to=[10**9]),
        "expected ids below",
    ),
    "other words": (in_tokenizer("decoder", to=None), "tokenizer.json: expected the one of this"),
}


@pytest.mark.filterwarnings("ignore:.*RUST_BACKTRACE.*")
@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_of_a_run_ends_in_one_line(data: Path, run: Path, capsys: Any, kind: str) -> None:
    damage, message = DAMAGED[kind]
    damage(run)
    config = run.parent / "empty.yaml"
    config.write_text("{}")
    assert main(["train", str(config), *settings(data, run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("entry", [Path.mkdir, os.mkfifo, Path.touch])
@pytest.mark.parametrize("name", ["index.json", "state.json"])
def test_a_checkpoint_of_other_entries_is_passed_over(
    trained: Path, tmp_path: Path, name: str, entry: Callable[[Path], Any]
) -> None:
    checkpoints = Path(shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints"))
    older = checkpoints / "step-00000001"
    shutil.copytree(checkpoints / "step-00000002", older)
    rewritten("index.json", "step", to=1)(older)
    replaced(name, entry)(checkpoints / "step-00000002")
    with pytest.warns(RuntimeWarning, match="step-00000002: damaged checkpoint"):
        found = load_latest(checkpoints)
    assert found is not None and found.step == 1


def test_a_checkpoint_is_of_the_step_that_its_folder_says(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    rewritten("index.json", "step", to=9)(tmp_path / NEWEST)
    with pytest.raises(CheckpointError, match="index.json is of step 9"):
        load_latest(tmp_path / "checkpoints")


def test_evaluation_refuses_weights_of_another_shape(run: Path, capsys: Any) -> None:
    alter(run, setting(torch.ones(3), "modules", "ema", MOMENTS))
    assert main(["evaluate", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{NEWEST}: expected the state of this run" in line


PLACES: dict[str, tuple[str, str]] = {
    "in a file": ("file/run", "file/run: expected a file or folder that can be used, got 'Not a d"),
    "a file": ("file", "train.output: expected a folder, got the file "),
    "nowhere": ("link", "train.output: expected a folder, got the symbolic link to nowhere "),
    "a long name": ("x" * 300, "got 'File name too long'"),
    "read-only": ("none/run", "got 'Permission denied'"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_places_where_no_run_can_be(data: Path, capsys: Any, kind: str) -> None:
    name, message = PLACES[kind]
    # Where everybody may enter: the superuser becomes nobody, whom a read-only folder refuses.
    with tempfile.TemporaryDirectory() as place:
        folder, user = Path(place), os.geteuid()
        folder.chmod(0o755)
        shutil.copytree(data, folder / "data")
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (folder / "file").touch()
        (folder / "link").symlink_to(folder / "missing")
        (folder / "none").mkdir(mode=0o555)
        (folder / "empty.yaml").write_text("{}")
        arguments = [str(folder / "empty.yaml"), *overrides(folder / "data", folder / name)]
        os.seteuid(65534) if user == 0 else None
        try:
            assert main(["train", *arguments]) == 2
        finally:
            os.seteuid(user)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and "[Errno" not in line


def test_names_from_strangers_do_not_steer_a_terminal(capsys: Any) -> None:
    assert main(["evaluate", "run\x1b[2J\0"]) == 2
    error = capsys.readouterr().err
    assert "run\\x1b[2J\\x00" in error and "\x1b" not in error


def test_memory_that_is_not_there_is_said(data: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty.yaml").write_text("{}")
    with mock.patch.object(
        torch.nn.Module, "to", side_effect=RuntimeError("can't allocate memory")
    ):
        assert main(["train", str(tmp_path / "empty.yaml"), *overrides(data, tmp_path / "r")]) == 2
    assert "memory: expected a chunk to fit" in capsys.readouterr().err


class PanicException(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize("other", [ModuleNotFoundError("BertModel"), PanicException("datetime")])
def test_an_interrupt_that_becomes_another_error_is_an_interrupt(
    capsys: Any, other: BaseException
) -> None:
    """transformers and pydantic raise these when they are interrupted while they are imported."""

    def importing(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise other from None

    with mock.patch("gradcache_clip.train.evaluate.evaluate_run", importing):
        assert main(["evaluate", "run"]) == 130
    assert capsys.readouterr().err == "gradcache-clip: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
        with pytest.raises(
            ConfigError, match=r"command line alone, got \['https', 'pipe'\] in .*y"
        ):
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


@pytest.mark.parametrize(
    ("name", "size"), [("summary.json", 2**26), ("tokenizer.json", 2**28), ("metrics.jsonl", 2**30)]
)
def test_files_beyond_their_bound_are_not_read(
    data: Path, run: Path, capsys: Any, name: str, size: int
) -> None:
    # Sparse: it takes no disk.
    os.truncate(run / name, size + 1)
    (run.parent / "empty.yaml").write_text("{}")
    assert main(["train", str(run.parent / "empty.yaml"), *settings(data, run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name}" in line and f"{size:,} bytes" in line
