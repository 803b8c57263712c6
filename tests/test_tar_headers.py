"""Headers of tar files that claim, repeat and lead astray: bounded, and read as they are meant."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tiny_shards import good, options, write_tar

from gradcache_clip.train.data import read_all
from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.shard_index import IndexedShards, can_be_indexed
from gradcache_clip.train.data.shard_urls import Shard
from gradcache_clip.train.data.streamed import read_shard


def read(path: Path, mode: str) -> tuple[list[dict[str, Any]], list[BrokenReport]]:
    """Samples and reports of a file, by its index or as a stream."""
    shard = Shard(str(path))
    if mode == "r:":
        index = IndexedShards([shard])
        found = [*map(index.read, range(len(index))), *index.lost]
    else:
        found = [*read_shard(shard, ())]
    reports = [each for each in found if isinstance(each, BrokenReport)]
    return [each for each in found if isinstance(each, dict)], reports


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def signed(block: bytes) -> bytes:
    """A header with the sum that makes it valid."""
    empty = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(empty) + block[156:]


def with_size(block: bytes, size: int) -> bytes:
    """A header with a size in base 256, which may be negative."""
    return signed(block[:124] + (size % 2**96).to_bytes(12, "big") + block[136:])


def pax(records: bytes) -> bytes:
    return header("x", len(records), tarfile.XHDTYPE) + records + bytes(-len(records) % 512)


LONG = header("long", 4, tarfile.GNUTYPE_LONGNAME) + b"name".ljust(512, b"\0")
SPARSE = header("b.png", 0, tarfile.GNUTYPE_SPARSE)
HOSTILE = {
    "a size of 2^62": header("b.png", 2**62),
    "a negative size": with_size(header("b.png", 0), -512),
    "a long name of negative size": with_size(header("b", 0, tarfile.GNUTYPE_LONGNAME), -512),
    "thousands of long names": LONG * 5000,
    "a pax header of 12 GB": header("x", 12 * 2**30, tarfile.XHDTYPE),
    "a long name of 8 GB": header("x", 8 * 2**30, tarfile.GNUTYPE_LONGNAME),
    "thousands of pax headers": pax(b"30 mtime=1234567890.123456789\n") * 5000,
    "a pax header of digits": pax(b"1" * 2**19),
    "a pax record of negative size": pax(b"11 size=-5\n") + header("b.png", 5) + bytes(512),
    "a pax record that goes on": pax(b"999 path=b.png\n"),
    "a sparse header without end": signed(SPARSE[:482] + b"\1" + SPARSE[483:]) + b"\1" * 2**20,
    "a cut pax header": header("x", 512, tarfile.XHDTYPE),
    "pax without an equals sign": header("x", 512, tarfile.XHDTYPE) + b"99 a".ljust(512, b"\0"),
    "a sparse header that goes on": signed(SPARSE[:482] + b"\1" + SPARSE[483:]),
    "noise": b"\x07 noise" * 500,
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("mode", ["r:", "r|"])
def test_hostile_headers_end_a_file_quickly(tmp_path: Path, name: str, mode: str) -> None:
    whole = write_tar(tmp_path / "a.tar", good("a") | good("z")).read_bytes()
    path = tmp_path / "b.tar"
    path.write_bytes(whole[: 8 * 512] + HOSTILE[name])
    samples, reports = read(path, mode)
    assert [sample["__key__"] for sample in samples] in (["a"], ["a", "z"])
    (report,) = reports
    assert report.reason in ("truncated tar", "too many bytes without a sample")


@pytest.mark.parametrize("mode", ["r:", "r|"])
def test_pax_headers_name_their_members(tmp_path: Path, mode: str) -> None:
    """Paths, sizes and sparse members of pax headers; what else they hold is passed over."""
    long = "é" * 200
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (good(long) | good("b")).items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uname = len(data), 1.5, "ü"
            archive.addfile(member, io.BytesIO(data))
    nobody = header("x", 24, tarfile.XGLTYPE) + b"24 path=of-nobody.webp\n\n".ljust(512, b"\0")
    sparse = pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.name=c.png\n")
    sparse += header("GNUSparseFile.0/c.png", 5) + b"1\n0\n".ljust(512, b"\0")
    path = tmp_path / "a.tar"
    path.write_bytes(nobody + sparse + path.read_bytes())
    (first, second), reports = read(path, mode)
    assert first["__key__"] == long and first["txt"] == f"caption of {long}".encode()
    assert second["__key__"] == "b" and second["txt"] == b"caption of b"
    assert [(report.reason, report.key) for report in reports] == [("sparse member", "c")]


def test_devices_and_pipes_are_no_shards(tmp_path: Path) -> None:
    (tmp_path / "zero.tar").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    write_tar(tmp_path / "folder.tar" / "a.tar", good("a"))
    assert len([*read_all(tmp_path / "folder.tar", options=options())]) == 1
    for name in ("zero", "pipe", "folder"):
        shard = Shard(str(tmp_path / f"{name}.tar"))
        for opened in (can_be_indexed, lambda shard: next(read_shard(shard, ()))):
            with pytest.raises(OSError, match=f"{name}.tar: expected a plain file, got a device"):
                opened(shard)
