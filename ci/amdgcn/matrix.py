# SPDX-License-Identifier: Apache-2.0
"""Matrix instructions (MFMA): D = A @ B + C, of one matrix for each wave.

A lane holds K / groups consecutive values of one row of A, or of one column of B; groups of lanes
follow each other along K. What a lane holds of C and D is ``_tiles``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ci.amdgcn.assembly import Instruction, Operand
from ci.amdgcn.float_formats import from_bfloat16, to_xf32
from ci.amdgcn.operands import Execute, constant
from ci.amdgcn.waves import LANES, Array, Dtype, Waves

f16, f32, f64, i8, i32, u16, u32 = (
    np.float16, np.float32, np.float64, np.int8, np.int32, np.uint16, np.uint32,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Element:
    """How a matrix lies in registers, and what it is multiplied as."""

    stored: Dtype
    multiplied: Dtype
    convert: Callable[[Array], Array] | None = None


# products of 16-bit floats are exact in float32; sums are rounded once, at the end, in hardware
# after every few terms
ELEMENTS = {
    "f32": Element(f32, f64),
    "xf32": Element(f32, f64, to_xf32),
    "f16": Element(f16, f64),
    "bf16": Element(u16, f64, from_bfloat16),
    "i8": Element(i8, f64),
}
_NAME = re.compile(r"v_mfma_(f32|i32)_(16x16|32x32)x(\d+)_?(xf32|f32|f16|bf16|i8)(?:_1k)?")


def decode_matrix(instruction: Instruction) -> Execute:
    """Return what executes a ``v_mfma_`` instruction; EXEC does not matter to it."""
    found = _NAME.fullmatch(instruction.name)
    if found is None or instruction.modifiers:
        raise instruction.unknown()
    rows = int(found[2][:2])
    depth = int(found[3])
    element = ELEMENTS[found[4]]
    result: Dtype = f32 if found[1] == "f32" else i32
    target, a, b, c = instruction.operands
    count = rows * rows // LANES
    sources = {a.count * 4, b.count * 4}
    if target.count != count or sources != {depth * rows // LANES * element.stored().itemsize}:
        raise instruction.unknown("number of registers")
    initial = None if c.kind == "vector" else constant(c, result)

    def execute(waves: Waves) -> None:
        left = _matrix(waves, a, rows, element)
        right = _matrix(waves, b, rows, element)
        product = _tiles(np.matmul(left, right.swapaxes(1, 2)), rows)
        addend = initial
        if addend is None:
            addend = waves.block(c.register, count).view(result)
        waves.block(target.register, count).view(result)[...] = product + addend

    return execute


def flops(name: str) -> int:
    """Return what an instruction computes for one wave, 0 where it is no matrix instruction."""
    found = _NAME.fullmatch(name)
    return 2 * int(found[2][:2]) ** 2 * int(found[3]) if found else 0


def _matrix(waves: Waves, operand: Operand, rows: int, element: Element) -> Array:
    """Return A, or B transposed: [waves, rows, K]."""
    block = waves.block(operand.register, operand.count).view(element.stored)
    values = block.reshape(operand.count, len(waves), LANES // rows, rows, -1)
    if element.convert is not None:
        values = element.convert(values)
    # the order along K is that of both matrices, so any will do
    ordered = values.transpose(1, 3, 2, 0, 4).astype(element.multiplied)
    return ordered.reshape(len(waves), rows, -1)


def _tiles(product: Array, rows: int) -> Array:
    """Return [waves, rows, columns] as registers, [registers, waves, lanes].

    A lane's column is its number modulo the columns. Of every block of rows, four for each group
    of lanes, it has the four of its group.
    """
    waves, groups = len(product), LANES // rows
    split = product.reshape(waves, rows // (4 * groups), groups, 4, rows)
    return split.transpose(1, 3, 0, 2, 4).reshape(-1, waves, LANES)
