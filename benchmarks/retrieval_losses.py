"""Objectives of retrieval losses beside PyTorch and sentence-transformers, for loss.py.

A step is the loss of given features and their gradients, without an encoder: directions, hardness
weights, groups with a column bias, a guide, and distillation in the batch. Errors are those of all
gradients against the whole matrix in fp64. Rows are written to retrieval_losses.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from contestants import DTYPES, Contestant, Task
from contests import MEASURED, Contest, file, read_file
from fresh_process import distance
from results import bytes_text, paragraph, power, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize

STEM = "retrieval_losses"
"""Name of the file of the rows."""
_WIDTH, _GUIDE_WIDTH, _SCALE, _STRENGTH = 256, 384, 20.0, 5.0
_PAIRS, _QUICK_PAIRS, _ERROR_PAIRS = 2048, 1024, 256
_DIRECTIONS = "query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"
# Rows of a chunk, the default of sentence-transformers.
_CHUNK = 32


class Batch(NamedTuple):
    """Unit features of pairs, of the model and of a frozen one, and what is said of them."""

    queries: Tensor
    documents: Tensor
    guide: tuple[Tensor, Tensor]
    groups: Tensor
    bias: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.queries, self.documents]


Loss = Callable[[Batch], Tensor]
Step = Callable[[Batch], list[Tensor]]
"""From a batch to the gradients of queries and documents."""


@dataclass(frozen=True)
class Row:
    """One contestant of one objective."""

    objective: str
    pairs: int
    contestant: str
    version: str
    status: str
    """"measured", or why not."""
    memory_bytes: int = 0
    milliseconds: float = 0.0
    time_ratio: float = 0.0
    """Over ours, within a round."""
    error: float = 0.0


def make_batch(pairs: int, dtype: torch.dtype, device: str = "cpu") -> Batch:
    generator = torch.Generator().manual_seed(0)

    def unit(width: int) -> Tensor:
        made = normalize(torch.randn(pairs, width, generator=generator), dim=1)
        return made.to(device, dtype)

    queries, documents = (unit(_WIDTH).requires_grad_() for _ in range(2))
    guide = unit(_GUIDE_WIDTH), unit(_GUIDE_WIDTH)
    bias = torch.randn(pairs, generator=generator).to(device, dtype)
    return Batch(queries, documents, guide, torch.arange(pairs, device=device) % 4, bias)


# Contestants


def _ours(objective: str) -> Step:
    from gradcache_clip import InBatchDistillationLoss, RetrievalLoss

    options: dict[str, Any] = {}
    if objective == "four directions":
        options["directions"] = _DIRECTIONS
    if objective == "hardness":
        options |= {"hardness_mode": "in_batch_negatives", "hardness_strength": _STRENGTH}
    taught = InBatchDistillationLoss(teacher_scale=_SCALE)
    loss = RetrievalLoss(**options)

    def value(batch: Batch) -> Tensor:
        scale = batch.queries.new_tensor(_SCALE)
        if objective == "distillation":
            return taught(*batch.leaves, *batch.guide, scale).loss
        rules: dict[str, Any] = {}
        if objective == "groups, bias":
            rules = {"groups": batch.groups, "column_bias": batch.bias}
        if objective == "guide":
            rules = {"guide": batch.guide}
        return loss(*batch.leaves, None, scale, **rules).loss

    return partial(_gradients, value)


def _gradients(value: Loss, batch: Batch) -> list[Tensor]:
    return list(torch.autograd.grad(value(batch), batch.leaves))


def _plain(objective: str) -> Step:
    """As a person writes it: the whole matrix."""
    return partial(_gradients, partial(plain, objective))


def plain(objective: str, batch: Batch) -> Tensor:
    """The loss of an objective, from whole matrices."""
    queries, documents = (normalize(each, dim=1) for each in batch.leaves)
    own = torch.arange(len(queries), device=queries.device)
    similarity = queries @ documents.T
    if objective == "distillation":
        teacher, student = _SCALE * batch.guide[0] @ batch.guide[1].T, _SCALE * similarity
        pair = log_softmax(student, 1), log_softmax(teacher, 1)
        return kl_div(*pair, reduction="batchmean", log_target=True)
    logits = _SCALE * similarity
    others = own[:, None] != own
    if objective == "hardness":
        logits = logits + _STRENGTH * similarity.detach() * others
    if objective == "groups, bias":
        logits = logits + batch.bias
        logits = logits.masked_fill(batch.groups[:, None] != batch.groups, -torch.inf)
    if objective == "guide":
        guide = batch.guide[0] @ batch.guide[1].T
        logits = logits.masked_fill((guide > guide.diagonal()[:, None]) & others, -torch.inf)
    if objective == "four directions":
        same = [_SCALE * each @ each.T for each in (queries, documents)]
        same = [each.masked_fill(~others, -torch.inf) for each in same]
        logits = torch.cat([logits, logits.T, *same], 1)
    return cross_entropy(logits, own)


def _cached(objective: str) -> Step:
    """The loss phase of sentence-transformers' cached losses, whose backward runs in chunks."""
    if objective == "guide":
        return _cached_gist()
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    loss = CachedMultipleNegativesRankingLoss(
        nn.Sequential(nn.Identity()),
        scale=_SCALE,
        mini_batch_size=_CHUNK,
        directions=_DIRECTIONS if objective == "four directions" else _DIRECTIONS[:1],
        hardness_mode="in_batch_negatives" if objective == "hardness" else None,
        hardness_strength=_STRENGTH if objective == "hardness" else 0.0,
    )

    def step(batch: Batch) -> list[Tensor]:
        leaves = [each.detach().requires_grad_() for each in batch.leaves]
        loss.calculate_loss([[each] for each in leaves], with_backward=True)
        return [each.grad for each in leaves if each.grad is not None]

    return step


