# SPDX-License-Identifier: Apache-2.0
"""Vector instructions that work on two values at once, or on halves of mixed precision."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ci.amdgcn.arithmetic import Compute, fused_multiply_add, fused_multiply_add_half
from ci.amdgcn.assembly import Instruction, Operand
from ci.amdgcn.operands import Execute, Source, vector_source, write
from ci.amdgcn.waves import Array, Dtype, Waves

f16, f32, f64, i16, u16, u32 = (
    np.float16, np.float32, np.float64, np.int16, np.uint16, np.uint32
)  # fmt: skip

PAIRS: dict[str, Compute] = {
    "v_pk_add_f32": np.add,
    "v_pk_mul_f32": np.multiply,
    "v_pk_fma_f32": fused_multiply_add,
    "v_pk_mov_b32": lambda a, b: np.array(a),
}


def _saturating(compute: Compute, dtype: type[np.integer[Any]]) -> Compute:
    """Return ``compute`` with results held to the range of ``dtype``, as ``clamp`` asks."""
    limits = np.iinfo(dtype)

    def held(a: Array, b: Array) -> Array:
        wide = compute(a.astype(np.int32), b.astype(np.int32))
        return np.clip(wide, limits.min, limits.max).astype(dtype)

    return held


SATURATING: dict[str, tuple[Dtype, Compute]] = {
    "v_pk_add_u16": (u16, _saturating(np.add, u16)),
    "v_pk_sub_u16": (u16, _saturating(np.subtract, u16)),
    "v_pk_add_i16": (i16, _saturating(np.add, i16)),
    "v_pk_sub_i16": (i16, _saturating(np.subtract, i16)),
}
HALVES: dict[str, tuple[Dtype, Compute]] = {
    "v_pk_add_f16": (f16, np.add),
    "v_pk_mul_f16": (f16, np.multiply),
    "v_pk_max_f16": (f16, np.fmax),
    "v_pk_min_f16": (f16, np.fmin),
    "v_pk_fma_f16": (f16, fused_multiply_add_half),
    "v_pk_add_u16": (u16, np.add),
    "v_pk_sub_u16": (u16, np.subtract),
    "v_pk_sub_i16": (i16, np.subtract),
    "v_pk_mul_lo_u16": (u16, np.multiply),
    "v_pk_max_u16": (u16, np.maximum),
    "v_pk_min_u16": (u16, np.minimum),
    "v_pk_max_i16": (i16, np.maximum),
    "v_pk_min_i16": (i16, np.minimum),
    "v_pk_lshlrev_b16": (u16, lambda a, b: b << (a & u16(15))),
    "v_pk_lshrrev_b16": (u16, lambda a, b: b >> (a & u16(15))),
    "v_pk_ashrrev_i16": (i16, lambda a, b: b >> (a & i16(15))),
}


def decode_packed(instruction: Instruction) -> Execute:
    """Return what executes a ``v_pk_`` instruction."""
    if instruction.flags:
        if set(instruction.flags) != {"clamp"} or instruction.name not in SATURATING:
            raise instruction.unknown("clamp")
        return _decode_halves(instruction, *SATURATING[instruction.name])
    if instruction.name in PAIRS:
        return _decode_pair(instruction, PAIRS[instruction.name])
    if instruction.name in HALVES:
        return _decode_halves(instruction, *HALVES[instruction.name])
    raise instruction.unknown()


def _decode_pair(instruction: Instruction, compute: Compute) -> Execute:
    target, *operands = instruction.operands
    low = _registers(instruction, operands, "op_sel", "neg_lo", 0)
    high = _registers(instruction, operands, "op_sel_hi", "neg_hi", 1)
    if instruction.name == "v_pk_mov_b32":
        # its second result is the second source, both chosen by op_sel
        second = instruction.integers("op_sel", (0, 0))[1]
        chosen = dataclasses.replace(operands[1], register=operands[1].register + second)
        high = [vector_source(instruction, chosen, f32)] * 2
    register = target.register

    def execute(waves: Waves) -> None:
        # both before either is written: the target may be a source
        first = compute(*[read(waves) for read in low])
        second = compute(*[read(waves) for read in high])
        write(waves, register, first, f32)
        write(waves, register + 1, second, f32)

    return execute


def _registers(
    instruction: Instruction, operands: list[Operand], selects: str, negates: str, default: int
) -> list[Source]:
    """Return what reads one of each pair of registers; a number is the same for both."""
    count = len(operands)
    chosen = instruction.integers(selects, (default,) * count)
    negated = instruction.integers(negates, (0,) * count)
    found = []
    for operand, which, sign in zip(operands, chosen, negated, strict=True):
        is_pair = operand.kind in ("vector", "scalar")
        half = dataclasses.replace(
            operand,
            register=operand.register + (which if is_pair else 0),
            negated=bool(sign),
        )
        found.append(vector_source(instruction, half, f32))
    return found


def _decode_halves(instruction: Instruction, dtype: Dtype, compute: Compute) -> Execute:
    target, *operands = instruction.operands
    low = _half_sources(instruction, operands, dtype, "op_sel", "neg_lo", 0)
    high = _half_sources(instruction, operands, dtype, "op_sel_hi", "neg_hi", 1)
    register = target.register

    def execute(waves: Waves) -> None:
        bits = _word(compute(*[read(waves) for read in high])) << u32(16)
        write(waves, register, bits | _word(compute(*[read(waves) for read in low])))

    return execute


def _word(value: Array) -> Array:
    return np.asarray(value).view(u16).astype(u32)


def _half_sources(
    instruction: Instruction,
    operands: list[Operand],
    dtype: Dtype,
    selects: str,
    negates: str,
    default: int,
) -> list[Source]:
    count = len(operands)
    chosen = instruction.integers(selects, (default,) * count)
    negated = instruction.integers(negates, (0,) * count)
    found = []
    for operand, which, sign in zip(operands, chosen, negated, strict=True):
        signed = dataclasses.replace(operand, negated=bool(sign))
        # an inline number is in the low half, and its high half is 0
        if operand.kind in ("vector", "scalar"):
            read = vector_source(instruction, signed, dtype, high_half=bool(which))
        else:
            signed = signed if not which else dataclasses.replace(signed, kind="integer", value=0)
            read = vector_source(instruction, signed, dtype)
        found.append(read)
    return found


def decode_mixed(instruction: Instruction) -> Execute:
    """Return what executes ``v_fma_mix``: sources of 16 or 32 bits, a float32 sum."""
    target, *operands = instruction.operands
    is_half = instruction.integers("op_sel_hi", (0, 0, 0))
    is_high = instruction.integers("op_sel", (0, 0, 0))
    read = [
        vector_source(instruction, operand, f16 if half else f32, high_half=bool(half and high))
        for operand, half, high in zip(operands, is_half, is_high, strict=True)
    ]
    register = target.register

    def total(waves: Waves) -> Array:
        return fused_multiply_add(*(np.asarray(source(waves), f32) for source in read))

    if instruction.flags or instruction.name not in MIXED:
        raise instruction.unknown()
    kept, shift = MIXED[instruction.name]
    if kept is None:
        return lambda waves: write(waves, register, total(waves), f32)

    def execute(waves: Waves) -> None:
        bits = _word(np.asarray(total(waves), f16)) << u32(shift)
        write(waves, register, (waves.vectors[u32][register] & u32(kept)) | bits)

    return execute


# the bits of the destination that stay, and where the result goes
MIXED: dict[str, tuple[int | None, int]] = {
    "v_fma_mix_f32": (None, 0),
    "v_fma_mixlo_f16": (0xFFFF0000, 0),
    "v_fma_mixhi_f16": (0xFFFF, 16),
}
