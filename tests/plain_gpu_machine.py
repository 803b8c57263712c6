"""The packages of a rented GPU machine as it comes, and a Python that has no others."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

INSTALLED = frozenset(
    [
        "absl-py",
        "accelerate",
        "aiofiles",
        "aiohttp",
        "anyio",
        "attrs",
        "build",
        "certifi",
        "charset-normalizer",
        "click",
        "cloudpickle",
        "colorama",
        "contourpy",
        "coverage",
        "cycler",
        "einops",
        "execnet",
        "filelock",
        "fonttools",
        "fsspec",
        "h11",
        "hf-xet",
        "httpcore",
        "httpx",
        "huggingface-hub",
        "hypothesis",
        "idna",
        "imageio",
        "iniconfig",
        "jaxtyping",
        "jinja2",
        "joblib",
        "kiwisolver",
        "lazy-loader",
        "lightning",
        "lightning-utilities",
        "markdown-it-py",
        "markdown",
        "markupsafe",
        "matplotlib",
        "mdurl",
        "mpmath",
        "mypy-extensions",
        "networkx",
        "ninja",
        "numpy",
        "packaging",
        "pandas",
        "pathspec",
        "peft",
        "pillow",
        "pip",
        "pluggy",
        "protobuf",
        "psutil",
        "pyarrow",
        "pygments",
        "pyparsing",
        "pyproject-hooks",
        "pytest",
        "pytest-cov",
        "pytest-xdist",
        "python-dateutil",
        "pytorch-lightning",
        "pyyaml",
        "regex",
        "requests",
        "rich",
        "safetensors",
        "scikit-image",
        "scikit-learn",
        "scipy",
        "seaborn",
        "sentence-transformers",
        "sentencepiece",
        "setuptools",
        "shellingham",
        "simplejson",
        "six",
        "sortedcontainers",
        "sympy",
        "tensorboard",
        "tensorboard-data-server",
        "threadpoolctl",
        "tifffile",
        "tiktoken",
        "timm",
        "tokenizers",
        "torch",
        "torch-geometric",
        "torchmetrics",
        "torchvision",
        "tqdm",
        "transformers",
        "triton",
        "typer",
        "typing-extensions",
        "urllib3",
        "wadler-lindig",
        "werkzeug",
        "wheel",
        "xxhash",
    ]
)
CARRIED = frozenset(("pydantic", "pydantic-core", "annotated-types", "typing-inspection"))
"""What `plan` needs beside them, carried as wheels."""
OURS = "gradcache-clip"

_FINDER = """
import sys
from importlib.machinery import PathFinder


class Hiding:
    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in {modules}
        return None if hidden else PathFinder.find_spec(name, path, target)

    def find_distributions(self, context):
        for each in PathFinder.find_distributions(context):
            if (each.name or "").lower().replace("_", "-") not in {distributions}:
                yield each

    def invalidate_caches(self):
        PathFinder.invalidate_caches()


sys.meta_path[:] = [Hiding() if each is PathFinder else each for each in sys.meta_path]
"""


def absent() -> tuple[set[str], set[str]]:
    """Modules of what is installed here and not there, and the names of these distributions."""
    there = {canonicalize_name(OURS)}
    for name in INSTALLED | CARRIED:
        _add(name, there)
    modules, distributions = set(), set()
    for module, owners in packages_distributions().items():
        if not there & set(map(canonicalize_name, owners)):
            modules.add(module)
            distributions |= set(map(canonicalize_name, owners))
    return modules, distributions


def hide_others(folder: Path) -> Path:
    """Write a `sitecustomize` that hides them from every Python that has `folder` in its path."""
    folder.mkdir()
    modules, distributions = absent()
    text = _FINDER.format(modules=modules, distributions=distributions)
    (folder / "sitecustomize.py").write_text(text)
    return folder


def _add(name: str, there: set[str]) -> None:
    """Add a distribution and what its version that is installed here needs."""
    name = canonicalize_name(name)
    if name in there:
        return
    there.add(name)
    with suppress(PackageNotFoundError):
        for text in requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                _add(needed.name, there)
