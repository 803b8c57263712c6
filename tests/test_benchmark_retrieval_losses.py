"""The objectives of retrieval in the benchmark: contestants agree, and the table tells failures."""

from __future__ import annotations

from pathlib import Path

import pytest
import retrieval_losses
import torch
from fresh_process import distance
from results import write_rows
from retrieval_losses import OBJECTIVES, Objective, Row, make_batch


def _gradients(objective: str, name: str) -> list[torch.Tensor]:
    task = Objective(objective, "fp32", "cpu")
    return task.step(task.find(name))(make_batch(65, torch.float64))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_are_those_of_the_whole_matrix(objective: str):
    exact = _gradients(objective, "plain PyTorch")
    assert distance(_gradients(objective, "gradcache_clip"), exact) < 1e-10


@pytest.mark.parametrize("objective", ["four directions", "hardness", "guide"])
def test_the_library_computes_the_same(objective: str):
    pytest.importorskip("sentence_transformers")
    theirs = _gradients(objective, "sentence-transformers cached")
    assert distance(theirs, _gradients(objective, "plain PyTorch")) < 1e-10


def test_what_failed_is_told_and_where_it_ran(tmp_path: Path):
    rows = [
        Row("guide", 512, "gradcache_clip", "2.0", "measured", 2**24, 250.0, 1.0, 1e-7),
        Row("guide", 512, "sentence-transformers cached", "", "not installed"),
    ]
    write_rows(Row, rows, tmp_path / "retrieval_losses.csv")
    page = retrieval_losses.section(tmp_path)
    assert "| guide | 512 | gradcache_clip | 16 MiB | 250 | 1.00 | 1e-07 |" in page
    assert "| guide | 512 | sentence-transformers cached | not installed |" in page
    assert "fp32, one thread" in page.replace("\n", " ")
    where = {"dtype": "bf16", "used_threads": "2", "gpu": "a GPU"}
    write_rows(Row, rows, tmp_path / "retrieval_losses_cuda_bf16.csv", where)
    page = retrieval_losses.section(tmp_path, "cuda", "bf16")
    assert "bf16, a GPU" in page.replace("\n", " ")
