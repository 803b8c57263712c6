"""Inputs that every chunk would get whole: cut, shared on purpose, or refused in one line."""

from __future__ import annotations

import array
import collections
import dataclasses
import enum
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from one_shot import gradient_errors, one_shot, twins, worst
from torch import Tensor, nn

from gradcache_clip import ByLength, ClipLoss, GradCache, Shared, deferred_step, verify
from gradcache_clip.cache.batch_tree import count_rows
from gradcache_clip.cache.host_inputs import device_for
from gradcache_clip.memory import count_cached_step

ROWS, CHUNK = 7, 3


class Weighs(nn.Module):
    """x times a weight of each row, which any container of numbers may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4)
        self.calls = 0

    def forward(self, x: Tensor, more: Any = None) -> Tensor:
        self.calls += 1
        weights = 1.0 if more is None else torch.tensor([float(w) for w in more])[:, None].to(x)
        return self.inner(x) * weights


class Graph:
    """A sample of a class that nobody here knows; it can be called, as those of some libraries."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __float__(self) -> float:
        return self.weight

    def __call__(self) -> float:
        return self.weight


def numbers() -> list[float]:
    return [0.5 + i for i in range(ROWS)]


def batch(more: Any) -> tuple[dict[str, Any], Tensor]:
    return {"x": torch.randn(ROWS, 8).double(), "more": more}, torch.randn(ROWS, 6).double()


def frame() -> Any:
    return pytest.importorskip("pandas").DataFrame({"weight": numbers()})


def column() -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict({"weight": numbers()})["weight"]


def dataset() -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict({"weight": numbers()})


def arrow() -> Any:
    return pytest.importorskip("pyarrow").array(numbers())


def arrow_table() -> Any:
    return pytest.importorskip("pyarrow").table({"weight": numbers()})


def images() -> list[Any]:
    image = pytest.importorskip("PIL.Image")
    return [image.new("L", (2, 2), color=int(w)) for w in numbers()]


LIST = r"pass list\(x\), or Shared\(x\) if every chunk needs all of it"
TUPLE = r"expected a list, one sample an element, got a tuple of {}.*" + LIST
GRAPH = r"got a Graph.*pass a list with one element a sample, or Shared\(x\)"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "tuple of images": (lambda: tuple(images()), TUPLE.format("Image")),
    "tuple of graphs": (lambda: tuple(map(Graph, numbers())), TUPLE.format("Graph")),
    "tuple of some graphs": (lambda: (*map(Graph, numbers()[1:]), None), GRAPH),
    "a graph beside a tensor": (lambda: (torch.ones(ROWS), Graph(1.0)), GRAPH),
    "tuple of numbers": (lambda: tuple(numbers()), TUPLE.format("float")),
    "tuple of pairs": (lambda: tuple((i, i) for i in range(ROWS)), TUPLE.format("tuple")),
    "tuple of strings": (lambda: tuple("abcdefg"), r"got a tuple.*pass list\(texts\)"),
    "tuple of nothing": (lambda: (None,) * ROWS, TUPLE.format("NoneType")),
    "deque": (lambda: collections.deque(numbers()), f"got a deque.*{LIST}"),
    "user list": (lambda: collections.UserList(numbers()), f"got a UserList.*{LIST}"),
    "keys": (lambda: dict.fromkeys(numbers()).keys(), f"got a dict_keys.*{LIST}"),
    "values": (lambda: dict(enumerate(numbers())).values(), f"got a dict_values.*{LIST}"),
    "items": (lambda: dict(enumerate(numbers())).items(), f"got a dict_items.*{LIST}"),
    "range": (lambda: range(ROWS), f"got a range.*{LIST}"),
    "generator": (lambda: (x for x in numbers()), f"got a generator.*{LIST}"),
    "map": (lambda: map(float, numbers()), f"got a map.*{LIST}"),
    "array": (lambda: array.array("d", numbers()), f"got a array.*{LIST}"),
    "set": (lambda: set(numbers()), "got a set.*pass a list in the order of the samples"),
    "series": (lambda: frame()["weight"], f"got a Series.*{LIST}"),
    "index": (lambda: frame().index, f"got a RangeIndex.*{LIST}"),
    "frame": (frame, r'got a DataFrame.*dict of columns, or one dict per sample.*"records"'),
    "column": (column, f"got a Column.*{LIST}"),
    "dataset": (dataset, f"got a Dataset.*{LIST}"),
    "arrow": (arrow, f"got a DoubleArray.*{LIST}"),
    "arrow table": (arrow_table, "got a Table.*dict of columns"),
    "one image": (lambda: images()[0], "got a Image.*pass a list with one element a sample"),
    "one graph": (lambda: Graph(1.0), GRAPH),
    "namespace": (lambda: types.SimpleNamespace(x=torch.ones(ROWS)), "got a SimpleNamespace"),
    "sparse": (lambda: torch.eye(ROWS).to_sparse(), r"sparse_coo; pass x.to_dense\(\), or Shared"),
    "jagged": (
        lambda: torch.nested.nested_tensor(
            [torch.ones(2, 3)] * ROWS, layout=torch.jagged
        ).transpose(1, 2),
        r"expected a NestedTensor that is ragged in dimension 1",
    ),
}


