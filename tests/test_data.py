"""The training pipeline: order, ranks and workers, resuming, and broken samples."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_shards import good, loader, options, same, take, write, write_tar

from gradcache_clip.train.data import Batch, ImageCaptionLoader, join_states, read_all
from gradcache_clip.train.data.samples import ImageRows

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


def global_batches(
    folder: Path, world_size: int, workers: int, count: int, state: dict | None = None
) -> tuple[list[Batch], dict]:
    """Batches of 12 rows, put together from those of all ranks, and the state after them."""
    parts, states = [], []
    changes = options(workers=workers, crop_scale=(0.5, 1.0), max_broken_share=1.0)
    for rank in range(world_size):
        stream = ImageCaptionLoader(
            folder, 12 // world_size, options=changes, rank=rank, world_size=world_size
        )
        if state is not None:
            stream.load_state_dict(state)
        parts.append(take(stream, count))
        states.append(stream.state_dict())
    batches = [
        Batch(
            torch.cat([part.images for part in of_ranks]),
            *(
                [entry for part in of_ranks for entry in getattr(part, name)]
                for name in ("captions", "keys", "groups")
            ),
        )
        for of_ranks in zip(*parts, strict=True)
    ]
    return batches, json.loads(json.dumps(join_states(states)))


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


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 3), (2, 0), (3, 1), (4, 2)])
def test_ranks_and_workers_change_no_batch(
    partly_broken: Path, world_size: int, workers: int
) -> None:
    # 60 samples in batches of 12: the seventh is of the second epoch.
    expected, state = global_batches(partly_broken, 1, 0, 7)
    got, other_state = global_batches(partly_broken, world_size, workers, 7)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    assert state == other_state


@pytest.mark.parametrize("piece", [1, 5, 7])
def test_the_size_of_pieces_changes_no_batch(
    folder: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = take(loader(folder), 8)
    monkeypatch.setattr("gradcache_clip.train.data.indexed.MIN_PIECE_ROWS", piece)
    assert all(same(a, b) for a, b in zip(take(loader(folder), 8), expected, strict=True))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resuming_anywhere_equals_never_stopping(partly_broken: Path, workers: int) -> None:
    changes = {"workers": workers, "crop_scale": (0.5, 1.0), "max_broken_share": 0.3}
    whole = loader(partly_broken, 7, **changes)
    batches, states = [], [whole.state_dict()]
    for batch in itertools.islice(whole, 19):
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.state_dict())))
    for stop in (0, 1, 5, 7, 8, 9, 16, 17) if workers < 2 else (2, 8):
        resumed = loader(partly_broken, 7, **changes)
        resumed.load_state_dict(states[stop])
        assert resumed.state_dict() == states[stop]
        for offset, batch in enumerate(take(resumed, 2)):
            assert same(batch, batches[stop + offset]), (stop, offset)
        assert resumed.state_dict() == states[stop + 2]


@pytest.mark.parametrize("workers", [(0, 2), (3, 1)])
@pytest.mark.parametrize("worlds", [(2, 1), (2, 4), (4, 2), (1, 3), (3, 3)])
def test_other_ranks_and_workers_go_on_with_the_same_batches(
    partly_broken: Path, worlds: tuple[int, int], workers: tuple[int, int]
) -> None:
    whole, end = global_batches(partly_broken, 1, 0, 8)
    before, state = global_batches(partly_broken, worlds[0], workers[0], 3)
    after, last = global_batches(partly_broken, worlds[1], workers[1], 5, state)
    assert all(same(a, b) for a, b in zip([*before, *after], whole, strict=True))
    assert last == end


def test_a_run_may_change_hands_again_and_again(partly_broken: Path) -> None:
    whole, end = global_batches(partly_broken, 1, 0, 8)
    read, state = global_batches(partly_broken, 3, 0, 2)
    for world_size in (2, 4, 1):
        more, state = global_batches(partly_broken, world_size, 0, 2, state)
        read += more
    assert all(same(a, b) for a, b in zip(read, whole, strict=True)) and state == end


def test_a_broken_sample_is_replaced_by_one_that_is_not_in_the_batch(partly_broken: Path) -> None:
    batches, state = global_batches(partly_broken, 1, 0, 20)
    for batch in batches:
        assert len({*batch.keys}) == 12
        assert all(int(key[1:]) % 5 != 2 for key in batch.keys)
    tally = state["tally"]
    assert tally["seen"] == 240 + sum(tally["broken"].values())
    # Each epoch draws all 12 that are broken, and a substitute may be broken as well.
    assert tally["broken"]["undecodable image"] >= 48


def test_if_all_are_broken_it_ends(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"k{i}.png": b"damaged" for i in range(500)})
    with pytest.raises(ValueError, match="max_broken_share: expected at most 5.0%"):
        take(loader(tmp_path, 2), 1)
    with pytest.raises(ValueError, match="expected a sample that can be read for every row"):
        take(loader(tmp_path, 2, max_broken_share=1.0), 1)


def test_a_set_of_one_batch_has_nothing_to_replace_with(tmp_path: Path) -> None:
    members = {key: data for i in range(9) for key, data in good(f"k{i}").items()}
    write_tar(tmp_path / "a.tar", {**members, "bad.png": b"damaged", "bad.txt": b"bad"})
    assert len(take(loader(tmp_path, 9, max_broken_share=0.5), 3)) == 3
    with pytest.raises(ValueError, match="batch_size: expected a sample .* sample bad; lower"):
        take(loader(tmp_path, 10, max_broken_share=0.5), 1)


def test_state_describes_received_batches_not_prefetched_ones(folder: Path) -> None:
    stream = loader(folder, workers=1)
    iterator = iter(stream)
    assert stream.state_dict()["position"] == {"step": 0}
    next(iterator)
    assert stream.state_dict()["position"] == {"step": 1} and stream.epoch == 0
    assert stream.broken.seen == 10


def test_the_epoch_is_that_of_the_last_batch(folder: Path) -> None:
    stream = loader(folder)
    assert [stream.epoch for _ in itertools.islice(stream, 13)] == [0] * 6 + [1] * 6 + [2]


def test_an_iterator_that_is_closed_leaves_no_worker(folder: Path) -> None:
    stream = iter(loader(folder, workers=2))
    next(stream)
    assert len(torch.multiprocessing.active_children()) == 2
    stream.close()
    assert not torch.multiprocessing.active_children()


KILLED = """
import os, signal, sys, torch
from gradcache_clip.train.data import ImageCaptionLoader, LoaderOptions
if sys.argv[2] == "interrupt":
    os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
