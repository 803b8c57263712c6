"""Shards from COCO's captions: its own annotation files, or the splits of Karpathy and Fei-Fei."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

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
    write_named_splits,
    write_splits,
)

_LICENSE = "COCO: annotations CC-BY-4.0, images under the Flickr terms of use"
_UNLISTED = "caption of no listed image"
# A file need not have all of them.
_USUAL_NAMES = {"train", "restval", "val", "test"}

_Names = dict[str, list[str]]


@dataclass(frozen=True)
class CocoSplits:
    """Which splits of a Karpathy file go into which folder.

    "restval" are the images of COCO's validation set that are neither in "val" nor in "test"; by
    custom they are trained on, which makes 113,287 training images.

    Args:
        train, validation, test: names of splits; a folder without images is not written.

    Raises:
        ValueError: one name stands in two places.
    """

    train: tuple[str, ...] = ("train", "restval")
    validation: tuple[str, ...] = ("val",)
    test: tuple[str, ...] = ("test",)

    def __post_init__(self) -> None:
        names = [name for _, listed in self.folders() for name in listed]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"splits: expected each name in train, validation or test, got {twice[0]!r} "
                "in several; held-out images must not be trained on"
            )

    def folders(self) -> list[tuple[str, tuple[str, ...]]]:
        """Folder and names, training last."""
        return [(name, getattr(self, name)) for name in ("validation", "test", "train")]


@dataclass(frozen=True)
class _Entry:
    """An image of the file, the split that it names, and why it is left out, if it is."""

    file: CaptionedFile
    split: str = ""
    refused: str = ""


def make_coco(
    annotations: Path,
    images: Path,
    out: Path,
    *,
    splits: CocoSplits | None = None,
    validation_share: float | None = None,
    seed: int = 0,
) -> DataSummary:
    """Make shards of COCO images with all their captions; the group of a sample is its image's id.

    Two formats are read. Of COCO's own files (captions_train2017.json: `images` and `annotations`)
    a share of the images is held out. A file with splits (dataset_coco.json, dataset_flickr30k.json
    and others: `images` with `split` and `sentences`) says itself what is trained on, validated and
    tested; held-out images keep the order of the file, in which the 1K protocol folds them.

    Images without a caption, missing and undecodable ones, and captions of images that are not
    listed, are left out, counted, and listed in the manifest by reason.

    Args:
        annotations: the JSON file.
        images: folder of the images, below which `file_name` (or `filepath` and `filename`) lies.
            Links in it are followed; names that lead out of it are refused.
        out: gets train/, validation/ and, of a file with splits, test/. A complete output of the
            same files is returned at once.
        splits: which splits of the file go where; `CocoSplits()` when None.
        validation_share: share of the images to hold out of COCO's own files; 0.1 when None.
        seed: of that choice and of the order of training samples.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: another kind of JSON, an image listed twice, a name that leads out of `images`,
            no image to train on, an option of the other format, or `out` holds other shards.

    Source:
        Chen et al. 2015 (captions); Karpathy and Fei-Fei 2015 (splits).
    """
    if not images.is_dir():
        raise FileNotFoundError(f"images: expected a folder, got {str(images)!r}")
    data = _read(annotations)
    if "annotations" in data:
        if splits is not None:
            raise _of_the_other_format("splits", "with splits", annotations)
        entries = _coco_entries(data, images)
        share = 0.1 if validation_share is None else validation_share
        recipe = _recipe(annotations, entries, seed, share, {})
        return finished_output(out, recipe) or write_splits(
            entries, _load, out, split_by=lambda entry: entry.file.group, recipe=recipe
        )
    if validation_share is not None:
        raise _of_the_other_format("validation_share", "of COCO's own format", annotations)
    chosen = _by_folder(_split_entries(data, images), splits or CocoSplits())
    everything = [entry for entries in chosen.values() for entry in entries]
    names = {folder: _names_of(listed) for folder, listed in chosen.items()}
    recipe = _recipe(annotations, everything, seed, 0.0, names)
    return finished_output(out, recipe) or write_named_splits(chosen, _load, out, recipe=recipe)


def _recipe(
    annotations: Path, entries: Sequence[_Entry], seed: int, share: float, splits: _Names
) -> Recipe:
    _check_distinct(entries)
    files = [annotations, *(entry.file.path for entry in entries)]
    settings = {"fingerprint": fingerprint(files), "splits": splits}
    source = f"coco: {annotations.name}"
    return Recipe(source, _LICENSE, share, seed, settings, named=(*splits,))


def _names_of(entries: Sequence[_Entry]) -> list[str]:
    return sorted({entry.split for entry in entries})


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"annotations: expected a file, got {str(path)!r}")
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"annotations: expected JSON in {path}, got {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("images"), list):
        raise ValueError(
            f"annotations: expected an object with a list 'images' in {path}, got another; pass "
            "captions_train2017.json or dataset_coco.json"
        )
    return data


def _coco_entries(data: Mapping[str, Any], folder: Path) -> list[_Entry]:
    """Of COCO's own format, in the order of its images; captions of others behind them."""
    captions: dict[str, list[str]] = {}
    listed = data["annotations"]
    for place, note in _objects(listed, "annotations"):
        ident = str(_field(note, "image_id", (int, str), place))
        captions.setdefault(ident, []).append(_field(note, "caption", str, place))
    entries = []
    for place, image in _objects(data["images"], "images"):
        ident = str(_field(image, "id", (int, str), place))
        name = _field(image, "file_name", str, place)
        entries.append(_Entry(_file(folder, name, captions.pop(ident, ()), ident, place)))
    unlisted = (text for texts in captions.values() for text in texts)
    return entries + [
        _Entry(CaptionedFile(folder, "", (text,), f"caption {n}"), refused=_UNLISTED)
        for n, text in enumerate(unlisted)
    ]


