"""What an encoder does beside returning features, which a cached step cannot repeat."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gradcache_clip.cache.module_state import restored
from gradcache_clip.cache.random_state import HostState, RandomState, accelerators_among
from gradcache_clip.cache.replay_check import ReplayMismatchError
from gradcache_clip.cache.rounding import wide
from gradcache_clip.cache.settings import Settings
from gradcache_clip.cache.tower import Tower
from gradcache_clip.cache.trace import maker_of, watch
from gradcache_clip.distributed.strategies import LocalStrategy

Report = Callable[[str, Exception], None]
"""Given "error", "warn" or "off", and what was found."""

_PRECISIONS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_ELSEWHERE = "expected encoders that compute features alone, got another error on another rank"


class SideEffects:
    """Watches the first embed, and tells afterwards what it did beside returning features."""

    def __init__(self, towers: Sequence[Tower]) -> None:
        self._towers = towers
        self._parameters = list(_parameters(towers))
        self._before = _fingerprints(p for _, p in self._parameters)
        self._host = HostState.capture()
        self._left: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note which tensors are made, and stay, other than features."""
        # Frozen objects are not listed: what is listed afterwards was made meanwhile.
        frozen_before = gc.get_freeze_count() > 0
        gc.freeze()
        try:
            yield
            features = {id(feature) for tower in self._towers for feature in tower.features}
            self._left = [made for made in _tensors() if id(made) not in features]
        finally:
            gc.unfreeze()
            if frozen_before:
                gc.freeze()

    def check(self, plan: Settings, strategy: LocalStrategy, report: Report) -> None:
        """Report, on every rank, draws that no replay repeats and parameters written to."""
        device = self._towers[0].features[0].device
        drawn = self.drawn(alone=not strategy.collective_forward)
        written = self.written()
        if plan.check_replay != "off" and strategy.anywhere(bool(drawn), device):
            report(plan.check_replay, ReplayMismatchError(drawn or _ELSEWHERE))
        if plan.check_rows != "off" and strategy.anywhere(bool(written), device):
            report(plan.check_rows, ValueError(written or _ELSEWHERE))

    def drawn(self, *, alone: bool) -> str:
        """Describe draws from generators that no replay restores; empty if there are none.

        `alone`: whether this rank can run an encoder by itself, to tell its draws from those of
        another thread.
        """
        generators = self._host.drawn_from()
        if not generators:
            return ""
        replayed = [tower for tower in self._towers if tower.trainable is not False]
        places = (_drawing(t, generators) if alone else f"{t.name}: an encoder" for t in replayed)
        place = next(filter(None, places), "")
        return place and (
            f"{place} draws from numpy, random or a generator of its own: expected random numbers "
            f"of torch's generators, which a replay can repeat, got some of "
            f"{' and '.join(generators)}; draw them with torch, or before the step"
        )

    def written(self) -> str:
        """Describe the first parameter that a forward has written to; empty if there is none."""
        after = _fingerprints(p for _, p in self._parameters)
        for (name, _), before, now in zip(self._parameters, self._before, after, strict=True):
            if before != now:
                return (
                    f"{name}: expected a forward that leaves parameters as they are, got one that "
                    "writes to it chunk by chunk (as ActNorm and codebooks set themselves by the "
                    "first batch). Run the encoder once on enough rows inside torch.no_grad() "
                    "before the first step, or update the parameter after optimizer.step()"
                )
        return ""

    def unreadable(self, report: Callable[[Exception], None]) -> AbstractContextManager[object]:
        """Report a loss that reads what the embed has left somewhere; once."""
        # Held no longer than that: among them are tensors of graphs that the replay frees.
        left, self._left = self._left, []
        return _Unreadable(left, self._towers, report) if left else nullcontext()


def _parameters(towers: Sequence[Tower]) -> Iterator[tuple[str, Tensor]]:
    seen = set[int]()
    for tower in towers:
        for place, part in (pair for module in tower.modules for pair in module.named_modules()):
            # It renorms the rows that are looked up, every time to the same.
            if getattr(part, "max_norm", None) is not None:
                continue
            for name, p in part.named_parameters(recurse=False):
                # DeepSpeed empties and fills those with an id of its own.
                known = not (is_lazy(p) or p.is_meta or hasattr(p, "ds_id"))
                if known and p.dtype in _PRECISIONS and id(p) not in seen:
                    seen.add(id(p))
                    yield f"{tower.name}: {place}.{name}".replace(": .", ": "), p


def _fingerprints(parameters: Iterable[Tensor]) -> list[tuple[int, str]]:
    """Versions, and norms, for writing to `.data` leaves no version."""
    given = list(parameters)
    local = [p.to_local() if hasattr(p, "to_local") else p for p in given]
    norms = [torch.linalg.vector_norm(each.detach(), dtype=wide(each.dtype)) for each in local]
    devices = {each.device for each in norms}
    read = {d: iter(torch.stack([n for n in norms if n.device == d]).tolist()) for d in devices}
    # As text, in which NaN equals NaN.
    return [(p._version, repr(next(read[n.device]))) for p, n in zip(given, norms, strict=True)]


def _tensors() -> list[Tensor]:
    # By type: isinstance would ask lazy objects of other libraries for their class.
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return [each for each in found if not isinstance(each, nn.Parameter)]


class _Unreadable(TorchDispatchMode):
    """Reports operations on tensors that the embed has left behind."""

    def __init__(
        self, left: Sequence[Tensor], towers: Sequence[Tower], report: Callable[[Exception], None]
    ) -> None:
        super().__init__()
        self._left, self._towers, self._report = {id(each): each for each in left}, towers, report

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for given in pytree.tree_leaves((args, kwargs)):
            if self._left.pop(id(given), None) is not None:
                with torch.utils._python_dispatch._disable_current_modes():
                    self._report(ValueError(_message(given, self._towers)))
        return function(*args, **(kwargs or {}))


def _message(read: Tensor, towers: Sequence[Tower]) -> str:
    return (
        f"loss: expected to read nothing of an encoder but its features, got a tensor of shape "
        f"{tuple(read.shape)} that {_origin(read, towers)}. It is of one chunk, and carries no "
        "gradient to the encoder. Let the encoder return it: a loss of its own as a 0-dim tensor "
        'in a dict, with auxiliary_losses={"name": weight}, and anything else as one more '
        "feature, with one row a sample"
    )


def _origin(read: Tensor, towers: Sequence[Tower]) -> str:
    for tower in towers:
        for place, part in (pair for module in tower.modules for pair in module.named_modules()):
            for name, value in vars(part).items():
                if any(each is read for each in pytree.tree_leaves(value)):
                    path = f"{place}.{name}" if place else name
                    return f"{tower.name} keeps as {path}"
    for tower in towers:
        if maker := maker_of(tower, tower.chunks[0], read):
            return f"was made in {maker} of {tower.name}, by it or by a hook on it"
    return "was made by an encoder"


def _drawing(tower: Tower, generators: Sequence[str]) -> str:
    state = RandomState.capture(accelerators_among(tower.known_tensors()))
    host = HostState.capture()
    try:
        with restored(tower.modules):
            for chunk in tower.chunks:
                drew = watch(tower, chunk).drew
                if found := [place for name in generators for place in drew[name]]:
                    return f"{tower.name}: {found[0].label}"
    finally:
        state.restore()
        host.restore()
    return ""
