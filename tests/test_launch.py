"""One run in several processes: equal to one process, written by the first, stopped together."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import (
    SAME_BATCHES,
    alone,
    assert_same_run,
    fails_on_rank_1,
    in_processes,
    interrupted_on_rank_1,
    killed_on_rank_1,
    late_on_rank_1,
    terminated_on_all,
)
from tiny_run import logged, overrides

from gradcache_clip.cli import main
from gradcache_clip.train import failures
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.device import choose_device
from gradcache_clip.train.failures import FailureChannel, PeerFailure

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def one_process(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps: three epochs of two batches."""
    return alone(data, tmp_path_factory.mktemp("runs") / "alone", "train.steps=6")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_launch_gives_the_weights_of_one_process(data, one_process, tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    output = tmp_path / "run"
    command = [sys.executable, "-m", "gradcache_clip.cli", "launch", "--nproc", "2", "train"]
    settings = overrides(data, output, *SAME_BATCHES, "train.steps=6")
    command += [str(tmp_path / "config.yaml"), *settings]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("step 6") == 1
    assert "Traceback" not in ended.stderr
    assert_same_run(output, one_process)
    # Evaluated in turn by both, with the same result.
    summaries = [json.loads((run / "summary.json").read_text()) for run in (output, one_process)]
    assert summaries[0]["metrics"] == pytest.approx(summaries[1]["metrics"])
    # The first rank alone writes.
    assert sorted(logged(output, "loss")) == [1, 2, 3, 4, 5, 6]
    assert len(list((output / "tensorboard").iterdir())) == 1
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000006"]
    assert (output / "pictures" / "gallery.png").is_file()


@pytest.mark.distributed
def test_resuming_is_exact_with_dropout_of_each_rank(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    in_processes(2, data, whole, "train.steps=5", "optimizer.warmup_steps=1")
    # The same schedule, cut off after the second step.
    stopped = in_processes(
        2, data, parts, "train.steps=5", "optimizer.warmup_steps=1", fault=interrupted_on_rank_1
    )
    assert stopped == ["stopped after 2"] * 2
    more = ["train.steps=5", "optimizer.warmup_steps=1", "train.resume=true"]
    assert in_processes(2, data, parts, *more) == ["finished"] * 2
    assert logged(parts, "loss") == logged(whole, "loss")


@pytest.mark.distributed
def test_another_number_of_processes_goes_on(data, tmp_path):
    output = tmp_path / "run"
    more = ["train.batch_size=16", "train.checkpoint_every=1", "optimizer.warmup_steps=0"]
    for world, steps in ((2, 2), (4, 4), (1, 6)):
        resume = f"train.resume={'true' if steps > 2 else 'false'}"
        outcome = in_processes(world, data, output, *more, f"train.steps={steps}", resume)
        assert outcome == ["finished"] * world
    assert sorted(logged(output, "loss")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.distributed
def test_sigterm_on_all_saves_once(data, tmp_path):
    output = tmp_path / "run"
    outcome = in_processes(2, data, output, fault=terminated_on_all)
    assert outcome == ["stopped after 2"] * 2
    assert (output / "checkpoints" / "step-00000002").is_dir()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("fault", "own", "words"),
    [
        (fails_on_rank_1, "ValueError: a bad batch", "rank 1 failed while taking step 2: ValueErr"),
        (killed_on_rank_1, "died", "rank 1 ended without a word while taking step 2"),
    ],
)
def test_a_rank_that_fails_stops_the_others_by_name(data, tmp_path, fault, own, words):
    output = tmp_path / "run"
    start = time.monotonic()
    first, second = in_processes(2, data, output, "train.checkpoint_every=1", fault=fault)
    assert time.monotonic() - start < 30
    assert second == own
    assert first.startswith("PeerFailure: rank 0 stopped while taking step 2: " + words), first
    # What was saved before is there, and the run goes on from it.
    more = ["train.steps=3", "train.checkpoint_every=1", "train.resume=true"]
    assert in_processes(2, data, output, *more) == ["finished"] * 2
    assert sorted(logged(output, "loss")) == [1, 2, 3]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer", PeerFailure),
        ("Application timeout caused pair closure", PeerFailure),
        ("mat1 and mat2 shapes cannot be multiplied", RuntimeError),
    ],
)
def test_errors_of_collectives_come_from_elsewhere(monkeypatch, said, kind):
    monkeypatch.setattr(failures, "SILENT_S", 0)
    with pytest.raises(RuntimeError) as error, FailureChannel(0, 2):
        raise RuntimeError(said)
    assert type(error.value) is kind


