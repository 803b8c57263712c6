"""One run of negatives.py: training with the softmax cut into blocks, then retrieval.

B pairs of a batch, m pairs of a block, D feature width, L words a text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from negatives_data import DataSet, HeldOut, Pairs, load_emoji, load_glyphs, load_verses
from torch import Tensor, nn

from gradcache_clip import ClipLoss, GradCache
from gradcache_clip.memory import count_cached_step, count_plain_step
from gradcache_clip.train.config import OptimizerConfig
from gradcache_clip.train.evaluation import RetrievalMetrics, recall_at_k
from gradcache_clip.train.optimizer import build_optimizer, learning_rate_at

FEATURES = 256
Towers = tuple[nn.Module, nn.Module]
_WEIGHT_DECAY = 0.1
_EVALUATED_AT_ONCE = 1024


@dataclass(frozen=True)
class Run:
    """A training run before it is made."""

    data: str
    block_size: int
    """Pairs that compete in one softmax; with the batch size, the whole batch."""
    seed: int
    """Seeds the first weights, the order of the data and dropout."""
    learning_rate: float
    steps: int
    batch_size: int
    chunk_size: int
    """Pairs that go through a tower at once."""
    towers: str
    """Described in words."""


@dataclass(frozen=True)
class Row(Run):
    """A run and what came out: retrieval of rows that no tower was trained on."""

    forward_recall: float
    """R@1: share of the first side's rows whose nearest of the second side is right."""
    backward_recall: float
    """R@1 from the second side to the first."""
    forward_chance: float
    backward_chance: float
    forward_queries: int
    backward_queries: int
    cached_step_bytes: int
    """Tensors at the peak of the step that was run, counted."""
    plain_step_bytes: int
    """Tensors at the peak of a plain step over `block_size` pairs, counted."""
    seconds: float
    """Duration of the training."""

    @property
    def run(self) -> Run:
        """Its settings alone."""
        return Run(**{field.name: getattr(self, field.name) for field in fields(Run)})


# Towers


class BagOfWords(nn.Module):
    """The mean of the vectors of a text's words, projected; 0 stands for no word."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(words, width, mode="mean", padding_idx=0)
        self.projection = nn.Linear(width, FEATURES)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, L) numbers of words to (B, FEATURES)."""
        return self.projection(self.embedding(rows))


class SmallConvNet(nn.Module):
    """Three convolutions of stride two over uint8 images; no batch norm, so chunks matter not."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((3, *widths)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        self.projection = nn.Linear(widths[-1], FEATURES)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) to (B, FEATURES)."""
        return self.projection(self.layers(images.float() / 127.5 - 1).mean((2, 3)))


def head(width: int) -> nn.Sequential:
    """Trained on top of a frozen encoder's (B, width) features."""
    layers = (nn.LayerNorm(width), nn.Linear(width, 512), nn.GELU(), nn.Dropout(0.2))
    return nn.Sequential(*layers, nn.Linear(512, FEATURES))


def two_heads(pairs: Pairs) -> Towers:
    """For features of frozen encoders on both sides."""
    return head(pairs.first.shape[1]), head(pairs.second.shape[1])


def two_bags(pairs: Pairs) -> Towers:
    """For texts on both sides, each with its own words."""
    return _bag(pairs.first, 256), _bag(pairs.second, 256)


def images_and_bags(pairs: Pairs) -> Towers:
    """For uint8 images and texts."""
    return SmallConvNet(), _bag(pairs.second, 128)


def _bag(rows: Tensor, width: int) -> BagOfWords:
    return BagOfWords(int(torch.max(rows)) + 1, width)


# Experiments


@dataclass(frozen=True)
class Experiment:
    """One panel of the picture."""

    title: str
    held_out: str
    """The retrieved rows, in words."""
    sides: tuple[str, str]
    towers: str
    """Described in words."""
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


# One run


class BlockLoss(nn.Module):
    """The mean of a loss over blocks of m pairs: only pairs of one block compete.

    With m below the batch this is what plain gradient accumulation over chunks of m pairs
    optimises; with m the whole batch it is the loss itself.

    Args:
        loss: such as `ClipLoss`; called with the features and ids of one block.
        block_size: m.

    Example:
        >>> rows = torch.eye(4)
        >>> whole, blocks = (BlockLoss(ClipLoss(), m)(rows, rows) for m in (4, 2))
        >>> bool(whole > blocks)
        True
    """

    def __init__(self, loss: nn.Module, block_size: int) -> None:
        super().__init__()
        self.loss = loss
        self.block_size = block_size

    def forward(self, first: Tensor, second: Tensor, ids: Tensor | None = None) -> Tensor:
        """0-dim loss of (B, D) features of both sides; pairs of an equal id are no negatives."""
        m = self.block_size
        blocks = list(zip(first.split(m), second.split(m), strict=True))
        of_blocks = [None] * len(blocks) if ids is None else ids.split(m)
        losses = [
            self.loss(*block, ids=own).loss for block, own in zip(blocks, of_blocks, strict=True)
        ]
        return torch.stack(losses).mean()


