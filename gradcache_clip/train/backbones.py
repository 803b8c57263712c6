"""Builds the towers' backbones: timm models by name, transformers models by type or hub name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gradcache_clip.train.config_model import ImageTowerConfig, TextTowerConfig

_TIMM_POOLS = {"cls": "token", "mean": "avg"}
_SPECIAL_IDS = frozenset({"bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"})
_LONGEST_REASON = 200


def build_image_backbone(config: ImageTowerConfig, *, image_size: int) -> Any:
    """Build a timm model without classifier that maps (B, 3, H, W) to pooled features (B, C).

    `config.image_pool` is "cls" (class token), "mean" (over patches or positions) or "default" (the
    model's own). `image_size` in pixels is passed to models that are built for a fixed size. timm
    loads `config.image_weights`, drops a classifier, and resizes position embeddings.

    Raises:
        ValueError: an unknown name, arguments or a pooling that the model does not have, or
            pretrained weights that do not exist, cannot be fetched, or belong to another model.
    """
    import timm

    if not timm.is_model(config.image):
        raise unknown_name("model.image", config.image, "timm model", timm.list_models())
    if config.image_pretrained and not timm.is_model_pretrained(config.image):
        raise ValueError(
            f"model.image_pretrained: expected false for {config.image!r}, which has no published "
            "weights, got true; set model.image_pretrained=false"
        )
    arguments = dict(config.image_kwargs)
    pretrained_cfg = timm.models.get_pretrained_cfg(config.image)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        arguments.setdefault("img_size", image_size)
    if config.image_pool != "default":
        arguments["global_pool"] = _timm_pool(config.image_pool)
    if config.image_weights:
        return _with_weights(config, arguments)
    try:
        return timm.create_model(
            config.image, pretrained=config.image_pretrained, num_classes=0, **arguments
        )
    except OSError as error:
        raise ValueError(
            f"model.image_pretrained: expected the weights of {config.image!r} on the hub or in "
            f"its cache, got {first_line(error)!r}; check the network, or set "
            "model.image_pretrained=false"
        ) from error
    except _unfit() as error:
        raise ValueError(
            f"model.image: expected arguments that {config.image} accepts, got {arguments} "
            f"({first_line(error)}); change model.image_kwargs, model.image_pool or model.image"
        ) from error


def _with_weights(config: ImageTowerConfig, arguments: dict[str, Any]) -> Any:
    """Build a timm model with weights from a safetensors file."""
    import timm

    if not Path(config.image_weights).is_file():
        raise ValueError(
            f"model.image_weights: expected a safetensors file, got {config.image_weights}, which "
            "does not exist; check the path, or leave it out to train from scratch"
        )
    # As if it were the published file, so that timm converts it like one.
    source = {"file": config.image_weights, "custom_load": False}
    try:
        return timm.create_model(
            config.image, pretrained=True, pretrained_cfg_overlay=source, num_classes=0, **arguments
        )
    except _unloadable() as error:
        raise ValueError(
            f"model.image_weights: expected weights of {config.image} with {arguments}, got "
            f"{config.image_weights}, which do not fit ({_in_short(error)}); check model.image "
            "and model.image_kwargs, or convert the file to timm's names"
        ) from error


def build_text_backbone(
    config: TextTowerConfig, *, context_length: int, vocab_size: int, pad_token_id: int
) -> Any:
    """Build a transformers encoder of ids and mask (B, L) with `.last_hidden_state` (B, L, C).

    Its pooler is left out, because it would never get a gradient. Pretrained weights load from
    safetensors only, and code from the hub is never run.

    Raises:
        ValueError: an unknown type or argument name, a model that is not a text encoder, weights
            that cannot be loaded, or a vocabulary or length beyond the model's.
    """
    from transformers import AutoModel

    if config.text_pretrained:
        text_config = _load_text_config(config)
    else:
        text_config = _new_text_config(config, context_length, vocab_size, pad_token_id)
    _check_is_encoder(config, text_config)
    _check_fits(config, text_config, context_length, vocab_size)
    options = without_pooler(text_config)
    if not config.text_pretrained:
        try:
            return AutoModel.from_config(text_config, **options)
        except _unfit() as error:
            raise _text_unfit(config, error) from error
    return _with_text_weights(config, config=text_config, **options)


def without_pooler(text_config: Any) -> dict[str, Any]:
    """Return the argument that builds a model without its pooler, if the class takes one."""
    from transformers import MODEL_MAPPING

    parameters = inspect.signature(MODEL_MAPPING[type(text_config)].__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


def arguments_of(text_config: Any) -> dict[str, Any]:
    """Return `text_kwargs` that rebuild a model's architecture from its type, without weights."""
    known = inspect.signature(type(text_config).__init__).parameters
    return {key: value for key, value in text_config.to_diff_dict().items() if key in known}


def _with_text_weights(model: TextTowerConfig, **options: Any) -> Any:
    """Load a pretrained model; unused weights, such as the pooler's, are dropped."""
    from transformers import AutoModel

    options |= {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
    try:
        with _without_load_report():
            backbone, found = AutoModel.from_pretrained(
                model.text, output_loading_info=True, **options
            )
    except _unloadable() as error:
        raise _load_error(model, error) from error
    # transformers initialises missing weights at random with only a warning.
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"model.text: expected all weights of the encoder in {model.text!r}, got none for "
            f"{len(missing)} (first: {missing[0]}); check that the weights are of this model, or "
            "set model.text_pretrained=false"
        )
    return backbone


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence transformers' loading report: missing weights raise, dropped ones are intended."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def unknown_name(field: str, got: str, kind: str, known: Iterable[str]) -> ValueError:
    """Return the error for a name that is not in `known`, with the nearest known names."""
    names = sorted(known)
    nearest = difflib.get_close_matches(got, names, n=3) or names[:3]
    return ValueError(
        f"{field}: expected the name of a known {kind}, got {got!r}; did you mean "
        f"{' or '.join(repr(name) for name in nearest)}?"
    )


def first_line(error: Exception) -> str:
    """Return an error's message without the explanations that libraries add below."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _in_short(error: Exception) -> str:
    """Return a message on one line, shortened. torch names unexpected keys in the second line."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


def _unfit() -> tuple[type[Exception], ...]:
    """Return the errors that timm and transformers raise on unsuitable arguments or models."""
    from huggingface_hub.errors import StrictDataclassError

    builtin = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError)
    return (*builtin, RuntimeError, TypeError, ValueError, StrictDataclassError)


