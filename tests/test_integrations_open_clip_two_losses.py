"""CoCaLoss and DistillClipLoss beside open_clip's own, and what its trainer does with all four."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip_swapped
import pytest
import torch
import torch.distributed as dist
from losses_over_ranks import Place, relative_errors
from one_shot import gradient_errors, twins, worst
from rank_processes import Check, failures
from test_integrations_open_clip import (
    LIMIT,
    assert_equal,
    batch,
    model,
    pairs,
    trained_by_open_clip,
)
from torch import Tensor, nn
from torch.nn.functional import normalize

from gradcache_clip import GradCache
from gradcache_clip.integrations import open_clip as ours
from gradcache_clip.losses import InBatchDistillationLoss

open_clip = pytest.importorskip("open_clip")
theirs = pytest.importorskip("open_clip.loss")

NAMES = "ClipLoss", "SigLipLoss", "CoCaLoss", "DistillClipLoss"
CAPTIONS = {"caption_loss_weight": 2.0, "clip_loss_weight": 0.5, "pad_id": 3}
OPTIONS: dict[str, dict[str, Any]] = {name: {} for name in NAMES} | {"CoCaLoss": CAPTIONS}
TWO = NAMES[2:]
CONSTANTS = "labels", "dist_image_features", "dist_text_features", "dist_logit_scale"
each_of_two = pytest.mark.parametrize("name", TWO)


def both_ways(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    return tuple(getattr(library, name)(**OPTIONS[name], **options) for library in (ours, theirs))


def given_to(name: str, rows: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    given = {key: each.detach() for key, each in batch(rows, width, dtype).items()}
    del given["logit_bias"]
    if name == "CoCaLoss":
        labels = torch.randint(9, (rows, 5))
        labels[:, 0] = 1
        scale = given.pop("logit_scale")
        captions = {"logits": torch.randn(rows, 5, 9, dtype=dtype), "labels": labels}
        return given | captions | {"logit_scale": scale}
    wide = given["logit_scale"].dtype
    teacher = [normalize(torch.randn(rows, width + 3, dtype=dtype), dim=1) for _ in range(2)]
    return given | dict(zip(CONSTANTS[1:], (*teacher, torch.tensor(7.0, dtype=wide)), strict=True))


def evaluated(loss: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both losses, and the gradients of their sum with other weights."""
    leaves = {
        name: each if name in CONSTANTS else each.detach().clone().requires_grad_()
        for name, each in given.items()
    }
    found = loss(**{name: 1 * each for name, each in leaves.items()}, output_dict=True)
    sum(weight * each for weight, each in zip((3, 2), found.values(), strict=True)).backward()
    gradients = {f"d{name}": each.grad for name, each in leaves.items() if each.requires_grad}
    return dict(found) | gradients


@each_of_two
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("rows", "width"), [(2, 3), (7, 64), (300, 16)])
def test_loss_and_gradients_are_those_of_open_clip(
    name: str, dtype: torch.dtype, rows: int, width: int
) -> None:
    given = given_to(name, rows, width, dtype)
    got, expected = (evaluated(loss, given) for loss in both_ways(name))
    assert got.keys() == expected.keys()
    assert_equal(got, expected, LIMIT[dtype])


@each_of_two
def test_in_bf16_it_is_no_further_from_the_truth(name: str) -> None:
    given = given_to(name, 64, 32, torch.bfloat16)
    wide = {k: each.double() if each.is_floating_point() else each for k, each in given.items()}
    truth = evaluated(both_ways(name)[1], wide)
    found = [
        relative_errors({key: each.double() for key, each in evaluated(loss, given).items()}, truth)
        for loss in both_ways(name)
    ]
    for key in truth:
        assert found[0][key] <= found[1][key] + torch.finfo(torch.bfloat16).eps, key


@each_of_two
def test_a_tuple_or_a_dict(name: str) -> None:
    given = given_to(name, 5, 4, torch.float64)
    loss, original = both_ways(name)
    assert tuple(loss(**given, output_dict=True).values()) == loss(**given)
    torch.testing.assert_close(loss(*given.values()), original(*given.values()))


