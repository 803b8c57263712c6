"""Opening shards: plain local files, URLs without a shell, and nothing that goes on for ever."""

from __future__ import annotations

import http.client
import os
import stat
import time
import urllib.request
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any, cast

from gradcache_clip.train.data.shard_urls import check_url, local_path, url_scheme

HTTP_TIMEOUT_S = 60


def open_plain(path: str | Path) -> IO[bytes]:
    """Open a local file that has an end, for reading.

    Raises:
        OSError: it cannot be opened, or is a device, a pipe, a socket or a folder.
    """
    # Else the opening of a pipe would wait for somebody to write.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(
            f"{path}: expected a plain file, got a device, a pipe or a folder; name tar files"
        )
    return os.fdopen(descriptor, "rb")


def open_shard(url: str, allowed: Collection[str]) -> IO[bytes]:
    """Open a shard for reading: local files by Python, http(s) by urllib, without a shell.

    Other schemes go to webdataset's openers, each only when `allowed` names it.

    Raises:
        ValueError: as `check_url`, or a redirect leads to a scheme that is not allowed.
        OSError: the shard cannot be opened.
    """
    scheme = url_scheme(url)
    if scheme in ("", "file"):
        return open_plain(local_path(url))
    check_url(url, allowed)
    if scheme in ("http", "https"):
        return cast("IO[bytes]", _Steady(_opened(url, allowed)))
    return _webdataset_opener(url, scheme)(scheme + url[len(scheme) :], "rb", 8192)


def _opened(url: str, allowed: Collection[str]) -> Any:
    try:
        opener = urllib.request.build_opener(_CheckedRedirects(allowed))
        return opener.open(url, timeout=HTTP_TIMEOUT_S)
    # ValueError from the check of a redirect names its URL; UnicodeError comes of host names.
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise OSError(
            f"{url}: expected a shard, got {error or type(error).__name__}; check the URL and its "
            "server, or copy the shards to a local disk"
        ) from error


class _Steady:
    """An answer that must go on: a server may send a byte now and then, for ever."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def __enter__(self) -> _Steady:
        return self

    def __exit__(self, *_error: object) -> None:
        self._answer.close()

    def read(self, size: int) -> bytes:
        """So many bytes; fewer at the end."""
        deadline, found = time.monotonic() + HTTP_TIMEOUT_S, bytearray()
        while len(found) < size and (data := self._answer.read1(size - len(found))):
            found += data
            if time.monotonic() > deadline:
                raise TimeoutError(f"expected {size} bytes within {HTTP_TIMEOUT_S} s")
        return bytes(found)


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to allowed schemes alone."""

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = allowed

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Check the new URL before anything is asked of it."""
        check_url(newurl, self._allowed)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _webdataset_opener(url: str, scheme: str) -> Callable[[str, str, int], IO[bytes]]:
    # The table itself, not gopen(): that one also follows rewrite rules from the environment.
    from webdataset.gopen import gopen_schemes

    if scheme not in gopen_schemes:
        known = sorted(name for name in gopen_schemes if not name.startswith("__"))
        raise ValueError(f"source: expected one of the schemes {known}, got {url!r}")
    opener: Callable[[str, str, int], IO[bytes]] = gopen_schemes[scheme]
    return opener