@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_reach_every_chunk_whole_is_refused(more, message):
    encoder = Weighs().double()
    cache = GradCache([encoder, nn.Linear(6, 4).double()], ClipLoss(), chunk_size=CHUNK)
    with pytest.raises((TypeError, ValueError), match=rf"^input 0\['more'\].*: .*{message}"):
        cache(*batch(more()))
    assert encoder.calls == 0 and encoder.inner.weight.grad is None


@pytest.mark.parametrize("name", ["images", "deque", "generator", "column", "series"])
def test_the_same_alone(name):
    """Without a tensor beside it, as what an encoder that collates is given."""
    given = {"images": "tuple of images"}.get(name, name)
    more, message = REFUSED[given]
    cache = GradCache([Weighs(), nn.Linear(6, 4)], ClipLoss(), chunk_size=CHUNK)
    with pytest.raises(TypeError, match=rf"^input 0: .*{message}"):
        cache(more(), torch.randn(ROWS, 6))


AS_LISTS = ["tuple of graphs", "tuple of numbers", "deque", "values", "generator", "range",
            "series", "column"]  # fmt: skip


@pytest.mark.parametrize("name", AS_LISTS)
def test_as_a_list_it_is_exact(name):
    assert_exact(Weighs(), batch(list(REFUSED[name][0]())))


def assert_exact(encoder: nn.Module, inputs: Any, **options: Any) -> None:
    modules = encoder.double(), nn.Linear(6, 4).double(), ClipLoss().double()
    ours, truth = twins(*modules)
    out = GradCache(ours[:2], ours[2], chunk_size=CHUNK, **options)(*inputs)
    expected = one_shot(truth[:2], truth[2], inputs)
    torch.testing.assert_close(out.loss, expected.loss.detach(), rtol=1e-12, atol=1e-12)
    assert worst(gradient_errors(ours, truth))[1] < 1e-10


class Color(enum.Enum):
    RED = 1


class Size(NamedTuple):
    height: int
    width: int


WHOLE = {
    "none": None,
    "flag": True,
    "number": 3,
    "numpy number": np.float64(2.0),
    "numpy flag": np.bool_(True),
    "0-dim array": np.array(1.5),
    "0-dim tensor": torch.tensor(2.0),
    "string as long as the batch": "a" * ROWS,
    "enum": Color.RED,
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "path": Path("a"),
    "function": lambda x: x,
    "module": nn.ReLU(),
    "class": Graph,
    "a shape as long as the batch": torch.Size([1] * ROWS),
    "a tuple of another length": (224, 224),
    "named fields": Size(2, 2),
    "empty": (),
    "flags in a tuple": (True, None, 1.0),
}


@pytest.mark.parametrize("more", WHOLE.values(), ids=WHOLE)
def test_what_has_no_rows_is_shared(more):
    seen: list[Any] = []

    class Sees(nn.Linear):
        def forward(self, x: Tensor, more: Any) -> Tensor:
            seen.append(more)
            return super().forward(x)

    encoders = Sees(8, 4).double(), nn.Linear(6, 4).double()
    GradCache(encoders, ClipLoss(), chunk_size=CHUNK)(*batch(more))
    assert len(seen) >= 5 and all(each is more or each == more for each in seen)


def test_named_fields_of_two_rows_are_no_samples():
    assert count_rows({"x": torch.ones(2, 3), "size": Size(4, 4)}, "input 0") == 2


class Nearest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4)
        self.sizes: list[int] = []

    def forward(self, x: Tensor, table: Any) -> Tensor:
        self.sizes.append(len(table))
        rows = torch.stack([row * torch.ones(8).to(x) for row in table]).to(x)
        return self.inner(x) + (x @ rows.T).softmax(1) @ rows[:, :4]


SHARED = {
    "tensor": lambda: torch.randn(ROWS, 8).double(),
    "other rows": lambda: torch.randn(4, 8).double(),
    "tuple": lambda: tuple(torch.randn(8).double() for _ in range(ROWS)),
    "numbers": lambda: tuple(numbers()),
    "list": lambda: [torch.randn(8).double() for _ in range(3)],
    "deque": lambda: collections.deque(numbers()),
}


