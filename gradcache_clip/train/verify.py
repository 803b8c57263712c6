"""`gradcache-clip verify`: check that gradient caching is exact for a configuration's towers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradcache_clip.cache import GradCache
from gradcache_clip.train.checkpoint import load_latest
from gradcache_clip.train.command import CommandError
from gradcache_clip.train.config import Config
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_file import load_config
from gradcache_clip.train.device import choose_device
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.precision import autocast
from gradcache_clip.train.programs import program_of
from gradcache_clip.train.programs.program import Program
from gradcache_clip.train.run_folder import RunFolder, existing_run
from gradcache_clip.train.state import TrainState, start
from gradcache_clip.train.step import make_backward
from gradcache_clip.train.tokenizer import Tokenizer
from gradcache_clip.verification.compare import verify
from gradcache_clip.verification.report import COLUMNS, DIFFERS, SAME_CHUNKS, VerifyReport

_STYLES = {DIFFERS: "red", SAME_CHUNKS: "yellow"}
_SHORTEST_NAME = 20
# Small enough that gradients of untrained towers do not overflow in fp16.
_FIRST_FP16_SCALE = 2.0**10


def verify_run(
    config_or_run: str | Path,
    overrides: Sequence[str] = (),
    *,
    rows: int = 64,
    console: Console | None = None,
) -> VerifyReport:
    """Verify the engine on one batch of a run's data, and print the report.

    Uses the configuration's towers, loss, precision and data in train mode, and writes nothing. A
    run folder is verified with the weights of its newest checkpoint.

    Args:
        config_or_run: a YAML file, or the `train.output` of a run.
        overrides: `section.key=value`, as for training.
        rows: pairs in the batch; the one-shot step needs memory for all of them at once.

    Raises:
        ConfigError, ValueError, OSError: the configuration or the data cannot be used.
        CommandError: fewer than two rows, or too little memory for all of them at once.
    """
    if rows < 2:
        raise CommandError(f"--rows: expected at least 2, got {rows}; a pair needs a negative")
    try:
        config, run = _read(Path(config_or_run), overrides)
        program = program_of(_for_one_batch(config, rows))
        state, tokenizer = start(program, run, Peers())
        origin = _with_trained_weights(state, Path(config_or_run))
        report = _verify(program, state, tokenizer)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CommandError(
            f"memory: expected {rows} pairs to fit at once, got no memory for them; pass fewer "
            f"with --rows"
        ) from error
    except ValueError as error:
        # The loader's error names its batch size, which is --rows here.
        if not str(error).startswith("batch_size:"):
            raise
        raise CommandError(str(error).replace("batch_size", "--rows")) from error
    _show(report, origin, console or Console())
    return report


def _read(path: Path, overrides: Sequence[str]) -> tuple[Config, RunFolder]:
    if path.is_dir():
        run, _ = existing_run(path)
        return load_config(run.config, overrides), run
    config: Config = load_config(path, overrides)
    return config, RunFolder(Path(config.train.output))


def _with_trained_weights(state: TrainState, path: Path) -> str:
    """Load the newest checkpoint of a run folder; returns where the weights are from."""
    checkpoint = load_latest(state.run.checkpoints) if path.is_dir() else None
    if checkpoint is None:
        return f"{path}, weights as at its start"
    try:
        state.encoder.load_state_dict(checkpoint.modules["encoder"])
        state.loss.load_state_dict(checkpoint.modules["loss"])
    except (RuntimeError, KeyError) as error:
        raise ConfigError(
            f"model: expected the towers of the run in {path}, got others, whose shapes do not "
            "match its weights; remove the overrides of model"
        ) from error
    return f"{path}, step {checkpoint.step}"


def _for_one_batch(config: Config, rows: int) -> Config:
    if not config.train.grad_cache:
        raise ConfigError(
            "train.grad_cache: expected true, got false, which leaves nothing to verify; pass "
            "train.grad_cache=true"
        )
    changes = {"train.batch_size": rows, "train.resume": False, "train.ema_decay": 0.0}
    return config.updated({**changes, "data.workers": 0})


def _verify(program: Program[Any], state: TrainState, tokenizer: Tokenizer | None) -> VerifyReport:
    config, device = program.config.train, choose_device(program.config.train.device)
    strategy = state.engine.strategy
    if state.engine.scaler.is_enabled():
        strategy.grad_scaler = torch.amp.GradScaler(device.type, init_scale=_FIRST_FP16_SCALE)
    if config.compile:
        state.encoder.compile()
    cache = make_backward(state.encoder, state.loss, config, strategy, program.sort_by_length)
    assert isinstance(cache, GradCache)
    with closing(state.batches()) as batches:
        batch = next(batches)
    inputs, loss_kwargs = program.inputs(batch, tokenizer, device)
    with autocast(config.precision, device):
        return verify(cache, *inputs, loss_kwargs=loss_kwargs)


def _show(report: VerifyReport, origin: str, console: Console) -> None:
    rows, rest = report.shown()
    # The column of shapes is left out: it has no room on a narrow terminal.
    headings, *cells = [(name, *more) for name, _, *more in (COLUMNS, *(r.cells() for r in rows))]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    # Rich pads: three characters between columns, two at each end.
    room = max(_SHORTEST_NAME, console.width - sum(widths[1:]) - 3 * len(widths) - 1)
    table = Table(title=Text(origin), caption=Text(rest) if rest else None, box=box.SIMPLE_HEAD)
    for heading in headings:
        is_error = heading in ("one shot", "same chunks")
        table.add_column(heading, justify="right" if is_error else "left", no_wrap=True)
    for name, *errors, verdict in cells:
        style = _STYLES.get(verdict, "green")
        table.add_row(_elided(name, room), *errors, Text(verdict, style=style))
    console.print(table)
    for line in (report.setting, *(f"- {finding}" for finding in (*report.reasons, *report.notes))):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(Text(report.headline, style="green" if report.exact else "red"), soft_wrap=True)


def _elided(name: str, room: int) -> Text:
    """Cut a long name in its middle: the tower at its start and its end tell most."""
    if len(name) <= room:
        return Text(name)
    head = room // 3
    return Text(f"{name[:head]}…{name[head + 1 - room :]}")
