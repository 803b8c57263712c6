"""Rows sorted by length and trimmed: the gradients and features of the unsorted step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import WORST_ERROR
from hypothesis import given, settings
from one_shot import gradient_errors, one_shot, twins, worst
from torch import Tensor, nn

from gradcache_clip import ByLength, ClipLoss, GradCache

ROWS, LENGTH = 14, 12


def padded(lengths: Tensor | list[int] | None = None) -> dict[str, Tensor]:
    rows = torch.randint(1, LENGTH + 1, (ROWS,)) if lengths is None else torch.as_tensor(lengths)
    mask = (torch.arange(LENGTH) < rows[:, None]).long()
    ids = torch.randint(1, 40, (len(rows), LENGTH))
    return {"input_ids": ids * mask, "attention_mask": mask}


class Bert(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.projection = nn.Linear(16, 8)
        self.widths: list[tuple[int, int]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.widths.append(tuple(input_ids.shape))
        output = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        kept = attention_mask[..., None].to(output.last_hidden_state.dtype)
        return self.projection((output.last_hidden_state * kept).sum(1) / kept.sum(1))


class Causal(nn.Module):
    """Hidden states of all tokens, and where each row ends."""

    def __init__(self) -> None:
        from transformers import GPT2Config, GPT2Model

        super().__init__()
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        self.gpt2 = GPT2Model(GPT2Config(vocab_size=40, use_cache=False, **sizes, **dropouts))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        output = self.gpt2(input_ids=input_ids, attention_mask=attention_mask)
        return {"hidden": output.last_hidden_state, "last": attention_mask.sum(1) - 1}


def last_token(output: dict[str, Tensor]) -> Tensor:
    return output["hidden"][torch.arange(len(output["last"])), output["last"]]


class LastToken(nn.Module):
    """The causal encoder with its pooling inside, for the one-shot step."""

    def __init__(self, causal: Causal) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, **tokens: Tensor) -> Tensor:
        return last_token(self.causal(**tokens))


def same_order(rows: int) -> Tensor:
    """Features that tell rows apart, so that the loss sees their order."""
    return torch.randn(rows, 5)


@pytest.mark.parametrize("budget", [None, 10**9], ids=["replayed", "retained"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("sort", [ByLength(), ByLength(max_tokens=20)], ids=["rows", "tokens"])
def test_bert_equals_the_unsorted_one_shot_step(sort, dtype, budget, record_property):
    modules = Bert(), nn.Linear(5, 8), ClipLoss()
    (bert, other, loss), truth = twins(*(module.to(dtype) for module in modules))
    inputs = padded(), same_order(ROWS).to(dtype)
    cache = GradCache(
        [bert, other], loss, chunk_size=4, sort_by_length=[sort, None], memory_budget=budget
    )
    out = cache(*inputs)
    expected = one_shot(truth[:2], truth[2], inputs)
    torch.testing.assert_close(out.loss, expected.loss.detach())
    errors = gradient_errors([bert, other, loss], truth)
    # A key bias moves no softmax: its gradient is zero but for rounding.
    name, error = worst({k: v for k, v in errors.items() if not k.endswith("key.bias")})
    by = "rows" if sort.max_tokens is None else f"{sort.max_tokens} tokens"
    kept = "none" if budget is None else "whole"
    setting = f"BERT sorted by length, {by}, {str(dtype)[6:]}, budget {kept}"
    record_property(WORST_ERROR, (setting, name, error))
    assert error < {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]


def test_a_causal_model_pooled_at_its_last_token(record_property):
    (causal, other, loss), truth = twins(Causal(), nn.Linear(5, 16), ClipLoss())
    for module in (causal, other, loss, *truth):
        module.double()
    inputs = padded(), same_order(ROWS).double()
    cache = GradCache(
        [causal, other],
        loss,
        chunk_size=4,
        get_features=[last_token, None],
        sort_by_length=[ByLength(), None],
        memory_budget=20_000,
    )
    out = cache(*inputs)
    expected = one_shot([LastToken(truth[0]), truth[1]], truth[2], inputs)
    torch.testing.assert_close(out.loss, expected.loss.detach())
    name, error = worst(gradient_errors([causal, other, loss], truth))
    record_property(WORST_ERROR, ("GPT-2 sorted by length, last token, fp64", name, error))
    assert error < 1e-10


def test_chunks_are_trimmed_to_their_longest_row():
    bert = Bert()
    lengths = [3, 12, 1, 7, 7, 2, 9, 1, 5, 4, 1, 1, 2, 3]
    cache = GradCache(
        [bert, nn.Linear(5, 8)],
        ClipLoss(),
        chunk_size=4,
        sort_by_length=[ByLength(), None],
        check_rows="off",
    )
    cache(padded(lengths), same_order(ROWS))
    assert bert.widths == [(4, 12), (4, 5), (4, 2), (2, 1)] * 2


@pytest.mark.parametrize("max_tokens", [1, 12, 13, 24, 40, 10_000])
def test_no_chunk_has_more_tokens_than_allowed(max_tokens):
    bert = Bert()
    cache = GradCache(
        [bert, nn.Linear(5, 8)],
        ClipLoss(),
        chunk_size=2,
        sort_by_length=[ByLength(max_tokens=max_tokens), None],
        check_rows="off",
    )
    tokens = padded()
    cache(tokens, same_order(ROWS))
    assert all(rows * width <= max_tokens or rows == 1 for rows, width in bert.widths)
    embedded = bert.widths[: len(bert.widths) // 2] if max_tokens < 10_000 else bert.widths[:1]
    assert sum(rows for rows, _ in embedded) == ROWS
    if max_tokens == 10_000:
        assert bert.widths[0] == (ROWS, int(tokens["attention_mask"].sum(1).max()))


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30),
    side=st.sampled_from(["right", "left", "both"]),
    chunk_size=st.integers(1, 12),
    max_tokens=st.none() | st.integers(1, 60),
    at_least=st.integers(1, 2),
    multiple=st.integers(1, 5),
)
def test_every_row_is_in_one_chunk_that_holds_it(
    blocks, side, chunk_size, max_tokens, at_least, multiple
):
    ends = torch.tensor(blocks).sort(1).values
    first, stop = ends.T
    first, stop = (0 * first if side == "right" else first), (9 if side == "left" else stop)
    mask = (torch.arange(9) >= first[:, None]) & (torch.arange(9) < (0 * first + stop)[:, None])
    by_length = ByLength(max_tokens=max_tokens, pad_to_multiple_of=multiple)
    chunks = by_length.chunks({"attention_mask": mask}, chunk_size, at_least, "input 0")
    assert sorted(torch.cat([chunk.rows for chunk in chunks]).tolist()) == list(range(len(mask)))
    assert len(chunks) >= min(at_least, len(mask))
    for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
        kept, width = chunk.columns[id(mask)], columns_needed(mask[chunk.rows], multiple)
        assert kept.start >= 0 and kept.stop <= 9 and kept.stop - kept.start == width
        cut = mask[chunk.rows].clone()
        cut[:, kept] = False
        assert not cut.any() and chunk.cost == len(chunk) * width
        if max_tokens is None:
            assert len(chunk) <= chunk_size
            continue
        assert len(chunk) == 1 or chunk.cost <= max_tokens
        if following is not None and len(chunk) < -(-len(mask) // at_least):
            rows = torch.cat([chunk.rows, following.rows[:1]])
            assert len(rows) * columns_needed(mask[rows], multiple) > max_tokens, "one more fits"
    if side != "both":
        widths = [each.columns[id(mask)].stop - each.columns[id(mask)].start for each in chunks]
        assert widths == sorted(widths, reverse=True)


def columns_needed(mask: Tensor, multiple: int) -> int:
    """Columns between the outermost ones; all of them if a row has none."""
    if not mask.any(1).all():
        return mask.shape[1]
    where = mask.any(0).nonzero()
    needed = int(where.max() - where.min()) + 1
    return min(mask.shape[1], -(-needed // multiple) * multiple)


def test_features_come_back_in_the_order_of_the_caller():
    seen: dict[str, Tensor] = {}

    def loss(text: Tensor, other: Tensor) -> Tensor:
        seen["text"] = text.detach().clone()
        return (text * other).sum()

    bert, tokens = Bert(), padded()
    other = nn.Linear(5, 8)
    for sort in (None, ByLength(), ByLength(max_tokens=30)):
        GradCache([bert, other], loss, chunk_size=3, sort_by_length=[sort, None])(
            tokens, same_order(ROWS)
        )
        torch.testing.assert_close(seen["text"], bert(**tokens).detach(), rtol=1e-4, atol=1e-5)


def test_dropout_draws_the_same_in_embed_and_replay():
    """Against one graph over the same sorted and trimmed chunks."""
    (bert, other, loss), truth = twins(Bert(dropout=0.3), nn.Linear(5, 8), ClipLoss())
    tokens, others = padded(), same_order(ROWS)
    sort = ByLength(max_tokens=24)
    for budget in (None, 30_000, 10**9):
        for module in (bert, other, loss, *truth):
            module.zero_grad()
        torch.manual_seed(1)
        cache = GradCache([bert, other], loss, sort_by_length=[sort, None], memory_budget=budget)
        out = cache(tokens, others)
        torch.manual_seed(1)
        chunks = sort.chunks(tokens, 64, 1, "input 0")
        parts = [
            truth[0](**{n: x[chunk.rows][:, chunk.columns[id(x)]] for n, x in tokens.items()})
            for chunk in chunks
        ]
        order = torch.cat([chunk.rows for chunk in chunks])
        expected = truth[2](torch.cat(parts)[order.argsort()], truth[1](others)).loss
        expected.backward()
        torch.testing.assert_close(out.loss, expected.detach())
        errors = gradient_errors([bert, other, loss], truth)
        assert worst({k: v for k, v in errors.items() if not k.endswith("key.bias")})[1] < 1e-5


def test_out_of_memory_with_sorted_rows():
    class Short(Bert):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            if input_ids.numel() > 40:
                raise torch.OutOfMemoryError("injected")
            return super().forward(input_ids, attention_mask)

    (bert, other, loss), truth = twins(Short().double(), nn.Linear(5, 8).double(), ClipLoss())
    inputs = padded([LENGTH] * 3 + [4] * 11), same_order(ROWS).double()
    cache = GradCache([bert, other], loss, chunk_size=8, sort_by_length=[ByLength(), None])
    with pytest.warns(UserWarning, match="out of memory in the embed"):
        cache(*inputs)
    assert cache.chunk_size == 2
    one_shot([_unlimited(truth[0]), truth[1]], truth[2], inputs)
    assert worst(_without_key_bias(gradient_errors([bert, other, loss], truth)))[1] < 1e-6


def _unlimited(short: Bert) -> Callable[..., Tensor]:
    return lambda **tokens: Bert.forward(short, **tokens)


def _without_key_bias(errors: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in errors.items() if not name.endswith("key.bias")}


class Letters(nn.Module):
    """Tokenizes by itself and pads each chunk to its longest text."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(128, 8, mode="sum", padding_idx=0)
        self.widths: list[int] = []

    def forward(self, given: Any) -> Tensor:
        width = max(map(len, given))
        self.widths.append(width)
        rows = [[*map(ord, text), *[0] * (width - len(text))] for text in given]
        return self.embedding(torch.tensor(rows))


