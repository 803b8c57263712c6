"""Wrong use of inputs that divide by themselves: an error with the remedy, before anything runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packed_inputs import VIDEO, graph_library, vision_batch
from torch import nn

from gradcache_clip import GradCache, PackedPatches, PackedTokens, Ragged, deferred_step

ROWS = 7


class Never(nn.Linear):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the encoder was called")


def assert_refused(make: Callable[[], Any], rows: Any, message: str) -> None:
    never, other = Never(2, 2), nn.Linear(3, 2)
    cache = GradCache((never, other), lambda x, y: (x * y).sum(), chunk_size=2, rows=[rows, None])
    for step in (cache, lambda *inputs: deferred_step(cache, *inputs)):
        with pytest.raises(
            (TypeError, ValueError), match=f"(?s)^(?=.*: expected .*, got .*; ).*{message}"
        ):
            step(make(), torch.randn(ROWS, 3))
    assert other.weight.grad is None


def posts(**more: Any) -> dict[str, Any]:
    return {"title": torch.randn(ROWS, 4), "images": torch.randn(5, 4), "scale": 2.0, **more}


COUNTS = [2, 0, 1, 0, 0, 1, 1]

RAGGED: dict[str, tuple[Callable[[], Any], str]] = {
    "a key that is not there": (
        lambda: Ragged(posts(), {"pictures": COUNTS}),
        r"got \['pictures'\]; name the parts",
    ),
    "no key": (lambda: Ragged(posts(), {}), "got none; name the parts"),
    "a tensor": (lambda: Ragged(torch.ones(5), {"images": COUNTS}), r"keys of inputs, \[\]"),
    "too many entries": (
        lambda: Ragged(posts(), {"images": [1] * ROWS}),
        "images: expected 7 entries, the sum of the counts of 7 rows, got 5",
    ),
    "a negative count": (
        lambda: Ragged(posts(), {"images": [*COUNTS[:-2], -1, 3]}),
        "counts of 0 or more, got -1",
    ),
    "counts that are no integers": (
        lambda: Ragged(posts(), {"images": torch.tensor(COUNTS) / 1}),
        r"one integer for each row, got shape \(7,\) and torch.float32",
    ),
    "a table of counts": (
        lambda: Ragged(posts(), {"images": torch.ones(ROWS, 2).long()}),
        r"got shape \(7, 2\)",
    ),
    "no counts": (lambda: Ragged(posts(), {"images": torch.ones(0).long()}), "got none"),
    "counts of other rows": (
        lambda: Ragged(posts(images=torch.ones(4)), {"images": [2, 0, 1, 0, 1]}),
        r"the same number of rows everywhere, got 7 in input 0\['title'\] and 5",
    ),
    "two kinds of counts": (
        lambda: Ragged(posts(words=list("abc")), {"images": COUNTS, "words": [1, 1, 1]}),
        r"got \{'images': 7, 'words': 3\}",
    ),
    "a number": (lambda: Ragged(posts(), {"scale": COUNTS}), "scale: .* got float"),
}


@pytest.mark.parametrize(("make", "message"), RAGGED.values(), ids=RAGGED)
def test_ragged(make, message):
    assert_refused(make, None, message)


def batch(**more: Any) -> dict[str, Any]:
    return {**vision_batch(), **more}


def without(key: str) -> dict[str, Any]:
    return {name: part for name, part in batch().items() if name != key}


def truncated(columns: int) -> dict[str, Any]:
    """Rows without their last tokens, among them some of an image."""
    wide = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {key: part[:, :-columns] if key in wide else part for key, part in batch().items()}


def in_other_order() -> dict[str, Any]:
    given = batch()
    return {**given, "mm_token_type_ids": given["mm_token_type_ids"].flip(0)}


PATCHES: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "no division": (batch, None, r"rows=PackedPatches\(\)"),
    "a tuple": (
        lambda: tuple(batch().values()),
        PackedPatches(),
        "a mapping.*got tuple; pass a dict",
    ),
    "nothing that counts": (
        lambda: without("mm_token_type_ids"),
        PackedPatches(),
        r"mm_token_type_ids: .*got NoneType; .*PackedPatches\(image_token_id=...\)",
    ),
    "another token": (batch, PackedPatches(image_token_id=VIDEO + 17), "of 4 items and 0 tokens"),
    "truncated rows": (lambda: truncated(4), PackedPatches(), "look at the token id and at trunc"),
    "another order": (
        in_other_order,
        PackedPatches(),
        "got row 4 with 4 tokens of 4 patches each, which end inside an item",
    ),
    "a column that is not there": (
        batch,
        PackedPatches(images_per_row="num_images"),
        "num_images: expected a column of counts beside image_grid_thw",
    ),
    "a column that does not add up": (
        lambda: batch(num_images=[1] * ROWS),
        PackedPatches(images_per_row="num_images"),
        "add up to the 4 items of image_grid_thw, got 7 over 7 rows",
    ),
    "patches missing": (
        lambda: batch(pixel_values=torch.randn(9, 12)),
        PackedPatches(),
        "pixel_values: expected 56 entries",
    ),
    "no pixels": (
        lambda: without("pixel_values"),
        PackedPatches(),
        "the patches of image_grid_thw, got none",
    ),
    "a grid of pairs": (
        lambda: batch(image_grid_thw=torch.ones(4, 2).long()),
        PackedPatches(),
        r"integers \(items, 3\).*got shape \(4, 2\)",
    ),
}


@pytest.mark.parametrize(("make", "rows", "message"), PATCHES.values(), ids=PATCHES)
def test_packed_patches(make, rows, message):
    assert_refused(make, rows, message)


def tokens(**more: Any) -> dict[str, Any]:
    bounds = torch.tensor([0, 4, 5, 5, 9, 12, 13, 14])
    given = {"input_ids": torch.randint(1, 9, (1, 14)), "cu_seqlens": bounds, **more}
    return {key: part for key, part in given.items() if part is not None}


def bounds(*ends: int) -> dict[str, Any]:
    return tokens(cu_seqlens=torch.tensor(ends))


TOKENS: dict[str, tuple[Callable[[], Any], str]] = {
    "no bounds": (lambda: tokens(cu_seqlens=None), r"got none in \['input_ids'\]; pass cu_seqlens"),
    "bounds without 0": (lambda: bounds(4, 9, 14), r"got \[4, 9, 14\]; pass one bound more"),
    "bounds that fall": (lambda: bounds(0, 9, 4, 14), r"got \[0, 9, 4, 14\]"),
    "bounds beyond the tokens": (lambda: bounds(0, 4, 20), r"tensor of 20 tokens.*shape \(1, 14\)"),
    "lengths for bounds": (lambda: tokens(cu_seqlens=torch.tensor([[0, 14]])), "got Tensor"),
    "numbers for bounds": (lambda: tokens(cu_seqlens=[0, 4, 14]), "got list"),
    "bounds that differ": (
        lambda: tokens(cu_seq_lens_k=torch.tensor([0, 14])),
        "got other ones in cu_seqlens and cu_seq_lens_k",
    ),
    "positions that leap": (
        lambda: tokens(cu_seqlens=None, position_ids=torch.tensor([[*range(9), *range(3, 8)]])),
        "start again at 0 with each sequence, got a step to 3; pass cu_seqlens",
    ),
    "rows beside tokens": (lambda: tokens(labels=torch.ones(ROWS)), r"labels: .* got shape \(7,\)"),
    "a mask of pairs": (
        lambda: tokens(attention_mask=torch.ones(14, 14)),
        "attention_mask: .*let the encoder make masks of pairs",
    ),
    "a list": (lambda: tokens(words=["a"] * 14), "words: .* got list"),
    "only bounds": (lambda: {"offsets": torch.tensor([0, 4])}, "without any; pass the tokens"),
    "offsets": (
        lambda: {"input": torch.ones(9).long(), "offsets": torch.tensor([1, 4])},
        r"offsets: .*got \[1, 4, 9\]",
    ),
}


@pytest.mark.parametrize(("make", "message"), TOKENS.values(), ids=TOKENS)
def test_packed_tokens(make, message):
    assert_refused(make, PackedTokens(), message)


def test_a_last_offset_that_was_not_said():
    """The bag of that offset is a row more than the other input has features."""
    bags = {"input": torch.ones(9).long(), "offsets": torch.tensor([0, 4, 9])}
    encoders = nn.EmbeddingBag(10, 4, include_last_offset=True), nn.Linear(3, 4)
    cache = GradCache(encoders, lambda x, y: (x * y).sum(), rows=[PackedTokens(), None])
    with pytest.raises(ValueError, match="expected features with 3 rows"):
        cache(bags, torch.randn(2, 3))
    assert encoders[0].weight.grad is None


def jagged() -> torch.Tensor:
    lengths = (2, 1, 3, 1, 1, 4, 2)
    return torch.nested.nested_tensor([torch.randn(n, 4) for n in lengths], layout=torch.jagged)


def with_holes() -> torch.Tensor:
    lengths = torch.tensor([1, 1, 2, 1, 1, 3, 1])
    return torch.nested.nested_tensor_from_jagged(jagged().values(), jagged().offsets(), lengths)


def strided() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(list(jagged().unbind()), layout=torch.strided)


JAGGED: dict[str, tuple[Callable[[], Any], str]] = {
    "transposed": (lambda: jagged().transpose(1, 2), r"pass x.contiguous\(\)"),
    "with holes": (with_holes, r"without holes.*pass x.contiguous\(\)"),
    "strided": (strided, r"layout=torch.jagged, got torch.strided; pass list\(x.unbind\(\)\)"),
    "with a gradient": (lambda: jagged().requires_grad_(), "torch cannot accumulate"),
}


@pytest.mark.parametrize(("make", "message"), JAGGED.values(), ids=JAGGED)
def test_jagged(make, message):
    assert_refused(make, None, message)


def graphs(**more: Any) -> Any:
    data = graph_library().data
    one = data.Data(x=torch.ones(2, 4), edge_index=torch.tensor([[0], [1]]))
    return data.Batch.from_data_list([one] * ROWS)


def test_graphs():
    def with_an_attribute() -> Any:
        batch = graphs()
        batch.weight = torch.ones(14)
        return batch

    def by_hand() -> Any:
        return graph_library().data.Batch(x=torch.ones(14, 4), batch=torch.arange(14) // 2)

    assert_refused(with_an_attribute, None, r"got \['weight'\], added to it afterwards")
    assert_refused(by_hand, None, "make it with Batch.from_data_list")


@pytest.mark.parametrize(
    ("rows", "message"),
    [(5, "got 5"), (PackedPatches, "got <class"), ([None, "tokens"], "got 'tokens'")],
)
def test_rows_that_divide_nothing(rows, message):
    with pytest.raises(TypeError, match=rf"^rows: expected .*{message}.*; such as rows="):
        GradCache((nn.Linear(3, 2),) * 2, lambda x, y: (x * y).sum(), rows=rows)


def test_rows_for_another_number_of_inputs():
    cache = GradCache((nn.Linear(3, 2),) * 2, lambda x, y: (x * y).sum(), rows=[None] * 3)
    with pytest.raises(ValueError, match="rows: expected one for each of 2 inputs, got 3"):
        cache(torch.ones(4, 3), torch.ones(4, 3))