def _split_entries(data: Mapping[str, Any], folder: Path) -> list[_Entry]:
    """Of a file with splits, in its order."""
    entries = []
    for number, (place, image) in enumerate(_objects(data["images"], "images")):
        parts = [_field(image, "filename", str, place)]
        if "filepath" in image:
            parts.insert(0, _field(image, "filepath", str, place))
        sentences = _objects(_field(image, "sentences", list, place), f"{place}.sentences")
        captions = [_field(sentence, "raw", str, where) for where, sentence in sentences]
        ident = str(image.get("cocoid", image.get("imgid", number)))
        split = _field(image, "split", str, place)
        name = "/".join(part for part in parts if part)
        entries.append(_Entry(_file(folder, name, captions, ident, place), split))
    return entries


def _objects(listed: Any, name: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if not isinstance(listed, list):
        raise ValueError(f"{name}: expected a list of objects, got {type(listed).__name__}")
    for number, entry in enumerate(listed):
        if not isinstance(entry, dict):
            raise ValueError(f"{name}[{number}]: expected an object, got {str(entry)[:60]!r}")
        yield f"{name}[{number}]", entry


def _field(entry: Mapping[str, Any], name: str, kind: Any, place: str) -> Any:
    value = entry.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(each.__name__ for each in kinds)
        got = "none" if value is None else type(value).__name__
        raise ValueError(f"{place}.{name}: expected {expected}, got {got}; correct the file")
    return value


def _file(
    folder: Path, name: str, captions: Sequence[str], ident: str, place: str
) -> CaptionedFile:
    """The image file that an entry names, which must lie below the folder."""
    # A file from a stranger could name any other on this machine, in the manner of either system.
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or PureWindowsPath(name).drive or not parts.name:
        raise ValueError(
            f"{place}: expected the name of a file below the folder of images, got {name!r}; "
            "correct the file, or leave that image out"
        )
    return CaptionedFile(folder / name, name, stripped(captions), group_name=ident)


def _check_distinct(entries: Sequence[_Entry]) -> None:
    """An image that is listed twice could be trained on and held out."""
    for what in ("group_name", "path"):
        seen: set[Any] = set()
        for entry in entries:
            value = getattr(entry.file, what)
            if not entry.refused and value in seen:
                raise ValueError(
                    f"images: expected each image once, got {entry.file.name!r} (id "
                    f"{entry.file.group_name}) whose {'id' if what == 'group_name' else 'file'} "
                    "another has; correct the file"
                )
            seen.add(value)


def _by_folder(entries: Sequence[_Entry], splits: CocoSplits) -> dict[str, list[_Entry]]:
    """Entries by the folder that they go to, folders without any left out."""
    there = _names_of(entries)
    asked = {name for _, names in splits.folders() for name in names}
    unknown = sorted(asked - {*there} - _USUAL_NAMES)
    chosen = {
        folder: found
        for folder, names in splits.folders()
        if (found := [entry for entry in entries if entry.split in names])
    }
    if unknown or "train" not in chosen:
        got = repr(unknown[0]) if unknown else ", ".join(splits.train) or "none"
        raise ValueError(
            f"splits: expected names that the file has ({', '.join(there) or 'none'}) and "
            f"images to train on, got {got}; name them with CocoSplits, or --train-split, "
            "--validation-split and --test-split"
        )
    return chosen


def _load(entry: _Entry, split: str) -> Sample:
    if entry.refused:
        raise SkippedSample(entry.refused)
    return load_file(entry.file, split)


def _of_the_other_format(name: str, kind: str, annotations: Path) -> ValueError:
    return ValueError(
        f"{name}: expected none except for a file {kind}, got some for {annotations.name}; "
        "leave it out"
    )