@pytest.mark.slow
@pytest.mark.distributed
def test_nobody_waits_longer_than_the_timeout(data, tmp_path):
    first, second = in_processes(
        2, data, tmp_path / "run", "distributed.timeout_s=4", fault=late_on_rank_1
    )
    assert "one kept the others waiting for longer than distributed.timeout_s" in first
    assert "PeerFailure" in second or second == "died"


@pytest.mark.slow
@pytest.mark.distributed
def test_under_torchrun_a_rank_that_fails_stops_the_run_by_name(data, tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "failing_rank.py"), str(tmp_path / "config.yaml")]
    start = time.monotonic()
    ended = subprocess.run(
        [*command, *overrides(data, tmp_path / "run")], capture_output=True, text=True, timeout=120
    )
    assert time.monotonic() - start < 60
    assert ended.returncode != 0
    assert "train: rank 1 failed while taking step 2: a bad batch" in ended.stderr
    assert "train: rank 0 stopped while taking step 2: rank 1 failed while" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "5"], "train.batch_size: expected a multiple of the 5 processes, which share "
         "it, got 24; use 20 or 25"),
        (["--nproc", "0"], "--nproc: expected a number of processes of at least 1, got 0"),
        (["--nproc", "2", "--nnodes", "2"], "--master-addr: expected the address of machine 0"),
        (["--nproc", "2", "--node-rank", "1"], "--node-rank: expected 0 to 0 with --nnodes 1"),
    ],
)  # fmt: skip
def test_mistakes_start_no_process(data, tmp_path, capsys, arguments, message):
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    settings = overrides(data, tmp_path / "run")
    assert main(["launch", *arguments, "train", str(config), *settings]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_torchrun_gets_the_places_and_the_config(data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("gradcache_clip.train.launch._torchrun", calls.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    places = ["--nproc", "4", "--nnodes", "2", "--node-rank", "1", "--master-addr", "here"]
    main(["launch", *places, "--strategy", "deepspeed", "--zero", "3", "train", str(config)])
    assert calls == [
        [
            *("--nproc-per-node=4", "--nnodes=2", "--node-rank=1", "--master-addr=here"),
            *("--master-port=29500", "-m", "gradcache_clip.train", str(config)),
            *("distributed.strategy=deepspeed", "distributed.zero=3"),
        ]
    ]


def test_each_process_has_its_own_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match="cuda or cpu with 2 processes, got 'cuda:0'"):
        choose_device("cuda:0")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    with pytest.raises(ConfigError, match="a cuda device for each .* got 1 for process number 2"):
        choose_device("auto")
    assert choose_device("cpu") == torch.device("cpu")


def test_who_keeps_the_others_waiting_is_named():
    channel = FailureChannel(0, 3)
    channel.phase = "taking step 5"
    before = ["1 taking step 5", "7 reading the batch of step 5", "4 taking step 5"]
    after = ["4 taking step 5", "9 reading the batch of step 5", "8 taking step 5"]
    waiting = "rank 1 kept the others waiting while reading the batch of step 5"
    assert channel._suspect(before, after) == waiting
    after[2] = before[2]
    assert channel._suspect(before, after) == "rank 2 ended without a word while taking step 5"


def test_chunk_negatives_need_one_process(data, tmp_path):
    outcome = in_processes(2, data, tmp_path / "run", "train.grad_cache=false")
    assert all("expected true with 2 processes, got false" in each for each in outcome)
