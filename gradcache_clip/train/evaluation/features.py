"""Features with one vector per sample, or one per token.

N samples, L tokens, D feature width; Q queries of A tokens, C candidates of B tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# Most token similarities in memory at once: 64 MiB in fp32.
_MOST_SIMILARITIES = 2**24


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """Token vectors of N samples, indexable by sample like a tensor.

    A score is the mean over the query's tokens of each one's best match among the candidate's, so
    image-to-text and text-to-image scores differ:

        score_qc = mean over tokens a of q of (max over tokens b of c of <x_qa, y_cb>)

    Source: Yao et al. 2021 (FILIP), equations 3 to 6.

    Args:
        vectors: (N, L, D), floating.
        mask: (N, L) bool, False for padding.

    Raises:
        ValueError: shapes that do not match, or a sample of padding only.

    Example:
        >>> image = TokenFeatures(torch.eye(2)[None], torch.ones(1, 2, dtype=torch.bool))
        >>> text = TokenFeatures(torch.eye(2)[None], torch.tensor([[True, False]]))
        >>> float(scores_of(image, text)), float(scores_of(text, image))
        (0.5, 1.0)
    """

    vectors: Float[Tensor, "n l d"]
    mask: Bool[Tensor, "n l"]

    def __post_init__(self) -> None:
        shape = tuple(self.vectors.shape)
        if len(shape) != 3 or self.mask.shape != shape[:2] or self.mask.dtype != torch.bool:
            raise ValueError(
                f"mask: expected bool of shape {shape[:2]}, one per token of vectors (N, L, D), "
                f"got {self.mask.dtype} of {tuple(self.mask.shape)} for vectors {shape}"
            )
        empty = (~self.mask.any(1)).nonzero().flatten()
        if len(empty):
            raise ValueError(
                f"mask: expected an unmasked token in each sample, got none in {len(empty)} "
                f"(first: row {int(empty[0])}); leave those samples out"
            )

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: Any) -> TokenFeatures:
        """Select samples by a slice, a list or a tensor of indices."""
        return TokenFeatures(self.vectors[rows], self.mask[rows])

    def split(self, size: int) -> list[TokenFeatures]:
        """Split into parts of `size` samples; the last may have fewer."""
        pairs = zip(self.vectors.split(size), self.mask.split(size), strict=True)
        return [TokenFeatures(*pair) for pair in pairs]

    def float(self) -> TokenFeatures:
        """Convert the vectors to fp32."""
        return TokenFeatures(self.vectors.float(), self.mask)

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self.vectors.device


Features = Tensor | TokenFeatures
"""Features of N samples: a (N, D) tensor, or `TokenFeatures`."""


def features_of(output: Tensor | tuple[Tensor, ...]) -> Features:
    """Normalise the output of an encoder for N samples, in fp32 on the CPU.

    Args:
        output: (N, D); or (N, L, D), with a mask if there is padding.
    """
    parts = (output,) if isinstance(output, Tensor) else output
    vectors, *masks = (part.detach().cpu() for part in parts)
    if vectors.ndim == 2:
        return unit(vectors)
    whole = torch.ones(vectors.shape[:2], dtype=torch.bool)
    return unit(TokenFeatures(vectors, *(masks or [whole])))


def unit(features: Features) -> Features:
    """Scale every vector to length 1, in fp32 on the CPU."""
    if isinstance(features, TokenFeatures):
        return TokenFeatures(_unit(features.vectors), features.mask.cpu())
    return _unit(features)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.detach().float().cpu(), dim=-1)


def width_of(features: Features) -> int:
    """Return the feature width D."""
    vectors = features.vectors if isinstance(features, TokenFeatures) else features
    return vectors.shape[-1]


def longest_of(features: Features) -> Float[Tensor, " n"]:
    """Return the largest norm among the vectors of each sample."""
    if isinstance(features, TokenFeatures):
        return features.vectors.norm(dim=2).amax(1)
    return features.norm(dim=1)


def one_vector_each(features: Features) -> Float[Tensor, "n d"]:
    """Return one vector per sample: for tokens, their mean."""
    if isinstance(features, Tensor):
        return features
    weight = _weights(features.mask)
    return torch.einsum("nl,nld->nd", weight, features.vectors.float())


def scores_of(queries: Features, candidates: Features) -> Float[Tensor, "q c"]:
    """Return the score of each query with each candidate, in fp32; both must be of one kind."""
    if isinstance(queries, Tensor) and isinstance(candidates, Tensor):
        return queries.float() @ candidates.float().T
    assert isinstance(queries, TokenFeatures) and isinstance(candidates, TokenFeatures)
    pair = queries.mask.shape[1] * candidates.mask.shape[1]
    columns = candidates.split(max(1, _MOST_SIMILARITIES // pair))
    rows = queries.split(max(1, _MOST_SIMILARITIES // (pair * len(columns[0]))))
    return torch.cat([torch.cat([_token_scores(row, each) for each in columns], 1) for row in rows])


def _token_scores(queries: TokenFeatures, candidates: TokenFeatures) -> Tensor:
    looking, found = (side.vectors.float().flatten(0, 1) for side in (queries, candidates))
    shape = *queries.mask.shape, *candidates.mask.shape  # (Q, A, C, B)
    similarity = (looking @ found.T).view(shape)
    best = similarity.masked_fill_(~candidates.mask, -torch.inf).amax(3)
    return torch.einsum("qa,qac->qc", _weights(queries.mask), best)


def _weights(mask: Tensor) -> Tensor:
    """Return the weight of each token in the mean over its sample's unmasked tokens."""
    return mask / mask.sum(1, keepdim=True)
