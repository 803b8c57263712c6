"""Settings of `GradCache`: as they were given, and as steps use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gradcache_clip.cache.graph_budget import MemoryBudget
from gradcache_clip.cache.lengths import ByLength
from gradcache_clip.cache.packed import Division
from gradcache_clip.distributed.strategies import LocalStrategy

GetFeatures = Callable[[Any], Any]
ChunkSize = int | tuple[int, ...] | Literal["auto"]
CHECK_MODES = ("error", "warn", "off")
Sorting = ByLength | Sequence[ByLength | None] | None


@dataclass(frozen=True)
class Settings:
    """Arguments of `GradCache`, which says what they mean; checked, and never changed.

    The plan of a step is another one of these, with sizes that were measured or halved.
    """

    encoders: nn.Module | tuple[nn.Module, ...]
    loss: Callable[..., Any]
    chunk_size: ChunkSize = 64
    chunk_record: Path | None = None
    memory_budget: MemoryBudget = None
    rows: Division | Sequence[Division | None] | None = None
    sort_by_length: Sorting = None
    embed_chunk_size: int | tuple[int, ...] | None = None
    get_features: GetFeatures | Sequence[GetFeatures | None] | None = None
    auxiliary_losses: Mapping[str, float] = field(default_factory=dict)
    loss_key: str = "loss"
    strategy: LocalStrategy = field(default_factory=LocalStrategy)
    check_replay: str = "error"
    on_out_of_memory: str = "halve"
    gradient_hooks: str = "error"
    check_rows: str = "error"

    def halved(self, rows: int) -> Settings:
        """Plan smaller chunks than those of `rows`, which did not fit, and half the budget."""
        budget = self.memory_budget
        if isinstance(budget, (int, float)):
            budget = type(budget)(budget / 2)
        return replace(
            self,
            chunk_size=_for_each(self.chunk_size, lambda size: max(1, min(size, rows) // 2)),
            embed_chunk_size=None,
            sort_by_length=_for_each(self.sort_by_length, ByLength.halved),
            memory_budget=budget,
        )


@dataclass
class History:
    """What earlier steps of a cache have shown, so that it is checked once."""

    stepped: bool = False
    rows_checked: frozenset[str] = frozenset()
    """Names of the towers of which this was checked."""
    trims_checked: frozenset[str] = frozenset()
    warned_of_batch_norm: bool = False
    broken_off: bool = False
    """Whether the last step ended in an error that left a part of its gradients in `.grad`."""


def _for_each(setting: Any, change: Callable[[Any], Any]) -> Any:
    """Change a setting for all inputs, or each of several; None stays."""
    if isinstance(setting, (list, tuple)):
        return tuple(each and change(each) for each in setting)
    return setting and change(setting)
