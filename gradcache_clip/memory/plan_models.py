"""Builds both towers on the meta device, from names or a training configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradcache_clip.train.backbones import arguments_of, unknown_name
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_model import DualConfig, MultiwayConfig
from gradcache_clip.train.towers import DualEncoder, build_towers

if TYPE_CHECKING:
    from gradcache_clip.train.programs.pairs import PairsConfig


@dataclass(frozen=True)
class TextName:
    """A published text encoder, as transformers builds it without weights."""

    kind: str
    """Model type of transformers."""
    vocab_size: int
    arguments: tuple[tuple[str, Any], ...] = ()
    """Fields of its configuration that differ from the type's defaults."""
    pad_token_id: int = 0


def _bert(layers: int, width: int, heads: int, *, vocab_size: int = 30522) -> TextName:
    arguments = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 512,
    }
    return TextName("bert", vocab_size, tuple(arguments.items()))


_LARGE = (("num_hidden_layers", 24), ("hidden_size", 1024), ("num_attention_heads", 16))
# The eos_token_id is for CLIP's pooler, which is built although it is not used.
_CLIP = (("max_position_embeddings", 77), ("eos_token_id", 49407))
_POSITIONS = (("max_position_embeddings", 514),)

TEXT_NAMES = {
    "bert-tiny": _bert(2, 128, 2),
    "bert-mini": _bert(4, 256, 4),
    "bert-small": _bert(4, 512, 8),
    "bert-medium": _bert(8, 512, 8),
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "bert-base-cased": _bert(12, 768, 12, vocab_size=28996),
    "bert-base-multilingual-cased": _bert(12, 768, 12, vocab_size=119547),
    "all-minilm-l6-v2": _bert(6, 384, 12),
    "all-minilm-l12-v2": _bert(12, 384, 12),
    "distilbert-base": TextName("distilbert", 30522),
    "roberta-base": TextName("roberta", 50265, _POSITIONS, 1),
    "roberta-large": TextName(
        "roberta", 50265, (*_LARGE, ("intermediate_size", 4096), *_POSITIONS), 1
    ),
    "xlm-roberta-base": TextName("xlm-roberta", 250002, _POSITIONS, 1),
    "xlm-roberta-large": TextName(
        "xlm-roberta", 250002, (*_LARGE, ("intermediate_size", 4096), *_POSITIONS), 1
    ),
    "modernbert-base": TextName("modernbert", 50368),
    "modernbert-large": TextName(
        "modernbert",
        50368,
        (
            ("num_hidden_layers", 28),
            ("hidden_size", 1024),
            ("num_attention_heads", 16),
            ("intermediate_size", 2624),
        ),
    ),
    "clip-text-base": TextName("clip_text_model", 49408, _CLIP),
    "clip-text-large": TextName(
        "clip_text_model",
        49408,
        (
            *_CLIP,
            ("hidden_size", 768),
            ("num_attention_heads", 12),
            ("intermediate_size", 3072),
        ),
    ),
}
"""Short names. A model type of transformers, such as "bert", means its default configuration."""

# For model types whose default configuration has no vocabulary.
_UNKNOWN_VOCABULARY = 32768


@dataclass(frozen=True)
class Sizes:
    """Shapes of the inputs of both towers."""

    image_size: int
    """Height and width in pixels."""
    context_length: int
    """Tokens of a text."""
    vocab_size: int
    pad_token_id: int = 0

    def images(self, rows: int) -> Tensor:
        """Return images, uint8 (rows, 3, H, W) on the meta device."""
        shape = (rows, 3, self.image_size, self.image_size)
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    def texts(self, rows: int) -> dict[str, Tensor]:
        """Return ids and mask, int64 (rows, L) on the meta device."""
        names, shape = ("input_ids", "attention_mask"), (rows, self.context_length)
        return {name: torch.empty(shape, dtype=torch.int64, device="meta") for name in names}

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return 3 * self.image_size**2

    @property
    def text_bytes(self) -> int:
        """Bytes of one text."""
        return 16 * self.context_length


def named_pair(
    image: str, text: str, *, image_size: int | None, context_length: int, feature_dim: int
) -> tuple[DualConfig, Sizes]:
    """Look up a timm name, and a short name, model type or published name of a text encoder.

    Raises:
        ValueError: an unknown name; the error gives the nearest ones.
    """
    found = _text_name(text)
    model = DualConfig(
        image=image,
        text=found.kind,
        text_kwargs=dict(found.arguments),
        text_pool=_pool_of(found.kind),
        feature_dim=feature_dim,
    )
    size = image_size or _own_image_size(image)
    return model, Sizes(size, context_length, found.vocab_size, found.pad_token_id)


