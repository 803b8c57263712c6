"""The base of the losses for sentence-transformers' trainer.

C columns (anchors, positives, negatives), b rows of this rank, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradcache_clip.cache.graph_budget import MemoryBudget
from gradcache_clip.distributed import DDPStrategy, LocalStrategy
from gradcache_clip.integrations import sentence_transformers_checks as checks
from gradcache_clip.integrations import sentence_transformers_inputs as inputs
from gradcache_clip.integrations.sentence_transformers_steps import Chunking, ColumnSteps, Compare
from gradcache_clip.losses import MatryoshkaLoss
from gradcache_clip.losses.options import check_flags


class CacheOptions(TypedDict, total=False):
    """Keywords of these losses that the library's own do not have; see `CachedLoss`."""

    matryoshka_dims: Sequence[int] | None
    matryoshka_weights: Sequence[float] | None
    pad_to_multiple_of: int
    memory_budget: MemoryBudget
    check_replay: Literal["error", "warn", "off"]


class CachedLoss(nn.Module):
    """The base of the losses: checks a batch, embeds it in chunks, compares the columns.

    Args:
        model: the `SentenceTransformer` to train.
        contrasts: losses over the embeddings, by the names of their attributes.
        mini_batch_size: rows that go through the model at once.
        mini_batch_num_tokens: bound chunks by tokens instead.
        gather_across_devices: whether candidates of all processes are asked for.
        show_progress_bar: count the rows that go through the model.
        options: `matryoshka_dims` and `matryoshka_weights`, widths of embedding prefixes to train
            and their weights, as in sentence-transformers' `MatryoshkaLoss`;
            `pad_to_multiple_of=1`, a multiple of tokens that chunks of padded inputs keep;
            `memory_budget`, for graphs that need no replay; `check_replay="error"`, "warn" or
            "off", what to do if a replay differs from its embed.
    """

    # Losses that wrap another one read this: the backward repeats the forward.
    uses_gradient_cache = True
    least_columns = 2
    kind_of_steps: type[ColumnSteps] = ColumnSteps
    fixed_options: tuple[str, ...] = ()
    """Attributes that show an option, and would have no effect if they were replaced."""

    def __init__(
        self,
        model: nn.Module,
        contrasts: Mapping[str, nn.Module],
        mini_batch_size: int,
        mini_batch_num_tokens: int | None,
        *,
        gather_across_devices: bool,
        show_progress_bar: bool,
        options: CacheOptions,
    ) -> None:
        super().__init__()
        checks.check_model(model)
        checks.check_chunking(mini_batch_size, mini_batch_num_tokens, options)
        check_flags(
            gather_across_devices=gather_across_devices, show_progress_bar=show_progress_bar
        )
        self.model = model
        self.mini_batch_size, self.mini_batch_num_tokens = mini_batch_size, mini_batch_num_tokens
        self.gather_across_devices, self.show_progress_bar = (
            gather_across_devices,
            show_progress_bar,
        )
        self.pad_to_multiple_of = options.get("pad_to_multiple_of", 1)
        self.memory_budget = options.get("memory_budget")
        self.check_replay = options.get("check_replay", "error")
        self._contrasts = tuple(contrasts)
        for name, contrast in contrasts.items():
            setattr(self, name, contrast)
        self._take_widths(options.get("matryoshka_dims"), options.get("matryoshka_weights"))
        self._steps = self.kind_of_steps(type(self).__name__, self.compute_loss_from_embeddings)

    def __setattr__(self, name: str, value: Any) -> None:
        fixed = *self.fixed_options, "matryoshka_dims", "matryoshka_weights"
        if name in fixed and name in vars(self):
            raise AttributeError(
                f"{name}: expected that of the constructor, got {value!r} afterwards; build a new "
                "loss"
            )
        super().__setattr__(name, value)

    def forward(
        self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of a batch; its backward replays the chunks.

        Args:
            sentence_features: C columns of b rows each: anchors, positives, and any number of
                columns of negatives.
            labels: scores of a teacher for the losses that distil, ignored by others.

        Raises:
            ValueError: too few columns, several processes without `gather_across_devices`,
                scores that do not fit, or `mini_batch_num_tokens` for a column without tokens.
            TypeError: a model without pooling, or another loss around this one.
        """
        columns = [dict(features) for features in sentence_features]
        checks.check_columns(columns, self.least_columns)
        checks.check_not_wrapped_in_a_loss(self.model, type(self).__name__)
        strategy = self._strategy()
        given = {"beside": self.beside(columns, labels)}
        return self._steps(self.model, columns, strategy, self.chunking, given)

    def beside(self, columns: list[inputs.Features], labels: Tensor | None) -> Any:
        """Return what `compute_loss_from_embeddings` takes beside the embeddings."""
        return None

    def compute_loss_from_embeddings(self, columns: Sequence[Tensor], beside: Any) -> Tensor:
        """Compute the loss of C (b, D) embeddings."""
        raise NotImplementedError

    @property
    def chunking(self) -> Chunking:
        """How this step is cut."""
        return Chunking(
            self.mini_batch_size,
            self.mini_batch_num_tokens,
            self.pad_to_multiple_of,
            self.memory_budget,
            self.check_replay,
            self.show_progress_bar,
        )

    def _strategy(self) -> LocalStrategy:
        checks.check_place(self.model, gathers=self.gather_across_devices)
        wrapped = isinstance(self.model, DistributedDataParallel)
        # On several processes without a wrapper this is an evaluation, with nothing to reduce.
        return DDPStrategy() if wrapped else LocalStrategy(reduce_myself=True)

    @property
    def calculate_loss(self) -> Compare:
        """What sentence-transformers' `MatryoshkaLoss` replaces by a function of its own.

        The widths and weights of that one are taken, as from `matryoshka_dims`.
        """
        return self.compute_loss_from_embeddings

    @calculate_loss.setter
    def calculate_loss(self, replaced: Any) -> None:
        checks.check_matryoshka_loss(replaced, self.matryoshka_dims, type(self).__name__)
        self._take_widths(replaced.matryoshka_dims, replaced.matryoshka_weights)

    def _take_widths(self, dims: Sequence[int] | None, weights: Sequence[float] | None) -> None:
        checks.check_widths(dims, weights, self.model)
        # Not by name, for those of a MatryoshkaLoss around this one replace them.
        vars(self).update(matryoshka_dims=dims, matryoshka_weights=weights)
        for name in self._contrasts if dims is not None else ():
            contrast = getattr(self, name)
            # As the library does, whatever the similarity of the whole width is.
            contrast.normalize = True
            setattr(self, name, MatryoshkaLoss(contrast, dims or (), weights))

    def _shared_config(self) -> dict[str, Any]:
        """Return the options of every loss, for the model card."""
        return {
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
            "matryoshka_dims": self.matryoshka_dims,
            "matryoshka_weights": self.matryoshka_weights,
            "pad_to_multiple_of": self.pad_to_multiple_of,
        }


def stacked(columns: Sequence[Tensor]) -> Tensor | None:
    """Return K columns of negatives as (b, K, D); None if there are none."""
    return torch.stack([*columns], 1) if columns else None


def fixed_scale(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=like.device)
