"""Writing webdataset shards: plain tar files of KEY.EXT, KEY.txt and KEY.json, and a manifest."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1

_MOST_MANIFEST_BYTES = 2**28

_KEY = re.compile(r"[\w-]+", re.ASCII)
_SHARD_NAME = re.compile(r"[\w.-]+\.tar", re.ASCII)


@dataclass(frozen=True)
class Sample:
    """One image with its captions, as a maker of shards hands it over.

    Args:
        key: name of the sample, unique in its set: ASCII letters, digits, `_` and `-`, because
            webdataset splits file names at the first dot.
        image: the bytes of the image file.
        extension: "png", "jpg", "jpeg" or "webp".
        captions: one caption or more, the main one first.
        group: samples of equal group count as matches of each other (the same caption, say).
        label: its class, by which features of images alone are evaluated; empty where unknown.

    Raises:
        ValueError: for a key, an extension or captions outside these rules.
    """

    key: str
    image: bytes
    extension: str
    captions: tuple[str, ...]
    group: str
    label: str = ""

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key) or self.key.startswith("__"):
            raise ValueError(
                f"key: expected ASCII letters, digits, '_' and '-', not led by '__', "
                f"got {self.key!r}; replace other characters by '_'"
            )
        if self.extension not in EXTENSIONS:
            raise ValueError(
                f"extension: expected one of {', '.join(EXTENSIONS)}, got {self.extension!r}; "
                "convert the image first"
            )
        if not self.captions or not all(caption.strip() for caption in self.captions):
            raise ValueError(
                f"captions: expected at least one and none blank, got {self.captions!r} for "
                f"{self.key}; leave the sample out"
            )


@dataclass(frozen=True)
class ShardEntry:
    """One line of a manifest: file name, samples, size in bytes, hex SHA-256."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds and where it came from; manifest.json is this as JSON.

    Args:
        samples: samples in all shards.
        shards: the shards in the order of their names.
        source: what the samples were made from.
        license: terms of use of the images and captions.
        settings: what the maker was asked for; equal settings mean equal shards.
        skipped: samples left out, by reason.
    """

    samples: int
    shards: tuple[ShardEntry, ...]
    source: str
    license: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class Origin:
    """The part of a manifest that a maker knows; see `Manifest`.

    `skipped` is read after the last sample, so a generator of samples may fill it as it goes.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)


def write_shards(
    samples: Iterable[Sample],
    out_dir: Path,
    *,
    shard_size: int = 1000,
    source: str,
    license: str,
    origin: Origin | None = None,
) -> Manifest:
    """Write samples as shard-000000.tar, shard-000001.tar, ... and manifest.json.

    The bytes of a shard depend on its samples alone. Each file is written under a temporary name
    and renamed, the manifest last: a folder with a manifest is complete.

    Args:
        samples: read once, in order; keys must differ.
        out_dir: created where missing.
        shard_size: samples a shard; the last one may hold fewer.
        source: what the samples were made from.
        license: terms of use of the images and captions.
        origin: settings and skipped samples for the manifest.

    Returns:
        The manifest as written.

    Raises:
        ValueError: no sample, a key that occurs twice, or a shard size below one.

    Example:
        >>> import tempfile
        >>> sample = Sample("cat-1", b"...", "png", ("a cat",), "cat")
        >>> with tempfile.TemporaryDirectory() as out:
        ...     write_shards([sample], Path(out), source="mine", license="CC0-1.0").samples
        1
    """
    if shard_size < 1:
        raise ValueError(
            f"shard_size: expected a positive integer, got {shard_size}; pass e.g. 1000"
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / MANIFEST_NAME).unlink(missing_ok=True)
    unique = _with_unique_keys(samples)
    entries: list[ShardEntry] = []
    while chunk := itertools.islice(unique, shard_size):
        entry = _write_shard(out_dir / f"shard-{len(entries):06d}.tar", chunk)
        if entry is None:
            break
        entries.append(entry)
    if not entries:
        raise ValueError(f"samples: expected at least one for {out_dir}, got none")
    origin = origin or Origin()
    total = sum(entry.samples for entry in entries)
    manifest = Manifest(
        total, tuple(entries), source, license, dict(origin.settings), dict(origin.skipped)
    )
    _write_manifest(manifest, out_dir)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json of a folder of shards.

    Raises:
        FileNotFoundError: the folder has no manifest.
        ValueError: it is no manifest of this format, or names a shard outside the folder.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the manifest of a folder of shards, got no file")
    try:
        manifest = _parsed_manifest(path)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected a manifest of format {MANIFEST_FORMAT}, got an error "
            f"({type(error).__name__}: {str(error)[:200]}); make the shards again"
        ) from error
    for shard in manifest.shards:
        # A manifest may come with downloaded shards: it must not lead to other files.
        if not isinstance(shard.name, str) or not _SHARD_NAME.fullmatch(shard.name):
            raise ValueError(
                f"{path}: expected file names such as shard-000000.tar, got {shard.name!r}"
            )
    return manifest


