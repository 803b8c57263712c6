"""Meta tensors that take the kernels and dtypes of another device: autocast, attention, dropout.

Nothing is allocated or computed on the meta device, which has no autocast of its own and no fused
attention. Here every call of a torch function is looked up by its name, and handled as the device
that is planned for would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DeviceKind = Literal["cuda", "cpu"]
"""Whose kernels: those of NVIDIA GPUs, or those of the CPU."""

_LOW = (
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addmv",
    "baddbmm", "addbmm", "einsum", "bilinear",
)  # fmt: skip
# Autocast to fp32 on CUDA alone; the first give their result a dtype without a copy of the input.
_WIDE_RESULT = ("softmax", "log_softmax", "softmin", "sum", "prod", "cumsum", "cumprod")
_WIDE = (
    "layer_norm", "group_norm", "rms_norm", "normalize", "norm", "exp", "expm1", "log", "log2",
    "log10", "log1p", "pow", "__pow__", "__rpow__", "rsqrt", "reciprocal", "softplus", "sinh",
    "cosh", "tan", "acos", "asin", "erfinv", "dist", "renorm", "cosine_similarity",
)  # fmt: skip
# On every device.
_WIDE_LOSSES = (
    "cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "mse_loss", "l1_loss",
    "smooth_l1_loss", "kl_div", "cdist",
)  # fmt: skip
# Functions in Python; the backward is one because of the forwards that checkpoints repeat in it.
_OF_PARTS = ("torch._tensor", "torch.autograd", "torch.functional", "torch.nn.functional")
_LARGEST_FLASH_HEAD = 256
_16_BIT = (torch.float16, torch.bfloat16)


_Rule = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]


class DeviceRules(TorchFunctionMode):
    """Context in which meta tensors behave as on a device under autocast.

    A tensor's truth value, which meta tensors do not have, is False: a mask is taken to hide
    something.

    Args:
        device_kind: whose kernels.
        dtype: what autocast casts to, bf16 or fp16; None: no autocast.

    Attributes:
        keeps_casts: whether a parameter is cast once, until `forget_casts`.
        on_cast: called with every copy of a parameter that is kept.
    """

    def __init__(self, device_kind: DeviceKind, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.device_kind, self.dtype = device_kind, dtype
        self.keeps_casts = True
        self.on_cast: Callable[[Tensor], Any] = _nothing
        self._casts: dict[int, Tensor] = {}
        self._rules: dict[str, _Rule] = dict(self._rules_by_name())

    def forget_casts(self) -> None:
        """As at the end of an autocast context."""
        self._casts.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, rule = kwargs or {}, self._rules.get(getattr(func, "__name__", ""))
        if rule is not None:
            return rule(func, args, kwargs)
        if type(func) is FunctionType and _is_made_of_parts(func):
            # Its parts are looked up too, which they would not be from inside of this one.
            with self:
                return _without_override(func)(*args, **kwargs)
        return func(*args, **kwargs)

    def _rules_by_name(self) -> Iterator[tuple[str, _Rule]]:
        yield "__bool__", lambda func, args, _: not args[0].is_meta and func(*args)
        yield "scaled_dot_product_attention", lambda _, args, named: self._attention(*args, **named)
        on_cuda, autocast = self.device_kind == "cuda", self.dtype is not None
        if on_cuda:
            yield "dropout", lambda _, args, named: _dropout(*args, **named)
        yield from ((name, self._in_low) for name in _LOW if autocast)
        yield from ((name, _in_fp32) for name in _WIDE_LOSSES if autocast)
        yield from ((name, _in_fp32) for name in _WIDE if autocast and on_cuda)
        yield from ((name, _to_fp32) for name in _WIDE_RESULT if autocast and on_cuda)

    def _in_low(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return func(*map(self._low, args), **_mapped(self._low, kwargs))

    def _low(self, given: Any) -> Any:
        """An argument as autocast casts it; the copy of a parameter is kept."""
        if isinstance(given, (list, tuple)):
            return type(given)(map(self._low, given))
        if not isinstance(given, Tensor) or given.dtype in (self.dtype, torch.float64):
            return given
        if not given.is_floating_point():
            return given
        keeps = given.dtype == torch.float32 and given.requires_grad and given.is_leaf
        if not (keeps and self.keeps_casts):
            return given.to(self.dtype)
        if id(given) not in self._casts:
            self._casts[id(given)] = given.to(self.dtype)
            self.on_cast(self._casts[id(given)])
        return self._casts[id(given)]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The fused kernel that the device would choose, or the matrix of all pairs of tokens."""
        if self.dtype is not None:
            query, key, value = map(self._low, (query, key, value))
        if enable_gqa:
            key, value = (
                each.repeat_interleave(query.size(-3) // each.size(-3), -3) for each in (key, value)
            )
        bias = _as_bias(attn_mask, query)
        aten, options = torch.ops.aten, {"scale": scale}
        given = query, key, value
        if self.device_kind == "cpu" and (dropout_p or query.dim() != 4):
            return aten._scaled_dot_product_attention_math(
                *given, bias, dropout_p, is_causal, **options
            )[0]
        if self.device_kind == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(
                *given, dropout_p, is_causal, attn_mask=bias, **options
            )[0]
        if bias is None and query.dtype in _16_BIT and query.size(-1) <= _LARGEST_FLASH_HEAD:
            return aten._scaled_dot_product_flash_attention(
                *given, dropout_p, is_causal, **options
            )[0]
        needs_lse = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        return aten._scaled_dot_product_efficient_attention(
            query,
            key,
            value,
            _aligned(bias, query, key),
            needs_lse,
            dropout_p,
            is_causal,
            **options,
        )[0]


def _in_fp32(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return func(*map(_wide, args), **_mapped(_wide, kwargs))


def _to_fp32(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result alone is fp32."""
    named = dict(kwargs)
    if _is_16_bit(args[0]) and named.get("dtype") is None:
        named["dtype"] = torch.float32
    return func(*args, **named)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """On CUDA the mask takes one byte an element."""
    if not training or p == 0:
        return input
    return torch.native_dropout(input, p, True)[0]


def _as_bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(query.dtype)
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)


def _aligned(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Rows of a bias start at multiples of 16 numbers, and each head sees the same ones."""
    if bias is None:
        return None
    tokens, missing = key.size(-2), -key.size(-2) % 16
    bias = torch.nn.functional.pad(bias, (0, missing))[..., :tokens] if missing else bias
    return bias.expand(query.size(0), query.size(1), query.size(2), tokens)


def _is_16_bit(given: Any) -> bool:
    return isinstance(given, Tensor) and given.dtype in _16_BIT


def _wide(given: Any) -> Any:
    return given.float() if _is_16_bit(given) else given


def _mapped(function: Callable[[Any], Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: function(value) for name, value in given.items()}


@cache
def _is_made_of_parts(func: FunctionType) -> bool:
    asks = any(name.startswith("has_torch_function") for name in func.__code__.co_names)
    return asks and func.__module__ in _OF_PARTS


@cache
def _without_override(func: FunctionType) -> FunctionType:
    """The same function, which does not ask again whether somebody overrides it."""
    names = {name: _never for name in func.__globals__ if name.startswith("has_torch_function")}
    again = FunctionType(
        func.__code__,
        {**func.__globals__, **names},
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    again.__kwdefaults__ = func.__kwdefaults__
    return again


def _never(*_: Any) -> bool:
    return False


def _nothing(_: Tensor) -> None:
    pass
