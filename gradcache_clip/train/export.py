"""A trained text tower as a folder that sentence-transformers and transformers load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gradcache_clip.train.config import ConfigError
from gradcache_clip.train.run_folder import existing_run
from gradcache_clip.train.session import load_trained

_MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))


def export_run(run_folder: str | Path, out: str | Path) -> Path:
    """Write the text encoder of a run's newest checkpoint, its tokenizer and its pooling.

    `SentenceTransformer(out)` then gives the features of the run, normalised, and
    `AutoModel.from_pretrained(out)` the model without its pooling.

    Args:
        run_folder: the `train.output` of a run over texts.
        out: a new or empty folder.

    Returns:
        `out`.

    Raises:
        ConfigError: no such run, one that has images as well, no checkpoint yet, or a folder that
            holds something.
    """
    run, config = existing_run(run_folder)
    if not config.data.text_fields:
        raise ConfigError(
            f"run: expected one over texts (data.text_fields), got {run.path}, which pairs images "
            "with captions or views; its weights are the safetensors files in checkpoints/"
        )
    out = Path(out)
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise ConfigError(f"out: expected a new or empty folder, got {out}; choose another")
    encoder, tokenizer, _ = load_trained(config, run)
    assert tokenizer is not None
    out.mkdir(parents=True, exist_ok=True)
    encoder.text_tower.backbone.save_pretrained(out)
    _save_tokenizer(run.tokenizer, tokenizer.pad_token, config.data.context_length, out)
    _save_modules(out, config.model.feature_dim, config.model.text_pool)
    _write(out / "sentence_bert_config.json", {"max_seq_length": config.data.context_length})
    return out


def _save_tokenizer(file: Path, pad_token: str, context_length: int, out: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        pad_token=pad_token,
        model_max_length=context_length,
        # The run has trained without types of tokens.
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(out)


def _save_modules(out: Path, width: int, pool: str) -> None:
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(_MODULES)
    ]
    _write(out / "modules.json", modules)
    for path, _ in _MODULES[1:]:
        (out / path).mkdir()
    modes = {"pooling_mode_cls_token": pool == "cls", "pooling_mode_mean_tokens": pool == "mean"}
    _write(out / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
