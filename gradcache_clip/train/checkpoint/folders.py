"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is a folder `step-00000123/`:

    encoder.safetensors ... weights, one file per module
    state.safetensors       tensors of the rest: moments of the optimizer, random generators
    state.json              everything else: numbers, position in the data
    index.json              format, step, and size and SHA-256 of each file; written last

It is written under a temporary name, flushed to disk and then renamed, so a folder with the final
name was complete once, and the index reveals later damage. No file holds a pickle.
"""

from __future__ import annotations

import errno
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from gradcache_clip.train.checkpoint.files import (
    PREFIX,
    REPLACED,
    DamagedCheckpointError,
    check_weights,
    is_disk_full,
    looks_whole,
    read_files,
    step_of,
    sync,
    tensor_bytes,
    verified_index,
    write_files,
)
from gradcache_clip.train.checkpoint.plain_state import split_state

_TEMPORARY = ".tmp-step-"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. All tensors are on the CPU and independent of the files."""

    path: Path
    """Folder that it was read from."""
    step: int
    """Optimizer steps taken when it was saved."""
    modules: dict[str, dict[str, Tensor]]
    """Module name -> state_dict; tied tensors share memory again."""
    state: dict[str, Any]
    """Everything else."""


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    modules: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 3,
) -> Path:
    """Write `folder/step-<step>/`, then remove all but the newest `keep` checkpoints.

    Older checkpoints are touched only once the new one is complete and flushed, also when it
    replaces one of the same step. Leftovers of a killed save are removed first. Only one process
    may write to a folder at a time: rank 0 saves.

    Args:
        folder: of all checkpoints of one run; created if missing.
        step: optimizer steps taken so far, 0 or more.
        modules: name -> state_dict, on any device, with any dtype and strides; tensors that share
            memory stay tied. Names become file names: letters, digits, `_`, `-` and `.`.
        state: nested dicts with text as keys, lists and tuples (read back as lists) of tensors,
            numbers, text, booleans and None, e.g. `capture_rng()`.
        keep: number of checkpoints up to this step to keep, 1 or more; damaged ones do not count.

    Returns:
        The folder of the new checkpoint.

    Raises:
        ValueError: an argument that could not be saved or read back; nothing was written.
        OSError: the disk or quota is full (ENOSPC, with the bytes needed and free), or another
            error of the file system. Earlier checkpoints are untouched, and temporary files are
            removed.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(2, 2)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     path = save_checkpoint(run, 7, modules={"model": model.state_dict()}, state={})
        ...     load_latest(run).step
        7
    """
    folder = Path(folder)
    _check_numbers(step, keep)
    check_weights(modules)
    split_state(state, {})
    folder.mkdir(parents=True, exist_ok=True)
    _remove_temporary(folder)
    final = folder / f"{PREFIX}{step:08d}"
    temporary = folder / f"{_TEMPORARY}{step:08d}"
    try:
        temporary.mkdir()
        write_files(temporary, step, modules, state)
        _publish(temporary, final)
    except BaseException as error:
        # Also on Ctrl-C.
        _remove_temporary(folder)
        needed = tensor_bytes(modules) + tensor_bytes(state)
        if isinstance(error, Exception) and is_disk_full(error, folder, needed):
            raise _disk_full(folder, final.name, needed) from error
        if isinstance(error, RuntimeError | SafetensorError):
            # Both hide what the file system said.
            cause = error.__cause__ or error
            number = getattr(cause, "errno", errno.EIO)
            message = f"{final}: could not be written: {cause}; look at the disk"
            raise OSError(number, message) from error
        raise
    _prune(folder, step, keep)
    return final


def load_latest(folder: str | Path) -> Checkpoint | None:
    """Load the newest undamaged checkpoint in `folder`.

    Args:
        folder: the one passed to `save_checkpoint`.

    Returns:
        The checkpoint, or None if `folder` does not exist or holds none.

    Warns:
        RuntimeWarning: a newer checkpoint is damaged and was skipped; says which and why.

    Raises:
        DamagedCheckpointError: there are checkpoints, and all are damaged.
        CheckpointError: written by another version of this library.
    """
    damages = []
    for _, path in _found(Path(folder)):
        try:
            checkpoint = load_checkpoint(path)
        except DamagedCheckpointError as error:
            damages.append(str(error))
            continue
        for damage in damages:
            message = f"{damage}; continuing from {path.name} instead"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return checkpoint
    if damages:
        raise DamagedCheckpointError(
            f"{folder}: expected a whole checkpoint, got {len(damages)} damaged: "
            + "; ".join(damages)
            + "; restore one from a backup, or start anew in another folder"
        )
    return None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Verify and read one checkpoint folder.

    Args:
        path: a `step-*` folder.

    Raises:
        FileNotFoundError: no such folder.
        DamagedCheckpointError, CheckpointError: as for `load_latest`.
    """
    path = Path(path)
    index = verified_index(path)
    modules, state = read_files(path, index)
    return Checkpoint(path=path, step=index["step"], modules=modules, state=state)


def _check_numbers(step: int, keep: int) -> None:
    if step < 0:
        raise ValueError(f"step: expected 0 or more, got {step}; pass the number of steps taken")
    if keep < 1:
        raise ValueError(
            f"keep_checkpoints: expected 1 or more, got {keep}; with 0 there is none to resume from"
        )


def _found(folder: Path) -> list[tuple[int, Path]]:
    """List step and folder of each checkpoint, newest first, a replaced one after its successor."""
    if not folder.exists():
        return []
    # Unlike glob, iterdir does not take a folder that cannot be read for an empty one.
    steps = [(step_of(path), path) for path in folder.iterdir() if path.is_dir()]
    found = [(step, path) for step, path in steps if step is not None]
    return sorted(found, key=lambda item: (-item[0], len(item[1].name)))


def _publish(temporary: Path, final: Path) -> None:
    """Rename a complete checkpoint; an existing one of that name is moved aside, not deleted."""
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        final.rename(replaced)
    try:
        temporary.rename(final)
    except BaseException:
        if replaced.exists():
            replaced.rename(final)
        raise
    # The rename itself is an entry of the parent folder.
    sync(final.parent)


def _prune(folder: Path, step: int, keep: int) -> None:
    older = [(found_step, path) for found_step, path in _found(folder) if found_step <= step]
    whole: dict[int, Path] = {}
    for found_step, path in older:
        if looks_whole(path):
            whole.setdefault(found_step, path)
    kept = list(whole.values())[:keep]
    for path in (path for _, path in older if path not in kept):
        # Renamed first: if removed only in part, it would look damaged on the next resume.
        removed = path.with_name(f"{_TEMPORARY}{path.name}")
        try:
            path.rename(removed)
            shutil.rmtree(removed)
        except OSError as error:
            warnings.warn(
                f"{path}: this old checkpoint could not be removed ({error}); remove it by hand",
                RuntimeWarning,
                stacklevel=3,
            )


def _remove_temporary(folder: Path) -> None:
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _disk_full(folder: Path, name: str, needed: int) -> OSError:
    free = shutil.disk_usage(folder).free
    last = next((path.name for _, path in _found(folder)), None)
    survivor = f"{last} is untouched" if last else "there was no earlier checkpoint"
    return OSError(
        errno.ENOSPC,
        f"{folder}: expected about {needed:,} bytes of space for {name}, got {free:,} free (or a "
        f"quota is used up); free space or keep fewer checkpoints and resume; {survivor}",
    )
