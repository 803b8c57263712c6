"""The models behind the towers: timm by name, transformers by type or from the hub."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gradcache_clip.train.config import ModelConfig

_TIMM_POOLS = {"cls": "token", "mean": "avg"}
_SPECIAL_IDS = frozenset({"bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"})


def build_image_backbone(config: ModelConfig, *, image_size: int) -> Any:
    """A timm model without classifier that maps (B, 3, H, W) to pooled features (B, C).

    `config.image_pool` is "cls" (the class token), "mean" (of patches or positions) or "default"
    (the model's own). `image_size` in pixels goes to the models that are built for one size.

    Raises:
        ValueError: an unknown name, or arguments or a pooling that the model does not have.
    """
    import timm

    if not timm.is_model(config.image):
        raise unknown_name("model.image", config.image, "timm model", timm.list_models())
    arguments = dict(config.image_kwargs)
    pretrained_cfg = timm.models.get_pretrained_cfg(config.image)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        arguments.setdefault("img_size", image_size)
    if config.image_pool != "default":
        arguments["global_pool"] = _timm_pool(config.image_pool)
    try:
        return timm.create_model(
            config.image, pretrained=config.image_pretrained, num_classes=0, **arguments
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(
            f"model.image: expected arguments that {config.image} accepts, got {arguments} "
            f"({error}); change model.image_kwargs, model.image_pool or model.image"
        ) from error


def build_text_backbone(
    config: ModelConfig, *, context_length: int, vocab_size: int, pad_token_id: int
) -> Any:
    """A transformers encoder that maps ids and mask (B, L) to `.last_hidden_state` (B, L, C).

    Its pooler, which would never get a gradient, is left out where the class has one. Weights from
    the hub come as safetensors only, and no code from the hub is run.

    Raises:
        ValueError: an unknown type or argument name, no text encoder, weights that cannot be
            loaded, or a vocabulary or length that the model has no room for.
    """
    from transformers import AutoModel

    if config.text_pretrained:
        text_config = _load_text_config(config)
    else:
        text_config = _new_text_config(config, context_length, vocab_size, pad_token_id)
    _check_is_encoder(config, text_config)
    _check_fits(config, text_config, context_length, vocab_size)
    options = _without_pooler(text_config)
    if not config.text_pretrained:
        return AutoModel.from_config(text_config, **options)
    options |= {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
    try:
        return AutoModel.from_pretrained(config.text, config=text_config, **options)
    except (OSError, ValueError) as error:
        raise _load_error(config, error) from error


def unknown_name(field: str, got: str, kind: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not in `known`: says what was got and the nearest names."""
    names = sorted(known)
    nearest = difflib.get_close_matches(got, names, n=3) or names[:3]
    return ValueError(
        f"{field}: expected the name of a known {kind}, got {got!r}; did you mean "
        f"{' or '.join(repr(name) for name in nearest)}?"
    )


def _timm_pool(pool: str) -> str:
    if pool not in _TIMM_POOLS:
        raise ValueError(
            f"model.image_pool: expected 'cls', 'mean' or 'default', got {pool!r}; "
            "'default' keeps the model's own pooling"
        )
    return _TIMM_POOLS[pool]


def _new_text_config(
    config: ModelConfig, context_length: int, vocab_size: int, pad_token_id: int
) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    if config.text not in MODEL_MAPPING_NAMES:
        names = list(MODEL_MAPPING_NAMES)
        raise unknown_name("model.text", config.text, "transformers model type", names)
    known = _text_arguments(CONFIG_MAPPING[config.text])
    # transformers takes any keyword in silence, so a typo would train another model.
    for name in config.text_kwargs:
        if name not in known:
            raise unknown_name("model.text_kwargs", name, f"argument of {config.text}", known)
    ours = {
        "vocab_size": vocab_size,
        "pad_token_id": pad_token_id,
        # RoBERTa's family counts positions from pad_token_id + 1.
        "max_position_embeddings": context_length + pad_token_id + 1,
        # The type's own ids point into the vocabulary it was published with.
        **dict.fromkeys(_SPECIAL_IDS & known),
    }
    return AutoConfig.for_model(config.text, **(ours | dict(config.text_kwargs)))


def _text_arguments(config_class: Any) -> set[str]:
    parameters = set(inspect.signature(config_class.__init__).parameters) - {"self"}
    return parameters | set(config_class.attribute_map)


def _load_text_config(config: ModelConfig) -> Any:
    from transformers import AutoConfig

    overrides = dict(config.text_kwargs)
    try:
        return AutoConfig.from_pretrained(config.text, trust_remote_code=False, **overrides)
    except (OSError, ValueError) as error:
        raise _load_error(config, error) from error


def _load_error(config: ModelConfig, error: Exception) -> ValueError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return ValueError(
        f"model.text: expected a hub name or folder with safetensors weights, got {config.text!r} "
        f"({reason[0]}); check the name, or set model.text_pretrained=false"
    )


def _check_is_encoder(config: ModelConfig, text_config: Any) -> None:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    reads_tokens = "vocab_size" in _text_arguments(type(text_config))
    if text_config.is_encoder_decoder or not reads_tokens:
        raise ValueError(
            f"model.text: expected a text encoder, got {config.text!r}, which is none; "
            "pass e.g. model.text=bert"
        )
    if config.text_pool not in ("cls", "mean"):
        raise ValueError(
            f"model.text_pool: expected 'cls' or 'mean', got {config.text_pool!r}; "
            "'cls' takes the first token"
        )
    if config.text_pool == "cls" and type(text_config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise ValueError(
            f"model.text_pool: expected 'mean' for {config.text!r}, whose first token need not "
            "see the others, got 'cls'; set model.text_pool=mean"
        )


def _check_fits(
    config: ModelConfig, text_config: Any, context_length: int, vocab_size: int
) -> None:
    limit = getattr(text_config, "max_position_embeddings", None) or context_length
    if context_length > limit:
        raise ValueError(
            f"data.context_length: expected at most the {limit} positions of {config.text!r}, "
            f"got {context_length}; set data.context_length={limit}"
        )
    if vocab_size > text_config.vocab_size:
        raise ValueError(
            f"data.tokenizer: expected at most the {text_config.vocab_size} tokens of "
            f"{config.text!r}, got {vocab_size}; set data.tokenizer to the model's own"
        )


def _without_pooler(text_config: Any) -> dict[str, Any]:
    from transformers import MODEL_MAPPING

    parameters = inspect.signature(MODEL_MAPPING[type(text_config)].__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}
