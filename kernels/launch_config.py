"""How the kernels are launched: one table from architecture and dtype to tiles and workspace.

D is an argument of the kernels at run time, so one entry serves every width. The entries were
chosen from compiled machine code (benchmarks/kernel_resources.py prints registers, spills, shared
memory and blocks a multiprocessor; kernels/README.md gives the reasons).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

_TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])

# Triton decides when a kernel is decorated, so the variable counts from the first import on.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")

# G in fp16 is multiplied by this power of two: |G| <= 2 stays below 65504 and 1/B a normal number.
FLOAT16_GRADIENT_SCALE = 2.0**14

# Numbers of a tile of S beside which one of the guide's products fits, and the registers of both.
_MOST_BESIDE_A_GUIDE, _REGISTERS_BESIDE_A_GUIDE = 128 * 64, 240

# How fp32 operands meet the matrix units: "ieee" is exact fp32 on the ordinary cores; "tf32x3"
# splits each operand in two and runs three tf32 passes, which keeps fp32 accuracy. The second wins
# where tf32 is more than three times as fast as fp32, which no consumer card offers. Plain "tf32"
# would drop 13 bits of every operand: it is not on offer.
Float32Precision = Literal["ieee", "tf32x3"]


@dataclass(frozen=True)
class LaunchConfig:
    """Launch parameters of the two tile kernels."""

    BLOCK_M: int
    """Rows of a tile of S."""
    BLOCK_N: int
    """Columns of a tile of S."""
    BLOCK_D: int
    """Step of the main loop along D."""
    num_warps: int
    """Warps of 32 threads that share a tile."""
    num_stages: int
    """Steps of the main loop whose loads are in flight."""
    precision: Float32Precision = "ieee"
    """How fp32 operands are multiplied; without effect on 16-bit operands."""
    max_registers: int | None = None
    """Bound of registers a thread, for a second block on the multiprocessor."""
    GROUP_M: int = 8
    """Tile rows that walk over the columns together, so that these stay in the L2 cache."""
    workspace_bytes: int = 128 * 2**20
    """Upper bound for partial statistics in the forward, and for G in the backward."""
    parts: int = 1
    """More than one (2, 4 or 8): TMA descriptors load the features, a program takes tile after
    tile, and each is reduced, or stored, in so many parts of its columns, which take turns in the
    registers that the tile leaves free."""
    stacked: bool = False
    """Whether the warps that share a tile have its rows one below the other, 16 each, so that
    nearly all of a sum over rows is a sum over warps."""

    @property
    def descriptors(self) -> bool:
        return self.parts > 1


_CONSUMER_16 = LaunchConfig(128, 128, 32, num_warps=8, num_stages=3)
_CONSUMER_32 = LaunchConfig(64, 128, 32, num_warps=8, num_stages=3)
_LARGE = 256 * 2**20

_TABLE: dict[tuple[int, int], LaunchConfig] = {
    (80, 16): LaunchConfig(128, 128, 64, 8, 3, workspace_bytes=_LARGE),
    (86, 16): _CONSUMER_16,
    (89, 16): _CONSUMER_16,
    (90, 16): LaunchConfig(128, 128, 64, 8, 3, max_registers=128, workspace_bytes=_LARGE),
    (100, 16): LaunchConfig(128, 128, 64, 8, 3, workspace_bytes=_LARGE),
    (120, 16): _CONSUMER_16,
    (80, 32): LaunchConfig(64, 128, 32, 8, 3, "tf32x3", workspace_bytes=_LARGE),
    (86, 32): _CONSUMER_32,
    (89, 32): _CONSUMER_32,
    (90, 32): LaunchConfig(64, 128, 32, 8, 3, "tf32x3", workspace_bytes=_LARGE),
    (100, 32): LaunchConfig(64, 128, 32, 8, 3, "tf32x3", workspace_bytes=_LARGE),
    (120, 32): _CONSUMER_32,
}
# Where rules beside those of CLIP leave too few registers for the tile above.
_NOT_PLAIN: dict[tuple[int, int], LaunchConfig] = {
    (90, 16): LaunchConfig(128, 128, 64, 8, 3, workspace_bytes=_LARGE),
    # Left alone, ptxas of Triton 3.6 takes 128 registers, and spills.
    (100, 16): LaunchConfig(128, 64, 64, 8, 3, max_registers=168, workspace_bytes=_LARGE),
    (100, 32): LaunchConfig(64, 128, 32, 8, 3, "tf32x3", max_registers=224, workspace_bytes=_LARGE),
}
# Kernels that take descriptors: of CLIP, InfoNCE and SigLIP, and where more rules need registers.
Described = Literal["statistics", "gradient", "sigmoid"]
_DESCRIBED: dict[tuple[int, int, Described], LaunchConfig] = {}
_RULED: dict[tuple[int, int, Described], LaunchConfig] = {}
_WIDE = LaunchConfig(128, 256, 64, 8, 4, parts=2, workspace_bytes=_LARGE)
if _TRITON >= (3, 4):
    _DESCRIBED = {
        (90, 16, "statistics"): replace(_WIDE, stacked=True),
        (90, 16, "gradient"): _WIDE,
        (90, 16, "sigmoid"): replace(_WIDE, parts=4, stacked=True),
    }
    _RULED = {
        (90, 16, "statistics"): replace(_WIDE, parts=4, stacked=True),
        (90, 16, "gradient"): replace(_WIDE, parts=8),
    }
if _TRITON >= (3, 5):
    # Triton 3.4 stores the parts of a tile by way of 448 KiB of shared memory. A thread holds a row
    # of a part here, and what belongs to each of its columns: parts are many.
    _SQUARE = replace(_WIDE, BLOCK_N=128, parts=4)
    _DESCRIBED |= {
        (100, 16, "statistics"): _SQUARE,
        (100, 16, "gradient"): replace(_WIDE, parts=8),
        (100, 16, "sigmoid"): _SQUARE,
    }
    _RULED |= {
        (100, 16, "statistics"): _SQUARE,
        # Left alone, ptxas takes 128 registers, and spills.
        (100, 16, "gradient"): replace(_SQUARE, parts=8, max_registers=168),
    }
ARCHITECTURES = tuple(sorted({architecture for architecture, _ in _TABLE}))
_INTERPRETER = LaunchConfig(64, 64, 64, num_warps=4, num_stages=1)


def table_entry(
    architecture: int,
    dtype: torch.dtype,
    *,
    plain: bool = True,
    guided: bool = False,
    ruled: bool = False,
    kernel: Described | None = None,
) -> LaunchConfig:
    """The entry of the newest known architecture that is not newer than this one (80 = 8.0).

    A contrast is ruled if anything says which logits compete, beside one positive for each row, and
    plain if it is not and goes both ways. A kernel may have entries of its own, with descriptors.
    """
    known = max(each for each in ARCHITECTURES if each <= architecture)
    key = known, 32 if dtype == torch.float32 else 16
    entry = _TABLE[key]
    described = _RULED if ruled else _DESCRIBED
    if kernel is not None and (*key, kernel) in described:
        entry = described[(*key, kernel)]
    elif not plain:
        entry = _NOT_PLAIN.get(key, entry)
    return _beside_a_guide(entry) if guided else entry


def _beside_a_guide(entry: LaunchConfig) -> LaunchConfig:
    """Fewer columns: a second tile, of the guide's products, shares the registers."""
    columns = min(entry.BLOCK_N, _MOST_BESIDE_A_GUIDE // entry.BLOCK_M)
    # Left alone, ptxas takes 128 on sm_100 and sm_120, and spills.
    return replace(entry, BLOCK_N=columns, max_registers=_REGISTERS_BESIDE_A_GUIDE)


def prefix_entry(architecture: int, dtype: torch.dtype, *, gradient: bool) -> LaunchConfig:
    """Smaller than the usual tile: beside a tile of S the products that go on stay in registers."""
    entry = replace(table_entry(architecture, dtype), max_registers=None)
    if dtype == torch.float32:
        # Left alone, ptxas of Triton 3.6 spills 8 bytes of the statistics on sm_80.
        bound = None if gradient else 255
        return replace(entry, BLOCK_M=64, BLOCK_N=64, BLOCK_D=16, max_registers=bound)
    if not 90 <= architecture < 100:
        return replace(entry, BLOCK_M=128, BLOCK_N=64, BLOCK_D=32)
    # Products m64n128: narrower ones wait for shared memory.
    if gradient:
        return replace(entry, BLOCK_M=128, BLOCK_N=128, BLOCK_D=32)
    return replace(entry, BLOCK_M=64, BLOCK_N=128, BLOCK_D=32, num_warps=4)


def token_entry(architecture: int, dtype: torch.dtype, *, both_ways: bool) -> LaunchConfig:
    """The usual tile, with as many registers as the compiler wants."""
    entry = without_bound(table_entry(architecture, dtype))
    # Left alone, ptxas of Triton 3.9 takes 128 on sm_120, and spills 16 bytes.
    bounded = not both_ways and architecture >= 120 and dtype != torch.float32
    return replace(entry, max_registers=136) if bounded else entry


def token_config(features: Tensor, *, both_ways: bool) -> LaunchConfig:
    """`token_entry` for features on their device."""
    if INTERPRETED:
        return _INTERPRETER
    return token_entry(_capability(features), features.dtype, both_ways=both_ways)


def prefix_config(features: Tensor, *, gradient: bool) -> LaunchConfig:
    """`prefix_entry` for features on their device."""
    if INTERPRETED:
        return _INTERPRETER
    return prefix_entry(_capability(features), features.dtype, gradient=gradient)


def _capability(features: Tensor) -> int:
    major, minor = torch.cuda.get_device_capability(features.device)
    return 10 * major + minor


def launch_config(
    features: Tensor,
    *,
    plain: bool = True,
    guided: bool = False,
    ruled: bool = False,
    kernel: Described | None = None,
) -> LaunchConfig:
    """The configuration for features on their device; see `table_entry`."""
    if INTERPRETED:
        return _INTERPRETER
    known = _capability(features), features.dtype
    return table_entry(*known, plain=plain, guided=guided, ruled=ruled, kernel=kernel)


def launch_options(config: LaunchConfig) -> dict[str, Any]:
    """Keyword arguments of a launch of either tile kernel."""
    bound = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    return {
        **bound,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_D": config.BLOCK_D,
        "GROUP_M": config.GROUP_M,
        "PRECISION": config.precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Triton 3.9 warns, and later versions change the default, when this is left open.
        "enable_fp_fusion": True,
    }


def one_part(config: LaunchConfig) -> LaunchConfig:
    """The tile that leaves partials: a part of one that descriptors load, as pointers load it.

    Such parts have their flags row by row.
    """
    if not config.descriptors:
        return config
    return replace(config, BLOCK_N=config.BLOCK_N // config.parts, parts=1, GROUP_M=1)


def second_launch(config: LaunchConfig) -> LaunchConfig:
    """For tiles that are computed again, which are few: registers count for more than time."""
    # Left alone, ptxas of Triton 3.6 takes 128 beside a guide on sm_100, and spills.
    guided = config.max_registers == _REGISTERS_BESIDE_A_GUIDE
    return replace(config, num_stages=1, max_registers=255 if guided else None)


def with_column_sums(config: LaunchConfig) -> LaunchConfig:
    """Give tiles of G that are summed over rows all registers, where the table bounds them."""
    # Within those bounds, none of which is for a second block, they spill on sm_100.
    return config if config.max_registers is None else replace(config, max_registers=255)


def without_bound(config: LaunchConfig) -> LaunchConfig:
    """As many registers as the compiler wants."""
    return replace(config, max_registers=None)
