"""The formulas of benchmarks/scaling.py against the collectives of real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from collectives import CountedCollectives
from gloo_processes import start
from scaling import Setting, cost, main

from gradcache_clip import ClipLoss

ROWS, WIDTH = 12, 32
# Beside the formulas a step exchanges the shapes of its inputs and the gradient of the scale.
_CHECK_BYTES = 4 * 4 * 8
_SCALE_BYTES = 4


def count(results: Path) -> None:
    found = {}
    for exchange in ("gather", "ring"):
        images, texts = (torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2))
        with CountedCollectives() as counted:
            ClipLoss(exchange=exchange)(images, texts).loss.backward()
        found[exchange] = dict(counted.calls), counted.total_bytes_received
    if dist.get_rank() == 0:
        torch.save(found, results)


@pytest.mark.distributed
def test_a_step_of_the_loss_exchanges_what_the_formula_says(tmp_path):
    world = 4
    start(count, world, tmp_path / "counted.pt")
    checks = (world - 1) * _CHECK_BYTES + 2 * _SCALE_BYTES * (world - 1) // world
    for exchange, (calls, received) in torch.load(tmp_path / "counted.pt").items():
        found = cost(Setting(world, ROWS, WIDTH, feature_bytes=4, parameters=0, exchange=exchange))
        assert received == found.bytes_received + checks
        # Features of both sides are gathered only in "gather".
        assert calls["allgather_base"] == {"gather": 4, "ring": 2}[exchange]
        assert calls["allreduce"] == 3  # maximum and sum of the columns, gradient of the scale
        assert calls.get("recv", 0) == {"gather": 0, "ring": 3 * (world - 1)}[exchange]


def test_a_ring_holds_the_same_however_many_share_the_batch():
    few, many = (cost(Setting(world, 1024, exchange="ring")) for world in (8, 1024))
    assert many.loss_memory_bytes < few.loss_memory_bytes + 1024 * 1024 * 40
    gathered = cost(Setting(1024, 1024))
    assert gathered.loss_memory_bytes > 20 * many.loss_memory_bytes


def test_the_work_of_a_process_grows_with_the_global_batch_alone():
    one, other = cost(Setting(4, 256)), cost(Setting(8, 256))
    assert other.loss_flops == 2 * one.loss_flops


def test_sharding_takes_the_state_apart_stage_by_stage():
    held = [cost(Setting(8, 256, zero=stage)).state_memory_bytes for stage in range(4)]
    assert held == sorted(held, reverse=True) and held[3] * 8 == held[0]


def test_the_script_prints_a_table_and_draws(tmp_path, capsys):
    main(["--results", str(tmp_path)])
    assert "1,024 gather 0" in " ".join(capsys.readouterr().out.split())
    for name in ("scaling.csv", "scaling.png", "scaling.svg"):
        assert (tmp_path / name).stat().st_size > 1000
