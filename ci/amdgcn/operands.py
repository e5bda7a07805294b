# SPDX-License-Identifier: Apache-2.0
"""Reads the sources of instructions and writes their results, whatever the registers and lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from ci.amdgcn.assembly import Instruction, Operand
from ci.amdgcn.permutation import LanePermutation
from ci.amdgcn.waves import LANES, Array, Dtype, Waves

Execute: TypeAlias = Callable[[Waves], None]
Source: TypeAlias = Callable[[Waves], Array]
Destination: TypeAlias = Callable[[Waves, Array], None]

_UNSIGNED: dict[int, Dtype] = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_FLOAT: dict[int, Dtype] = {2: np.float16, 4: np.float32, 8: np.float64}


def constant(operand: Operand, dtype: Dtype) -> Array:
    """Return a number of an instruction, as its sources of type ``dtype`` see it."""
    size = np.dtype(dtype).itemsize
    if operand.kind == "float":
        bits = np.array(operand.value, _FLOAT[size])
    else:
        bits = np.array(int(operand.value) & ((1 << 8 * size) - 1), _UNSIGNED[size])
    value: Array = bits.view(dtype)[()]
    return value


def scalar_source(instruction: Instruction, operand: Operand, dtype: Dtype) -> Source:
    """Return what reads an operand of a scalar instruction: [waves], or one number."""
    if operand.kind in ("integer", "float"):
        value = constant(operand, dtype)
        return lambda waves: value
    if operand.kind != "scalar":
        raise instruction.unknown(f"{operand.kind} operand")
    number = operand.register // 2 if np.dtype(dtype).itemsize == 8 else operand.register
    return lambda waves: waves.scalars[dtype][number]


def vector_source(
    instruction: Instruction, operand: Operand, dtype: Dtype, *, high_half: bool = False
) -> Source:
    """Return what reads an operand of a vector instruction: it broadcasts to [waves, lanes]."""
    fetch = _high_half if high_half else _fetch
    return _with_signs(fetch(instruction, operand, dtype), operand, dtype)


def sources(
    instruction: Instruction,
    operands: tuple[Operand, ...],
    dtypes: tuple[Dtype, ...],
    permutation: LanePermutation | None,
) -> list[Source]:
    """Return what reads the sources of a vector instruction, as it is encoded."""
    if len(operands) != len(dtypes):
        raise instruction.unknown(f"{len(operands)} sources")
    halves = instruction.integers("op_sel", (0,) * len(operands))
    found = []
    for i, (operand, dtype) in enumerate(zip(operands, dtypes, strict=True)):
        if i == 0 and permutation is not None:
            found.append(_permuted(instruction, operand, dtype, permutation))
        elif i < 2 and instruction.encoding == "sdwa":
            found.append(_selected(instruction, operand, dtype, f"src{i}_sel"))
        else:
            half = bool(halves[i])
            found.append(vector_source(instruction, operand, dtype, high_half=half))
    return found


def destination(
    instruction: Instruction,
    register: int,
    dtype: Dtype,
    permutation: LanePermutation | None = None,
) -> Destination:
    """Return what writes a result of type ``dtype`` to enabled lanes."""
    selected = instruction.modifiers.get("dst_sel", "DWORD")
    if selected != "DWORD":
        return _partial_destination(instruction, register, str(selected))
    size = np.dtype(dtype).itemsize
    if size == 8:
        if permutation is not None:
            raise instruction.unknown("dpp result")
        return _pair_destination(register)
    if size == 2:
        # 16-bit operations clear the other half, and keep it where they write the upper one
        halves = instruction.integers("op_sel", (0,))
        if halves[-1] and len(halves) == len(instruction.operands):
            return _partial_destination(instruction, register, "WORD_1", keep=True)
        whole = destination(instruction, register, np.uint32, permutation)
        return lambda waves, value: whole(waves, _bits(value))
    if permutation is None:
        return lambda waves, value: write(waves, register, value, dtype)
    return lambda waves, value: np.copyto(
        waves.vectors[dtype][register], value, where=permutation.written(waves)
    )


def write(waves: Waves, register: int, value: Array, dtype: Dtype = np.uint32) -> None:
    """Set a vector register where EXEC enables it."""
    if waves.all_active:
        waves.vectors[dtype][register][...] = value
    else:
        np.copyto(waves.vectors[dtype][register], value, where=waves.active)


def _bits(value: Array) -> Array:
    """Return 16 or 32 bits as uint32."""
    value = np.asarray(value)
    return value.view(_UNSIGNED[value.itemsize]).astype(np.uint32)


def _fetch(instruction: Instruction, operand: Operand, dtype: Dtype) -> Source:
    if operand.kind == "vector":
        register = operand.register
        if np.dtype(dtype).itemsize == 8:
            return lambda waves: waves.vector_pair(register).view(dtype)
        return lambda waves: waves.vectors[dtype][register]
    if operand.kind == "scalar":
        read = scalar_source(instruction, operand, dtype)
        return lambda waves: read(waves)[:, None]
    return scalar_source(instruction, operand, dtype)


def _high_half(instruction: Instruction, operand: Operand, dtype: Dtype) -> Source:
    if np.dtype(dtype).itemsize != 2 or operand.kind not in ("vector", "scalar"):
        raise instruction.unknown("op_sel")
    read = _fetch(instruction, operand, np.uint32)
    return lambda waves: (read(waves) >> np.uint32(16)).astype(np.uint16).view(dtype)


def _with_signs(read: Source, operand: Operand, dtype: Dtype) -> Source:
    """Apply the sign modifiers, which change the top bit of whatever the type is."""
    if not (operand.absolute or operand.negated):
        return read
    unsigned = _UNSIGNED[np.dtype(dtype).itemsize]
    sign: Array = np.array(1 << (8 * np.dtype(dtype).itemsize - 1), unsigned)
    absolute, negated = operand.absolute, operand.negated

    def signed(waves: Waves) -> Array:
        bits: Array = np.asarray(read(waves)).view(unsigned)
        if absolute:
            bits = bits & ~sign
        if negated:
            bits = bits ^ sign
        return bits.view(dtype)

    return signed


def _permuted(
    instruction: Instruction, operand: Operand, dtype: Dtype, permutation: LanePermutation
) -> Source:
    if operand.kind != "vector" or np.dtype(dtype).itemsize == 8:
        raise instruction.unknown("dpp source")
    read = _fetch(instruction, operand, np.uint32)

    def moved(waves: Waves) -> Array:
        bits = permutation.apply(waves, read(waves))
        return bits.view(dtype) if np.dtype(dtype).itemsize == 4 else bits.view(dtype)[:, ::2]

    return _with_signs(moved, operand, dtype)


def _selected(instruction: Instruction, operand: Operand, dtype: Dtype, modifier: str) -> Source:
    """Read a byte or half of a register, as SDWA instructions do."""
    part = str(instruction.modifiers.get(modifier, "DWORD"))
    shift, width = _part(part)
    read = _fetch(instruction, operand, np.uint32)
    mask = np.uint32((1 << width) - 1)
    sign = np.uint32(1 << (width - 1) if operand.sign_extended and width < 32 else 0)
    narrow = np.dtype(dtype).itemsize == 2

    def selected(waves: Waves) -> Array:
        bits = (read(waves) >> np.uint32(shift)) & mask
        bits = (bits ^ sign) - sign
        return (bits.astype(np.uint16) if narrow else bits).view(dtype)

    return _with_signs(selected, operand, dtype)


def _part(name: str) -> tuple[int, int]:
    """Return offset and width in bits of ``BYTE_2`` or the like."""
    kind, _, number = name.partition("_")
    width = {"BYTE": 8, "WORD": 16, "DWORD": 32}[kind]
    return int(number or 0) * width, width


def _partial_destination(
    instruction: Instruction, register: int, part: str, *, keep: bool = False
) -> Destination:
    shift, width = _part(part)
    mask = np.uint32(((1 << width) - 1) << shift)
    keep = keep or instruction.modifiers.get("dst_unused") == "UNUSED_PRESERVE"

    def write_part(waves: Waves, value: Array) -> None:
        bits = (_bits(value) << np.uint32(shift)) & mask
        if keep:
            bits = bits | (waves.vectors[np.uint32][register] & ~mask)
        write(waves, register, bits)

    return write_part


def _pair_destination(register: int) -> Destination:
    def write_pair(waves: Waves, value: Array) -> None:
        whole = np.ascontiguousarray(np.broadcast_to(value, (len(waves), LANES)))
        halves = whole.view(np.uint32).reshape(len(waves), LANES, 2)
        write(waves, register, halves[..., 0])
        write(waves, register + 1, halves[..., 1])

    return write_pair
