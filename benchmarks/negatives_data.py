"""What negatives.py trains on, as tensors: pairs, a part held out, and the file that keeps both.

N pairs for training, P and Q rows held out on the two sides, L words a text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

_DECODED_AT_ONCE = 64


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
