"""A run sharded by FSDP or in DeepSpeed gives the weights of one process, and goes on anywhere."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from processes import SAME_BATCHES, alone, assert_same_run, in_processes, interrupted_at_once
from tiny_run import overrides

from gradcache_clip.cli import main
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.deepspeed_config import deepspeed_settings, precision_of, zero_stage

EXAMPLES = Path(__file__).parent.parent / "examples"
# One step each: every engine goes on from a checkpoint of another, and leaves one to the next.
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
TURNS = ("fsdp", "zero-2", "zero-3", "fsdp") if HAS_DEEPSPEED else ("fsdp", "ddp", "ddp", "fsdp")


@pytest.fixture(scope="module")
def one_process(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "alone"
    return alone(data, output, "train.steps=4", "optimizer.max_grad_norm=0")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_engines_in_turn_give_the_weights_of_one_process(data, one_process, tmp_path):
    output = tmp_path / "run"
    more = [*SAME_BATCHES, "optimizer.max_grad_norm=0", "train.steps=4"]
    for step, engine in enumerate(TURNS, start=1):
        fault = interrupted_at_once if step < 4 else None
        outcome = in_processes(2, data, output, *more, *of(engine), fault=fault)
        assert outcome == [f"stopped after {step}" if step < 4 else "finished"] * 2
        more = [*more, "train.resume=true"]
    assert_same_run(output, one_process)


def of(engine: str) -> list[str]:
    name, _, stage = engine.partition("-")
    if not stage:
        return [f"distributed.strategy={name}"]
    return ["distributed.strategy=deepspeed", f"distributed.zero={stage}"]


def settings(tmp_path: Path, file: dict | None, *changes: str, processes: int = 2) -> dict:
    places = []
    if file is not None:
        (tmp_path / "ds.json").write_text(json.dumps(file))
        places = [f"distributed.deepspeed_config={tmp_path}/ds.json"]
    config = load_config(None, [*overrides(tmp_path, tmp_path), *places, *changes])
    return deepspeed_settings(config, processes)


def test_without_a_file_all_is_written_out(tmp_path):
    made = settings(tmp_path, None, "optimizer.max_grad_norm=0", "train.precision=bf16")
    assert made["gradient_clipping"] == 0.0
    assert made["train_batch_size"] == 24
    assert made["train_micro_batch_size_per_gpu"] == 12
    assert made["gradient_accumulation_steps"] == 1
    assert (zero_stage(made), precision_of(made)) == (2, "bf16")


def test_a_file_is_used_as_it_is(tmp_path):
    file = {
        "train_batch_size": "auto",
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
    }
    made = settings(tmp_path, file, "optimizer.max_grad_norm=0")
    assert made == {
        **file,
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 12,
        "gradient_accumulation_steps": 1,
    }


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"train_batch_size": 64}, "train_batch_size: expected 24 as train.batch_size=24 gives "
         "with 2 processes, got 64 in .*ds.json"),
        ({"train_micro_batch_size_per_gpu": 24}, "per_gpu: expected 12 as .*, got 24 in"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: expected 1 .* got 4"),
        ({"gradient_clipping": 2.0}, "expected 1.0 as optimizer.max_grad_norm, got 2.0 in"),
        ({"zero_optimization": {"stage": 1}}, "stage: expected 2 as distributed.zero, got 1 in"),
        ({"fp16": {"enabled": True}}, "train.precision: expected fp16 as in .*, got bf16"),
    ],
)  # fmt: skip
def test_what_contradicts_the_run_is_shown_with_both(tmp_path, file, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, file, "distributed.zero=2", "train.precision=bf16")


def test_launch_reads_the_file_before_it_starts_anything(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "ds.json").write_text('{"train_batch_size": 7}')
    command = ["launch", "--nproc", "2", "--strategy", "deepspeed", "train"]
    file = f"distributed.deepspeed_config={tmp_path}/ds.json"
    assert main([*command, str(tmp_path / "config.yaml"), file]) == 2
    assert "train_batch_size: expected 1024 as" in capsys.readouterr().err


def test_the_example_file_fits_the_demo():
    file = f"distributed.deepspeed_config={EXAMPLES}/deepspeed/ds.json"
    made = deepspeed_settings(load_config(EXAMPLES / "demo.yaml", [file]), 2)
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_clipping"]) == (512, 0.0)


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "a JSON object in .*, got list"), ("{", "expected JSON in")]
)
def test_what_is_no_configuration(tmp_path, text, message):
    (tmp_path / "ds.json").write_text(text)
    config = load_config(None, [f"distributed.deepspeed_config={tmp_path}/ds.json"])
    with pytest.raises(ConfigError, match=message):
        deepspeed_settings(config, 2)
    config = config.updated({"distributed.deepspeed_config": f"{tmp_path}/nowhere.json"})
    with pytest.raises(ConfigError, match="nowhere.json, which does not exist"):
        deepspeed_settings(config, 2)
