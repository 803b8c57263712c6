"""Features of a locked image tower, computed once per image and cached in files.

B images of a batch, N images seen so far, C width of the tower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gradcache_clip.train.config_errors import ConfigError

_DIGEST_BYTES = 16


class FrozenFeatures:
    """Cache of pooled features, keyed by a digest of the pixels, so images cannot be mixed up.

    Each process writes its own file in the folder and reads the files of all.

    Args:
        tower: frozen, in evaluation mode; images (B, 3, H, W) to features (B, C).
        folder: of the files; created with the first one.
        rank: of this process.
        chunk_size: images that go through the tower at once.
        context: around the tower, such as autocast.
        setting: anything else that the features depend on, such as the precision.

    Raises:
        ConfigError: the folder holds features of another tower or setting.

    Source: Zhai et al. 2022 (LiT), section 3: features of a locked tower can be precomputed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> tower = nn.Flatten().requires_grad_(False)
        >>> features = FrozenFeatures(tower, folder, chunk_size=2)
        >>> images = torch.arange(24.0).view(2, 3, 2, 2)
        >>> features.of(images).shape, len(features)
        (torch.Size([2, 12]), 2)
        >>> features.save()
        >>> len(FrozenFeatures(tower, folder, chunk_size=2))
        2
    """

    def __init__(
        self,
        tower: nn.Module,
        folder: Path,
        *,
        rank: int = 0,
        chunk_size: int,
        context: Callable[[], AbstractContextManager[Any]] = torch.no_grad,
        setting: str = "",
    ) -> None:
        self.tower, self.folder, self.rank = tower, folder, rank
        self.chunk_size, self.context = chunk_size, context
        self._origin = _digest_of(tower, setting)
        self._rows: dict[bytes, int] = {}
        self._table: Tensor | None = None
        for file in sorted(folder.glob("*.safetensors")):
            self._read(file)
        self._saved = len(self)

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, images: Tensor) -> Tensor:
        """Return features (B, C) of images (B, 3, H, W), both on the host, in the tower's dtype."""
        digests = [
            hashlib.blake2b(image.numpy().tobytes(), digest_size=_DIGEST_BYTES).digest()
            for image in images
        ]
        missing = {digest: row for row, digest in enumerate(digests) if digest not in self._rows}
        if missing:
            self._add(list(missing), self._computed(images[list(missing.values())]))
        assert self._table is not None
        return self._table[[self._rows[digest] for digest in digests]]

    def save(self) -> None:
        """Write all features if there are new ones, under a temporary name first."""
        if len(self) == self._saved or self._table is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        digests = torch.frombuffer(bytearray(b"".join(self._rows)), dtype=torch.uint8)
        tensors = {
            "digests": digests.view(len(self), _DIGEST_BYTES),
            "features": self._table[: len(self)].contiguous(),
        }
        path = self.folder / f"rank-{self.rank}.safetensors"
        temporary = path.with_suffix(".partial")
        save_file(tensors, temporary, metadata={"origin": self._origin})
        temporary.replace(path)
        self._saved = len(self)

    def _computed(self, images: Tensor) -> Tensor:
        device = next((p.device for p in self.tower.parameters()), torch.device("cpu"))
        with torch.no_grad(), self.context():
            found = [self.tower(part.to(device)) for part in images.split(self.chunk_size)]
        return torch.cat(found).cpu()

    def _add(self, digests: Sequence[bytes], features: Tensor) -> None:
        start, stop = len(self), len(self) + len(digests)
        if self._table is None or stop > len(self._table):
            # Doubling keeps the cost of growing linear in the number of images.
            larger = features.new_empty(2 * stop, *features.shape[1:])
            if self._table is not None:
                larger[:start] = self._table[:start]
            self._table = larger
        self._table[start:stop] = features
        self._rows.update(zip(digests, range(start, stop), strict=True))

    def _read(self, file: Path) -> None:
        with safe_open(file, "pt") as stored:
            if (stored.metadata() or {}).get("origin") != self._origin:
                raise ConfigError(
                    f"model.frozen_features: expected features of this tower, image size and "
                    f"precision in {file}, got others; use another folder, or delete the file"
                )
            digests, features = stored.get_tensor("digests"), stored.get_tensor("features")
        rows = {digest.numpy().tobytes(): row for row, digest in enumerate(digests)}
        new = {digest: row for digest, row in rows.items() if digest not in self._rows}
        if new:
            self._add(list(new), features[list(new.values())])


def _digest_of(tower: nn.Module, setting: str) -> str:
    """Return a digest of everything that the features depend on, except the pixels."""
    # The tower's repr covers its architecture.
    digest = hashlib.blake2b(f"{setting} {tower}".encode(), digest_size=_DIGEST_BYTES)
    for name, tensor in [*tower.named_parameters(), *tower.named_buffers()]:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
