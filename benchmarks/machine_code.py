"""A Triton kernel compiled for an architecture without its GPU, and what the machine code uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")
_MATRIX_INSTRUCTION = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel uses."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: list[str]
    threads: int
    loop: list[tuple[str, str]]
    """Opcode and operands of a step of the main loop, the innermost one that multiplies."""
    rest: list[tuple[str, str]]
    once: list[tuple[str, str]]
    """Those of `rest` that a tile executes when it skips what forward branches let it skip."""
    continues: bool
    """Whether the main loop goes on with the next tile; what ends a tile is a branch in it."""

    @property
    def narrow_stores(self) -> int:
        """Stores of two bytes a thread."""
        return sum(op.startswith("STG") and "U16" in op for op, _ in (*self.loop, *self.rest))

    @property
    def descriptor_loads(self) -> int:
        """Loads through TMA descriptors in a step of the main loop."""
        return sum(op.startswith("UTMALDG") for op, _ in self.loop)


def compile_kernel(
    kernel: JITFunction[Any],
    architecture: int,
    values: Mapping[str, Any],
    type_of: Callable[[str], str],
) -> MachineCode:
    """Compile for `architecture` (90 = 9.0) and read the machine code.

    Args:
        kernel: a function under triton.jit.
        architecture: compute capability times ten.
        values: compile-time arguments of the kernel; what is none of its arguments is an option
            of the compiler.
        type_of: Triton's type of each other argument, by name. What Triton may specialise is
            divisible by 16.
    """
    names = kernel.arg_names
    constants = {name: value for name, value in values.items() if name in names}
    options = {name: value for name, value in values.items() if name not in names}
    signature = {name: "constexpr" if name in constants else type_of(name) for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name][0] in "*i" and not kernel.params[index].do_not_specialize
    }
    by_index = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, by_index, aligned)
    options.setdefault("enable_fp_fusion", True)
    return _read(triton.compile(source, GPUTarget("cuda", architecture, 32), options))


def _read(compiled: Any) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        instructions = _cuobjdump("-sass", file.name)
    loop, rest, once, continues = _parts(instructions)
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return MachineCode(
        registers=used["REG"],
        spilled_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=sorted(set(_MATRIX_INSTRUCTION.findall(instructions))),
        threads=32 * compiled.metadata.num_warps,
        loop=loop,
        rest=rest,
        once=once,
        continues=continues,
    )


Line = tuple[int, str, str, bool]
Listed = list[tuple[str, str]]
Spans = list[tuple[int, int]]


def _parts(listing: str) -> tuple[Listed, Listed, Listed, bool]:
    """A step of the main loop, all the rest, what a usual tile executes of it, `continues`."""
    lines = [
        (int(at, 16), op, rest.strip(), bool(predicate))
        for at, predicate, op, rest in _INSTRUCTION.findall(listing)
        if op != "NOP"
    ]
    multiplies = [at for at, op, *_ in lines if _MATRIX_INSTRUCTION.match(op)]
    multiplies = multiplies or [at for at, op, *_ in lines if op == "FFMA"]
    exits = [at for at, op, *_ in lines if op == "EXIT"]
    back, forward = _branches(lines)
    main = min((each for each in back if _holds(each, multiplies)), key=_length, default=(-1, -1))
    skipped = [each for each in forward if not _holds(each, multiplies + exits)]
    stores = [at for at, op, *_ in lines if op.startswith("STG") and _within(at, [main])]
    if not stores:
        step, rest = _split(lines, [main])
        _, once = _split(rest, skipped)
        return _listed(step), _listed(rest), _listed(once), False
    inside = [each for each in skipped if _within(each[0], [main])]
    ends = [each for each in inside if not any(_contains(other, each) for other in inside)]
    # Each logit has an exponential, so a branch that holds them is one that tiles take.
    exponentials = [at for at, op, *_ in lines if op.startswith("MUFU.EX2")]
    rare = [each for each in inside if each not in ends and not _holds(each, exponentials)]
    rest, step = _split(lines, [(0, main[0] - 1), *ends, (main[1] + 1, lines[-1][0])])
    _, once = _split(_split(lines, ends)[0], rare)
    return _listed(step), _listed(rest), _listed(once), True


def _branches(lines: list[Line]) -> tuple[Spans, Spans]:
    """Spans of backward branches; what conditional forward branches jump over."""
    back, forward = [], []
    for at, op, operands, predicated in lines:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if op.startswith("BRA") and target:
            to = int(target[1], 16)
            if to <= at:
                back.append((to, at))
            elif predicated:
                forward.append((at + 1, to - 1))
    return back, forward


def _holds(span: tuple[int, int], places: list[int]) -> bool:
    return any(span[0] <= at <= span[1] for at in places)


def _within(at: int, spans: Spans) -> bool:
    return any(first <= at <= last for first, last in spans)


def _contains(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return span != other and span[0] <= other[0] and other[1] <= span[1]


def _split(lines: list[Line], spans: Spans) -> tuple[list[Line], list[Line]]:
    """Lines within these spans, and the others."""
    within = [line for line in lines if _within(line[0], spans)]
    return within, [line for line in lines if not _within(line[0], spans)]


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _listed(lines: Iterable[Line]) -> Listed:
    return [(op, operands) for _, op, operands, _ in lines]


def _cuobjdump(option: str, path: str) -> str:
    command = [str(_TOOLS / "cuobjdump"), option, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
