"""Shared by all tests: seeds, and the table of gradient errors at the end of a run."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _pytest.terminal import TerminalReporter

FAULTS = "faults"
WORST_ERROR = "worst_relative_error"
EACH_PARAMETER = "relative_error_of_each_parameter"
ENCODER_ERROR = "worst_relative_error_of_an_encoder"
SHOWN = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=int, default=0, help="faults to inject, over all kinds")


def pytest_configure(config: pytest.Config) -> None:
    """Give `datasets` a folder for its copies, and hear interrupts; subprocesses inherit both."""
    cache = tempfile.TemporaryDirectory(prefix="datasets-")
    os.environ.setdefault("HF_DATASETS_CACHE", cache.name)
    config.add_cleanup(cache.cleanup)
    # A shell starts what runs in the background deaf to interrupts, and its children with it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of drawn characters, which no test changes."""
    from tiny_run import make_data

    return make_data(tmp_path_factory.mktemp("glyphs"))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """What came of faults, and how far cached gradients are from those of the one-shot step."""
    _write_faults(terminalreporter)
    _write_encoders(terminalreporter)
    _write_fuzz(terminalreporter)
    settings = _recorded(terminalreporter, WORST_ERROR)
    if not settings:
        return
    terminalreporter.section("gradients against the one-shot step: worst relative error")
    width = max(len(setting) for setting, _, _ in settings)
    for setting, parameter, error in settings:
        terminalreporter.write_line(f"{setting:<{width}}  {error:.1e}  {parameter}")
    _write_parameters(terminalreporter, _recorded(terminalreporter, EACH_PARAMETER))


def _write_faults(terminalreporter: TerminalReporter) -> None:
    kinds: dict[str, list[int]] = {}
    for kind, *counts in _recorded(terminalreporter, FAULTS):
        kinds[kind] = [sum(pair) for pair in zip(kinds.get(kind, [0, 0, 0]), counts, strict=True)]
    if not kinds:
        return
    rows = [("", "injected", "survived", "resumed exactly")]
    rows += [(kind, *map(str, counts)) for kind, counts in kinds.items()]
    totals = [sum(counts) for counts in zip(*kinds.values(), strict=True)]
    rows.append(("all", *map(str, totals)))
    terminalreporter.section("faults")
    for kind, *cells in rows:
        terminalreporter.write_line(f"{kind:<30}" + "".join(f"{cell:>17}" for cell in cells))


def _write_fuzz(terminalreporter: TerminalReporter) -> None:
    for lines in _recorded(terminalreporter, "fuzz"):
        terminalreporter.section("hostile files")
        for line in lines:
            terminalreporter.write_line(line)


def _write_encoders(terminalreporter: TerminalReporter) -> None:
    """A row per encoder, a column per strategy."""
    recorded = _recorded(terminalreporter, ENCODER_ERROR)
    if not recorded:
        return
    terminalreporter.section("encoders: worst relative error of a gradient, by strategy")
    errors = {(name, strategy): f"{error:.1e}" for name, strategy, error in recorded}
    names, strategies = (dict.fromkeys(each[i] for each in recorded) for i in (0, 1))
    width = max(map(len, names))
    terminalreporter.write_line(" " * width + "".join(f"{each:>11}" for each in strategies))
    for name in names:
        row = "".join(f"{errors.get((name, each), '-'):>11}" for each in strategies)
        terminalreporter.write_line(f"{name:<{width}}{row}")


def _recorded(terminalreporter: TerminalReporter, wanted: str) -> list:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    return [
        value
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == wanted
    ]


def _write_parameters(terminalreporter: TerminalReporter, recorded: list) -> None:
    """The worst of each parameter over all settings of a dtype; all of them with -v."""
    errors: dict[tuple[str, str], float] = {}
    for dtype, by_parameter in recorded:
        for name, error in by_parameter.items():
            errors[dtype, name] = max(error, errors.get((dtype, name), 0.0))
    for dtype in sorted({dtype for dtype, _ in errors}):
        rows = sorted(((e, name) for (d, name), e in errors.items() if d == dtype), reverse=True)
        shown = rows if terminalreporter.verbosity > 0 else rows[:SHOWN]
        terminalreporter.write_line(
            f"{dtype}: worst of each of {len(rows)} parameters, largest first"
            + ("" if len(shown) == len(rows) else f" ({SHOWN} shown, all with -v)")
        )
        for error, name in shown:
            terminalreporter.write_line(f"  {error:.1e}  {name}")