def _parsed_manifest(path: Path) -> Manifest:
    if path.stat().st_size > _MOST_MANIFEST_BYTES:
        raise ValueError(f"more than {_MOST_MANIFEST_BYTES:,} bytes")
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.pop("format") != MANIFEST_FORMAT:
        raise ValueError("another format")
    shards = tuple(ShardEntry(**shard) for shard in fields.pop("shards"))
    manifest = Manifest(shards=shards, **fields)
    counts = [manifest.samples, *manifest.skipped.values()]
    counts += [count for shard in shards for count in (shard.samples, shard.bytes)]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("a count that is no integer of 0 or more")
    if not isinstance(manifest.settings, dict):
        raise ValueError("settings that are no object")
    return manifest


def verify_manifest(folder: Path, *, hashes: bool = False) -> list[str]:
    """Compare the shards of a folder with its manifest.

    Args:
        folder: a folder of shards.
        hashes: compare SHA-256 as well as sizes (reads every byte).

    Returns:
        One line for each shard that is missing or differs; empty when all is well.

    Raises:
        FileNotFoundError, ValueError: as `read_manifest` does.
    """
    problems = []
    for shard in read_manifest(folder).shards:
        path = folder / shard.name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != shard.bytes:
            problems.append(f"{path}: expected {shard.bytes} bytes, got {path.stat().st_size}")
        elif hashes and (got := file_digest(path, "sha256").hex()) != shard.sha256:
            problems.append(f"{path}: expected sha256 {shard.sha256}, got {got}")
    return problems


def file_digest(path: Path, algorithm: str) -> bytes:
    """Digest of a file's bytes under one of hashlib's algorithms."""
    digest = hashlib.new(algorithm)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _with_unique_keys(samples: Iterable[Sample]) -> Iterable[Sample]:
    seen: set[str] = set()
    for sample in samples:
        if sample.key in seen:
            raise ValueError(f"key: expected distinct keys, got {sample.key!r} twice")
        seen.add(sample.key)
        yield sample


def _write_shard(path: Path, samples: Iterable[Sample]) -> ShardEntry | None:
    # Not webdataset.ShardWriter: it writes under the final name, so a failure leaves a cut shard
    # that looks complete, and it reads "%" in the folder's name as a pattern.
    temporary = path.with_suffix(".tar.partial")
    count = 0
    try:
        with temporary.open("wb") as file:
            count = _write_tar(file, samples)
        if count:
            entry = _entry(temporary, path.name, count)
            temporary.replace(path)
            return entry
    finally:
        temporary.unlink(missing_ok=True)
    return None


def _entry(path: Path, name: str, samples: int) -> ShardEntry:
    return ShardEntry(name, samples, path.stat().st_size, file_digest(path, "sha256").hex())


def _write_tar(file: IO[bytes], samples: Iterable[Sample]) -> int:
    count = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for sample in samples:
            notes = {"captions": list(sample.captions), "group": sample.group}
            notes |= {"label": sample.label} if sample.label else {}
            _add(archive, f"{sample.key}.{sample.extension}", sample.image)
            _add(archive, f"{sample.key}.txt", sample.captions[0].encode())
            _add(archive, f"{sample.key}.json", json.dumps(notes, ensure_ascii=False).encode())
            count += 1
    return count


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    # TarInfo's defaults are owner 0, time 0 and mode 644: equal samples give equal bytes.
    header = tarfile.TarInfo(name)
    header.size = len(data)
    archive.addfile(header, io.BytesIO(data))


def _write_manifest(manifest: Manifest, out_dir: Path) -> None:
    text = json.dumps({"format": MANIFEST_FORMAT, **asdict(manifest)}, indent=1, ensure_ascii=False)
    temporary = out_dir / f"{MANIFEST_NAME}.partial"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(out_dir / MANIFEST_NAME)
