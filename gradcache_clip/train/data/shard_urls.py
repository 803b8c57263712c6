"""Which shards a name stands for. No URL is opened and no command runs unasked."""

from __future__ import annotations

import glob
import math
import re
import urllib.parse
import urllib.request
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradcache_clip.train.sources.shards import MANIFEST_NAME, read_manifest

MAX_SHARDS = 2**20
"""Of a brace pattern."""

# Two letters or more: a single one is a Windows drive.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
# Inside a URL these can end a quoted word of a shell command; RFC 3986 allows none of them.
_UNSAFE = re.compile(r"[\s'\"\\`$;|<>{}^\x00-\x1f\x7f]")
_GLOB = re.compile(r"[*?\[]")
_SHOWN, _MAX_NESTED = 200, 16
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")


@dataclass(frozen=True)
class Shard:
    """A tar file of samples; `samples` is the count that its manifest states, if it has one."""

    url: str
    samples: int | None = None


def find_shards(source: str | Path, *, allow_url_schemes: Sequence[str] = ()) -> tuple[Shard, ...]:
    """The shards that a folder, file, glob, brace pattern or URL stands for.

    Args:
        source: a folder (its manifest.json, else its *.tar), a path, a glob such as
            "data/*.tar", a brace pattern such as "data/shard-{000000..000009}.tar", several of
            these joined by "::", or URLs.
        allow_url_schemes: schemes that may be opened beside local files, by name: "http", "https",
            "pipe" (runs a shell command), or another that webdataset knows ("gs", "hf", ...).

    Returns:
        The shards in order; a glob and a folder are sorted by name.

    Raises:
        FileNotFoundError: nothing there, or some shards are missing.
        ValueError: a URL whose scheme is not allowed, or with characters unfit for a URL.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (Path(folder) / "a.tar").touch()
        ...     [Path(shard.url).name for shard in find_shards(f"{folder}/*.tar")]
        ['a.tar']
    """
    shards: list[Shard] = []
    for url in _expand(str(source)):
        scheme = url_scheme(url)
        if scheme in ("", "file"):
            shards += _local_shards(local_path(url))
        else:
            check_url(url, allow_url_schemes)
            shards.append(Shard(url))
    missing = [
        shard.url for shard in shards if not url_scheme(shard.url) and not _exists(shard.url)
    ]
    if missing:
        raise FileNotFoundError(
            f"{str(source)[:_SHOWN]}: expected {len(shards)} shards, got "
            f"{len(shards) - len(missing)}: {len(missing)} missing, the first is "
            f"{missing[0][:_SHOWN]}; make or copy them again"
        )
    return tuple(shards)


def url_scheme(url: str) -> str:
    """The scheme of a URL in lower case; empty for a path."""
    match = _SCHEME.match(url)
    return match[1].lower() if match else ""


def check_url(url: str, allowed: Collection[str]) -> None:
    """Refuse a URL unless its scheme is allowed by name and it can hide no command.

    Raises:
        ValueError: the scheme is not in `allowed`, or a URL holds quotes, spaces and the like.
    """
    scheme = url_scheme(url)
    if scheme not in allowed:
        runs = " (it runs a command on this machine)" if scheme not in ("http", "https") else ""
        raise ValueError(
            f"allow_url_schemes: expected {scheme!r} in it to open {url[:_SHOWN]!r}, got "
            f"{list(allowed)}; "
            f"use local files, or allow {scheme!r} on the command line if you trust it{runs}"
        )
    if scheme != "pipe" and (bad := _UNSAFE.search(url)):
        raise ValueError(
            f"source: expected a plain URL, got {url[:_SHOWN]!r} with {bad[0]!r}; percent-encode it"
        )


def _expand(source: str) -> list[str]:
    if _exists(source):
        return [source]
    from webdataset.shardlists import expand_urls

    try:
        _check_count(source)
        return list(expand_urls(source))
    # webdataset asserts that the variables of "${NAME}" are set.
    except (AssertionError, ValueError, RecursionError) as error:
        raise ValueError(
            f"source: expected a path, glob or brace pattern, got {source[:_SHOWN]!r} "
            f"({str(error)[:_SHOWN]}); correct the pattern"
        ) from error


def _check_count(source: str) -> None:
    """Raise ValueError for braces that stand for more than any set has, and do not expand them."""
    count = sum(map(_most_shards, source.split("::")))
    if count > MAX_SHARDS:
        raise ValueError(f"expected at most {MAX_SHARDS:,} shards, got braces for {count:,}")


def _most_shards(pattern: str) -> int:
    """As many names as braces stand for, or more where they are nested."""
    most, open_braces = 1, [0]
    for character in pattern:
        if character == "{":
            open_braces.append(1)
            if len(open_braces) > _MAX_NESTED:
                raise ValueError(f"more than {_MAX_NESTED} braces in each other")
        elif character == ",":
            open_braces[-1] += 1
        elif character == "}" and len(open_braces) > 1:
            most = min(most * open_braces.pop(), 2**64)
    return most * math.prod(
        abs(int(last) - int(first)) // (int(step or 1) or 1) + 1
        for first, last, step in _RANGE.findall(pattern)
    )


def local_path(url: str) -> str:
    """The path of a local file, also of a file: URL."""
    if url_scheme(url) != "file":
        return url
    parts = urllib.parse.urlparse(url)
    return urllib.request.url2pathname(parts.path)


def _local_shards(path: str) -> list[Shard]:
    if _exists(path) and Path(path).is_dir():
        return _folder_shards(Path(path))
    if _GLOB.search(path) and not _exists(path):
        found = _matches(path)
        if not found:
            raise FileNotFoundError(
                f"source: expected shards to match {path[:_SHOWN]!r}, got none; check the pattern"
            )
        return [Shard(name) for name in found]
    return [Shard(path)]


def _matches(pattern: str) -> list[str]:
    try:
        # Not recursive: `/**` would walk through the whole disk.
        return sorted(glob.glob(pattern))  # noqa: PTH207 (may be absolute)
    except (ValueError, RecursionError, re.error):
        return []


def _folder_shards(folder: Path) -> list[Shard]:
    if (folder / MANIFEST_NAME).is_file():
        entries = read_manifest(folder).shards
        shards = [Shard(str(folder / entry.name), entry.samples) for entry in entries]
    else:
        shards = [Shard(str(path)) for path in sorted(folder.glob("*.tar"))]
    if not shards:
        splits = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_NAME}"))
        remedy = f"name one of its folders {splits}" if splits else "make some first"
        raise FileNotFoundError(
            f"source: expected {MANIFEST_NAME} or *.tar in {folder}, got none; {remedy}"
        )
    return shards


def _exists(path: str) -> bool:
    """Whether a path exists; a long pattern or command is no path, and no error."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False
