"""Shards that can only be streamed: shuffled, shared out, and resumed by epoch and shard."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_shards import good, loader, options, picture, same, take, write, write_tar, zipped

from gradcache_clip.train.data import (
    ImageCaptionLoader,
    join_states,
    read_all,
    read_captions,
    streamed,
    tar_samples,
)
from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.shard_index import IndexedShards
from gradcache_clip.train.data.shard_urls import Shard
from gradcache_clip.train.data.streamed import Turns, read_shard

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


def zeros(count: int) -> bytes:
    """A tar file of members that nobody wants, of 1 MiB each."""
    header = tarfile.TarInfo("a.bin")
    header.size = 2**20
    return (header.tobuf() + bytes(2**20)) * count


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_bomb_is_unpacked_a_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Any
) -> None:
    """Each file in turn, and no more than is allowed to lie between two samples."""
    monkeypatch.setattr(tar_samples, "MAX_PASSED_BYTES", 8 * 2**20)
    whole = write_tar(tmp_path / "a.tar", good("a") | good("b")).read_bytes()
    samples = whole[: 8 * 512]
    (tmp_path / "a.tar").write_bytes(pack(samples + zeros(40) + whole))
    tracemalloc.start()
    first, second = read_shard(Shard(str(tmp_path / "a.tar")), ())
    # The window of xz alone has 8 MiB.
    assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    tracemalloc.stop()
    assert isinstance(first, dict) and first["__key__"] == "a"
    assert isinstance(second, BrokenReport)
    # What the rest may have belonged to is lost with it.
    assert (second.reason, second.key) == ("too many bytes without a sample", "b")
    # Some other members are no matter.
    (tmp_path / "b.tar").write_bytes(pack(samples + zeros(4) + whole))
    found = [*read_shard(Shard(str(tmp_path / "b.tar")), ())]
    assert [each["__key__"] for each in found if isinstance(each, dict)] == ["a", "b", "a", "b"]


def test_compressed_files_in_a_row_are_one(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", good("a") | good("b")).read_bytes()
    parts = whole[:1000], whole[1000:]
    (tmp_path / "a.tar").write_bytes(b"".join(map(gzip.compress, parts)))
    assert [sample.key for sample in read_all(tmp_path, options=options())] == ["a", "b"]


def test_other_compression_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"\x28\xb5\x2f\xfd noise")
    write_tar(tmp_path / "b.tar", good("b"))
    read = read_all(tmp_path, options=options(max_broken_share=0.4))
    with pytest.raises(ValueError, match=r"'unsupported compression': 1\}; the first: .*a\.tar"):
        list(read)


def test_the_buffer_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members: dict[str, bytes] = {}
    for i in range(30):
        members |= good(f"k{i}") | {f"k{i}.json": b" " * 10_000 + b"{}"}
    path = write_tar(tmp_path / "a.tar.gz", members, "w:gz")
    held = []
    leaving = streamed._Buffer._leaving

    def noted(self: Any) -> Any:
        held.append(self._bytes)
        return leaving(self)

    monkeypatch.setattr(streamed._Buffer, "_leaving", noted)
    monkeypatch.setattr(streamed, "MAX_BUFFER_BYTES", 50_000)
    batches = take(loader(path, 10, shuffle_buffer=1000), 3)
    assert sorted(keys(batches)) == sorted(f"k{i}" for i in range(30))
    assert keys(batches) != [f"k{i}" for i in range(30)]
    assert 40_000 < max(held) < 70_000


def test_large_samples_take_no_other_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_samples, "MAX_MEMBER_BYTES", 3000)
    monkeypatch.setattr(tar_samples, "MAX_TEXT_BYTES", 2000)
    large = {"b.png": picture(), "b.txt": b"x" * 2001}
    several = {f"c.{kind}": b"x" * 1500 for kind in ("txt", "json", "png")}
    path = write_tar(tmp_path / "a.tar", good("a") | large | several | good("d"))
    for read in (read_shard(Shard(str(path)), ()), samples_and_reports(path)):
        found = [*read]
        assert [each["__key__"] for each in found if isinstance(each, dict)] == ["a", "d"]
        reports = {each.reason: each.key for each in found if isinstance(each, BrokenReport)}
        assert reports == {"member too large": "b", "sample too large": "c"}


def samples_and_reports(path: Path) -> list[Any]:
    samples = IndexedShards([Shard(str(path))])
    return [*map(samples.read, range(len(samples))), *samples.lost]
