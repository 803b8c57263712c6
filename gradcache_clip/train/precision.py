"""Mixed precision: autocast and gradient scaling."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

_AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the autocast context for encoders; it does nothing for fp32."""
    dtype = _AUTOCAST_DTYPE.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return a gradient scaler that is enabled for fp16 only."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
