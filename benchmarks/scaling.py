"""What a process sends, holds and computes in one step, from two processes to a thousand.

    python benchmarks/scaling.py                    # a ViT-B/16 and a BERT-base, 1,024 pairs each
    python benchmarks/scaling.py --local-batch 4096 --width 768 --parameters 300e6

Counts, not measurements: tests/test_scaling.py compares the formulas with the collectives of real
runs. Times divide bytes by a bandwidth and operations by a rate, both of which are arguments.
Writes scaling.csv and scaling.{png,svg} into benchmarks/results (or --results).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from results import bytes_text, provenance
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

_WORLDS = (2, 8, 32, 128, 512, 1024)
# Statistics of a contrast are fp32: positive, max and sum of a row; max and sum of a column.
_ROW_STATISTICS, _COLUMN_STATISTICS, _STATISTIC_BYTES = 3, 2, 4


@dataclass(frozen=True)
class Setting:
    """A CLIP step. W processes, b pairs each, D feature width."""

    world: int
    local_batch: int
    width: int = 512
    feature_bytes: int = 2
    parameters: int = 196_000_000
    """Trainable parameters of both towers."""
    parameter_bytes: int = 2
    exchange: str = "gather"
    zero: int = 0
    """ZeRO stage: 0 as DDP; 1 to 3 shard the optimizer, the gradients and the parameters."""
    chunks: int = 8
    """Chunks of a tower's local batch; a stage 3 step gathers the parameters for each."""


@dataclass(frozen=True)
class Cost:
    """Of one process in one step."""

    feature_bytes_received: int
    statistic_bytes_received: int
    parameter_bytes_received: int
    loss_memory_bytes: int
    state_memory_bytes: int
    loss_flops: int

    @property
    def bytes_received(self) -> int:
        parts = self.feature_bytes_received, self.statistic_bytes_received
        return sum(parts) + self.parameter_bytes_received


def cost(given: Setting) -> Cost:
    """Bytes and operations of one process in one step."""
    return Cost(
        feature_bytes_received=_feature_bytes(given),
        statistic_bytes_received=_statistic_bytes(given),
        parameter_bytes_received=_parameter_bytes(given),
        loss_memory_bytes=_loss_memory(given),
        state_memory_bytes=_state_memory(given),
        loss_flops=10 * given.local_batch**2 * given.world * given.width,
    )


def _feature_bytes(given: Setting) -> int:
    """Texts of other ranks in the forward, images in the backward; a ring sends texts twice."""
    side = (given.world - 1) * given.local_batch * given.width * given.feature_bytes
    return side * (3 if given.exchange == "ring" else 2)


def _statistic_bytes(given: Setting) -> int:
    """Row statistics are gathered, column statistics reduced in place (sent and received once)."""
    others, everyone = given.world - 1, given.world * given.local_batch
    rows = _ROW_STATISTICS * others * given.local_batch
    columns = _COLUMN_STATISTICS * 2 * everyone * others // given.world
    return (rows + columns) * _STATISTIC_BYTES


def _parameter_bytes(given: Setting) -> int:
    """One reduction of the gradients; stage 3 also gathers the parameters for every pass."""
    share = given.parameters * given.parameter_bytes * (given.world - 1) // given.world
    passes = 3 * given.chunks - 1  # embed, replay and backward of each chunk; one is kept
    return share * (2 if given.zero < 3 else 1 + passes)


def _loss_memory(given: Setting) -> int:
    """Features of others and the statistics of all rows and columns."""
    rows = (
        4 * given.local_batch if given.exchange == "ring" else 2 * given.world * given.local_batch
    )
    vectors = (_ROW_STATISTICS + _COLUMN_STATISTICS) * given.world * given.local_batch
    return rows * given.width * given.feature_bytes + vectors * 2 * _STATISTIC_BYTES


