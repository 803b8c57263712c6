"""Masks by which rows are trimmed: their names, their values, and several of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_shot import gradient_errors, one_shot, twins, worst
from test_distributed import in_two_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from gradcache_clip import ByLength, ClipLoss, GradCache
from gradcache_clip.distributed import FSDPStrategy

ROWS, LENGTH, PATCHES = 9, 6, 8


class Sums(nn.Module):
    """Sums words and patches, each where its mask is one."""

    def __init__(self, words_mask: str, patches_mask: str) -> None:
        super().__init__()
        self.words, self.patches = nn.Embedding(40, 8), nn.Linear(3, 8)
        self.names = words_mask, patches_mask
        self.widths: set[tuple[int, int]] = set()

    def forward(self, words: Tensor, patches: Tensor, **masks: Tensor) -> Tensor:
        if self.training:
            self.widths.add((words.shape[1], patches.shape[1]))
        of_words, of_patches = (masks[name][..., None].double() for name in self.names)
        return (self.words(words) * of_words).sum(1) + (self.patches(patches) * of_patches).sum(1)


def mask_of(columns: int, side: str = "right") -> Tensor:
    mask = torch.arange(columns) < torch.randint(1, columns, (ROWS, 1))
    return mask.flip(1) if side == "left" else mask


def both_kinds(words_mask: str, patches_mask: str, patches: int = PATCHES) -> dict[str, Tensor]:
    of_words, of_patches = mask_of(LENGTH, "left"), mask_of(patches)
    return {
        "words": torch.randint(1, 40, (ROWS, LENGTH)) * of_words,
        "patches": torch.randn(ROWS, patches, 3).double() * of_patches[..., None],
        words_mask: of_words,
        patches_mask: of_patches,
    }


def assert_exact(inputs: Any, encoder: nn.Module, by_length: ByLength) -> nn.Module:
    """Beside the one-shot step over whole rows, in fp64; returns the encoder."""
    ours, truth = twins(encoder.double(), nn.Linear(5, 8).double(), ClipLoss().double())
    both = inputs, torch.randn(ROWS, 5).double()
    GradCache(ours[:2], ours[2], chunk_size=2, sort_by_length=[by_length, None])(*both)
    one_shot(truth[:2], truth[2], both)
    assert worst(gradient_errors(ours, truth))[1] < 1e-10
    return ours[0]


@pytest.mark.parametrize(
    ("mask", "trimmed"),
    [
        (["attention_mask", "pixel_attention_mask"], (True, True)),
        ("attention_mask", (True, False)),
        ("pixel_attention_mask", (False, True)),
        (["pixel_attention_mask"], (False, True)),
    ],
    ids=str,
)
def test_masks_by_name(mask, trimmed):
    names = "attention_mask", "pixel_attention_mask"
    encoder = assert_exact(both_kinds(*names), Sums(*names), ByLength(mask=mask))
    words, patches = zip(*encoder.widths, strict=True)
    assert (min(words) < LENGTH - 1, min(patches) < PATCHES - 1) == trimmed


@pytest.mark.parametrize("found", ["attention_mask", "pixel_attention_mask", "patch_valid"])
def test_the_one_of_a_known_name_is_found(found):
    encoder = assert_exact(both_kinds("other", found), Sums("other", found), ByLength())
    words, patches = zip(*encoder.widths, strict=True)
    assert set(words) == {LENGTH} and min(patches) < PATCHES - 1


def test_a_mask_of_any_name():
    names = "kept_words", "kept_patches"
    encoder = assert_exact(both_kinds(*names), Sums(*names), ByLength(mask=names))
    assert min(min(widths) for widths in encoder.widths) < LENGTH - 1


@pytest.mark.parametrize(
    "kind",
    [torch.bool, torch.uint8, torch.int32, torch.long, torch.bfloat16, torch.float64],
    ids=str,
)
def test_masks_of_any_kind(kind):
    inputs = both_kinds("other", "patch_valid")
    inputs["patch_valid"] = inputs["patch_valid"].to(kind)
    encoder = assert_exact(inputs, Sums("other", "patch_valid"), ByLength())
    assert min(patches for _, patches in encoder.widths) < PATCHES - 1


def test_a_mask_in_a_tuple_is_named_by_its_place():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.widths = nn.Embedding(40, 8), set()

        def forward(self, words: Tensor, kept: Tensor) -> Tensor:
            self.widths.add(words.shape[1])
            return (self.words(words) * kept[..., None]).sum(1)

    kept = mask_of(LENGTH)
    inputs = torch.randint(1, 40, kept.shape) * kept, kept
    encoder = assert_exact(inputs, Pair(), ByLength(mask=1))
    assert min(encoder.widths) < LENGTH - 1


def test_masks_of_one_width_trim_what_lies_beside_them():
    class Nested(Sums):
        def forward(self, text: dict[str, Tensor], image: dict[str, Tensor]) -> Tensor:
            masks = {"text": text["attention_mask"], "image": image["patch_valid"]}
            return super().forward(text["words"], image["patches"], **masks)

    flat = both_kinds("attention_mask", "patch_valid", LENGTH)
    text = {name: flat[name] for name in ("words", "attention_mask")}
    image = {name: flat[name] for name in ("patches", "patch_valid")}
    by_length = ByLength(mask=["attention_mask", "patch_valid"])
    encoder = assert_exact({"text": text, "image": image}, Nested("text", "image"), by_length)
    words, patches = zip(*encoder.widths, strict=True)
    assert min(words) < LENGTH - 1 and min(patches) < LENGTH - 1
    assert any(wide != other for wide, other in encoder.widths)


def test_gaps_stay():
    inputs = both_kinds("other", "patch_valid")
    inputs["patch_valid"][:, ::2] = False
    inputs["patch_valid"][:, 1] = True
    encoder = assert_exact(inputs, Sums("other", "patch_valid"), ByLength())
    assert min(patches for _, patches in encoder.widths) < PATCHES - 1


def test_rows_of_zeros_keep_all_columns():
    """Softmax over nothing spreads over as many columns as there are."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.value = nn.Linear(3, 1, bias=False), nn.Linear(3, 8)
            self.widths = set()

        def forward(self, x: Tensor, patch_valid: Tensor) -> Tensor:
            if self.training:
                self.widths.add(x.shape[1])
            scores = self.key(x)[..., 0].masked_fill(~patch_valid, -1e30)
            return (scores.softmax(1)[..., None] * self.value(x)).sum(1)

    mask = mask_of(PATCHES)
    mask[3] = False
    x = torch.randn(ROWS, PATCHES, 3).double()
    by_length = ByLength(columns=["x"])
    encoder = assert_exact({"x": x, "patch_valid": mask}, Attends(), by_length)
    assert max(encoder.widths) == PATCHES and min(encoder.widths) < PATCHES - 1


