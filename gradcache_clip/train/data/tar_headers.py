"""Headers of tar files, read with bounds on their number and size.

The extended headers of Python's `tarfile` are replaced: they recurse without end, keep whatever a
pax header holds, and search it with expressions whose time grows with the square of its length.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any

MAX_HEADER_BYTES = 2**20
"""Bytes of one extended header."""
MAX_HEADERS = 16
"""Extended headers before one member, and further blocks of one sparse header."""

_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_EXTENDED = (*_PAX, *_LONG_NAMES, tarfile.XGLTYPE)


class BoundedHeader(tarfile.TarInfo):
    """A header that tells the end mark of an archive from damage, and is bounded in every way.

    Of a pax header path, size and whether the member is sparse are read; a global one is skipped.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> BoundedHeader:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            # tarfile itself takes damage for the end.
            raise tarfile.ReadError(f"expected a header or the end mark, got {error}") from error

    def _proc_member(self, archive: Any) -> BoundedHeader:
        if not 0 <= self.size <= (MAX_HEADER_BYTES if self.type in _EXTENDED else self.size):
            raise tarfile.ReadError(f"expected 0 to {MAX_HEADER_BYTES} bytes, got {self.size}")
        if self.type in _EXTENDED:
            return self._extended(archive)
        archive.extended_headers = 0
        member: BoundedHeader = super()._proc_member(archive)  # type: ignore[misc]
        return member

    def _extended(self, archive: Any) -> BoundedHeader:
        archive.extended_headers = getattr(archive, "extended_headers", 0) + 1
        if archive.extended_headers > MAX_HEADERS:
            raise tarfile.ReadError(f"expected at most {MAX_HEADERS} headers of one member")
        content = archive.fileobj.read(self._block(self.size))  # type: ignore[attr-defined]
        member = self.fromtarfile(archive)
        member.offset = self.offset
        if self.type in _PAX:
            member._apply_pax(dict(_records(content[: self.size])), archive)
        elif self.type == tarfile.GNUTYPE_LONGNAME:
            member.name = _text(content.partition(b"\0")[0])
        return member

    def _apply_pax(self, records: dict[bytes, bytes], archive: Any) -> None:
        path = records.get(b"GNU.sparse.name", records.get(b"path"))
        if path is not None:
            self.name = _text(path).rstrip("/")
        if b"size" in records:
            self.size = int(records[b"size"])
            if self.size < 0:
                raise tarfile.ReadError(f"expected 0 bytes or more, got {self.size}")
            archive.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]
        if any(name.startswith(b"GNU.sparse.") for name in records):
            self.sparse = b""

    def _proc_sparse(self, archive: Any) -> BoundedHeader:
        """Read over a sparse header: such members are not used."""
        _, is_extended, _ = self._sparse_structs  # type: ignore[attr-defined]
        self.sparse, blocks = b"", 0
        while is_extended:
            blocks += 1
            if blocks > MAX_HEADERS:
                raise tarfile.ReadError(f"expected at most {MAX_HEADERS} blocks of a sparse header")
            is_extended = bool(archive.fileobj.read(tarfile.BLOCKSIZE)[504])
        self.offset_data = archive.fileobj.tell()
        archive.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]
        return self


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keyword and value of each record of a pax header, "LENGTH KEYWORD=VALUE\\n"."""
    start = 0
    while start < len(content) and content[start]:
        digits = content[start : start + 20].partition(b" ")[0]
        end = start + int(digits)
        record = content[start + len(digits) + 1 : end - 1]
        keyword, equals, value = record.partition(b"=")
        if end <= start or end > len(content) or not equals:
            raise tarfile.ReadError(f"expected records of a pax header, got {record[:40]!r}")
        yield keyword, value
        start = end


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
