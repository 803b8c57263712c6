"""The state of torch's random generators, so that a replay draws what its embed drew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_WITHOUT_GENERATOR = {"cpu", "meta"}


@dataclass(frozen=True)
class RandomState:
    """State of the CPU generator and of one generator for each accelerator in use."""

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...]

    @classmethod
    def capture(cls, devices: Iterable[torch.device]) -> RandomState:
        """Read the generators of the CPU and of `devices`; nothing waits for a device."""
        states = ((device, _generator_of(device).get_rng_state(device)) for device in devices)
        return cls(torch.get_rng_state(), tuple(states))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            _generator_of(device).set_rng_state(state, device)

    def equals(self, other: RandomState) -> bool:
        pairs = zip(self.devices, other.devices, strict=True)
        return torch.equal(self.cpu, other.cpu) and all(
            torch.equal(a, b) for (_, a), (_, b) in pairs
        )


def accelerators_among(tensors: Iterable[Tensor]) -> tuple[torch.device, ...]:
    """The devices of `tensors` that have a random generator of their own."""
    found = {tensor.device for tensor in tensors if tensor.device.type not in _WITHOUT_GENERATOR}
    return tuple(sorted(found, key=str))


def _generator_of(device: torch.device) -> Any:
    return torch.get_device_module(device)
