"""From records to OUT/train and OUT/validation: the part that all makers of shards share."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gradcache_clip.train.sources.shards import (
    MANIFEST_NAME,
    Manifest,
    Origin,
    Sample,
    read_manifest,
    verify_manifest,
    write_shards,
)

Record = TypeVar("Record")
Row = TypeVar("Row")


class SkippedSample(Exception):
    """A record that gives no sample; the message is the reason that is counted."""


@dataclass(frozen=True)
class Recipe:
    """What a set is made from and how; a finished output of an equal recipe is used as it is.

    Args:
        source: what the samples are made from.
        license: terms of use of the images and captions.
        validation_share: share of the split names that goes to OUT/validation; 0 for none.
        seed: of the split and of the order of the samples.
        settings: anything else on which the shards depend.
        named: splits that the records name themselves, in the place of a share; training last.
    """

    source: str
    license: str
    validation_share: float
    seed: int
    settings: Mapping[str, Any]
    named: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ValueError(
                f"validation_share: expected a number from 0 up to 1, got {self.validation_share}; "
                "pass e.g. validation_share=0.1"
            )

    @property
    def all_settings(self) -> dict[str, Any]:
        """Settings as the manifest records them."""
        return {
            "validation_share": self.validation_share,
            "seed": self.seed,
            **self.settings,
        }

    @property
    def splits(self) -> tuple[str, ...]:
        """Folders to write; training last, so that it stands for a complete output."""
        return self.named or (("validation", "train") if self.validation_share else ("train",))


@dataclass(frozen=True)
class DataSummary:
    """What a maker of shards left in its output folder.

    Args:
        out: the folder, with train/ and, where anything is held out, validation/ and test/.
        train_samples: image-caption pairs for training.
        validation_samples: held-out pairs.
        skipped: records left out, by reason.
        shards: files in both folders.
        bytes: size of all shards.
        reused: whether the output was complete before.
        test_samples: pairs of a test set, where the records name one.
    """

    out: Path
    train_samples: int
    validation_samples: int
    skipped: Mapping[str, int]
    shards: int
    bytes: int
    reused: bool
    test_samples: int = 0

    def __str__(self) -> str:
        test = f", {self.test_samples:,} test" if self.test_samples else ""
        done = "already there" if self.reused else "written"
        made = (
            f"{self.out}: {self.train_samples:,} training{test} and "
            f"{self.validation_samples:,} held-out pairs in {self.shards} shards "
            f"({self.bytes / 1e6:.0f} MB), {done}"
        )
        skipped = (f"skipped {count:,}: {reason}" for reason, count in self.skipped.items())
        return "\n".join((made, *skipped))


def finished_output(out: Path, recipe: Recipe) -> DataSummary | None:
    """The summary of a complete output of this recipe, or None where there is work to do.

    Raises:
        ValueError: the folder holds shards of another recipe, which are never overwritten.
    """
    manifests: dict[str, Manifest] = {}
    for split in ("validation", "test", "train"):
        if (out / split / MANIFEST_NAME).exists():
            manifests[split] = read_manifest(out / split)
            _check_same(out / split, manifests[split], recipe)
    if set(manifests) != set(recipe.splits):
        return None
    if any(verify_manifest(out / split) for split in manifests):
        return None
    return _summary(out, manifests, reused=True)


def write_splits(
    records: Sequence[Record],
    load: Callable[[Record, str], Sample],
    out: Path,
    *,
    split_by: Callable[[Record], str],
    recipe: Recipe,
) -> DataSummary:
    """Split records by name, shuffle them, and write OUT/validation and OUT/train.

    Args:
        records: one for each sample; they need not hold the image.
        load: makes the sample of a record for a split ("train" or "validation"); raises
            `SkippedSample` for one to leave out.
        out: folder of the two splits.
        split_by: records of equal name stay on one side.
        recipe: the manifests' origin, the share and the seed.

    Raises:
        ValueError: no records, none that loads, or too few names to split.
    """
    validation = _validation_names({split_by(record) for record in records}, recipe)
    order = random.Random(f"{recipe.seed}:order").sample(range(len(records)), len(records))
    manifests = {}
    for split in recipe.splits:
        held_out = split == "validation"
        chosen = [records[i] for i in order if (split_by(records[i]) in validation) == held_out]
        manifests[split] = _write_split(chosen, load, out / split, recipe)
    return _summary(out, manifests, reused=False)


def write_named_splits(
    records: Mapping[str, Sequence[Record]],
    load: Callable[[Record, str], Sample],
    out: Path,
    *,
    recipe: Recipe,
) -> DataSummary:
    """Write a folder for each split: "train" shuffled, the others in the order of the records.

    Args:
        records: of each of `recipe.named`.
        load, out: as for `write_splits`.
        recipe: the manifests' origin, and the seed.

    Raises:
        ValueError: a split none of whose records loads.
    """
    manifests = {}
    for split in recipe.splits:
        chosen = records[split]
        if split == "train":
            chosen = random.Random(f"{recipe.seed}:order").sample(chosen, len(chosen))
        manifests[split] = _write_split(chosen, load, out / split, recipe)
    return _summary(out, manifests, reused=False)


def track(rows: Iterable[Row], description: str, total: int | None = None) -> Iterator[Row]:
    """Pass rows on under a progress bar on the error stream, where that is a terminal."""
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    hidden = not console.is_terminal
    yield from rich_track(rows, description, total, console=console, disable=hidden)


def _write_split(
    records: Sequence[Record], load: Callable[[Record, str], Sample], folder: Path, recipe: Recipe
) -> Manifest:
    skipped: Counter[str] = Counter()

    def load_or_count(record: Record) -> Sample | None:
        try:
            return load(record, folder.name)
        except SkippedSample as reason:
            skipped[str(reason)] += 1
            return None

    loaded = map(load_or_count, track(records, f"writing {folder.name}"))
    samples = (sample for sample in loaded if sample is not None)
    origin = Origin(settings=recipe.all_settings, skipped=skipped)
    try:
        return write_shards(
            samples, folder, source=recipe.source, license=recipe.license, origin=origin
        )
    except ValueError as error:
        if sum(skipped.values()) < len(records):
            raise
        raise ValueError(
            f"{recipe.source}: expected an image that can be used, all {len(records)} records for "
            f"{folder.name} were left out: {dict(skipped)}"
        ) from error


def _validation_names(names: set[str], recipe: Recipe) -> set[str]:
    if not names:
        raise ValueError(f"{recipe.source}: expected at least one record, got none")
    if not recipe.validation_share:
        return set()
    if len(names) < 2:
        raise ValueError(
            f"{recipe.source}: expected two groups or more to hold some out, got {len(names)}; "
            "pass validation_share=0"
        )
    count = min(max(1, round(recipe.validation_share * len(names))), len(names) - 1)
    return set(random.Random(f"{recipe.seed}:split").sample(sorted(names), count))


def _check_same(folder: Path, manifest: Manifest, recipe: Recipe) -> None:
    expected = {"source": recipe.source, **recipe.all_settings}
    got = {"source": manifest.source, **manifest.settings}
    if expected != got:
        names = sorted(k for k in expected.keys() | got.keys() if expected.get(k) != got.get(k))
        raise ValueError(
            f"{folder}: expected shards of {_pick(expected, names)}, got shards of "
            f"{_pick(got, names)}; choose another output folder or delete this one"
        )


def _pick(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: settings.get(name) for name in names}


def _summary(out: Path, manifests: Mapping[str, Manifest], *, reused: bool) -> DataSummary:
    skipped: Counter[str] = Counter()
    for manifest in manifests.values():
        skipped.update(manifest.skipped)
    return DataSummary(
        out=out,
        train_samples=manifests["train"].samples,
        validation_samples=_samples_in(manifests, "validation"),
        skipped=dict(skipped),
        shards=sum(len(manifest.shards) for manifest in manifests.values()),
        bytes=sum(manifest.bytes for manifest in manifests.values()),
        reused=reused,
        test_samples=_samples_in(manifests, "test"),
    )


def _samples_in(manifests: Mapping[str, Manifest], split: str) -> int:
    return manifests[split].samples if split in manifests else 0
