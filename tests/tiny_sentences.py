"""A sentence-transformers model of two small layers, and sentences of uneven length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from one_shot import gradient_errors, worst
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from gradcache_clip.train.tokenizer import CLS, PAD, SEP, train_tokenizer

_TEXT = (
    "small large red green old new letter figure square circle line dot hook bar stroke above "
    "below left right open closed double single heavy light with and of the sign mark arrow"
)
_WORDS = _TEXT.split()

BOTH_WAYS: dict[str, Any] = {
    "directions": ("query_to_doc", "doc_to_query"),
    "partition_mode": "per_direction",
}


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


def tiny_guide(folder: Path, *, vocab_size: int = 400, dropout: float = 0.0) -> Any:
    """Another model, with the tokens of `tiny_model` if the vocabulary has the same size."""
    if not (folder / "guide" / "config.json").exists():
        _save(folder / "guide", vocab_size=vocab_size, seed=8)
    return tiny_model(folder / "guide", dropout=dropout)


def tokenized(model: Any, count: int = 2, rows: int = 11) -> list[dict[str, Tensor]]:
    return [model.preprocess(texts) for texts in columns(rows, count).values()]


def share_of(place: Any, features: dict[str, Any]) -> dict[str, Any]:
    """This process's rows of a column; `place` is a `losses_over_ranks.Place`."""
    rows = {name: each for name, each in features.items() if isinstance(each, Tensor)}
    return {**features, **place.share(rows)}


def gradients(loss: Any, features: list[dict[str, Tensor]], factor: float = 1.0) -> Tensor:
    """Fill `.grad`; the loss."""
    value = loss([dict(each) for each in features], torch.empty(0))
    (factor * value).backward()
    return value.detach()


def worst_error(model: nn.Module, truth: nn.Module) -> tuple[str, float]:
    """A key bias moves no softmax: its gradient is zero but for rounding, which has no error."""
    for name, parameter in model.named_parameters():
        assert not name.endswith("key.bias") or parameter.grad.abs().max() < 1e-7
    errors = gradient_errors([model], [truth]).items()
    return worst({name: error for name, error in errors if not name.endswith("key.bias")})


def wrapped(loss: Any, model: nn.Module) -> Any:
    """As the trainer does it once the model is prepared."""
    loss.model = model
    return loss


def tiny_tokenizer(folder: Path, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Train a tokenizer, which is also saved."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([_TEXT], vocab_size=vocab_size, context_length=64)
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer.save(folder)), pad_token=PAD, cls_token=CLS, sep_token=SEP
    )
    fast.save_pretrained(folder)
    return fast


def _save(folder: Path, *, vocab_size: int = 400, seed: int = 7) -> None:
    tokenizer = tiny_tokenizer(folder, vocab_size)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
