"""Time and memory of the losses on the GPU, beside torch's own, its peers, and a matrix product.

    python benchmarks/gpu_losses.py

Forward and backward in bf16, at batches of 16,384 to 262,144 and D = 512; then ours at other widths
and in fp32. Beside them a product of the same rows and columns, as far as its result fits: its rate
is what the card reaches. Rates count 8 B^2 D operations for the CLIP loss, 6 for the sigmoid loss
and 16 for the NT-Xent loss, whatever an implementation really does.

Writes gpu_losses.csv into benchmarks/results (or --results).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from contestants import DTYPES, Contestant, NotOffered
from gpu_card import MEASURED, Card, Point, section, unit_rows
from loss_pairs import OPERATIONS
from loss_peers import CONTESTANTS, SIGLIP_BIAS, ours
from results import bytes_text, paragraph, read_rows, table

FILE = "gpu_losses.csv"
_PRODUCT = "matrix product"
_SCALE = 50.0
_LOSSES = "clip", "siglip", "nt_xent"
# Of the result of the product; more rows would not be faster.
_PRODUCT_BYTES = 2**31


@dataclass(frozen=True)
class Timed:
    """One implementation of one loss, forward and backward."""

    loss: str
    contestant: str
    version: str
    dtype: str
    batch_size: int
    width: int
    status: str = ""
    milliseconds: float = 0.0
    tflop_per_s: float = 0.0
    peak_bytes: int = 0
    """Beyond the features."""


def points(card: Card, results: Path) -> Iterator[Point]:
    """Small batches of all, then large ones; other widths and fp32 of ours last."""
    batches = (128, 256) if card.small else (16384, 65536, 262144)
    width, *others = (32, 48) if card.small else (512, 768, 1024)
    contestants = list(_contestants(card))
    for batch in batches:
        yield _product(card, batch, width, "bf16")
        for contestant in contestants:
            if batch <= contestant.largest:
                yield _point(card, contestant, batch, width, "bf16")
    own = [one for one in CONTESTANTS if one.name == ours(card.device.type)]
    for other in others:
        yield _product(card, batches[1], other, "bf16")
        yield from (_point(card, one, batches[1], other, "bf16") for one in own)
    yield _product(card, batches[0], width, "fp32")
    yield from (_point(card, one, batches[0], width, "fp32") for one in own)


def _contestants(card: Card) -> Iterator[Contestant]:
    """Ours first; those that cannot run here are named."""
    device = card.device.type
    for one in sorted(CONTESTANTS, key=lambda one: one.name != ours(device)):
        if one.loss not in _LOSSES:
            continue
        if obstacle := one.obstacle(device) or _missing(one):
            print(f"{one.loss}, {one.name}: {obstacle}")
        else:
            yield one


def _missing(one: Contestant) -> str:
    """What the installed version lacks; empty if nothing."""
    try:
        one.build(_SCALE)
    except (NotOffered, ImportError) as error:
        return str(error)
    return ""


def _point(card: Card, one: Contestant, batch: int, width: int, dtype: str) -> Point:
    head = Timed(one.loss, one.name, one.version(), dtype, batch, width)
    return Point(head, partial(_measure, card, one, batch, width, dtype))


def _measure(card: Card, one: Contestant, batch: int, width: int, dtype: str) -> dict[str, float]:
    loss = one.build(_SCALE)
    features = [unit_rows(card, batch, width, DTYPES[dtype]) for _ in range(2)]
    scalars = [_SCALE, *([SIGLIP_BIAS] if one.loss == "siglip" else [])]
    leaves = [
        *features,
        *(torch.tensor(each, device=card.device).requires_grad_() for each in scalars),
    ]

    def step() -> object:
        return torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)

    # The first call compiles and may test tiles; its memory is not that of a step.
    step()
    peak = card.peak_bytes(step)
    milliseconds = card.time_ms(step, rounds=5)
    operations = OPERATIONS[one.loss] * batch**2 * width
    return {
        "milliseconds": milliseconds,
        "tflop_per_s": operations / milliseconds / 1e9,
        "peak_bytes": peak,
    }


def _product(card: Card, batch: int, width: int, dtype: str) -> Point:
    head = Timed(_PRODUCT, _PRODUCT, "", dtype, batch, width)
    return Point(head, partial(_multiply, card, batch, width, dtype))


@torch.no_grad()
def _multiply(card: Card, batch: int, width: int, dtype: str) -> dict[str, float]:
    """Similarities of as many rows as fit with all columns, over and over for 5 ms at least."""
    rows = min(batch, _PRODUCT_BYTES // (batch * DTYPES[dtype].itemsize))
    q, k = (unit_rows(card, count, width, DTYPES[dtype]).detach() for count in (rows, batch))
    out = torch.empty(rows, batch, dtype=q.dtype, device=card.device)
    milliseconds = card.time_ms(lambda: torch.matmul(q, k.T, out=out))
    return {
        "milliseconds": milliseconds,
        "tflop_per_s": 2 * rows * batch * width / milliseconds / 1e9,
    }


def page(results: Path) -> str:
    """Milliseconds and rate of every implementation at every batch, a table for each loss."""
    rows = read_rows(Timed, results / FILE)
    rows = [row for row in rows if (row.dtype, row.width) == (rows[0].dtype, rows[0].width)]
    batches = sorted({row.batch_size for row in rows})
    head = ["", *(f"{batch:,} rows" for batch in batches)]
    about = (
        f"Forward and backward in {rows[0].dtype}, D = {rows[0].width}: milliseconds, TFLOP/s, "
        "memory beyond the features. Operations: 8 B^2 D for the CLIP loss, 6 for the sigmoid "
        "loss, 16 for the NT-Xent loss."
    )
    return "\n\n".join(
        [paragraph(about)]
        + [f"{loss}:\n\n{table(head, list(_lines(rows, loss, batches)))}" for loss in _LOSSES]
    )


def _lines(rows: Sequence[Timed], loss: str, batches: Sequence[int]) -> Iterator[list[str]]:
    """The product, then every contestant of a loss."""
    cells = {(row.loss, row.contestant, row.batch_size): _cell(row) for row in rows}
    names = dict.fromkeys((row.loss, row.contestant) for row in rows if row.loss == loss)
    for one in [(_PRODUCT, _PRODUCT), *names]:
        yield [one[1], *(cells.get((*one, batch), "") for batch in batches)]


def _cell(row: Timed) -> str:
    if row.status != MEASURED:
        return row.status.split(":")[0]
    memory = f", {bytes_text(row.peak_bytes)}" if row.peak_bytes else ""
    return f"{row.milliseconds:.3g}, {row.tflop_per_s:.3g}{memory}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 if a point failed, 2 if there is no GPU."""
    return section(__doc__, FILE, points, arguments)


if __name__ == "__main__":
    sys.exit(main())
