"""Results of losses: 0-dim tensors, of which the loss alone carries a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


class ContrastiveOutput(NamedTuple):
    """The loss of image-text pairs, and how often the right partner ranks first in the batch."""

    loss: Float[Tensor, ""]
    image_to_text_accuracy: Float[Tensor, ""]
    text_to_image_accuracy: Float[Tensor, ""]

    @property
    def accuracy(self) -> Tensor:
        """Mean of both directions, from 0 to 1; chance is 1/B."""
        return (self.image_to_text_accuracy + self.text_to_image_accuracy) / 2


class RetrievalOutput(NamedTuple):
    """The loss of queries over documents, and how often the right one ranks first."""

    loss: Float[Tensor, ""]
    query_to_document_accuracy: Float[Tensor, ""]
    document_to_query_accuracy: Float[Tensor, ""] | None
    """None unless the loss is symmetric."""

    @property
    def accuracy(self) -> Tensor:
        """Mean of the directions that the loss has, from 0 to 1."""
        if self.document_to_query_accuracy is None:
            return self.query_to_document_accuracy
        return (self.query_to_document_accuracy + self.document_to_query_accuracy) / 2


class SelfContrastOutput(NamedTuple):
    """The loss of rows among each other or a queue, and how often a positive ranks first."""

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
