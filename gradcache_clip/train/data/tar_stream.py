"""Shards that are read from start to end: decompressed a little at a time, and never for ever."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any

COMPRESSED: dict[bytes, Callable[[], Any] | None] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": lambda: lzma.LZMADecompressor(memlimit=_MAX_WINDOW_BYTES),
    b"\x5d\x00\x00\x80": lambda: lzma.LZMADecompressor(memlimit=_MAX_WINDOW_BYTES),
    # Zstandard, which Python reads from 3.14 on.
    b"\x28\xb5\x2f\xfd": None,
}
"""First bytes of a compressed file, and what decompresses it."""
MAGIC_BYTES = max(map(len, COMPRESSED))

_MAX_WINDOW_BYTES = 256 * 2**20
_READ_BYTES = 2**16
_MAX_TRIES_AT_END = 10


def decompressing(file: IO[bytes]) -> TarStream | None:
    """The uncompressed bytes of a stream; None if they cannot be had from these."""
    head = file.read(MAGIC_BYTES)
    for magic, make in COMPRESSED.items():
        if head.startswith(magic):
            return None if make is None else TarStream(_Decompressed(file, head, make))
    return TarStream(_Ahead(file, head))


class TarStream:
    """A stream that is not asked for more for ever: tarfile skips whatever size a header claims."""

    def __init__(self, file: Any) -> None:
        self._file, self._tries = file, 0

    def read(self, size: int) -> bytes:
        """Up to so many bytes."""
        data: bytes = self._file.read(size)
        self._tries = 0 if data else self._tries + 1
        if self._tries > _MAX_TRIES_AT_END:
            raise EOFError("expected no more than the stream holds")
        return data


class _Ahead:
    """A file whose first bytes were read before."""

    def __init__(self, file: IO[bytes], head: bytes) -> None:
        self._file, self._head = file, head

    def read(self, size: int) -> bytes:
        if self._head:
            head, self._head = self._head[:size], self._head[size:]
            return head
        return self._file.read(size)


class _Decompressed:
    """What compressed bytes stand for, no more of it at a time than is asked for: a few bytes may
    stand for many gigabytes."""

    def __init__(self, file: IO[bytes], head: bytes, make: Callable[[], Any]) -> None:
        self._file, self._given, self._make = file, head, make
        self._engine = make()

    def read(self, size: int) -> bytes:
        while True:
            if self._engine.eof:
                # Several compressed files in a row are one.
                self._given = self._engine.unused_data or self._file.read(_READ_BYTES)
                self._engine = self._make()
            # zlib hands back what it did not use, the others keep it.
            wants = getattr(self._engine, "needs_input", True)
            given = self._given or (self._file.read(_READ_BYTES) if wants else b"")
            found: bytes = self._engine.decompress(given, size)
            self._given = getattr(self._engine, "unconsumed_tail", b"")
            if found or not (given or self._engine.eof):
                return found