def cut(inputs: Any, **options: Any) -> None:
    ByLength(**options).chunks(inputs, 4, 1, "input 0")


TWO = both_kinds("attention_mask", "pixel_attention_mask")
WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "two known masks": (
        TWO,
        {},
        "input 0: expected one mask, got input 0['attention_mask'] and "
        "input 0['pixel_attention_mask']; say by which to trim, such as "
        "ByLength(mask=['attention_mask', 'pixel_attention_mask'])",
    ),
    "a mask that is not there": (
        TWO,
        {"mask": "atention_mask"},
        "expected masks by the names ['atention_mask'], got no 'atention_mask' among ['words', "
        "'patches', 'attention_mask', 'pixel_attention_mask']; name tensors (B, L)",
    ),
    "masks of one width in one dict": (
        both_kinds("attention_mask", "patch_valid", LENGTH),
        {"mask": ["attention_mask", "patch_valid"]},
        "input 0['words']: expected one mask of 6 columns, got input 0['attention_mask'] and "
        "input 0['patch_valid']; pad one of them further",
    ),
    "a mask of three dimensions": (
        {"attention_mask": torch.ones(2, 1, 3)},
        {},
        "input 0['attention_mask']: expected a mask (B, L), got shape (2, 1, 3); name another one "
        "with ByLength(mask=...), or trim nothing with ByLength(mask=[])",
    ),
    "a mask without columns": (
        {"attention_mask": torch.ones(2, 0)},
        {},
        "expected a mask (B, L), got shape (2, 0)",
    ),
    "a mask to be added": (
        {"attention_mask": torch.tensor([[0.0, -1e4], [0.0, 0.0]])},
        {},
        "input 0['attention_mask']: expected a mask of ones, and zeros in the padding, got "
        "-10000.0; pass (x != 0) if that is what is meant",
    ),
    "NaN in a mask": (
        {"attention_mask": torch.tensor([[1.0, torch.nan], [1.0, 1.0]])},
        {},
        "expected a mask of ones, and zeros in the padding, got nan",
    ),
    "numbers of documents": (
        {"attention_mask": torch.tensor([[1, 2], [1, 0]])},
        {},
        "expected a mask of ones, and zeros in the padding, got 2",
    ),
    "NaN in the padding": (
        {"attention_mask": torch.tensor([[1, 0], [1, 1]]), "x": torch.tensor([[1, torch.nan]] * 2)},
        {},
        "input 0['x']: expected one value wherever attention_mask is zero",
    ),
    "columns without a mask": (
        {"words": TWO["words"]},
        {"columns": ["words"]},
        "input 0: expected a mask to trim ['words'] by, got none; name it with ByLength(mask=...)",
    ),
    "multiples without a mask": (
        ["a", "bc"],
        {"pad_to_multiple_of": 8},
        "input 0: expected a mask whose columns pad_to_multiple_of=8 can fill up, got none",
    ),
    "no mask wanted, no lengths": (
        TWO,
        {"mask": []},
        "input 0: expected rows whose length is known, by a mask or as a list of strings, got dict",
    ),
}