@pytest.mark.parametrize("budget", [None, 10**9])
def test_lists_of_strings(budget):
    texts = ["a" * n + chr(98 + n) for n in (5, 1, 9, 2, 7, 3, 3, 8, 0, 4)]
    (letters, other, loss), truth = twins(Letters(), nn.Linear(5, 8), ClipLoss())
    inputs = texts, same_order(len(texts))
    cache = GradCache(
        [letters, other],
        loss,
        chunk_size=3,
        sort_by_length=[ByLength(), None],
        memory_budget=budget,
        check_rows="off",
    )
    cache(*inputs)
    assert letters.widths[:4] == [10, 6, 4, 1]
    one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors([letters, other, loss], truth))[1] < 1e-5


def test_lengths_that_a_function_tells():
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.first = nn.Linear(5, 8), []

        def forward(self, x: Tensor, sizes: Any) -> Tensor:
            self.first.append(float(sizes[0]))
            return self.inner(x) * torch.from_numpy(sizes)[:, None]

    sizes = np.array([3, 1, 4, 1, 5, 9, 2, 6], dtype=np.float32)
    (summed, other, loss), truth = twins(Summed(), nn.Linear(5, 8), ClipLoss())
    inputs = (same_order(8), sizes), same_order(8)
    by = ByLength(length_of=lambda given: given[1])
    cache = GradCache(
        [summed, other], loss, chunk_size=3, sort_by_length=[by, None], check_rows="off"
    )
    cache(*inputs)
    assert summed.first[:3] == [9, 4, 1]
    one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors([summed, other, loss], truth))[1] < 1e-5


