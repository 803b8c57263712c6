"""Capture torch's random generators, so that a replay draws what its embed drew."""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_WITHOUT_GENERATOR = {"cpu", "meta"}
_PASSES_COMPARED = 16


@dataclass(slots=True)
class RandomState:
    """State of the CPU generator and of one generator for each accelerator in use."""

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...]

    @classmethod
    def capture(cls, devices: Collection[torch.device]) -> RandomState:
        """Read the generators of the CPU and of `devices`; nothing waits for a device."""
        cpu = torch.default_generator.get_state()
        if not devices:
            return cls(cpu, ())
        return cls(cpu, tuple((d, _generator_of(d).get_rng_state(d)) for d in devices))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            _generator_of(device).set_rng_state(state, device)

    def equals(self, other: RandomState) -> bool:
        pairs = zip(self.devices, other.devices, strict=True)
        return torch.equal(self.cpu, other.cpu) and all(
            torch.equal(a, b) for (_, a), (_, b) in pairs
        )


class HostState(NamedTuple):
    """State of Python's and NumPy's global generators, which no replay restores."""

    python: Any
    numpy: Any

    @classmethod
    def capture(cls) -> HostState:
        numpy = sys.modules.get("numpy")
        return cls(random.getstate(), None if numpy is None else numpy.random.get_state())

    def restore(self) -> None:
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def drawn_from(self) -> list[str]:
        """Name the generators that have gone on since."""
        now = HostState.capture()
        names = ["Python's random"] if now.python != self.python else []
        return names + (["numpy"] if not _equal(now.numpy, self.numpy) else [])


def _equal(one: Any, other: Any) -> bool:
    """Compare two states of NumPy's generator."""
    if one is None or other is None:
        return one is other
    return one[0] == other[0] and bool((one[1] == other[1]).all()) and one[2:] == other[2:]


class _Repeatable(Protocol):
    random_state: RandomState | None


class Draws:
    """Notes the generators' state before every pass that draws random numbers."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = tuple(devices)
        self._states = [RandomState.capture(self._devices)]
        self._passes: list[_Repeatable] = []

    def passed(self, chunk: _Repeatable) -> None:
        """Note the end of a pass."""
        self._states.append(RandomState.capture(self._devices))
        self._passes.append(chunk)
        if len(self._passes) == _PASSES_COMPARED:
            self.settle()

    def settle(self) -> bool:
        """Find the passes that drew; return whether any did."""
        states, passes = self._states, self._passes
        self._states, self._passes = states[-1:], []
        # Drawing never leads back to a state: where the last is the first, nobody drew.
        if states[0].equals(states[-1]):
            return False
        for chunk, before, after in zip(passes, states, states[1:], strict=False):
            if not before.equals(after):
                chunk.random_state = before
        return True


def accelerators_among(tensors: Iterable[Tensor]) -> tuple[torch.device, ...]:
    """List the devices of `tensors` that have a random generator of their own."""
    found = {tensor.device for tensor in tensors if tensor.device.type not in _WITHOUT_GENERATOR}
    return tuple(sorted(found, key=str))


def _generator_of(device: torch.device) -> Any:
    return torch.get_device_module(device)
