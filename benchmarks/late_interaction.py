"""MaxSim with hard negatives beside PyLate's cached loss and late-interaction-kernels, for loss.py.

B queries, a document and a hard negative for each. A step is the loss of given tokens and their
gradients: no encoder. Errors are those of all gradients against the whole matrix in fp64. Rows are
written to late_interaction.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from contestants import DTYPES, ON_GPU, Contestant, Task
from contests import MEASURED, Contest, file, read_file
from fresh_process import distance
from results import bytes_text, paragraph, power, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

STEM = "late_interaction"
"""Name of the file of the rows."""
_ERROR_QUERIES = 8
_QUERY_TOKENS, _WIDTH = 32, 128
# Queries of which PyLate scores all documents at a time, and which it takes as one chunk.
_SCORED, _CHUNK = 4, 16


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
    """Over ours, within a round."""
    error: float = 0.0
    factor: float = 0.0
    """Gradients over the true ones; `error` is what remains after division by it."""


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
    loss = cross_entropy(scores, torch.arange(len(scores), device=scores.device))
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
        counted = batch.queries.new_ones(batch.queries.shape[:2], dtype=torch.bool)
        value = loss.calculate_loss_and_cache_gradients(chunks, [counted, *batch.masks])
        assert loss.cache is not None
        return value.detach(), [torch.cat(each) for each in loss.cache]

    return step


def _kernels() -> Step:
    from late_interaction_kernels import maxsim

    def step(batch: Batch) -> tuple[Tensor, list[Tensor]]:
        documents, mask = torch.cat(batch[1:3]), torch.cat(batch.masks)
        scores = maxsim(batch.queries, documents, d_mask=mask)
        loss = cross_entropy(scores, torch.arange(len(scores), device=scores.device))
        return loss.detach(), list(torch.autograd.grad(loss, batch.leaves))

    return step


_OURS = "MaxSimLoss"
CONTESTANTS = [
    Contestant(_OURS, "maxsim", partial(_loss, packed=False)),
    Contestant(f"{_OURS}, packed", "maxsim", partial(_loss, packed=True)),
    Contestant("plain PyTorch", "maxsim", lambda: plain),
    Contestant("PyLate CachedContrastive", "maxsim", _pylate, "pylate"),
    # On a CPU, and in Triton's interpreter too, its maxsim finds no driver.
    Contestant(
        "late-interaction-kernels maxsim", "maxsim", _kernels, "late-interaction-kernels", ON_GPU
    ),
]


@dataclass(frozen=True)
class TokenLoss(Task):
    """MaxSim over documents as a collator pads them."""

    shortest: int
    longest: int
    """Tokens of a document; lengths in between are drawn evenly, one has the most."""

    small: ClassVar[int] = _ERROR_QUERIES

    def contestants(self) -> list[Contestant]:
        return CONTESTANTS

    def step(self, contestant: Contestant) -> Step:
        return contestant.build()

    def inputs(self, size: int) -> Batch:
        generator = torch.Generator().manual_seed(0)

        def tokens(count: int) -> Tensor:
            made = torch.randn(size, count, _WIDTH, generator=generator)
            return normalize(made, dim=2).to(self.device, DTYPES[self.dtype]).requires_grad_()

        def mask() -> Tensor:
            lengths = torch.randint(self.shortest, self.longest + 1, (size,), generator=generator)
            lengths[0] = self.longest
            return (torch.arange(self.longest) < lengths[:, None]).to(self.device)

        documents = tokens(_QUERY_TOKENS), tokens(self.longest), tokens(self.longest)
        return Batch(*documents, (mask(), mask()))

    def errors(self, contestant: Contestant, case: str) -> dict[str, float]:
        """Gradients over the true ones: "factor"; what remains after division by it: "error"."""
        few = self.inputs(_ERROR_QUERIES)
        found = torch.cat([each.flatten().double() for each in self.step(contestant)(few)[1]])
        exact = Batch(*(each.detach().double().requires_grad_() for each in few.leaves), few.masks)
        true = torch.cat([each.flatten() for each in plain(exact)[1]])
        factor = float(found @ true / true.square().sum())
        return {"error": distance([found / factor], [true]), "factor": factor}


# Tokens of documents, and queries in full and quickly.
_SHAPES = {
    "ColBERT": ((20, 300), 64, 32),
    "ColPali": ((768, 1030), 32, 8),
}
NAMES = {title.lower(): title for title in _SHAPES}
"""Titles by the names that --losses takes."""


def contests(options: argparse.Namespace) -> list[Contest]:
    """Those of --losses."""
    return [_contest(title, options) for name, title in NAMES.items() if name in options.losses]


def _contest(title: str, options: argparse.Namespace) -> Contest:
    tokens, queries, few = _SHAPES[title]
    task, size = TokenLoss(title, options.dtype, options.device, *tokens), queries
    if options.quick:
        size = few
    return Contest(task, (size,), _OURS, task, size)


# The page


def section(results: Path, device: str = "cpu", dtype: str = "fp32") -> str:
    """The table, and how it was measured."""
    rows, where = read_file(Row, file(STEM, results, device, dtype))
    head = "shape", "queries", "loss", "memory", "ms", "time over ours", "gradients", "error"
    text = (
        "32 query tokens, a document and a hard negative for each query, of 20 to 300 (ColBERT) or "
        f"768 to 1,030 tokens (ColPali), width {_WIDTH}, {where}. A step is the loss of given "
        "tokens and their gradients, without an encoder. Memory: growth of the peak of a process "
        "of its own; the packed step also packs the padded tokens, and pads their gradients. "
        "Time: medians over rounds in which all take turns. Gradients: how many times the "
        "true ones they are, at 8 queries; error: what remains after division by that. PyLate "
        "scores four queries at a time; its gradients are those of the sum over queries, while its "
        "loss is the mean."
    )
    return f"{paragraph(text)}\n\n{table(head, map(_cells, rows), 'lrlrrrrr')}"


def _cells(row: Row) -> list[str]:
    version = "" if row.contestant.startswith((_OURS, "plain")) else row.version
    head = [row.shape, f"{row.queries:,}", f"{row.contestant} {version}".strip()]
    if row.status != MEASURED:
        return [*head, row.status, *[""] * 4]
    return [
        *head,
        bytes_text(row.memory_bytes),
        f"{row.milliseconds:,.0f}",
        f"{row.time_ratio:.2f}" if row.time_ratio else "",
        f"{row.factor:.3g}",
        power(row.error),
    ]
