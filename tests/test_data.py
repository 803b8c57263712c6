"""The training pipeline: order, splitting, resuming, and broken samples."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_shards import good, loader, options, same, take, write, write_tar

from gradcache_clip.train.data import decode
from gradcache_clip.train.data.loader import ImageCaptionLoader, join_states, read_all
from gradcache_clip.train.data.position import Lanes
from gradcache_clip.train.data.shard_urls import find_shards
from gradcache_clip.train.data.stream import StreamPlan, raw_stream

# Three workers are tested on machines of two cores and fewer, where torch advises against them.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """67 samples in shards of 20."""
    return write(tmp_path_factory.mktemp("shards"), 67)


@pytest.fixture(scope="module")
def partly_broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 25, 5 and 30 samples of which every fifth has no image that decodes."""
    folder = tmp_path_factory.mktemp("broken")
    number = itertools.count()
    for shard, size in enumerate((25, 5, 30)):
        members: dict[str, bytes] = {}
        for i in itertools.islice(number, size):
            members |= good(f"k{i}")
            if i % 5 == 2:
                members[f"k{i}.png"] = b"damaged"
        write_tar(folder / f"part-{shard}.tar", members)
    return folder


def test_batches_hold_matching_rows(folder: Path) -> None:
    batch = take(loader(folder), 1)[0]
    assert batch.images.shape == (10, 3, 8, 8) and batch.images.dtype == torch.uint8
    assert len(batch) == 10
    for row, key in enumerate(batch.keys):
        i = int(key[1:])
        assert batch.captions[row] in (f"c{i}", f"d{i}") and batch.groups[row] == f"g{i}"
        assert batch.images[row, :, 0, 0].tolist() == [i % 256, i // 256, 9]


def test_order_is_a_function_of_seed_and_epoch(folder: Path) -> None:
    first, again = (take(loader(folder), 12) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    other = take(loader(folder, seed=1), 6)
    keys = [[k for batch in part for k in batch.keys] for part in (first[:6], first[6:], other)]
    assert len({tuple(k) for k in keys}) == 3
    # 67 samples give 6 whole batches an epoch, without repetition.
    assert all(len(set(k)) == 60 for k in keys)
    assert keys[0] != sorted(keys[0])


def test_each_caption_is_drawn_in_time(folder: Path) -> None:
    batches = take(loader(folder), 48)
    assert {caption[0] for caption in batches[0].captions} == {"c", "d"}
    assert len({caption for batch in batches for caption in batch.captions}) > 1.8 * 67


def test_no_worker_equals_one_worker(folder: Path) -> None:
    alone, one = (take(loader(folder, workers=w), 8) for w in (0, 1))
    assert all(same(a, b) for a, b in zip(alone, one, strict=True))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_resuming_anywhere_equals_never_stopping(partly_broken: Path, workers: int) -> None:
    # 48 good samples in batches of 7: epochs end with leftovers, groups with holes.
    changes = {"workers": workers, "crop_scale": (0.5, 1.0), "max_broken_share": 0.3}
    whole = loader(partly_broken, 7, **changes)
    batches, states = [], [whole.state_dict()]
    for batch in itertools.islice(whole, 15):
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.state_dict())))
    for stop in (0, 1, 5, 6, 7, 11, 13) if workers < 2 else (2, 5, 6, 9):
        resumed = loader(partly_broken, 7, **changes)
        resumed.load_state_dict(states[stop])
        assert resumed.state_dict() == states[stop]
        for offset, batch in enumerate(take(resumed, 2)):
            assert same(batch, batches[stop + offset]), (stop, offset)
        assert resumed.state_dict() == states[stop + 2]


def test_state_describes_received_batches_not_prefetched_ones(folder: Path) -> None:
    stream = loader(folder, workers=1)
    iterator = iter(stream)
    next(iterator)
    # The worker has had two groups of four more asked of it by now.
    (taken,) = stream.state_dict()["taken"]
    assert (taken["groups"], taken["row"]) == (2, 2)
    assert stream.epoch == 0