@pytest.mark.parametrize(("inputs", "options", "message"), WRONG.values(), ids=WRONG)
def test_masks_that_are_refused(inputs, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cut(inputs, **options)


def test_nothing_is_trimmed_where_no_mask_is_wanted():
    lengths = torch.arange(ROWS)
    chunks = ByLength(mask=[], length_of=lambda _: lengths).chunks(TWO, 4, 1, "input 0")
    assert all(chunk.columns is None for chunk in chunks)
    assert torch.cat([chunk.rows for chunk in chunks]).tolist() == list(range(ROWS))[::-1]


def test_a_mask_of_pixels_beside_one_of_tokens_is_left_alone():
    """As Idefics 3 takes them: (B, images, H, W)."""
    inputs = {"attention_mask": mask_of(LENGTH), "pixel_attention_mask": torch.ones(ROWS, 2, 4, 4)}
    chunks = ByLength().chunks(inputs, 4, 1, "input 0")
    assert all(set(chunk.columns) == {id(inputs["attention_mask"])} for chunk in chunks)


@pytest.mark.parametrize("mask", [2.5, [None], {"attention_mask": None}.items()])
def test_masks_that_are_no_keys(mask):
    with pytest.raises(TypeError, match="mask: expected keys of tensors, or None, got"):
        ByLength(mask=mask)


class Averages(nn.Module):
    """Over its padding as well."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words, self.dropout = nn.Embedding(40, 8), nn.Dropout(dropout)

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        return self.dropout(self.words(words)).mean(1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("chunk_size", [2, ROWS])
def test_padding_that_counts_is_refused_in_the_first_step(side, dropout, chunk_size):
    mask = mask_of(LENGTH, side)
    inputs = {"words": torch.randint(1, 40, mask.shape) * mask, "attention_mask": mask}
    encoders = Averages(dropout), nn.Linear(5, 8)
    options = {"chunk_size": chunk_size, "sort_by_length": [ByLength(), None]}
    cache = GradCache(encoders, ClipLoss(), **options)
    which = "first" if side == "left" else "last"
    message = rf"encoder 0 .*do not depend on padding, got .* without its {which} \d of 6 columns"
    with pytest.raises(ValueError, match=message):
        cache(inputs, torch.randn(ROWS, 5))
    assert encoders[0].training and all(p.grad is None for p in encoders[0].parameters())
    # Whoever means it may have it.
    GradCache(encoders, ClipLoss(), check_rows="off", **options)(inputs, torch.randn(ROWS, 5))


def test_it_is_looked_at_once_and_as_soon_as_something_is_trimmed():
    alone: list[int] = []

    class Counts(Averages):
        def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
            alone.extend([len(words)] * (not self.training))
            return (self.words(words) * attention_mask[..., None]).sum(1)

    encoder = Counts()
    cache = GradCache(
        [encoder, nn.Linear(5, 8)], ClipLoss(), chunk_size=4, sort_by_length=[ByLength(), None]
    )
    words, others = torch.randint(1, 40, (ROWS, LENGTH)), torch.randn(ROWS, 5)
    for padding, looks in ((0, 0), (0, 0), (2, 2), (2, 2)):
        mask = (torch.arange(LENGTH) < LENGTH - padding).expand(ROWS, LENGTH).clone()
        cache({"words": words * mask, "attention_mask": mask}, others)
        assert len(alone) == looks


def test_an_encoder_that_draws_in_eval_mode_cannot_be_compared():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(40, 8)

        def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
            noise = torch.randn(len(words), 8)
            return (self.words(words) * attention_mask[..., None]).sum(1) + noise

    mask = mask_of(LENGTH)
    inputs = {"words": torch.randint(1, 40, mask.shape) * mask, "attention_mask": mask}
    by_length = [ByLength(), None]
    cache = GradCache(
        [Noisy(), nn.Linear(5, 8)], ClipLoss(), chunk_size=2, sort_by_length=by_length
    )
    cache(inputs, torch.randn(ROWS, 5))


def test_the_look_leaves_the_random_state_alone():
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.dropout = nn.Embedding(40, 8), nn.Dropout(0.4)

        def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
            return self.dropout((self.words(words) * attention_mask[..., None]).sum(1))

    mask, encoders = mask_of(LENGTH), (Drops(), nn.Linear(5, 8))
    inputs = {"words": torch.randint(1, 40, mask.shape) * mask, "attention_mask": mask}
    others, losses = torch.randn(ROWS, 5), []
    for looks in ("error", "off"):
        by_length = [ByLength(), None]
        cache = GradCache(
            encoders, ClipLoss(), chunk_size=2, sort_by_length=by_length, check_rows=looks
        )
        torch.manual_seed(2)
        losses.append((cache(inputs, others).loss.item(), torch.rand(()).item()))
    assert losses[0] == losses[1]


class TokenVectors(nn.Module):
    """A vector for each token, padded on the right to one length, and the mask of them."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.words, self.mixes = nn.Embedding(40, 8), mixes

    def forward(self, words: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        vectors = self.words(words)
        vectors = vectors - vectors.mean(1, keepdim=True) if self.mixes else vectors
        missing = LENGTH - words.shape[1]
        return F.pad(vectors, (0, 0, 0, missing)), F.pad(attention_mask.bool(), (0, missing))


def masked_sum(tokens: tuple[Tensor, Tensor], others: Tensor) -> Tensor:
    vectors, mask = tokens
    return ((vectors * mask[..., None]).sum(1) * others).sum()


@pytest.mark.parametrize("side", ["left", "right"])
def test_vectors_of_tokens_are_compared_where_their_mask_keeps_them(side):
    mask = mask_of(LENGTH, side)
    inputs = {"words": torch.randint(1, 40, mask.shape) * mask, "attention_mask": mask}
    both = inputs, torch.randn(ROWS, 5).double()
    for mixes in (False, True):
        ours, truth = twins(TokenVectors(mixes).double(), nn.Linear(5, 8).double())
        cache = GradCache(ours, masked_sum, chunk_size=2, sort_by_length=[ByLength(), None])
        if mixes:
            with pytest.raises(ValueError, match="do not depend on padding"):
                cache(*both)
            continue
        cache(*both)
        masked_sum(truth[0](**inputs), truth[1](both[1])).backward()
        assert worst(gradient_errors(ours, truth))[1] < 1e-10


def one_rank_trims(rank: int) -> None:
    """Both raise, also the rank whose rows have no padding; so does a forward that waits."""
    torch.manual_seed(0)
    for over_padding in (True, False):
        encoder = Averages() if over_padding else Kept()
        encoders = [fully_shard(each, reshard_after_forward=True) for each in (encoder, Other())]
        mask = torch.ones(4, LENGTH, dtype=torch.long)
        mask[:, 4:] = rank
        inputs = {"words": torch.randint(1, 40, (4, LENGTH)) * mask, "attention_mask": mask}
        options = {"chunk_size": 2, "sort_by_length": [ByLength(), None]}
        cache = GradCache(encoders, ClipLoss(), strategy=FSDPStrategy(), **options)
        if over_padding:
            which = "its last 2 of 6 columns" if rank == 0 else "got another rank where they do"
            with pytest.raises(ValueError, match=f"do not depend on padding, .*{which}"):
                cache(inputs, torch.randn(4, 5))
        else:
            cache(inputs, torch.randn(4, 5))


class Kept(Averages):
    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        return (self.words(words) * attention_mask[..., None]).sum(1)


class Other(nn.Linear):
    def __init__(self) -> None:
        super().__init__(5, 8)


@pytest.mark.distributed
def test_all_ranks_refuse_what_one_has_seen():
    in_two_processes(one_rank_trims)
