"""What a run learns from a batch: which inputs its encoder takes, and the loss over the features.

B rows of a batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradcache_clip.cache import ByLength
from gradcache_clip.cache.batch_tree import pick_rows
from gradcache_clip.cache.torch_state import has_batch_statistics
from gradcache_clip.distributed.collectives import world_size
from gradcache_clip.losses import (
    ClipLoss,
    FeatureQueue,
    InfoNCELoss,
    LateInteractionLoss,
    MatryoshkaLoss,
    MoCoLoss,
    NTXentLoss,
    SigLipLoss,
)
from gradcache_clip.train.config import Config, ConfigError
from gradcache_clip.train.momentum import MomentumEncoder
from gradcache_clip.train.token_towers import TokenEncoder, TokenLoss

# How the losses call the integers that say which pairs belong together.
_ARGUMENT = {"group": "labels", "ignore": "ids"}


class Objective:
    """Images and their captions against each other, under the CLIP loss.

    Others say what they do differently. An encoder is called as `encoder(tower, inputs)`, once for
    each entry of `inputs`, and the loss with the features of all.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def encoder(self, towers: Any) -> Any:
        """What is trained, made of an image and a text tower, or of one for two views."""
        return towers

    def loss(self) -> nn.Module:
        """Over the whole batch of all processes."""
        return ClipLoss(label_smoothing=self.config.loss.label_smoothing, **self.shared())

    def shared(self) -> dict[str, Any]:
        """What all losses take."""
        loss, train = self.config.loss, self.config.train
        return {
            "init_logit_scale": loss.init_logit_scale,
            "max_logit_scale": loss.max_logit_scale or math.inf,
            "impl": train.impl,
            "exchange": train.exchange,
        }

    def inputs(self, images: Any, texts: Sequence[Mapping[str, Tensor]]) -> tuple[Any, ...]:
        """One for each tower, out of what a batch has of images and of tokens."""
        return images, *texts

    @property
    def sort_by_length(self) -> list[ByLength | None] | None:
        """How chunks of each input are cut, as the configuration says."""
        train = self.config.train
        if not train.sort_by_length:
            return None
        by_length = ByLength(train.chunk_tokens or None)
        return [by_length if is_text else None for is_text in self._are_texts]

    @property
    def _are_texts(self) -> Sequence[bool]:
        return False, True

    def loss_kwargs(self, groups: Sequence[str], device: torch.device) -> dict[str, Any]:
        """What the loss is told beside the features: which pairs match each other, if anything."""
        name = _ARGUMENT.get(self.config.loss.positives)
        return {} if name is None else {name: numbers_of(groups).to(device, non_blocking=True)}

    def after_step(self, encoder: nn.Module, loss: nn.Module) -> None:
        """What follows an optimizer step."""

    @property
    def candidates(self) -> int:
        """Among how many an input looks for its partner."""
        train = self.config.train
        return train.batch_size if train.negatives == "batch" else train.chunk_size

    @property
    def guess(self) -> float | None:
        """Loss without any knowledge of the pairs; None for that of one softmax over all."""
        widths = len(self.config.loss.matryoshka)
        return widths * math.log(self.candidates) if widths else None


class SigLip(Objective):
    """Each pair a decision of its own."""

    def loss(self) -> nn.Module:
        return SigLipLoss(init_logit_bias=self.config.loss.init_logit_bias, **self.shared())

    @property
    def guess(self) -> float:
        """With the best logit that all pairs could share, whose sigmoid is 1 / candidates."""
        count = self.candidates
        alone = math.log(count) - (count - 1) * math.log1p(-1 / count)
        return max(1, len(self.config.loss.matryoshka)) * alone


class LateInteraction(Objective):
    """Patches of images and tokens of captions against each other."""

    def encoder(self, towers: Any) -> Any:
        return TokenEncoder(towers, self.config.data.context_length)

    def loss(self) -> nn.Module:
        return TokenLoss(LateInteractionLoss(**self.shared()))


class SimCLR(Objective):
    """Two views of each image against all other views of the batch."""

    def loss(self) -> nn.Module:
        return NTXentLoss(**self.shared())

    def inputs(self, images: Any, texts: Sequence[Mapping[str, Tensor]]) -> tuple[Any, ...]:
        return tuple(images.unbind(1))

    @property
    def candidates(self) -> int:
        return 2 * super().candidates - 1


