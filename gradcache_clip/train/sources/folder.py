"""Shards from a folder of images with a text file of the same stem beside each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gradcache_clip.train.data.decode import IMAGE_EXTENSIONS, MAX_TEXT_BYTES, BrokenSample
from gradcache_clip.train.sources.images import (
    CaptionedFile,
    fingerprint,
    load_file,
    stripped,
)
from gradcache_clip.train.sources.shards import Sample
from gradcache_clip.train.sources.splits import (
    DataSummary,
    Recipe,
    SkippedSample,
    finished_output,
    write_splits,
)

# Images too, but shards hold none of them; one with a caption beside it was meant to be used.
_UNSUPPORTED = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".tif", ".tiff"}
)


@dataclass(frozen=True)
class _FolderImage:
    """An image of the folder; `refused` is the reason to leave it out, if there is one."""

    file: CaptionedFile
    refused: str = ""


def make_folder(
    folder: Path, out: Path, *, validation_share: float = 0.1, seed: int = 0
) -> DataSummary:
    """Make shards of images such as cat.jpg with captions in cat.txt, one a line.

    Subfolders count. The bytes of the images are copied as they are. Images that have no caption,
    do not decode, or whose captions are not UTF-8 are left out, counted, and listed in the manifest
    by reason; so are images of other formats (GIF, BMP, TIFF and others) with a text beside them.

    Args:
        folder: where the images are.
        out: gets train/ and validation/. A complete output of the same files is returned at once.
        validation_share: share to hold out; images of the same first caption stay on one side.
        seed: of the split and of the order.

    Raises:
        FileNotFoundError: the folder is missing.
        ValueError: it holds no usable image, or `out` holds shards of other files or settings.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: expected a folder of images, got {str(folder)!r}")
    images = _images(folder)
    if not images:
        raise ValueError(
            f"folder: expected images ({', '.join(IMAGE_EXTENSIONS)}) in {folder}, got none; "
            "put cat.jpg and cat.txt there, or make shards from a table"
        )
    texts = [text for image in images if (text := _text_of(image)).is_file()]
    recipe = Recipe(
        source=f"folder: {folder.resolve().name}",
        license="not stated",
        validation_share=validation_share,
        seed=seed,
        settings={"fingerprint": fingerprint([*images, *texts])},
    )
    if summary := finished_output(out, recipe):
        return summary
    records = [_read(image, folder) for image in images]
    return write_splits(records, _load, out, split_by=lambda r: r.file.group, recipe=recipe)


def _images(folder: Path) -> list[Path]:
    """Images that shards can hold, and those of other formats that have a text."""
    supported = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    return sorted(
        path
        for path in folder.rglob("*")
        if (suffix := path.suffix.lower()) in supported
        or (suffix in _UNSUPPORTED and _text_of(path).is_file())
    )


def _text_of(image: Path) -> Path:
    return image.with_suffix(".txt")


def _read(image: Path, folder: Path) -> _FolderImage:
    text, name, suffix = _text_of(image), image.relative_to(folder).as_posix(), image.suffix.lower()
    if suffix in _UNSUPPORTED:
        return _FolderImage(CaptionedFile(image, name, ()), f"unsupported format {suffix}")
    try:
        lines = _lines(text) if text.is_file() else []
    except UnicodeDecodeError:
        return _FolderImage(CaptionedFile(image, name, ()), "bad utf-8")
    except OSError:
        return _FolderImage(CaptionedFile(image, name, ()), "unreadable caption")
    except BrokenSample as error:
        return _FolderImage(CaptionedFile(image, name, ()), str(error))
    return _FolderImage(CaptionedFile(image, name, stripped(lines)))


def _lines(text: Path) -> list[str]:
    if text.stat().st_size > MAX_TEXT_BYTES:
        raise BrokenSample("caption too long")
    return text.read_text(encoding="utf-8-sig").splitlines()


def _load(image: _FolderImage, split: str) -> Sample:
    if image.refused:
        raise SkippedSample(image.refused)
    return load_file(image.file, split)