stream = iter(ImageCaptionLoader(sys.argv[1], 10, options=LoaderOptions(workers=2, image_size=8)))
next(stream)
if sys.argv[2] == "kill":
    torch.multiprocessing.active_children()[0].kill()
    while True:
        next(stream)
"""
INTERRUPTED_AT_THE_END = """
import os, signal, sys, torch
from gradcache_clip.train.data import ImageCaptionLoader, LoaderOptions

loaders = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
original, kept = loaders._shutdown_workers, []

def interrupted(self):
    if not self._shutdown:
        # As if it came when torch had noted this, and told no worker yet.
        self._shutdown = True
        kept.append(self)
        os.kill(os.getpid(), signal.SIGINT)
    original(self)

def read():
    options = LoaderOptions(workers=2, image_size=8)
    stream = iter(ImageCaptionLoader(sys.argv[1], 10, options=options))
    next(stream)
    loaders._shutdown_workers = interrupted
    try:
        stream.close()
    except KeyboardInterrupt:
        print("interrupted", flush=True)

process = torch.multiprocessing.get_context("fork").Process(target=read)
process.start()
process.join(10)
stuck = process.is_alive()
process.kill()
sys.exit(stuck)
"""


def test_a_worker_that_is_killed_ends_the_process(folder: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(folder)]
    done = subprocess.run([*command, "kill"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.search(r"ChildProcessError: data.workers: .* ended by SIGKILL\)", done.stderr)


def test_an_interrupt_while_workers_start_is_not_lost(folder: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(folder)]
    done = subprocess.run([*command, "interrupt"], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.endswith("\nKeyboardInterrupt\n") and "ignored" not in done.stderr


@pytest.mark.parametrize(
    ("script", "said"), [(KILLED, ""), (INTERRUPTED_AT_THE_END, "interrupted\n")]
)
def test_workers_do_not_outlive_a_script(folder: Path, script: str, said: str) -> None:
    command = [sys.executable, "-c", script, str(folder), "end"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, said), done.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_ends_the_loader(tmp_path: Path, workers: int) -> None:
    folder = write(tmp_path / "shards", 67)
    stream = iter(loader(folder, workers=workers))
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"shard-00000\d\.tar"):
        next(stream)
    assert not torch.multiprocessing.active_children()


def test_resuming_reads_nothing_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = loader(folder)
    take(stream, 5)
    calls = Counter[str]()
    read = ImageRows.read

    def counted(rows: ImageRows, number: int, epoch: int) -> object:
        calls["read"] += 1
        return read(rows, number, epoch)

    monkeypatch.setattr(ImageRows, "read", counted)
    resumed = loader(folder)
    resumed.load_state_dict(stream.state_dict())
    take(resumed, 1)
    assert calls["read"] == 10


def test_a_state_of_another_stream_is_refused(folder: Path) -> None:
    state = loader(folder).state_dict()
    for other, name in ((loader(folder, seed=1), "seed"), (loader(folder, 5), "batch_size")):
        with pytest.raises(ValueError, match=f"^{name}: expected .* as in the saved state"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="loader state of format 3, got 2; resume with the vers"):
        loader(folder).load_state_dict({"format": 2, "stream": {}, "world_size": 1, "taken": []})


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


def test_many_rows_need_few_file_handles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradcache_clip.train.data.indexed.MIN_PIECE_ROWS", 1)
    monkeypatch.setattr("gradcache_clip.train.data.indexed.MAX_PIECES", 4)
    stream = iter(loader(folder, 60, workers=1))
    next(stream)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(4):
        next(stream)
        assert len(os.listdir("/proc/self/fd")) <= before + 4  # noqa: PTH208


def test_read_all_keeps_order_captions_and_the_rest(folder: Path) -> None:
    read = list(read_all(folder, options=options()))
    assert [sample.key for sample in read] == [f"k{i:04d}" for i in range(67)]
    assert read[66].captions == ("c66", "d66") and read[66].group == "g66"
    assert read[3].image.shape == (3, 8, 8)


def test_fewer_samples_than_a_batch_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 67 samples in .* with batch_size=68; lower"):
        loader(folder, 68)
    with pytest.raises(ValueError, match="got 33 samples for each of 2 ranks"):
        ImageCaptionLoader(folder, 40, options=options(), rank=1, world_size=2)
    shards = tmp_path / "without"
    shutil.copytree(folder, shards)
    (shards / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"got 67 samples in .* with batch_size=68; lower"):
        loader(shards, 68)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"image_size": 0}, "image_size"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale"),
        ({"workers": -1}, "workers"),
        ({"shuffle_buffer": -1}, "shuffle_buffer"),
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
