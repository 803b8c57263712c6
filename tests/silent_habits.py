"""Habits that could go wrong in silence, and what comes of each: "exact", or an error's words.

`docs/exact-or-an-error.md` has a row for each; `test_docs_silent.py` keeps the two in step.
"""

from __future__ import annotations

import collections
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from one_shot import gradient_errors, twins, worst
from torch import Tensor, nn

from gradcache_clip import (
    ByLength,
    ClipLoss,
    GradCache,
    InfoNCELoss,
    PackedPatches,
    PackedTokens,
    Ragged,
    Shared,
    deferred_step,
)
from gradcache_clip.cache.trunk import call_encoder
from gradcache_clip.distributed import strategy

B, COLUMNS = 12, 6

Habit = Callable[[], str]
HABITS: dict[str, Habit] = {}


def habit(function: Habit) -> Habit:
    HABITS[function.__name__.replace("_", "-")] = function
    return function


def words_of(call: Callable[..., Any], *given: Any, **more: Any) -> str:
    """What an error or a warning says; empty if there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            call(*given, **more)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def outcome(encoders: Sequence[nn.Module], inputs: Sequence[Any], **options: Any) -> str:
    """A cached step beside the one-shot step: "exact", how far off it is, or the error.

    Where it raises, no gradient may have been touched.
    """
    truth_inputs = options.pop("one_shot_inputs", inputs)
    ours, truth = twins(*(encoder.double() for encoder in encoders))
    options = {"chunk_size": 5, **options}
    cache = GradCache(tuple(ours), dot_product, **options)
    if words := words_of(cache, *inputs):
        untouched = all(p.grad is None for encoder in ours for p in encoder.parameters())
        return words if untouched else f"an error after gradients were changed: {words}"
    pairs = zip(truth, truth_inputs, strict=True)
    dot_product(*(call_encoder(encoder, given) for encoder, given in pairs)).backward()
    name, error = worst(gradient_errors(ours, truth))
    return "exact" if error < 1e-10 else f"wrong by {error:.1e} in {name}"


def dot_product(x: Tensor, y: Tensor) -> Tensor:
    return ((x @ y.T) ** 2).mean()


def rows(width: int, count: int = B) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64)


def linears() -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(6, 4).double(), nn.Linear(5, 4).double()


class Collating(nn.Module):
    """Takes samples one by one, whatever holds them."""

    def __init__(self, column: Callable[[Any], list[Any]] = list) -> None:
        super().__init__()
        self.linear, self.column = nn.Linear(6, 4), column

    def forward(self, samples: Any, scale: Any = None) -> Tensor:
        stacked = torch.stack([torch.as_tensor(each) for each in self.column(samples)])
        return self.linear(stacked.to(self.linear.weight.dtype))


def beside(samples: Any, column: Callable[[Any], list[Any]] = list) -> str:
    """An input that holds samples in some way, and a tensor for the other encoder."""
    return outcome((Collating(column), nn.Linear(5, 4)), (samples, rows(5)))


# What is cut into chunks, and what reaches every chunk whole.


@habit
def list_of_samples() -> str:
    return beside(list(rows(6)))


@habit
def tuple_of_samples() -> str:
    """As `zip(*batch)` makes them."""
    from PIL import Image

    images = tuple(Image.new("L", (6, 1)) for _ in range(B))
    return beside((images, rows(6)))


@habit
def tuple_of_strings() -> str:
    return beside(tuple("abcdefghijkl"))


@habit
def deque() -> str:
    return beside({"samples": collections.deque(rows(6)), "scale": rows(6)})


@habit
def dict_view() -> str:
    return beside({"samples": dict(enumerate(rows(6))).values(), "scale": rows(6)})


@habit
def series() -> str:
    import pandas

    return beside({"samples": pandas.Series(list(rows(6).numpy())), "scale": rows(6)})


@habit
def data_frame() -> str:
    import pandas

    return beside({"samples": pandas.DataFrame(rows(6).numpy()), "scale": rows(6)})


@habit
def datasets_column() -> str:
    import datasets

    column = datasets.Dataset.from_dict({"x": rows(6).tolist()})["x"]
    return beside({"samples": column, "scale": rows(6)})


class Nearest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor, centres: Tensor) -> Tensor:
        return self.linear(x) - torch.cdist(x, centres)


@habit
def shared() -> str:
    """Four centres that every row is compared with."""
    x, centres, y = rows(6), rows(6, 4), rows(5)
    encoders = Nearest(), nn.Linear(5, 4)
    given = ((x, Shared(centres)), y)
    return outcome(encoders, given, one_shot_inputs=((x, centres), y))


@habit
def other_number_of_rows() -> str:
    return outcome((Nearest(), nn.Linear(5, 4)), ((rows(6), rows(6, 4)), rows(5)))


@habit
def tensordict() -> str:
    from tensordict import TensorDict

    given = TensorDict({"input": rows(6)}, batch_size=[B])
    return outcome(linears(), (given, rows(5)))


@habit
def nested_tensor() -> str:
    jagged = torch.nested.as_nested_tensor(list(rows(6)), layout=torch.jagged)
    return beside(jagged, lambda x: list(x.unbind()))


COUNTS = (2, 0, 1, 3, 0, 0, 1, 1, 1, 0, 2, 1)


def packed(kind: str, **options: Any) -> str:
    """Rows of any number of entries, as `row_kinds` builds them, beside rows of numbers."""
    from row_kinds import KINDS

    build, encoder, fewest = KINDS[kind]
    built = build([max(fewest, count) for count in COUNTS])
    options = {"rows": [built.rows, None], **options}
    whole = (built.whole, rows(5))
    return outcome(
        (encoder(), nn.Linear(5, 5)), (built.inputs, whole[1]), one_shot_inputs=whole, **options
    )


@habit
def packed_patches() -> str:
    return packed("patches")


@habit
def packed_patches_without_rows() -> str:
    return packed("patches", rows=None)


@habit
def packed_patches_of_truncated_rows() -> str:
    from row_kinds import IMAGE, patches

    batch = patches(COUNTS).inputs
    given = {**batch, "input_ids": batch["input_ids"][:, :-2]}
    return outcome(linears(), (given, rows(5)), rows=[PackedPatches(image_token_id=IMAGE), None])


@habit
def packed_tokens() -> str:
    return packed("one row of tokens")


@habit
def packed_tokens_without_rows() -> str:
    return packed("one row of tokens", rows=None)


@habit
def embedding_bags() -> str:
    bags = {"input": torch.randint(9, (20,)), "offsets": torch.arange(B)}
    return outcome(
        (nn.EmbeddingBag(9, 4), nn.Linear(5, 4)), (bags, rows(5)), rows=[PackedTokens(), None]
    )


@habit
def ragged() -> str:
    return packed("mapping")


@habit
def ragged_that_does_not_add_up() -> str:
    return words_of(Ragged, {"x": rows(6), "images": rows(6, 5)}, {"images": [1] * B})


@habit
def batch_of_graphs() -> str:
    return packed("graphs")


@habit
def sparse_input() -> str:
    return outcome(linears(), (rows(6).to_sparse(), rows(5)))


@habit
def meta_input() -> str:
    return outcome(linears(), (rows(6).to("meta"), rows(5)))


@habit
def inference_input() -> str:
    with torch.inference_mode():
        x = rows(6)
    return outcome(linears(), (x, rows(5)))


@habit
def computed_input() -> str:
    return outcome(linears(), (nn.Linear(6, 6).double()(rows(6)), rows(5)))


# Trimming.


class Weighted(nn.Module):
    """Sums the tokens that the mask keeps, beside a projection of six numbers of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(30, 4), nn.Linear(COLUMNS, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, extra: Tensor) -> Tensor:
        kept = (self.embedding(input_ids) * attention_mask[..., None]).sum(1)
        width = extra.shape[1]
        return kept + nn.functional.linear(extra, self.linear.weight[:, :width], self.linear.bias)