def test_captions_alone_have_no_negatives() -> None:
    """At a weight of 0 the contrastive loss is not computed: one pair is enough."""
    options = CAPTIONS | {"clip_loss_weight": 0}
    given = given_to("CoCaLoss", 1, 4, torch.float64)
    contrastive, captions = ours.CoCaLoss(**options)(**given)
    assert contrastive == 0
    torch.testing.assert_close(captions, theirs.CoCaLoss(**options)(**given)[1])
    with pytest.raises(ValueError, match="batch: expected at least 2 pairs, got 1"):
        ours.CoCaLoss(**CAPTIONS)(**given)


def test_a_teacher_may_have_a_single_pair_no_more_than_a_student() -> None:
    with pytest.raises(ValueError, match="batch: expected at least 2 pairs, got 1"):
        ours.DistillClipLoss()(**given_to("DistillClipLoss", 1, 4, torch.float64))


WRONG = {
    "a teacher that learns": (
        {"dist_text_features": torch.ones(4, 3).requires_grad_()},
        r"dist_image_features: expected constants, got features that .*torch.no_grad\(\)",
    ),
    "a teacher's scale that learns": (
        {"dist_logit_scale": torch.tensor(1.0).requires_grad_()},
        "dist_image_features: expected constants",
    ),
    "a teacher of other pairs": (
        {"dist_image_features": torch.ones(3, 3), "dist_text_features": torch.ones(3, 3)},
        "dist_image_features: expected 4 rows as image_features has, got 3",
    ),
    "a teacher of two widths": (
        {"dist_text_features": torch.ones(4, 2)},
        r"dist_text_features: expected the shape of dist_image_features \(4, 3\), got \(4, 2\)",
    ),
    "a scale for each width": (
        {"dist_logit_scale": torch.ones(3)},
        r"dist_logit_scale: expected one element, got shape \(3,\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_teacher_may_not_be(case: str) -> None:
    rows, scale = torch.ones(4, 3), torch.tensor(1.0)
    given = dict(zip(CONSTANTS[1:], (rows, rows, scale), strict=True))
    wrong, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        ours.DistillClipLoss()(rows, rows, scale, **(given | wrong))


def test_captions_that_are_not_shifted() -> None:
    given = given_to("CoCaLoss", 4, 3, torch.float64)
    with pytest.raises(
        ValueError, match=r"labels: expected .* got \(4, 4\) with \(4, 5, 9\); pass"
    ):
        ours.CoCaLoss(**CAPTIONS)(**(given | {"labels": given["labels"][:, 1:]}))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ClipLoss", {"image_features": None}, "image_features: .* floating tensor, got NoneType"),
        ("DistillClipLoss", {"dist_text_features": None}, "dist_text_features: .* got NoneType"),
        ("CoCaLoss", {"labels": torch.ones(4, 5)}, "labels: expected .* int64, got torch.float32"),
    ],
)
def test_what_no_loss_can_take(name: str, change: dict[str, Any], message: str) -> None:
    given = batch(4, 3) if name == "ClipLoss" else given_to(name, 4, 3, torch.float64)
    with pytest.raises(TypeError, match=message):
        both_ways(name)[0](**(given | change))


def test_a_weight_that_would_leave_the_contrast_out() -> None:
    with pytest.raises(ValueError, match="clip_loss_weight: expected a finite number, got None"):
        ours.CoCaLoss(1.0, None)
    with pytest.raises(TypeError, match="local_loss: expected True or False, got 'no'"):
        ours.ClipLoss(local_loss="no")


