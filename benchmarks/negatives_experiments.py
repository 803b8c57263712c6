"""The data sets of negatives.py, each with its towers and settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from negatives_data import DataSet, Pairs
from negatives_images import load_emoji, load_glyphs
from negatives_models import Towers, images_and_bags, two_bags, two_heads
from negatives_verses import load_verses


@dataclass(frozen=True)
class Experiment:
    """One panel of the picture."""

    title: str
    held_out: str
    """What is retrieved, in words."""
    sides: tuple[str, str]
    towers: str
    """What they are, in words."""
    load: Callable[[Path], DataSet]
    """From the folder that keeps the data; raises `Unavailable`."""
    build: Callable[[Pairs], Towers]
    """New towers for data of this shape."""
    learning_rate: float
    steps: int
    chunk_size: int


EXPERIMENTS = {
    "emoji": Experiment(
        title="Emoji and their names",
        held_out="emoji of which no variant was seen",
        sides=("image", "name"),
        towers="heads with 512 hidden units on frozen EfficientNet-Lite0 and MiniLM-L6",
        load=load_emoji,
        build=two_heads,
        learning_rate=1e-3,
        steps=300,
        chunk_size=16,
    ),
    "verses": Experiment(
        title="Bible verses in old and new English",
        held_out="3,000 verses not seen",
        sides=("1769", "today"),
        towers="mean of 256-wide word vectors, projected, from scratch",
        load=load_verses,
        build=two_bags,
        learning_rate=3e-3,
        steps=300,
        # Every chunk adds a gradient as large as its whole table of words.
        chunk_size=128,
    ),
    "glyphs": Experiment(
        title="Characters and their names",
        held_out="characters not seen",
        sides=("image", "name"),
        towers="three convolutions at 32 px, mean of 128-wide word vectors, from scratch",
        load=load_glyphs,
        build=images_and_bags,
        learning_rate=3e-3,
        steps=300,
        chunk_size=64,
    ),
}
