"""Examples of losses beside the contrastive one: exact beside the one-shot step, and short."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("coca.py", "grit.py", "mixture_of_experts.py")


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[float]]:
    """Output, and the errors beside the one-shot step that it tells of."""
    runpy.run_path(str(EXAMPLES / name))
    output = capsys.readouterr().out
    return output, [float(error) for error in re.findall(r"error of a gradient: (\S+)", output)]


@pytest.mark.parametrize(
    ("name", "parts"), [("coca.py", "contrast.*caption"), ("grit.py", "contrast.*generation")]
)
def test_sums_over_rows_are_exact(name: str, parts: str, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("open_clip")
    output, errors = printed(name, capsys)
    assert re.search(f"'loss'.*{parts}", output) and len(errors) == 1 and errors[0] < 1e-10


def test_the_balance_of_chunks_and_of_the_batch(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("transformers")
    with pytest.warns(UserWarning, match="'balance' is not a mean over rows"):
        output, errors = printed("mixture_of_experts.py", capsys)
    chunks, batch = errors
    assert batch < 1e-5 < 1e-4 < chunks
    exact = re.findall(r"'balance': tensor\((\S+)\)}, auxiliary", output)
    assert exact == re.findall(r"one shot: balance (\S+);", output)[1:]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short(name: str):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 40