def test_a_teacher_under_gradcache() -> None:
    """As docs/integrations/open_clip.md has it: the gradients of DistillClipLoss."""
    (mine,), (true,) = twins(model().double())
    images, texts = pairs(11)
    teacher = tuple(given_to("DistillClipLoss", 11, 16, torch.float64).values())[3:5]
    towers = ours.OpenClipTowers(mine)
    contrastive = towers.loss_with(ours.ClipLoss())
    distillation = InBatchDistillationLoss(teacher_scale=100.0, symmetric=True, normalize=False)

    def loss(images: Tensor, texts: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
        scale = mine.logit_scale.exp()
        distilled = distillation(images, texts, *teacher, scale).loss
        return contrastive(images, texts).loss + distilled

    GradCache(towers, loss, chunk_size=4)(images.double(), texts, loss_kwargs={"teacher": teacher})
    scale = torch.tensor(100.0).double()
    sum(
        theirs.DistillClipLoss()(*true(images.double(), texts).values(), *teacher, scale)
    ).backward()
    assert worst(gradient_errors([mine], [true]))[1] < 1e-10


# What open_clip's trainer, and those who read its losses, find


@pytest.mark.parametrize("name", NAMES)
def test_its_options_can_be_read(name: str) -> None:
    flags = {"cache_labels": True, "rank": 1, "world_size": 2}
    if name == "SigLipLoss":
        flags |= {"dist_impl": "shift"}
    else:
        flags |= {"local_loss": True, "gather_with_grad": True}
    for options in (flags, {}):
        mine, original = both_ways(name, **options)
        state = {"prev_num_logits", "labels"}
        read = {key for key in vars(original) if not key.startswith("_")} - state
        assert {key: getattr(mine, key) for key in read} == {
            key: getattr(original, key) for key in read
        }


@pytest.mark.parametrize("name", NAMES)
def test_they_are_built_and_called_as_open_clips(name: str) -> None:
    """All that a version of open_clip takes; horovod left with version 4, chunks came."""
    for function in ("__init__", "forward", "get_logits"):
        wanted = inspect.signature(getattr(getattr(theirs, name), function)).parameters
        given = inspect.signature(getattr(getattr(ours, name), function)).parameters
        assert list(given)[: len(wanted)] == list(wanted)
        for key in given.keys() - wanted.keys() - {"use_horovod", "chunk_size"}:
            assert given[key].kind is inspect.Parameter.KEYWORD_ONLY
        for key, parameter in wanted.items():
            assert parameter.default in (inspect.Parameter.empty, given[key].default), key


@pytest.mark.parametrize("chunk_size", [1, 8, 64])
def test_chunks_of_the_sigmoid_loss_change_nothing(chunk_size: int) -> None:
    """As open_clip 4 tests its own; 70 rows are no multiple of 8 or 64."""
    given = batch(70, 32, torch.float64)
    loss = ours.SigLipLoss(chunk_size=chunk_size)
    expected = theirs.SigLipLoss()(**given)
    torch.testing.assert_close(loss(**given), expected, rtol=1e-12, atol=0)
    assert loss.chunk_size == chunk_size
    with pytest.raises(ValueError, match="chunk_size: expected a positive integer, got -1; leave"):
        ours.SigLipLoss(chunk_size=-1)


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("with_bias", [True, False])
def test_logits(name: str, with_bias: bool) -> None:
    given = batch(5, 4)
    if not with_bias:
        del given["logit_bias"]
    got, expected = (loss.get_logits(**given) for loss in both_ways(name))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="logit_scale: expected a tensor of one element, got int"):
        both_ways(name)[0].get_logits(**(given | {"logit_scale": 3}))


def settings(**more: Any) -> SimpleNamespace:
    """Arguments of its command line that choose and build a loss."""
    flags = {"local_loss": True, "gather_with_grad": True, "rank": 0, "world_size": 1}
    flags |= {"coca_caption_loss_weight": 2.0, "coca_contrastive_loss_weight": 1.0}
    flags |= {"loss_dist_impl": "gather", "horovod": False, "torchcompile": False}
    chosen = {"distill": False, "siglip": False, "model": "ViT-B-32"}
    return SimpleNamespace(**(flags | chosen | more))


