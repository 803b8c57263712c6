"""Every strategy gives the gradients of one process with the whole batch, step after step."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from conftest import WORST_ERROR
from deepspeed_cases import NEEDS_DEEPSPEED, QUICK, deepspeed_cases
from deepspeed_refusals import DEEPSPEED_REFUSALS
from strategy_cases import plain_cases
from strategy_processes import run_cases
from strategy_refusals import REFUSALS
from unreached_cases import unreached_cases, unreached_under_deepspeed

from gradcache_clip.distributed import DeepSpeedStrategy

FP64, FP32 = 1e-10, 1e-5
# Of features and gradients in 16 bits, beside 64.
SIXTEEN = {"bf16": 5e-2, "fp16": 1e-2}
# A weight in 32 bits knows its last change only so well.
CHANGE = 1e-4
# Groups of parameters that are sharded together: linear layers, and the rest of a root.
GROUPS = {
    "two towers": 7,
    "one module": 6,
    "one chunk": 7,
    "tied": 3,
    "frozen text": 3,
    "dropout": 7,
    "graphs kept": 7,
    "some graphs kept": 6,
}
REDUCTIONS = {f"AllReduce: {what}": 1 for what in GROUPS} | {
    f"{engine}: {what}": groups
    for engine in ("FSDP", "FSDP, gathered")
    for what, groups in GROUPS.items()
}
Record = Callable[[str, object], None]


def finished(cases: Mapping[str, Any], world: int, folder: Any) -> dict[str, Any]:
    """What each case came to; fails where one raised."""
    results = run_cases(cases, world, folder)
    failure = results.pop("failure")
    assert failure is None, failure
    assert results.keys() == cases.keys()
    return results


def record_worst(results: Mapping[str, Any], world: int, record: Record) -> None:
    """For the table at the end of a run: the worst of each engine."""
    by_engine: dict[str, tuple[float, str]] = {}
    for name, result in results.items():
        engine = name.split(":")[0] + next((f", {p}" for p in SIXTEEN if p in name), "")
        error = result.get("gradient", result.get("error", result.get("change", -1.0)))
        found = (error, result.get("parameter", ""))
        by_engine[engine] = max(by_engine.get(engine, found), found)
    for engine, (error, parameter) in by_engine.items():
        if error >= 0:
            record(WORST_ERROR, (f"{world} processes, {engine}", parameter, error))


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_gradients_of_one_process(world, tmp_path, record_property):
    results = finished(plain_cases(world), world, tmp_path)
    for name, result in results.items():
        assert result.get("error", 0.0) < (SIXTEEN["bf16"] if "bf16" in name else FP64), (
            name,
            result,
        )
        assert result.get("loss", 0.0) < FP64, (name, result)
        if world > 1 and name in REDUCTIONS:
            assert result["reductions"] == 3 * [REDUCTIONS[name]], (name, result)
    if world == 2:
        # Three times for each of four chunks, but for a root, which stays gathered in between.
        assert results["FSDP: gathers"]["True"] == 7 < results["FSDP: gathers"]["False"]
    record_worst(results, world, record_property)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_parameters_that_some_chunks_or_ranks_do_not_use(world, tmp_path, record_property):
    results = finished(unreached_cases(world), world, tmp_path)
    for name, result in results.items():
        assert result.get("error", 0.0) < FP64, (name, result)
    record_worst(results, world, record_property)


@NEEDS_DEEPSPEED
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 3])
def test_parameters_not_used_under_deepspeed(world, tmp_path):
    results = finished(unreached_under_deepspeed(world), world, tmp_path)
    for name, result in results.items():
        assert result.get("change", 0.0) < CHANGE, (name, result)


@pytest.mark.distributed
def test_modules_that_would_get_wrong_gradients(tmp_path):
    finished(REFUSALS, 2, tmp_path)


class OtherEngine:
    """What an engine of another release of DeepSpeed shows to a strategy."""

    def zero_optimization_stage(self) -> int:
        return 2


@pytest.fixture
def other_release(monkeypatch) -> types.ModuleType:
    deepspeed = types.ModuleType("deepspeed")
    deepspeed.DeepSpeedEngine = OtherEngine
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    return deepspeed


@pytest.mark.parametrize("version", ["0.9.5", "0.18.2", "0.18.4", "0.19.3+cuda"])
def test_releases_of_deepspeed_that_lose_gradients_are_refused(version, other_release):
    other_release.__version__ = version
    message = f"deepspeed: expected 0.19.4 or newer, got {re.escape(version)};.*7718.*8224.*7981"
    with pytest.raises(ImportError, match=message):
        DeepSpeedStrategy(OtherEngine())


@pytest.mark.parametrize("version", ["0.19.4", "0.19.10+cuda", "1.0.0"])
def test_later_releases_of_deepspeed_are_not_refused(version, other_release):
    other_release.__version__ = version
    assert DeepSpeedStrategy(OtherEngine()).engine


@NEEDS_DEEPSPEED
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "quick"),
    [(2, True), *(pytest.param(n, False, marks=pytest.mark.slow) for n in (1, 2, 4))],
)
def test_gradients_under_deepspeed(world, quick, tmp_path, record_property):
    cases = deepspeed_cases(world)
    if world == 2:
        cases = {name: case for name, case in cases.items() if name.endswith(QUICK) == quick}
        cases |= DEEPSPEED_REFUSALS if quick else {}
    results = finished(cases, world, tmp_path)
    for name, result in results.items():
        tolerance = max((t for precision, t in SIXTEEN.items() if precision in name), default=FP32)
        assert result.get("gradient", 0.0) < FP32, (name, result)
        assert result.get("change", 0.0) < max(tolerance, CHANGE), (name, result)
        assert result.get("loss", 0.0) < tolerance, (name, result)
        assert result.get("scale", 0.0) < tolerance, (name, result)
    if quick:
        counts = [results[f"ZeRO-{stage}: reductions"]["reductions"] for stage in range(3)]
        assert counts == [1, 1, 6], counts
    record_worst(results, world, record_property)
