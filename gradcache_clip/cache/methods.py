"""One model with a method for each input, such as CLIPModel, as the encoder of them all."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from gradcache_clip.cache.trunk import call_encoder
from gradcache_clip.distributed.wrappers import DDP, DEEPSPEED, FSDP1, FSDP2, is_kind, uncompiled

_FEATURES_OF = re.compile(r"get_(image|audio|text)_features|encode_(image|audio|text)")
_LIBRARIES = ("transformers", "open_clip")


def methods(model: nn.Module, *names: str) -> nn.Module:
    """Make one encoder of a model with a method for each input.

    `GradCache(methods(model, "get_image_features", "get_text_features"), loss)(images, texts)`
    calls `model.get_image_features` with the first input and `model.get_text_features` with the
    second: a dict becomes keyword arguments, a tuple positional ones. The model is a submodule and
    keeps its parameters. DistributedDataParallel, `fully_shard` and DeepSpeed go around what this
    returns, because their hooks run in `forward`.

    Args:
        model: CLIPModel, SiglipModel, an open_clip model, or any other.
        names: of its methods, one for each input.

    Raises:
        TypeError, ValueError: not a module, no such method, or a model that is wrapped already.

    Example:
        >>> import torch
        >>> from gradcache_clip import ClipLoss, GradCache, methods
        >>> class Pair(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.image, self.text = torch.nn.Linear(8, 4), torch.nn.Linear(6, 4)
        ...     def encode_image(self, x):
        ...         return self.image(x)
        ...     def encode_text(self, x):
        ...         return self.text(x)
        >>> encoders = methods(Pair(), "encode_image", "encode_text")
        >>> cache = GradCache(encoders, ClipLoss())
        >>> out = cache(torch.randn(16, 8), torch.randn(16, 6))
    """
    if not isinstance(model, nn.Module) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"methods: expected a torch.nn.Module and names of its methods, got "
            f"{type(model).__name__} and {list(names)}; such as methods(model, "
            '"get_image_features", "get_text_features")'
        )
    missing = [name for name in names if not callable(getattr(model, name, None))]
    if missing or not names:
        raise ValueError(
            f"methods: expected names of methods of {type(model).__name__}, got "
            f"{missing[0] if missing else 'none'!r}; it has {', '.join(feature_methods(model))}"
        )
    _refuse_wrapped(model)
    return _Methods(model, names)


class _Methods(nn.Module):
    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, tower: int, inputs: Any) -> Any:
        if tower >= len(self.names):
            raise ValueError(
                f"inputs: expected {len(self.names)}, one for each of {', '.join(self.names)}, "
                f"got more; name as many methods as there are inputs"
            )
        # It may have been sharded since.
        _refuse_wrapped(self.model)
        return call_encoder(getattr(self.model, self.names[tower]), inputs)


def _refuse_wrapped(model: nn.Module) -> None:
    for kind in (DDP, FSDP1, FSDP2, DEEPSPEED):
        if is_kind(uncompiled(model), kind):
            raise ValueError(
                f"methods: expected a model without a wrapper, got one in {kind}, whose hooks run "
                "in forward alone; wrap what methods(model, ...) returns"
            )


def feature_methods(model: nn.Module) -> list[str]:
    """List methods that look as if each embeds one kind of input; text comes last."""
    found = [name for name in dir(model) if _FEATURES_OF.fullmatch(name)]
    return sorted(found, key=lambda name: ("text" in name, name))


def is_pair(model: nn.Module) -> bool:
    """Whether its forward takes both inputs of a pair, as in transformers and open_clip."""
    homes = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    return len(feature_methods(model)) > 1 and not homes.isdisjoint(_LIBRARIES)


def remedy(model: nn.Module) -> str:
    """Show the call of `methods` that makes an encoder of the model."""
    return f"methods(model, {', '.join(map(repr, feature_methods(model)))})".replace("'", '"')
