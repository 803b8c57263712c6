"""Inputs that divide by themselves, in everything that cuts a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_shot import gradient_errors, twins, worst
from packed_inputs import graph_library
from row_kinds import KINDS
from test_rows import dot_product
from torch import Tensor, nn

from gradcache_clip import (
    ByLength,
    FrozenTrunk,
    GradCache,
    PackedTokens,
    Ragged,
    Shared,
    deferred_step,
    verify,
)
from gradcache_clip.cache.batch_tree import count_rows, take_rows, tensors_in
from gradcache_clip.cache.chunks import even_chunks
from gradcache_clip.cache.host_inputs import HostInputs, device_for
from gradcache_clip.cache.own_rows import with_own_rows
from gradcache_clip.cache.trunk import call_encoder
from gradcache_clip.memory import count_cached_step

COUNTS = (2, 0, 1, 3, 0, 0, 1)
GRAPHS = (2, 1, 1, 3, 1, 2, 1)


def built(name: str) -> tuple[Any, nn.Module]:
    build, encoder, fewest = KINDS[name]
    return build(GRAPHS if fewest else COUNTS), encoder().double()


def cache_of(rows: Any, *encoders: nn.Module, **options: Any) -> GradCache:
    return GradCache(encoders, dot_product, chunk_size=2, rows=[rows, None], **options)


@pytest.mark.parametrize("name", KINDS)
def test_verify(name):
    kind, encoder = built(name)
    report = verify(cache_of(kind.rows, encoder, nn.Linear(3, 5).double()), kind.inputs, beside())
    assert report.exact, report


def beside() -> Tensor:
    return torch.randn(len(COUNTS), 3).double()


@pytest.mark.parametrize("name", ["mapping", "patches", "tokens", "graphs", "jagged"])
@pytest.mark.parametrize("size", [2, "auto"])
def test_a_backward_elsewhere(name, size):
    kind, encoder = built(name)
    ours, truth = twins(encoder, nn.Linear(3, 5).double())
    numbers = beside()
    (dot_product(call_encoder(truth[0], kind.whole), truth[1](numbers)) / 2).backward()
    cache = GradCache(tuple(ours), dot_product, chunk_size=size, rows=[kind.rows, None])
    (deferred_step(cache, kind.inputs, numbers).loss / 2).backward()
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


def test_a_step_that_ran_out_of_memory_starts_again():
    kind, encoder = built("patches")
    ours, truth = twins(encoder, nn.Linear(3, 5).double())
    numbers = beside()
    dot_product(call_encoder(truth[0], kind.whole), truth[1](numbers)).backward()

    def memory_runs_out(_: nn.Module, given: Any) -> None:
        if len(given[0]) > 1:
            raise torch.OutOfMemoryError("out of memory")

    ours[1].register_forward_pre_hook(memory_runs_out)
    cache = cache_of(kind.rows, *ours)
    with pytest.warns(UserWarning, match="chunk_size=1"):
        cache(kind.inputs, numbers)
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


@pytest.mark.parametrize("name", KINDS)
def test_rows_that_mix_are_found(name):
    """The two halves of a chunk are cut like any other rows."""
    kind, encoder = built(name)

    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            features = self.inner(*args, **kwargs)
            return features - features.mean(0)

    with pytest.raises(ValueError, match="do not depend on the other rows"):
        cache_of(kind.rows, Mixes(), nn.Linear(3, 5).double())(kind.inputs, beside())


def test_the_two_sides_of_a_frozen_trunk():
    kind, encoder = built("patches")
    trunk = FrozenTrunk(encoder.requires_grad_(False), nn.Linear(5, 5).double())
    ours, truth = twins(trunk, nn.Linear(3, 5).double())
    numbers = beside()
    dot_product(call_encoder(truth[0], kind.whole), truth[1](numbers)).backward()
    cache_of(kind.rows, *ours)(kind.inputs, numbers)
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


@pytest.mark.parametrize("name", KINDS)
def test_only_the_rows_of_a_chunk_move(name):
    kind, _ = built(name)
    inputs = kind.inputs if kind.rows is None else kind.rows(kind.inputs)
    meta, divided = torch.device("meta"), with_own_rows(inputs, "input")
    assert device_for(nn.Linear(2, 2, device=meta).parameters(), divided) == meta
    chunk = even_chunks(len(COUNTS), 4)[0]
    moved = HostInputs(divided, meta).take(chunk)
    stayed = HostInputs(divided, None).take(chunk)
    assert {tensor.device.type for tensor in tensors_in(moved)} == {"meta"}
    assert [t.shape[-1] for t in tensors_in(moved)] == [t.shape[-1] for t in tensors_in(stayed)]
    assert {tensor.device.type for tensor in tensors_in(inputs)} == {"cpu"}


def test_consecutive_entries_are_views():
    images, tokens = torch.randn(7, 4), torch.randn(1, 7, 4)
    ragged = Ragged({"x": torch.ones(len(COUNTS)), "images": images}, {"images": COUNTS})
    packed = PackedTokens()({"x": tokens, "cu_seqlens": torch.tensor([0, *COUNTS]).cumsum(0)})
    assert take_rows(ragged, 2, 4)["images"].data_ptr() == images[2:].data_ptr()
    assert take_rows(packed, 2, 4)["x"].data_ptr() == tokens[0, 2:].data_ptr()
    neighbours = Ragged({"images": images}, {"images": COUNTS}).nest["images"].take([2, 3])
    assert neighbours.value.data_ptr() == images[2:].data_ptr()


def test_parts_without_an_entry_are_left_out_of_mappings_alone():
    entries, counts = torch.ones(2, 4), [2, 0]
    ragged = Ragged({"x": torch.ones(2), "images": entries}, {"images": counts})
    assert take_rows(ragged, 1, 2).keys() == {"x"} and "images" in ragged.nest
    assert take_rows(Ragged((torch.ones(2), entries), {1: counts}), 1, 2)[1].shape == (0, 4)


def test_what_describes_packed_tokens_is_made_anew():
    lengths = torch.tensor([3, 1, 4])
    given = {
        "input_ids": torch.arange(8)[None],
        "seq_idx": torch.arange(3).repeat_interleave(lengths)[None].int(),
        "cu_seq_lens_q": torch.tensor([0, 3, 4, 8]).int(),
        "cu_seq_lens_k": torch.tensor([0, 3, 4, 8]).int(),
        "max_length_q": 4,
        "max_length_k": torch.tensor(4),
        "position_ids": torch.arange(24).view(3, 1, 8),
        "centres": Shared(torch.ones(2)),
        "use_cache": False,
    }
    taken = take_rows(PackedTokens()(given), 0, 2)
    assert taken["input_ids"].tolist() == [[0, 1, 2, 3]]
    assert taken["seq_idx"].tolist() == [[0, 0, 0, 1]] and taken["seq_idx"].dtype == torch.int32
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert taken[key].tolist() == [0, 3, 4] and taken[key].dtype == torch.int32
    assert taken["max_length_q"] == 3 and taken["max_length_k"].item() == 3
    assert taken["position_ids"].tolist() == [[[0, 1, 2, 3]], [[8, 9, 10, 11]], [[16, 17, 18, 19]]]
    assert taken["centres"] is given["centres"].value and taken["use_cache"] is False


@pytest.mark.parametrize("start", [0, 2])
def test_sequences_are_seen_in_their_positions(start):
    """Some models count positions from 2."""
    positions = torch.cat([torch.arange(start, start + n) for n in (3, 1, 1, 4)])
    packed = PackedTokens()({"position_ids": positions, "input_ids": torch.ones(9).long()})
    assert packed.lengths == [3, 1, 1, 4]


def test_a_batch_that_follows_its_attributes():
    data = graph_library().data
    graphs = [data.Data(x=torch.ones(n, 4), y=torch.ones(2 * n), name=str(n)) for n in GRAPHS]
    batch = data.Batch.from_data_list(graphs, follow_batch=["y"])
    taken = take_rows(batch, 2, 4)
    assert taken.name == ["1", "3"] and taken.num_graphs == 2
    assert taken.y_batch.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert count_rows(batch, "input") == len(GRAPHS)


def test_steps_are_counted():
    """The example's rows follow each other until there are 64."""
    bags = nn.EmbeddingBag(50, 64), nn.Linear(3, 64)
    offsets = torch.tensor([0, 1000, 1000])
    example = PackedTokens()({"input": torch.ones(1500).long(), "offsets": offsets})
    counted = count_cached_step(bags, dot_product, (example, torch.ones(3, 3)), 64, 8)
    # 21 times three bags and one more; an index of eight bytes, 64 offsets, three numbers a row.
    tokens = 21 * 1500 + 1000
    assert counted.input_bytes >= 8 * tokens + 64 * 3 * 4
    assert counted.input_bytes < 8 * tokens + 64 * 3 * 4 + 8 * 64 + 512


def test_rows_of_another_cost_are_sorted_by_it():
    sizes: list[int] = []

    class Looks(nn.Linear):
        def forward(self, title: Tensor, images: Tensor | None = None) -> Tensor:
            sizes.append(0 if images is None else len(images))
            return super().forward(title)

    posts = {"title": torch.randn(7, 3), "images": torch.randn(7, 2)}
    cache = GradCache(
        (Looks(3, 4), nn.Linear(3, 4)),
        dot_product,
        chunk_size=2,
        sort_by_length=[ByLength(), None],
        check_rows="off",
    )
    cache(Ragged(posts, {"images": COUNTS}), torch.randn(7, 3))
    assert sizes[:4] == [5, 2, 0, 0]
