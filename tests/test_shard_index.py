"""The index of a tar file: right, kept beside the file, trusted in nothing, rebuilt when stale."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_shards import good, picture, write, write_tar

from gradcache_clip.train.data import shard_index
from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.shard_index import IndexedShards, can_be_indexed
from gradcache_clip.train.data.shard_urls import Shard, find_shards


def samples_of(source: Path) -> IndexedShards:
    return IndexedShards(find_shards(source))


def keys(samples: IndexedShards) -> list[str]:
    return [samples.read(number)["__key__"] for number in range(len(samples))]


def test_samples_are_read_by_number(tmp_path: Path) -> None:
    samples = samples_of(write(tmp_path, 67))
    assert len(samples) == 67 and not samples.lost
    for number in (66, 0, 40, 19, 20):
        sample = samples.read(number)
        assert sample["__key__"] == f"k{number:04d}" and sample["txt"] == f"c{number}".encode()
        assert sample["png"] == picture((number, 0, 9))
        assert sample["__url__"] == str(tmp_path / f"shard-{number // 20:06d}.tar")


def test_an_index_is_kept_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, 30)
    before = keys(samples_of(folder))
    assert len([*folder.glob("*.tar.index")]) == 2 and not [*folder.glob("*.partial")]
    monkeypatch.setattr(shard_index, "tar_samples", None)
    assert keys(samples_of(folder)) == before


def test_an_index_of_another_file_is_made_anew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", good("a") | good("b"))
    assert len(samples_of(path)) == 2
    write_tar(path, good("c"))
    assert keys(samples_of(path)) == ["c"]
    # The same size at another time.
    write_tar(path, good("d"))
    os.utime(path, ns=(1, 1))
    assert keys(samples_of(path)) == ["d"]


def _set(name, place, value):
    def change(columns):
        columns[name][place] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("offset", 0, -1),
        _set("offset", 1, 2**62),
        _set("size", 0, 2**32 - 1),
        _set("size", 2, 2**27),
        _set("extension", 0, 99),
        _set("members", 0, 0),
        _set("members", 0, 2**62),
        _set("members", -1, 3),
        _set("names_end", 0, -5),
        _set("names_end", -1, 3),
        lambda columns: columns.pop("names"),
        lambda columns: columns.update(size=columns["size"].astype(np.int64)),
        lambda columns: columns.update(offset=columns["offset"][None]),
        lambda columns: columns.update(offset=columns["offset"][:-1]),
        lambda columns: columns.update(names_end=columns["names_end"][:-1]),
    ],
)
def test_a_forged_index_is_made_anew(tmp_path: Path, change) -> None:
    path = write_tar(tmp_path / "a.tar", good("a") | good("b"))
    samples_of(path)
    kept = tmp_path / "a.tar.index"
    with shard_index_file(kept) as metadata:
        columns = {name: column.copy() for name, column in load_file(kept).items()}
    change(columns)
    save_file(columns, kept, metadata)
    samples = samples_of(path)
    assert keys(samples) == ["a", "b"] and samples.read(1)["txt"] == b"caption of b"


class shard_index_file:
    """The metadata of an index."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file = safe_open(path, framework="numpy")

    def __enter__(self) -> dict[str, str]:
        return self._file.__enter__().metadata()

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)


@pytest.mark.parametrize("content", [b"", b"noise" * 100, b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}"])
def test_what_is_no_index_is_made_anew(tmp_path: Path, content: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", good("a"))
    (tmp_path / "a.tar.index").write_bytes(content)
    assert keys(samples_of(path)) == ["a"]


@pytest.mark.parametrize("reports", ["[", "[1]", '[["a", "b", -1]]', "[" * 100_000, "{}"])
def test_forged_reports_are_made_anew(tmp_path: Path, reports: str) -> None:
    path = write_tar(tmp_path / "a.tar", good("a"))
    samples_of(path)
    kept = tmp_path / "a.tar.index"
    with shard_index_file(kept) as metadata:
        columns = load_file(kept)
    save_file(columns, kept, {**metadata, "reports": reports})
    assert not samples_of(path).lost


def test_a_link_in_the_place_of_an_index_is_not_followed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", good("a"))
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "a.tar.index").symlink_to(precious)
    assert keys(samples_of(path)) == ["a"]
    assert precious.read_text() == "precious"
    # Nor is a pipe waited for.
    (tmp_path / "a.tar.index").unlink()
    os.mkfifo(tmp_path / "a.tar.index")
    assert keys(samples_of(path)) == ["a"]


def test_a_folder_that_cannot_be_written_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "a.tar", good("a"))

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "replace", full)
    assert keys(samples_of(path)) == ["a"]
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a.tar"]


