"""Makes meta tensors follow the kernels and dtypes of a real device: autocast, attention, dropout.

The meta device allocates and computes nothing, but has neither autocast nor fused attention. Here
every call of a torch function is looked up by name, and handled as on the planned device.
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
"""Device whose kernels to follow: NVIDIA GPUs or CPUs."""

# Ops that autocast runs in the lower precision.
_LOW = (
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addmv",
    "baddbmm", "addbmm", "einsum", "bilinear",
)  # fmt: skip
# Ops that autocast runs in fp32 on CUDA only. These first ones take dtype= and copy no input.
_WIDE_RESULT = ("softmax", "log_softmax", "softmin", "sum", "prod", "cumsum", "cumprod")
_WIDE = (
    "layer_norm", "group_norm", "rms_norm", "normalize", "norm", "exp", "expm1", "log", "log2",
    "log10", "log1p", "pow", "__pow__", "__rpow__", "rsqrt", "reciprocal", "softplus", "sinh",
    "cosh", "tan", "acos", "asin", "erfinv", "dist", "renorm", "cosine_similarity",
)  # fmt: skip
# Ops that autocast runs in fp32 on every device.
_WIDE_LOSSES = (
    "cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "mse_loss", "l1_loss",
    "smooth_l1_loss", "kl_div", "cdist",
)  # fmt: skip
# Modules of functions written in Python. Backward is one of them, since activation checkpoints
# repeat forwards inside it.
_PYTHON_MODULES = ("torch._tensor", "torch.autograd", "torch.functional", "torch.nn.functional")
_LARGEST_FLASH_HEAD = 256
_16_BIT = (torch.float16, torch.bfloat16)


_Rule = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]


class DeviceRules(TorchFunctionMode):
    """Context manager in which meta tensors behave as on a device under autocast.

    The truth value of a meta tensor, which has none, is False: checks such as `mask.all()` then
    take a mask to hide something.

    Args:
        device_kind: device whose kernels to follow.
        dtype: of autocast, bf16 or fp16; None without autocast.

    Attributes:
        keeps_casts: whether casts of parameters are cached until `forget_casts`.
        on_cast: called with every cached cast of a parameter.
    """

    def __init__(self, device_kind: DeviceKind, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.device_kind, self.dtype = device_kind, dtype
        self.keeps_casts = True
        self.on_cast: Callable[[Tensor], Any] = _nothing
        self._casts: dict[int, Tensor] = {}
        self._rules: dict[str, _Rule] = dict(self._rules_by_name())

    def forget_casts(self) -> None:
        """Clear the cache of casts, as the end of an autocast context does."""
        self._casts.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, rule = kwargs or {}, self._rules.get(getattr(func, "__name__", ""))
        if rule is not None:
            return rule(func, args, kwargs)
        if type(func) is FunctionType and _calls_torch_functions(func):
            # Enter the mode again, so that the torch functions called inside are looked up too.
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
        """Cast an argument as autocast does; casts of fp32 parameters are cached."""
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
        """Call the attention kernel that the device would choose, fused or not."""
        if self.dtype is not None:
            query, key, value = map(self._low, (query, key, value))
        if enable_gqa:
            key, value = (
                each.repeat_interleave(query.size(-3) // each.size(-3), -3) for each in (key, value)
            )
        bias = _as_bias(attn_mask, query)
        aten, options = torch.ops.aten, {"scale": scale}
        given = query, key, value
        # The fused kernel of the CPU takes four dimensions and no dropout.
        if self.device_kind == "cpu" and (dropout_p or query.dim() != 4):
            return aten._scaled_dot_product_attention_math(
                *given, bias, dropout_p, is_causal, **options
            )[0]
        if self.device_kind == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(
                *given, dropout_p, is_causal, attn_mask=bias, **options
            )[0]
        # Flash attention takes 16-bit inputs without a mask; the efficient kernel takes the rest.
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
    """Compute the result in fp32 through dtype=, without a copy of the input."""
    named = dict(kwargs)
    if _is_16_bit(args[0]) and named.get("dtype") is None:
        named["dtype"] = torch.float32
    return func(*args, **named)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Call the fused dropout of CUDA, whose mask takes one byte per element."""
    if not training or p == 0:
        return input
    return torch.native_dropout(input, p, True)[0]


def _as_bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(query.dtype)
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)


def _aligned(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Pad the rows of a bias to multiples of 16 elements, and expand it over all heads."""
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
def _calls_torch_functions(func: FunctionType) -> bool:
    asks = any(name.startswith("has_torch_function") for name in func.__code__.co_names)
    return asks and func.__module__ in _PYTHON_MODULES


@cache
def _without_override(func: FunctionType) -> FunctionType:
    """Return a copy of a function that skips the check for __torch_function__ overrides."""
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
