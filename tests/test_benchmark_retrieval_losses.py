"""The benchmark of retrieval losses: contestants agree, and its table tells who could not run."""

from __future__ import annotations

from pathlib import Path

import pytest
import retrieval_losses
import torch
from fresh_process import distance
from results import write_rows
from retrieval_losses import CONTESTANTS, OBJECTIVES, Row, make_batch


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_are_those_of_the_whole_matrix(objective: str):
    batch = make_batch(65, torch.float64)
    exact = CONTESTANTS["plain PyTorch"][1](objective)(batch)
    assert distance(CONTESTANTS["gradcache_clip"][1](objective)(batch), exact) < 1e-10


@pytest.mark.parametrize("objective", ["four directions", "hardness", "guide"])
def test_the_library_computes_the_same(objective: str):
    pytest.importorskip("sentence_transformers")
    batch = make_batch(65, torch.float64)
    exact = CONTESTANTS["plain PyTorch"][1](objective)(batch)
    theirs = CONTESTANTS["sentence-transformers cached"][1](objective)(batch)
    assert distance(theirs, exact) < 1e-10


def test_what_failed_is_told(tmp_path: Path):
    rows = [
        Row("guide", 512, "gradcache_clip", "2.0", "measured", 2**24, 250.0, 1.0, 1e-7),
        Row("guide", 512, "sentence-transformers cached", "", "not installed"),
    ]
    write_rows(Row, rows, tmp_path / "retrieval_losses.csv")
    page = retrieval_losses.section(tmp_path)
    assert "| guide | 512 | gradcache_clip | 16 MiB | 250 | 1.00 | 1e-07 |" in page
    assert "| guide | 512 | sentence-transformers cached | not installed |" in page
