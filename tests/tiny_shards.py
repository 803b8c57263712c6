"""Small shards, good and bad, and loaders over them."""

from __future__ import annotations

import gzip
import io
import itertools
import tarfile
from pathlib import Path

import torch
from PIL import Image

from gradcache_clip.train.data import Batch, ImageCaptionLoader, LoaderOptions
from gradcache_clip.train.sources.shards import Sample, write_shards


def picture(
    color: object = (200, 30, 60),
    *,
    kind: str = "PNG",
    mode: str = "RGB",
    size: tuple[int, int] = (8, 8),
) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind)  # type: ignore[arg-type]
    return file.getvalue()


def write(folder: Path, count: int, shard_size: int = 20) -> Path:
    samples = [
        Sample(f"k{i:04d}", picture((i % 256, i // 256, 9)), "png", (f"c{i}", f"d{i}"), f"g{i}")
        for i in range(count)
    ]
    write_shards(samples, folder, shard_size=shard_size, source="test", license="CC0-1.0")
    return folder


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def good(key: str) -> dict[str, bytes]:
    return {f"{key}.png": picture(), f"{key}.txt": f"caption of {key}".encode()}


def options(**changes: object) -> LoaderOptions:
    defaults = {"image_size": 8, "shuffle_buffer": 15}
    return LoaderOptions(**{**defaults, **changes})  # type: ignore[arg-type]


def loader(folder: Path | str, batch_size: int = 10, **changes: object) -> ImageCaptionLoader:
    return ImageCaptionLoader(folder, batch_size, options=options(**changes))


def take(stream: ImageCaptionLoader, count: int) -> list[Batch]:
    return list(itertools.islice(iter(stream), count))


def zipped(folder: Path, into: Path) -> Path:
    """The shards of a folder, compressed: these can only be streamed."""
    into.mkdir()
    for path in sorted(folder.glob("*.tar")):
        (into / path.name).write_bytes(gzip.compress(path.read_bytes()))
    return into


def same(a: Batch, b: Batch) -> bool:
    return (a.keys, a.captions, a.groups) == (b.keys, b.captions, b.groups) and torch.equal(
        a.images, b.images
    )
