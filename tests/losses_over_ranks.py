"""Losses of a batch that is spread over processes, each beside the same loss of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradcache_clip import (
    ClipLoss,
    InfoNCELoss,
    LateInteractionLoss,
    MatryoshkaLoss,
    MaxSimDistillationLoss,
    MaxSimLoss,
    NTXentLoss,
    SigLipLoss,
    SupConLoss,
)
from gradcache_clip.losses import InBatchDistillationLoss, ScoreDistillationLoss
from gradcache_clip.losses.retrieval import RetrievalLoss
from gradcache_clip.losses.retrieval_contrasts import DIRECTIONS

ROWS, WIDTH = 6, 16


class Case(NamedTuple):
    """A loss, what all ranks together pass to it, and which of that are features."""

    name: str
    build: Callable[..., nn.Module]
    given: Callable[[int, torch.Generator], dict[str, Tensor]]


def _features(world: int, generator: torch.Generator, *shape: int) -> Tensor:
    # Cosines near 0.9: there sums of exponentials are hard to get right.
    shared = torch.randn(WIDTH, generator=generator)
    noise = torch.randn(world * shape[0], *shape[1:], WIDTH, generator=generator)
    return (noise + 2 * shared).double()


def _integers(world: int, generator: torch.Generator, rows: int, below: int) -> Tensor:
    return torch.randint(below, (world * rows,), generator=generator)


def _pairs(**more: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    def given(world: int, generator: torch.Generator) -> dict[str, Tensor]:
        features = {
            name: _features(world, generator, ROWS) for name in ("image_features", "text_features")
        }
        integers = {n: _integers(world, generator, ROWS, below) for n, below in more.items()}
        return features | integers

    return given


def _retrieval(
    *negatives: int, ids: int = 0
) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """`negatives`: () for none, (h,) shared or (b, K) own; ids for documents or for all columns."""

    def given(world: int, generator: torch.Generator) -> dict[str, Tensor]:
        result = {name: _features(world, generator, ROWS) for name in ("queries", "documents")}
        if negatives:
            result["hard_negatives"] = _features(world, generator, *negatives)
        if ids:
            result["ids"] = _integers(world, generator, ids, 5)
        return result

    return given


def _views(world: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {name: _features(world, generator, ROWS) for name in ("features_a", "features_b")}


def _classes(world: int, generator: torch.Generator) -> dict[str, Tensor]:
    labels = _integers(world, generator, ROWS, 4)
    labels[0] = 99  # without any positive
    return {"features": _features(world, generator, ROWS), "labels": labels}


def _captions(world: int, generator: torch.Generator) -> dict[str, Tensor]:
    """More texts than images, whose positives are on any rank, and some nowhere."""
    return {
        "image_features": _features(world, generator, ROWS),
        "text_features": _features(world, generator, ROWS + 3),
        "image_labels": torch.randperm(world * ROWS, generator=generator),
        "text_labels": _integers(world, generator, ROWS + 3, world * ROWS),
    }


class _LabelPair(nn.Module):
    """Labels of images and texts as two arguments."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.loss = SigLipLoss(**options)

    def forward(self, image_labels: Tensor, text_labels: Tensor, **features: Tensor) -> Any:
        return self.loss(**features, labels=(image_labels, text_labels))


