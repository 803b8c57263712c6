"""The rooms of the library and what they may import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gradcache_clip"
ALLOWED = {
    "kernels": set(),
    "ops": {"kernels"},
    "distributed": set(),
    "losses": {"ops", "distributed"},
    "cache": {"distributed"},
    "verification": {"cache", "distributed"},
    "train": {"losses", "cache", "distributed", "verification"},
    "integrations": {"losses", "cache", "distributed"},
    "memory": {"train", "losses", "cache", "distributed"},
    "__init__": {"cache", "losses", "verification", "memory"},
    "cli": {"memory", "train", "verification", "losses", "cache", "distributed"},
}


def modules(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.exists() else sorted((PACKAGE / room).resolve().rglob("*.py"))


def rooms_imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            assert name.split(".")[0] != "kernels", f"{path} imports kernels by its bare name"
            if name.startswith("gradcache_clip."):
                yield name.split(".")[1]


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_only_go_down(room: str):
    assert modules(room), f"{room} has no modules"
    for path in modules(room):
        for imported in rooms_imported(path):
            # The package's own name and version live at the top.
            if imported == "__version__":
                continue
            assert imported == room or imported in ALLOWED[room], f"{path} imports {imported}"


def test_every_room_is_listed():
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    assert rooms - {"py.typed", "__pycache__", "__main__"} == set(ALLOWED)


def test_no_room_for_odds_and_ends():
    names = {path.stem for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]}
    assert not names & {"utils", "common", "misc", "helpers"}


def test_kernels_is_no_package_of_its_own():
    """With an __init__.py it would shadow Hugging Face's `kernels` and break transformers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (PACKAGE / "kernels").resolve() == ROOT / "kernels"


def test_importing_the_library_loads_torch_alone():
    heavy = ["triton", "timm", "transformers", "webdataset", "deepspeed", "matplotlib", "omegaconf",
             "rich", "tensorboard", "safetensors", "tokenizers", "PIL", "torchvision",
             "open_clip", "sklearn", "sentence_transformers", "lightning",
             "accelerate", "jaxtyping", "numpy.testing"]  # fmt: skip
    code = (
        "import sys, torch; before = set(sys.modules); "
        "import gradcache_clip.distributed, gradcache_clip.ops.late_interaction; "
        "from gradcache_clip import ClipLoss, GradCache, verify; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stderr


def test_transformers_imports_beside_the_checkout():
    """`kernels/` at the root of sys.path must not be taken for the package of that name."""
    code = "from transformers import BertConfig, BertModel; import gradcache_clip.kernels; print(1)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "1", result.stderr


def files_imported(path: Path, *, for_types: bool = False) -> Iterator[Path]:
    """Files of the package that a file imports when it runs or, if asked, for types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if for_types else executed(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradcache_clip"):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                parts = name.split(".")[1:]
                found = (PACKAGE.joinpath(*parts[:end]).with_suffix(".py") for end in (None, -1))
                yield from (file for file in found if parts and file.is_file())


def executed(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if not for_types:
            yield child
            yield from executed(child)


def test_files_import_each_other_in_no_circle():
    """Also where an import waits inside a function, or is for types alone."""
    files = [path for room in ALLOWED for path in modules(room) if path.name != "__init__.py"]
    edges = {path: {*files_imported(path, for_types=True)} - {path} for path in files}
    assert sum(map(len, edges.values())) > 500
    done: set[Path] = set()

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        assert path not in above, " -> ".join(str(p.relative_to(PACKAGE)) for p in (*above, path))
        if path not in done:
            for following in edges.get(path, ()):
                visit(following, (*above, path))
            done.add(path)

    for path in files:
        visit(path, ())


def reached(path: Path) -> set[Path]:
    """All files that a file imports, directly or through others."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        new = {*files_imported(waiting.pop())} - found
        found |= new
        waiting += new
    return found


def test_the_loop_knows_no_program():
    programs = PACKAGE / "train" / "programs"
    own = {"program.py", "momentum_queue.py", "teacher.py"}
    kinds = {path for path in programs.glob("*.py") if path.name not in {"__init__.py", *own}}
    assert {path.stem for path in kinds} >= {"pairs", "views", "texts"}
    for name in ("fit", "state", "step", "engine", "config"):
        assert not reached(PACKAGE / "train" / f"{name}.py") & kinds, name
    for path in kinds:
        assert not reached(path) & (kinds - {path}), path


def test_no_file_of_the_product_is_long():
    long = {
        path: text.count("\n")
        for room in ALLOWED
        for path in modules(room)
        if (text := path.read_text()).count("\n") > 320
    }
    assert not long


@pytest.mark.parametrize("command", ["--help", "plan --help", "train --help"])
def test_the_command_line_answers_before_torch_is_there(command):
    code = (
        "import sys; from gradcache_clip.cli import main\n"
        f"try: main({command.split()!r})\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_page_on_the_architecture_shows_the_rooms():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (.*?) ?\|$", page, re.M)
    shown = {room: set(re.findall(r"`(\w+)`", imports)) for room, imports in rows}
    assert shown == {room: imports for room, imports in ALLOWED.items() if room != "__init__"}


def test_files_that_the_page_names_exist():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in re.findall(r"`([\w/]+/[\w/.]+)`", page):
        assert (PACKAGE / path).exists() or (ROOT / path).exists(), path
