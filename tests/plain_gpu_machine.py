"""The packages of a rented GPU machine as it comes, and a Python that has no others."""

from __future__ import annotations

from importlib.metadata import packages_distributions
from pathlib import Path

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


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Absent())
"""


def absent_modules() -> set[str]:
    """Modules of what is installed here and not there."""
    there = {_normalised(name) for name in INSTALLED | CARRIED | {OURS}}
    return {
        module
        for module, distributions in packages_distributions().items()
        if not there & set(map(_normalised, distributions))
    }


def hide_others(folder: Path) -> Path:
    """Write a `sitecustomize` that hides them from every Python that has `folder` in its path."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_FINDER.format(names=absent_modules()))
    return folder


def _normalised(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
