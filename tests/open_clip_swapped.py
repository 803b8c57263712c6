"""Our losses in place of open_clip's, as a plugin of pytest, for open_clip's own tests:

PYTHONPATH=open_clip/src:tests python -m pytest -p open_clip_swapped open_clip/tests
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import open_clip
import open_clip.factory
import open_clip.loss

from gradcache_clip.integrations import open_clip as ours


def places() -> Iterator[tuple[ModuleType, str, Any]]:
    """Yield the modules of open_clip that name a loss, the name, and the loss of ours."""
    for module in (open_clip, open_clip.factory, open_clip.loss):
        for name in ("ClipLoss", "SigLipLoss", "CoCaLoss", "DistillClipLoss"):
            if hasattr(module, name):
                yield module, name, getattr(ours, name)


def pytest_configure() -> None:
    for module, name, loss in places():
        setattr(module, name, loss)
