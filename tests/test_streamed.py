"""Shards that can only be streamed: shuffled, shared out, and resumed by epoch and shard."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_shards import good, loader, options, same, take, write, write_tar, zipped

from gradcache_clip.train.data import ImageCaptionLoader, join_states, read_all, read_captions
from gradcache_clip.train.data.streamed import Turns

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 samples in compressed shards of ten."""
    made = tmp_path_factory.mktemp("shards")
    return zipped(write(made / "plain", 80, shard_size=10), made / "zipped")


def keys(batches: list) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_epoch_has_every_sample_once_in_a_new_order(folder: Path, workers: int) -> None:
    # With three workers the epochs of these end at different times.
    read = keys(take(loader(folder, workers=workers, seed=1), 20))
    again = keys(take(loader(folder, workers=workers, seed=1), 20))
    assert read == again != sorted(read)
    if workers < 2:
        first, second, third = read[:80], read[80:160], read[160:]
        assert {*first} == {*second} == {f"k{i:04d}" for i in range(80)}
        assert first != second and len({*third}) == 40
        assert keys(take(loader(folder, seed=2), 8)) != first


def test_batches_mix_shards(folder: Path) -> None:
    shards = {int(key[1:]) // 10 for key in take(loader(folder), 1)[0].keys}
    assert len(shards) > 1
    alone = {int(key[1:]) // 10 for key in take(loader(folder, shuffle_buffer=0), 1)[0].keys}
    assert len(alone) == 1


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (2, 2), (4, 1)])
def test_ranks_and_workers_share_the_shards_out(
    folder: Path, world_size: int, workers: int
) -> None:
    read: list[str] = []
    for rank in range(world_size):
        stream = ImageCaptionLoader(
            folder, 10, options=options(workers=workers), rank=rank, world_size=world_size
        )
        read += keys(take(stream, 8 // world_size))
    if workers < 2:
        assert sorted(read) == [f"k{i:04d}" for i in range(80)]
    assert len(read) == 80


def state_after(folder: Path, world_size: int, count: int, state: dict | None = None, **changes):
    """What all ranks read in batches of five, and the state after."""
    read, states = [], []
    for rank in range(world_size):
        stream = ImageCaptionLoader(
            folder, 5, options=options(**changes), rank=rank, world_size=world_size
        )
        if state is not None:
            stream.load_state_dict(state)
        read += keys(take(stream, count))
        states.append(stream.state_dict())
    return read, json.loads(json.dumps(join_states(states)))


@pytest.mark.parametrize("worlds", [(1, 1), (2, 1), (1, 3), (4, 2)])
def test_finished_shards_are_not_read_again_and_begun_ones_are(
    folder: Path, worlds: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcache_clip.train.data.streamed.PIECE_ROWS", 5)
    before, state = state_after(folder, worlds[0], 12 // worlds[0], shuffle_buffer=0)
    assert len(before) == 60
    finished = state["position"]["finished"]
    # Each rank may hold a shard that it has not seen the end of.
    assert 6 - 2 * worlds[0] <= len(finished) <= 6
    whole = {key for key, count in Counter(k[:4] for k in before).items() if count == 10}
    rest, _ = state_after(folder, worlds[1], 20 // worlds[1], state, shuffle_buffer=0)
    left = 80 - 10 * len(finished)
    if worlds[1] == 1:
        assert {*before, *rest[:left]} == {f"k{i:04d}" for i in range(80)}
        assert len({key[:4] for key in rest[:left]} & whole) <= 6 - len(finished)
        assert len({*rest[:left]}) == left


def test_a_stream_that_goes_on_reads_no_shard_again(folder: Path) -> None:
    whole = loader(folder, 10, shuffle_buffer=0)
    first = keys(take(whole, 4))
    # Pictures take a batch from a second iterator.
    second = keys(take(whole, 5))
    assert not {key[:4] for key in first[:30]} & {key[:4] for key in second[:50]}


def test_turns_are_dealt_out_from_the_first_that_is_left() -> None:
    left = Turns.after(10, [10, 11, 13, 17])
    assert (left.first, {*left.skipped}) == (12, {13, 17})
    assert [*itertools.islice(left, 5)] == [12, 14, 15, 16, 18]


def test_a_state_of_an_index_is_not_that_of_a_stream(folder: Path) -> None:
    state = loader(folder).state_dict()
    assert state["position"] == {"first": 0, "finished": []}
    with pytest.raises(ValueError, match="batch_size: expected None as in the saved state"):
        loader(folder.parent / "plain").load_state_dict(state)
    with pytest.raises(ValueError, match="seed: expected 0"):
        loader(folder, seed=1).load_state_dict(state)


def test_the_epoch_follows_the_shards(folder: Path) -> None:
    stream = loader(folder, 10)
    epochs = [stream.epoch for _ in itertools.islice(stream, 40)]
    assert epochs == sorted(epochs) and epochs[0] == 0 and epochs[-1] >= 3


def test_broken_samples_are_skipped_and_counted(tmp_path: Path) -> None:
    members = {}
    for i in range(40):
        members |= good(f"k{i}")
    for i in range(0, 40, 4):
        members[f"k{i}.png"] = b"damaged"
    write_tar(tmp_path / "a.tar.gz", members, "w:gz")
    stream = loader(tmp_path / "a.tar.gz", 30, max_broken_share=0.3)
    batches = take(stream, 2)
    assert all(len({*batch.keys}) == 30 for batch in batches)
    # The last piece reaches into the third epoch.
    assert stream.broken.counts.keys() == {"undecodable image"}
    assert 80 <= stream.broken.seen <= 80 + 32 and 20 <= stream.broken.total <= 30
    with pytest.raises(ValueError, match="at most 20.0%"):
        take(loader(tmp_path / "a.tar.gz", 30, max_broken_share=0.2), 8)


def test_a_cut_stream_gives_its_whole_samples(tmp_path: Path) -> None:
    folder = write(tmp_path / "plain", 30, shard_size=30)
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[: 20 * 3072 + 300])
    made = zipped(folder, tmp_path / "zipped")
    stream = loader(made, 19, max_broken_share=1.0)
    assert {*take(stream, 1)[0].keys} == {f"k{i:04d}" for i in range(19)}
    assert stream.broken.counts.keys() == {"truncated tar"}
    assert len([*read_all(made, options=options(max_broken_share=1.0))]) == 19
    assert len([*read_captions(made)]) == 38


def test_shards_without_samples_end_with_an_error(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", {"a.pkl": b"", "b": b""}, "w:gz")
    with pytest.raises(ValueError, match=r"source: expected samples in 3 shards, got none"):
        take(loader(tmp_path), 1)
    with pytest.raises(ValueError, match=r"source: expected samples in 3 shards, got none"):
        take(loader(tmp_path, workers=1), 1)


def test_one_compressed_shard_makes_a_stream_of_all(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", good("a"))
    write_tar(tmp_path / "b.tar", good("b"), "w:gz")
    assert {*take(loader(tmp_path, 2), 1)[0].keys} == {"a", "b"}
    assert [sample.key for sample in read_all(tmp_path, options=options())] == ["a", "b"]


def test_draws_are_those_of_the_sample(folder: Path) -> None:
    changes = {"shuffle_buffer": 0, "crop_scale": (0.5, 1.0)}
    whole = loader(folder, 10, **changes)
    batches = take(whole, 4)
    begun = loader(folder, 10, **changes)
    take(begun, 2)
    resumed = loader(folder, 10, **changes)
    resumed.load_state_dict(begun.state_dict())
    again = take(resumed, 2)
    by_key = {
        key: row for batch in again for key, row in zip(batch.keys, batch.images, strict=True)
    }
    common = [
        (row, by_key[key])
        for batch in batches
        for key, row in zip(batch.keys, batch.images, strict=True)
        if key in by_key
    ]
    assert common and all(torch.equal(*pair) for pair in common)
    assert all(
        same(a, b) for a, b in zip(take(loader(folder, 10, **changes), 4), batches, strict=True)
    )