def test_a_file_that_was_cut_later_is_a_broken_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", good("a") | good("b"))
    samples = samples_of(path)
    path.write_bytes(path.read_bytes()[:1100])
    assert samples.read(1) == BrokenReport("truncated tar", str(path), "b")


def test_few_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_index, "_MAX_OPEN_FILES", 3)
    samples = samples_of(write(tmp_path, 40, shard_size=4))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert keys(samples) == [f"k{number:04d}" for number in range(40)]
    assert len(os.listdir("/proc/self/fd")) == before + 3  # noqa: PTH208
    del samples
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_other_ranks_find_the_same(tmp_path: Path) -> None:
    shards = find_shards(write(tmp_path, 50, shard_size=7))
    found = [keys(IndexedShards(shards, rank=rank, world_size=3)) for rank in range(3)]
    assert found[0] == found[1] == found[2] == [f"k{number:04d}" for number in range(50)]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_files_are_known_by_their_content(tmp_path: Path, mode: str) -> None:
    assert not can_be_indexed(Shard(str(write_tar(tmp_path / "a.tar", good("a"), mode))))
    assert can_be_indexed(Shard(str(write_tar(tmp_path / "b.tar", good("a")))))
    assert not can_be_indexed(Shard("https://localhost/a.tar"))


def lost(path: Path) -> dict[str, tuple[str, int]]:
    return {report.reason: (report.key, report.count) for report in samples_of(path).lost}


def test_keys_with_dots_do_not_vanish_uncounted(tmp_path: Path) -> None:
    members = {"v1.2.png": picture(), "v1.2.txt": b"a", "v1.3.png": picture(), "v1.3.txt": b"b"}
    # A second picture of a sample is none of its own.
    more = good("a") | {"a.mask.png": picture()}
    path = write_tar(tmp_path / "a.tar", more | members)
    assert keys(samples_of(path)) == ["a"]
    assert lost(path) == {"key with a dot": ("v1.2", 2)}


def test_names_that_are_not_utf8_are_counted(tmp_path: Path) -> None:
    old = tarfile.GNU_FORMAT
    with tarfile.open(tmp_path / "a.tar", "w", format=old, encoding="latin-1") as archive:
        for name, data in {**good("café"), **good("b")}.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    assert keys(samples_of(tmp_path / "a.tar")) == ["b"]
    assert lost(tmp_path / "a.tar") == {"name is not utf-8": ("caf\\udce9", 1)}
    # UTF-8 is fine, and so are long names.
    long = "é" * 200
    path = write_tar(tmp_path / "b.tar", good("café") | good(long))
    assert keys(samples_of(path)) == ["café", long] and keys(samples_of(path)) == ["café", long]


def test_large_and_sparse_members_take_their_sample_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradcache_clip.train.data import tar_samples

    monkeypatch.setattr(tar_samples, "MAX_MEMBER_BYTES", 1000)
    path = write_tar(tmp_path / "a.tar", {"a.png": b"x" * 1001, "a.txt": b"a"} | good("b"))
    assert keys(samples_of(path)) == ["b"]
    assert lost(path) == {"member too large": ("a", 1)}
    sparse = bytearray(512 * 4)
    header = tarfile.TarInfo("c.png")
    header.size, header.type = 512, tarfile.GNUTYPE_SPARSE
    sparse[:512] = header.tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "b.tar"
    path.write_bytes(bytes(sparse[:1024]) + write_tar(tmp_path / "d.tar", good("d")).read_bytes())
    assert keys(samples_of(path)) == ["d"]
    assert lost(path) == {"sparse member": ("c", 1)}