class TextRetrieval(Objective):
    """Queries against the documents of the whole batch, and against hard negatives."""

    def loss(self) -> nn.Module:
        return InfoNCELoss(**self.shared())

    def inputs(self, images: Any, texts: Sequence[Mapping[str, Tensor]]) -> tuple[Any, ...]:
        return tuple(texts)

    @property
    def candidates(self) -> int:
        return super().candidates * (len(self.config.data.text_fields) - 1)

    @property
    def _are_texts(self) -> Sequence[bool]:
        return [True] * min(3, len(self.config.data.text_fields))


class MoCo(Objective):
    """Queries against keys of the towers' moving average, and a queue of earlier keys.

    Pairs: images against keys of captions, and captions against keys of images. Two views: the
    first against keys of the second.
    """

    _shuffles = False

    def encoder(self, towers: Any) -> Any:
        momentum = self.config.loss.momentum
        encoder = MomentumEncoder(towers, towers=self._towers, momentum=momentum)
        self._shuffles = has_batch_statistics(encoder)
        if self._shuffles:
            self._check_chunks()
        return encoder

    def loss(self) -> nn.Module:
        size, width = self.config.loss.queue_size, self.config.model.feature_dim
        ranks = world_size()
        if size % ranks:
            raise ConfigError(
                f"loss.queue_size: expected a multiple of the {ranks} processes, got {size}; use "
                f"loss.queue_size={size // ranks * ranks}"
            )
        queues = [FeatureQueue(size, width) for _ in range(self._towers)]
        return MoCoLoss(InfoNCELoss(**self.shared()), queues)

    def inputs(self, images: Any, texts: Sequence[Mapping[str, Tensor]]) -> tuple[Any, ...]:
        queries: tuple[Any, ...] = (images, *texts)
        keys = queries
        if self._towers == 1:
            queries, keys = ((view,) for view in images.unbind(1))
        if self._shuffles:
            order = self._order(len(images)).to(images.device)
            keys = pick_rows(keys, order)
        return *queries, *keys

    def loss_kwargs(self, groups: Sequence[str], device: torch.device) -> dict[str, Any]:
        if not self._shuffles:
            return {}
        order = self._order(len(groups)).argsort()
        return {"order": order.to(device, non_blocking=True)}

    def after_step(self, encoder: nn.Module, loss: nn.Module) -> None:
        assert isinstance(encoder, MomentumEncoder) and isinstance(loss, MoCoLoss)
        encoder.update()
        loss.push()

    @property
    def candidates(self) -> int:
        return self.config.loss.queue_size + 1

    @property
    def _towers(self) -> int:
        return 2 if self.config.data.views == 1 else 1

    def _order(self, rows: int) -> Tensor:
        """Of keys: those of one chunk of queries go into as many chunks as there are.

        Else a query could tell its own key by the batch norm of their chunk (section 3.3).
        """
        chunks = -(-rows // self.config.train.chunk_size)
        return torch.cat([torch.arange(first, rows, chunks) for first in range(chunks)])

    def _check_chunks(self) -> None:
        train = self.config.train
        if train.chunk_size >= train.batch_size:
            raise ConfigError(
                f"train.chunk_size: expected less than train.batch_size, which is "
                f"{train.batch_size}, for towers with batch norm under loss.name=moco, got "
                f"{train.chunk_size}; keys of other chunks cannot be told by their statistics"
            )


_OBJECTIVES: dict[str, type[Objective]] = {
    "clip": Objective,
    "siglip": SigLip,
    "late_interaction": LateInteraction,
    "nt_xent": SimCLR,
    "moco": MoCo,
    "info_nce": TextRetrieval,
}


def build_objective(config: Config) -> Objective:
    """The objective that `loss.name` names."""
    return _OBJECTIVES[config.loss.name](config)


def build_loss(objective: Objective) -> nn.Module:
    """The loss of an objective, over prefixes of the features too where the configuration says."""
    loss, config = objective.loss(), objective.config.loss
    if not config.learn_logit_scale:
        for name, parameter in loss.named_parameters():
            if name.endswith("log_logit_scale"):
                parameter.requires_grad_(False)
    return MatryoshkaLoss(loss, config.matryoshka) if config.matryoshka else loss


def numbers_of(groups: Sequence[str]) -> Tensor:
    """int64 (B,), equal for equal names on every process.

    Two different names share a number once in 2^64 pairs of names.

    Example:
        >>> numbers = numbers_of(["cat", "dog", "cat"])
        >>> bool(numbers[0] == numbers[2]), bool(numbers[0] == numbers[1])
        (True, False)
    """
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in groups)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
