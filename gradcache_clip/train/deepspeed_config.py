"""The DeepSpeed configuration of a run: the user's file, completed with settings of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gradcache_clip.train.config import Config
from gradcache_clip.train.config_errors import ConfigError

DEFAULT_STAGE = 2
_AUTO = "auto"


def deepspeed_settings(config: Config, processes: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`.

    Keeps every value of the file named by `distributed.deepspeed_config`. Adds what the file leaves
    out or sets to "auto": batch sizes, ZeRO stage, precision, and `gradient_clipping`, which
    DeepSpeed would otherwise set to 1.0.

    Raises:
        ConfigError: no such file, no JSON object in it, or a value that contradicts the run; the
            message shows both.
    """
    source = config.distributed.deepspeed_config
    settings = _read(Path(source)) if source else {}
    rows = config.train.batch_size // processes
    run = f"as train.batch_size={config.train.batch_size} gives with {processes} processes"
    for name, value, reason in (
        ("train_batch_size", config.train.batch_size, run),
        ("train_micro_batch_size_per_gpu", rows, run),
        (
            "gradient_accumulation_steps",
            1,
            "chunks are not accumulation steps; see train.chunk_size",
        ),
    ):
        _set_or_check(settings, name, value, reason, source)
    norm = config.optimizer.max_grad_norm
    _set_or_check(
        settings, "gradient_clipping", norm, "as optimizer.max_grad_norm", source, default=0.0
    )
    _set_stage(settings, config)
    _set_precision(settings, config)
    return settings


def zero_stage(settings: dict[str, Any]) -> int:
    """Return the ZeRO stage of a result of `deepspeed_settings`."""
    return int(settings["zero_optimization"]["stage"])


def precision_of(settings: dict[str, Any]) -> str:
    """Return the dtype that DeepSpeed casts the weights to: fp32, bf16 or fp16."""
    for name in ("bf16", "fp16"):
        if settings.get(name, {}).get("enabled"):
            return name
    return "fp32"


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"distributed.deepspeed_config: expected a JSON file, got {path}, which does not exist;"
            " check the path, or leave it out"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"distributed.deepspeed_config: expected JSON in {path}, got an error ({error}); "
            "correct that place"
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(
            f"distributed.deepspeed_config: expected a JSON object in {path}, got "
            f"{type(settings).__name__}; write {{...}}"
        )
    return settings


def _set_or_check(
    settings: dict[str, Any], name: str, value: Any, why: str, source: str, default: Any = None
) -> None:
    """Take the run's value if the file has none, and the file's if the run has the default."""
    given = settings.get(name, _AUTO)
    if given == _AUTO:
        settings[name] = value
    elif given != value and value != default:
        raise ConfigError(
            f"{name}: expected {value} {why}, got {given} in {source}; change one of them, or "
            f'write "{_AUTO}" there'
        )


def _set_stage(settings: dict[str, Any], config: Config) -> None:
    source, wanted = config.distributed.deepspeed_config, config.distributed.zero
    zero = settings.setdefault("zero_optimization", {})
    # Without a stage in its file, DeepSpeed uses 0.
    default = DEFAULT_STAGE if not source else 0
    given = zero.setdefault("stage", default if wanted < 0 else wanted)
    if wanted >= 0 and given != wanted:
        raise ConfigError(
            f"zero_optimization.stage: expected {wanted} as distributed.zero, got {given} in "
            f"{source}; change one of them"
        )


def _set_precision(settings: dict[str, Any], config: Config) -> None:
    wanted, given = config.train.precision, precision_of(settings)
    if wanted == given or wanted == "fp32":
        return
    if config.distributed.deepspeed_config and {"bf16", "fp16"} & settings.keys():
        raise ConfigError(
            f"train.precision: expected {given} as in {config.distributed.deepspeed_config}, got "
            f"{wanted}; change one of them"
        )
    settings[wanted] = {"enabled": True}
    # Otherwise ZeRO would sum the gradients of all chunks in bf16.
    if wanted == "bf16" and zero_stage(settings):
        settings.setdefault("data_types", {"grad_accum_dtype": "fp32"})
