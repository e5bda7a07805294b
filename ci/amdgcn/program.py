# SPDX-License-Identifier: Apache-2.0
"""A kernel ready to run: its assembly, decoded into Python functions once."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ci.amdgcn.assembly import EXEC, VCC, Assembly, Instruction, parse
from ci.amdgcn.atomics import decode_atomic
from ci.amdgcn.errors import SimulationError
from ci.amdgcn.lanes import LANE_INSTRUCTIONS
from ci.amdgcn.lds_instructions import decode_lds, smallest_access
from ci.amdgcn.matrix import decode_matrix
from ci.amdgcn.memory_instructions import decode_memory
from ci.amdgcn.operands import Execute
from ci.amdgcn.scalar import decode_scalar
from ci.amdgcn.vector import decode_vector
from ci.amdgcn.waves import Array, Waves

Condition = Callable[[Waves], Array]

# waiting, caches, priorities, rounding modes that Triton never changes: all without effect here
IGNORED = {
    "s_nop", "s_waitcnt", "s_setprio", "s_sleep", "s_sched_barrier", "s_setreg_imm32_b32",
    "s_setreg_b32", "s_code_end", "s_icache_inv", "s_dcache_wb", "buffer_wbl2", "buffer_inv",
}  # fmt: skip
ALWAYS: Condition = lambda waves: np.ones(len(waves), np.bool_)  # noqa: E731
BRANCHES: dict[str, Condition] = {
    "s_branch": ALWAYS,
    "s_cbranch_scc0": lambda waves: ~waves.scc,
    "s_cbranch_scc1": lambda waves: waves.scc,
    "s_cbranch_vccz": lambda waves: waves.scalars[np.uint64][VCC // 2] == 0,
    "s_cbranch_vccnz": lambda waves: waves.scalars[np.uint64][VCC // 2] != 0,
    "s_cbranch_execz": lambda waves: waves.scalars[np.uint64][EXEC // 2] == 0,
    "s_cbranch_execnz": lambda waves: waves.scalars[np.uint64][EXEC // 2] != 0,
}


@dataclass(frozen=True, slots=True)
class Block:
    """Instructions that run one after the other, and what comes after them.

    ``start`` and ``end`` are positions in the program, ``target`` that of a branch.
    """

    start: int
    end: int
    execute: tuple[Execute, ...]
    then: Literal["next", "branch", "barrier", "end"]
    condition: Condition = ALWAYS
    target: int = 0


@dataclass(frozen=True, slots=True)
class Program:
    """A decoded kernel.

    Attributes:
        assembly: what it was decoded from.
        blocks: by the position of their first instruction.
        num_vectors: how many vector registers it uses.
        lds_cell: bytes that its accesses of shared memory are multiples of.
    """

    assembly: Assembly
    blocks: dict[int, Block]
    num_vectors: int
    lds_cell: int

    @property
    def resources(self) -> dict[str, int]:
        """Return what the compiler says that the kernel needs, registers and spills above all."""
        return {name: self.assembly.header.get(name, 0) for name in RESOURCES}


RESOURCES = (
    "vgpr_count",
    "agpr_count",
    "sgpr_count",
    "vgpr_spill_count",
    "sgpr_spill_count",
    "private_segment_fixed_size",
)


# a decoded kernel takes some megabytes
@functools.lru_cache(maxsize=128)
def load(text: str) -> Program:
    """Return the program of an assembly text, decoded once.

    Raises:
        UnknownInstructionError: the simulator does not implement an instruction.
    """
    # decoding makes many small objects that stay: looking through them again and again for
    # garbage would take longer than all the rest
    collects = gc.isenabled()
    gc.disable()
    try:
        return _decode_program(parse(text))
    finally:
        if collects:
            gc.enable()


def _decode_program(assembly: Assembly) -> Program:
    instructions = assembly.instructions
    starts = {0, *assembly.labels.values()}
    starts |= {i + 1 for i, x in enumerate(instructions) if _ends_block(x)}
    ordered = sorted(start for start in starts if start < len(instructions))
    ends = [*ordered[1:], len(instructions)]
    blocks = {start: _block(assembly, start, end) for start, end in zip(ordered, ends, strict=True)}
    registers = [
        operand.register + operand.count
        for instruction in instructions
        for operand in instruction.operands
        if operand.kind == "vector"
    ]
    lds_cell = smallest_access(instruction.name for instruction in instructions)
    return Program(assembly, blocks, max([8, *registers]), lds_cell)


def _ends_block(instruction: Instruction) -> bool:
    return instruction.name in BRANCHES or instruction.name in ("s_barrier", "s_endpgm")


def _block(assembly: Assembly, start: int, end: int) -> Block:
    instructions = assembly.instructions[start:end]
    last = instructions[-1]
    body = instructions[:-1] if _ends_block(last) else instructions
    execute = tuple(_decode(assembly.name, instruction) for instruction in body)
    if last.name in BRANCHES:
        target = assembly.labels[last.operands[0].label]
        return Block(start, end, execute, "branch", BRANCHES[last.name], target)
    if last.name == "s_barrier":
        return Block(start, end, execute, "barrier")
    return Block(start, end, execute, "end" if last.name == "s_endpgm" else "next")


def _nothing(waves: Waves) -> None:
    pass


def _decode(kernel: str, instruction: Instruction) -> Execute:
    try:
        if instruction.name in IGNORED:
            return _nothing
        return _decoder(instruction)(instruction)
    except SimulationError as error:
        error.locate(kernel, instruction.line, instruction.text)
        raise


def _decoder(instruction: Instruction) -> Callable[[Instruction], Execute]:
    name = instruction.name
    if name in LANE_INSTRUCTIONS:
        return LANE_INSTRUCTIONS[name]
    if "_atomic_" in name:
        return decode_atomic
    for prefix, decode in DECODERS.items():
        if name.startswith(prefix):
            return decode
    if name.startswith("scratch_"):
        raise instruction.unknown("spilled registers")
    raise instruction.unknown()


DECODERS: dict[str, Callable[[Instruction], Execute]] = {
    "s_": decode_scalar,
    "v_mfma_": decode_matrix,
    "v_": decode_vector,
    "ds_": decode_lds,
    "buffer_": decode_memory,
    "global_": decode_memory,
    "flat_": decode_memory,
}