def _ruled(world: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Queries with two hard negatives each, and a number for each input of another model."""
    given = _retrieval(ROWS, 2, ids=ROWS)(world, generator)
    seeds = torch.randint(99, (world * ROWS, 4), generator=generator)
    return given | {"groups": _integers(world, generator, ROWS, 2), "seeds": seeds}


def _biased(rules: Callable[[int, torch.Generator], dict[str, Tensor]]) -> Any:
    """Add a learned bias of each document and of its two hard negatives."""

    def given(world: int, generator: torch.Generator) -> dict[str, Tensor]:
        bias = torch.randn(world * ROWS, 3, generator=generator).double()
        return rules(world, generator) | {"column_bias": bias}

    return given


def _numbered_pairs(world: int, generator: torch.Generator) -> dict[str, Tensor]:
    given = _ruled(world, generator)
    return {name: each for name, each in given.items() if name != "hard_negatives"}


class _Ruled(nn.Module):
    """A retrieval loss with constants that are made of integers: weights and a guide."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.loss = RetrievalLoss(guide_margin=-0.2, **options)

    def forward(self, seeds: Tensor, **given: Tensor) -> Any:
        angles = seeds.to(given["queries"].dtype)
        guides = torch.stack((angles.cos(), angles.sin()), -1)
        return self.loss(
            **given,
            row_weights=2 + angles[:, 0].cos(),
            guide=(guides[:, 0], guides[:, 1], guides[:, 2:]),
        )


class _Taught(nn.Module):
    """A distillation from a teacher whose features, or scores, are made of integers."""

    def __init__(self, of: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.loss = of(**options)

    def forward(self, seeds: Tensor, groups: Tensor, ids: Tensor, **given: Tensor) -> Any:
        angles = seeds.to(given["queries"].dtype)
        if "hard_negatives" in given:
            return self.loss(**given, scores=angles[:, 1:].sin())
        unit = torch.stack((angles.cos(), angles.sin()), -1)
        return self.loss(**given, teacher_queries=unit[:, 0], teacher_documents=unit[:, 1])


def _in_batch(**options: Any) -> nn.Module:
    return InBatchDistillationLoss(teacher_scale=4.0, symmetric=True, **options)


def _tokens(world: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "image_tokens": _features(world, generator, ROWS, 4),
        "text_tokens": _features(world, generator, ROWS, 3),
    }


def _masked_tokens(world: int, generator: torch.Generator) -> dict[str, Tensor]:
    """With rules of who competes, too."""
    tokens = _tokens(world, generator)
    masks = {}
    for name, each in (
        ("image_mask", tokens["image_tokens"]),
        ("text_mask", tokens["text_tokens"]),
    ):
        mask = torch.rand(each.shape[:2], generator=generator) < 0.5
        masks[name] = mask.index_fill(1, torch.tensor(1), True)
    rules = {"ids": _integers(world, generator, ROWS, 5)}
    return tokens | masks | rules | {"groups": _integers(world, generator, ROWS, 2)}


def _searched(world: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Token queries and documents, two hard negatives of each query, and integers for masks."""
    numbers = torch.randint(99, (world * ROWS, 5), generator=generator)
    return {
        "query_tokens": _features(world, generator, ROWS, 3),
        "document_tokens": _features(world, generator, ROWS, 5),
        "hard_negatives": _features(world, generator, ROWS, 2, 4),
        "numbers": numbers,
    }


class _Searched(nn.Module):
    """A MaxSim loss with masks or, packed, lengths; ranks then hold tokens of different numbers."""

    def __init__(
        self,
        of: Callable[..., nn.Module],
        form: str,
        ruled: bool = False,
        scored: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.loss, self.form, self.ruled, self.scored = of(**options), form, ruled, scored

    def forward(self, numbers: Tensor, **given: Tensor) -> Any:
        kept = {
            "query_mask": _kept(numbers, 3),
            "document_mask": _kept(numbers.flip(1), 5),
            "hard_negative_mask": _kept(numbers.roll(2, 1), 4)[:, None].expand(-1, 2, -1),
        }
        if self.form == "packed":
            names = zip(kept, given, strict=True)
            given = {name: given[name][kept[mask]] for mask, name in names}
            kept = {n.replace("mask", "lengths"): mask.sum(-1) for n, mask in kept.items()}
        if self.form == "counts":
            kept["query_counts"] = ~kept["query_mask"] | (numbers[:, :3] < 50)
            kept["query_counts"][:, 0] = True
        if self.ruled:
            kept |= _token_rules(numbers)
        if self.scored:
            kept["scores"] = numbers[:, :3].to(next(iter(given.values())).dtype).sin()
        return self.loss(**given, **kept)


def _token_rules(numbers: Tensor) -> dict[str, Tensor]:
    bias, weights = numbers[:, :3].double().cos(), 2 + numbers[:, 3].double().sin()
    names = "ids", "groups", "column_bias", "row_weights"
    return dict(zip(names, (numbers[:, 0] % 5, numbers[:, 1] % 2, bias, weights), strict=True))


def _kept(numbers: Tensor, tokens: int) -> Tensor:
    """Some tokens of each sample, the second always."""
    mask = numbers[:, :tokens] < 60
    return mask.index_fill(1, torch.tensor(1), True)


def _max_sim(form: str, **options: Any) -> Callable[..., nn.Module]:
    return _with(_Searched, of=MaxSimLoss, form=form, **options)


def _matryoshka(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda **options: MatryoshkaLoss(build(**options), dims=[5, WIDTH])


def _with(build: Callable[..., nn.Module], **options: Any) -> Callable[..., nn.Module]:
    return lambda **more: build(init_logit_scale=30.0, **options, **more)


def _harder(**options: Any) -> Callable[..., nn.Module]:
    return _with(RetrievalLoss, hardness_strength=3.0, **options)


_CLIP, _NCE = _with(ClipLoss), _with(InfoNCELoss)
_BOTH_WAYS = _with(InfoNCELoss, symmetric=True)

CASES = [
    Case("clip", _CLIP, _pairs()),
    Case("clip labels", _CLIP, _pairs(labels=5)),
    Case("clip ids", _CLIP, _pairs(ids=5)),
    Case("clip labels and ids", _CLIP, _pairs(labels=7, ids=4)),
    Case("clip smoothing", _with(ClipLoss, label_smoothing=0.1), _pairs(ids=5)),
    Case("info_nce", _NCE, _retrieval()),
    Case("info_nce both ways", _BOTH_WAYS, _retrieval(ids=ROWS)),
    Case("info_nce shared", _NCE, _retrieval(4)),
    Case("info_nce shared both ways", _BOTH_WAYS, _retrieval(9, ids=ROWS)),
    Case("info_nce shared ids", _BOTH_WAYS, _retrieval(4)),
    Case("info_nce own", _NCE, _retrieval(ROWS, 3)),
    Case("info_nce margin", _with(InfoNCELoss, false_negative_margin=0.02), _retrieval(4)),
    Case(
        "info_nce margin both ways",
        _with(InfoNCELoss, false_negative_margin=0.0, symmetric=True),
        _retrieval(4),
    ),
    Case("info_nce debiased", _with(InfoNCELoss, tau_plus=0.1, symmetric=True), _retrieval()),
    Case("info_nce debiased own", _with(InfoNCELoss, tau_plus=0.1), _retrieval(ROWS, 2)),
    Case("retrieval", _with(RetrievalLoss, directions=DIRECTIONS), _retrieval(ROWS, 2)),
    Case("retrieval ids", _with(RetrievalLoss, directions=DIRECTIONS), _retrieval(ids=ROWS)),
    Case(
        "retrieval harder",
        _harder(directions=DIRECTIONS[:2], hardness_mode="in_batch_negatives"),
        _retrieval(ROWS, 2),
    ),
    Case("retrieval rules", _with(_Ruled, directions=DIRECTIONS), _biased(_ruled)),
    Case(
        "retrieval own",
        _harder(hardness_mode="all_negatives", in_batch_negatives=False),
        _retrieval(ROWS, 3),
    ),
    Case("distillation in the batch", _with(_Taught, of=_in_batch), _numbered_pairs),
    Case("distillation of scores", _with(_Taught, of=ScoreDistillationLoss), _ruled),
    Case("nt_xent", _with(NTXentLoss), _views),
    Case("nt_xent debiased", _with(NTXentLoss, tau_plus=0.1), _views),
    Case("sup_con", _with(SupConLoss), _classes),
    Case("siglip", _with(SigLipLoss), _pairs()),
    Case("siglip near its start", _with(SigLipLoss, init_logit_bias=-25.0), _pairs()),
    Case("siglip labels", _with(SigLipLoss), _pairs(labels=5)),
    Case("siglip captions", _with(_LabelPair), _captions),
    Case("late_interaction", _with(LateInteractionLoss), _tokens),
    Case("late_interaction masks", _with(LateInteractionLoss), _masked_tokens),
    Case("late_interaction one way", _with(LateInteractionLoss, one_way=True), _masked_tokens),
    Case("late_interaction sum", _with(LateInteractionLoss, token_reduction="sum"), _tokens),
    Case("max_sim masks", _max_sim("masks", ruled=True), _searched),
    Case("max_sim own", _max_sim("masks", share_hard_negatives=False), _searched),
    Case(
        "max_sim counts",
        _max_sim("counts", symmetric=True, token_reduction="mean"),
        _searched,
    ),
    Case("max_sim packed", _max_sim("packed", symmetric=True), _searched),
    Case(
        "max_sim packed own",
        _max_sim("packed", ruled=True, share_hard_negatives=False, token_reduction="mean"),
        _searched,
    ),
    Case(
        "distillation of max_sim",
        _with(
            _Searched,
            of=MaxSimDistillationLoss,
            form="packed",
            scored=True,
            token_reduction="mean",
        ),
        _searched,
    ),
    Case("matryoshka clip", _matryoshka(_CLIP), _pairs()),
    Case("matryoshka clip labels", _matryoshka(_CLIP), _pairs(labels=5)),
    Case(
        "matryoshka clip smoothing",
        _matryoshka(_with(ClipLoss, label_smoothing=0.1)),
        _pairs(),
    ),
    Case("matryoshka info_nce", _matryoshka(_BOTH_WAYS), _retrieval(4)),
    Case(
        "matryoshka info_nce margin",
        _matryoshka(_with(InfoNCELoss, false_negative_margin=0.0)),
        _retrieval(ROWS, 2),
    ),
    Case(
        "matryoshka retrieval",
        _matryoshka(_harder(directions=DIRECTIONS, hardness_mode="hard_negatives")),
        _biased(_retrieval(ROWS, 2)),
    ),
    Case("matryoshka nt_xent", _matryoshka(_with(NTXentLoss)), _views),
    Case("matryoshka sup_con", _matryoshka(_with(SupConLoss)), _classes),
    Case("matryoshka siglip", _matryoshka(_with(SigLipLoss)), _pairs(labels=5)),
    Case(
        "matryoshka distillation in the batch",
        _with(_Taught, of=_matryoshka(_in_batch)),
        _numbered_pairs,
    ),
    Case(
        "matryoshka distillation of scores",
        _with(_Taught, of=_matryoshka(ScoreDistillationLoss)),
        _ruled,
    ),
    Case(
        "matryoshka distillation of max_sim",
        _with(_Searched, of=_matryoshka(MaxSimDistillationLoss), form="packed", scored=True),
        _searched,
    ),
]


def evaluated(loss: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that a loss returns, and every gradient, times an outer factor."""
    leaves = {
        name: each.clone().requires_grad_() if each.is_floating_point() else each
        for name, each in given.items()
    }
    loss = loss.to(next(each.dtype for each in leaves.values() if each.is_floating_point()))
    output = loss(**leaves)
    (3 * output.loss).backward()
    found = {name: each for name, each in output._asdict().items() if each is not None}
    found |= {f"d{name}": each.grad for name, each in leaves.items() if each.requires_grad}
    return found | {f"d{name}": each.grad for name, each in loss.named_parameters()}


class Place(NamedTuple):
    """Where this process is among those that share a batch."""

    rank: int
    world: int

    @staticmethod
    def in_group(group: dist.ProcessGroup | None) -> Place:
        return Place(dist.get_rank(group), dist.get_world_size(group))

    def share(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of everything."""
        return {name: each.chunk(self.world)[self.rank].clone() for name, each in whole.items()}

    def of_rank(self, found: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """A rank has the gradient of its own features, and everything else as it is."""
        return {
            name: each.chunk(self.world)[self.rank] if name[1:] in whole else each.detach()
            for name, each in found.items()
        }


def whole_batch(case: Case, world: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What all ranks together pass."""
    given = case.given(world, torch.Generator().manual_seed(11))
    return {n: each.to(dtype) if each.is_floating_point() else each for n, each in given.items()}


def worst_errors(
    case: Case, dtype: torch.dtype, *, group: dist.ProcessGroup | None = None, **options: Any
) -> dict[str, float]:
    """Largest difference over the largest entry, of the spread loss to that of the whole batch."""
    place = Place.in_group(group)
    whole = whole_batch(case, place.world, dtype)
    spread = evaluated(case.build(group=group, **options), place.share(whole))
    alone = evaluated(case.build(group=alone_group(), impl=options["impl"]), whole)
    return relative_errors(spread, place.of_rank(alone, whole))


def relative_errors(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor the largest difference over the largest true entry."""
    return {
        name: float(
            (got[name] - true).detach().abs().max() / true.detach().abs().max().clamp_min(1e-30)
        )
        for name, true in truth.items()
    }


_groups: dict[int, dist.ProcessGroup] = {}


def alone_group() -> dist.ProcessGroup:
    """A group of this process alone, in which nothing is exchanged."""
    if id(dist.group.WORLD) not in _groups:
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        _groups[id(dist.group.WORLD)] = groups[dist.get_rank()]
    return _groups[id(dist.group.WORLD)]
