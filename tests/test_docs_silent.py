"""The page "Exact or an error" says what really happens, habit by habit."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from silent_habits import HABITS
from torch import nn

from gradcache_clip import ClipLoss, GradCache

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "exact-or-an-error.md").read_text(encoding="utf-8")


def table_rows() -> dict[str, str]:
    """What happens, by the name of the function or test that shows it."""
    lines = re.findall(r"^\| (.+) \| (.+) \| `([^`|]+)` \|$", PAGE, re.M)
    assert len(lines) == len({name for _, _, name in lines}), "a habit stands in two rows"
    return {name: what for _, what, name in lines}


ROWS = table_rows()


def test_every_habit_has_its_row():
    shown = {name for name in ROWS if "::" not in name}
    assert shown == HABITS.keys()
    assert len(re.findall(r"^\| ", PAGE, re.M)) == len(ROWS) + len(
        re.findall(r"^\|---", PAGE, re.M)
    )


@pytest.mark.parametrize("name", HABITS)
def test_what_the_page_says_of_a_habit_happens(name: str):
    torch.manual_seed(0)
    found, said = HABITS[name](), ROWS[name]
    kind, _, rest = said.partition(": ")
    if said.startswith("exact"):
        assert found == "exact"
        return
    assert kind in ("error", "warning"), said
    words = re.match(r"`([^`]+)`", rest)
    assert words is not None, f"{name}: quote the words of its {kind}"
    assert re.match(r"\w+(Error|Warning): ", found), found
    assert ("Warning: " in found) == (kind == "warning")
    assert words[1] in found


def test_the_loss_that_refuses_a_backward_prints_as_any_other():
    x = torch.eye(4)
    loss = GradCache((nn.Linear(4, 3), nn.Linear(4, 3)), ClipLoss(), chunk_size=3)(x, x).loss
    assert f"{loss:.3f}" == f"{loss.item():.3f}" and repr(loss) == repr(torch.tensor(loss.item()))


@pytest.mark.parametrize("node", [name for name in ROWS if "::" in name])
def test_tests_that_the_page_names_exist(node: str):
    file, _, name = node.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}
