"""Sorted by length, only columns of tokens are cut, and only where the mask says padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from one_shot import gradient_errors, one_shot, twins, worst
from torch import Tensor, nn

from gradcache_clip import ByLength, ClipLoss, GradCache

ROWS, LENGTH = 9, 6


class Reads(nn.Module):
    """Sums what the mask keeps of each tensor of tokens; other tensors go through layers whole."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 8)
        self.deep = nn.Linear(3, 8)
        self.wide = nn.Linear(LENGTH, 8)
        self.widths: set[tuple[str, int]] = set()

    def forward(self, attention_mask: Tensor, **given: Tensor) -> Tensor:
        total = 0.0
        for name, x in given.items():
            if self.training:  # The first step looks at a whole row in eval mode.
                self.widths.add((name, x.shape[1]))
            if name == "features":
                total = total + self.wide(x)
                continue
            words = self.words(x.long().clamp_min(0)) * (1 + x[..., None]) if x.ndim == 2 else None
            states = self.deep(x) if words is None else words
            total = total + (states * attention_mask[..., None].to(states)).sum(1)
        return total


def masked(lengths: Tensor | None = None) -> Tensor:
    rows = torch.randint(1, LENGTH, (ROWS,)) if lengths is None else lengths
    return (torch.arange(LENGTH) < rows[:, None]).long()


def tokens(mask: Tensor, pad: float = 0) -> Tensor:
    return torch.where(mask.bool(), torch.randint(1, 40, mask.shape), pad)


def assert_exact(inputs: dict[str, Tensor], by_length: ByLength = ByLength()) -> Reads:  # noqa: B008
    """Exact beside the one-shot step over whole rows; the encoder, which knows what it saw."""
    modules = Reads().double(), nn.Linear(5, 8).double(), ClipLoss().double()
    ours, truth = twins(*modules)
    both = inputs, torch.randn(ROWS, 5).double()
    cache = GradCache(ours[:2], ours[2], chunk_size=2, sort_by_length=[by_length, None])
    out = cache(*both)
    expected = one_shot(truth[:2], truth[2], both)
    torch.testing.assert_close(out.loss, expected.loss.detach(), rtol=1e-12, atol=1e-12)
    used = {k: v for k, v in gradient_errors(ours, truth).items() if v != float("inf")}
    assert worst(used)[1] < 1e-10
    return ours[0]


def widths(encoder: Reads, name: str) -> set[int]:
    return {width for seen, width in encoder.widths if seen == name}


def positions(mask: Tensor) -> Tensor:
    return torch.arange(LENGTH).expand(ROWS, LENGTH)


def rising(mask: Tensor) -> Tensor:
    """Differs in the padding, as positions that are counted on do."""
    return torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 40


def embedded(mask: Tensor, pad: float = 0.5) -> Tensor:
    return torch.where(mask.bool()[..., None], torch.randn(ROWS, LENGTH, 3), pad).double()


def same_vector(mask: Tensor) -> Tensor:
    """The embedding of the padding token."""
    padding = torch.randn(3).double()
    return torch.where(mask.bool()[..., None], torch.randn(ROWS, LENGTH, 3).double(), padding)


TRIMMED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "ids": ("input_ids", tokens),
    "ids padded with anything": ("input_ids", rising),
    "types": ("token_type_ids", lambda mask: torch.zeros_like(mask)),
    "positions": ("position_ids", positions),
    "embeddings": ("inputs_embeds", lambda mask: torch.randn(ROWS, LENGTH, 3).double()),
    "ids of another name": ("words", tokens),
    "another padding": ("words", lambda mask: tokens(mask, 7)),
    "labels": ("targets", lambda mask: tokens(mask, -100)),
    "weights": ("weights", lambda mask: torch.rand(ROWS, LENGTH).double() * mask),
    "states": ("states", embedded),
    "states of one padding token": ("states", same_vector),
}


@pytest.mark.parametrize(("name", "build"), TRIMMED.values(), ids=TRIMMED)
@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float64], ids=str)
def test_columns_of_tokens_are_trimmed(name, build, kind):
    mask = masked()
    encoder = assert_exact({"attention_mask": mask.to(kind), name: build(mask)})
    assert max(widths(encoder, name)) == int(mask.sum(1).max()) < LENGTH


OTHERS = {
    "features": lambda mask: torch.randn(ROWS, LENGTH).double(),
    "nearly padding": lambda mask: tokens(mask).index_put_(
        (mask.sum(1).argmin().view(1), torch.tensor([LENGTH - 2])), torch.tensor([3])
    ),
    "one row of another padding": lambda mask: tokens(mask).index_fill_(
        0, mask.sum(1).argmax().view(1), 5
    ),
    "nan": lambda mask: torch.where(mask.bool(), 1.0, float("nan")).double(),
    "states": lambda mask: torch.randn(ROWS, LENGTH, 3).double(),
}


@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS)
def test_other_tensors_of_as_many_columns_are_refused(build):
    mask = masked()
    inputs = {"attention_mask": mask, "input_ids": tokens(mask), "features": build(mask)}
    encoder, by_length = Reads().double(), [ByLength(), None]
    cache = GradCache([encoder, nn.Linear(5, 8).double()], ClipLoss(), sort_by_length=by_length)
    message = (
        r"^input 0\['features'\]: expected one value wherever attention_mask is zero.*got several "
        r"in 6 columns; pass ByLength\(columns=\['attention_mask', 'input_ids', 'features'\]\) if "
        r"it holds tokens, and ByLength\(columns=\['attention_mask', 'input_ids'\]\) if not$"
    )
    with pytest.raises(ValueError, match=message):
        cache(inputs, torch.randn(ROWS, 5).double())
    assert not encoder.widths and all(p.grad is None for p in encoder.parameters())


