"""The text-text set of negatives.py: Bible verses in the English of 1769 and of today."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from negatives_data import DataSet, HeldOut, Pairs, Unavailable, Vocabulary, stored, words

HELD_OUT = 3000

_BIBLES = ("KJV", "WEB")
_DEBIAN_PACKAGES = ("sword-text-kjv", "sword-text-web")
_READER = "pysword==0.2.8"
_RECIPE = f"{_BIBLES} through {_READER}, {HELD_OUT} held out, version 1"
_REMEDY = (
    "unpack the Debian packages sword-text-kjv and sword-text-web, so that {} holds their mods.d "
    "and modules"
)
Verse = tuple[str, str]


def load_verses(folder: Path) -> DataSet:
    """Verses of the King James and of the World English Bible as rows of words; 3,000 held out.

    Both texts are in the public domain. They are fetched as Debian packages and read once, which
    takes about a minute; the rows are kept in the folder.

    Raises:
        Unavailable: no apt-get and dpkg-deb to fetch the texts, or the package pysword is missing.
    """
    path = folder / "negatives" / "verses.safetensors"
    return stored(path, _RECIPE, partial(_make, folder / "negatives" / "sword"))


def _make(sword: Path) -> DataSet:
    try:
        from pysword.modules import SwordModules
    except ImportError as error:
        raise Unavailable(
            f"verses: expected the package pysword, got none; pip install {_READER}"
        ) from error
    if not (sword / "mods.d").exists():
        _fetch(sword)
    modules = SwordModules(str(sword))
    keys = module_keys(modules.parse_modules(), sword)
    old, new = (dict(_read(modules.get_bible_from_module(key))) for key in keys)
    return split(list(distinct(old, new)))


def module_keys(found: Mapping[str, Mapping[str, str]], sword: Path) -> list[str]:
    """The key of each Bible in a SWORD folder: its abbreviation, or what goes by it.

    Example:
        >>> found = {"engWEB2015eb": {"abbreviation": "WEB"}, "KJV": {}}
        >>> module_keys(found, Path())
        ['KJV', 'engWEB2015eb']
    """
    known = {settings.get("abbreviation", key): key for key, settings in found.items()}
    if missing := [name for name in _BIBLES if name not in known]:
        raise Unavailable(
            f"verses: expected modules that go by {' and '.join(_BIBLES)}, got none for "
            f"{' and '.join(missing)}; {_REMEDY.format(sword)}"
        )
    return [known[name] for name in _BIBLES]


def _read(bible: Any) -> Iterator[tuple[tuple[str, int, int], str]]:
    """Place and text of every verse; a place that this Bible leaves out has none."""
    for book in (
        *bible.get_structure().get_books()["ot"],
        *bible.get_structure().get_books()["nt"],
    ):
        for chapter, verses in enumerate(book.chapter_lengths, start=1):
            for verse in range(1, verses + 1):
                text = bible.get(books=[book.name], chapters=[chapter], verses=[verse])
                yield (book.name, chapter, verse), text


def distinct(old: dict[Any, str], new: dict[Any, str]) -> Iterator[Verse]:
    """Both texts of each place that both have, where neither text stands at another place too.

    Without the repeated ones ("And the LORD spake unto Moses, saying,") every other verse is a
    negative.

    Example:
        >>> list(distinct({1: "So be it.", 2: "Amen", 3: "Amen"}, {1: "May it be", 2: "a", 3: "b"}))
        [('So be it.', 'May it be')]
    """
    places = [place for place in old if words(old[place]) and words(new.get(place, ""))]
    counts = [Counter(tuple(words(text[place])) for place in places) for text in (old, new)]
    for place in places:
        verse = old[place], new[place]
        if all(count[tuple(words(text))] == 1 for count, text in zip(counts, verse, strict=True)):
            yield verse


def split(verses: Sequence[Verse], held_out: int = HELD_OUT) -> DataSet:
    """Words of both languages as numbers; which verses are held out is drawn once and for all."""
    shuffled = random.Random("verses").sample(verses, len(verses))
    kept, rest = _columns(shuffled[held_out:]), _columns(shuffled[:held_out])
    numbering = [Vocabulary(texts) for texts in kept]
    train, test = (
        [vocabulary.rows(texts) for vocabulary, texts in zip(numbering, part, strict=True)]
        for part in (kept, rest)
    )
    ids = torch.arange(held_out)
    return DataSet(Pairs(*train, torch.arange(len(kept[0]))), HeldOut(*test, ids, ids.clone()))


def _columns(verses: Iterable[Verse]) -> tuple[list[str], list[str]]:
    old, new = zip(*verses, strict=True)
    return list(old), list(new)


def _fetch(sword: Path) -> None:
    """Download both packages and take their usr/share/sword."""
    tools = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if tools:
        raise Unavailable(
            f"verses: expected apt-get and dpkg-deb on the PATH, got no {' and no '.join(tools)}; "
            + _REMEDY.format(sword)
        )
    sword.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=sword.parent) as name:
        folder = Path(name)
        _call(["apt-get", "download", *_DEBIAN_PACKAGES], folder, sword)
        for package in folder.glob("*.deb"):
            _call(["dpkg-deb", "-x", package.name, "unpacked"], folder, sword)
        (folder / "unpacked" / "usr" / "share" / "sword").rename(sword)


def _call(command: list[str], folder: Path, sword: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:]
        raise Unavailable(
            f"verses: {command[0]} {command[1]}: expected exit code 0, got {done.returncode} "
            f"({said}); run apt-get update, or {_REMEDY.format(sword)}"
        )
