"""What the documentation shows runs, and what it quotes is there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def surroundings() -> dict[str, object]:
    """What a block of the README takes for granted: the reader's own encoders and batch."""
    image_encoder, text_encoder = torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)
    parameters = [*image_encoder.parameters(), *text_encoder.parameters()]
    return {
        "image_encoder": image_encoder,
        "text_encoder": text_encoder,
        "images": torch.randn(12, 8),
        "texts": torch.randn(12, 6),
        "optimizer": torch.optim.SGD(parameters, lr=0.1),
    }


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=lambda p: p.name)
def test_python_blocks_run_one_after_another(page: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    names = surroundings()
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def messages() -> str:
    """All literal text of the library, what an f-string fills in left out."""
    texts = []
    for path in (ROOT / "gradcache_clip").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_messages_that_troubleshooting_explains_exist():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        text for heading in re.findall(r"^### (.*)$", page, re.M)
        for text in re.findall(r"`([^`]+)`", heading)
    ]  # fmt: skip
    assert len(quoted) > 20
    known = messages()
    assert [text for text in quoted if text not in known] == []


def test_commands_of_the_documentation_parse():
    """`gradcache-clip COMMAND` names a command that exists."""
    usage = subprocess.run(
        [sys.executable, "-m", "gradcache_clip.cli", "--help"], capture_output=True, text=True
    ).stdout
    known = {line.split()[0] for line in usage.splitlines() if line.startswith("    ")}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for command in re.findall(r"(?:^    |`)gradcache-clip ([a-z]+)", text, re.M):
            assert command in known, f"{page.name}: gradcache-clip {command}"
