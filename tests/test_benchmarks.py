"""The discipline of the benchmarks' fresh processes."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import pytest
from fresh_process import (
    Limits,
    Outcome,
    call_in_fork,
    call_in_fresh_process,
    interleaved_times_ms,
)

_GIB = 2**30


def add(arguments: dict[str, Any]) -> dict[str, Any]:
    print("libraries may print before the result")
    return {"sum": arguments["a"] + arguments["b"], "process": os.getpid()}


def allocate(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"bytes": len(bytearray(arguments["bytes"]))}


def sleep(arguments: dict[str, Any]) -> dict[str, Any]:
    time.sleep(arguments["seconds"])
    return {}


def fail(_: dict[str, Any]) -> dict[str, Any]:
    raise KeyError("no such encoder")


def test_a_fresh_process_returns_what_the_function_returned():
    outcome = call_in_fresh_process(add, {"a": 2, "b": 3})
    assert outcome.failure == ""
    assert outcome.values["sum"] == 5
    assert outcome.values["process"] != os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux alone")
def test_more_memory_than_allowed_is_an_outcome_and_less_is_none():
    limits = Limits(data_bytes=_GIB // 4)
    assert call_in_fresh_process(allocate, {"bytes": _GIB}, limits).failure == "out of memory"
    assert call_in_fresh_process(allocate, {"bytes": 2**20}, limits).values == {"bytes": 2**20}


def test_too_long_a_step_is_an_outcome():
    assert call_in_fresh_process(sleep, {"seconds": 60}, Limits(seconds=1)).failure == "timed out"


def test_any_other_failure_shows_its_traceback():
    with pytest.raises(RuntimeError, match="no such encoder"):
        call_in_fresh_process(fail, {})


def die() -> None:
    os.write(2, b"more\nillegal access\n")
    os._exit(3)


def test_whatever_happens_in_a_fork_is_an_outcome():
    # Fresh processes import this file, but cannot import others beside it.
    from gloo_processes import forkserver

    def outcome(function: Any, *arguments: Any, **limits: Any) -> Outcome:
        return call_in_fork(function, arguments, Limits(**limits))

    # Later tests of this process fork off the same server.
    forkserver()
    found = outcome(add, {"a": 2, "b": 3})
    assert found.values["sum"] == 5 and found.values["process"] != os.getpid()
    assert outcome(die).failure == "illegal access"
    assert outcome(fail, {}).failure == "KeyError: 'no such encoder'"
    assert outcome(sleep, {"seconds": 60}, seconds=0.1).failure == "timed out"
    if sys.platform == "linux":
        given = {"bytes": _GIB}
        assert outcome(allocate, given, data_bytes=_GIB // 4).failure == "out of memory"


def test_steps_take_turns_and_the_warm_up_is_dropped():
    order: list[str] = []
    rounds = interleaved_times_ms([lambda: order.append("a"), lambda: order.append("b")], 2, 60)
    assert order == ["a", "b"] * 3
    assert len(rounds) == 2 and all(len(durations) == 2 for durations in rounds)
    assert len(interleaved_times_ms([lambda: time.sleep(0.02)], 5, 0.01)) == 1