@pytest.mark.parametrize("table", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("pack", [lambda x, t: {"x": x, "table": t}, lambda x, t: (x, t)])
def test_shared_reaches_every_chunk_whole(pack, table):
    x, value = torch.randn(ROWS, 8).double(), table()
    encoder = Nearest()
    inputs = pack(x, Shared(value)), torch.randn(ROWS, 6).double()
    assert_exact(encoder, inputs)
    assert set(encoder.sizes) == {len(value)}


def test_a_shared_tensor_gets_its_gradient():
    table = torch.randn(5, 8).double().requires_grad_()
    (encoder, other, loss), truth = twins(Nearest().double(), nn.Linear(6, 4).double(), ClipLoss())
    x, y = torch.randn(ROWS, 8).double(), torch.randn(ROWS, 6).double()
    GradCache([encoder, other], loss, chunk_size=CHUNK)((x, Shared(table)), y)
    value = truth[2](truth[0](x, table), truth[1](y)).loss
    expected = torch.autograd.grad(value, table)[0]
    torch.testing.assert_close(table.grad, expected, rtol=1e-10, atol=1e-12)


def test_a_shared_tensor_with_a_graph_is_refused():
    """The first replay would free it."""
    table = (torch.randn(5, 8, requires_grad=True) * 2).double()
    cache = GradCache([Nearest().double(), nn.Linear(6, 4).double()], ClipLoss(), chunk_size=CHUNK)
    with pytest.raises(ValueError, match="expected inputs that are leaves"):
        cache((torch.randn(ROWS, 8).double(), Shared(table)), torch.randn(ROWS, 6).double())


def test_shared_alone_is_no_batch():
    with pytest.raises(ValueError, match="got a Shared without any"):
        count_rows(Shared(torch.ones(4)), "input 0")


def test_shared_is_not_trimmed():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 4)
            self.shapes: set[tuple[int, ...]] = set()

        def forward(self, input_ids: Tensor, attention_mask: Tensor, table: Tensor) -> Tensor:
            self.shapes.add(tuple(table.shape))
            return self.inner((table[input_ids] * attention_mask[..., None]).sum(1))

    lengths = torch.tensor([5, 2, 3, 1, 1, 2, 4])
    mask = (torch.arange(5) < lengths[:, None]).long()
    table = torch.randn(ROWS, 5).double()
    tokens = {
        "input_ids": torch.randint(ROWS, (ROWS, 5)) * mask,
        "attention_mask": mask,
        "table": Shared(table),
    }
    words = Words()
    inputs = tokens, torch.randn(ROWS, 6).double()
    assert_exact(words, inputs, sort_by_length=[ByLength(), None])
    assert words.shapes == {(ROWS, 5)}


def test_shared_in_all_ways_to_take_a_step():
    """Deferred, verified, with kept graphs, embedded together."""
    x, table = torch.randn(ROWS, 8).double(), Shared(torch.randn(4, 8).double())
    inputs = {"x": x, "table": table}, torch.randn(ROWS, 6).double()
    encoders = Nearest().double(), nn.Linear(6, 4).double()
    cache = GradCache(encoders, ClipLoss(), chunk_size=CHUNK, embed_chunk_size=2 * CHUNK)
    assert verify(cache, *inputs).exact
    cache(*inputs)
    first = encoders[0].inner.weight.grad.clone()
    encoders[0].zero_grad()
    deferred_step(cache, *inputs).loss.backward()
    torch.testing.assert_close(encoders[0].inner.weight.grad, first)


def test_shared_tensors_do_not_decide_where_a_batch_goes():
    """A table on the device beside a batch on the host; meta stands for a device here."""
    parameters = [nn.Parameter(torch.empty(2, device="meta"))]
    host, there = torch.ones(3, 2), torch.ones(4, device="meta")
    assert device_for(parameters, (host, Shared(there))).type == "meta"
    assert device_for(parameters, (["a", "b"], Shared(host))).type == "meta"
    assert device_for(parameters, (host, there)) is None


def test_shared_bytes_are_counted_once():
    """Not grown to the batch that is asked about."""

    class Plus(nn.Linear):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return super().forward(x) + table.mean(0)

    encoders = Plus(8, 4), nn.Linear(6, 4)
    table = torch.randn(10, 4)

    def total(table: Any) -> int:
        example = (torch.ones(1, 8), table), torch.ones(1, 6)
        found = count_cached_step(encoders, lambda a, b: (a * b).mean(), example, 64, 8)
        return found.input_bytes

    assert total(Shared(table)) - total(Shared(torch.empty(0, 4))) == 10 * 4 * 4