def test_resuming_skips_without_decoding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = loader(folder)
    take(stream, 5)
    calls = Counter[str]()
    plain = decode.decode_image

    def counted(data: bytes, *, smallest_side: int | None = None) -> Image.Image:
        calls["decoded"] += 1
        return plain(data, smallest_side=smallest_side)

    monkeypatch.setattr(decode, "decode_image", counted)
    resumed = loader(folder)
    resumed.load_state_dict(stream.state_dict())
    take(resumed, 1)
    assert calls["decoded"] == 12


def test_the_batch_size_may_change_on_resuming(folder: Path) -> None:
    stream = loader(folder, 10)
    take(stream, 3)
    resumed = loader(folder, 5)
    resumed.load_state_dict(stream.state_dict())
    keys = [key for batch in take(resumed, 2) for key in batch.keys]
    assert keys == next(iter(stream)).keys


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"shuffle_buffer": 2}, "shuffle_buffer"),
        ({"group_size": 8}, "group_size"),
    ],
)
def test_a_state_of_another_stream_is_refused(
    folder: Path, changes: dict[str, object], name: str
) -> None:
    state = loader(folder).state_dict()
    with pytest.raises(ValueError, match=f"^{name}: expected .* as in the saved state"):
        loader(folder, **changes).load_state_dict(state)
    with pytest.raises(ValueError, match="loader state of format 2, got 7"):
        loader(folder).load_state_dict({"format": 7})


def test_a_state_of_other_shards_is_refused_and_of_moved_ones_taken(
    folder: Path, tmp_path: Path
) -> None:
    state = loader(folder).state_dict()
    loader(write(tmp_path / "same", 67)).load_state_dict(state)
    with pytest.raises(ValueError, match="^shards: expected"):
        loader(write(tmp_path / "other", 68)).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generator_alone(folder: Path, workers: int) -> None:
    before = torch.get_rng_state()
    take(loader(folder, workers=workers), 7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shard_size", [3, 20])
@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (3, 1), (2, 2), (5, 0)])
def test_ranks_and_workers_share_an_epoch_out_exactly(
    tmp_path: Path, world_size: int, workers: int, shard_size: int
) -> None:
    folder = write(tmp_path, 67, shard_size)
    keys: list[str] = []
    for rank in range(world_size):
        stream = ImageCaptionLoader(
            folder, 1, options=options(workers=workers), rank=rank, world_size=world_size
        )
        for batch in stream:
            if stream.epoch == 1:
                break
            keys += batch.keys
    assert sorted(keys) == [f"k{i:04d}" for i in range(67)]


def rest_of_epoch(folder: Path, world_size: int, workers: int, state: dict) -> list[str]:
    """The samples that all ranks together read of the epoch of a state from there on."""
    keys: list[str] = []
    changes = options(workers=workers, max_broken_share=1.0)
    for rank in range(world_size):
        stream = ImageCaptionLoader(folder, 1, options=changes, rank=rank, world_size=world_size)
        stream.load_state_dict(state)
        for batch in stream:
            if stream.epoch > state["epoch"]["number"]:
                break
            keys += batch.keys
    return keys


def some_batches(
    folder: Path, world_size: int, workers: int, count: int, state: dict | None = None
) -> tuple[list[str], dict]:
    """The samples of some batches of three of every rank, and the state after them."""
    keys, states = [], []
    changes = options(workers=workers, max_broken_share=1.0)
    for rank in range(world_size):
        stream = ImageCaptionLoader(folder, 3, options=changes, rank=rank, world_size=world_size)
        if state is not None:
            stream.load_state_dict(state)
        keys += [key for batch in take(stream, count) for key in batch.keys]
        states.append(stream.state_dict())
    return keys, json.loads(json.dumps(join_states(states)))


@pytest.mark.parametrize("workers", [(0, 0), (0, 2), (3, 1)])
@pytest.mark.parametrize("worlds", [(2, 1), (2, 4), (4, 2), (1, 3), (3, 3)])
def test_other_ranks_and_workers_read_what_is_left_of_an_epoch(
    partly_broken: Path, worlds: tuple[int, int], workers: tuple[int, int]
) -> None:
    before, state = some_batches(partly_broken, worlds[0], workers[0], 2)
    after = rest_of_epoch(partly_broken, worlds[1], workers[1], state)
    assert len(before) == 6 * worlds[0]
    assert sorted(before + after) == sorted(f"k{i}" for i in range(60) if i % 5 != 2)


