"""A loss and its contestants, as the files that have some describe them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from results import installed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ON_GPU = ("cuda",)
NEEDS_GPU = "needs an NVIDIA GPU"
Step = Callable[[Any], object]
"""Forward and backward of given inputs."""


class NotOffered(Exception):
    """The installed version of a package lacks what the adapter calls."""


@dataclass(frozen=True)
class Contestant:
    """One implementation of one loss."""

    name: str
    loss: str
    build: Callable[..., Any]
    """Imports the package and returns what its `Task` calls."""
    package: str = "torch"
    """Distribution on the package index."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    normalises: bool = False
    """L2-normalises inside, so the gradient is that of the normalised features."""
    largest: int = 2**20
    """Batches beyond it are not tried."""
    note: str = ""

    def obstacle(self, device: str) -> str:
        """Why it cannot run here, empty if it can."""
        if device not in self.devices:
            return NEEDS_GPU
        return "" if self.version() else "not installed"

    def version(self) -> str:
        return installed(self.package)


@dataclass(frozen=True)
class Task(ABC):
    """A loss and its inputs; it is pickled for every process."""

    title: str
    """Names it in the rows."""
    dtype: str
    device: str

    small: ClassVar[int]
    """Size of the warm-up, so that code and thread pools are no part of what is measured."""
    cases: ClassVar[tuple[str, ...]] = ("",)
    """Inputs at which errors are measured."""

    @abstractmethod
    def contestants(self) -> list[Contestant]:
        """Those that compute this loss, in the order of the tables."""

    @abstractmethod
    def step(self, contestant: Contestant) -> Step:
        """Build a contestant."""

    @abstractmethod
    def inputs(self, size: int) -> Any:
        """The same tensors for every contestant."""

    @abstractmethod
    def errors(self, contestant: Contestant, case: str) -> dict[str, float]:
        """Errors against fp64 by name."""

    def product(self, times: int) -> Callable[[], object] | None:
        """A matrix product, that often, with whose rate steps are compared."""
        return None

    def find(self, name: str) -> Contestant:
        return next(one for one in self.contestants() if one.name == name)