def train_and_evaluate(
    experiment: Experiment, data: DataSet, run: Run, on_step: Callable[[], None] = lambda: None
) -> Row:
    """One row of the result.

    Runs that differ in the block size alone start from the same weights, see the same batches in
    the same order and draw the same dropout.

    Args:
        on_step: called after every step.
    """
    towers, loss = start(experiment, data.train, run)
    begin = time.perf_counter()
    train(towers, loss, data.train, run, on_step)
    seconds = time.perf_counter() - begin
    found = evaluate(towers, data.held_out)
    forward, backward = found.image_to_text, found.text_to_image
    cached, plain = count_bytes(towers, data.train, run)
    return Row(
        **vars(run),
        forward_recall=forward.recall[1],
        backward_recall=backward.recall[1],
        forward_chance=forward.chance[1],
        backward_chance=backward.chance[1],
        forward_queries=forward.queries,
        backward_queries=backward.queries,
        cached_step_bytes=cached,
        plain_step_bytes=plain,
        seconds=seconds,
    )


def start(experiment: Experiment, pairs: Pairs, run: Run) -> tuple[Towers, BlockLoss]:
    """New towers and loss; equal seeds give equal weights."""
    torch.manual_seed(run.seed)
    return experiment.build(pairs), BlockLoss(ClipLoss(), run.block_size)


def train(
    towers: Towers, loss: BlockLoss, pairs: Pairs, run: Run, on_step: Callable[[], None]
) -> None:
    """AdamW with warm-up and cosine decay; each step through `GradCache`."""
    config = OptimizerConfig(
        learning_rate=run.learning_rate, weight_decay=_WEIGHT_DECAY, warmup_steps=run.steps // 10
    )
    modules = nn.ModuleDict({"first": towers[0], "second": towers[1], "loss": loss}).train()
    optimizer = build_optimizer(config, modules)
    cache = GradCache(towers, loss, chunk_size=run.chunk_size)
    for step, rows in enumerate(batches(len(pairs.ids), run)):
        cache.strategy.set_learning_rate(optimizer, learning_rate_at(step, config, run.steps))
        optimizer.zero_grad()
        cache(pairs.first[rows], pairs.second[rows], loss_kwargs={"ids": pairs.ids[rows]})
        optimizer.step()
        on_step()


def batches(pairs: int, run: Run) -> Iterator[Tensor]:
    """(B,) row numbers of every step: each epoch in a new order, its incomplete batch dropped.

    Raises:
        ValueError: fewer pairs than one batch.
    """
    size = run.batch_size
    if pairs < size:
        raise ValueError(
            f"batch_size: expected at most the {pairs:,} training pairs of {run.data}, got "
            f"{size:,}; pass a smaller --batch-size"
        )
    draw = torch.Generator().manual_seed(run.seed)

    def endless() -> Iterator[Tensor]:
        while True:
            order = torch.randperm(pairs, generator=draw)
            yield from order[: pairs // size * size].split(size)

    return islice(endless(), run.steps)


@torch.no_grad()
def evaluate(towers: Towers, held_out: HeldOut) -> RetrievalMetrics:
    """R@1 in both directions; "image" stands for the first side."""
    first, second = (
        F.normalize(torch.cat([tower.eval()(rows) for rows in given.split(_EVALUATED_AT_ONCE)]))
        for tower, given in zip(towers, (held_out.first, held_out.second), strict=True)
    )
    ids = {"image_ids": held_out.first_ids, "text_ids": held_out.second_ids}
    return recall_at_k(first, second, **ids, ks=(1,))


def count_bytes(towers: Towers, pairs: Pairs, run: Run) -> tuple[int, int]:
    """Tensors of the step that was run, and of a plain step over the pairs of one block."""
    example = pairs.first[:2], pairs.second[:2]
    m = run.block_size
    for tower in towers:
        tower.train()
    cached = count_cached_step(
        towers, BlockLoss(ClipLoss(), m), example, run.batch_size, run.chunk_size
    )
    plain = count_plain_step(towers, ClipLoss(impl="reference"), example, m)
    return cached.total_bytes, plain.total_bytes
