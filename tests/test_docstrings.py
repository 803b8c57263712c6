"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import gradcache_clip

NAMES = [
    module.name
    for module in pkgutil.walk_packages(gradcache_clip.__path__, "gradcache_clip.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", ["gradcache_clip", *NAMES])
def test_examples(name: str):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_public_names_have_examples():
    for name in ("ClipLoss", "GradCache"):
        assert ">>>" in getattr(gradcache_clip, name).__doc__