def _unloadable() -> tuple[type[Exception], ...]:
    """Return the errors that transformers raises on a folder or hub name that it cannot load."""
    from safetensors import SafetensorError

    return (OSError, SafetensorError, *_unfit())


def _text_unfit(config: TextTowerConfig, error: Exception) -> ValueError:
    return ValueError(
        f"model.text: expected a text encoder that can be built with {config.text_kwargs}, got "
        f"{config.text!r} ({first_line(error)}); change model.text_kwargs, or pass e.g. "
        "model.text=bert"
    )


def _timm_pool(pool: str) -> str:
    if pool not in _TIMM_POOLS:
        raise ValueError(
            f"model.image_pool: expected 'cls', 'mean' or 'default', got {pool!r}; "
            "'default' keeps the model's own pooling"
        )
    return _TIMM_POOLS[pool]


def _new_text_config(
    config: TextTowerConfig, context_length: int, vocab_size: int, pad_token_id: int
) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    if config.text not in MODEL_MAPPING_NAMES:
        names = list(MODEL_MAPPING_NAMES)
        raise unknown_name("model.text", config.text, "transformers model type", names)
    known = _text_arguments(CONFIG_MAPPING[config.text])
    # transformers silently accepts any keyword, so a typo would train another model.
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
    try:
        return AutoConfig.for_model(config.text, **(ours | dict(config.text_kwargs)))
    except _unfit() as error:
        raise _text_unfit(config, error) from error


def _text_arguments(config_class: Any) -> set[str]:
    parameters = set(inspect.signature(config_class.__init__).parameters) - {"self"}
    return parameters | set(config_class.attribute_map)


def _load_text_config(config: TextTowerConfig) -> Any:
    from transformers import AutoConfig

    overrides = dict(config.text_kwargs)
    try:
        return AutoConfig.from_pretrained(config.text, trust_remote_code=False, **overrides)
    except _unloadable() as error:
        raise _load_error(config, error) from error


def _load_error(config: TextTowerConfig, error: Exception) -> ValueError:
    return ValueError(
        f"model.text: expected a hub name or folder with safetensors weights, got {config.text!r} "
        f"({first_line(error)}); check the name, or set model.text_pretrained=false"
    )


def _check_is_encoder(config: TextTowerConfig, text_config: Any) -> None:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    reads_tokens = "vocab_size" in _text_arguments(type(text_config))
    if text_config.is_encoder_decoder or not reads_tokens:
        raise ValueError(
            f"model.text: expected a text encoder, got {config.text!r}, which is not one; "
            "pass e.g. model.text=bert"
        )
    if config.text_pool not in ("cls", "mean"):
        raise ValueError(
            f"model.text_pool: expected 'cls' or 'mean', got {config.text_pool!r}; "
            "'cls' takes the first token"
        )
    if config.text_pool == "cls" and type(text_config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise ValueError(
            f"model.text_pool: expected 'mean' for {config.text!r}, whose first token may not "
            "attend to the others, got 'cls'; set model.text_pool=mean"
        )


def _check_fits(
    config: TextTowerConfig, text_config: Any, context_length: int, vocab_size: int
) -> None:
    # Models with relative positions have no limit.
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
