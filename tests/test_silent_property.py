"""Whatever the inputs, chunks, encoders and ranks: gradients of the one-shot step, or an error."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from property_cases import ON_RANKS, Case, cases, drawn, found_wrong, refusals
from property_mutations import EQUIVALENT, FIRST, ON_ONE, ON_TWO, Change
from property_processes import outcomes
from property_runs import run


def engines() -> list[str]:
    there = importlib.util.find_spec("deepspeed") is not None
    return [engine for engine in ON_RANKS if there or not engine.startswith("ZeRO")]


def check_on_one_process(count: int) -> None:
    """Hypothesis shrinks a case that is wrong."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases("Local", 1))
    def check(case: Case) -> None:
        outcome = run(case)
        assert not outcome.startswith("wrong"), outcome
        seen[outcome.split(":")[0]] += 1

    check()
    assert_mostly_exact(seen)


def check_on_ranks(world: int, count: int, folder: Path) -> None:
    """`count` cases of each strategy, and some that are refused or once went wrong."""
    plain = [case for engine in engines() for case in drawn(cases(engine, world), count)]
    todo = list(plain)
    for engine in engines()[: count - 1]:
        todo += drawn(refusals(engine, world), 1)
    if world == 2:
        todo += [case for case in found_wrong() if case.engine in engines()]
    # ZeRO-3 replaces torch's linear layer for good, by one whose gradients are never None.
    todo.sort(key=lambda case: case.deepspeed)
    found = outcomes(todo, world, folder)
    pairs = list(zip(todo, found, strict=False))
    wrong = [(case, what) for case, what in pairs if not what.startswith(("exact", "refused"))]
    # The shortest of them; nothing is run after an error that is none of ours.
    assert not wrong, min(wrong, key=lambda pair: len(repr(pair[0])))
    assert len(found) == len(todo), found[-1]
    drawn_ones = (what for case, what in pairs if case in plain)
    assert_mostly_exact(Counter(outcome.split(":")[0] for outcome in drawn_ones))


def assert_mostly_exact(seen: Counter[str]) -> None:
    assert seen["exact"] > seen["refused"], seen


def test_one_process():
    check_on_one_process(20)


@pytest.mark.distributed
def test_two_processes(tmp_path):
    check_on_ranks(2, 1, tmp_path)


@pytest.mark.slow
def test_many_cases_on_one_process():
    check_on_one_process(80)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("world", "count"), [(1, 2), (2, 6), (3, 4)])
def test_many_cases(world, count, tmp_path):
    check_on_ranks(world, count, tmp_path)


def test_hooks_that_nobody_spoke_of():
    found = [run(case) for case in drawn(refusals("Local", 1), 5)]
    assert not any(outcome.startswith("wrong") for outcome in found), found
    assert any("pass gradient_hooks" in outcome for outcome in found), found


def likely_first(name: str, todo: Sequence[Case]) -> list[Case]:
    return [*todo[FIRST.get(name, 0) :][:1], *todo]


def caught_on_one(change: Change, todo: Sequence[Case]) -> bool:
    """The engine's own checks of a replay and of rows are off."""
    for case in todo:
        try:
            with change():
                outcome = run(case, checks=False)
        except Exception:
            return True
        if outcome.startswith("wrong"):
            return True
    return False


@pytest.mark.slow
def test_mutations_on_one_process():
    todo = drawn(cases("Local", 1), 250)
    missed = [
        name
        for name, change in ON_ONE.items()
        if not caught_on_one(change, likely_first(name, todo))
    ]
    print(f"{len(ON_ONE) - len(missed)} of {len(ON_ONE)} mutations caught on one process")
    assert not missed


def caught_on_two(change: Change, todo: Sequence[Case], folder: Path) -> bool:
    folder.mkdir()
    found = outcomes(
        todo, 2, folder, mutation=change, checks=False, until_wrong=True, patience_s=4.0
    )
    return not found[-1].startswith(("exact", "refused"))


@pytest.mark.slow
@pytest.mark.distributed
def test_mutations_on_two_processes(tmp_path):
    there, missed = engines(), []
    rare = found_wrong()
    todo = {
        engine: [case for case in rare if case.engine == engine] + drawn(cases(engine, 2), 12)
        for engine in there
    }
    for number, (name, (engine, change)) in enumerate(ON_TWO.items()):
        if engine in there:
            likely = likely_first(name, todo[engine])
            if not caught_on_two(change, likely, tmp_path / str(number)):
                missed.append(name)
    caught = len(ON_TWO) - len(missed)
    print(f"{caught} of {len(ON_TWO) - len(EQUIVALENT)} mutations caught on two processes")
    assert missed == EQUIVALENT