def trimmed(extra: Tensor | None = None, sorting: ByLength | None = None) -> str:
    mask = (torch.arange(COLUMNS) < 1 + torch.arange(B)[:, None] % (COLUMNS - 1)).long()
    ids = torch.randint(1, 30, (B, COLUMNS)) * mask
    extra = rows(COLUMNS) if extra is None else extra * mask
    given = {"input_ids": ids, "attention_mask": mask, "extra": extra}
    by_length = [sorting or ByLength(), None]
    encoders = Weighted(), nn.Linear(5, 4)
    return outcome(encoders, (given, rows(5)), sort_by_length=by_length)


@habit
def trims_tokens() -> str:
    return trimmed(extra=torch.ones(B, COLUMNS).double())


@habit
def trims_what_is_no_token() -> str:
    return trimmed()


@habit
def trims_by_name() -> str:
    return trimmed(sorting=ByLength(columns=["input_ids"]))


class Places(nn.Module):
    """Words and their places, counted from the left unless the caller counts them; a mean."""

    def __init__(self, over_padding: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30, 4), nn.Embedding(COLUMNS, 4)
        self.over_padding = over_padding

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None
    ) -> Tensor:
        counted = torch.arange(input_ids.shape[1]) if position_ids is None else position_ids
        hidden = self.words(input_ids) + self.places(counted)
        if self.over_padding:
            return hidden.mean(1)
        kept = attention_mask[..., None].to(hidden)
        return (hidden * kept).sum(1) / kept.sum(1).clamp_min(1)


