"""A Triton kernel compiled for an architecture without its GPU, and what the machine code uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")
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
    """Opcode and operands of the main loop, the innermost one that multiplies."""
    rest: list[tuple[str, str]]

    @property
    def narrow_stores(self) -> int:
        """Stores of two bytes a thread."""
        return sum(op.startswith("STG") and "U16" in op for op, _ in (*self.loop, *self.rest))


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
        if name not in constants and not kernel.params[index].do_not_specialize
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
    loop, rest = _loop_and_rest(instructions)
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return MachineCode(
        registers=used["REG"],
        spilled_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=sorted(set(_MATRIX_INSTRUCTION.findall(instructions))),
        threads=32 * compiled.metadata.num_warps,
        loop=loop,
        rest=rest,
    )


def _loop_and_rest(listing: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Split the instructions at the shortest backward branch around a multiplication."""
    lines = [(int(at, 16), op, rest.strip()) for at, op, rest in _INSTRUCTION.findall(listing)]
    lines = [line for line in lines if line[1] != "NOP"]
    loops = []
    for at, op, operands in lines:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if op.startswith("BRA") and target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    multiplies = [at for at, op, _ in lines if _MATRIX_INSTRUCTION.match(op) or op == "FFMA"]
    loops = [(a, b) for a, b in loops if any(a <= at <= b for at in multiplies)]
    first, last = min(loops, key=lambda each: each[1] - each[0], default=(-1, -1))
    inside = [(op, operands) for at, op, operands in lines if first <= at <= last]
    return inside, [(op, operands) for at, op, operands in lines if not first <= at <= last]


def _cuobjdump(option: str, path: str) -> str:
    command = [str(_TOOLS / "cuobjdump"), option, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
