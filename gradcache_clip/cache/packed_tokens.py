"""`rows=PackedTokens()`: sequences that follow each other in one tensor."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradcache_clip.cache.batch_tree import Shared
from gradcache_clip.cache.nests import with_children
from gradcache_clip.cache.packed import check_mapping
from gradcache_clip.cache.rows import Rows, Spans

# By their names in transformers and flash attention.
_CUMULATED = tuple(
    f"{name}{end}" for name in ("cu_seqlens", "cu_seq_lens") for end in ("", "_q", "_k")
)
_LONGEST = tuple(
    f"{name}{end}" for name in ("max_seqlen", "max_length") for end in ("", "_q", "_k")
)
_DESCRIBING = frozenset((*_CUMULATED, *_LONGEST, "offsets", "seq_idx"))


@dataclass(frozen=True)
class PackedTokens:
    """Rows of a batch whose sequences follow each other in tensors (T,) or (1, T), unpadded.

    Where a row ends is read from `cu_seqlens` (B + 1,) or its variants (`cu_seq_lens_q`, ...), from
    `offsets` (B,) of an EmbeddingBag, or from `position_ids` that start again with each sequence.
    A chunk gets a packed batch of its own: every tensor of T tokens cut to those of its rows, with
    new `cu_seqlens`, `offsets`, `seq_idx` and `max_length_q`. Numbers and `Shared` values stay.

    Args:
        include_last_offset: whether `offsets` end with T, as in an EmbeddingBag of that setting.

    Example:
        >>> import torch
        >>> from gradcache_clip import ClipLoss, GradCache, PackedTokens
        >>> encoders = torch.nn.EmbeddingBag(100, 4), torch.nn.Linear(6, 4)
        >>> rows = [PackedTokens(), None]
        >>> cache = GradCache(encoders, ClipLoss(), chunk_size=2, rows=rows)
        >>> words, offsets = torch.randint(100, (9,)), torch.tensor([0, 4, 4])
        >>> bags = {"input": words, "offsets": offsets}
        >>> out = cache(bags, torch.randn(3, 6))
    """

    include_last_offset: bool = False

    def __call__(self, inputs: Any) -> Packed:
        check_mapping(inputs, "PackedTokens")
        tokens = _count_tokens(inputs)
        spans = Spans(self._lengths(inputs, tokens))
        cut = {key: part for key, part in inputs.items() if key not in _DESCRIBING}
        dims = {
            key: dim for key, part in cut.items() if (dim := _dim(key, part, tokens)) is not None
        }
        return Packed(inputs, spans, dims, self.include_last_offset)

    def _lengths(self, inputs: Mapping[str, Any], tokens: int) -> list[int]:
        """Read the lengths of the rows, on which everything that tells them must agree."""
        found = {key: _bounds(key, inputs[key], tokens) for key in _CUMULATED if _has(inputs, key)}
        if _has(inputs, "offsets"):
            end = torch.full((0 if self.include_last_offset else 1,), tokens)
            given = torch.cat([inputs["offsets"].cpu(), end.to(inputs["offsets"].dtype)])
            found["offsets"] = _bounds("offsets", given, tokens)
        if not found and _has(inputs, "position_ids"):
            found["position_ids"] = _restarts(inputs["position_ids"])
        bounds = next(iter(found.values()), None)
        if bounds is None or any(each != bounds for each in found.values()):
            got = f"other ones in {' and '.join(found)}" if found else f"none in {list(inputs)}"
            raise ValueError(
                f"rows=PackedTokens(): expected one set of bounds of sequences, got {got}; pass "
                "cu_seqlens, offsets, or position_ids that start again with each sequence"
            )
        return [stop - start for start, stop in itertools.pairwise(bounds)]


@dataclass(frozen=True, eq=False)
class Packed(Rows):
    """A packed batch: its tensors of tokens are cut, and what describes them is made anew."""

    inputs: Mapping[str, Any]
    spans: Spans
    dims: Mapping[str, int]
    """By key, the dimension along which tokens lie."""
    last_offset: bool

    def __len__(self) -> int:
        return len(self.spans)

    def take(self, rows: slice | Sequence[int]) -> Packed:
        parts = [
            self.spans.cut(part, rows, self.dims[key]) if key in self.dims else part
            for key, part in self.inputs.items()
        ]
        return replace(self, inputs=with_children(self.inputs, parts), spans=self.spans.take(rows))

    @property
    def value(self) -> Any:
        parts = [self._described(key, part) for key, part in self.inputs.items()]
        return with_children(self.inputs, parts)

    @property
    def lengths(self) -> list[int]:
        return self.spans.lengths

    def _described(self, key: str, part: Any) -> Any:
        spans = self.spans
        if isinstance(part, Shared):
            return part.value
        if part is None or key not in _DESCRIBING:
            return part
        if key in _LONGEST:
            longest = max(spans.lengths)
            return part.new_tensor(longest) if isinstance(part, Tensor) else longest
        if key == "seq_idx":
            numbers = part.new_tensor(range(len(spans)))
            return numbers.repeat_interleave(part.new_tensor(spans.lengths)).view(
                *[1] * (part.ndim - 1), -1
            )
        stop = -1 if key == "offsets" and not self.last_offset else None
        return part.new_tensor(spans.bounds[:stop])


def _has(inputs: Mapping[str, Any], key: str) -> bool:
    return inputs.get(key) is not None


def _count_tokens(inputs: Mapping[str, Any]) -> int:
    """Count the tokens: where the last row ends, or those of the first tensor that holds any."""
    for key in _CUMULATED:
        if isinstance(ends := inputs.get(key), Tensor) and ends.numel():
            return int(ends.flatten()[-1])
    for key, part in inputs.items():
        if isinstance(part, Tensor) and part.ndim and key not in _DESCRIBING:
            return part.shape[1] if part.ndim > 1 and part.shape[0] == 1 else part.shape[0]
    raise ValueError(
        f"rows=PackedTokens(): expected a tensor (T,) or (1, T), got {list(inputs)} without any; "
        "pass the tokens beside their bounds"
    )


def _dim(key: str, part: Any, tokens: int) -> int | None:
    """Find the dimension along which the tokens lie; None if every chunk gets the part whole."""
    if part is None or isinstance(part, (bool, int, float, str, Shared)):
        return None
    shape = tuple(part.shape) if isinstance(part, Tensor) else ()
    pairs = "mask" in key and shape.count(tokens) > 1
    if not pairs and shape[:2] == (1, tokens):
        return 1
    if not pairs and shape[:1] == (tokens,):
        return 0
    # Position ids of several axes, (3, 1, T).
    if len(shape) == 3 and shape[1:] == (1, tokens):
        return 2
    got = f"shape {shape}" if isinstance(part, Tensor) else type(part).__name__
    raise ValueError(
        f"{key}: expected a tensor of {tokens} tokens, (T, ...) or (1, T, ...), got {got}; let the "
        "encoder make masks of pairs from cu_seqlens, pass rows of other inputs beside this one, "
        "and Shared(x) for what every chunk needs whole"
    )


def _bounds(key: str, given: Any, tokens: int) -> list[int]:
    is_list = isinstance(given, Tensor) and given.ndim == 1 and not given.is_floating_point()
    bounds = given.tolist() if is_list else []
    grows = all(start <= stop for start, stop in itertools.pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or not grows:
        got = [*bounds[:3], "...", *bounds[-2:]] if len(bounds) > 6 else bounds
        raise ValueError(
            f"{key}: expected integers that grow from 0 to the {tokens} tokens, got "
            f"{got if is_list else type(given).__name__}; pass one bound more than there are "
            "sequences, and for offsets what include_last_offset says"
        )
    return bounds


def _restarts(given: Any) -> list[int]:
    """Find where position ids start again."""
    positions = given[0].flatten() if given.ndim == 3 else given.flatten()
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[1:] = positions[1:] != positions[:-1] + 1
    first = positions[starts]
    if bool((first != first[0]).any()):
        raise ValueError(
            f"position_ids: expected positions that start again at {int(first[0])} with each "
            f"sequence, got a step to {int(first[first != first[0]][0])}; pass cu_seqlens as well"
        )
    return [*starts.nonzero().flatten().tolist(), len(positions)]
