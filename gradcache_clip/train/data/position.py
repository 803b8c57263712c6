"""Where the processes of a run stand in an epoch, in a form that any number of them can go on from.

An epoch is a sequence of groups of samples. Group g is read from lane g modulo L, and what the L
lanes hold was settled when the epoch began. What is left of the sequence is dealt out like cards:
of W ranks, rank r takes the places r, r + W, r + 2 W, ... So an epoch that W ranks have begun is
finished by any other number, each group by one of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Lanes:
    """The independent streams that an epoch is read from: `workers` for each of `ranks`."""

    ranks: int
    workers: int

    @property
    def count(self) -> int:
        return self.ranks * self.workers

    def of(self, group: int) -> tuple[int, int]:
        """Rank and worker whose lane a group lies in; the first groups lie in different ranks'."""
        return group % self.ranks, group // self.ranks % self.workers


@dataclass(frozen=True)
class EpochLeft:
    """What is left of an epoch, the same on every rank: some groups, then all from `next` on.

    Args:
        number: of the epoch, from 0.
        lanes: that the groups are read from.
        pending: groups before `next` that are left, each with its first row that is left.
        next: the first group that nobody has begun, nor any after it.
    """

    number: int
    lanes: Lanes
    pending: tuple[tuple[int, int], ...] = ()
    next: int = 0

    @property
    def is_whole(self) -> bool:
        return not self.pending and not self.next

    def at(self, place: int) -> tuple[int, int]:
        """The group at a place of what is left, and its first row that is left."""
        if place < len(self.pending):
            return self.pending[place]
        return self.next + place - len(self.pending), 0

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists, for a checkpoint."""
        pending = [list(pair) for pair in self.pending]
        lanes = [self.lanes.ranks, self.lanes.workers]
        return {"number": self.number, "lanes": lanes, "pending": pending, "next": self.next}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> EpochLeft:
        """What `to_dict` returned."""
        pending = tuple((group, row) for group, row in state["pending"])
        return cls(state["number"], Lanes(*state["lanes"]), pending, state["next"])


@dataclass(frozen=True)
class Taken:
    """How much of its share of an `EpochLeft` one rank has used.

    Args:
        groups: that are used up.
        row: first row of the group after them that is left.
        seen, broken: samples before that group, in all epochs, and those skipped, by reason.
    """

    groups: int = 0
    row: int = 0
    seen: int = 0
    broken: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Numbers and texts, for a checkpoint."""
        counts = {"seen": self.seen, "broken": dict(self.broken)}
        return {"groups": self.groups, "row": self.row, **counts}


def left_after(epoch: EpochLeft, taken: Sequence[Taken]) -> EpochLeft:
    """What the ranks together leave of an epoch, `taken` in the order of the ranks.

    Example:
        >>> lanes = Lanes(2, 1)
        >>> left_after(EpochLeft(0, lanes), [Taken(3, row=5), Taken(2)])
        EpochLeft(number=0, lanes=Lanes(ranks=2, workers=1), pending=((5, 0), (6, 5)), next=7)
    """
    world_size = len(taken)
    current = [rank + each.groups * world_size for rank, each in enumerate(taken)]
    end = max(current) + 1
    pending = []
    for place in range(min(current), end):
        of_rank = taken[place % world_size]
        group, first_row = epoch.at(place)
        if place // world_size == of_rank.groups:
            pending.append((group, max(first_row, of_rank.row)))
        elif place // world_size > of_rank.groups:
            pending.append((group, first_row))
    pending += epoch.pending[end:]
    following, _ = epoch.at(max(end, len(epoch.pending)))
    return EpochLeft(epoch.number, epoch.lanes, tuple(pending), following)


def all_seen(taken: Sequence[Taken]) -> Taken:
    """The counts of all ranks, with nothing of what is left used."""
    broken = Counter[str]()
    for each in taken:
        broken.update(each.broken)
    return Taken(seen=sum(each.seen for each in taken), broken=dict(broken))
