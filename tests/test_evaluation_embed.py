"""Rows embedded by one or several processes, and held-out pairs made of them."""

from __future__ import annotations

import doctest
import io
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gradcache_clip.train.data import Batch, DecodedSample
from gradcache_clip.train.evaluation import embed, embed_dataset, sharding
from gradcache_clip.train.evaluation.embed import EmbedOptions, embed_rows
from gradcache_clip.train.evaluation.held_out import embed_batch, embed_held_out
from gradcache_clip.train.peers import Peers


class Gathering(Peers):
    """Processes that run one after the other, the first one last."""

    def __init__(self, rank: int, world_size: int, values: list[Any]) -> None:
        super().__init__(rank, world_size)
        self.values = values

    def gather_to_rank0(self, value: Any) -> list[Any]:
        self.values.insert(0, value)
        return self.values if self.is_first else []


class Doubling(nn.Module):
    """Twice the input and its sign, with dropout; counts its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(self, tower: int, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        assert tower == 1
        self.calls += 1
        x = nn.functional.dropout(batch["x"], training=self.training)
        return self.weight * x, batch["x"] > 0


def lengths(texts: list[str]) -> Tensor:
    """As a tokenizer."""
    return torch.tensor([[len(text)] for text in texts])


class Calling(nn.Module):
    """An encoder that is a function."""

    def __init__(self, function: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.function = function

    def forward(self, tower: int, inputs: Tensor) -> Tensor:
        return self.weight * self.function(tower, inputs)


class TestEmbed:
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    @pytest.mark.parametrize("count", [1, 7, 8, 13])
    def test_rows_of_all_processes_come_in_order(self, world_size: int, count: int) -> None:
        rows, calls, gathered = torch.randn(count, 3), set(), list[Any]()
        for rank in reversed(range(world_size)):
            encoder = Doubling()
            features = embed_rows(
                encoder,
                iter(rows),
                lambda batch: {"x": torch.stack(batch)},
                EmbedOptions(2, peers=Gathering(rank, world_size, gathered)),
                tower=1,
            )
            calls.add(encoder.calls)
            assert encoder.training
            assert (features is None) == (rank > 0)
        assert features is not None and not features[0].requires_grad
        assert torch.equal(features[0], 2 * rows) and torch.equal(features[1], rows > 0)
        # Sharded encoders need every process in each forward.
        assert calls == {math.ceil(count / (2 * world_size))}

    def test_a_data_set_in_order_without_a_graph(self) -> None:
        layer = nn.Linear(3, 2)
        data = torch.randn(10, 3)
        features, sums = embed_dataset(
            lambda x: (layer(x), x.sum(1)), data.split(4), progress=False, total=10
        )
        torch.testing.assert_close(features, layer(data).detach())
        torch.testing.assert_close(sums, data.sum(1))
        assert not features.requires_grad

    def test_empty(self) -> None:
        with pytest.raises(ValueError, match="batches: expected at least one"):
            embed_dataset(lambda x: x, [], progress=False)

    def test_the_bar_goes_to_stderr_and_the_loader_may_be_a_stream(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stderr = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stderr)
        (features,) = embed_dataset(lambda x: x, (torch.ones(2, 1) for _ in range(3)), total=6)
        assert len(features) == 6


class TestHeldOut:
    def samples(self) -> list[DecodedSample]:
        """Three groups; the first one's images share two captions."""
        given = [("a", ("one", "two")), ("b", ("one",)), ("a", ("two", "one")), ("c", ("three",))]
        return [
            DecodedSample(torch.full((3, 128, 96), n, dtype=torch.uint8), captions, f"k{n}", group)
            for n, (group, captions) in enumerate(given)
        ]

    def encode(self, tower: int, inputs: Tensor) -> Tensor:
        return inputs.float().flatten(1)[:, :1] + torch.tensor([[1.0, 2.0]])

    def test_every_caption_of_a_group_is_embedded_once(self) -> None:
        encoder = Calling(self.encode)
        found = embed_held_out(
            encoder, lengths, self.samples(), EmbedOptions(3), recall_at=(1, 2), folds=2
        )
        assert found is not None
        assert found.texts == ["one", "two", "one", "three"]
        assert found.image_captions == ["one", "one", "two", "three"]
        assert found.image_ids.tolist() == [0, 1, 0, 2] and found.text_ids.tolist() == [0, 0, 1, 2]
        expected = normalize(torch.arange(4.0)[:, None] + torch.tensor([[1.0, 2.0]]), dim=1)
        torch.testing.assert_close(found.image_features, expected)
        expected = normalize(torch.tensor([[4.0, 5], [4, 5], [4, 5], [6, 7]]), dim=1)
        torch.testing.assert_close(found.text_features, expected)
        assert found.thumbnails.shape == (4, 3, 64, 64) and found.thumbnails[2].unique() == 2
        metrics = found.metrics()
        assert metrics.text_to_image.candidates == 2 and [*metrics.text_to_image.recall] == [1, 2]
        assert found.scalars() == metrics.to_scalars()

    def test_of_a_batch_come_pairs_of_different_groups(self) -> None:
        images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 8, 8)
        batch = Batch(images, ["p", "qq", "r", "sss", "t"], [*"vwxyz"], [*"aabcd"])
        found = embed_batch(Calling(self.encode), lengths, batch, 3)
        assert found.texts == ["p", "r", "sss"] and torch.equal(found.image_ids, found.text_ids)
        assert found.thumbnails[:, 0, 0, 0].tolist() == [0, 2, 3]


@pytest.mark.parametrize("module", [embed, sharding])
def test_examples_in_the_docstrings_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
