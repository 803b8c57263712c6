"""Reading raw samples out of shards: no member is decoded, and unknown ones are not even read."""

from __future__ import annotations

import http.client
import lzma
import tarfile
import zlib
from collections.abc import Collection, Iterator
from typing import IO, Any

from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.decode import IMAGE_EXTENSIONS, TEXT_EXTENSIONS
from gradcache_clip.train.data.shard_urls import Shard, open_shard

MAX_MEMBER_BYTES = 128 * 2**20
RawSample = dict[str, Any]

_WANTED = frozenset(IMAGE_EXTENSIONS + TEXT_EXTENSIONS)
_READ_ERRORS = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    lzma.LZMAError,
    http.client.HTTPException,
)


def read_shard(shard: Shard, allowed: Collection[str]) -> Iterator[RawSample | BrokenReport]:
    """The raw samples of a shard in order, and a report for what could not be read.

    Args:
        shard: where it is, and how many samples it should hold.
        allowed: URL schemes that may be opened.

    Yields:
        Dictionaries from webdataset's grouping ("__key__", "__url__", "png", "txt", ...), or
        reports. A damaged shard gives the samples before the damage, then one report; a sample
        that the damage may have cut short counts as lost.

    Raises:
        OSError: the shard cannot be opened at all.
    """
    from webdataset.tariterators import group_by_keys

    with open_shard(shard.url, allowed) as file:
        members = _Members(file, shard.url)
        duplicates: list[BrokenReport] = []

        def note_duplicate(error: Exception) -> bool:
            duplicates.append(BrokenReport("duplicate member", shard.url, members.key))
            return True

        seen = 0
        for sample in group_by_keys(members, handler=note_duplicate):
            if members.damaged and sample["__key__"] == members.key:
                break
            seen += 1
            yield sample
        lost = max(int(members.damaged), (shard.samples or 0) - seen)
        if lost:
            reason = "truncated tar" if members.damaged else "missing sample"
            yield BrokenReport(reason, shard.url, members.key, lost)
        yield from duplicates


class _StrictHeader(tarfile.TarInfo):
    """A header that tells the end mark of an archive from damage, which tarfile takes for it."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictHeader:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"expected a header or the end mark, got {error}") from error


class _Members:
    """The wanted files of a tar stream, as webdataset's grouping takes them.

    Attributes:
        key: of the last one.
        damaged: whether the stream ended before its end mark.
    """

    def __init__(self, file: IO[bytes], url: str) -> None:
        self._file = file
        self._url = url
        self.key = ""
        self.damaged = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._read()
        except _READ_ERRORS:
            self.damaged = True

    def _read(self) -> Iterator[dict[str, Any]]:
        from webdataset.tariterators import base_plus_ext

        with tarfile.open(fileobj=self._file, mode="r|*", tarinfo=_StrictHeader) as archive:
            while (member := archive.next()) is not None:
                # Kept by tarfile for seeking back, which a stream never does.
                archive.members = []  # type: ignore[attr-defined]
                key, extension = base_plus_ext(member.name)
                if key is None or extension.lower() not in _WANTED or not _is_readable(member):
                    continue
                self.key = key
                content = archive.extractfile(member)
                assert content is not None
                yield {"fname": member.name, "data": content.read(), "__url__": self._url}


def _is_readable(member: tarfile.TarInfo) -> bool:
    """Whether it is a plain file that fits; a sparse one could claim any size."""
    return member.isreg() and not member.issparse() and member.size <= MAX_MEMBER_BYTES
