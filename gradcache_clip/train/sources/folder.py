"""Shards from a folder of images with a text file of the same stem beside each."""

from __future__ import annotations

from pathlib import Path

from gradcache_clip.train.data.decode import IMAGE_EXTENSIONS
from gradcache_clip.train.sources.images import (
    CaptionedFile,
    fingerprint,
    load_file,
    stripped,
)
from gradcache_clip.train.sources.splits import (
    DataSummary,
    Recipe,
    finished_output,
    write_splits,
)


def make_folder(
    folder: Path, out: Path, *, validation_share: float = 0.1, seed: int = 0
) -> DataSummary:
    """Make shards of images such as cat.jpg with captions in cat.txt, one a line.

    Subfolders count. The bytes of the images are copied as they are. Images without a caption and
    images that do not decode are left out, counted, and listed in the manifest by reason.

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
    texts = [text for image in images if (text := image.with_suffix(".txt")).is_file()]
    recipe = Recipe(
        source=f"folder: {folder.resolve().name}",
        license="not stated",
        validation_share=validation_share,
        seed=seed,
        settings={"fingerprint": fingerprint([*images, *texts])},
    )
    if summary := finished_output(out, recipe):
        return summary
    files = [_captioned(image, folder) for image in images]
    return write_splits(files, load_file, out, split_by=lambda file: file.group, recipe=recipe)


def _images(folder: Path) -> list[Path]:
    suffixes = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)


def _captioned(image: Path, folder: Path) -> CaptionedFile:
    text = image.with_suffix(".txt")
    lines = text.read_bytes().decode("utf-8-sig", "replace").splitlines() if text.is_file() else []
    return CaptionedFile(image, image.relative_to(folder).as_posix(), stripped(lines))
