"""Counting the samples that were skipped, and stopping when they are too many."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

MAX_EXAMPLES = 20
MAX_WARNINGS = 5
MIN_SEEN_FOR_SHARE = 200


@dataclass(frozen=True)
class BrokenReport:
    """Samples that were skipped: why, in which shard, at or after which key, and how many."""

    reason: str
    shard: str
    key: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.reason} in {self.shard}, sample {self.key or '(unknown)'}"


@dataclass
class BrokenTally:
    """Broken samples so far.

    Args:
        counts: skipped samples by reason.
        seen: samples in all, broken ones included.
        lost: of the skipped ones, those that were lost before any was read.
        examples: the first reports.
    """

    counts: Counter[str] = field(default_factory=Counter)
    seen: int = 0
    lost: int = 0
    examples: list[BrokenReport] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Skipped samples in all."""
        return sum(self.counts.values())

    def add(self, seen: int, reports: Sequence[BrokenReport] = ()) -> None:
        """Count samples and the reports among them; the first few are logged as warnings."""
        self.seen += seen
        for report in reports:
            self.counts[report.reason] += report.count
            if len(self.examples) < MAX_EXAMPLES:
                self.examples.append(report)
                if len(self.examples) <= MAX_WARNINGS:
                    logger.warning("skipped a broken sample: %s", report)

    def add_lost(self, reports: Sequence[BrokenReport]) -> None:
        """Count samples that were found to be lost before any was read."""
        self.lost += sum(report.count for report in reports)
        self.add(0, reports)

    def check(self, max_share: float, *, at_end: bool = False) -> None:
        """Stop when too many are broken; before the end a share of a few samples says nothing.

        Raises:
            ValueError: with the counts and an example.
        """
        too_few = self.seen < MIN_SEEN_FOR_SHARE and not at_end
        broken = self.total - self.lost
        if too_few or broken <= max_share * self.seen:
            return
        example = f"; the first: {self.examples[0]}" if self.examples else ""
        raise ValueError(
            f"max_broken_share: expected at most {max_share:.1%} broken samples, got {broken} "
            f"of {self.seen} ({dict(self.counts)}{example}); repair or remake the shards, or raise "
            "max_broken_share"
        )


def check_lost(reports: Sequence[BrokenReport], found: int, max_share: float) -> None:
    """Raise ValueError if too many samples of a set were lost, beside those that were found."""
    counts = Counter[str]()
    for report in reports:
        counts[report.reason] += report.count
    seen = found + sum(counts.values())
    BrokenTally(counts, seen, examples=[*reports[:1]]).check(max_share, at_end=True)
