"""MaxSim with hard negatives beside PyLate's cached loss: memory, time and error, on the CPU.

    python benchmarks/late_interaction.py            # ColBERT and ColPali shapes; three minutes
    python benchmarks/late_interaction.py --quick    # fewer queries, one shape; under a minute

Peers come with pip install pylate late-interaction-kernels; the kernels of the second need a GPU.
B queries, a document and a hard negative for each, fp32. A step is the loss of given tokens and
their gradients: no encoder. Memory is the growth of the peak of a fresh process, times are medians
over rounds in which all take turns in one process, errors those of all gradients against the whole
matrix in fp64. Writes late_interaction.csv into benchmarks/results (or --results).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contestants import compared
from fresh_process import PeakGrowth, distance, interleaved_times_ms
from results import (
    bytes_text,
    paragraph,
    parser,
    power,
    provenance,
    read_rows,
    show,
    table,
    write_rows,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

_FILE = "late_interaction.csv"
_ERROR_QUERIES, _WARM_UP_QUERIES = 8, 4
_QUERY_TOKENS, _WIDTH = 32, 128
# Queries of which PyLate scores all documents at a time, and which it takes as one chunk.
_SCORED, _CHUNK = 4, 16


@dataclass(frozen=True)
class Shape:
    """A batch as a collator pads it."""

    queries: int
    shortest: int
    longest: int
    """Tokens of a document; lengths in between are drawn evenly, one has the most."""


SHAPES = {
    "ColBERT": Shape(64, 20, 300),
    "ColPali": Shape(32, 768, 1030),
}
QUICK = {"ColBERT": Shape(32, 20, 300)}


class Batch(NamedTuple):
    """Unit tokens, and which tokens of documents and hard negatives count."""

    queries: Tensor
    documents: Tensor
    negatives: Tensor
    masks: tuple[Tensor, Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return list(self[:3])


Step = Callable[[Batch], tuple[Tensor, list[Tensor]]]
"""From a batch to the loss and the gradients of its tokens."""


@dataclass(frozen=True)
class Row:
    """One contestant at one shape."""

    shape: str
    queries: int
    contestant: str
    version: str
    status: str
    """"measured", or why not."""
    memory_bytes: int = 0
    milliseconds: float = 0.0
    time_ratio: float = 0.0
    """Over the first contestant's, within a round."""
    error: float = 0.0
    factor: float = 0.0
    """Gradients over the true ones; `error` is what remains after division by it."""