def test_lists_that_stand_for_arguments():
    """`[ids, mask]`, as other packages take them, is two samples here."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 4)

        def forward(self, both: list[Tensor]) -> Tensor:
            x, weight = both
            return self.inner(x) * weight

    x, weight = torch.randn(ROWS, 8), torch.randn(ROWS, 1)
    cache = GradCache([Two(), nn.Linear(6, 4)], ClipLoss())
    hint = r"A list holds one sample an element: pass several arguments as a tuple or dict$"
    with pytest.raises(ValueError, match=rf"features with 2 rows.*{hint}"):
        cache([x, weight], torch.randn(ROWS, 6))
    with pytest.raises(ValueError, match=rf"got 7 in input 0\['x'\] and 2 in .*{hint}"):
        cache({"x": x, "more": [x, weight]}, torch.randn(ROWS, 6))


def test_packed_rows_are_told_the_ways_out():
    """Patches of all images in one tensor have more rows than there are images."""
    cache = GradCache([Weighs(), nn.Linear(6, 4)], ClipLoss())
    message = r"got 20 .* and 7 .*a list with one dict per sample.*encoder collates.*Shared\(x\)"
    with pytest.raises(ValueError, match=message):
        cache({"pixels": torch.randn(20, 8), "grid": torch.ones(ROWS, 3)}, torch.randn(ROWS, 6))


class Takes(nn.Module):
    """Reads x and more from keyword arguments or from one object."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4)
        self.kinds: set[str] = set()

    def forward(self, given: Any = None, **fields: Any) -> Tensor:
        self.kinds.add(type(given).__name__)
        x = fields["x"] if given is None else given.x
        deep = fields["deep"]["w"] if given is None else given.w
        return self.inner(x) * deep[:, None]


@pytest.mark.parametrize("sorting", [None, ByLength(length_of=lambda given: given["deep", "w"])])
def test_tensor_dicts_are_cut(sorting):
    tensordict = pytest.importorskip("tensordict")
    deep = {"w": torch.arange(1.0, ROWS + 1).double()}
    given = tensordict.TensorDict({"x": torch.randn(ROWS, 8).double(), "deep": deep}, [ROWS])
    inputs = given, torch.randn(ROWS, 6).double()
    assert_exact(Takes(), inputs, sort_by_length=[sorting, None])
    cache = GradCache([Takes().double(), nn.Linear(6, 4).double()], ClipLoss(), chunk_size=CHUNK)
    assert verify(cache, *inputs).exact


def test_tensor_classes_are_cut():
    tensordict = pytest.importorskip("tensordict")
    fields = {"x": Tensor, "w": Tensor}
    kind = tensordict.tensorclass(dataclasses.make_dataclass("Pair", fields.items()))
    given = kind(x=torch.randn(ROWS, 8).double(), w=torch.randn(ROWS).double(), batch_size=[ROWS])
    takes = Takes()
    assert_exact(takes, (given, torch.randn(ROWS, 6).double()))
    assert takes.kinds == {"Pair"}


def test_a_tensor_dict_without_rows_is_refused():
    tensordict = pytest.importorskip("tensordict")
    given = tensordict.TensorDict({"x": torch.ones(ROWS, 8)}, [])
    with pytest.raises(TypeError, match=r"got batch_size=\[\]; call x.auto_batch_size_\(1\)"):
        count_rows(given, "input 0")


def test_lists_of_nested_tensors_are_exact():
    jagged = torch.nested.nested_tensor(
        [torch.randn(n, 8).double() for n in (1, 4, 2, 2, 5, 3, 1)], layout=torch.jagged
    )

    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 4)

        def forward(self, rows: list[Tensor]) -> Tensor:
            return self.inner(torch.stack([row.mean(0) for row in rows]))

    assert_exact(Pools(), (list(jagged.unbind()), torch.randn(ROWS, 6).double()))


def test_a_sparse_table_is_shared():
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 4)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.inner(x) + (table @ x.new_ones(5, 4)).mean(0)

    inputs = (torch.randn(ROWS, 8).double(), Shared(torch.eye(5).double().to_sparse()))
    assert_exact(Mixes(), (inputs, torch.randn(ROWS, 6).double()), memory_budget=10**9)
    cache = GradCache([Mixes().double(), nn.Linear(6, 4).double()], ClipLoss(), chunk_size=CHUNK)
    assert verify(cache, inputs, torch.randn(ROWS, 6).double()).exact
