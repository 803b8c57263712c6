"""The order in which chunks are replayed."""

from __future__ import annotations


def replay_order(counts: list[int], joint_first_and_last: bool) -> list[list[tuple[int, int]]]:
    """Groups of (tower, chunk) that share one backward; `counts` are the chunks of each tower.

    With `joint_first_and_last` the first and the last group carry a chunk of every tower: ZeRO-3
    overwrites gradients in the first backward of a step, and DDP's reducer waits for every
    parameter in the last. A tower with a single chunk is in the last group. All other chunks go one
    by one, tower by tower, which holds the fewest graphs at once.

    Example:
        >>> replay_order([2, 3], joint_first_and_last=True)
        [[(0, 0), (1, 0)], [(1, 1)], [(0, 1), (1, 2)]]
    """
    chunks = [[(tower, index) for index in range(count)] for tower, count in enumerate(counts)]
    if not joint_first_and_last:
        return [[chunk] for tower in chunks for chunk in tower]
    last = [tower[-1] for tower in chunks if tower]
    first = [tower[0] for tower in chunks if len(tower) > 1]
    between = [[chunk] for tower in chunks for chunk in tower[1:-1]]
    return [group for group in [first, *between, last] if group]
