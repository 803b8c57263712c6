"""`gradcache-clip export`: a trained text tower for sentence-transformers and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gradcache_clip.train.backbones import without_pooler
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.programs import program_of
from gradcache_clip.train.programs.texts import TextsConfig
from gradcache_clip.train.run_folder import existing_run
from gradcache_clip.train.state import load_trained

_POOLS = {"cls": "cls_token", "mean": "mean_tokens"}
_MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))


def export_run(run_folder: str | Path, out: str | Path) -> Path:
    """Write the text encoder of a run's newest checkpoint, with its tokenizer and pooling.

    `SentenceTransformer(out)` then returns the normalised features of the run; its `encode_query`
    and `encode_document` prepend `data.text_prompts`. Pool the output of
    `AutoModel.from_pretrained(out)` according to `model.text_pool`, and pass
    `add_pooling_layer=False` to leave out that class's own pooler, which is untrained.

    Args:
        run_folder: the `train.output` of a run with `program: texts`.
        out: a new or empty folder.

    Returns:
        `out`.

    Raises:
        ConfigError: no such run, a run with images, no checkpoint yet, or a folder that is not
            empty.
    """
    run, config = existing_run(run_folder)
    if not isinstance(config, TextsConfig):
        raise ConfigError(
            f"run: expected a run with program: texts, got {run.path} with program: "
            f"{config.program}; load its weights from the safetensors files in checkpoints/"
        )
    out = Path(out)
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise ConfigError(f"out: expected a new or empty folder, got {out}; choose another")
    program = program_of(config.updated({"train.device": "cpu"}))
    encoder, tokenizer, _ = load_trained(program, run)
    assert tokenizer is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as temporary:
        written = Path(temporary) / "model"
        backbone = encoder.text_tower.backbone
        backbone.save_pretrained(written)
        _save_tokenizer(run.tokenizer, tokenizer.pad_token, config.data.context_length, written)
        _save_modules(written, config, backbone.config)
        # Renamed once complete; an existing folder is empty, as checked above.
        if out.exists():
            out.rmdir()
        written.rename(out)
    return out


def _save_tokenizer(file: Path, pad_token: str, context_length: int, out: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        pad_token=pad_token,
        model_max_length=context_length,
        # Training passed no token_type_ids, so inference must not either.
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(out)


def _save_modules(out: Path, config: TextsConfig, backbone: Any) -> None:
    """Write the files that sentence-transformers reads in addition to a model."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(_MODULES)
    ]
    for path, _ in _MODULES[1:]:
        (out / path).mkdir()
    model, data = config.model, config.data
    modes = {f"pooling_mode_{name}": model.text_pool == pool for pool, name in _POOLS.items()}
    pooling = {"word_embedding_dimension": backbone.hidden_size, **modes}
    prompts = dict(zip(("query", "document"), data.text_prompts, strict=False))
    _write(out / "modules.json", modules)
    _write(out / "1_Pooling" / "config.json", pooling)
    length = {"max_seq_length": data.context_length}
    _write(out / "sentence_bert_config.json", {**length, "model_args": without_pooler(backbone)})
    _write(out / "config_sentence_transformers.json", {"prompts": prompts})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
