"""Emoji of three vendors with their names: 10,944 image-caption pairs, fetched through npm.

python examples/data/emoji.py data/emoji
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from npm import NpmPackage, default_cache_dir, fetch_packages, read_members
from script import maker_parser, run_maker

from gradcache_clip.train.sources import (
    DataSummary,
    Recipe,
    Sample,
    finished_output,
    track,
    write_splits,
)

NAMES = NpmPackage(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
GOOGLE = NpmPackage(
    "emoji-datasource-google",
    "16.0.0",
    "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
)
TWITTER = NpmPackage(
    "emoji-datasource-twitter",
    "16.0.0",
    "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
)
FLUENT = NpmPackage(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
PACKAGES = (NAMES, GOOGLE, TWITTER, FLUENT)

LICENSE = "Apache-2.0 (google), CC-BY-4.0 (twitter), MIT (fluent, names); see LICENSES.txt"
LICENSES_TEXT = """\
The images and captions beside this file come from four sources. Keep this notice with them.

google-*   Noto Emoji, copyright Google LLC. Apache License 2.0.
           https://github.com/googlefonts/noto-emoji
           https://www.apache.org/licenses/LICENSE-2.0
twitter-*  Twemoji, copyright Twitter, Inc and other contributors. Graphics under CC-BY 4.0.
           https://github.com/twitter/twemoji
           https://creativecommons.org/licenses/by/4.0/
fluent-*   Fluent Emoji, copyright Microsoft Corporation. MIT License.
           https://github.com/microsoft/fluentui-emoji
captions   emojibase-data, copyright Miles Johnson. MIT License.
           https://github.com/milesj/emojibase

Collected from the npm packages {packages}.
The images are unchanged.
"""


@dataclass(frozen=True)
class _Vendor:
    name: str
    package: str
    members: str


_VENDORS = (
    _Vendor("google", GOOGLE.name, r"package/img/google/64/([0-9a-f_-]+)\.(png)"),
    _Vendor("twitter", TWITTER.name, r"package/img/twitter/64/([0-9a-f_-]+)\.(png)"),
    _Vendor("fluent", FLUENT.name, r"package/assets/([0-9a-f_-]+)\.(webp)"),
)


@dataclass(frozen=True)
class _Name:
    label: str
    tags: tuple[str, ...]
    base: str
    subgroup: str


@dataclass(frozen=True)
class _Picture:
    vendor: str
    hexcode: str
    extension: str
    image: bytes


def make_emoji(
    out: Path,
    *,
    cache_dir: Path | None = None,
    validation_share: float = 0.15,
    seed: int = 0,
    packages: Sequence[NpmPackage] = PACKAGES,
) -> DataSummary:
    """Make shards of the emoji of Google, Twitter and Microsoft, captioned with their names.

    The split is by base emoji: skin tones and vendors of one emoji stay on one side. The group of
    a sample is its code point sequence, so the pictures of one name by several vendors match each
    other. The first caption is the name ("weary face"); training samples have a second one, the
    name followed by search words ("weary face: tired, sad"). The label is the subgroup of the
    Unicode emoji list ("face-unwell"), where it has one.

    Args:
        out: gets train/, validation/ and LICENSES.txt. A complete output is returned at once.
        cache_dir: keeps the downloads (158 MB); by default the user's cache folder.
        validation_share: share of the base emoji to hold out.
        seed: of the split and of the order.
        packages: the pinned tarballs to read.

    Raises:
        FileNotFoundError: npm is needed and missing.
        RuntimeError: a download failed or its digest differs.
        ValueError: `out` holds shards made with other settings.
    """
    recipe = Recipe(
        source="emoji: " + ", ".join(f"{p.name}@{p.version}" for p in packages),
        license=LICENSE,
        validation_share=validation_share,
        seed=seed,
        settings={"packages": {p.name: p.sha512 for p in packages}, "labels": "subgroups"},
    )
    if summary := finished_output(out, recipe):
        return summary
    tarballs = fetch_packages(packages, cache_dir or default_cache_dir())
    names = _read_names(tarballs[NAMES.name])
    pictures = list(_read_pictures(tarballs, names))
    out.mkdir(parents=True, exist_ok=True)
    (out / "LICENSES.txt").write_text(_licenses(packages), encoding="utf-8")
    return write_splits(
        pictures,
        lambda picture, split: _sample(picture, names[picture.hexcode], split),
        out,
        split_by=lambda picture: names[picture.hexcode].base,
        recipe=recipe,
    )


def _sample(picture: _Picture, name: _Name, split: str) -> Sample:
    captions = [name.label]
    # Evaluation asks for the name alone; in training the search words teach more of the language.
    if split == "train" and name.tags:
        captions.append(f"{name.label}: {', '.join(name.tags)}")
    return Sample(
        key=f"{picture.vendor}-{picture.hexcode}",
        image=picture.image,
        extension=picture.extension,
        captions=tuple(captions),
        group=picture.hexcode,
        label=name.subgroup,
    )


def _read_names(tarball: Path) -> dict[str, _Name]:
    members = read_members(tarball, r"package/(en/data|meta/groups)\.json")
    tables = {match[1]: json.loads(data) for match, data in members}
    subgroups, names = tables["meta/groups"]["subgroups"], {}
    for row in tables["en/data"]:
        base, tags = _hexcode(row["hexcode"]), tuple(row.get("tags", ()))
        subgroup = subgroups.get(str(row.get("subgroup")), "")
        for variant in (row, *row.get("skins", ())):
            names[_hexcode(variant["hexcode"])] = _Name(variant["label"], tags, base, subgroup)
    return names


def _read_pictures(tarballs: Mapping[str, Path], names: Mapping[str, _Name]) -> Iterator[_Picture]:
    for vendor in track(_VENDORS, "reading emoji"):
        seen = set()
        for match, image in read_members(tarballs[vendor.package], vendor.members):
            hexcode = _hexcode(match[1])
            # A few pictures come twice, with and without the variation selector.
            if hexcode in names and hexcode not in seen:
                seen.add(hexcode)
                yield _Picture(vendor.name, hexcode, match[2], image)


def _hexcode(text: str) -> str:
    """Upper case without the variation selector FE0F, which vendors set differently."""
    parts = text.upper().replace("_", "-").split("-")
    return "-".join(part for part in parts if part != "FE0F")


def _licenses(packages: Sequence[NpmPackage]) -> str:
    listed = ", ".join(f"{p.name}@{p.version}" for p in packages)
    return LICENSES_TEXT.format(packages=listed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script."""
    parser = maker_parser(__doc__, validation_share=0.15)
    text = "keeps the download of 158 MB (default: the user's cache folder)"
    parser.add_argument("--cache-dir", type=Path, help=text)
    return run_maker(make_emoji, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
