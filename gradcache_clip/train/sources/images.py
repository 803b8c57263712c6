"""Image files of a person's own: checked, read as they are, and turned into samples."""

from __future__ import annotations

import hashlib
import io
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gradcache_clip.train.data.decode import (
    MAX_CAPTION_CHARACTERS,
    MAX_MEMBER_BYTES,
    BrokenSample,
    decode_image,
)
from gradcache_clip.train.sources.shards import Sample
from gradcache_clip.train.sources.splits import SkippedSample

_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


@dataclass(frozen=True)
class CaptionedFile:
    """An image file with its captions; `name` is its path as the person wrote it."""

    path: Path
    name: str
    captions: tuple[str, ...]
    group_name: str = ""

    @property
    def group(self) -> str:
        """`group_name`, or one for all images of the same first caption: they match each other, and
        stay on one side of a split."""
        if self.group_name:
            return self.group_name
        words = " ".join(self.captions[0].casefold().split()) if self.captions else self.name
        # Half a surrogate pair has a group too: its sample is left out later, and stops no other.
        return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def load_file(file: CaptionedFile, split: str) -> Sample:
    """The sample of an image file, its bytes unchanged.

    Raises:
        SkippedSample: no caption, one that is no text, no file, or no image that can be decoded.
    """
    del split
    if not file.captions:
        raise SkippedSample("missing caption")
    if max(map(len, file.captions)) > MAX_CAPTION_CHARACTERS:
        raise SkippedSample("caption too long")
    try:
        "".join((*file.captions, file.group_name)).encode()
    # Half a surrogate pair, which JSON can hold and no file.
    except UnicodeEncodeError as error:
        raise SkippedSample("bad utf-8") from error
    try:
        data = _read(file.path)
        decode_image(data)
    # ValueError: a name with a null character.
    except (OSError, ValueError) as error:
        raise SkippedSample("missing image") from error
    except BrokenSample as error:
        raise SkippedSample(str(error)) from error
    with Image.open(io.BytesIO(data)) as image:
        extension = _EXTENSIONS[str(image.format)]
    return Sample(_key(file.name), data, extension, file.captions, file.group)


def _read(path: Path) -> bytes:
    """The bytes of a plain file: a device or a pipe may never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BrokenSample("not a plain file")
    if status.st_size > MAX_MEMBER_BYTES:
        raise BrokenSample("image too large")
    return path.read_bytes()


def fingerprint(files: Iterable[Path]) -> str:
    """Digest of the names, sizes and times of files: whether an earlier output still holds."""
    digest = hashlib.sha256()
    for path in files:
        found = path.stat() if path.is_file() else None
        facts = (str(path), found.st_size, found.st_mtime_ns) if found else (str(path),)
        digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]


def stripped(captions: Sequence[str]) -> tuple[str, ...]:
    """Captions without surrounding space, blank and repeated ones left out."""
    return tuple(dict.fromkeys(c.strip() for c in captions if c.strip()))


def _key(name: str) -> str:
    """A key that shows the file's name and differs where two names differ."""
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_")[-60:]
    # Names of files need not be UTF-8.
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{readable}-{digest[:10]}".lstrip("-_")