def padded(
    side: str = "left", *, counted: bool = False, over_padding: bool = False, **changes: Any
) -> str:
    mask = (torch.arange(COLUMNS) < 1 + torch.arange(B)[:, None] % (COLUMNS - 1)).long()
    mask = mask.flip(1) if side == "left" else mask
    given = {"input_ids": torch.randint(1, 30, (B, COLUMNS)) * mask, "attention_mask": mask}
    if counted:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    given |= {name: change(given) for name, change in changes.items()}
    encoders = Places(over_padding), nn.Linear(5, 4)
    return outcome(encoders, (given, rows(5)), sort_by_length=[ByLength(), None])


@habit
def padding_on_the_left() -> str:
    return padded(counted=True)


@habit
def places_counted_from_the_left() -> str:
    return padded()


@habit
def averages_over_padding() -> str:
    return padded("right", over_padding=True)


@habit
def rows_without_tokens() -> str:
    def emptied(given: dict[str, Tensor]) -> Tensor:
        return given["attention_mask"] * (torch.arange(B) % 3 > 0)[:, None]

    return padded("right", attention_mask=emptied)


@habit
def mask_to_be_added() -> str:
    return padded("right", attention_mask=lambda given: -1e4 * (1 - given["attention_mask"]))


@habit
def two_masks() -> str:
    return padded("right", patch_valid=lambda given: given["attention_mask"].clone())


# Gradient hooks.


def with_hooks(kind: str, **options: Any) -> str:
    """Halved gradients, beside the one-shot step with the same hook."""
    encoders = linears()
    if kind == "clamp":
        for encoder in encoders:
            encoder.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    else:
        for encoder in encoders:
            encoder.weight.register_post_accumulate_grad_hook(halve)
    ours, truth = encoders, twins(*encoders)[1]
    for one, copy in zip(ours, truth, strict=True):
        copy.weight._backward_hooks = one.weight._backward_hooks
        copy.weight._post_accumulate_grad_hooks = one.weight._post_accumulate_grad_hooks
    x, y = rows(6), rows(5)
    if words := words_of(lambda: GradCache(ours, dot_product, chunk_size=5, **options)(x, y)):
        return words
    dot_product(truth[0](x), truth[1](y)).backward()
    name, error = worst(gradient_errors(ours, truth))
    return "exact" if error < 1e-10 else f"wrong by {error:.1e} in {name}"


def halve(parameter: nn.Parameter) -> None:
    parameter.grad.div_(2)


@habit
def gradient_hooks() -> str:
    return with_hooks("step")


@habit
def optimizer_in_the_backward() -> str:
    """An optimizer in a hook would step once a chunk."""
    encoder, other = linears()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    encoder.bias.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    return words_of(GradCache((encoder, other), dot_product, chunk_size=5), rows(6), rows(5))


@habit
def gradient_hooks_once() -> str:
    return with_hooks("step", gradient_hooks="once")


@habit
def clamping_hooks_once() -> str:
    return with_hooks("clamp", gradient_hooks="once")


