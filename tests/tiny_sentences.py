"""A sentence-transformers model of two small layers, and sentences of uneven length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from gradcache_clip.train.tokenizer import CLS, PAD, SEP, train_tokenizer

_TEXT = (
    "small large red green old new letter figure square circle line dot hook bar stroke above "
    "below left right open closed double single heavy light with and of the sign mark arrow"
)
_WORDS = _TEXT.split()


def sentences(count: int, longest: int, seed: int) -> list[str]:
    """Of one word up to `longest`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, size: int) -> list[int]:
        return torch.randint(high, (size,), generator=generator).tolist()

    lengths = [1 + length for length in draw(longest, count)]
    return [" ".join(_WORDS[index] for index in draw(len(_WORDS), n)) for n in lengths]


def columns(rows: int, count: int = 2) -> dict[str, list[str]]:
    """Short anchors, longer positives, and negatives in between."""
    names = ["anchor", "positive", *(f"negative_{i}" for i in range(1, count - 1))]
    longest = [3, 20, *[8] * (count - 2)]
    pairs = enumerate(zip(names, longest, strict=True))
    return {name: sentences(rows, most, seed) for seed, (name, most) in pairs}


def tiny_model(folder: Path, *, dropout: float = 0.0, padding_side: str = "right") -> Any:
    """The same weights at every call."""
    if not (folder / "config.json").exists():
        _save(folder)
    config = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    transformer = Transformer(
        str(folder), config_kwargs=config, processor_kwargs={"padding_side": padding_side}
    )
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def _save(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([_TEXT], vocab_size=400, context_length=64)
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer.save(folder)), pad_token=PAD, cls_token=CLS, sep_token=SEP
    )
    fast.save_pretrained(folder)
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
