"""How rows and columns are cut: tiles of a launch, stripes of a forward, panels of a backward."""

from __future__ import annotations

from math import isqrt

import torch
import triton

from gradcache_clip.kernels.launch_config import LaunchConfig

# Rows and columns of the tiles of the vendor's large products.
_PRODUCT_TILE = 128, 256


def tile_grid(config: LaunchConfig, rows: int, columns: int) -> tuple[int]:
    """One program for each tile of rows x columns."""
    return (triton.cdiv(rows, config.BLOCK_M) * triton.cdiv(columns, config.BLOCK_N),)


def program_grid(config: LaunchConfig, rows: int, columns: int, device: torch.device) -> tuple[int]:
    """One program for each tile; with descriptors at most one for each multiprocessor."""
    (tiles,) = tile_grid(config, rows, columns)
    return (min(tiles, max(1, multiprocessors(device))) if config.descriptors else tiles,)


def stripe_rows(config: LaunchConfig, N: int, *, numbers: int = 2) -> int:
    """Rows of a forward stripe: as many whole tiles as the partial statistics may take.

    A tile leaves so many fp32 numbers of each of its rows and columns.
    """
    bytes_per_logit = 4 * numbers * (1 / config.BLOCK_M + 1 / config.BLOCK_N)
    return _whole_tiles(int(config.workspace_bytes / (N * bytes_per_logit)), config.BLOCK_M)


def panel_shape(
    config: LaunchConfig, N: int, itemsize: int, D: int = 1, multiprocessors: int = 0
) -> tuple[int, int]:
    """Rows and columns of G in the backward.

    Full rows while they are no longer than twice the side of the square that fits, else that
    square: it needs the fewest additions to the accumulators of both gradients. Its side is such
    that the vendor's products, which are as high as it, fill the multiprocessors in whole waves.
    """
    numbers = config.workspace_bytes // itemsize
    side = isqrt(numbers)
    columns = N
    if 2 * side < N:
        columns = _whole_tiles(_whole_waves(side, D, multiprocessors), config.BLOCK_N)
    rows = _whole_waves(numbers // up_to_whole(columns, config.BLOCK_N), D, multiprocessors)
    return _whole_tiles(rows, config.BLOCK_M), columns


def _whole_waves(rows: int, D: int, multiprocessors: int) -> int:
    """The most rows of a product of width D that end with a wave of tiles; all if less than one."""
    tiles = triton.cdiv(D, _PRODUCT_TILE[1])
    waves = rows // _PRODUCT_TILE[0] * tiles // multiprocessors if multiprocessors else 0
    return waves * multiprocessors // tiles * _PRODUCT_TILE[0] if waves else rows


def _whole_tiles(size: int, edge: int) -> int:
    return max(1, size // edge) * edge


def up_to_whole(size: int, edge: int) -> int:
    """The least multiple of `edge` that is not less than `size`."""
    return triton.cdiv(size, edge) * edge


def multiprocessors(device: torch.device) -> int:
    """How many the device has; 0 where it is no GPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count
