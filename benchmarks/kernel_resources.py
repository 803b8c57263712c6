"""What the kernels use of each GPU architecture, read from compiled machine code without a GPU.

    python benchmarks/kernel_resources.py [--architecture 90 ...] [--dtype ...] [--variant ...]
    python benchmarks/kernel_resources.py --predict     # times by the model of cycle_model.py
    python benchmarks/kernel_resources.py --check       # 1 if something spills or a mark is missed
    python benchmarks/kernel_resources.py --tiles --architecture 90 --variant plain rows ids

Of the softmax family: statistics by one exponential, their second launch for flagged tiles,
maxima, gradient. Prints, for each architecture, dtype and variant: registers a thread,
bytes spilled, shared memory a block and its limit, the matrix instructions found, and how many
blocks fit a multiprocessor. `--results FOLDER` writes kernel_resources.csv there; `--json` prints
one list and no table. `--tiles` prints the predicted TFLOP/s of tile kernels in bf16 instead, with
`--pointers` as if the launch table had no descriptors.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from cycle_model import CARDS, Card
from machine_code import MachineCode, compile_kernel
from predicted import WIDTHS, Kernel, Prediction, markdown, missed_marks, predictions
from results import provenance
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.runtime import JITFunction

from gradcache_clip.kernels import launch_config
from gradcache_clip.kernels.gradient_tile import contrast_gradient_kernel
from gradcache_clip.kernels.launch_config import (
    ARCHITECTURES,
    Described,
    LaunchConfig,
    launch_options,
    one_part,
    second_launch,
    table_entry,
    with_column_sums,
)
from gradcache_clip.kernels.sigmoid import _tiles as sigmoid_tiles
from gradcache_clip.kernels.sigmoid_tile import sigmoid_kernel
from gradcache_clip.kernels.statistics_parts import FLAGS_PER_PROGRAM, merge_kernel
from gradcache_clip.kernels.statistics_tile import contrast_statistics_kernel

REGISTERS_OF_MULTIPROCESSOR = 65536
PREDICTED = (80, 89, 90, 120)


@dataclass(frozen=True)
class Limits:
    """Shared memory (KiB) and threads of one architecture."""

    block_kib: int
    multiprocessor_kib: int
    threads: int


LIMITS = {
    80: Limits(163, 164, 2048),
    86: Limits(99, 100, 1536),
    89: Limits(99, 100, 1536),
    90: Limits(227, 228, 2048),
    100: Limits(227, 228, 2048),
    120: Limits(99, 100, 1536),
}


@dataclass(frozen=True)
class Case:
    """One kernel as it would be launched."""

    architecture: int
    dtype: str
    variant: str
    kernel: str

    @property
    def config(self) -> LaunchConfig:
        dtype = getattr(torch, self.dtype)
        rules, kernel = VARIANTS[self.variant], self._described()
        asked = {"plain": self.variant == "plain", "guided": "guide" in rules}
        ruled = self.variant not in ("plain", "rows")
        entry = table_entry(self.architecture, dtype, **asked, ruled=ruled, kernel=kernel)
        if "sums" in rules:
            return with_column_sums(entry)
        return second_launch(one_part(entry)) if self.kernel == "second" else entry

    def _described(self) -> Described | None:
        """The kernel, if descriptors may load its features."""
        gradient = self.kernel == "gradient"
        others = {"self", "guide", "sums" if gradient else "labels"}
        if others & VARIANTS[self.variant]:
            return None
        return "gradient" if gradient else "statistics"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses."""

    case: Case
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    narrow_stores: int
    """Stores of two bytes a thread."""
    descriptor_loads: int
    """Loads through TMA descriptors in a step of the main loop."""
    matrix_instructions: list[str]
    blocks_per_multiprocessor: int


