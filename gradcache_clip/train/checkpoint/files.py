"""Files of one checkpoint folder: write and flush, verify, read without unpickling objects."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.train.checkpoint.plain_state import describe, joined_state, split_state

FORMAT_VERSION = 2
MOST_STEPS = 2**53

PREFIX = "step-"
REPLACED = ".replaced"
"""Suffix of an existing checkpoint while another one of the same step replaces it."""

_INDEX = "index.json"
_STATE = "state.json"
_STATE_TENSORS = "state"
_WEIGHTS = ".safetensors"
_MODULE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_MOST_JSON_BYTES = 64 * 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message says which, why, and what to do."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint differs from what was written: unfinished, truncated or altered."""


def check_weights(modules: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise ValueError for module names or tensors that cannot be saved as safetensors."""
    for name, weights in modules.items():
        if not _MODULE_NAME.fullmatch(name) or name == _STATE_TENSORS:
            raise ValueError(
                f"modules: expected names of letters, digits, '_', '-' and '.', and not "
                f"{_STATE_TENSORS!r}, got {name!r}; the name becomes a file name"
            )
        for key, value in weights.items():
            if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
                raise ValueError(
                    f"modules[{name!r}][{key!r}]: expected a dense tensor with data, "
                    f"got {describe(value)}; pass module.state_dict(), other values go in state"
                )


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested containers: about the size of a checkpoint."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def is_disk_full(error: BaseException, folder: Path, needed: int) -> bool:
    """Return whether a full disk caused `error`; torch and safetensors do not set its errno."""
    link: BaseException | None = error
    while link is not None:
        if getattr(link, "errno", None) in _FULL or f"os error {errno.ENOSPC}" in str(link):
            return True
        link = link.__cause__ or link.__context__
    return shutil.disk_usage(folder).free < needed


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder, and do not need to.
        if not (path.is_dir() and error.errno in _NO_FOLDER_SYNC):
            raise
    finally:
        os.close(descriptor)


def write_files(
    folder: Path, step: int, modules: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    """Write weights, state and, last of all, the index with their digests."""
    tensors: dict[str, Tensor] = {}
    plain = split_state(state, tensors)
    for name, weights in {**modules, _STATE_TENSORS: tensors}.items():
        _write_weights(folder / f"{name}{_WEIGHTS}", weights)
    (folder / _STATE).write_text(json.dumps(plain) + "\n", encoding="utf-8")
    files = {}
    for path in sorted(folder.iterdir()):
        # Flushed before the index vouches for it.
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    index = {"format": FORMAT_VERSION, "step": step, "modules": list(modules), "files": files}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    sync(folder / _INDEX)
    sync(folder)


def _write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; tied names go to its metadata, as in safetensors' save_model."""
    from safetensors.torch import save_file

    owners: dict[Any, str] = {}
    kept: dict[str, Tensor] = {}
    tied = {}
    for name, tensor in weights.items():
        owner = owners.setdefault(_identity(name, tensor), name)
        if owner == name:
            kept[name] = tensor
        else:
            tied[name] = owner
    # An empty mapping beside no tensors makes a header that cannot be read.
    save_file(_on_cpu_apart(kept), path, metadata=tied or None)


def _identity(name: str, tensor: Tensor) -> Any:
    """Return a key that is equal for two names of the same memory."""
    if tensor.numel() == 0:
        return name
    layout = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return (tensor.device, *layout)


def _on_cpu_apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors; safetensors rejects shared memory, so views are copied."""
    apart = {}
    taken = set()
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != tensor_bytes(tensor):
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor
    return apart


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def looks_whole(folder: Path) -> bool:
    """Return whether the index exists and file sizes agree; contents are not read."""
    try:
        _check_sizes(folder, _read_index(folder))
    except CheckpointError:
        return False
    return True


def step_of(folder: Path) -> int | None:
    """Return the step that a checkpoint folder is named after; None for other names."""
    digits = folder.name.removeprefix(PREFIX).removesuffix(REPLACED)
    is_named = folder.name.startswith(PREFIX) and digits.isascii() and digits.isdigit()
    return int(digits) if is_named and len(digits) < 20 else None


def verified_index(folder: Path) -> dict[str, Any]:
    """Read the index, and check size and SHA-256 of every file."""
    index = _read_index(folder)
    _check_sizes(folder, index)
    for name, noted in index["files"].items():
        try:
            content = sha256_of(folder / name)
        except OSError as error:
            raise _damaged(folder, f"{name} cannot be read ({error})") from error
        if content != noted["sha256"]:
            raise _damaged(folder, f"{name} has other content than was written")
    return index


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: expected a checkpoint folder, got none; pass a step-* folder"
        )
    try:
        index = _read_json(folder / _INDEX)
    except FileNotFoundError:
        raise _damaged(folder, f"{_INDEX} is missing, so it was never finished") from None
    if isinstance(index, dict) and index.get("format") not in (None, FORMAT_VERSION):
        raise CheckpointError(
            f"{folder}: expected checkpoint format {FORMAT_VERSION}, got {index['format']!r}; "
            "read it with the version of gradcache-clip that wrote it"
        )
    if not _is_index(index):
        raise _damaged(folder, f"{_INDEX} lacks entries")
    named = step_of(folder)
    if named is not None and index["step"] != named:
        raise _damaged(folder, f"{_INDEX} is of step {index['step']}")
    return index


def _is_index(index: Any) -> bool:
    """Return whether all entries have the expected types and no name leads out of the folder."""
    try:
        files, modules = index["files"], index["modules"]
        wanted = {f"{name}{_WEIGHTS}" for name in (*modules, _STATE_TENSORS)} | {_STATE}
        return (
            type(index["step"]) is int
            and 0 <= index["step"] <= MOST_STEPS
            and set(files) == wanted
            and all(_MODULE_NAME.fullmatch(name) for name in modules)
            and all(type(noted["bytes"]) is int and noted["sha256"] for noted in files.values())
        )
    except (KeyError, TypeError):
        return False


def _check_sizes(folder: Path, index: dict[str, Any]) -> None:
    for name, noted in index["files"].items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        if path.stat().st_size != noted["bytes"]:
            raise _damaged(
                folder,
                f"{name} has {path.stat().st_size:,} bytes where {noted['bytes']:,} were written",
            )


def _damaged(folder: Path, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{folder}: damaged checkpoint: {what}")


def read_files(
    folder: Path, index: dict[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read weights and state of a folder that `verified_index` has checked."""
    modules = {name: _read_weights(folder / f"{name}{_WEIGHTS}") for name in index["modules"]}
    tensors = _read_weights(folder / f"{_STATE_TENSORS}{_WEIGHTS}")
    try:
        state = joined_state(_read_json(folder / _STATE), tensors)
    except (KeyError, TypeError, RecursionError) as error:
        raise _damaged(folder, f"{_STATE} names no tensor of the checkpoint ({error})") from None
    if not isinstance(state, dict):
        raise _damaged(folder, f"{_STATE} holds a {type(state).__name__} and no entries")
    return modules, state


def _read_json(path: Path) -> Any:
    if not path.is_file():
        # A pipe would be waited for.
        raise FileNotFoundError(errno.ENOENT, "expected a file, got none", str(path))
    if path.stat().st_size > _MOST_JSON_BYTES:
        raise _damaged(path.parent, f"{path.name} has more than {_MOST_JSON_BYTES:,} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path.parent, f"{path.name} is not JSON ({error})") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # Copies, because safetensors returns views of the memory-mapped file.
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            tied = file.metadata() or {}
        return weights | {name: weights[owner] for name, owner in tied.items()}
    except (SafetensorError, KeyError) as error:
        raise DamagedCheckpointError(f"{path}: not a readable safetensors file ({error})") from None
