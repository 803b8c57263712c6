"""Tries both towers on two samples before a run starts, to find sizes that do not fit a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradcache_clip.cache.batch_tree import tensors_in
from gradcache_clip.train.backbones import first_line

# Errors that torch, timm and transformers raise on inputs of a wrong size or kind.
_UNFIT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


def check_towers(
    encoder: Any, *, image_size: int | None, tokens: Mapping[str, Tensor] | None
) -> None:
    """Encode two images and two texts and discard the features; the encoder is left unchanged.

    Args:
        encoder: on the device where it will run; has `encode_image`, `encode_text` or both.
        image_size: `data.image_size` in pixels; None without an image tower.
        tokens: `input_ids` and `attention_mask` of two texts, int64 (2, L), on any device, padded
            to `data.context_length` to show that the longest texts fit; None without a text tower.

    Raises:
        ValueError: a tower fails on these sizes, or returns NaN or infinity.
    """
    device = next(encoder.parameters()).device
    if image_size is not None:
        _check_images(encoder, image_size, device)
    if tokens is not None:
        _check_texts(encoder, {name: tensor.to(device) for name, tensor in tokens.items()})


def _check_images(encoder: Any, image_size: int, device: torch.device) -> None:
    # A ramp instead of random pixels leaves the random state of the run alone.
    ramp = torch.arange(2 * 3 * image_size**2) % 256
    images = ramp.view(2, 3, image_size, image_size).to(torch.uint8)
    _check(
        lambda: encoder.encode_image(images.to(device)),
        encoder,
        expected=f"model.image: expected a model for images of data.image_size={image_size}",
        got=_name(encoder.image_tower.backbone),
        remedy="raise data.image_size or choose another model.image or model.image_kwargs",
    )


def _check_texts(encoder: Any, texts: Mapping[str, Tensor]) -> None:
    length = texts["input_ids"].shape[1]
    _check(
        lambda: encoder.encode_text(texts),
        encoder,
        expected=f"model.text: expected a text encoder for data.context_length={length} tokens",
        got=_name(encoder.text_tower.backbone),
        remedy="pass e.g. model.text=bert, or change data.context_length or model.text_kwargs",
    )


def _check(
    encode: Callable[[], Any], encoder: nn.Module, *, expected: str, got: str, remedy: str
) -> None:
    try:
        features = tensors_in(_evaluated(encode, encoder))
        finite = all(bool(feature.isfinite().all()) for feature in features)
    except torch.OutOfMemoryError:
        raise
    except (*_UNFIT, ValueError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{expected}, got {got}, which fails ({reason}); {remedy}") from error
    if not finite:
        raise ValueError(f"{expected}, got {got}, whose features are NaN or infinite; {remedy}")


@torch.no_grad()
def _evaluated(encode: Callable[[], Any], encoder: nn.Module) -> Any:
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        return encode()
    finally:
        for module, training in modes.items():
            module.training = training


def _name(backbone: Any) -> str:
    """Return the name used in configurations: timm's architecture, or transformers' model type."""
    timm_name = (getattr(backbone, "pretrained_cfg", None) or {}).get("architecture")
    name = timm_name or getattr(getattr(backbone, "config", None), "model_type", None)
    return repr(name or type(backbone).__name__)
