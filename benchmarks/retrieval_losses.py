"""Objectives of retrieval losses beside PyTorch and sentence-transformers, on the CPU.

    python benchmarks/retrieval_losses.py            # 2,048 pairs; five minutes
    python benchmarks/retrieval_losses.py --quick    # one objective at 512 pairs; under a minute

A step is the loss of given features and their gradients in fp32, without an encoder: directions,
hardness weights, groups with a column bias, a guide, and distillation in the batch. Memory is the
growth of the peak of a fresh process, times are medians over rounds in which all contestants of an
objective take turns in one process, errors those of all gradients against the whole matrix in
fp64. Writes retrieval_losses.csv into benchmarks/results (or --results).
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
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize

_FILE = "retrieval_losses.csv"
_WIDTH, _GUIDE_WIDTH, _SCALE, _STRENGTH = 256, 384, 20.0, 5.0
_ERROR_PAIRS, _WARM_UP_PAIRS = 256, 64
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
    """Over the first contestant's, within a round."""
    error: float = 0.0


def make_batch(pairs: int, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def unit(width: int) -> Tensor:
        return normalize(torch.randn(pairs, width, generator=generator), dim=1).to(dtype)

    queries, documents = (unit(_WIDTH).requires_grad_() for _ in range(2))
    guide = unit(_GUIDE_WIDTH), unit(_GUIDE_WIDTH)
    bias = torch.randn(pairs, generator=generator).to(dtype)
    return Batch(queries, documents, guide, torch.arange(pairs) % 4, bias)


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
    own, similarity = torch.arange(len(queries)), queries @ documents.T
    if objective == "distillation":
        teacher, student = _SCALE * batch.guide[0] @ batch.guide[1].T, _SCALE * similarity
        pair = log_softmax(student, 1), log_softmax(teacher, 1)
        return kl_div(*pair, reduction="batchmean", log_target=True)
    logits = _SCALE * similarity
    others = ~torch.eye(len(queries), dtype=torch.bool)
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


CONTESTANTS: dict[str, tuple[str, Callable[[str], Step]]] = {
    "gradcache_clip": ("torch", _ours),
    "plain PyTorch": ("torch", _plain),
    "sentence-transformers cached": ("sentence-transformers", _cached),
}
_CACHED = "query to document", "four directions", "hardness", "guide"
OBJECTIVES = *_CACHED, "groups, bias", "distillation"


# Measurements, each in a fresh process


def measure_point(arguments: dict[str, Any]) -> dict[str, Any]:
    """Memory of a step and, at a small batch, the error of its gradients."""
    _prepare()
    step = _step(arguments["name"], arguments["objective"])
    few = make_batch(_ERROR_PAIRS)
    exact = Batch(
        *(each.detach().double().requires_grad_() for each in few.leaves),
        (few.guide[0].double(), few.guide[1].double()),
        few.groups,
        few.bias.double(),
    )
    error = distance(step(few), _plain(arguments["objective"])(exact))
    batch = make_batch(arguments["pairs"])
    with PeakGrowth() as growth:
        step(batch)
    return {"memory_bytes": growth.bytes, "error": error}


def measure_times(arguments: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of rounds in which all contestants take turns."""
    _prepare()
    steps = [_step(name, arguments["objective"]) for name in arguments["names"]]
    small, batch = make_batch(_WARM_UP_PAIRS), make_batch(arguments["pairs"])
    for step in steps:
        step(small)
    turns = [partial(step, batch) for step in steps]
    return {"rounds": interleaved_times_ms(turns, arguments["rounds"], arguments["seconds"])}


def _step(name: str, objective: str) -> Step:
    return CONTESTANTS[name][1](objective)


def _prepare() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)


def _measured(options: argparse.Namespace) -> Iterator[Row]:
    for objective in ["guide"] if options.quick else OBJECTIVES:
        shared = {"objective": objective, "pairs": options.pairs}
        row_of, packages = partial(Row, objective, options.pairs), _packages(objective)
        yield from compared(row_of, packages, measure_point, measure_times, shared, options)


def _packages(objective: str) -> dict[str, str]:
    """Of those that offer it over features, without a matrix of given scores."""
    names = list(CONTESTANTS) if objective in _CACHED else list(CONTESTANTS)[:2]
    return {name: CONTESTANTS[name][0] for name in names}


# The page and the command


def section(results: Path) -> str:
    """The table, and how it was measured."""
    rows = read_rows(Row, results / _FILE)
    head = "objective", "pairs", "loss", "memory", "ms", "time over ours", "error"
    text = (
        f"Features of width {_WIDTH}, of the guide and the teacher {_GUIDE_WIDTH}, fp32, one "
        "thread; a step is the loss of given features and their gradients, without an encoder. "
        "Memory: growth of the peak of a fresh process. Time: medians over rounds in which all "
        "contestants of an objective take turns. Error: of all gradients against the whole matrix "
        f"in fp64, at {_ERROR_PAIRS} pairs; with a guide the 1e-4 of ours is one candidate within "
        "eight roundings of its pair, a tie that stays a negative. The library's losses take "
        f"{_CHUNK} rows at a time, its default; it has no groups, no bias, and no distillation in "
        "the batch over features."
    )
    return f"{paragraph(text)}\n\n{table(head, map(_cells, rows), 'lrlrrrr')}"


def _cells(row: Row) -> list[str]:
    version = "" if CONTESTANTS[row.contestant][0] == "torch" else row.version
    head = [row.objective, f"{row.pairs:,}", f"{row.contestant} {version}".strip()]
    if row.status != "measured":
        return [*head, row.status, *[""] * 3]
    times = f"{row.milliseconds:,.0f}", f"{row.time_ratio:.2f}"
    return [*head, bytes_text(row.memory_bytes), *times, power(row.error)]


def main(arguments: list[str] | None = None) -> None:
    """Measure all objectives, write the CSV and print its table."""
    options = _parser().parse_args(arguments)
    options.pairs = options.pairs or (512 if options.quick else 2048)
    path = write_rows(Row, _measured(options), options.results / _FILE, provenance())
    show(section(options.results))
    print(path)


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    add = made.add_argument
    add("--quick", action="store_true", help="one objective at 512 pairs; under a minute")
    add("--pairs", type=int, help="rows of the batch (2048)")
    add("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    add("--seconds", type=float, default=60.0, help="no further round after this (60)")
    add("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    return made


if __name__ == "__main__":
    main()