def _state_memory(given: Setting) -> int:
    """Parameters, gradients, and an AdamW with an fp32 copy (12 bytes a parameter)."""
    weights = gradients = given.parameters * given.parameter_bytes
    optimizer = 12 * given.parameters
    return (
        weights // (given.world if given.zero >= 3 else 1)
        + gradients // (given.world if given.zero >= 2 else 1)
        + optimizer // (given.world if given.zero >= 1 else 1)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, write the CSV and draw."""
    options = _parser().parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    rows = [_row(given, options) for given in _settings(options)]
    console = Console(width=max(Console().width, 130))
    console.print(_table(rows, options))
    _write(rows, options.results / "scaling.csv")
    for path in _draw(rows, options.results / "scaling"):
        console.print(str(path))


def _settings(options: argparse.Namespace) -> list[Setting]:
    return [
        Setting(
            world,
            options.local_batch,
            width=options.width,
            parameters=int(options.parameters),
            exchange=exchange,
            zero=zero,
            chunks=options.chunks,
        )
        for world in _WORLDS
        for exchange, zero in (("gather", 0), ("ring", 0), ("gather", 2), ("ring", 3))
    ]


def _row(given: Setting, options: argparse.Namespace) -> dict[str, float | int | str]:
    """A setting, its cost, and the times that bytes and operations take by themselves."""
    found = cost(given)
    encoders = options.encoder_gflops * 1e9 * given.local_batch
    compute = (encoders + found.loss_flops) / (options.tflops * 1e12)
    exchange = found.bytes_received / (options.gigabytes_per_s * 1e9)
    return {
        **asdict(given),
        **asdict(found),
        "encoder_gflops": options.encoder_gflops,
        "tflops": options.tflops,
        "gigabytes_per_s": options.gigabytes_per_s,
        "compute_ms": 1e3 * compute,
        "exchange_ms": 1e3 * exchange,
        "exchange_share": exchange / (exchange + compute),
        "loss_share": found.loss_flops / (encoders + found.loss_flops),
    }


def _table(rows: list[dict[str, float | int | str]], options: argparse.Namespace) -> Table:
    title = (
        f"One process: {options.local_batch:,} pairs of width {options.width}, "
        f"{options.parameters / 1e6:.0f} M parameters, {options.tflops:.0f} TFLOP/s, "
        f"{options.gigabytes_per_s:.0f} GB/s between processes"
    )
    table = Table(title=title, box=SIMPLE)
    for heading in ("processes", "global batch", "exchange", "ZeRO"):
        table.add_column(heading, justify="right")
    for heading in (
        "features\nreceived",
        "parameters\nreceived",
        "held for\nthe loss",
        "held of\nthe model",
        "loss, share of\noperations",
        "exchange, share of\na step at most",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: dict[str, float | int | str]) -> list[str]:
    world, local = int(row["world"]), int(row["local_batch"])
    sizes = ("feature_bytes_received", "parameter_bytes_received")
    held = ("loss_memory_bytes", "state_memory_bytes")
    shares = ("loss_share", "exchange_share")
    return [
        f"{world:,}",
        f"{world * local:,}",
        str(row["exchange"]),
        str(row["zero"]),
        *(bytes_text(int(row[name])) for name in (*sizes, *held)),
        *(f"{100 * float(row[name]):.1f} %" for name in shares),
    ]


def _write(rows: list[dict[str, float | int | str]], path: Path) -> None:
    origin = provenance()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *origin], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **origin} for row in rows)


def _draw(rows: list[dict[str, float | int | str]], stem: Path) -> list[Path]:
    """Memory of the loss and share of the exchange, against the number of processes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, share) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for exchange, zero, color in (("gather", 0, "#1f6fb2"), ("ring", 0, "#d1662f")):
        own = [row for row in rows if row["exchange"] == exchange and row["zero"] == zero]
        worlds = [int(row["world"]) for row in own]
        held = [int(row["loss_memory_bytes"]) for row in own]
        memory.plot(worlds, held, "o-", color=color, label=exchange)
        shares = [100 * float(row["exchange_share"]) for row in own]
        share.plot(worlds, shares, "o-", color=color, label=exchange)
    memory.set(title="Held for the loss, one process", yscale="log")
    ticks = [4**power * 2**20 for power in range(1, 7)]
    memory.set_yticks(ticks, [bytes_text(tick) for tick in ticks])
    share.set(title="Exchange, share of a step at most", ylabel="%", ylim=(0, None))
    for axes in (memory, share):
        axes.set(xlabel="processes", xscale="log")
        axes.set_xticks(_WORLDS, [f"{world:,}" for world in _WORLDS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local-batch", type=int, default=1024, help="pairs of one process")
    parser.add_argument("--width", type=int, default=512, help="feature width")
    parser.add_argument("--parameters", type=float, default=196e6, help="of both towers")
    parser.add_argument("--chunks", type=int, default=8, help="chunks of the local batch")
    parser.add_argument(
        "--encoder-gflops", type=float, default=190.0, help="of both towers, a pair, all passes"
    )
    parser.add_argument("--tflops", type=float, default=300.0, help="rate of a process")
    parser.add_argument("--gigabytes-per-s", type=float, default=50.0, help="into a process")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser


if __name__ == "__main__":
    main()
