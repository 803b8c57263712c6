"""What the kernels use of an architecture, from machine code compiled without a GPU.

    PYTHONPATH=.:benchmarks python tests/compiled_kernels.py 90 few|all|contrast|variants

prints one JSON line for each kernel: one or two of each family, all of each, the plain contrasts,
or the costliest ones. test_kernels.py runs this file in a process of its own, where
kernels are not interpreted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain, islice, product
from typing import Any

import kernel_resources
import torch
from machine_code import MachineCode, compile_kernel

from gradcache_clip.kernels import late_interaction, sigmoid
from gradcache_clip.kernels.launch_config import (
    FLOAT16_GRADIENT_SCALE,
    LaunchConfig,
    launch_options,
    prefix_entry,
    table_entry,
    token_entry,
)
from gradcache_clip.kernels.prefix_gradient import _prefix_gradient_kernel
from gradcache_clip.kernels.prefix_statistics import (
    _prefix_statistics_kernel,
)
from gradcache_clip.kernels.sigmoid_tile import sigmoid_kernel

Used = dict[str, Any]
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# Machine code of bf16 and fp16 differs in one conversion, so one stands for both.
TWO = ("bfloat16", "float32")
# Least shared memory, and least registers a thread; kernel_resources.py prints all.
COSTLIEST = ["labels", "labels, ids", "ids, thresholds"]
# Pieces of image and of text tokens, whether both look, and whether winners are kept.
PIECES = {
    "bfloat16": [
        (64, 32, True, False),
        (64, 32, True, True),
        (16, 16, False, True),
        (128, 128, True, True),
    ],
    "float32": [(64, 32, True, True), (16, 16, True, True)],
}


def contrast(architecture: int, dtypes: list[str], variants: list[str]) -> Iterator[Used]:
    for case in kernel_resources.cases(architecture, dtypes, variants):
        used = asdict(kernel_resources.measure(case))
        facts = {"family": "contrast", "multiplies": case.kernel != "merge", **case.__dict__}
        yield {**facts, "described": _described(case), **used}


def _described(case: kernel_resources.Case) -> bool:
    """Whether descriptors load its features where 16 bits are."""
    if "labels" in case.variant and case.kernel == "maxima":
        return False
    return case.kernel in ("statistics", "maxima", "gradient") and "self" not in case.variant


def prefix(architecture: int) -> Iterator[Used]:
    kernels = _prefix_statistics_kernel, _prefix_gradient_kernel
    for kernel, dtype in product(kernels, TWO):
        gradient = kernel is _prefix_gradient_kernel
        config = prefix_entry(architecture, getattr(torch, dtype), gradient=gradient)
        values = launch_options(config)
        yield _used("prefix", dtype, _compiled(kernel, architecture, dtype, values))


def siglip(architecture: int) -> Iterator[Used]:
    """Training with and without labels and accuracy; the scale's gradient, and the loss alone."""
    for dtype, switches in _siglip_variants():
        labels, edge = switches["LABELS"], switches["EDGE"]
        entry = table_entry(
            architecture, getattr(torch, dtype), kernel=None if labels else "sigmoid"
        )
        tiles = sigmoid._tiles(entry, compares=labels and switches["BEST"])
        scale = FLOAT16_GRADIENT_SCALE if dtype == "float16" else 1.0
        config = tiles.edge if edge else tiles.inner
        values = launch_options(config) | switches
        values |= {"PARTS": tiles.parts, "GRADIENT_SCALE": scale}
        values |= {"DESCRIPTORS": config.descriptors, "STACKED": config.stacked}
        machine = _compiled(sigmoid_kernel, architecture, dtype, values, config)
        yield {**_used("siglip", dtype, machine), "described": not (labels or edge)}


def _siglip_variants() -> Iterator[tuple[str, dict[str, bool]]]:
    names = "LABELS", "EDGE", "SUMS", "GRADIENT", "BEST"
    for labels, edge, best in product((False, True), repeat=3):
        for dtype in TWO if labels == edge == best else TWO[:1]:
            yield dtype, dict(zip(names, (labels, edge, True, True, best), strict=True))
    inner = [("float16", True, True, False), ("bfloat16", True, False, False),
             ("bfloat16", False, False, True), ("bfloat16", False, False, False)]  # fmt: skip
    for dtype, *rest in inner:
        yield dtype, dict(zip(names, (False, False, *rest), strict=True))


def tokens(architecture: int) -> Iterator[Used]:
    for dtype, pieces in PIECES.items():
        for block_p, block_r, both_ways, with_index in pieces:
            config = token_entry(architecture, getattr(torch, dtype), both_ways=both_ways)
            values = launch_options(config) | {"BOTH_WAYS": both_ways, "WITH_INDEX": with_index}
            values["BLOCK_P"] = late_interaction.piece_length([block_p], config.BLOCK_M)
            values["BLOCK_R"] = late_interaction.piece_length([block_r], config.BLOCK_N)
            kernel = late_interaction._token_maxima_kernel
            yield _used("tokens", dtype, _compiled(kernel, architecture, dtype, values))
        values = {"BOTH_WAYS": True, "GRADIENT_SCALE": 1.0}
        values |= {"BLOCK_M": late_interaction._WRITE_M, "BLOCK_N": late_interaction._WRITE_N}
        kernel = late_interaction._token_gradient_kernel
        machine = _compiled(kernel, architecture, dtype, values)
        yield {**_used("tokens", dtype, machine), "multiplies": False}


def _compiled(
    kernel: Any,
    architecture: int,
    dtype: str,
    values: dict[str, Any],
    config: LaunchConfig | None = None,
) -> MachineCode:
    def type_of(name: str) -> str:
        if config is not None and name in ("q", "k"):
            return kernel_resources.feature_type(name, getattr(torch, dtype), config)
        if name in ("q_ptr", "k_ptr", "x_ptr", "y_ptr", "gradient_ptr"):
            return f"*{SHORT[dtype]}"
        if name.endswith(("label_ptr", "index_ptr")):
            return "*i64" if name.endswith("label_ptr") else "*i32"
        if name == "ends_ptr":
            return "*i32"
        return "*fp32" if name.endswith("_ptr") else "i32"

    return compile_kernel(kernel, architecture, values, type_of)


def _used(family: str, dtype: str, machine: MachineCode) -> Used:
    return {"family": family, "dtype": dtype, "multiplies": True, **_without_code(machine)}


def _without_code(machine: MachineCode) -> Used:
    listings = {"loop", "rest", "once"}
    used = {name: x for name, x in vars(machine).items() if name not in listings}
    counted = ("narrow_stores", "descriptor_loads")
    return used | {name: getattr(machine, name) for name in counted}


if __name__ == "__main__":
    architecture, which = int(sys.argv[1]), sys.argv[2]
    others = prefix(architecture), siglip(architecture), tokens(architecture)
    # What has launches of its own there.
    apart: dict[int, Iterable[Used]] = {
        100: contrast(architecture, ["bfloat16"], ["rows"]),
        120: islice(tokens(architecture), 2, 3),
    }
    found: dict[str, list[Iterable[Used]]] = {
        "few": [contrast(architecture, ["bfloat16"], ["plain"]), *(islice(x, 2) for x in others)],
        "all": [contrast(architecture, list(TWO), ["plain"]), *others],
        "contrast": [contrast(architecture, list(TWO), ["plain"]), apart.get(architecture, ())],
        "variants": [contrast(architecture, list(TWO), COSTLIEST)],
    }
    for used in chain.from_iterable(found[which]):
        print(json.dumps(used))
