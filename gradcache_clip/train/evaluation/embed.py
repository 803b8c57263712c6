"""The features of a whole data set, without graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


def embed_dataset(
    encode: Callable[[Batch], Tensor | tuple[Tensor, ...]],
    batches: Iterable[Batch],
    *,
    total: int | None = None,
    description: str = "embed",
    progress: bool = True,
) -> tuple[Tensor, ...]:
    """Features of a whole data set, without graphs, under a progress bar on stderr.

    The caller puts the encoder in evaluation mode; `encode` runs as it is.

    Args:
        encode: batch -> features, or a tuple of them such as (image_features, text_features);
            one row a sample.
        batches: what to encode; read once.
        total: number of rows to come, for the time left.
        description: stands before the bar.
        progress: whether to show it.

    Returns:
        one tensor for each that `encode` returns, rows in the order of the batches.

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
