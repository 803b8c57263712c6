"""The precision of a run: autocast, and the scaling of its loss."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

_AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context that encoders run in; fp32 leaves them alone."""
    dtype = _AUTOCAST_DTYPE.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss in fp16 alone; otherwise it passes everything through."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
