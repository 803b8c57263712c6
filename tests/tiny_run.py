"""A training run small enough for a test: drawn characters, tiny towers, dropout on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "data"))

from glyphs import make_glyphs

OVERRIDES = (
    "data.image_size=16",
    "data.context_length=16",
    "data.vocab_size=400",
    "data.shuffle_buffer=50",
    "data.random_crop=0.8",
    "model.image=vit_tiny_patch16_224",
    "model.image_kwargs={patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2,"
    " proj_drop_rate: 0.1}",
    "model.text_kwargs={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,"
    " intermediate_size: 32, hidden_dropout_prob: 0.1}",
    "model.feature_dim=8",
    "optimizer.warmup_steps=2",
    "optimizer.max_grad_norm=1.0",
    "train.batch_size=24",
    "train.chunk_size=10",
    "train.steps=8",
    "train.ema_decay=0.9",
    "train.device=cpu",
)

NO_DROPOUT = (
    "data.random_crop=1",
    "model.image_kwargs={patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}",
    "model.text_kwargs={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,"
    " intermediate_size: 32, hidden_dropout_prob: 0, attention_probs_dropout_prob: 0}",
    "train.ema_decay=0",
)
_OF_TEXTS = ("data.context_length", "data.vocab_size", "model.text_kwargs")
_OF_TOWERS = ("model.image", "model.image_kwargs", "model.text_kwargs")
_OF_IMAGES = ("data.image_size", "data.shuffle_buffer", "data.random_crop", "model.feature_dim",
              "model.image", "model.image_kwargs")  # fmt: skip


def make_data(folder: Path, characters: int = 60) -> Path:
    """Shards of drawn characters, about 150 training pairs of 60."""
    make_glyphs(folder, characters=characters)
    return folder


def overrides(data: Path, output: Path, *more: str) -> list[str]:
    """Settings of a tiny run, and others; those of towers that it does not have are left out."""
    places = [f"data.train={data}/train", f"data.validation={data}/validation"]
    left_out = _OF_TEXTS if "program=views" in more else ()
    left_out += _OF_IMAGES if "program=texts" in more else ()
    left_out += _OF_TOWERS if "model.architecture=multiway" in more else ()
    ours = {*OVERRIDES, *NO_DROPOUT}
    settings = [*OVERRIDES, *places, f"train.output={output}", *more]
    return [s for s in settings if not (s in ours and s.partition("=")[0] in left_out)]


def logged(run: Path, name: str) -> dict[int, float]:
    """step -> value of one logged figure."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}