def test_columns_say_what_is_trimmed():
    mask = masked()
    features = torch.randn(ROWS, LENGTH).double()
    inputs = {"attention_mask": mask, "words": tokens(mask), "features": features}
    encoder = assert_exact(inputs, ByLength(columns=["words"]))
    assert widths(encoder, "features") == {LENGTH}
    assert max(widths(encoder, "words")) < LENGTH


def test_columns_trim_what_is_not_constant():
    mask = masked()
    inputs = {"attention_mask": mask, "places": rising(mask)}
    encoder = assert_exact(inputs, ByLength(columns=("places", "words")))
    assert max(widths(encoder, "places")) < LENGTH


def test_a_tensor_in_a_tuple_is_named_by_its_place():
    mask = masked()

    class Pair(Reads):
        def forward(self, first: dict[str, Tensor], places: Tensor) -> Tensor:
            return super().forward(**first, places=places)

    inputs = {"attention_mask": mask}, rising(mask)
    ours, truth = twins(Pair().double(), nn.Linear(5, 8).double(), ClipLoss().double())
    both = inputs, torch.randn(ROWS, 5).double()
    by_length = [ByLength(columns=[1]), None]
    GradCache(ours[:2], ours[2], chunk_size=2, sort_by_length=by_length)(*both)
    one_shot(truth[:2], truth[2], both)
    used = {k: v for k, v in gradient_errors(ours, truth).items() if v != float("inf")}
    assert worst(used)[1] < 1e-10 and max(widths(ours[0], "places")) < LENGTH


def test_samples_in_lists_are_not_trimmed():
    """They have columns of their own."""

    class Collates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(LENGTH, 8)

        def forward(self, attention_mask: Tensor, samples: list[Tensor]) -> Tensor:
            return torch.stack([self.wide(each).mean(0) for each in samples])

    samples = [torch.randn(2 + i % 3, LENGTH).double() for i in range(ROWS)]
    ours, truth = twins(Collates().double(), nn.Linear(5, 8).double(), ClipLoss().double())
    both = {"attention_mask": masked(), "samples": samples}, torch.randn(ROWS, 5).double()
    GradCache(ours[:2], ours[2], chunk_size=2, sort_by_length=[ByLength(), None])(*both)
    one_shot(truth[:2], truth[2], both)
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


def test_a_batch_without_padding_is_never_refused():
    full = torch.full((ROWS,), LENGTH)
    features = torch.randn(ROWS, LENGTH).double()
    assert_exact({"attention_mask": masked(full), "features": features})


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, LENGTH), min_size=ROWS, max_size=ROWS),
    value=st.integers(0, 2),
    place=st.tuples(st.integers(0, ROWS - 1), st.integers(0, LENGTH - 1)),
)
def test_refused_if_and_only_if_something_else_would_be_cut(lengths, value, place):
    mask = masked(torch.tensor(lengths))
    words = torch.where(mask.bool(), 5, 0)
    words[place] = value
    padding = words[~mask.bool()].unique()
    by_length, inputs = ByLength(), {"attention_mask": mask, "words": words}
    if len(padding) <= 1:
        chunks = by_length.chunks(inputs, 4, 1, "input 0")
        assert all(id(words) in chunk.columns for chunk in chunks)
        return
    with pytest.raises(ValueError, match="expected one value wherever attention_mask is zero"):
        by_length.chunks(inputs, 4, 1, "input 0")


def test_the_host_waits_once(monkeypatch):
    """Mask and checks come in one transfer."""
    transfers, cpu = [], Tensor.cpu
    mask = masked()
    inputs = {"attention_mask": mask, **{name: tokens(mask) for name in ("a", "b", "c")}}
    monkeypatch.setattr(Tensor, "cpu", lambda x: transfers.append(x.shape) or cpu(x))
    ByLength().chunks(inputs, 4, 1, "input 0")
    # Where each row starts and stops, whether it is a mask, and three answers.
    assert transfers == [(2 * ROWS + 1 + 3,)]


@pytest.mark.parametrize("columns", ["input_ids", 3, [1.5], [None]])
def test_columns_that_are_none(columns):
    with pytest.raises(TypeError, match="columns: expected keys of tensors, or None, got"):
        ByLength(columns=columns)


def test_columns_that_are_not_there():
    mask = masked()
    inputs: dict[str, Any] = {"attention_mask": mask, "words": tokens(mask)}
    message = r"by the names in columns, \['wrods'\], got \['words'\]; name those that hold tokens"
    with pytest.raises(ValueError, match=message):
        ByLength(columns=["wrods"]).chunks(inputs, 4, 1, "input 0")
    inputs["words"] = torch.ones(ROWS, LENGTH + 1)
    message = r"expected 6 columns, as attention_mask has, got shape \(9, 7\); leave 'words' out"
    with pytest.raises(ValueError, match=message):
        ByLength(columns=["words"]).chunks(inputs, 4, 1, "input 0")
