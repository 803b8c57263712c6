"""Descriptions of steps, drawn by hypothesis: inputs, encoders, chunks and a strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, given, settings
from property_nests import FLAGS, WITH_ROWS, Nest

ON_RANKS = (
    *("AllReduce", "DDP", "DDP views", "DDP finds", "FSDP", "FSDP gathered"),
    *("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"),
)

_SPREAD = 3


@dataclass(frozen=True)
class Input:
    """One input of the step, and how it is cut."""

    nest: Nest
    branches: tuple[int, ...]
    """The branch that each row of one rank uses; the ranks follow each other."""
    chunk: int
    embed: int | None
    """Chunks that are embedded at once."""
    sort: int | None
    """None, 0 to sort and cut by rows, or the most tokens of a chunk."""
    names_columns: bool
    """Whether the sorting is told which columns hold tokens."""
    frozen: str
    """Parts of its encoder: "no", "base", "branches" or "all"."""


@dataclass(frozen=True)
class Case:
    """Two optimizer steps."""

    engine: str
    world: int
    seed: int
    inputs: tuple[Input, ...]
    encoders: str
    """ "each", "tied", "one" for all inputs, or "trunks"."""
    always: bool
    noise: str
    parts: int
    """Tensors among the features."""
    head: str
    """What get_features is: "no", a "function", or a "module" that is trained."""
    hooks: str
    """ "no", "once" or "error"."""
    budget: int | None
    keep: bool
    """Whether the second step adds to the gradients of the first."""
    input_grads: bool

    @property
    def rows(self) -> int:
        """Of each rank."""
        return len(self.inputs[0].branches) // self.world

    @property
    def deepspeed(self) -> bool:
        return self.engine.startswith("ZeRO")

    @property
    def tied(self) -> bool:
        return self.encoders == "tied"


def leaves() -> st.SearchStrategy[Nest]:
    flags = [f"flag {index}" for index in range(len(FLAGS))]
    return st.sampled_from([*WITH_ROWS, *WITH_ROWS, "shared", *flags]).map(Nest)


def containers(children: st.SearchStrategy[Nest]) -> st.SearchStrategy[Nest]:
    several = st.lists(children, min_size=1, max_size=3).map(tuple)
    pair = st.tuples(children, children)
    return st.one_of(
        st.builds(Nest, st.sampled_from(["dict", "tuple"]), several),
        st.builds(Nest, st.sampled_from(["named", "dataclass"]), pair),
    )


def nests() -> st.SearchStrategy[Nest]:
    """With at least one leaf that has rows, and at most one mask."""
    nested = st.recursive(leaves(), containers, max_leaves=6)
    usable = nested.filter(lambda nest: bool(_rows_of(nest)) and _masks_of(nest) <= 1)
    return st.one_of(st.sampled_from(WITH_ROWS).map(Nest), usable)


def kinds_in(nest: Nest) -> list[str]:
    return [nest.kind, *(kind for child in nest.children for kind in kinds_in(child))]


def _rows_of(nest: Nest) -> list[str]:
    return [kind for kind in kinds_in(nest) if kind in WITH_ROWS]


def _masks_of(nest: Nest) -> int:
    return sum(kind.startswith("tokens") for kind in kinds_in(nest))


@st.composite
def drawn_inputs(draw: st.DrawFn, rows: int, nest: Nest | None) -> Input:
    nest = nest or draw(nests())
    sorts = _masks_of(nest) > 0 or nest.kind in ("texts", "list")
    return Input(
        nest=nest,
        branches=draw(_branches(rows)),
        chunk=draw(st.integers(1, 4)),
        embed=draw(st.sampled_from([None, None, 2, 3])),
        sort=draw(st.sampled_from([None, 0, 0, 7, 12])) if sorts else None,
        names_columns=draw(st.booleans()) or _masks_of(nest) == 0,
        frozen=draw(st.sampled_from(["no", "no", "base", "base", "branches", "all"])),
    )


def _branches(rows: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Of all rows: any, or few that use a branch, as images among texts are."""
    any_of = st.tuples(*[st.integers(0, 2)] * rows)
    few = st.tuples(*[st.sampled_from([0, 0, 0, 0, 1, 2])] * rows)
    return st.one_of(any_of, few)


