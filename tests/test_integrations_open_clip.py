"""The losses in place of open_clip's, beside open_clip's own, and its models under GradCache."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from example_runs import run_example
from losses_over_ranks import Place, relative_errors
from one_shot import gradient_errors, twins, worst
from packaging import version
from rank_processes import Check, failures
from siglip_inputs import random_inputs
from tiny_run import make_data
from torch import Tensor, nn

from gradcache_clip import GradCache, deferred_step
from gradcache_clip.distributed import AllReduceStrategy
from gradcache_clip.integrations.open_clip import ClipLoss, OpenClipTowers, SigLipLoss

open_clip = pytest.importorskip("open_clip")
theirs = pytest.importorskip("open_clip.loss")

BOTH = [(ClipLoss, theirs.ClipLoss), (SigLipLoss, theirs.SigLipLoss)]
each_loss = pytest.mark.parametrize(("ours", "original"), BOTH, ids=["clip", "siglip"])
LIMIT = {torch.float64: 1e-12, torch.float32: 2e-5}


def evaluated(loss: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and the gradient of everything that it was given."""
    leaves = {name: each.detach().clone().requires_grad_() for name, each in given.items()}
    # As out of a model: on several processes features that are leaves are those of a GradCache.
    value = loss(**{name: 1 * each for name, each in leaves.items()}, output_dict=True)
    value = value["contrastive_loss"]
    (3 * value).backward()
    return {"loss": value} | {f"d{name}": each.grad for name, each in leaves.items()}


