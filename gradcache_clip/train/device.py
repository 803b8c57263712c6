"""Rank and device of this process, from a launcher's environment variables."""

from __future__ import annotations

import os

import torch

from gradcache_clip.train.config_errors import ConfigError

FIRST = 0
"""The rank that writes the run folder and prints."""


def launched_world_size() -> int:
    """Return the number of processes that a launcher such as torchrun started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size(processes: int) -> int:
    """Return how many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def is_first_process() -> bool:
    """Return whether this is rank 0, also before the process group exists."""
    return int(os.environ.get("RANK", "0")) == FIRST


def choose_device(name: str) -> torch.device:
    """Resolve `train.device` for this process; several processes get one device each.

    `auto` takes this machine's accelerator, or its CPU.

    Raises:
        ConfigError: no such device here, or fewer devices than processes.
    """
    if launched_world_size() > 1 and name != "cpu":
        name = _by_local_rank(name)
    if name == "auto":
        here = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        return here or torch.device("cpu")
    try:
        # Resolves "cuda" to the current device, and fails if it does not exist.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"train.device: expected a device of this machine, got {name!r} ({error}); "
            "use auto or cpu"
        ) from error


def _by_local_rank(name: str) -> str:
    if ":" in name:
        raise ConfigError(
            f"train.device: expected auto, cuda or cpu with {launched_world_size()} processes, got "
            f"{name!r}, which all of them would share; leave the number out"
        )
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = name if name != "auto" else "cpu" if here is None else here.type
    if kind in ("cpu", "mps"):
        return "cpu"
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if number >= count:
        raise ConfigError(
            f"train.device: expected a {kind} device for each process of this machine, got {count} "
            f"for process number {number + 1}; launch fewer with --nproc, or pass train.device=cpu"
        )
    return f"{kind}:{number}"
