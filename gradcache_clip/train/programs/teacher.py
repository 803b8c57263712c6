"""Distillation from a frozen teacher, whose features are computed before training.

B rows of a batch, N texts of a side, G width of the teacher.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from gradcache_clip.losses import InBatchDistillationLoss, MatryoshkaLoss
from gradcache_clip.train.atomic_file import replacing
from gradcache_clip.train.config import Config
from gradcache_clip.train.config_errors import ConfigError
from gradcache_clip.train.config_loss import TextLossConfig, build_loss
from gradcache_clip.train.data import TextBatch
from gradcache_clip.train.programs.program import group_ids

Side = tuple[Sequence[str], Tensor]
"""N texts, without prompts, and their features (N, G)."""

_SIDES = "queries", "documents"
# Rows of a file that tell it from another.
_PROBED = 1024


def save_teacher_features(path: str | Path, queries: Side, documents: Side) -> None:
    """Write a teacher's features of texts, for `loss.teacher`.

    Args:
        path: of a safetensors file.
        queries, documents: texts, and features of any length; of a text that occurs twice
            the first feature counts.

    Raises:
        ValueError: not one feature for each text, or features of two widths.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "teacher.safetensors"
        >>> queries, documents = (["a", "b"], torch.eye(2)), (["c"], torch.eye(2)[:1])
        >>> save_teacher_features(path, queries, documents)
        >>> TeacherFeatures(path).of("queries", ["b", "a", "b"])
        tensor([[0., 1.],
                [1., 0.],
                [0., 1.]])
    """
    tensors: dict[str, Tensor] = {}
    width = queries[1].shape[-1]
    for side, (texts, features) in zip(_SIDES, (queries, documents), strict=True):
        if features.shape != (len(texts), width):
            raise ValueError(
                f"{side}: expected features of shape {(len(texts), width)}, one for each text and "
                f"all of one width, got {tuple(features.shape)}; embed every text with one model"
            )
        ids, order = group_ids(texts).sort(stable=True)
        tensors |= {f"{side}_ids": ids, f"{side}_features": features.detach().cpu()[order]}
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary)


class TeacherFeatures:
    """A teacher's features by text, out of a file of `save_teacher_features`.

    The file is mapped into memory: the system reads the parts that batches need.

    Raises:
        ConfigError: no such file, or another kind of file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._tensors = path, _tensors_of(path)

    @property
    def digest(self) -> Tensor:
        """Digest (16,) of the file's size and of some of its rows."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self._tensors.items()):
            probed = tensor[:: max(1, len(tensor) // _PROBED)].contiguous()
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(probed.view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

    def of(self, side: str, texts: Sequence[str]) -> Tensor:
        """Return unit features (B, G) in fp32 of texts without prompts.

        Args:
            side: "queries" or "documents".

        Raises:
            ValueError: a text that the file does not have.
        """
        ids, features = self._tensors[f"{side}_ids"], self._tensors[f"{side}_features"]
        wanted = group_ids(texts)
        rows = torch.searchsorted(ids, wanted).clamp_(max=len(ids) - 1)
        missing = (ids[rows] != wanted).nonzero()
        if len(missing):
            raise ValueError(
                f"loss.teacher: expected features of all {side} of data.train in {self.path}, got "
                f"none of {texts[int(missing[0])]!r}; make the file anew from this data"
            )
        return normalize(features[rows].float(), dim=1)

    def of_batch(
        self, batch: TextBatch, prompts: Sequence[str], device: torch.device
    ) -> dict[str, Tensor]:
        """Return arguments of `DistilledLoss`: features of queries and documents."""
        given = {}
        for side, texts, prompt in zip(_SIDES, batch.texts[:2], prompts or ("", ""), strict=True):
            features = self.of(side, [text.removeprefix(prompt) for text in texts])
            given[f"teacher_{side}"] = features.to(device, non_blocking=True)
        return given


class DistilledLoss(nn.Module):
    """A loss of queries and documents, plus its weighted cross-entropy with a teacher's softmax.

    Args:
        plain: the loss without a teacher; its scale is that of both.
        distillation: an `InBatchDistillationLoss`, or `MatryoshkaLoss` around one.
        weight: of the distillation.
        teacher: see `TeacherFeatures.digest`; saved with the loss, which loads beside the same
            teacher alone.
    """

    def __init__(
        self, plain: nn.Module, distillation: nn.Module, *, weight: float, teacher: Tensor
    ) -> None:
        super().__init__()
        # The scale of `plain` takes the place of its own.
        self.plain, self.distillation = plain, distillation.requires_grad_(False)
        self.weight, self.teacher = weight, teacher

    @property
    def logit_scale(self) -> Any:
        """The scale of both losses."""
        return self.plain.logit_scale

    def forward(
        self, *features: Tensor, teacher_queries: Tensor, teacher_documents: Tensor, **options: Any
    ) -> Any:
        """Compute both losses.

        Args:
            features: of queries, documents and, in some batches, hard negatives.
            teacher_queries, teacher_documents: (B, G).
            options: keyword arguments of the plain loss.

        Returns:
            The output of the plain loss, with the sum as `loss`.
        """
        output = self.plain(*features, **options)
        distilled = self.distillation(
            *features[:2],
            teacher_queries=teacher_queries,
            teacher_documents=teacher_documents,
            logit_scale=self.logit_scale,
        )
        return output._replace(loss=output.loss + self.weight * distilled.loss)

    def get_extra_state(self) -> Tensor:
        """Return what tells the teacher from another."""
        # Checkpoints look at the state of a run as a whole, on its device.
        return self.teacher.to(self.logit_scale.device)

    def set_extra_state(self, state: Tensor) -> None:
        """Raise ValueError unless the teacher is the one that the loss was saved with."""
        if not torch.equal(state.cpu(), self.teacher):
            raise ValueError(
                "loss.teacher: expected the teacher's features that the run began with, got "
                "others; pass the same file"
            )


def distilled_loss(config: Config, teacher: TeacherFeatures) -> DistilledLoss:
    """Build the loss of a configuration together with that of its teacher, for each width."""
    section, train = config.loss, config.train
    assert isinstance(section, TextLossConfig)
    # A cross-entropy, which unlike the divergence is log(documents) by chance.
    distillation: nn.Module = InBatchDistillationLoss(
        teacher_scale=section.teacher_scale,
        cross_entropy=True,
        **section.options(train.impl, train.exchange),
    )
    if section.matryoshka:
        distillation = MatryoshkaLoss(distillation, section.matryoshka)
    return DistilledLoss(
        build_loss(config), distillation, weight=section.teacher_weight, teacher=teacher.digest
    )


def _tensors_of(path: str | Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _not_features(path, str(error)) from error
    names = {f"{side}_{kind}" for side in _SIDES for kind in ("ids", "features")}
    if tensors.keys() != names:
        raise _not_features(path, f"it has {sorted(tensors)}")
    sides = [(tensors[f"{side}_ids"], tensors[f"{side}_features"]) for side in _SIDES]
    width = sides[0][1].shape[-1:]
    if not all(_are_features(*side, width) for side in sides):
        got = [f"{str(each.dtype)[6:]} {tuple(each.shape)}" for each in tensors.values()]
        raise _not_features(path, f"it has {', '.join(got)}")
    return tensors


def _are_features(ids: Tensor, features: Tensor, width: Sequence[int]) -> bool:
    if ids.dtype != torch.int64 or ids.dim() != 1 or not features.is_floating_point():
        return False
    return len(ids) > 0 and features.shape == (len(ids), *width)


def _not_features(path: str | Path, reason: str) -> ConfigError:
    return ConfigError(
        f"loss.teacher: expected a file of a teacher's features, got {path} ({reason}); write one "
        "with gradcache_clip.train.programs.teacher.save_teacher_features"
    )
