"""Broken samples and damaged shards: skipped, counted by reason, and never too many."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path

import pytest
from tiny_shards import good, loader, options, picture, take, write, write_tar

from gradcache_clip.train.data import ImageCaptionLoader, read_all
from gradcache_clip.train.data.broken import BrokenReport, BrokenTally


def broken_members() -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for i in range(30):
        members |= good(f"good{i}")
    members |= {"a.png": picture()}
    members |= {"b.png": picture(), "b.txt": b" \n"}
    members |= {"c.png": picture(), "c.txt": b"\xff\xfe\xff"}
    members |= {"d.png": picture()[:45], "d.txt": b"cut short"}
    members |= {"e.txt": b"no image"}
    members |= {"f.png": picture(), "f.json": b"{", "f.txt": b"f"}
    members |= {"g.png": picture(), "g.json": b"[" * 100_000, "g.txt": b"g"}
    members |= {"h.png": picture(kind="GIF"), "h.txt": b"another format"}
    members |= {"i.png": picture(), "i.json": b'{"captions": [1]}'}
    members |= {"j.png": picture(), "j.json": b"[1]"}
    members |= {"k.png": b"", "k.txt": b"empty"}
    members |= {"l.png": picture(), "l.json": b'{"captions": ["\\ud800"]}'}
    members |= {"m.png": picture(), "m.txt": b"m", "m.json": b'{"group": "\\ud800"}'}
    return members


REASONS = {
    "missing caption": 1,
    "empty caption": 1,
    "bad utf-8": 3,
    "undecodable image": 3,
    "missing image": 1,
    "bad json": 4,
}


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_counted_by_reason(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "a.tar", broken_members())
    stream = loader(tmp_path, 8, workers=workers, max_broken_share=0.5)
    with caplog.at_level(logging.WARNING):
        batches = take(stream, 40)
    assert {key for batch in batches for key in batch.keys} == {f"good{i}" for i in range(30)}
    assert all(len({*batch.keys}) == 8 for batch in batches)
    assert stream.broken.counts.keys() == REASONS.keys()
    assert stream.broken.seen == 8 * 40 + stream.broken.total
    example = next(e for e in stream.broken.examples if e.key == "d")
    assert example.reason == "undecodable image" and example.shard.endswith("a.tar")
    assert len(caplog.records) == 5
    assert "a.tar, sample" in caplog.text


def test_too_many_broken_samples_end_an_epoch(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", broken_members())
    stream = iter(loader(tmp_path, 8, max_broken_share=0.1))
    with pytest.raises(ValueError, match=r"at most 10.0% .* of .*a\.tar, sample .*repair"):
        # An epoch has five batches.
        for _ in range(6):
            next(stream)


def test_read_all_counts_the_same(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", broken_members())
    assert len(list(read_all(tmp_path, options=options(max_broken_share=0.5)))) == 30
    with pytest.raises(ValueError, match=r"got 13 of 43 .*'missing caption': 1.*sample a\); re"):
        list(read_all(tmp_path, options=options(max_broken_share=0.25)))


def test_the_share_is_not_judged_by_a_few_samples() -> None:
    tally = BrokenTally()
    tally.add(199, [BrokenReport("undecodable image", "s", "k", 100)])
    tally.check(0.05)
    tally.add(1)
    with pytest.raises(ValueError, match="got 100 of 200"):
        tally.check(0.05)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("manifest", [True, False])
# A sample takes 3 headers and 3 blocks of 512 bytes: cuts within data, within a header, after a
# sample, and after an image.
@pytest.mark.parametrize(
    ("size", "whole"), [(700, 50), (300, 49), (0, 49), (1024, 50), (1024 + 512 + 100, 50)]
)
def test_a_truncated_shard_gives_its_whole_samples(
    tmp_path: Path, manifest: bool, size: int, whole: int
) -> None:
    write(tmp_path, 60, shard_size=30)
    cut(tmp_path / "shard-000001.tar", 20 * 3072 + size)
    if not manifest:
        (tmp_path / "manifest.json").unlink()
    lost = 60 - whole if manifest else 1
    with pytest.raises(ValueError, match=rf"got {lost} of .*shard-000001\.tar, sample k00(49|50)"):
        loader(tmp_path, whole, max_broken_share=0)
    stream = loader(tmp_path, whole, max_broken_share=0.3)
    # Found once, by the index, and not again in each epoch.
    for batch in take(stream, 3):
        assert sorted(batch.keys) == [f"k{i:04d}" for i in range(whole)]
    assert stream.broken.counts == {"truncated tar": lost} and stream.broken.seen == 3 * whole
    state = stream.state_dict()
    resumed = loader(tmp_path, whole, max_broken_share=0.3)
    resumed.load_state_dict(state)
    assert resumed.broken.counts == {"truncated tar": lost}


def test_a_manifest_tells_of_samples_that_are_gone(tmp_path: Path) -> None:
    write(tmp_path, 10)
    write_tar(tmp_path / "shard-000000.tar", good("k"))
    with pytest.raises(ValueError, match=r"\{'missing sample': 9\}"):
        list(read_all(tmp_path, options=options()))


def test_a_shard_of_noise_and_an_empty_one_are_broken(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {k: v for i in range(9) for k, v in good(f"k{i}").items()})
    (tmp_path / "b.tar").write_bytes(b"\x07 noise" * 500)
    (tmp_path / "c.tar").write_bytes(b"")
    stream = loader(tmp_path, 3, max_broken_share=0.9)
    take(stream, 4)
    assert stream.broken.counts == {"truncated tar": 2}


def test_the_first_rank_alone_counts_what_is_lost(tmp_path: Path) -> None:
    write(tmp_path, 60)
    cut(tmp_path / "shard-000001.tar", 10_000)
    counts = [
        ImageCaptionLoader(
            tmp_path, 4, options=options(max_broken_share=0.5), rank=rank, world_size=2
        ).broken.counts
        for rank in range(2)
    ]
    assert counts == [{"truncated tar": 17}, {}]


def test_damage_inside_a_shard_is_not_taken_for_its_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", good("a") | good("b") | good("c"))
    data = bytearray(path.read_bytes())
    data[2048 : 2048 + 512] = b"\x99" * 512
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="'truncated tar': 1"):
        list(read_all(path, options=options()))


def test_duplicate_members_are_reported(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("a.txt", b"a"), ("a.txt", b"b"), ("a.png", picture())):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    read = list(read_all(tmp_path, options=options(max_broken_share=0.5)))
    assert [s.captions for s in read] == [("a",)]


def test_substitutes_of_a_small_set_differ_between_ranks(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(26):
        members |= good(f"k{i}")
    for i in range(0, 26, 5):
        members[f"k{i}.png"] = b"damaged"
    write_tar(tmp_path / "a.tar", members)
    settings = options(max_broken_share=0.5)
    ranks = [
        ImageCaptionLoader(tmp_path, 10, options=settings, rank=r, world_size=2) for r in (0, 1)
    ]
    for first, second in zip(*(take(rank, 6) for rank in ranks), strict=True):
        assert len({*first.keys, *second.keys}) == 20
