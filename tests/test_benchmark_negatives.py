"""benchmarks/negatives.py: exact gradients of blocks, fair runs, honest rows, errors that help."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import negatives
import pytest
import torch
from negatives import draw, finding, sets_of, summaries
from negatives_data import (
    DataSet,
    Unavailable,
)
from negatives_training import (
    EXPERIMENTS,
    BagOfWords,
    BlockLoss,
    Experiment,
    Row,
    Run,
    SmallConvNet,
    batches,
    count_bytes,
    evaluate,
    head,
    start,
    train,
    train_and_evaluate,
    two_heads,
)
from one_shot import gradient_errors, twins, worst
from results import read_rows
from rich.console import Console
from torch import Tensor, nn
from toy_pairs import WIDTH, toy_data

from gradcache_clip import ClipLoss, GradCache

ROWS = 24
RUN = Run("toy", 8, 0, 3e-3, 20, 32, 8, "two heads")


_RESULTS = (
    "backward_recall",
    "forward_chance",
    "backward_chance",
    "forward_queries",
    "backward_queries",
    "cached_step_bytes",
    "plain_step_bytes",
    "seconds",
)


def toy(load: Any = lambda folder: toy_data()) -> Experiment:
    return Experiment("Toys", "unseen toys", ("a", "b"), "two heads", load, two_heads, 3e-3, 20, 8)


def row(block_size: int = 16, seed: int = 0, recall: float = 0.5, **changes: Any) -> Row:
    settings = {**vars(RUN), "data": "glyphs", "block_size": block_size, "seed": seed}
    found = Row(**settings, **dict.fromkeys(_RESULTS, 1), forward_recall=recall)  # type: ignore[arg-type]
    return replace(found, backward_recall=recall / 2, forward_chance=0.01, **changes)


def accumulate(towers: list[nn.Module], loss: nn.Module, inputs: Any, ids: Tensor, m: int) -> None:
    """Plain gradient accumulation: m pairs forward and backward at a time."""
    blocks = range(0, len(ids), m)
    for begin in blocks:
        rows = slice(begin, begin + m)
        features = [tower(given[rows]) for tower, given in zip(towers, inputs, strict=True)]
        (loss(*features, ids=ids[rows]).loss / len(blocks)).backward()


def heads_and_features() -> tuple[list[nn.Module], list[Tensor]]:
    towers = [head(WIDTH), head(WIDTH)]
    return towers, [torch.randn(ROWS, WIDTH, dtype=torch.float64) for _ in range(2)]


def bags_and_words() -> tuple[list[nn.Module], list[Tensor]]:
    inputs = [torch.randint(0, 30, (ROWS, 6)) for _ in range(2)]
    return [BagOfWords(30, 8), BagOfWords(30, 8)], inputs


@pytest.mark.parametrize("make", [heads_and_features, bags_and_words])
@pytest.mark.parametrize("m", [2, 8, ROWS])
def test_blocks_through_the_cache_are_accumulation_over_chunks_of_that_size(make, m):
    towers, inputs = make()
    ids = torch.arange(ROWS) // 2  # neighbours are no negatives of each other
    for tower in towers:
        tower.double().eval()
    (*ours, our_loss), (*plain, plain_loss) = twins(*towers, ClipLoss().double())
    accumulate(plain, plain_loss, inputs, ids, m)
    cache = GradCache(ours, BlockLoss(our_loss, m), chunk_size=5)
    cache(*inputs, loss_kwargs={"ids": ids})
    name, error = worst(gradient_errors([*ours, our_loss], [*plain, plain_loss]))
    if m == 2:  # each pair's only rival is no negative: nothing is left to learn
        assert all(not p.grad.any() for tower in ours for p in tower.parameters())
    else:
        assert error < 1e-10, name


def test_one_block_of_the_whole_batch_is_the_loss_itself_and_smaller_ones_are_not():
    first, second = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    whole = ClipLoss()(first, second).loss
    assert torch.equal(BlockLoss(ClipLoss(), ROWS)(first, second), whole)
    assert BlockLoss(ClipLoss(), 8)(first, second) < whole - 0.1


def test_runs_of_one_seed_differ_in_the_block_alone():
    experiment, pairs = toy(), toy_data().train
    few, many = RUN, replace(RUN, block_size=32)
    weights = [
        [p.clone() for t in start(experiment, pairs, run)[0] for p in t.parameters()]
        for run in (few, many, replace(RUN, seed=1))
    ]
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not all(map(torch.equal, weights[0], weights[2]))
    orders = [torch.stack(list(batches(96, run))) for run in (few, many, replace(RUN, seed=1))]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


def test_dropout_is_the_same_for_every_block_size(monkeypatch):
    drawn = []

    class Spy(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            mask = super().forward(torch.ones_like(x))
            drawn[-1].append(mask)
            return x * mask

    monkeypatch.setattr(nn, "Dropout", Spy)
    for m in (8, 32):
        drawn.append([])
        pairs, run = toy_data().train, replace(RUN, block_size=m, steps=3)
        train(*start(toy(), pairs, run), pairs, run, lambda: None)
    assert len(drawn[0]) > 10 and all(map(torch.equal, *drawn))


def test_an_epoch_has_every_pair_once_and_drops_the_rest():
    epochs = torch.stack(list(batches(100, replace(RUN, steps=6)))).view(2, 96)
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 96
    assert not torch.equal(epochs[0], epochs[1])


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(
        ValueError, match=r"at most the 31 training pairs of toy, got 32; pass a sm"
    ):
        batches(31, RUN)


def test_training_retrieves_what_it_never_saw_and_again_the_same():
    data = toy_data(400)
    run = replace(RUN, steps=60)
    towers, _ = start(toy(), data.train, run)
    before = evaluate(towers, data.held_out).image_to_text.recall[1]
    found = train_and_evaluate(toy(), data, run)
    assert found.forward_chance == found.backward_chance == pytest.approx(1 / 20)
    assert before < 0.3 < 0.6 < min(found.forward_recall, found.backward_recall)
    again = train_and_evaluate(toy(), data, run)
    assert replace(again, seconds=0) == replace(found, seconds=0)
    assert found.run == run and found.forward_queries == 20


def test_a_plain_step_holds_more_the_more_pairs_compete_and_a_cached_one_does_not():
    run = replace(RUN, batch_size=1024)
    pairs = toy_data().train
    towers, _ = start(toy(), pairs, run)
    counted = [count_bytes(towers, pairs, replace(run, block_size=m)) for m in (64, 1024)]
    (cached_few, plain_few), (cached_all, plain_all) = counted
    # The whole batch: 1,024 rows of 512 hidden units in each head, and the 1,024 x 1,024 logits.
    assert plain_all - plain_few > 4 * (2 * 900 * 512 + 1024**2 - 64**2)
    # Features of the whole batch in place of a block's, and no matrix of their logits.
    assert 0 <= cached_all - cached_few < 4 * 1024**2
    assert 4 * cached_all < plain_all


def test_the_mean_of_a_bag_ignores_what_fills_it_up():
    bag = BagOfWords(9, 4)
    short, padded = torch.tensor([[3, 5]]), torch.tensor([[3, 5, 0, 0, 0]])
    torch.testing.assert_close(bag(short), bag(padded))
    expected = bag.projection(bag.embedding.weight[[3, 5]].mean(0, keepdim=True))
    torch.testing.assert_close(bag(short), expected)
    torch.testing.assert_close(bag(torch.zeros(1, 3).long())[0], bag.projection.bias)


def test_a_small_network_treats_every_image_alone():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    network = SmallConvNet()
    torch.testing.assert_close(network(images)[2:3], network(images[2:3]))


def test_seeds_are_summarised_by_mean_and_deviation():
    rows = [row(64, 0, 0.5), row(16, 0, 0.2), row(64, 1, 0.7), row(16, 1, 0.4), row(64, 2, 0.6)]
    few, many = summaries(rows)
    assert (few.first.block_size, many.first.block_size) == (16, 64)
    assert many.mean("forward") == pytest.approx(0.6) and many.mean("backward") == pytest.approx(
        0.3
    )
    assert many.deviation("forward") == pytest.approx(0.1)
    assert summaries(rows[:1])[0].deviation("forward") == 0


def test_the_picture_says_what_the_rows_say(tmp_path):
    (panel,) = found = sets_of([row(16, 0, 0.2), row(64, 0, 0.4)])
    assert finding(panel) == "30 % right with 64, 15 % with 16"
    png, svg = draw(found, tmp_path / "negatives")
    assert png.read_bytes().startswith(b"\x89PNG") and svg.read_text().startswith("<?xml")


def main(tmp_path: Path, *words: str) -> int:
    options = ["--data", "toy", "--batch-size", "32", "--blocks", "8", "32", "--seeds", "2"]
    return negatives.main([*options, "--results", str(tmp_path), *words])


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "toy", toy())


def test_every_run_gets_a_row_and_no_run_is_made_twice(toys, tmp_path, monkeypatch, capsys):
    assert main(tmp_path) == 0
    out = capsys.readouterr().out
    assert "Toys" in out and "Towers: two heads" in out and "chance" in out and "±" in out
    for name in ("negatives.csv", "negatives.png", "negatives.svg"):
        assert (tmp_path / name).stat().st_size > 100
    rows = read_rows(Row, tmp_path / "negatives.csv")
    assert [(r.seed, r.block_size) for r in rows] == [(0, 8), (0, 32), (1, 8), (1, 32)]
    trained = []
    whole = negatives.train_and_evaluate

    def counted(experiment, data, run, on_step):
        trained.append(run)
        return whole(experiment, data, run, on_step)

    monkeypatch.setattr(negatives, "train_and_evaluate", counted)
    assert main(tmp_path) == 0 and trained == []
    assert main(tmp_path, "--blocks", "8", "16", "32", "--seeds", "1") == 0
    assert [run.block_size for run in trained] == [16]
    assert main(tmp_path, "--steps", "5", "--blocks", "8", "--seeds", "1") == 0
    assert [run.steps for run in trained] == [20, 5]
    assert read_rows(Row, tmp_path / "negatives.csv")[:4] == rows


def test_a_search_over_learning_rates_draws_no_picture(toys, tmp_path, capsys):
    options = ["--learning-rates", "0.001", "0.01", "--seeds", "1", "--steps", "3"]
    assert main(tmp_path, *options) == 0
    assert len(read_rows(Row, tmp_path / "negatives.csv")) == 4
    assert "0.001" in capsys.readouterr().out and not (tmp_path / "negatives.png").exists()


def test_a_set_that_cannot_be_had_is_named_and_the_others_run(toys, tmp_path, monkeypatch, capsys):
    def refuse(folder: Path) -> DataSet:
        raise Unavailable("gone: expected a thing, got none; fetch it")

    monkeypatch.setitem(EXPERIMENTS, "gone", toy(refuse))
    assert main(tmp_path, "--data", "gone", "toy", "--seeds", "1") == 0
    assert "left out: gone: expected a thing, got none; fetch it" in capsys.readouterr().out
    assert {r.data for r in read_rows(Row, tmp_path / "negatives.csv")} == {"toy"}
    assert main(tmp_path / "none", "--data", "gone") == 1


def test_blocks_that_do_not_fit_are_refused_before_anything_is_written(toys, tmp_path):
    with pytest.raises(
        SystemExit, match=r"divide the batch of 32, got 12; pass e\.g\. --blocks 16"
    ):
        main(tmp_path / "new", "--blocks", "8", "12")
    assert not (tmp_path / "new").exists()


def test_redrawing_without_a_csv_says_what_to_do(toys, tmp_path):
    with pytest.raises(FileNotFoundError, match="run without --redraw"):
        main(tmp_path, "--redraw")


@pytest.mark.slow
def test_the_quick_run_needs_nothing_and_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert negatives.main(["--quick", "--steps", "30"]) == 0
    few, many = read_rows(Row, tmp_path / "runs" / "negatives" / "negatives.csv")
    assert (few.block_size, many.block_size) == (16, 256)
    assert min(few.forward_recall, many.forward_recall) > 3 * few.forward_chance
    Console().print(f"R@1 {few.forward_recall:.3f}, {many.forward_recall:.3f}")
