"""The text-embedding recipe: its loss is the formula of its page, and the example runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from one_shot import gradient_errors, worst
from torch import Tensor

pytest.importorskip("sentence_transformers")
pytest.importorskip("accelerate", reason="the trainer of sentence-transformers needs accelerate")
pytest.importorskip("datasets", reason="the trainer of sentence-transformers needs datasets")

from tiny_sentences import columns, tiny_model

from gradcache_clip.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss

EXAMPLE = Path(__file__).parent.parent / "examples" / "text_embedding.py"
WIDTHS = (32, 12, 5)


def of_the_page(embeddings: list[Tensor]) -> Tensor:
    """L = sum over widths of the mean of -log(exp(s cos(q, d)) / sum of exp over all d and n)."""
    total = torch.zeros((), dtype=torch.float64)
    for width in WIDTHS:
        queries, documents, negatives = (F.normalize(e[:, :width], dim=1) for e in embeddings)
        positive = (20 * queries @ documents.T).exp()
        hard = (20 * queries @ negatives.T).exp()
        total = total - (positive.diag() / (positive.sum(1) + hard.sum(1))).log().mean()
    return total


def test_the_loss_is_that_of_the_page(tmp_path: Path) -> None:
    ours, truth = tiny_model(tmp_path).double(), tiny_model(tmp_path).double()
    features = [ours.preprocess(texts) for texts in columns(13, 3).values()]
    loss = CachedMultipleNegativesRankingLoss(ours, mini_batch_size=4, matryoshka_dims=WIDTHS)
    value = loss([dict(each) for each in features])
    value.backward()
    expected = of_the_page([truth(dict(each))["sentence_embedding"] for each in features])
    expected.backward()
    torch.testing.assert_close(value, expected)
    errors = gradient_errors([ours], [truth]).items()
    # A key bias moves no softmax; its gradient is rounding.
    assert worst({name: e for name, e in errors if not name.endswith("key.bias")})[1] < 1e-10


@pytest.mark.parametrize(
    "count", [3, pytest.param(2, marks=pytest.mark.slow)], ids=["triplets", "pairs"]
)
def test_the_example_in_small(tmp_path: Path, count: int) -> None:
    tiny_model(tmp_path / "model")
    for split, rows in (("train", 48), ("validation", 10)):
        texts = columns(rows, count)
        texts = {name.replace("negative_1", "negative"): column for name, column in texts.items()}
        lines = (dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True))
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    options = {
        "--model": tmp_path / "model", "--output": tmp_path / "run", "--batch-size": 16,
        "--chunk-tokens": 60, "--steps": 24, "--learning-rate": 0.003,
    }  # fmt: skip
    given = [str(each) for option in options.items() for each in option]
    command = [sys.executable, str(EXAMPLE), str(tmp_path), *given, "--widths", "32", "8"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "R@1 of   32 numbers:" in result.stdout and "R@1 of    8 numbers:" in result.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["batch_size"], summary["chunk_size"], summary["steps"]) == (16, 60, 24)
    metrics = summary["metrics"]
    for width in (32, 8):
        name = f"definition_to_word_recall_at_10_of_{width}_numbers"
        assert metrics[name] == metrics[f"{name}_before"] == 1.0, "of ten"
        assert metrics[f"{name}_chance"] == 1.0
    losses = [
        entry["loss"]
        for entry in json.loads((tmp_path / "run" / "history.json").read_text())
        if "loss" in entry
    ]
    assert len(losses) == 24 and losses[-1] < 0.85 * losses[0]
    assert (tmp_path / "run" / "pictures" / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
