# SPDX-License-Identifier: Apache-2.0
"""Matrix instructions (MFMA): D = A @ B + C, of one matrix for each wave.

A lane holds K / groups consecutive values of one row of A, or of one column of B; groups of lanes
follow each other along K. What a lane holds of C and D is ``_tiles``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ci.amdgcn.assembly import Instruction, Operand
from ci.amdgcn.float_formats import from_bfloat16, to_xf32
from ci.amdgcn.operands import Execute, constant
from ci.amdgcn.waves import LANES, Array, Dtype, Waves

f32, i32 = np.float32, np.int32


@dataclass(frozen=True, slots=True)
class Element:
    """How a number lies in registers, and what makes a float of it where numpy does not."""

    stored: Dtype
    convert: Callable[[Array], Array] | None = None


ELEMENTS = {
    "f32": Element(f32),
    "xf32": Element(f32, to_xf32),
    "f16": Element(np.float16),
    "bf16": Element(np.uint16, from_bfloat16),
    "i8": Element(np.int8),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What an instruction multiplies: [rows, depth] by [depth, rows]."""

    rows: int
    depth: int
    element: Element
    result: Dtype


# rows and depths; Triton's products show that each is laid out as here (tests/test_amdgcn_matrix)
DEPTHS = {
    ("f32", "f32"): ((16, 4), (32, 2)),
    ("f32", "xf32"): ((16, 8), (32, 4)),
    ("f32", "f16"): ((16, 16), (16, 32), (32, 8), (32, 16)),
    ("f32", "bf16"): ((16, 16), (16, 32), (32, 8), (32, 16)),
    ("i32", "i8"): ((16, 32), (16, 64), (32, 16), (32, 32)),
}
INSTRUCTIONS = {
    f"v_mfma_{result}_{rows}x{rows}x{depth}_{element}": Shape(
        rows, depth, ELEMENTS[element], f32 if result == "f32" else i32
    )
    for (result, element), shapes in DEPTHS.items()
    for rows, depth in shapes
}


def decode_matrix(instruction: Instruction) -> Execute:
    """Return what executes a ``v_mfma_`` instruction; EXEC does not matter to it."""
    shape = INSTRUCTIONS.get(instruction.name)
    if shape is None or instruction.modifiers:
        raise instruction.unknown()
    rows, element, result = shape.rows, shape.element, shape.result
    target, a, b, c = instruction.operands
    count = rows * rows // LANES
    size = shape.depth * rows // LANES * element.stored().itemsize
    if (target.count, 4 * a.count, 4 * b.count) != (count, size, size):
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
    shape = INSTRUCTIONS.get(name)
    return 2 * shape.rows**2 * shape.depth if shape else 0


def _matrix(waves: Waves, operand: Operand, rows: int, element: Element) -> Array:
    """Return A, or B transposed: [waves, rows, K]."""
    block = waves.block(operand.register, operand.count).view(element.stored)
    values = block.reshape(operand.count, len(waves), LANES // rows, rows, -1)
    if element.convert is not None:
        values = element.convert(values)
    # the order along K is that of both matrices, so any will do
    # products of 16-bit floats are exact in float32; sums are rounded once, at the end, in hardware
    # after every few terms
    ordered = values.transpose(1, 3, 2, 0, 4).astype(np.float64)
    return ordered.reshape(len(waves), rows, -1)


def _tiles(product: Array, rows: int) -> Array:
    """Return [waves, rows, columns] as registers, [registers, waves, lanes].

    A lane's column is its number modulo the columns. Of every block of rows, four for each group
    of lanes, it has the four of its group.
    """
    waves, groups = len(product), LANES // rows
    split = product.reshape(waves, rows // (4 * groups), groups, 4, rows)
    return split.transpose(1, 3, 0, 2, 4).reshape(-1, waves, LANES)
