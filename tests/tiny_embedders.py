"""Embedders of today in sentence-transformers, tiny, with what their columns hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from packed_inputs import compute_in_double, vision_models
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from tiny_sentences import columns, tiny_tokenizer
from transformers import (
    Qwen2VLImageProcessor,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLModel,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    modeling_flash_attention_utils,
)

ROWS = 8
_VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


class Embedder(NamedTuple):
    """A model from a folder, and its columns; the second of two ranks has the last four rows."""

    build: Callable[[Path], Any]
    columns: Callable[[], Sequence[Sequence[Any]]]


@contextmanager
def in_double(*models: Any) -> Iterator[None]:
    """Compute norms and angles in fp64 too, which transformers does in fp32."""
    with pytest.MonkeyPatch.context() as patch:
        for model in models:
            compute_in_double(model.double(), patch)
        yield


def _embedder(folder: Path, pooling: str = "lasttoken") -> Any:
    transformer = Transformer(str(folder), processor_kwargs={"padding_side": "left"})
    pool = Pooling(transformer.get_embedding_dimension(), pooling)
    return SentenceTransformer(modules=[transformer, pool], device="cpu")


def qwen3(folder: Path) -> Any:
    """A decoder whose tokenizer pads on the left."""
    if not (folder / "config.json").exists():
        tokenizer = tiny_tokenizer(folder)
        special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        config = Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, head_dim=8,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **special,
        )  # fmt: skip
        torch.manual_seed(7)
        Qwen3Model(config).save_pretrained(folder)
    return _embedder(folder)


def qwen3_unpadded(folder: Path) -> Any:
    """As with flash attention; here transformers reads from `position_ids` where texts end."""
    model = qwen3(folder)
    transformer = model[0]
    with (
        mock.patch.object(transformer, "_is_flash_attention_requested", lambda: True),
        mock.patch.object(
            modeling_flash_attention_utils,
            "lazy_import_flash_attention",
            lambda _: ((None, "variable length", None), None),
        ),
    ):
        transformer.unpad_inputs = True
    assert transformer.can_flatten_inputs
    return model


def qwen3_lora(folder: Path) -> Any:
    """Adapters alone train, both of their matrices from the first step."""
    peft = pytest.importorskip("peft")
    model = qwen3(folder)
    torch.manual_seed(8)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        # It reads a property that transformers renames.
        warnings.simplefilter("ignore", FutureWarning)
        model[0].model = peft.get_peft_model(model[0].model, config)
    return model


def qwen3_vl(folder: Path) -> Any:
    """A vision-language model behind its own processor."""
    if not (folder / "config.json").exists():
        tokenizer = tiny_tokenizer(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": _VISION})
        size = {"patch_size": 2, "temporal_patch_size": 1, "merge_size": 2}
        images = Qwen2VLImageProcessor(min_pixels=16, max_pixels=256, **size)
        videos = Qwen3VLVideoProcessor(**size)
        Qwen3VLProcessor(images, tokenizer, videos, chat_template=_CHAT).save_pretrained(folder)
        config = vision_models()["Qwen3-VL"]().config
        keys = ["vision_start", "vision_end", "image", "video"]
        for key, token in zip(keys, tokenizer.convert_tokens_to_ids(_VISION), strict=True):
            setattr(config, f"{key}_token_id", token)
        config.text_config.vocab_size = len(tokenizer)
        torch.manual_seed(7)
        Qwen3VLModel(config).save_pretrained(folder)
    return _embedder(folder)


def static(folder: Path) -> Any:
    torch.manual_seed(7)
    tokenizer = tiny_tokenizer(folder).backend_tokenizer
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")


def texts() -> list[list[str]]:
    return [*columns(ROWS, 3).values()]


def texts_with_images() -> list[list[Any]]:
    """Texts, and documents with two, one or no images; the last four rows have none."""
    queries, documents, _ = texts()
    counts = [1, 0, 2, 1, 0, 0, 0, 0]
    pairs = enumerate(zip(documents, counts, strict=True))
    return [queries, [_document(row, text, count) for row, (text, count) in pairs]]


def _document(row: int, text: str, count: int) -> dict[str, Any]:
    images = [
        Image.effect_noise((8 + 4 * (row % 3), 8 + 4 * i), 80).convert("RGB") for i in range(count)
    ]
    return {"text": text, "image": images} if images else {"text": text}


EMBEDDERS = {
    "left padding": Embedder(qwen3, texts),
    "unpadded": Embedder(qwen3_unpadded, texts),
    "images": Embedder(qwen3_vl, texts_with_images),
    "LoRA": Embedder(qwen3_lora, texts),
    "static": Embedder(static, texts),
}