def batch(rows: int, width: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    names = "image_features", "text_features", "logit_scale", "logit_bias"
    return dict(zip(names, random_inputs(rows, width, dtype), strict=True))


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    """All but the gradient of a bias in a softmax, which is zero but for open_clip's rounding."""
    if "dlogit_bias" in got and not got["dlogit_bias"].any():
        assert expected["dlogit_bias"].abs() < limit
        got, expected = ({**each, "dlogit_bias": torch.ones(1)} for each in (got, expected))
    errors = relative_errors(got, expected)
    assert max(errors.values()) < limit, errors


@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("rows", "width"), [(2, 3), (7, 64), (97, 33), (300, 16)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_loss_and_gradients_are_those_of_open_clip(
    ours: Any, original: Any, dtype: torch.dtype, rows: int, width: int, with_bias: bool
) -> None:
    given = batch(rows, width, dtype)
    if not with_bias:
        del given["logit_bias"]
    # open_clip's sigmoid loss wants the bias to be there, if only as None.
    their_loss = partial(original(), **({} if with_bias else {"logit_bias": None}))
    assert_equal(evaluated(ours(), given), evaluated(their_loss, given), LIMIT[dtype])


@each_loss
def test_a_scale_of_one_element_with_a_dimension(ours: Any, original: Any) -> None:
    """As open_clip's models have it with nonscalar_logit_scale."""
    given = batch(9, 8)
    given |= {name: given[name].detach().reshape(1) for name in ("logit_scale", "logit_bias")}
    got, expected = evaluated(ours(), given), evaluated(original(), given)
    assert got["loss"].shape == () and got["dlogit_scale"].shape == (1,)
    assert_equal(got, expected, 1e-12)


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_no_further_from_the_truth(
    ours: Any, original: Any, dtype: torch.dtype
) -> None:
    given = batch(64, 32, dtype)
    wide = {name: each.double() for name, each in given.items()}
    truth = evaluated(original(), wide)
    found = [
        relative_errors({n: x.double() for n, x in evaluated(loss, given).items()}, truth)
        for loss in (ours(), original())
    ]
    for name in ("loss", "dimage_features", "dtext_features", "dlogit_scale"):
        assert found[0][name] <= found[1][name] + torch.finfo(dtype).eps, name


@each_loss
def test_it_holds_no_parameters_of_its_own(ours: Any, original: Any) -> None:
    assert ours().state_dict() == original().state_dict() == {}
    assert not [*ours().parameters()]


@each_loss
def test_a_tensor_or_a_dict(ours: Any, original: Any) -> None:
    given = [each.detach() for each in batch(5, 4).values()]
    loss = ours()(*given)
    torch.testing.assert_close(loss, original()(*given))
    assert torch.equal(ours()(*given, output_dict=True)["contrastive_loss"], loss)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="use_horovod: expected False, got True; .*torchrun"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="dist_impl: expected 'bidir', .*, got 'tree'"):
        SigLipLoss(dist_impl="tree")
    for loss in (ClipLoss(world_size=4), SigLipLoss(world_size=4)):
        with pytest.raises(ValueError, match="world_size: expected 1, .* got 4; pass world_size="):
            loss(**batch(4, 3))
    with pytest.raises(ValueError, match="text_features: expected the shape of image_features"):
        ClipLoss()(torch.ones(4, 3), torch.ones(5, 3), torch.tensor(1.0))


def model(**more: Any) -> nn.Module:
    torch.manual_seed(3)
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
        text_cfg={"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1},
        output_dict=True,
        **more,
    )


def pairs(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    texts = torch.randint(1, 40, (rows, 8), generator=generator)
    return torch.randn(rows, 3, 16, 16, generator=generator), texts


def towers_and_cache(loss: nn.Module, one: nn.Module, **options: Any) -> GradCache:
    towers = OpenClipTowers(one)
    return GradCache(towers, towers.loss_with(loss), **{"chunk_size": 4, **options})


@each_loss
@pytest.mark.parametrize("bias", [None, -5.0])
def test_a_model_of_open_clip_trains_under_gradcache(
    ours: Any, original: Any, bias: float | None
) -> None:
    """Every parameter of the model, its scale and its bias among them, over chunks of 4 of 11."""
    (mine, true) = (one for (one,) in twins(model(init_logit_bias=bias).double()))
    images, texts = pairs(11)
    inputs = images.double(), texts
    out = towers_and_cache(ours(), mine)(*inputs)
    expected = original()(**{"logit_bias": None, **true(*inputs)})
    expected.backward()
    torch.testing.assert_close(out.loss, expected.detach())
    if ours is ClipLoss and bias is not None:
        assert mine.logit_bias.grad == 0 and true.logit_bias.grad.abs() < 1e-12
        true.logit_bias.grad = mine.logit_bias.grad
    assert worst(gradient_errors([mine], [true]))[1] < 1e-10
    assert mine.logit_scale.grad.abs() > 0 and 0 <= out.accuracy <= 1


class Batches:
    """What open_clip's training loop asks of its data."""

    def __init__(self, images: Tensor, texts: Tensor, size: int) -> None:
        self.parts = [*zip(images.split(size), texts.split(size), strict=True)]
        self.num_batches, self.num_samples = len(self.parts), len(images)
        self.dataloader = self

    def set_epoch(self, epoch: int) -> None: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if version.parse(open_clip.__version__).major < 4:
            return iter(self.parts)
        return iter([{"image": images, "text": texts} for images, texts in self.parts])


def loop_of_open_clip() -> Callable[..., None]:
    """Return what trains an epoch in version 3, which version 4 keeps beside its tasks."""
    for name in ("open_clip_train.legacy_train", "open_clip_train.train"):
        with suppress(ModuleNotFoundError):
            return importlib.import_module(name).train_one_epoch
    pytest.skip("needs open_clip_train")


def trained_by_open_clip(
    one: nn.Module,
    images: Tensor,
    texts: Tensor,
    accum_freq: int,
    loss: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> None:
    """Its own loop over one batch in `accum_freq` parts, at a learning rate of zero."""
    settings = SimpleNamespace(
        device="cpu", precision="fp32", distill=teacher is not None, skip_scheduler=True,
        accum_freq=accum_freq, horovod=False, grad_clip_norm=None, rank=0, world_size=1,
        log_every_n_steps=100, batch_size=len(images) // accum_freq, wandb=False,
    )  # fmt: skip
    data = {"train": Batches(images, texts, settings.batch_size)}
    optimizer = torch.optim.SGD(one.parameters(), lr=0.0)
    loss = loss or theirs.ClipLoss()
    loop_of_open_clip()(one, data, loss, 0, optimizer, None, None, teacher, settings, None)


def test_the_scale_learns_as_fast_in_chunks_as_in_one_batch() -> None:
    """open_clip's accumulation multiplies the gradient of its scale by the number of parts."""
    images, texts = pairs(12)
    one = model()
    (whole, parts, ours) = (twins(one)[1][0] for _ in range(3))
    trained_by_open_clip(whole, images, texts, 1)
    trained_by_open_clip(parts, images, texts, 4)
    towers_and_cache(ClipLoss(), ours, chunk_size=3)(images, texts)
    assert worst(gradient_errors([ours], [whole]))[1] < 1e-5
    errors = gradient_errors([parts], [whole])
    ratio = parts.logit_scale.grad / whole.logit_scale.grad
    assert ratio.item() == pytest.approx(4, rel=1e-4)
    assert errors.pop("0.logit_scale") == pytest.approx(3, rel=1e-4)
    assert max(errors.values()) < 1e-5


def beside_theirs(
    ours: Callable[..., nn.Module], original: Callable[..., nn.Module], *, averaged: bool
) -> None:
    """Gradients that DDP then averages; `averaged`: theirs differ by rank in loss and scale."""
    place = Place.in_group(None)
    torch.manual_seed(1)
    whole = {name: each.detach() for name, each in batch(6 * place.world, 16).items()}
    given = {n: x.chunk(place.world)[place.rank] if x.ndim else x for n, x in whole.items()}
    where = {"rank": place.rank, "world_size": place.world}
    got, expected = evaluated(ours(**where), given), evaluated(original(**where), given)
    if averaged:
        for name in ("loss", "dlogit_scale", "dlogit_bias"):
            mean = expected[name].detach().clone()
            dist.all_reduce(mean)
            expected[name] = mean / place.world
    assert_equal(got, expected, 1e-11)


def wrong_elsewhere() -> None:
    """open_clip without gather_with_grad: towers learn at 1/W of the rate, or the wrong way."""
    place = Place.in_group(None)
    torch.manual_seed(1)
    whole = {name: each.detach() for name, each in batch(6 * place.world, 16).items()}
    given = {n: x.chunk(place.world)[place.rank] if x.ndim else x for n, x in whole.items()}
    where = {"rank": place.rank, "world_size": place.world}
    for flags in ({}, {"local_loss": True}):
        right = evaluated(ClipLoss(**where, **flags), given)
        plain = evaluated(theirs.ClipLoss(**where, **flags), given)
        assert relative_errors(plain, right)["dimage_features"] > 0.1, flags
    assert_equal(
        evaluated(ClipLoss(**where, local_loss=True), given),
        evaluated(ClipLoss(**where, gather_with_grad=True), given),
        1e-15,
    )


def a_wrong_place() -> None:
    place = Place.in_group(None)
    given = batch(4, 3)
    with pytest.raises(ValueError, match=rf"world_size: expected {place.world}, .* got 1"):
        ClipLoss()(**given)
    other = (place.rank + 1) % place.world
    with pytest.raises(ValueError, match=rf"rank: expected {place.rank}, .* got {other}"):
        SigLipLoss(rank=other, world_size=place.world)(**given)


def in_place_of_loss_with() -> None:
    """`forward` multiplies gradients for DDP, and GradCache's strategies do so as well."""
    place, one = Place.in_group(None), model()
    loss, towers = ClipLoss(rank=place.rank, world_size=place.world), OpenClipTowers(one)
    plain = lambda images, texts: loss(images, texts, one.logit_scale.exp())  # noqa: E731
    cache = GradCache(towers, plain, chunk_size=4, strategy=AllReduceStrategy())
    for step in (cache, partial(deferred_step, cache)):
        with pytest.raises(ValueError, match=r"image_features: expected .*\.loss_with\(loss\)"):
            step(*pairs(6))
    assert all(parameter.grad is None for parameter in one.parameters())


def a_model_over_ranks() -> None:
    """All parameters of a model, without a wrapper, as in one process over the whole batch."""
    place = Place.in_group(None)
    (mine, true) = (one for (one,) in twins(model().double()))
    images, texts = pairs(5 * place.world)
    whole = {"image": images.double(), "text": texts}
    loss = ClipLoss(rank=place.rank, world_size=place.world)
    cache = towers_and_cache(loss, mine, chunk_size=2, strategy=AllReduceStrategy())
    cache(*place.share(whole).values())
    theirs.ClipLoss()(**true(*whole.values())).backward()
    name, error = worst(gradient_errors([mine], [true]))
    assert error < 1e-10, f"{name}: {error:.1e}"


def over_ranks() -> Iterator[tuple[str, Check]]:
    for exchange in ("gather", "ring"):
        ours = partial(ClipLoss, exchange=exchange)
        for local in (False, True):
            flags = {"local_loss": local, "gather_with_grad": True}
            original = partial(theirs.ClipLoss, **flags)
            check = partial(beside_theirs, partial(ours, **flags), original, averaged=local)
            yield f"clip {exchange} local_loss={local}", check
    for how in ("bidir", "shift", "reduce", "gather"):
        ours, original = (partial(each, dist_impl=how) for each in (SigLipLoss, theirs.SigLipLoss))
        yield f"siglip {how}", partial(beside_theirs, ours, original, averaged=True)
    yield "elsewhere", wrong_elsewhere
    yield "a wrong place", a_wrong_place
    yield "a model", a_model_over_ranks
    yield "in place of loss_with", in_place_of_loss_with


@pytest.mark.distributed
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_in_processes(world: int, tmp_path: Path) -> None:
    found = failures(over_ranks, world, tmp_path)
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_the_example_learns(tmp_path: Path) -> None:
    make_data(tmp_path, characters=500)
    result = run_example("open_clip_training", str(tmp_path), "20", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    losses = [float(line.split()[3]) for line in result.stdout.splitlines()]
    assert losses[0] == pytest.approx(math.log(256), abs=0.5)
    assert losses[-1] < math.log(256) - 0.3
