"""The folder of a run: created once, resumed on request, never overwritten."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcache_clip.train.atomic_file import is_temporary, replacing
from gradcache_clip.train.backbones import arguments_of
from gradcache_clip.train.config import Config
from gradcache_clip.train.config_errors import ConfigError, field_of
from gradcache_clip.train.config_file import load_config, save_config
from gradcache_clip.train.config_model import ImageTowerConfig, TextTowerConfig
from gradcache_clip.train.folder_lock import LOCK_NAME
from gradcache_clip.train.report.metrics_log import FILE_NAME, read_log
from gradcache_clip.train.tokenizer import Tokenizer, load_tokenizer

_MOST_JSON_BYTES = 64 * 2**20


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
        """Architecture of a pretrained text tower, without its weights."""
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
        """Return whether a step was logged or saved. Before that there is nothing to lose."""
        log = self.path / FILE_NAME
        # An evaluation before the first step, logged as step 0, can be repeated.
        logged = log.is_file() and any(row["step"] > 0 for row in read_log(log))
        return logged or self.checkpoints.is_dir()

    def holds_only_a_failed_start(self) -> bool:
        """Return whether all files here are those of a run that never took a step."""
        names = {path.name for path in self.path.iterdir() if not is_temporary(path)}
        if self.config.exists():
            try:
                load_config(self.config)
            except ConfigError:
                return False
        elif LOCK_NAME not in names or self.has_begun():
            return False
        ours = {path.name for path in (self.config, self.tokenizer, self.text_model, self.summary)}
        return names <= {*ours, FILE_NAME, LOCK_NAME, "tensorboard"}

    def check_is_there(self) -> None:
        """Raise FileNotFoundError if the folder of a run that has begun is gone."""
        if not self.config.is_file():
            raise FileNotFoundError(
                f"{self.path}: expected the folder of this run, got none any more; its log is "
                "lost: bring the folder back and resume, or start a new run"
            )

    def begin(self, config: Config, tokenizer: Tokenizer | None, encoder: Any = None) -> None:
        """Create the folder and write the configuration; a resumed run keeps its tokenizer.

        Also saves the architecture of a pretrained text tower, so the run loads without its
        source.
        """
        if tokenizer is not None and not self.has_begun():
            with replacing(self.tokenizer) as temporary:
                tokenizer.save(temporary)
        if getattr(config.model, "text_pretrained", False):
            found = encoder.text_tower.backbone.config
            self._write_json(self.text_model, [found.model_type, arguments_of(found)])
        with replacing(self.config) as temporary:
            save_config(config, temporary)

    def write_summary(self, summary: Any) -> None:
        self._write_json(self.summary, dataclasses.asdict(summary))

    def trained(self, config: Config) -> Config:
        """Return a configuration that loads no pretrained weights, as a checkpoint has them all."""
        model, changes = config.model, dict[str, Any]()
        if isinstance(model, ImageTowerConfig):
            changes |= {"model.image_pretrained": False, "model.image_weights": ""}
        if isinstance(model, TextTowerConfig) and self.text_model.is_file():
            kind, arguments = self._read_text_model()
            changes |= {"model.text": kind, "model.text_kwargs": arguments}
            changes["model.text_pretrained"] = False
        return config.updated(changes)

    def read_tokenizer(self, config: Config) -> Tokenizer:
        """Load the tokenizer that was saved when the run began."""
        data: Any = config.data
        return load_tokenizer(self.tokenizer, data.context_length)

    def _write_json(self, path: Path, content: Any) -> None:
        text = json.dumps(content, indent=2, allow_nan=False)
        with replacing(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def _read_text_model(self) -> tuple[str, dict[str, Any]]:
        found = _read_json(self.text_model)
        if not (isinstance(found, list) and [*map(type, found)] == [str, dict]):
            raise ConfigError(
                f"{self.text_model}: expected a model type and its arguments, got other JSON; "
                "restore the folder from a backup"
            )
        return found[0], found[1]

    def read_summary(self) -> dict[str, Any] | None:
        """Return the fields of the last summary, or None."""
        if not self.summary.is_file():
            return None
        fields = _read_json(self.summary)
        if not isinstance(fields, dict):
            raise ConfigError(
                f"{self.summary}: expected an object, got a {type(fields).__name__}; remove the "
                "file, which is written again"
            )
        return fields

    def check_entries(self) -> None:
        """Raise ConfigError if something here would lead a writer elsewhere, or let it wait."""
        for path in [*self.path.iterdir(), *self.pictures.glob("*")]:
            if path.is_symlink():
                raise ConfigError(
                    f"train.output: expected files and folders, got the symbolic link {path}; put "
                    "the whole folder where its files should lie"
                )
            if not self._is_as_written(path):
                raise ConfigError(
                    f"{path}: expected a file or a folder as a run writes it there, got another "
                    "kind of entry; restore the folder from a backup"
                )

    def _is_as_written(self, path: Path) -> bool:
        if path in (self.checkpoints, self.pictures):
            return path.is_dir()
        files = (self.config, self.tokenizer, self.text_model, self.summary, self.path / FILE_NAME)
        return path.is_file() or (path.is_dir() and path not in files)


def _read_json(path: Path) -> Any:
    if path.stat().st_size > _MOST_JSON_BYTES:
        raise ConfigError(
            f"{path}: expected at most {_MOST_JSON_BYTES:,} bytes, got {path.stat().st_size:,}; "
            "restore the folder from a backup"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: expected JSON, got an error ({error}); restore the folder from a backup"
        ) from error


def check_run(config: Config) -> RunFolder:
    """Check that a run may start or resume in its folder; writes nothing.

    Raises:
        ConfigError: the folder holds a run and `train.resume` is off, it holds other files, or its
            run has other values of keys that must not change.
    """
    run = RunFolder(Path(config.train.output))
    if run.path.is_file() or (run.path.is_symlink() and not run.path.exists()):
        what = "file" if run.path.is_file() else "symbolic link to nowhere"
        raise ConfigError(
            f"train.output: expected a folder, got the {what} {run.path}; choose another path"
        )
    if config.train.resume and not run.config.is_file():
        raise ConfigError(
            f"train.resume: expected the folder of a run, got {run.path}, which holds none; check "
            "train.output, or leave train.resume out to start a new run there"
        )
    if not run.path.exists() or {path.name for path in run.path.iterdir()} <= {LOCK_NAME}:
        return run
    run.check_entries()
    begun = run.config.is_file() and run.has_begun()
    if not (begun or run.holds_only_a_failed_start()):
        raise ConfigError(
            f"train.output: expected a new folder, got {run.path}, which holds other files; "
            "choose another folder"
        )
    if not begun:
        return run
    if not config.train.resume:
        raise ConfigError(
            f"train.output: expected a new folder, got {run.path}, which holds a run; continue it "
            "with train.resume=true or choose another folder"
        )
    _check_same_run(_saved_config(run), config)
    return run


def existing_run(path: str | Path) -> tuple[RunFolder, Any]:
    """Open an existing run and load its configuration.

    Raises:
        ConfigError: the folder holds no run.
    """
    run = RunFolder(Path(path))
    if not run.config.is_file():
        raise ConfigError(
            f"run: expected the folder of a run, got {path}, which has no config.yaml; "
            "pass the train.output of a training run"
        )
    return run, _saved_config(run)


def _saved_config(run: RunFolder) -> Any:
    """Load the configuration of a run.

    Raises:
        ConfigError: it has keys that this version does not know.
    """
    try:
        return load_config(run.config)
    except ConfigError as error:
        raise ConfigError(
            f"run: expected a run of this version of gradcache-clip, got {run.path}, whose "
            f"config.yaml has other keys ({error}); use the version that wrote it"
        ) from error


def _check_same_run(before: Config, now: Config) -> None:
    if type(before) is not type(now):
        raise _other_run(f"program {before.program!r} -> {now.program!r}")
    old, new = fixed_settings(before), fixed_settings(now)
    if other := [key for key in {**old, **new} if old.get(key) != new.get(key)]:
        shown = (f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in other[:3])
        raise _other_run(", ".join(shown))


def fixed_settings(config: Config) -> dict[str, Any]:
    """Return the settings that a run must keep, by key."""
    flat = _flat(config.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if not _is_changeable(config, key)}


def _other_run(shown: str) -> ConfigError:
    return ConfigError(
        f"train.resume: expected the configuration of the run, got other values: {shown}; "
        "undo them, or start a new run in another folder"
    )


def _is_changeable(config: Config, key: str) -> bool:
    field = field_of(type(config), key.split("."))
    return field is not None and bool(field.json_schema_extra)


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    keys = {name: value for name, value in sections.items() if isinstance(value, dict)}
    return {f"{name}.{key}": value for name, found in keys.items() for key, value in found.items()}