def test_lengths_of_a_function_cut_no_tokens_off():
    """Counted in words or characters they say nothing of where a row of tokens ends."""
    (bert, other, loss), truth = twins(Bert(), nn.Linear(5, 8), ClipLoss())
    inputs = padded(), same_order(ROWS)
    words = ByLength(length_of=lambda given: (given["attention_mask"].sum(1) + 1) // 2)
    GradCache([bert, other], loss, chunk_size=4, sort_by_length=[words, None])(*inputs)
    one_shot(truth[:2], truth[2], inputs)
    assert worst(_without_key_bias(gradient_errors([bert, other, loss], truth)))[1] < 1e-5


@pytest.mark.parametrize("count", [ROWS - 1, ROWS + 1, 0])
def test_lengths_of_other_rows_are_refused(count):
    """Rows without a length would silently be left out of the batch."""
    by = ByLength(length_of=lambda given: range(count))
    cache = GradCache([nn.Linear(5, 8), nn.Linear(5, 8)], ClipLoss(), sort_by_length=by)
    with pytest.raises(ValueError, match=rf"input 0: expected.*{ROWS}.*got"):
        cache(same_order(ROWS), same_order(ROWS))


def test_both_inputs_sorted_and_embedded_together():
    (bert, loss), (true_bert, true_loss) = twins(Bert(), ClipLoss())
    inputs = padded(), padded()
    calls = bert.widths
    cache = GradCache(
        [bert, bert],
        loss,
        chunk_size=2,
        sort_by_length=ByLength(),
        embed_chunk_size=6,
        check_rows="off",
    )
    cache(*inputs)
    # Seven chunks of two: the first alone, then three at a time; the last keeps its graph.
    assert [rows for rows, _ in calls[:7]] == [2, 6, 6, 2, 6, 4, 2]
    one_shot([true_bert, true_bert], true_loss, inputs)
    errors = gradient_errors([bert, loss], [true_bert, true_loss])
    assert worst(_without_key_bias(errors))[1] < 1e-5


def test_rows_without_any_token():
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(40, 8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            kept = self.embedding(input_ids) * attention_mask[..., None]
            return kept.sum(1) + self.embedding.weight[0]

    (mean, other, loss), truth = twins(Mean(), nn.Linear(5, 8), ClipLoss())
    inputs = padded([0, 3, 0, 5, 1, 0, 0]), same_order(7)
    GradCache([mean, other], loss, chunk_size=2, sort_by_length=[ByLength(), None])(*inputs)
    one_shot(truth[:2], truth[2], inputs)
    assert worst(gradient_errors([mean, other, loss], truth))[1] < 1e-5


@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        (torch.randn(4, 5), "Tensor"),
        ({"input_ids": torch.ones(4, 3)}, "dict"),
        ((torch.ones(4, 3), torch.ones(4, 3)), "tuple"),
        ([1, 2, 3, 4], "list"),
    ],
)
def test_rows_whose_length_nobody_knows(inputs, got):
    cache = GradCache([nn.Linear(5, 8), nn.Linear(5, 8)], ClipLoss(), sort_by_length=ByLength())
    message = rf"input 0: expected rows whose length is known.*got {got}; pass ByLength\(length_of"
    with pytest.raises(ValueError, match=message):
        cache(inputs, same_order(4))