def configured_pair(config: PairsConfig) -> tuple[DualConfig | MultiwayConfig, Sizes]:
    """Return the models of a training configuration, without pretrained weights.

    A vocabulary that training will learn counts at its maximum size.

    Raises:
        ConfigError: a tokenizer whose vocabulary size is unknown here.
    """
    data = config.data
    vocab_size, pad_token_id = _vocabulary(config)
    model = config.model
    if isinstance(model, DualConfig):
        changes: dict[str, Any] = {"image_pretrained": False, "image_weights": ""}
        if model.text_pretrained:
            found = _pretrained_name(model.text)
            arguments = dict(found.arguments) | model.text_kwargs
            changes |= {"text": found.kind, "text_kwargs": arguments, "text_pretrained": False}
        model = model.model_copy(update=changes)
    return model, Sizes(data.image_size, data.context_length, vocab_size, pad_token_id)


def build_on_meta(model: DualConfig | MultiwayConfig, sizes: Sizes) -> DualEncoder:
    """Build both towers on the meta device, in train mode.

    Raises:
        ValueError: models that cannot be built, as for training.
    """
    with torch.device("meta"):
        return build_towers(
            model,
            image_size=sizes.image_size,
            context_length=sizes.context_length,
            vocab_size=sizes.vocab_size,
            pad_token_id=sizes.pad_token_id,
        )


def train_last(backbone: nn.Module, share: float) -> None:
    """Freeze parameters from the start until at most this share of a backbone trains."""
    left = share * sum(parameter.numel() for parameter in backbone.parameters())
    for parameter in reversed(list(backbone.parameters())):
        left -= parameter.numel()
        parameter.requires_grad_(left >= 0)


def checkpoint_blocks(encoder: DualEncoder) -> None:
    """Enable activation checkpointing in every block of both towers.

    Raises:
        ValueError: a tower does not support it.
    """
    image, text = encoder.image_tower.backbone, encoder.text_tower.backbone
    _checkpoint("image", lambda: image.set_grad_checkpointing(True))  # type: ignore[operator]
    _checkpoint("text", lambda: _checkpoint_text(text))


def _checkpoint_text(text: Any) -> None:
    # The old method warns in newer versions of transformers, which have the new one.
    text.config.use_cache = False
    options = {"use_reentrant": False}
    enable = getattr(text, "activation_checkpointing_enable", None)
    if enable is None:
        text.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    else:
        enable(activation_checkpointing_kwargs=options)


def _checkpoint(name: str, enable: Callable[[], Any]) -> None:
    try:
        enable()
    except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"checkpointing: expected a model.{name} that supports it, got one that does not "
            f"({error or type(error).__name__}); leave checkpointing out"
        ) from error


def _text_name(name: str) -> TextName:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    short = name.split("/")[-1].lower().removesuffix("-uncased")
    if short in TEXT_NAMES:
        return TEXT_NAMES[short]
    if name not in MODEL_MAPPING_NAMES:
        known = [*TEXT_NAMES, *MODEL_MAPPING_NAMES]
        raise unknown_name("text", name, "text encoder", known)
    defaults = CONFIG_MAPPING[name]()
    return TextName(name, getattr(defaults, "vocab_size", None) or _UNKNOWN_VOCABULARY)


def _pretrained_name(name: str) -> TextName:
    """Look up a name above, else the configuration of a folder or hub name."""
    from transformers import AutoConfig

    try:
        return _text_name(name)
    except ValueError:
        try:
            found = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError):
            found = None
        if found is None:
            raise
    changed = arguments_of(found)
    changed.pop("vocab_size", None)
    return TextName(found.model_type, found.vocab_size, tuple(changed.items()))


def _pool_of(kind: str) -> str:
    """Return "cls" for bidirectional types, whose first token sees all others, else "mean"."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    return "cls" if CONFIG_MAPPING[kind] in MODEL_FOR_MASKED_LM_MAPPING else "mean"


def _own_image_size(image: str) -> int:
    import timm

    if not timm.is_model(image):
        raise unknown_name("image", image, "timm model", timm.list_models())
    published = timm.models.get_pretrained_cfg(image)
    return int(published.input_size[-1]) if published else 224


def _vocabulary(config: PairsConfig) -> tuple[int, int]:
    data = config.data
    if data.tokenizer == "train":
        return data.vocab_size, 0
    if Path(data.tokenizer).exists():
        from gradcache_clip.train.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(data.tokenizer, data.context_length)
        return tokenizer.vocab_size, tokenizer.pad_token_id
    try:
        found = _text_name(data.tokenizer)
    except ValueError as error:
        raise ConfigError(
            f"data.tokenizer: expected a file, 'train' or a text encoder that plan knows, got "
            f"{data.tokenizer!r} ({error}); pass data.tokenizer=train and data.vocab_size"
        ) from error
    return found.vocab_size, found.pad_token_id
