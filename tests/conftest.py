"""Shared by all tests: seeds, and the table of gradient errors at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from _pytest.terminal import TerminalReporter

WORST_ERROR = "worst_relative_error"


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """How far cached gradients are from those of the one-shot step, for each recorded setting."""
    rows = [
        value
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        if report.when == "call"
        for name, value in report.user_properties
        if name == WORST_ERROR
    ]
    if not rows:
        return
    terminalreporter.section("gradients against the one-shot step: worst relative error")
    width = max(len(setting) for setting, _, _ in rows)
    for setting, parameter, error in rows:
        terminalreporter.write_line(f"{setting:<{width}}  {error:.1e}  {parameter}")