KERNELS: dict[str, JITFunction] = {
    "statistics": contrast_statistics_kernel,
    "maxima": contrast_statistics_kernel,
    "second": contrast_statistics_kernel,
    "gradient": contrast_gradient_kernel,
    "merge": merge_kernel,
}
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES = ("bfloat16", "float16", "float32")
# The rules that the public losses combine: plain is CLIP, rows is InfoNCE, self is NT-Xent; groups,
# bias and guide are of RetrievalLoss. A bias that is learned changes its gradient alone.
VARIANTS = {
    "plain": {"columns"},
    "labels": {"columns", "labels"},
    "ids": {"columns", "ids"},
    "labels, ids": {"columns", "labels", "ids"},
    "rows": set(),
    "rows, thresholds": {"threshold"},
    "ids, thresholds": {"columns", "ids", "threshold"},
    "self": {"columns", "self"},
    "self, labels": {"columns", "labels", "self"},
    "rows, groups, bias": {"groups", "bias"},
    "ids, groups, bias": {"columns", "ids", "groups", "bias"},
    "self, ids, groups": {"columns", "ids", "groups", "self"},
    "rows, guide": {"guide"},
    "ids, groups, bias, guide": {"columns", "ids", "groups", "bias", "guide"},
    "self, guide": {"columns", "guide", "self"},
    "ids, groups, learned bias": {"columns", "ids", "groups", "bias", "sums"},
    "ids, groups, learned bias, guide": {"columns", "ids", "groups", "bias", "sums", "guide"},
}
_RULES = ("labels", "ids", "threshold", "groups", "bias", "sums")
_OF_COLUMNS = ("column_parts_ptr", "column_max_ptr", "column_dsum_ptr", "column_dpositive_ptr")


def cases(architecture: int, dtypes: list[str], variants: list[str]) -> list[Case]:
    tiles = [
        Case(architecture, dtype, variant, kernel)
        for dtype in dtypes
        for variant in variants
        for kernel in ("statistics", "second", "maxima", "gradient")
        if _by_one_exponential(VARIANTS[variant]) or kernel in ("maxima", "gradient")
        if "sums" not in VARIANTS[variant] or kernel == "gradient"
    ]
    merges = [each for each in ("plain", "labels") if each in variants]
    return [*tiles, *(Case(architecture, "float32", each, "merge") for each in merges)]


def _by_one_exponential(rules: set[str]) -> bool:
    """Whether the statistics have a first way without maxima, and so a second launch."""
    return "columns" in rules and "labels" not in rules


def measure(case: Case) -> Resources:
    """Compile one kernel for its architecture and read the machine code."""
    used = machine_code(case)
    return Resources(
        case=case,
        registers=used.registers,
        spilled_bytes=used.spilled_bytes,
        shared_bytes=used.shared_bytes,
        shared_limit_bytes=LIMITS[case.architecture].block_kib * 1024,
        narrow_stores=used.narrow_stores,
        descriptor_loads=used.descriptor_loads,
        matrix_instructions=used.matrix_instructions,
        blocks_per_multiprocessor=blocks(case.architecture, used),
    )


def machine_code(case: Case) -> MachineCode:
    dtype, kernel, values = getattr(torch, case.dtype), KERNELS[case.kernel], _values(case)

    return compile_kernel(kernel, case.architecture, values, _types(dtype, case.config))


def _types(dtype: torch.dtype, config: LaunchConfig) -> Callable[[str], str]:
    def type_of(name: str) -> str:
        if name in ("q", "k"):
            return feature_type(name, dtype, config)
        return _argument_type(name, dtype)

    return type_of


def feature_type(name: str, dtype: torch.dtype, config: LaunchConfig) -> str:
    """Of rows `q`, or of columns `k`, as this configuration loads them."""
    if not config.descriptors:
        return f"*{_SHORT[dtype]}"
    edge = config.BLOCK_M if name == "q" else config.BLOCK_N
    return f"tensordesc<{_SHORT[dtype]}[{edge}, {config.BLOCK_D}]>"