def test_its_command_line_builds_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, loss in open_clip_swapped.places():
        monkeypatch.setattr(owner, name, loss)
    built = [
        open_clip.create_loss(settings(**more))
        for more in ({}, {"siglip": True}, {"model": "coca_ViT-B-32"}, {"distill": True})
    ]
    assert [type(loss) for loss in built] == [getattr(ours, name) for name in NAMES]
    assert built[1].dist_impl == "gather" and built[2].caption_loss_weight == 2.0


def captioning() -> nn.Module:
    torch.manual_seed(3)
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8, "attentional_pool": True}
    words = {"vocab_size": 40, "width": 32, "heads": 2, "layers": 1, "context_length": 8}
    ends = {"output_tokens": True}
    one = open_clip.CoCa(32, words, {**words, **ends, "embed_cls": True}, {**vision, **ends})
    # open_clip leaves it unset.
    nn.init.normal_(one.text_decoder.text_projection, std=0.1)
    return one


@pytest.mark.parametrize("name", [NAMES[0], *TWO])
def test_its_trainer_takes_ours(name: str) -> None:
    """One step of open_clip's loop; in parts, ours does what its own does."""
    one = captioning() if name == "CoCaLoss" else model()
    images, texts = pairs(8)
    more: dict[str, Any] = {"teacher": model()} if name == "DistillClipLoss" else {}
    (mine,), (true,) = twins(one)
    for each, loss in zip((mine, true), both_ways(name), strict=True):
        trained_by_open_clip(each, images, texts, 1, loss=loss, **more)
    assert worst(gradient_errors([mine], [true]))[1] < 1e-5


# On several processes


def beside_theirs(name: str, **options: Any) -> None:
    """Gradients that DDP then averages; with local_loss theirs differ by rank, as captions do."""
    place = Place.in_group(None)
    torch.manual_seed(1)
    whole = given_to(name, 6 * place.world, 16, torch.float64)
    given = {n: x.chunk(place.world)[place.rank] if x.ndim else x for n, x in whole.items()}
    flags = {"rank": place.rank, "world_size": place.world, "gather_with_grad": True}
    exchange = options.pop("exchange")
    mine = getattr(ours, name)(**OPTIONS[name], **flags, **options, exchange=exchange)
    original = getattr(theirs, name)(**OPTIONS[name], **flags, **options)
    got, expected = evaluated(mine, given), evaluated(original, given)
    # In one order on every rank: that of a set differs from process to process.
    for key in sorted({"contrastive_loss", "distill_loss", "dlogit_scale"} & expected.keys()):
        mean = expected[key].detach().clone()
        dist.all_reduce(mean)
        expected[key] = mean / place.world
    assert_equal(got, expected, 1e-10)


def logits_of_all(name: str, **options: Any) -> None:
    """And their gradients, which must cross to the other ranks."""
    place, found = Place.in_group(None), []
    torch.manual_seed(place.rank)
    weights, features = torch.randn(99, 99).double(), torch.randn(2, 3, 4).double()
    for loss in both_ways(name, rank=place.rank, world_size=place.world, **options):
        leaves = features.clone().requires_grad_()
        logits = loss.get_logits(*leaves, torch.tensor(2.0).double())
        each = logits if isinstance(logits, tuple) else (logits,)
        sum((x * weights[: x.shape[0], : x.shape[1]]).sum() for x in each).backward()
        found.append([*each, leaves.grad])
    for mine, true in zip(*found, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


def over_ranks() -> Iterator[tuple[str, Check]]:
    for local in (False, True):
        for exchange in ("gather", "ring"):
            for name in TWO:
                check = partial(beside_theirs, name, local_loss=local, exchange=exchange)
                yield f"{name} {exchange} local_loss={local}", check
        flags = {"local_loss": local, "gather_with_grad": True}
        yield f"logits local_loss={local}", partial(logits_of_all, "ClipLoss", **flags)
    yield "logits of a rank", partial(logits_of_all, "SigLipLoss")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_in_processes(world: int, tmp_path: Path) -> None:
    found = failures(over_ranks, world, tmp_path)
    assert not found, "\n".join(found)
