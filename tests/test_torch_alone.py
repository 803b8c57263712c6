"""The library where torch alone is installed, in a process that finds nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCH_ALONE = """
import sys, warnings
from importlib.metadata import packages_distributions

needed = {"gradcache_clip", "torch", "torchgen", "functorch", "typing_extensions", "sympy",
          "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec", "setuptools"}
for name in set(packages_distributions()) - needed:
    sys.modules[name] = None
# torch warns that it has no numpy.
warnings.filterwarnings("ignore", "Failed to initialize NumPy")
import torch, gradcache_clip
"""
LOOKS = """
import inspect, pydoc, rlcompleter

assert "Exact large-batch" in pydoc.render_doc(gradcache_clip)
assert {*gradcache_clip.__all__} <= dict(inspect.getmembers(gradcache_clip)).keys()
assert rlcompleter.Completer({"g": gradcache_clip}).complete("g.", 0)
from gradcache_clip import *
assert plan is gradcache_clip.plan
"""
LOSSES = """
for impl in ("auto", "tiled", "triton"):
    pair = [torch.randn(4, 2, requires_grad=True) for _ in range(2)]
    gradcache_clip.ClipLoss(impl=impl)(*pair).loss.backward()
    print(impl)
"""


def alone(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", TORCH_ALONE + code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_package_can_be_looked_at() -> None:
    result = alone(LOOKS)
    assert result.returncode == 0, result.stderr


def test_plan_says_what_to_install() -> None:
    result = alone("gradcache_clip.plan('convnext_atto', 'bert-tiny', '24GB')")
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ModuleNotFoundError: plan: expected the package "), result.stderr
    assert error.endswith(', got none; pip install "gradcache-clip[train]"')


def test_losses_run_and_kernels_say_what_to_install() -> None:
    result = alone(LOSSES)
    assert result.stdout.split() == ["auto", "tiled"], result.stderr
    error = result.stderr.splitlines()[-1]
    assert error.startswith("RuntimeError: impl: expected an implementation that runs here")
    assert "pip install triton" in error