def _values(case: Case) -> dict[str, Any]:
    """Compile-time arguments of the kernel, and options of the compiler."""
    rules, names = VARIANTS[case.variant], KERNELS[case.kernel].arg_names
    if case.kernel == "merge":
        return {"LABELLED": "labels" in rules, "WIDTH": 32, "DEPTH": 64}
    absent = {name: None for name in names if _is_absent(name, rules)}
    values = {**launch_options(case.config), "SELF": "self" in rules, **absent}
    values["PARTS"] = case.config.parts
    if case.kernel == "maxima":
        values["flags_ptr"] = None
    if case.kernel == "gradient":
        return values
    group = FLAGS_PER_PROGRAM if case.kernel == "second" else 1
    return {**values, "GROUP": group, "STACKED": case.config.stacked}


def _is_absent(name: str, rules: set[str]) -> bool:
    """Whether a contrast of these rules has nothing to pass for this pointer."""
    rule = next((each for each in _RULES if name.endswith(f"_{each}_ptr")), None)
    if name == "G" or "guide" in name:
        rule = "guide"
    if rule is not None:
        of_columns = name in ("column_threshold_ptr", "column_guide_threshold_ptr")
        return rule not in rules or (of_columns and "columns" not in rules)
    return name in _OF_COLUMNS and (
        "columns" not in rules or (name == "column_dpositive_ptr" and "labels" not in rules)
    )


def _argument_type(name: str, dtype: torch.dtype) -> str:
    if name == "gradient_ptr":
        return f"*{_SHORT[dtype]}"
    if name == "flags_ptr":
        return "*i32"
    if name.endswith(("label_ptr", "labels_ptr", "ids_ptr", "groups_ptr")):
        return "*i64"
    return "*fp32" if name.endswith("_ptr") else "i32"