def _cached_gist() -> Step:
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model: Any = nn.Sequential(nn.Identity())
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    model.tokenizer, model.max_seq_length = PreTrainedTokenizerFast(tokenizer_object=words), 1
    loss = CachedGISTEmbedLoss(
        model,
        model,
        temperature=1 / _SCALE,
        mini_batch_size=_CHUNK,
        contrast_anchors=False,
        contrast_positives=False,
    )

    def step(batch: Batch) -> list[Tensor]:
        leaves = [each.detach().requires_grad_() for each in batch.leaves]
        features = [[each] for each in leaves], [[each] for each in batch.guide]
        loss.calculate_loss(*features, with_backward=True)
        return [each.grad for each in leaves if each.grad is not None]

    return step


_CACHED = "query to document", "four directions", "hardness", "guide"
OBJECTIVES = *_CACHED, "groups, bias", "distillation"
NAMES = {each.replace(",", "").replace(" ", "_"): each for each in OBJECTIVES}
"""Titles by the names that --losses takes."""
_OURS, _PEER = "gradcache_clip", "sentence-transformers"


@dataclass(frozen=True)
class Objective(Task):
    """An objective over features; `title` is one of `OBJECTIVES`."""

    small: ClassVar[int] = _ERROR_PAIRS

    def contestants(self) -> list[Contestant]:
        """The library offers some of them over features, none with a matrix of given scores."""
        found = [
            Contestant(_OURS, self.title, partial(_ours, self.title)),
            Contestant("plain PyTorch", self.title, partial(_plain, self.title)),
            Contestant(f"{_PEER} cached", self.title, partial(_cached, self.title), _PEER),
        ]
        return found if self.title in _CACHED else found[:2]

    def step(self, contestant: Contestant) -> Step:
        return contestant.build()

    def inputs(self, size: int) -> Batch:
        return make_batch(size, DTYPES[self.dtype], self.device)

    def errors(self, contestant: Contestant, case: str) -> dict[str, float]:
        few = self.inputs(_ERROR_PAIRS)
        return {"error": distance(self.step(contestant)(few), _plain(self.title)(_exact(few)))}


def _exact(batch: Batch) -> Batch:
    queries, documents = (each.detach().double().requires_grad_() for each in batch.leaves)
    guide = batch.guide[0].double(), batch.guide[1].double()
    return Batch(queries, documents, guide, batch.groups, batch.bias.double())


def contests(options: argparse.Namespace) -> list[Contest]:
    """Those of --losses."""
    size = _QUICK_PAIRS if options.quick else _PAIRS
    titles = [title for name, title in NAMES.items() if name in options.losses]
    tasks = [Objective(title, options.dtype, options.device) for title in titles]
    return [Contest(task, (size,), _OURS, task, size) for task in tasks]


# The page


def section(results: Path, device: str = "cpu", dtype: str = "fp32") -> str:
    """The table, and how it was measured."""
    rows, where = read_file(Row, file(STEM, results, device, dtype))
    head = "objective", "pairs", "loss", "memory", "ms", "time over ours", "error"
    text = (
        f"Features of width {_WIDTH}, of the guide and the teacher {_GUIDE_WIDTH}, {where}; a step "
        "is the loss of given features and their gradients, without an encoder. Memory: growth of "
        "the peak of a process of its own. Time: medians over rounds in which all contestants of "
        "an objective take turns. Error: of all gradients against the whole matrix in fp64, "
        f"at {_ERROR_PAIRS} pairs; with a guide the 1e-4 of ours is one candidate within "
        "eight roundings of its pair, a tie that stays a negative. The library's losses take "
        f"{_CHUNK} rows at a time, its default; it has no groups, no bias, and no distillation in "
        "the batch over features. With a guide it multiplies and sums the features of every pair "
        "without a matrix product, whatever the number of rows; drop-ins are timed with an encoder."
    )
    return f"{paragraph(text)}\n\n{table(head, map(_cells, rows), 'lrlrrrr')}"


def _cells(row: Row) -> list[str]:
    version = row.version if row.contestant.startswith(_PEER) else ""
    head = [row.objective, f"{row.pairs:,}", f"{row.contestant} {version}".strip()]
    if row.status != MEASURED:
        return [*head, row.status, *[""] * 3]
    ratio = f"{row.time_ratio:.2f}" if row.time_ratio else ""
    times = f"{row.milliseconds:,.0f}", ratio
    return [*head, bytes_text(row.memory_bytes), *times, power(row.error)]