@pytest.mark.parametrize("max_tokens", [0, -4, 2.5, "12", True])
def test_numbers_of_tokens_that_are_none(max_tokens):
    with pytest.raises(
        ValueError, match="max_tokens: expected a positive integer, 'auto' or None, got"
    ):
        ByLength(max_tokens=max_tokens)


@pytest.mark.parametrize("sort", [True, "length", [None, 3], ByLength])
def test_what_is_no_sorting(sort):
    with pytest.raises((TypeError, ValueError), match=r"sort_by_length: expected.*ByLength\("):
        GradCache([nn.Linear(5, 8), nn.Linear(5, 8)], ClipLoss(), sort_by_length=sort)


def test_one_sorting_for_each_input():
    cache = GradCache([nn.Linear(5, 8)] * 2, ClipLoss(), sort_by_length=[ByLength()])
    with pytest.raises(
        ValueError, match="sort_by_length: expected one for each of 2 inputs, got 1"
    ):
        cache(same_order(4), same_order(4))


def test_an_input_that_is_a_leaf_gets_its_gradient_in_the_order_of_the_caller():
    lengths = torch.tensor([2, 5, 1, 3, 4])
    mask = (torch.arange(5) < lengths[:, None]).float()
    hidden = torch.randn(5, 5, 3, requires_grad=True)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 8)

        def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
            return (self.linear(hidden) * attention_mask[..., None]).sum(1)

    (pooled, other, loss), truth = twins(Pooled(), nn.Linear(5, 8), ClipLoss())
    others = same_order(5)
    tokens = {"hidden": hidden, "attention_mask": mask}
    by_length = ByLength(columns=["hidden"])
    GradCache([pooled, other], loss, chunk_size=2, sort_by_length=[by_length, None])(tokens, others)
    value = truth[2](truth[0](**tokens), truth[1](others)).loss
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(value, hidden)[0])


def test_nothing_warns_of_a_batch_without_padding():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradCache([Bert(), Bert()], ClipLoss(), chunk_size=4, sort_by_length=ByLength())(
            padded([LENGTH] * ROWS), padded([1] * ROWS)
        )
