"""Where the samples of local tar files lie, so that each is read by its number.

An index is made in one pass over the headers of a tar file and kept beside it, as NAME.index.
"""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.decode import MAX_MEMBER_BYTES
from gradcache_clip.train.data.shard_files import open_plain
from gradcache_clip.train.data.shard_urls import Shard, local_path, url_scheme
from gradcache_clip.train.data.tar_samples import (
    WANTED,
    RawSample,
    lost_samples,
    tar_samples,
)
from gradcache_clip.train.data.tar_stream import COMPRESSED, MAGIC_BYTES

_FORMAT = "2"
_MAX_OPEN_FILES = 64
_MAX_EMPTY_BYTES = 2**16
_DTYPES = {
    "offset": np.int64,
    "size": np.uint32,
    "extension": np.uint8,
    "members": np.int64,
    "names": np.uint8,
    "names_end": np.int64,
}


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The S samples of one tar file and their M members.

    Args:
        columns: `offset`, `size` and `extension` (M,) of the members, the last as its place in
            `WANTED`; `members` (S,), where the members of a sample end; `names`, the keys in one
            piece, and `names_end` (S,), where each ends.
        reports: what is broken in the file, without its name.
    """

    columns: dict[str, np.ndarray]
    reports: tuple[tuple[str, str, int], ...]

    def __len__(self) -> int:
        return len(self.columns["members"])

    def key(self, number: int) -> str:
        """Name of a sample."""
        start, end = _span(self.columns["names_end"], number)
        return self.columns["names"][start:end].tobytes().decode(errors="replace")

    def members(self, number: int) -> Iterator[tuple[str, int, int]]:
        """Extension, offset and size of each member of a sample."""
        members = slice(*_span(self.columns["members"], number))
        names = (self.columns[name][members].tolist() for name in ("extension", "offset", "size"))
        for extension, offset, size in zip(*names, strict=True):
            yield WANTED[extension], offset, size


class IndexedShards:
    """The samples of local, uncompressed tar files by number, in the order of the files.

    Args:
        shards: the files.
        rank, world_size: of this process; each begins with other files, so that several share the
            work of the first pass.

    Attributes:
        lost: reports of the samples that no number stands for.

    Raises:
        OSError: a file cannot be read.
    """

    def __init__(self, shards: Sequence[Shard], *, rank: int = 0, world_size: int = 1) -> None:
        from gradcache_clip.train.sources.splits import track

        self._paths = [Path(local_path(shard.url)) for shard in shards]
        order = sorted(range(len(shards)), key=lambda number: (number - rank) % world_size)
        found = {number: _read_index(self._paths[number]) for number in order}
        missing = [number for number in order if found[number] is None]
        for number in track(missing, "indexing shards") if missing and not rank else missing:
            found[number] = _index_of(self._paths[number])
        self._indexes = [index for _, index in sorted(found.items()) if index is not None]
        self._ends = [*accumulate(map(len, self._indexes))]
        self.lost = [
            report
            for shard, index in zip(shards, self._indexes, strict=True)
            for report in _lost_of(shard, index)
        ]
        self._files = _OpenFiles()

    @property
    def identity(self) -> list[tuple[str, int, int]]:
        """Name, bytes and samples of each file, without folders: a moved set is the same set."""
        files = zip(self._paths, self._indexes, strict=True)
        return [(path.name, path.stat().st_size, len(index)) for path, index in files]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, number: int) -> RawSample | BrokenReport:
        """The members of a sample; a report if the file has become shorter."""
        path, index, local = self._place_of(number)
        sample: RawSample = {"__key__": index.key(local), "__url__": str(path)}
        for extension, offset, size in index.members(local):
            content = self._files.read(path, offset, size)
            if len(content) < size:
                return BrokenReport("truncated tar", str(path), sample["__key__"])
            sample[extension] = content
        return sample

    def _place_of(self, number: int) -> tuple[Path, ShardIndex, int]:
        shard = bisect_right(self._ends, number)
        index = self._indexes[shard]
        return self._paths[shard], index, number - self._ends[shard] + len(index)


def can_be_indexed(shard: Shard) -> bool:
    """Whether it is a local file, and not a compressed one."""
    if url_scheme(shard.url) not in ("", "file"):
        return False
    with open_plain(local_path(shard.url)) as file:
        return not file.read(MAGIC_BYTES).startswith(tuple(COMPRESSED))


def _span(ends: np.ndarray, number: int) -> tuple[int, int]:
    return int(ends[number - 1]) if number else 0, int(ends[number])


def _lost_of(shard: Shard, index: ShardIndex) -> Iterator[BrokenReport]:
    reports = [BrokenReport(reason, shard.url, key, n) for reason, key, n in index.reports]
    return lost_samples(reports, shard.url, len(index), shard.samples)


def _index_of(path: Path) -> ShardIndex:
    """Make the index of a tar file and keep it beside the file, if that folder can be written."""
    with open_plain(path) as file:
        stamp = _stamp_of(os.fstat(file.fileno()))
        # The headers alone are read: to read ahead is to read in vain.
        index = _made_index(tar_samples(file, str(path), mode="r:", take=_position))
    with suppress(OSError):
        _write_index(index, path, stamp)
    return index


def _position(_archive: Any, member: Any) -> tuple[int, int]:
    return member.offset_data, member.size


def _made_index(samples: Iterator[RawSample | BrokenReport]) -> ShardIndex:
    columns = {name: array(np.dtype(dtype).char) for name, dtype in _DTYPES.items()}
    reports = []
    for sample in samples:
        if isinstance(sample, BrokenReport):
            reports.append((sample.reason, sample.key, sample.count))
            continue
        columns["names"].frombytes(sample["__key__"].encode())
        for extension, place in sample.items():
            if extension in WANTED:
                columns["extension"].append(WANTED.index(extension))
                columns["offset"].append(place[0])
                columns["size"].append(place[1])
        columns["members"].append(len(columns["offset"]))
        columns["names_end"].append(len(columns["names"]))
    made = {name: np.array(column, _DTYPES[name]) for name, column in columns.items()}
    return ShardIndex(made, tuple(reports))


def _stamp_of(status: os.stat_result) -> dict[str, str]:
    """What a tar file must still be for its index to hold."""
    return {
        "format": _FORMAT,
        "bytes": str(status.st_size),
        "modified_ns": str(status.st_mtime_ns),
    }


def _index_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.index")


def _write_index(index: ShardIndex, path: Path, stamp: dict[str, str]) -> None:
    from safetensors.numpy import save

    content = save(index.columns, metadata={**stamp, "reports": json.dumps(index.reports)})
    # Renamed from a name that nobody can guess: no link is followed, a reader sees all or nothing.
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        temporary.replace(_index_path(path))
    finally:
        temporary.unlink(missing_ok=True)


def _read_index(path: Path) -> ShardIndex | None:
    """The index beside a tar file, if it fits; it may have come from strangers with the file."""
    from safetensors import SafetensorError, safe_open

    kept, status = _index_path(path), path.stat()
    # Of each member the tar file holds more than its index.
    if not kept.is_file() or kept.stat().st_size > status.st_size + _MAX_EMPTY_BYTES:
        return None
    try:
        with safe_open(kept, framework="numpy") as file:
            metadata = file.metadata() or {}
            reports = json.loads(metadata.pop("reports", "[]"))
            index = ShardIndex(
                {name: file.get_tensor(name) for name in _DTYPES},
                tuple((str(reason), str(key), int(count)) for reason, key, count in reports),
            )
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return index if metadata == _stamp_of(status) and _fits(index, status.st_size) else None


def _fits(index: ShardIndex, tar_bytes: int) -> bool:
    """Whether every number of an index leads into the file and into the index itself."""
    columns = index.columns
    if any(
        columns[name].dtype != dtype or columns[name].ndim != 1 for name, dtype in _DTYPES.items()
    ):
        return False
    offset, size, extension = columns["offset"], columns["size"], columns["extension"]
    if not len(offset) == len(size) == len(extension) or len(columns["names_end"]) != len(index):
        return False
    inside = (offset >= 0) & (offset <= tar_bytes - size.astype(np.int64))
    known = bool((extension < len(WANTED)).all()) and all(count > 0 for *_, count in index.reports)
    if not (bool(inside.all()) and known and _rises_to(columns["members"], len(offset))):
        return False
    named = _rises_to(columns["names_end"], len(columns["names"]))
    return named and _are_small(columns["members"], size)


def _are_small(ends: np.ndarray, size: np.ndarray) -> bool:
    """Whether no sample has more members, or larger ones, than are read of a tar file."""
    if not len(ends):
        return True
    counts = np.diff(ends, prepend=0)
    totals = np.add.reduceat(size.astype(np.int64), ends - counts)
    return bool((counts <= len(WANTED)).all() and (totals <= MAX_MEMBER_BYTES).all())


def _rises_to(ends: np.ndarray, last: int) -> bool:
    """Whether ends of non-empty pieces rise to the last."""
    if not len(ends):
        return last == 0
    return bool(ends[0] > 0 and (ends[1:] > ends[:-1]).all() and ends[-1] == last)


class _OpenFiles:
    """Files that are read by position, of which the last few stay open.

    Positions are given with each read, so forked processes may share the descriptors.
    """

    def __init__(self) -> None:
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """So many bytes from a position; fewer where the file ends before."""
        return os.pread(self._open(path), size, offset)

    def _open(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._descriptors) > _MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(path)
        return self._descriptors[path]

    def __getstate__(self) -> dict[str, Any]:
        return {"_descriptors": OrderedDict()}

    # Bound early: modules are gone when the interpreter ends.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        for descriptor in self._descriptors.values():
            close(descriptor)
