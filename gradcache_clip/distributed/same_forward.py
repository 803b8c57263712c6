"""Forwards that gather parameters: do all ranks run the same ones? If not, an error on every rank.

A rank that gathers alone waits for ever, takes the rows of another layer, or ends the process. The
ranks therefore compare a number over the names of what ran, through the store that they met in
and not by a collective, which would wait as well.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import count, zip_longest
from typing import Any

import torch.distributed as dist
from torch import nn

from gradcache_clip.distributed.collectives import world_size

_PATIENCE = timedelta(seconds=1800)
_END, _TALK = "the end of the embed", "the end of a chunk"
# One for all logs of a process: a store forgets nothing.
_numbers = count(1)


class ForwardLog:
    """Modules that ran on this rank since the start of a step, as one number.

    Args:
        remedy: what the error advises.
        gathers: whether a forward gathers. Where the host waits for each collective (gloo), the
            ranks then compare before every one of them; otherwise once, at the end of the embed.
    """

    def __init__(self, remedy: str, *, gathers: bool) -> None:
        self._remedy, self._each = remedy, gathers and _host_waits()
        self._sum, self._read = 0, tuple[str, ...]()
        self._watches = False
        self._ran: list[str] = []

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Note the forwards of these modules, by the names that an error calls them."""
        if world_size() == 1:
            yield
            return
        self._sum, self._ran, self._watches = 0, [], bool(modules)
        with ExitStack() as stack:
            stack.callback(setattr, self, "_watches", False)
            for name, module in modules.items():
                # Ahead of whatever gathers.
                hook = module.register_forward_pre_hook(self._entering(name), prepend=True)
                stack.callback(hook.remove)
            yield

    def meet(self) -> None:
        """Before ranks tell each other something, for which one that waits in a forward is late.

        Raises:
            RuntimeError: as `end`.
        """
        if self._watches:
            self._note(_TALK)

    def end(self) -> None:
        """After the embed.

        Raises:
            RuntimeError: ranks ran different modules; on every rank.
        """
        if world_size() > 1:
            self._note(_END)
            if not self._each:
                self._compare()

    def _entering(self, name: str) -> Callable[..., None]:
        return lambda *_: self._note(name)

    def _note(self, name: str) -> None:
        self._sum = zlib.crc32(name.encode(), self._sum)
        self._ran.append(name)
        if self._each:
            self._compare()

    def _compare(self) -> None:
        """Every rank counts itself in twice: among all, and among those of its own sum."""
        store, place = (
            dist.distributed_c10d._get_default_store(),
            f"gradcache_clip/{next(_numbers)}",
        )
        same, complete = f"{place}/{self._sum}", f"{place}/complete"
        store.add(same, 1)
        if store.add(place, 1) == world_size():
            store.set(complete, "")
        else:
            _wait_for_all(store, place, complete)
        if dist.get_rank() == 0:
            # All are past the one before.
            for key in self._read:
                store.delete_key(key)
        self._read = (same, place, complete)
        if store.add(same, 0) != world_size():
            raise RuntimeError(self._message(store, place))

    def _message(self, store: Any, place: str) -> str:
        """Where the ranks parted; all of them come here."""
        store.set(f"{place}/at/{dist.get_rank()}", json.dumps(self._ran))
        ran = [json.loads(store.get(f"{place}/at/{rank}")) for rank in range(world_size())]
        parted = next(names for names in zip_longest(*ran, fillvalue=_END) if len({*names}) > 1)
        by_rank = ", ".join(f"{name} on rank {rank}" for rank, name in enumerate(parted))
        return (
            "encoders: expected every rank to run the same modules in each chunk, because ranks "
            f"share out or reduce their parameters together, got {by_rank}; {self._remedy}"
        )


def _wait_for_all(store: Any, place: str, complete: str) -> None:
    try:
        # The store answers once the last rank has come; asking it again and again would swamp it.
        store.wait([complete], _PATIENCE)
    except RuntimeError as error:
        raise RuntimeError(
            f"encoders: expected every rank to come this far, got only {store.add(place, 0)} of "
            f"{world_size()} after {_PATIENCE.total_seconds():.0f} s"
        ) from error


def _host_waits() -> bool:
    return world_size() > 1 and "gloo" in dist.get_backend()
