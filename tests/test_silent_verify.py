"""Does `verify` see what is silently wrong with hooks, and over several processes?"""

from __future__ import annotations

from pathlib import Path

import pytest
import verify_over_ranks
from rank_processes import failures


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_over_several_ranks(world: int, tmp_path: Path):
    assert failures(verify_over_ranks.suite, world, tmp_path) == []
