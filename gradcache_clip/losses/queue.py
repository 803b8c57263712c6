"""A queue of features from earlier steps: negatives without an encoder pass. D: width."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradcache_clip.distributed.collectives import gather_rows
from gradcache_clip.distributed.exchange import Ranks
from gradcache_clip.losses.options import check_flags, check_positive_int
from gradcache_clip.ops.arguments import check_features, check_integers
from gradcache_clip.ops.unit import unit


class FeatureQueue(nn.Module):
    """The last `size` features that were pushed, as a ring buffer.

    They carry no gradient: pass `queue.features` as the hard negatives of `InfoNCELoss`, and push
    the keys after the step. The queue starts empty and travels with the module: `.to(device)`,
    checkpoints. Where torch.distributed is initialised a push takes the rows of all ranks, so that
    every rank holds the same queue: pass `queue.local_features` there, or each of its rows would
    be a negative once per rank. Source: He et al. 2019 (MoCo), section 3.2.

    Args:
        size: rows that the full queue holds, of all ranks together.
        width: D.
        normalize: store unit rows.
        group: process group whose ranks push together; the default group when None.

    Example:
        >>> import torch
        >>> from gradcache_clip import FeatureQueue
        >>> queue = FeatureQueue(size=3, width=2, normalize=False)
        >>> queue.push(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), ids=torch.tensor([5, 6]))
        >>> queue.push(torch.tensor([[3.0, 0.0], [4.0, 0.0]]), ids=torch.tensor([7, 8]))
        >>> queue.features[:, 0].tolist(), queue.ids.tolist()
        ([4.0, 2.0, 3.0], [8, 6, 7])
    """

    features_of_all: Tensor
    ids_of_all: Tensor

    def __init__(
        self,
        size: int,
        width: int,
        *,
        normalize: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("size", size, "MoCo keeps 65,536 rows")
        check_positive_int("width", width, "take that of the projection")
        check_flags(normalize=normalize)
        self.size, self.normalize, self.group = size, normalize, group
        self.register_buffer("features_of_all", torch.zeros(size, width))
        self.register_buffer("ids_of_all", torch.full((size,), -1))
        # On the host, so that asking how full the queue is never waits for a device.
        self._count = 0

    @property
    def features(self) -> Tensor:
        """The rows so far, at most `size`, (rows, D), without a gradient."""
        return self.features_of_all[: min(self._count, self.size)]

    @property
    def ids(self) -> Tensor:
        """Ids of `features`; -1 where none was pushed."""
        return self.ids_of_all[: min(self._count, self.size)]

    @property
    def local_features(self) -> Tensor:
        """This rank's share of `features`; the shares of all ranks hold each row once.

        Raises:
            ValueError: the number of rows so far is not divisible by the number of ranks.
        """
        return self.features[self._local_rows()]

    @property
    def local_ids(self) -> Tensor:
        """Ids of `local_features`."""
        return self.ids[self._local_rows()]

    def _local_rows(self) -> slice:
        ranks, rows = Ranks(self.group), len(self.features)
        if rows % ranks.size:
            raise ValueError(
                f"size: expected rows that divide by {ranks.size} ranks, got {rows}; build the "
                f"queue with a size of {self.size // ranks.size * ranks.size}"
            )
        return ranks.own(rows // ranks.size)

    @torch.no_grad()
    def fill_at_random(self) -> None:
        """Fill the queue with random unit rows, as MoCo's own code does.

        Every rank draws them from torch's CPU generator: seed all ranks alike.
        """
        rows = torch.randn(self.features_of_all.shape)
        self.features_of_all.copy_(unit(rows))
        self.ids_of_all.fill_(-1)
        self._count = self.size

    @torch.no_grad()
    def reset(self) -> None:
        """Empty the queue; call it on every rank."""
        self.features_of_all.zero_()
        self.ids_of_all.fill_(-1)
        self._count = 0

    @torch.no_grad()
    def push(self, features: Tensor, ids: Tensor | None = None) -> None:
        """Append the rows of all ranks, overwriting the oldest.

        Args:
            features: (b, D) floating tensor, as many rows on every rank.
            ids: (b,) integers, later passed on as `ids=` of `InfoNCELoss`.

        Raises:
            ValueError: another width, or more rows than the queue holds.
        """
        check_features("features", features)
        if features.shape[1] != self.features_of_all.shape[1]:
            raise ValueError(
                f"features: expected width {self.features_of_all.shape[1]}, got "
                f"{features.shape[1]}; build the queue with the width of the projection"
            )
        if ids is None:
            ids = torch.full((len(features),), -1, device=features.device)
        check_integers("ids", ids, (len(features),), features.device)
        rows = gather_rows(unit(features) if self.normalize else features, self.group)
        self._write(rows.to(self.features_of_all), gather_rows(ids, self.group))

    def _write(self, rows: Tensor, ids: Tensor) -> None:
        if len(rows) > self.size:
            raise ValueError(
                f"features: expected at most {self.size} rows of all ranks together, the size of "
                f"the queue, got {len(rows)}; build a larger queue"
            )
        start = self._count % self.size
        tail = min(self.size - start, len(rows))
        for kept, new in ((self.features_of_all, rows), (self.ids_of_all, ids)):
            kept[start : start + tail] = new[:tail]
            kept[: len(rows) - tail] = new[tail:]
        self._count += len(rows)

    def get_extra_state(self) -> Tensor:
        # On the device of the rest of the state, so that a checkpoint reads all of it at once.
        return torch.tensor(self._count, device=self.features_of_all.device)

    def set_extra_state(self, state: Tensor) -> None:
        self._count = int(state)

    def extra_repr(self) -> str:
        return f"size={self.size}, width={self.features_of_all.shape[1]}"
