"""The recipe for text embeddings with a tiny tower that starts from nothing."""

from __future__ import annotations

from pathlib import Path

from recipe_runs import run_recipe

from gradcache_clip.train.run import RunSummary

TINY_BERT = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,"
    " hidden_dropout_prob: 0, attention_probs_dropout_prob: 0, initializer_range: 0.25}"
)
SMALL = (
    "data.tokenizer=train",
    "data.context_length=24",
    "data.vocab_size=400",
    "model.text=bert",
    "model.text_pretrained=false",
    f"model.text_kwargs={TINY_BERT}",
    "loss.matryoshka=[4,8,16]",
    "train.chunk_tokens=70",
)


def run_small(data: Path, output: Path, *more: str) -> RunSummary:
    return run_recipe("text_embedding", data, output, *SMALL, *more)
