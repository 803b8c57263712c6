"""Predicted times of the losses, from machine code and the rates of cycle_model.py; the marks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from cycle_model import CARDS, Card, TileTime, launch_ms, tile_time, vendor_tflop_per_s
from machine_code import MachineCode

from gradcache_clip.kernels.cuts import panel_shape, stripe_rows
from gradcache_clip.kernels.launch_config import (
    LaunchConfig,
    one_part,
)

B, WIDTHS = 65_536, (512, 768, 1024)


@dataclass(frozen=True)
class Kernel:
    """A compiled tile kernel: its tiles, machine code, and blocks on a multiprocessor."""

    config: LaunchConfig
    code: MachineCode
    blocks: int

    def tile(self, card: Card, D: int) -> TileTime:
        config, code = self.config, self.code
        # Two loads a step, of rows and of columns.
        box_bytes = (config.BLOCK_M + config.BLOCK_N) / 2 * config.BLOCK_D * 2
        return tile_time(
            card,
            code.loop,
            code.once,
            steps=D / config.BLOCK_D,
            warps=code.threads // 32,
            blocks=self.blocks,
            flops=2.0 * config.BLOCK_M * config.BLOCK_N * D,
            box_bytes=box_bytes,
            ahead=config.num_stages - 1 if code.continues else 0,
        )


@dataclass(frozen=True)
class Prediction:
    """One loss, forward and backward, at B = 65,536 in bf16."""

    loss: str
    gpu: str
    width: int
    ms: float
    tflop_per_s: float
    convention: str
    tiles: str
    """TFLOP/s of each tile kernel and the unit that binds it."""
    products_tflop_per_s: float


def predictions(kernels: dict[tuple[int, str], Kernel]) -> Iterator[Prediction]:
    """Of CLIP and of the sigmoid loss on each card.

    Args:
        kernels: by architecture and "statistics", "gradient" or "sigmoid".
    """
    for card in CARDS:
        of_card = {name: each for (sm, name), each in kernels.items() if sm == card.architecture}
        for D in WIDTHS:
            yield _clip(card, D, of_card)
            yield _sigmoid(card, D, of_card)


def _clip(card: Card, D: int, kernels: dict[str, Kernel]) -> Prediction:
    statistics, gradient = kernels["statistics"], kernels["gradient"]
    config = one_part(statistics.config)
    rows = stripe_rows(config, B)
    # Partials are written by the tiles, and read by the merges, which do nothing else.
    partials = 8.0 * (1 / config.BLOCK_M + 1 / config.BLOCK_N) * rows * B
    forward = _launches(card, statistics, D, rows, B, partials)
    forward += ceil(B / rows) * partials / card.memory_tb_per_s / 1e9
    shown = [("statistics", statistics), ("gradient", gradient)]
    return _prediction("CLIP", card, D, forward + _backward(card, D, gradient), 8, shown)


def _sigmoid(card: Card, D: int, kernels: dict[str, Kernel]) -> Prediction:
    ms = _backward(card, D, kernels["sigmoid"])
    return _prediction("sigmoid", card, D, ms, 6, [("sigmoid", kernels["sigmoid"])])


def _backward(card: Card, D: int, kernel: Kernel) -> float:
    """Panels of G, and two products with each."""
    rows, columns = panel_shape(kernel.config, B, 2, D, card.multiprocessors)
    tiles = _launches(card, kernel, D, rows, columns, 2.0 * rows * columns)
    # Each product reads G, and reads and writes its accumulator.
    moved = 2 * 2.0 * B * B + 8.0 * D * B * B * (1 / rows + 1 / columns)
    products = 4.0 * B * B * D / vendor_tflop_per_s(card) / 1e9
    return tiles + max(products, moved / card.memory_tb_per_s / 1e9)


def _launches(
    card: Card, kernel: Kernel, D: int, rows: int, columns: int, bytes_moved: float
) -> float:
    """All launches over B x B, of which each takes rows x columns."""
    config = kernel.config
    tiles = ceil(rows / config.BLOCK_M) * ceil(columns / config.BLOCK_N)
    one = launch_ms(card, kernel.tile(card, D), tiles, kernel.blocks, bytes_moved)
    return one * (B / rows) * (B / columns)


def _prediction(
    loss: str, card: Card, D: int, ms: float, products: int, shown: list[tuple[str, Kernel]]
) -> Prediction:
    described = []
    for name, kernel in shown:
        tile = kernel.tile(card, D)
        described.append(f"{name} {tile.tflop_per_s(card):.0f} ({tile.unit})")
    rate = products * float(B) * B * D / ms / 1e9
    where = loss, card.name, D, round(ms, 1), round(rate)
    vendor = round(vendor_tflop_per_s(card))
    return Prediction(*where, f"{products} B^2 D", "; ".join(described), vendor)


def missed_marks(found: list[Prediction]) -> list[str]:
    """What is slower than it is meant to be."""
    at = {(each.loss, each.gpu): each for each in found if each.width == 768}
    clip, sigmoid = at["CLIP", "H100 SXM"], at["sigmoid", "H100 SXM"]
    consumer = at["CLIP", "RTX 4090"]
    marks = [
        (clip.tflop_per_s >= 560, f"CLIP on the H100: {clip.tflop_per_s} of 560 TFLOP/s"),
        (sigmoid.ms <= 40, f"sigmoid on the H100: {sigmoid.ms} ms of 40"),
        (consumer.tflop_per_s >= 140, f"CLIP on the RTX 4090: {consumer.tflop_per_s} of 140"),
    ]
    return [text for reached, text in marks if not reached]


def markdown(found: list[Prediction]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield "| loss | GPU | D | ms | TFLOP/s | as | tile kernels, TFLOP/s (what binds) | products |"
    yield "|---|---|---|---|---|---|---|---|"
    for each in sorted(found, key=lambda each: each.loss):
        numbers = f"{each.ms} | {each.tflop_per_s} | {each.convention}"
        kernels = f"{each.tiles} | {each.products_tflop_per_s}"
        yield f"| {each.loss} | {each.gpu} | {each.width} | {numbers} | {kernels} |"