def blocks(architecture: int, used: MachineCode) -> int:
    """Blocks resident on a multiprocessor; each reserves 1 KiB of shared memory for the system."""
    limits, registers = LIMITS[architecture], -(-used.registers // 8) * 8
    by_registers = REGISTERS_OF_MULTIPROCESSOR // (registers * used.threads)
    by_shared = limits.multiprocessor_kib * 1024 // (used.shared_bytes + 1024)
    return min(by_registers, by_shared, limits.threads // used.threads)


def predicted_kernel(architecture: int, name: str) -> Kernel:
    """A tile kernel of the CLIP loss or of the sigmoid loss in bf16."""
    if name == "sigmoid":
        tiles = sigmoid_tiles(
            table_entry(architecture, torch.bfloat16, kernel="sigmoid"), compares=False
        )
        used, config = _sigmoid_code(architecture, tiles.inner, tiles.parts), tiles.inner
    else:
        case = Case(architecture, "bfloat16", "plain", name)
        used, config = machine_code(case), case.config
    return Kernel(config, used, blocks(architecture, used))


def _sigmoid_code(architecture: int, config: LaunchConfig, parts: int) -> MachineCode:
    switches = {"LABELS": False, "EDGE": False, "SUMS": True, "GRADIENT": True, "BEST": False}
    switches |= {"DESCRIPTORS": config.descriptors, "STACKED": config.stacked}
    values = launch_options(config) | switches | {"PARTS": parts, "GRADIENT_SCALE": 1.0}
    return compile_kernel(sigmoid_kernel, architecture, values, _types(torch.bfloat16, config))


def predict(pool: ProcessPoolExecutor, console: Console) -> list[Prediction]:
    """Compile what the predictions need, and print them as a table of Markdown."""
    names = [(sm, name) for sm in PREDICTED for name in ("statistics", "gradient", "sigmoid")]
    compiled = dict(zip(names, pool.map(predicted_kernel, *zip(*names, strict=True)), strict=True))
    found = list(predictions(compiled))
    for line in markdown(found):
        console.print(line, soft_wrap=True)
    return found


def tile_rates(options: argparse.Namespace) -> Table:
    """Predicted TFLOP/s of each tile kernel in bf16, on the card of its architecture."""
    if options.pointers:
        launch_config._DESCRIBED.clear()
        launch_config._RULED.clear()
    table = Table("GPU", "variant", "kernel", "tile", *(f"D = {D}" for D in WIDTHS))
    for card in CARDS:
        if card.architecture in options.architecture:
            for case in cases(card.architecture, ["bfloat16"], options.variant):
                if case.kernel not in ("merge", "second"):
                    table.add_row(card.name, *_rates(case, card))
    return table


def _rates(case: Case, card: Card) -> Iterator[str]:
    used, config = machine_code(case), case.config
    kernel = Kernel(config, used, blocks(case.architecture, used))
    yield from (case.variant, case.kernel, f"{config.BLOCK_M} x {config.BLOCK_N}")
    for D in WIDTHS:
        yield f"{kernel.tile(card, D).tflop_per_s(card):.0f}"


def _table(measured: list[Resources]) -> Table:
    table = Table(title=f"Triton {triton.__version__}: resources of the kernels")
    for heading in ("sm", "dtype", "variant", "kernel", "tile", "warps", "regs", "spilled"):
        table.add_column(heading, justify="right")
    for heading in ("shared KiB", "limit", "matrix units", "blocks"):
        table.add_column(heading, justify="right")
    for each in measured:
        table.add_row(*_row(each))
    return table


def _row(each: Resources) -> Iterator[str]:
    case, config = each.case, each.case.config
    merge = case.kernel == "merge"
    yield from (str(case.architecture), case.dtype, case.variant, case.kernel)
    yield "-" if merge else f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_D}"
    yield "4" if merge else str(config.num_warps)
    yield from (str(each.registers), str(each.spilled_bytes), f"{each.shared_bytes / 1024:.0f}")
    yield f"{each.shared_limit_bytes // 1024}"
    yield " ".join(each.matrix_instructions) or "-"
    yield str(each.blocks_per_multiprocessor)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--architecture", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--json", action="store_true", help="print one JSON list, no table")
    parser.add_argument("--tiles", action="store_true", help="predicted rates of kernels alone")
    parser.add_argument("--pointers", action="store_true", help="with --tiles: no descriptors")
    parser.add_argument("--predict", action="store_true", help="predicted times alone")
    parser.add_argument(
        "--check", action="store_true", help="1 for a spill, a 2-byte store or a missed mark"
    )
    parser.add_argument("--results", type=Path, help="folder for kernel_resources.csv (none)")
    options = parser.parse_args()
    if options.tiles:
        Console(width=110).print(tile_rates(options))
        return 0
    todo = [
        case
        for architecture in options.architecture
        for case in cases(architecture, options.dtype, options.variant)
    ]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        if options.predict:
            found = predict(pool, Console())
            if options.results:
                path = options.results / "kernel_predictions.csv"
                print(_write([asdict(each) for each in found], path))
            return bool(missed_marks(found))
        if options.json:
            print(json.dumps([asdict(each) for each in pool.map(measure, todo)]))
            return 0
        measured = list(track(pool.map(measure, todo), "compiling", total=len(todo)))
        Console(width=140).print(_table(measured))
        wrong = []
        if options.check:
            wrong = [*_defects(measured), *missed_marks(predict(pool, Console()))]
    for text in wrong:
        Console(stderr=True).print(text, style="red")
    if options.results:
        print(_write([_flat(x) for x in measured], options.results / "kernel_resources.csv"))
    return bool(wrong)


def _defects(measured: list[Resources]) -> Iterator[str]:
    for each in measured:
        if each.spilled_bytes or each.narrow_stores:
            yield f"{each.case}: {each.spilled_bytes} B spilled, {each.narrow_stores} 2-byte stores"


def _write(lines: list[dict[str, Any]], path: Path) -> Path:
    """One line a kernel or prediction, with where it comes from."""
    origin = {"triton": triton.__version__, **provenance()}
    rows = [{**each, **origin} for each in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _flat(each: Resources) -> dict[str, Any]:
    row = asdict(each)
    case = row.pop("case")
    return {**case, **row, "matrix_instructions": " ".join(each.matrix_instructions)}


if __name__ == "__main__":
    sys.exit(main())
