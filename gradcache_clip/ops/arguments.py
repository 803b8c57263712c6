"""Checks of arguments; their errors say name, expected, got and remedy."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_features(name: str, features: Tensor) -> None:
    """Raise unless `features` is a non-empty (rows, D) matrix of a floating dtype."""
    check_floating(name, features)
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(
            f"{name}: expected a non-empty (B, D) matrix, got shape {tuple(features.shape)}; "
            "pool each sample to one vector"
        )


def check_floating(name: str, features: Tensor) -> None:
    """Raise unless `features` is a tensor of a floating dtype that the ops take."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(features).__name__}")
    if features.layout != torch.strided:
        raise TypeError(
            f"{name}: expected a dense tensor, got {features.layout}; convert with .to_dense()"
        )
    if features.dtype not in _DTYPES:
        raise TypeError(
            f"{name}: expected float16, bfloat16, float32 or float64, got {features.dtype}; "
            "convert with .float()"
        )


def check_pairs(names: tuple[str, str], q: Tensor, k: Tensor) -> None:
    """Raise unless row i of both matrices can be one pair."""
    for name, features in zip(names, (q, k), strict=True):
        check_features(name, features)
    if q.shape != k.shape:
        raise ValueError(
            f"{names[1]}: expected the shape of {names[0]} {tuple(q.shape)}, "
            f"got {tuple(k.shape)}; row i of both must be one pair: pass one row of each, and "
            "project both to the same width"
        )
    check_same_device(names, q, k)


def check_same_device(names: tuple[str, str], q: Tensor, k: Tensor) -> None:
    """Raise unless the second tensor is on the device of the first."""
    if q.device != k.device:
        raise ValueError(
            f"{names[1]}: expected device {q.device}, got {k.device}; move one with .to(device)"
        )


def check_integers(
    name: str, values: Tensor, lengths: tuple[int, ...], device: torch.device
) -> None:
    """Raise unless `values` is a vector of integers of one of the lengths."""
    if not isinstance(values, Tensor) or values.dtype not in _INTEGERS:
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name}: expected a tensor of integers, got {got}; convert with .long()")
    if values.ndim != 1 or len(values) not in lengths:
        expected = " or ".join(f"({length},)" for length in dict.fromkeys(lengths))
        raise ValueError(
            f"{name}: expected shape {expected}, got {tuple(values.shape)}; one number per row"
        )
    if values.device != device:
        raise ValueError(
            f"{name}: expected device {device}, got {values.device}; move it with .to(device)"
        )


def scalar_tensor(
    name: str, value: float | Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return `value` as a 0-dim tensor in the dtype of the logits, without a synchronisation."""
    dtype = torch.promote_types(dtype, torch.float32)
    if isinstance(value, (int, float)):
        return torch.full((), float(value), device=device, dtype=dtype)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"{name}: expected a number or a floating-point tensor, got {got}; "
            "pass e.g. log_logit_scale.exp()"
        )
    if value.numel() != 1:
        raise ValueError(
            f"{name}: expected one element, got shape {tuple(value.shape)}; pass a 0-dim tensor"
        )
    if value.device != device:
        raise ValueError(
            f"{name}: expected device {device}, got {value.device}; move it with .to(device)"
        )
    return value.reshape(()).to(dtype)


def check_share(name: str, value: float) -> None:
    """Raise unless 0 <= value < 1."""
    if not isinstance(value, Real) or not 0 <= value < 1:
        raise ValueError(
            f"{name}: expected a share from 0 to below 1, got {value!r}; 0 turns it off"
        )


def check_widths(name: str, widths: Sequence[int], D: int) -> None:
    """Raise unless the widths are increasing whole numbers from 1 to D."""
    increasing = all(a < b for a, b in zip((0, *widths), widths, strict=False))
    if not widths or not increasing or widths[-1] > D:
        raise ValueError(
            f"{name}: expected increasing widths from 1 to the width of the features, {D}, got "
            f"{list(widths)}; the last one may be {D} itself"
        )
