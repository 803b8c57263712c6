"""The processes that train one run together. One process takes the same path as many."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gradcache_clip.train.config import Config
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.device import FIRST, choose_device, launched_world_size
from gradcache_clip.train.failures import FailureChannel

Value = TypeVar("Value")


class Peers:
    """Communicates between the processes of a run; by default there is only this one.

    Every process must call every method except `set_phase` at the same time.

    Args:
        rank: of this process.
        world_size: number of processes.
        group: process group for values on the host; None for one process.
        failures: reports failures to the other processes.
    """

    def __init__(
        self,
        rank: int = FIRST,
        world_size: int = 1,
        *,
        group: dist.ProcessGroup | None = None,
        failures: FailureChannel | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._group = group
        self._failures = failures

    @property
    def is_first(self) -> bool:
        return self.rank == FIRST

    def set_phase(self, phase: str) -> None:
        """Set what this process is doing, for the error message if it fails."""
        if self._failures is not None:
            self._failures.set_phase(phase)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any process."""
        return bool(self._largest(int(flag)))

    def all(self, flag: bool) -> bool:
        """Return whether `flag` is true on every process."""
        return not self._largest(int(not flag))

    def gather_to_rank0(self, value: Value) -> list[Value]:
        """Return the values of all processes in rank order on rank 0, an empty list elsewhere."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, values, dst=FIRST, group=self._group)
        return values or []

    def broadcast_from_rank0(self, value: Value) -> Value:
        """Return rank 0's value on every process."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=FIRST, group=self._group)
        return values[0]

    def _largest(self, number: int) -> int:
        if self.world_size == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return int(largest)


def rows_per_process(batch_size: int, processes: int) -> int:
    """Return how many rows of a batch each process embeds.

    Raises:
        ConfigError: the batch does not divide by the number of processes.
    """
    rows, rest = divmod(batch_size, processes)
    if rest:
        fitting = [n for n in (rows * processes, (rows + 1) * processes) if n]
        raise ConfigError(
            f"train.batch_size: expected a multiple of the {processes} processes, which share it, "
            f"got {batch_size}; use {' or '.join(map(str, fitting))}"
        )
    return rows


@contextmanager
def join_processes(config: Config) -> Iterator[Peers]:
    """Join the processes that a launcher started, and leave together with them.

    Uses the default process group if the caller has initialised one, else initialises it from
    torch.distributed's environment variables.

    Raises:
        ConfigError: fewer devices than processes on this machine.
        PeerFailure: another process failed; the message names it and what it was doing.
    """
    made_here, needs_group = not dist.is_initialized(), config.distributed.strategy == "deepspeed"
    if made_here and launched_world_size() == 1 and not needs_group:
        yield Peers()
        return
    # torch 2.13 deprecated collectives that its own wrappers still call.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    timeout = timedelta(seconds=config.distributed.timeout_s)
    if made_here:
        dist.init_process_group(timeout=timeout, **_backend(config))
    # For values on the host, which NCCL cannot send.
    group = dist.new_group(backend="gloo", timeout=timeout)
    failures = FailureChannel(dist.get_rank(), dist.get_world_size())
    peers = Peers(dist.get_rank(), dist.get_world_size(), group=group, failures=failures)
    with failures:
        yield peers
        # A barrier: rank 0 may hold the store, and would take it away from ranks still at work.
        peers.set_phase("waiting for the others at the end")
        peers.all(True)
    if made_here:
        dist.destroy_process_group()


def _backend(config: Config) -> dict[str, Any]:
    """Return arguments of init_process_group for the device of this process."""
    device = choose_device(config.train.device)
    arguments: dict[str, Any] = {"backend": dist.get_default_backend_for_device(device)}
    if launched_world_size() == 1:
        arguments.update(store=dist.HashStore(), rank=FIRST, world_size=1)
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
        arguments["device_id"] = device
    return arguments