# Encoders whose rows, passes or state depend on each other.


class Centred(nn.Linear):
    """Each row minus the mean of its chunk."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) ** 2
        return y - y.mean(0)


@habit
def mixes_rows() -> str:
    return outcome((Centred(6, 4), nn.Linear(5, 4)), (rows(6), rows(5)))


class NumbersFromElsewhere(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random()


@habit
def draws_from_elsewhere() -> str:
    encoders = NumbersFromElsewhere(6, 4).double(), nn.Linear(5, 4).double()
    cache = GradCache(encoders, dot_product, chunk_size=5)
    return words_of(cache, rows(6), rows(5))


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


@habit
def changes_its_input() -> str:
    cache = GradCache((InPlace(6, 4).double(), nn.Linear(5, 4).double()), dot_product, chunk_size=5)
    return words_of(cache, rows(6), rows(5))


@habit
def dropout() -> str:
    """Beside one graph over the same chunks, with the same draws."""
    encoders = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)).double(), linears()[1]
    ours, truth = twins(*encoders)
    x, y = rows(6), rows(5)
    state = torch.get_rng_state()
    GradCache(tuple(ours), dot_product, chunk_size=5)(x, y)
    torch.set_rng_state(state)
    features = torch.cat([truth[0](part) for part in x.split(5)])
    dot_product(features, truth[1](y)).backward()
    name, error = worst(gradient_errors(ours, truth))
    return "exact" if error < 1e-10 else f"wrong by {error:.1e} in {name}"


@habit
def batch_norm() -> str:
    """A warning, once, for the statistics are those of a chunk."""
    encoders = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double(), linears()[1]
    return words_of(GradCache(encoders, dot_product, chunk_size=5), rows(6), rows(5))


@habit
def batch_norm_in_eval() -> str:
    encoders = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval(), nn.Linear(5, 4)
    return outcome(encoders, (rows(6), rows(5)))


@habit
def not_finite() -> str:
    x = rows(6)
    x[7] = float("nan")
    return outcome(linears(), (x, rows(5)))


# Losses, and who calls backward.


@habit
def backward_of_the_output() -> str:
    out = GradCache(linears(), dot_product, chunk_size=5)(rows(6), rows(5))
    return words_of(out.loss.backward)


@habit
def scaled_backward_of_the_output() -> str:
    out = GradCache(linears(), dot_product, chunk_size=5)(rows(6), rows(5))
    return words_of(lambda: torch.amp.GradScaler("cpu").scale(out.loss).backward())


@habit
def backward_elsewhere() -> str:
    ours, truth = twins(*linears())
    x, y = rows(6), rows(5)
    (deferred_step(GradCache(tuple(ours), dot_product, chunk_size=5), x, y).loss / 2).backward()
    (dot_product(truth[0](x), truth[1](y)) / 2).backward()
    name, error = worst(gradient_errors(ours, truth))
    return "exact" if error < 1e-10 else f"wrong by {error:.1e} in {name}"


@habit
def loss_in_place() -> str:
    cache = GradCache(linears(), lambda x, y: dot_product(x.mul_(2), y), chunk_size=5)
    return words_of(cache, rows(6), rows(5))


@habit
def loss_of_each_row() -> str:
    cache = GradCache(linears(), lambda x, y: (x * y).sum(1), chunk_size=5)
    return words_of(cache, rows(6), rows(5))


@habit
def dict_of_losses() -> str:
    cache = GradCache(linears(), lambda x, y: {"total": dot_product(x, y)}, chunk_size=5)
    return words_of(cache, rows(6), rows(5))


@habit
def hard_negatives() -> str:
    """(B * K, D) are negatives of every query, as in one graph."""
    loss = InfoNCELoss(impl="reference")
    encoders = (*linears(), nn.Linear(5, 4).double())
    ours, truth = twins(*encoders)
    given = rows(6), rows(5), rows(5, 2 * B)
    GradCache(tuple(ours), loss, chunk_size=5)(*given)
    loss(*(encoder(each) for encoder, each in zip(truth, given, strict=True))).loss.backward()
    name, error = worst(gradient_errors(ours, truth))
    return "exact" if error < 1e-10 else f"wrong by {error:.1e} in {name}"


class SetsItself(nn.Linear):
    """Takes the mean of the first rows that it sees for its bias."""

    ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.ready, self.bias.data = True, -x.mean(0)[:4]
        return super().forward(x)


@habit
def writes_to_a_parameter() -> str:
    return outcome((SetsItself(6, 4), nn.Linear(5, 4)), (rows(6), rows(5)))


@habit
def embedding_of_a_largest_norm() -> str:
    encoders = nn.Sequential(nn.Embedding(9, 2, max_norm=0.5), nn.Flatten()), nn.Linear(5, 4)
    return outcome(encoders, (torch.randint(9, (B, 2)), rows(5)))


@habit
def loss_reads_what_an_encoder_keeps() -> str:
    class Keeps(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            features = super().forward(x)
            self.size = features.square().mean()
            return features

    encoders = Keeps(6, 4).double(), nn.Linear(5, 4).double()
    cache = GradCache(encoders, lambda x, y: dot_product(x, y) + encoders[0].size, chunk_size=5)
    return words_of(cache, rows(6), rows(5))


# Several processes.


@habit
def several_processes_without_a_strategy() -> str:
    with mock.patch.object(strategy, "world_size", lambda *_: 2):
        return outcome(linears(), (rows(6), rows(5)))


# After an interruption.


@habit
def interrupted() -> str:
    """Ctrl-C in the third pass with a graph, on top of the gradients of an earlier step."""
    encoders, given, passes = linears(), (rows(6), rows(5)), []
    cache = GradCache(encoders, dot_product, chunk_size=3)
    cache(*given)
    before = [p.grad.clone() for encoder in encoders for p in encoder.parameters()]

    def interrupt(*_: Any) -> None:
        passes.append(torch.is_grad_enabled())
        if sum(passes) == 3:
            raise KeyboardInterrupt

    for encoder in encoders:
        encoder.register_forward_hook(interrupt)
    try:
        cache(*given)
    except KeyboardInterrupt:
        after = [p.grad for encoder in encoders for p in encoder.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        return "exact" if same else "other gradients than before the step"
    return "no interruption"


# Arguments.


@habit
def chunk_size_zero() -> str:
    return words_of(GradCache, linears(), dot_product, chunk_size=0)


@habit
def embed_chunk_size_no_multiple() -> str:
    return words_of(GradCache, linears(), dot_product, chunk_size=4, embed_chunk_size=6)


@habit
def encoders_none() -> str:
    return words_of(GradCache, None, dot_product)


@habit
def strategy_of_another_kind() -> str:
    return words_of(GradCache, linears(), dot_product, strategy=5)


@habit
def bound_method() -> str:
    encoder, other = linears()
    return words_of(GradCache, (encoder.forward, other), dot_product)


@habit
def one_module_for_two_inputs() -> str:
    return words_of(GradCache, linears()[0], dot_product)


@habit
def names_of_gradcache() -> str:
    return words_of(lambda: GradCache(models=linears(), chunk_sizes=5, loss_fn=dot_product))


@habit
def keywords_of_the_loss() -> str:
    cache = GradCache(linears(), ClipLoss(), chunk_size=5)
    return words_of(lambda: cache(rows(6), rows(5), reduction="mean"))


class TwoArguments(nn.Linear):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return super().forward(ids * mask)


@habit
def list_of_arguments() -> str:
    """`[ids, mask]` of GradCache is a tuple or a dict here."""
    mask = torch.ones(B, 6).double()
    return outcome((TwoArguments(6, 4), nn.Linear(5, 4)), ([rows(6), mask], rows(5)))


@habit
def plan_of_modules() -> str:
    from gradcache_clip import plan

    return words_of(plan, *linears(), "24GB")


@habit
def token_outputs() -> str:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BertConfig(vocab_size=30, intermediate_size=4, **sizes)
    encoder = BertModel(config, add_pooling_layer=False)
    ids = {"input_ids": torch.randint(30, (B, 3)), "attention_mask": torch.ones(B, 3).long()}
    return outcome((encoder, nn.Linear(5, 4)), (ids, rows(5)))


@habit
def inside_no_grad() -> str:
    with torch.no_grad():
        return outcome(linears(), (rows(6), rows(5)))
