"""Samples of a tar file: members grouped by key as webdataset does, and what cannot be read."""

from __future__ import annotations

import http.client
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import IO, Any

from gradcache_clip.train.data.broken import BrokenReport
from gradcache_clip.train.data.decode import (
    IMAGE_EXTENSIONS,
    MAX_MEMBER_BYTES,
    MAX_TEXT_BYTES,
    TEXT_EXTENSIONS,
)
from gradcache_clip.train.data.tar_headers import BoundedHeader

MAX_PASSED_BYTES = 2**30
"""Bytes of a stream from one sample to the next."""
WANTED = IMAGE_EXTENSIONS + TEXT_EXTENSIONS
DUPLICATE = "duplicate member"
"""The one reason that loses no sample: the first of the members is read."""
CUT, _PASSED = "truncated tar", "too many bytes without a sample"
_MAX_SHOWN = 200
ENDINGS = (CUT, _PASSED)
"""Reasons after which nothing more is read of a shard."""

RawSample = dict[str, Any]
"""`__key__`, `__url__`, and for each member its extension and content."""
Take = Callable[[tarfile.TarFile, tarfile.TarInfo], Any]

# Damaged headers make tarfile raise most of these, streams the others.
_READ_ERRORS = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    ArithmeticError,
    RecursionError,
    zlib.error,
    lzma.LZMAError,
    http.client.HTTPException,
)


def tar_samples(
    file: IO[bytes], url: str, *, mode: str, take: Take, samples: int | None = None
) -> Iterator[RawSample | BrokenReport]:
    """The samples of a tar file in order, then a report for each reason why some were lost.

    Args:
        file: the opened file.
        url: its name, for samples and reports.
        mode: of `tarfile.open`: "r:" seeks over the contents, "r|" reads a stream.
        take: returns what is kept of a member; called while it is the current one.
        samples: how many there should be, if a manifest tells.

    Yields:
        `RawSample`, or reports. A damaged file gives the samples before the damage; the one that
        the damage may have cut short counts as lost.
    """
    scan = _Scan(url, mode, take)
    found = 0
    for sample in scan.samples(file):
        found += 1
        yield sample
    yield from lost_samples(scan.reports, url, found, samples)


def lost_samples(
    reports: list[BrokenReport], url: str, found: int, samples: int | None
) -> Iterator[BrokenReport]:
    """The reports, with the samples that a manifest counts and nobody has found.

    Those that follow damage were lost with it.
    """
    known = sum(report.count for report in reports if report.reason != DUPLICATE)
    missing = max(0, (samples or 0) - found - known)
    for report in reports:
        if report.reason in ENDINGS:
            yield replace(report, count=report.count + missing)
            missing = 0
        else:
            yield report
    if missing:
        yield BrokenReport("missing sample", url, "", missing)


@dataclass(frozen=True)
class _Member:
    key: str
    extension: str
    content: Any
    problem: str


class _Scan:
    """One pass over a tar file.

    Attributes:
        reports: one for each reason why samples were lost, with the first key.
    """

    def __init__(self, url: str, mode: str, take: Take) -> None:
        self._url, self._mode, self._take = url, mode, take
        self._is_stream = "|" in mode
        self._ending = ""
        self._passed = 0
        self._key, self._size = "", 0
        self._reports: dict[str, BrokenReport] = {}

    @property
    def reports(self) -> list[BrokenReport]:
        return [*self._reports.values()]

    def samples(self, file: IO[bytes]) -> Iterator[RawSample]:
        key = ""
        for key, members in groupby(self._members(file), key=attrgetter("key")):
            if (sample := self._sample(key, members)) is not None:
                self._passed = 0
                yield sample
        if self._ending:
            self._report(self._ending, key)

    def _sample(self, key: str, members: Iterator[_Member]) -> RawSample | None:
        contents: RawSample = {}
        dotted: dict[str, None] = {}
        problem = "" if _is_text(key) else "name is not utf-8"
        for member in members:
            if "." in member.extension:
                dotted[f"{key}.{member.extension.rpartition('.')[0]}"] = None
            elif member.extension in contents:
                self._report(DUPLICATE, key)
            else:
                contents[member.extension] = member.content
                problem = problem or member.problem
        if self._ending:
            return None
        if dotted and not contents:
            self._report("key with a dot", next(iter(dotted)), len(dotted))
        elif problem:
            self._report(problem, key)
        if problem or not contents:
            return None
        return {"__key__": key, "__url__": self._url, **contents}

    def _report(self, reason: str, key: str, count: int = 1) -> None:
        shown = key[:_MAX_SHOWN].encode("utf-8", "backslashreplace").decode()
        before = self._reports.get(reason, BrokenReport(reason, self._url, shown, 0))
        self._reports[reason] = replace(before, count=before.count + count)

    def _members(self, file: IO[bytes]) -> Iterator[_Member]:
        try:
            with tarfile.open(fileobj=file, mode=self._mode, tarinfo=BoundedHeader) as archive:  # type: ignore[call-overload]
                for member in archive:
                    # Kept by tarfile for looking members up by name, which nobody does.
                    archive.members = []
                    if archive.offset <= member.offset:
                        raise tarfile.ReadError("expected the next header behind the last one")
                    self._passed += archive.offset - member.offset
                    if self._is_stream and self._passed > MAX_PASSED_BYTES:
                        self._ending = _PASSED
                        return
                    if (found := self._wanted(archive, member)) is not None:
                        yield found
        except _READ_ERRORS:
            self._ending = CUT

    def _wanted(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> _Member | None:
        from webdataset.tariterators import base_plus_ext

        key, extension = base_plus_ext(member.name)
        if key is None or not member.isreg():
            return None
        extension = extension.lower()
        if extension.rpartition(".")[2] not in WANTED:
            return None
        problem = self._problem(key, extension, member)
        is_read = not (problem or "." in extension)
        return _Member(key, extension, self._take(archive, member) if is_read else None, problem)

    def _problem(self, key: str, extension: str, member: tarfile.TarInfo) -> str:
        self._size = member.size + (self._size if key == self._key else 0)
        self._key = key
        if member.issparse():
            # It could claim any size.
            return "sparse member"
        if member.size > (MAX_TEXT_BYTES if extension in TEXT_EXTENSIONS else MAX_MEMBER_BYTES):
            return "member too large"
        return "sample too large" if self._size > MAX_MEMBER_BYTES else ""


def _is_text(key: str) -> bool:
    """Whether a name was UTF-8: tarfile keeps other bytes as halves of surrogate pairs."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True