@st.composite
def cases(draw: st.DrawFn, engine: str, world: int) -> Case:
    zero, rows = engine.startswith("ZeRO"), draw(st.integers(3, 8)) * world
    kinds = ["tied", "one"] if zero else ["each", "each", "tied", "one", "one", "trunks"]
    if engine == "DDP finds":
        kinds = ["each", "each", "each", "trunks", "one"]
    encoders = draw(st.sampled_from(kinds))
    count = draw(st.integers(1, 3))
    shared_nest = draw(nests()) if encoders == "tied" else None
    inputs = [draw(drawn_inputs(rows, shared_nest)) for _ in range(count)]
    waits = engine in ("FSDP", "ZeRO-2", "ZeRO-3")
    plain = engine in ("Local", "AllReduce")
    return Case(
        engine=engine,
        world=world,
        seed=draw(st.integers(0, 99)),
        inputs=tuple(inputs),
        encoders=encoders,
        always=draw(st.sampled_from([True, True, True, False] if waits else [False, False, True])),
        noise=draw(st.sampled_from(["no", "no", "all", "branch"])),
        parts=draw(st.sampled_from([1, 1, 2])),
        head=draw(st.sampled_from(["no", "function", *["module"] * (2 if plain else 0)])),
        hooks=draw(st.sampled_from(["no", "no", "no", *([] if zero else ["once", "once"])])),
        budget=draw(st.sampled_from([None, None, 1500, 4000, 10**9])),
        keep=not zero and draw(st.booleans()),
        input_grads=engine == "Local" and draw(st.booleans()),
    )


def refusals(engine: str, world: int) -> st.SearchStrategy[Case]:
    """The same with a hook that nobody spoke of, or a head that nobody would reduce."""
    wrapped = engine not in ("Local", "AllReduce")
    changes = [{"hooks": "error"}, *([{"head": "module", "hooks": "no"}] if wrapped else [])]
    changed = st.sampled_from(changes)
    return st.builds(lambda case, change: replace(case, **change), cases(engine, world), changed)


def found_wrong() -> list[Case]:
    """Cases of two processes that once hung or went wrong, or that are seldom drawn."""
    none, last = (0,) * 8, (0,) * 7 + (1,)
    # Chunks that draw numbers are replayed as they were embedded, here on one rank alone.
    draws: dict[str, Any] = {"encoders": "one", "always": True, "noise": "branch", "embed": 3}
    draws["branches"] = [(*none[:3], 2, *none[4:], *none)]
    # Branches of all rows are the same on both, but not those of halves, or of the first chunk.
    halves: dict[str, Any] = {"branches": [(2, 2, 1, 1, 2, 1, 1, 2)], "chunk": 4}
    first: dict[str, Any] = {"branches": [(2, 1, 0, 0, 0, 2, 1, 0)], "chunk": 1, "budget": 1500}
    return [
        *(_plain(engine, **draws) for engine in ("FSDP", "FSDP gathered", "ZeRO-2", "ZeRO-3")),
        _plain("FSDP", **halves),
        _plain("FSDP", **first),
        # The features of one rank have no graph.
        _plain("FSDP", [none + (1,) * 8], frozen="base", encoders="one", always=True),
        _plain("DDP", [none + (1,) * 8], frozen="base", encoders="one"),
        # One rank keeps all graphs and has no replay to compare.
        _plain("AllReduce", [(1,) * 4 + (0,) * 4], budget=150),
        # A module without parameters runs on one rank alone.
        _plain("ZeRO-3", [(2, *none[1:])], encoders="one", always=True, noise="branch"),
        # On one rank the last chunk of one of two wrappers has no graph.
        _plain("DDP", [none, last], frozen="base"),
        _plain("DDP finds", [none, last], frozen="base"),
    ]


def _plain(
    engine: str,
    branches: Sequence[tuple[int, ...]],
    *,
    frozen: str = "no",
    chunk: int = 2,
    embed: int | None = None,
    **changed: Any,
) -> Case:
    nest = Nest("tensor")
    inputs = (Input(nest, each, chunk, embed, None, True, frozen) for each in branches)
    case = Case(
        engine=engine,
        world=2,
        seed=3,
        inputs=tuple(inputs),
        encoders="each",
        always=False,
        noise="no",
        parts=1,
        head="no",
        hooks="no",
        budget=None,
        keep=False,
        input_grads=False,
    )
    return replace(case, **changed)


def drawn(strategy: st.SearchStrategy[Case], count: int) -> list[Case]:
    """The same examples every time, far apart: hypothesis varies one for a while."""
    found: dict[Case, None] = {}

    @settings(
        max_examples=_SPREAD * count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Case) -> None:
        found[case] = None

    collect()
    return list(found)[:: max(1, len(found) // count)][-count:]
