"""Left padding, unpadded texts, images, adapters on two processes, beside one process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_processes import Check, failures
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer import losses as theirs
from tiny_embedders import EMBEDDERS, ROWS, in_double
from tiny_sentences import gradients, tiny_model, worst_error, wrapped

from gradcache_clip.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss

TENSORS = "input_ids", "attention_mask"


def over_ranks(name: str, folder: Path) -> None:
    """Each rank preprocesses its own rows, the second without any images."""
    built, columns = EMBEDDERS[name].build, EMBEDDERS[name].columns()
    ours, alone = built(folder / name), built(folder / name)
    whole = [alone.preprocess([*column]) for column in columns]
    own = ROWS // dist.get_world_size()
    mine = slice(dist.get_rank() * own, (dist.get_rank() + 1) * own)
    share = [ours.preprocess(column[mine]) for column in columns]
    options = {"mini_batch_num_tokens": 24, "gather_across_devices": True}
    with in_double(ours, alone):
        loss = CachedMultipleNegativesRankingLoss(ours, **options)
        value = gradients(wrapped(loss, DistributedDataParallel(ours)), share, 2.0)
        expected = gradients(theirs.MultipleNegativesRankingLoss(alone), whole, 2.0)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    parameter, error = worst_error(ours, alone)
    assert error < 1e-10, f"{parameter}: {error:.1e}"


def one_rank_sees_the_padding(folder: Path) -> None:
    """The rows of the other have one length; both keep all columns, as the batch was given."""
    model, alone = (tiny_model(folder / "bert", padding_side="left").double() for _ in range(2))
    columns = [["red", "small old line", "dot", "bar"], ["red dot", "small", "line", "dot"]]
    whole = [alone.preprocess(column) for column in columns]
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    share = [{**each, **{key: each[key][mine] for key in TENSORS}} for each in whole]
    ddp = DistributedDataParallel(model)
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=1, gather_across_devices=True)
    with pytest.warns(UserWarning, match="padded on the left depend on their padding"):
        value = gradients(wrapped(loss, ddp), share)
    expected = gradients(theirs.MultipleNegativesRankingLoss(alone), whole)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert worst_error(model, alone)[1] < 1e-10


class InTwo:
    """The checks over saved models, which a process receives by pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> Iterator[tuple[str, Check]]:
        for name in EMBEDDERS:
            yield name, partial(over_ranks, name, self.folder)
        yield "padding on one rank", partial(one_rank_sees_the_padding, self.folder)


@pytest.mark.slow
@pytest.mark.distributed
def test_in_two_processes(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    for name, embedder in EMBEDDERS.items():
        embedder.build(folder / name)
    tiny_model(folder / "bert")
    found = failures(InTwo(folder), 2, tmp_path)
    assert not found, "\n".join(found)
