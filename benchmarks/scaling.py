"""Bytes that a process sends and holds, and its operations, for two to a thousand processes.

    python benchmarks/scaling.py                    # a ViT-B/16 and a BERT-base, 1,024 pairs each
    python benchmarks/scaling.py --local-batch 4096 --width 768 --parameters 300e6

Counts, not measurements: tests/test_scaling.py compares the formulas with the collectives of real
runs. Times divide bytes by a bandwidth and operations by a rate, both of which are arguments.
Writes scaling.csv and scaling.{png,svg} into benchmarks/results (or --results).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plots import MATRIX, OURS, files, picture, tidy
from results import bytes_text, paragraph, parser, provenance, read_csv, show, table, write_csv

_FILE = "scaling.csv"
_WORLDS = (2, 8, 32, 128, 512, 1024)
_QUOTED_WORLDS = (8, 128, 1024)
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
    """Per process and step."""

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
    """Write the CSV, print its table and draw."""
    options = _parser().parse_args(arguments)
    rows = [{**_row(given, options), **provenance()} for given in _settings(options)]
    path = write_csv(rows, options.results / _FILE)
    show(section(options.results))
    for written in (path, *draw(rows, path.with_suffix(""))):
        print(written)


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


def _row(given: Setting, options: argparse.Namespace) -> dict[str, Any]:
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


# The section of docs/benchmarks.md, and what docs/scaling.md quotes


def section(results: Path) -> str:
    """Every number of processes, exchange and ZeRO stage."""
    head = (
        *("processes", "exchange", "ZeRO", "features received", "parameters received"),
        *("held for the loss", "held of the model", "exchange, share of a step at most"),
    )
    text = f"Counted for each process, not measured. {_setting(results)}"
    lines = [
        [
            *(f"{int(row['world']):,}", row["exchange"], row["zero"]),
            *_sizes(row, "feature_bytes_received", "parameter_bytes_received"),
            *_sizes(row, "loss_memory_bytes", "state_memory_bytes"),
            _percent(row, "exchange_share"),
        ]
        for row in read_csv(results / _FILE)
    ]
    return f"{paragraph(text)}\n\n{table(head, lines, 'rlrrrrrr')}"


def quoted(results: Path) -> str:
    """Bytes that a process receives and holds for the loss, for some numbers of processes."""
    head = (
        *("processes", "global batch", "exchange", "features received", "held for the loss"),
        *("loss, share of operations", "exchange, share of a step at most"),
    )
    lines = [
        [
            f"{int(row['world']):,}",
            f"{int(row['world']) * int(row['local_batch']):,}",
            row["exchange"],
            *_sizes(row, "feature_bytes_received", "loss_memory_bytes"),
            *(_percent(row, name) for name in ("loss_share", "exchange_share")),
        ]
        for row in read_csv(results / _FILE)
        if row["zero"] == "0" and int(row["world"]) in _QUOTED_WORLDS
    ]
    return table(head, lines, align="rrlrrrr")


def _sizes(row: Mapping[str, str], *names: str) -> list[str]:
    return [bytes_text(float(row[name])) for name in names]


def _percent(row: Mapping[str, str], name: str) -> str:
    return f"{100 * float(row[name]):.1f} %"


def _setting(results: Path) -> str:
    """The models, the rate and the bandwidth that the table assumes."""
    row = read_csv(results / _FILE)[0]
    return paragraph(
        f"ViT-B/16 and BERT-base ({float(row['parameters']) / 1e6:.0f} M parameters, "
        f"{float(row['encoder_gflops']):.0f} GFLOP a pair in all passes), D = {row['width']}, "
        f"{row['chunks']} chunks, {float(row['tflops']):.0f} TFLOP/s and "
        f"{float(row['gigabytes_per_s']):.0f} GB/s a process:"
    )


def _gather(results: Path) -> str:
    """Features that a gather holds at the largest batch."""
    return bytes_text(_gathered_bytes(_largest_gather(results)))


def _loss_share(results: Path) -> str:
    """Share of the loss in the operations at the largest batch."""
    return f"{100 * float(_largest_gather(results)['loss_share']):.0f} %"


def _statistics(results: Path) -> str:
    """Memory of the statistics of all pairs at the largest batch."""
    row = _largest_gather(results)
    held = int(row["loss_memory_bytes"]) - _gathered_bytes(row)
    pairs = int(row["world"]) * int(row["local_batch"])
    return f"{held // pairs} bytes a pair, {held / 1e6:.0f} MB"


def _largest_gather(results: Path) -> dict[str, str]:
    rows = [row for row in read_csv(results / _FILE) if row["exchange"] == "gather"]
    return max(rows, key=lambda row: int(row["world"]))


def _gathered_bytes(row: Mapping[str, str]) -> int:
    """2 W b D numbers."""
    return 2 * math.prod(int(row[n]) for n in ("world", "local_batch", "width", "feature_bytes"))


BLOCKS: dict[str, Callable[[Path], str]] = {
    "scaling": quoted,
    "scaling-setting": _setting,
    "scaling-gather": _gather,
    "scaling-loss-share": _loss_share,
    "scaling-statistics": _statistics,
}


def draw(rows: Sequence[Mapping[str, Any]], stem: Path) -> list[Path]:
    """Memory of the loss and share of the exchange, against the number of processes."""
    with picture(stem, (11, 4), layout="constrained") as figure:
        memory, share = figure.subplots(1, 2)
        for exchange, color in (("gather", OURS), ("ring", MATRIX)):
            own = [row for row in rows if row["exchange"] == exchange and row["zero"] == 0]
            worlds = [row["world"] for row in own]
            held = [row["loss_memory_bytes"] for row in own]
            memory.plot(worlds, held, "o-", color=color, label=exchange)
            shares = [100 * row["exchange_share"] for row in own]
            share.plot(worlds, shares, "o-", color=color, label=exchange)
        memory.set_title("Held for the loss, one process", loc="left")
        memory.set_yscale("log")
        ticks = [4**power * 2**20 for power in range(1, 7)]
        memory.set_yticks(ticks, [bytes_text(tick) for tick in ticks])
        share.set_title("Exchange, share of a step at most", loc="left")
        share.set(ylabel="%", ylim=(0, None))
        for axes in (memory, share):
            axes.set(xlabel="processes", xscale="log")
            axes.set_xticks(_WORLDS, [f"{world:,}" for world in _WORLDS])
            axes.legend(frameon=False)
            tidy(axes)
    return files(stem)


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    add = made.add_argument
    add("--local-batch", type=int, default=1024, help="pairs of one process")
    add("--width", type=int, default=512, help="feature width")
    add("--parameters", type=float, default=196e6, help="of both towers")
    add("--chunks", type=int, default=8, help="chunks of the local batch")
    add("--encoder-gflops", type=float, default=190.0, help="of both towers, a pair, all passes")
    add("--tflops", type=float, default=300.0, help="rate of a process")
    add("--gigabytes-per-s", type=float, default=50.0, help="into a process")
    return made


if __name__ == "__main__":
    main()