def test_an_epoch_may_change_hands_again_and_again(partly_broken: Path) -> None:
    read, state = some_batches(partly_broken, 3, 0, 1)
    for world_size in (2, 4, 1):
        more, state = some_batches(partly_broken, world_size, 0, 1, state)
        read += more
    read += rest_of_epoch(partly_broken, 3, 0, state)
    assert sorted(read) == sorted(f"k{i}" for i in range(60) if i % 5 != 2)


def test_an_epoch_ends_for_all_ranks_together(folder: Path) -> None:
    # The other rank has no batch left when this one, which has, asks for its fourth.
    answers = iter([True, True, True, False, True])
    stream = ImageCaptionLoader(
        folder, 5, options=options(), world_size=2, on_every_rank=lambda _: next(answers)
    )
    assert [stream.epoch for _ in itertools.islice(stream, 4)] == [0, 0, 0, 1]


def test_the_lanes_of_ranks_are_those_of_workers(tmp_path: Path) -> None:
    folder = write(tmp_path, 67, shard_size=67)
    groups = [take(loader(folder, 4, workers=2), 8)]
    groups += [
        take(ImageCaptionLoader(folder, 4, options=options(), rank=rank, world_size=2), 4)
        for rank in (0, 1)
    ]
    together, *apart = [[batch.keys for batch in each] for each in groups]
    assert together[0::2] == apart[0] and together[1::2] == apart[1]


def test_the_state_of_one_rank_is_not_that_of_all(folder: Path) -> None:
    stream = ImageCaptionLoader(folder, 5, options=options(), world_size=2)
    with pytest.raises(ValueError, match=r"expected that of all 2 ranks, got that of 1; gather"):
        stream.load_state_dict(stream.state_dict())


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_few_shards_are_shared_out_evenly(folder: Path, workers: int) -> None:
    # Straight from the stream: processes would add nothing but time.
    plan, lanes = StreamPlan(find_shards(folder), options(), 0, 3), Lanes(3, workers)
    counts = [0, 0, 0]
    for lane in range(lanes.count):
        counts[lane % 3] += len(list(raw_stream(plan, 0, lanes, lane)))
    assert sum(counts) == 67 and max(counts) - min(counts) <= workers


def test_read_all_keeps_order_captions_and_the_rest(folder: Path) -> None:
    read = list(read_all(folder, options=options()))
    assert [sample.key for sample in read] == [f"k{i:04d}" for i in range(67)]
    assert read[66].captions == ("c66", "d66") and read[66].group == "g66"
    assert read[3].image.shape == (3, 8, 8)


def test_fewer_samples_than_a_batch_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"got 67 samples in .* with batch_size=68; lower"):
        loader(folder, 68)
    with pytest.raises(ValueError, match="samples for each of 2 ranks"):
        ImageCaptionLoader(folder, 40, options=options(), rank=1, world_size=2)


def test_fewer_samples_than_a_batch_without_a_manifest(folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "without"
    shutil.copytree(folder, shards)
    (shards / "manifest.json").unlink()
    stream = loader(shards, 68)
    with pytest.raises(ValueError, match=r"got 67 samples in .* with batch_size=68; lower"):
        take(stream, 1)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"image_size": 0}, "image_size"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale"),
        ({"workers": -1}, "workers"),
        ({"shuffle_buffer": -1}, "shuffle_buffer"),
        ({"group_size": 0}, "group_size"),
        ({"max_broken_share": 1.5}, "max_broken_share"),
    ],
)
def test_unfit_options_are_refused(changes: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        options(**changes)


def test_unfit_loader_arguments_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_size: expected a positive integer, got 0"):
        ImageCaptionLoader(folder, 0)
    with pytest.raises(ValueError, match="rank: expected 0 <= rank < world_size"):
        ImageCaptionLoader(folder, 4, rank=2, world_size=2)
