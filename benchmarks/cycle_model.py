"""From the instructions of a compiled kernel to cycles of a multiprocessor's units, and to time.

Counts come from machine code (machine_code.py), rates from NVIDIA's documents:

- CUDA C++ Programming Guide, "Arithmetic instructions", results per clock and multiprocessor: fp32
  64 (8.0) or 128, comparisons 64, special functions 16, warp shuffles 32; four schedulers issue one
  warp instruction each; shared memory has 32 banks of 4 bytes.
- Architecture papers (A100, H100, Ada, RTX Blackwell): dense 16-bit products with fp32 sums,
  multiprocessors, boost clocks, memory bandwidth; for the A100 also 5,120 bytes per clock from the
  L2.
- No paper gives the L2 of the other cards. github.com/te42kyfo/gpu-benches, gpu-l2-cache, measured
  9.7 TB/s on an H200, whose chip the H100 SXM shares: 5,120 bytes per clock are 9.4 TB/s there. The
  H100 PCIe gave 6.9 TB/s and the A100 5.4 (its 5,120 bytes are 7.2): a GPU may have less. The L40,
  of the RTX 4090's chip, gave 5.2 TB/s, 2,100 bytes per clock, assumed for the RTX 5090 as well.

What is outside the main loop counts once per tile, without the branches that most tiles skip. Where
two blocks share a multiprocessor one's epilogue runs beside the other's products, and a tile takes
what the busiest unit takes; where one block is alone, main loop and epilogue follow each other, but
for the loads of a few steps where the loop goes on with the next tile. Latencies, power limits and
launch gaps are not modelled: these are bounds, and a GPU will be slower.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Instruction = tuple[str, str]
_LANES, _SHARED_BYTES = 32, 128


@dataclass(frozen=True)
class Card:
    """A GPU; rates per clock and multiprocessor unless they say otherwise."""

    name: str
    architecture: int
    multiprocessors: int
    clock_ghz: float
    products: int
    """Multiply-adds of 16-bit numbers into fp32, dense."""
    fp32: int
    memory_tb_per_s: float
    l2_bytes: int
    """Of the whole card."""

    @property
    def peak_tflop_per_s(self) -> float:
        return 2 * self.products * self.multiprocessors * self.clock_ghz / 1e3


CARDS = (
    Card("H100 SXM", 90, 132, 1.83, 2048, 128, 3.35, 5120),
    Card("A100 SXM 80 GB", 80, 108, 1.41, 1024, 64, 2.04, 5120),
    Card("RTX 4090", 89, 128, 2.52, 256, 128, 1.01, 2100),
    Card("RTX 5090", 120, 170, 2.41, 256, 128, 1.79, 2100),
)


def unit_cycles(
    card: Card, instructions: Iterable[Instruction], warps: int, box_bytes: float = 0
) -> dict[str, float]:
    """Cycles of each unit for these instructions, executed by so many warps.

    One load through a descriptor moves `box_bytes`, and one thread asks for it.
    """
    cycles = dict.fromkeys(("matrix", "shared", "special", "shuffle", "fp32", "issue", "L2"), 0.0)
    l2 = card.l2_bytes / card.multiprocessors
    for opcode, operands in instructions:
        base = opcode.split(".")[0]
        cycles["issue"] += warps / 4
        width = _bytes(opcode) * _LANES * warps
        if base == "HMMA":
            cycles["matrix"] += warps * 16 * 8 * 16 / card.products
        elif base == "HGMMA":
            # HGMMA.64x128x16: the opcode ends before the x.
            n = int(operands[1:].split("x")[0])
            groups = warps / 4
            cycles["matrix"] += groups * 64 * n * 16 / card.products
            # Both operands of each group of four warps come from shared memory.
            cycles["shared"] += groups * (64 + n) * 16 * 2 / _SHARED_BYTES
        elif base in ("LDS", "STS", "LDSM", "STSM"):
            cycles["shared"] += width / _SHARED_BYTES
        elif base in ("LDGSTS", "LDG", "STG"):
            cycles["shared"] += width / _SHARED_BYTES
            # Loads to registers are of vectors, some 3 KB a tile, which the L1 holds.
            cycles["L2"] += 0 if base == "LDG" else width / l2
        elif base == "UTMALDG":
            cycles["shared"] += box_bytes / _SHARED_BYTES
            cycles["L2"] += box_bytes / l2
        elif base == "MUFU":
            cycles["special"] += warps * _LANES / 16
        elif base == "SHFL":
            cycles["shuffle"] += warps
        elif base in ("FFMA", "FADD", "FMUL", "FSEL"):
            cycles["fp32"] += warps * _LANES / card.fp32
        elif base in ("FMNMX", "FMNMX3", "FSETP"):
            cycles["fp32"] += warps * _LANES / 64
    return cycles


def _bytes(opcode: str) -> int:
    """Bytes a lane moves."""
    matrices = re.search(r"LDSM.*\.(\d)$|STSM.*\.(\d)$", opcode)
    if matrices:
        return 4 * int(matrices[1] or matrices[2])
    parts = opcode.split(".")
    return {"128": 16, "64": 8}.get(parts[-1], 2 if "U16" in parts else 4)


@dataclass(frozen=True)
class TileTime:
    """Cycles of a tile, and the unit that binds."""

    cycles: float
    unit: str
    flops: float

    def tflop_per_s(self, card: Card) -> float:
        return self.flops / self.cycles * card.multiprocessors * card.clock_ghz / 1e3


def tile_time(
    card: Card,
    loop: Iterable[Instruction],
    rest: Iterable[Instruction],
    *,
    steps: float,
    warps: int,
    blocks: int,
    flops: float,
    box_bytes: float = 0,
    ahead: int = 0,
) -> TileTime:
    """The tile of a kernel whose main loop runs `steps` times.

    The loads of so many steps `ahead` begin before the tile that precedes it is stored.
    """
    inner = {unit: n * steps for unit, n in unit_cycles(card, loop, warps, box_bytes).items()}
    # Loads ahead of the loop take the place of those that its last steps leave out.
    once = [each for each in rest if not each[0].startswith(("LDGSTS", "UTMALDG"))]
    outer = unit_cycles(card, once, warps)
    if blocks > 1:
        both = {unit: inner[unit] + outer[unit] for unit in inner}
        return TileTime(max(both.values()), _busiest(both), flops)
    all_of_l2, epilogue = inner["L2"] + outer["L2"], max(outer.values())
    inner["L2"] -= min(ahead * inner["L2"] / steps, epilogue)
    total = max(inner.values()) + epilogue
    if all_of_l2 > total:
        return TileTime(all_of_l2, "L2", flops)
    return TileTime(total, f"{_busiest(inner)}, then {_busiest(outer)}", flops)


def _busiest(cycles: Mapping[str, float]) -> str:
    return max(cycles, key=lambda unit: cycles[unit])


def vendor_tflop_per_s(card: Card) -> float:
    """A large product of the vendor's, by the same rates: a main loop of large tiles alone."""
    m, n = (128, 256) if card.architecture >= 90 and card.products > 1024 else (128, 128)
    matrix = m * n * 16 / card.products
    loaded = (m + n) * 16 * 2
    per_group = (64 + n) * 32 * m / 64 if card.architecture == 90 else 0
    shared = (loaded + per_group) / _SHARED_BYTES
    l2 = loaded / (card.l2_bytes / card.multiprocessors)
    return card.peak_tflop_per_s * matrix / max(matrix, shared, l2)


def launch_ms(card: Card, tile: TileTime, tiles: int, blocks: int, bytes_moved: float) -> float:
    """A launch: whole waves of tiles, or its traffic with the memory where that takes longer."""
    at_once = card.multiprocessors * blocks
    waves = math.ceil(tiles / at_once) * at_once / tiles
    compute = tiles / card.multiprocessors * tile.cycles * waves / card.clock_ghz / 1e6
    return max(compute, bytes_moved / card.memory_tb_per_s / 1e9)
