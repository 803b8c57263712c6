"""The folder of a run: made once, resumed on request, never overwritten."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcache_clip.train.backbones import arguments_of
from gradcache_clip.train.config import Config, ConfigError, ModelConfig
from gradcache_clip.train.config_file import load_config, save_config
from gradcache_clip.train.report.metrics_log import FILE_NAME, read_log
from gradcache_clip.train.tokenizer import Tokenizer

# What may change between the parts of one run; all else would make it another run.
_MAY_CHANGE = {
    # The loader's state knows the data by names and sizes, wherever they are.
    "data.train", "data.validation", "evaluation.batch_size", "evaluation.recall_at",
    "evaluation.gallery", "evaluation.neighbours", "evaluation.at_start",
    "train.output", "train.resume", "train.steps", "train.log_every", "train.evaluate_every",
    "train.checkpoint_every", "train.keep_checkpoints", "train.compile", "train.device",
    "train.exchange", "train.memory_budget_gib", "train.inputs", "model.frozen_features",
    "data.max_broken_share",
    # What is left of an epoch is shared out among however many read it.
    "data.workers", "distributed.engine", "distributed.zero", "distributed.deepspeed_config",
    "distributed.timeout_s",
}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths inside the folder of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def text_model(self) -> Path:
        """What a pretrained text tower is, without its weights."""
        return self.path / "text_model.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def has_begun(self) -> bool:
        """Whether a step was logged or saved; a start that failed before leaves nothing to lose."""
        log = self.path / FILE_NAME
        # What was evaluated before the first step can be evaluated again.
        logged = log.is_file() and any(row["step"] > 0 for row in read_log(log))
        return logged or self.checkpoints.is_dir()

    def holds_only_a_failed_start(self) -> bool:
        """Whether everything here is ours, so that nothing is lost by writing it again."""
        names = {path.name for path in self.path.iterdir()}
        try:
            load_config(self.config)
        except ConfigError:
            return False
        ours = {path.name for path in (self.config, self.tokenizer, self.text_model, self.summary)}
        return names <= {*ours, FILE_NAME, "tensorboard"}

    def begin(self, config: Config, tokenizer: Tokenizer | None, encoder: Any = None) -> None:
        """Make the folder and write down what defines the run; a resumed one keeps its tokens.

        Also saves the architecture of a pretrained text tower, so that the run loads without its
        source.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None and not self.has_begun():
            tokenizer.save(self.tokenizer)
        if config.model.text_pretrained:
            found = encoder.text_tower.backbone.config
            self._write_json(self.text_model, [found.model_type, arguments_of(found)])
        temporary = self.config.with_suffix(".tmp")
        save_config(config, temporary)
        temporary.replace(self.config)

    def write_summary(self, summary: Any) -> None:
        self._write_json(self.summary, dataclasses.asdict(summary))

    def trained_model(self, model: ModelConfig) -> ModelConfig:
        """The same without the weights that it began with, since a checkpoint has all."""
        model = dataclasses.replace(model, image_pretrained=False, image_weights="")
        if not (model.text_pretrained and self.text_model.is_file()):
            return model
        kind, arguments = json.loads(self.text_model.read_text(encoding="utf-8"))
        return dataclasses.replace(model, text=kind, text_kwargs=arguments, text_pretrained=False)

    def _write_json(self, path: Path, content: Any) -> None:
        temporary = path.with_suffix(".tmp")
        text = json.dumps(content, indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)

    def read_summary(self) -> dict[str, Any] | None:
        """The fields of the last summary, if one was written."""
        if not self.summary.is_file():
            return None
        fields: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        return fields


def check_run(config: Config) -> RunFolder:
    """The folder of a run that may start or go on there; nothing is written.

    Raises:
        ConfigError: the folder holds a run and `train.resume` is off, holds something else, or was
            made by a configuration that differs in more than length and logging.
    """
    run = RunFolder(Path(config.train.output))
    if run.path.is_file():
        raise ConfigError(f"train.output: expected a folder, got the file {run.path}")
    if config.train.resume and not run.config.is_file():
        raise ConfigError(
            f"train.resume: expected the folder of a run, got {run.path}, which holds none; check "
            "train.output, or leave train.resume out to start there"
        )
    if not run.path.exists() or not any(run.path.iterdir()):
        return run
    if not run.config.is_file() or not (run.has_begun() or run.holds_only_a_failed_start()):
        raise ConfigError(
            f"train.output: expected a new folder, got {run.path}, which holds other files; "
            "choose another folder"
        )
    if not run.has_begun():
        return run
    if not config.train.resume:
        raise ConfigError(
            f"train.output: expected a new folder, got {run.path}, which holds a run; go on with "
            "train.resume=true or choose another folder"
        )
    _check_same_run(load_config(run.config), config)
    return run


def existing_run(path: str | Path) -> tuple[RunFolder, Config]:
    """A run that was made before, with its configuration.

    Raises:
        ConfigError: the folder holds no run.
    """
    run = RunFolder(Path(path))
    if not run.config.is_file():
        raise ConfigError(
            f"run: expected the folder of a run, got {path}, which has no config.yaml; "
            "pass the train.output of a training run"
        )
    return run, load_config(run.config)


def _check_same_run(before: Config, now: Config) -> None:
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(now))
    changed = [key for key in new if key not in _MAY_CHANGE and old.get(key) != new[key]]
    if changed:
        shown = ", ".join(f"{key} {old.get(key)!r} -> {new[key]!r}" for key in changed[:3])
        raise ConfigError(
            f"train.resume: expected the configuration of the run, got other values: {shown}; "
            "undo them, or start a new run in another folder"
        )


def _flat(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()
    }
