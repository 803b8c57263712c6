"""Encoders of today under every strategy: the table of gradient errors that a run prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import ENCODER_ERROR
from deepspeed_cases import NEEDS_DEEPSPEED
from encoder_cases import alone, cases, limit_of
from encoder_models import ENCODERS
from strategy_processes import run_cases

pytestmark = pytest.mark.encoders

Record = Callable[[str, Any], None]


def check(name: str, strategy: str, result: dict[str, Any], record: Record) -> None:
    record(ENCODER_ERROR, (name, strategy, result["error"]))
    assert result["error"] < limit_of(name, strategy), (name, strategy, result)


@pytest.mark.parametrize("name", ENCODERS)
def test_one_process(name, record_property):
    check(name, "1 process", alone(name), record_property)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "quick", [True, pytest.param(False, marks=[pytest.mark.slow, NEEDS_DEEPSPEED])]
)
def test_two_processes(quick, tmp_path, record_property):
    """Of one step, under each strategy; in one launch, because starting costs most."""
    expected = cases(quick=quick)
    results = run_cases(expected, 2, tmp_path)
    failure = results.pop("failure")
    assert failure is None, failure
    assert results.keys() == expected.keys()
    for case in expected:
        name, strategy = case.split(" under ")
        check(name, strategy, results[case], record_property)