def make_batch(shape: Shape, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(0)
    B, P = shape.queries, shape.longest

    def tokens(count: int) -> Tensor:
        made = torch.randn(B, count, _WIDTH, generator=generator)
        return normalize(made, dim=2).to(dtype).requires_grad_()

    def mask() -> Tensor:
        lengths = torch.randint(shape.shortest, P + 1, (B,), generator=generator)
        lengths[0] = P
        return torch.arange(P) < lengths[:, None]

    return Batch(tokens(_QUERY_TOKENS), tokens(P), tokens(P), (mask(), mask()))


# Contestants


def _loss(*, packed: bool) -> Step:
    from gradcache_clip import MaxSimLoss

    loss = MaxSimLoss(normalize=False)

    def padded(batch: Batch) -> tuple[Tensor, list[Tensor]]:
        masks = batch.masks[0], batch.masks[1][:, None]
        named = dict(zip(("document_mask", "hard_negative_mask"), masks, strict=True))
        value = loss(batch.queries, batch.documents, batch.negatives[:, None], **named).loss
        return value.detach(), list(torch.autograd.grad(value, batch.leaves))

    def without_padding(batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """As an encoder of packed sequences returns them."""
        tokens = [
            each.detach()[mask].requires_grad_()
            for each, mask in zip(batch[1:3], batch.masks, strict=True)
        ]
        lengths = [mask.sum(1) for mask in batch.masks]
        value = loss(
            batch.queries,
            *tokens,
            document_lengths=lengths[0],
            hard_negative_lengths=lengths[1][:, None],
        ).loss
        dqueries, *found = torch.autograd.grad(value, [batch.queries, *tokens])
        return value.detach(), [dqueries, *map(_unpacked, found, batch.masks)]

    return without_padding if packed else padded


def _unpacked(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(*mask.shape, values.shape[1]).masked_scatter(mask[..., None], values)


def plain(batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """As a person writes it: the similarities of all tokens."""
    documents, mask = torch.cat(batch[1:3]), torch.cat(batch.masks)
    similarity = torch.einsum("iqd,jpd->ijqp", batch.queries, documents)
    scores = similarity.masked_fill(~mask[:, None], -torch.inf).amax(3).sum(2)
    loss = cross_entropy(scores, torch.arange(len(scores)))
    return loss.detach(), list(torch.autograd.grad(loss, batch.leaves))


def _pylate() -> Step:
    """The loss phase of `CachedContrastive`, without a model."""
    from pylate.losses import CachedContrastive

    model = nn.Module()
    model.do_query_expansion = True
    loss = CachedContrastive(model, mini_batch_size=_CHUNK, score_mini_batch_size=_SCORED)

    def step(batch: Batch) -> tuple[Tensor, list[Tensor]]:
        chunks = [
            [chunk.requires_grad_() for chunk in each.detach().split(_CHUNK)]
            for each in batch.leaves
        ]
        counted = torch.ones(batch.queries.shape[:2], dtype=torch.bool)
        value = loss.calculate_loss_and_cache_gradients(chunks, [counted, *batch.masks])
        assert loss.cache is not None
        return value.detach(), [torch.cat(each) for each in loss.cache]

    return step


def _kernels() -> Step:
    if not torch.cuda.is_available():
        # Without one, and in Triton's interpreter too, its maxsim finds no driver.
        raise RuntimeError("needs an NVIDIA GPU")
    from late_interaction_kernels import maxsim

    def step(batch: Batch) -> tuple[Tensor, list[Tensor]]:
        documents, mask = torch.cat(batch[1:3]), torch.cat(batch.masks)
        scores = maxsim(batch.queries, documents, d_mask=mask)
        loss = cross_entropy(scores, torch.arange(len(scores)))
        return loss.detach(), list(torch.autograd.grad(loss, batch.leaves))

    return step


CONTESTANTS: dict[str, tuple[str, Callable[[], Step]]] = {
    "MaxSimLoss": ("torch", partial(_loss, packed=False)),
    "MaxSimLoss, packed": ("torch", partial(_loss, packed=True)),
    "plain PyTorch": ("torch", lambda: plain),
    "PyLate CachedContrastive": ("pylate", _pylate),
    "late-interaction-kernels maxsim": ("late-interaction-kernels", _kernels),
}


# Measurements, each in a fresh process


def measure_point(arguments: dict[str, Any]) -> dict[str, Any]:
    """Memory of a step and, at a small batch, the error of its gradients; or "failure"."""
    _prepare()
    shape = Shape(**arguments["shape"])
    try:
        step = CONTESTANTS[arguments["name"]][1]()
        few = make_batch(Shape(_ERROR_QUERIES, shape.shortest, shape.longest))
        found = torch.cat([each.flatten().double() for each in step(few)[1]])
    except Exception as error:
        return {"failure": str(error).splitlines()[0]}
    exact = Batch(*(each.detach().double().requires_grad_() for each in few.leaves), few.masks)
    true = torch.cat([each.flatten() for each in plain(exact)[1]])
    factor = float(found @ true / true.square().sum())
    batch = make_batch(shape)
    with PeakGrowth() as growth:
        step(batch)
    return {
        "memory_bytes": growth.bytes,
        "error": distance([found / factor], [true]),
        "factor": factor,
    }


def measure_times(arguments: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of rounds in which all contestants take turns."""
    _prepare()
    batch = make_batch(Shape(**arguments["shape"]))
    steps = [partial(CONTESTANTS[name][1](), batch) for name in arguments["names"]]
    return {"rounds": interleaved_times_ms(steps, arguments["rounds"], arguments["seconds"])}


def _prepare() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)


def _measured(options: argparse.Namespace) -> Iterator[Row]:
    packages = {name: package for name, (package, _) in CONTESTANTS.items()}
    for title, shape in (QUICK if options.quick else SHAPES).items():
        row_of, shared = partial(Row, title, shape.queries), {"shape": vars(shape)}
        yield from compared(row_of, packages, measure_point, measure_times, shared, options)


# The page and the command


def section(results: Path) -> str:
    """The table, and how it was measured."""
    rows = read_rows(Row, results / _FILE)
    head = "shape", "queries", "loss", "memory", "ms", "time over ours", "gradients", "error"
    text = (
        "32 query tokens, a document and a hard negative for each query, of 20 to 300 (ColBERT) or "
        "768 to 1,030 tokens (ColPali), width 128, fp32, one thread. A step is the loss of given "
        "tokens and their gradients, without an encoder. Memory: growth of the peak of a fresh "
        "process; the packed step also packs the padded tokens, and pads their gradients. Time: "
        "medians over rounds in which all take turns. Gradients: how many times the "
        "true ones they are, at 8 queries; error: what remains after division by that. PyLate "
        "scores four queries at a time; its gradients are those of the sum over queries, while its "
        "loss is the mean."
    )
    return f"{paragraph(text)}\n\n{table(head, map(_cells, rows), 'lrlrrrrr')}"


def _cells(row: Row) -> list[str]:
    head = [row.shape, f"{row.queries:,}", f"{row.contestant} {_version(row)}".strip()]
    if row.status != "measured":
        return [*head, row.status, *[""] * 4]
    return [
        *head,
        bytes_text(row.memory_bytes),
        f"{row.milliseconds:,.0f}",
        f"{row.time_ratio:.2f}",
        f"{row.factor:.3g}",
        power(row.error),
    ]


def _version(row: Row) -> str:
    return "" if CONTESTANTS[row.contestant][0] == "torch" else row.version


def main(arguments: list[str] | None = None) -> None:
    """Measure both shapes, write the CSV and print its table."""
    options = _parser().parse_args(arguments)
    path = write_rows(Row, _measured(options), options.results / _FILE, provenance())
    show(section(options.results))
    print(path)


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    add = made.add_argument
    add("--quick", action="store_true", help="fewer queries, one shape; under a minute")
    add("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    add("--seconds", type=float, default=240.0, help="no further round after this (240)")
    add("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    return made


if __name__ == "__main__":
    main()
