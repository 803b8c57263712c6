"""Embeds whole data sets without graphs, on one process or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradcache_clip.train.evaluation.sharding import interleave, shard_batches
from gradcache_clip.train.peers import Peers
from gradcache_clip.train.precision import autocast

Batch = TypeVar("Batch")
Row = TypeVar("Row")


@dataclass(frozen=True)
class EmbedOptions:
    """Options for embedding a data set.

    Args:
        batch_size: rows encoded at once.
        precision: `fp32`, or autocast to `bf16` or `fp16`.
        peers: processes that share the batches; by default only this one.
        progress: show a progress bar on stderr of rank 0.
    """

    batch_size: int
    precision: str = "fp32"
    peers: Peers = field(default_factory=Peers)
    progress: bool = True


def embed_rows(
    encoder: nn.Module,
    rows: Iterable[Row],
    collate: Callable[[list[Row]], Any],
    options: EmbedOptions,
    *,
    tower: int | None = None,
    description: str = "embed",
) -> tuple[Tensor, ...] | None:
    """Encode rows in evaluation mode, batch by batch, and gather the features on rank 0.

    Called by all processes together. Every process reads all rows, but collates and encodes only
    its share of the batches.

    Args:
        encoder: called as `encoder(batch)`, or as `encoder(tower, batch)` if `tower` is given.
        rows: consumed once.
        collate: rows of a batch -> a tensor or a dict of tensors, moved to the encoder's device.
        options: batch size, precision and processes.
        tower: number of the tower.
        description: label of the progress bar.

    Returns:
        On rank 0, one CPU tensor per tensor that the encoder returns, in the order of `rows`. None
        on other ranks.

    Raises:
        ValueError: there are no rows.
    """
    peers, size, sizes = options.peers, options.batch_size, list[int]()
    device = next(encoder.parameters()).device

    # Every rank reads all rows, so it knows how many rows the last round repeats.
    def batches() -> Iterator[list[Row]]:
        remaining = iter(rows)
        while batch := list(islice(remaining, size)):
            sizes.append(len(batch))
            yield batch

    def encode(batch: list[Row]) -> Any:
        inputs = _to(device, collate(batch))
        return encoder(inputs) if tower is None else encoder(tower, inputs)

    with evaluating(encoder), autocast(options.precision, device):
        parts = embed_dataset(
            encode,
            shard_batches(batches(), peers),
            description=description,
            progress=options.progress and peers.is_first,
        )
    gathered = peers.gather_to_rank0([part.cpu() for part in parts])
    if not peers.is_first:
        return None
    return tuple(interleave(part, size, sum(sizes)) for part in zip(*gathered, strict=True))


@contextmanager
def evaluating(encoder: nn.Module) -> Iterator[None]:
    """Put an encoder into evaluation mode inside the block."""
    was_training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(was_training)


def _to(device: torch.device, inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def embed_dataset(
    encode: Callable[[Batch], Tensor | tuple[Tensor, ...]],
    batches: Iterable[Batch],
    *,
    total: int | None = None,
    description: str = "embed",
    progress: bool = True,
) -> tuple[Tensor, ...]:
    """Embed a whole data set without graphs, with a progress bar on stderr.

    The caller puts the encoder into evaluation mode.

    Args:
        encode: batch -> features, or a tuple of them such as (image_features, text_features), with
            one row per sample.
        batches: consumed once.
        total: number of rows, to estimate the remaining time.
        description: label of the progress bar.
        progress: whether to show the bar.

    Returns:
        One tensor per tensor that `encode` returns, rows in the order of the batches.

    Raises:
        ValueError: `batches` is empty.

    Example:
        >>> images, = embed_dataset(lambda x: 2 * x, [torch.ones(2, 3)] * 2, progress=False)
        >>> images.shape
        torch.Size([4, 3])
    """
    parts: list[tuple[Tensor, ...]] = []
    with _progress_bar(progress) as bar, torch.no_grad():
        task = bar.add_task(description, total=total)
        for batch in batches:
            features = encode(batch)
            parts.append(features if isinstance(features, tuple) else (features,))
            bar.advance(task, len(parts[-1][0]))
    if not parts:
        raise ValueError("batches: expected at least one, got none; check the validation data")
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _progress_bar(shown: bool) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    return Progress(*columns, console=console, disable=hidden, transient=True)
