# SPDX-License-Identifier: Apache-2.0
"""Vector instructions: operations from tables, and those that also use masks."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ci.amdgcn.arithmetic import ARITHMETIC, COMPARISONS, SATURATING, Compute, Operation
from ci.amdgcn.assembly import VCC, Instruction
from ci.amdgcn.conversions import CONVERSIONS
from ci.amdgcn.float_formats import classify
from ci.amdgcn.lanes import LANE_INSTRUCTIONS
from ci.amdgcn.operands import (
    Destination,
    Execute,
    Source,
    destination,
    sources,
    vector_source,
)
from ci.amdgcn.packed import decode_mixed, decode_packed
from ci.amdgcn.permutation import LanePermutation, permutation
from ci.amdgcn.waves import Array, Dtype, Waves

f32, i64, u32, u64 = np.float32, np.int64, np.uint32, np.uint64

OPERATIONS = {**ARITHMETIC, **CONVERSIONS}
TYPES: dict[str, Dtype] = {
    "f32": np.float32, "f16": np.float16,
    "i16": np.int16, "i32": np.int32, "i64": np.int64,
    "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
}  # fmt: skip


def decode_vector(instruction: Instruction) -> Execute:
    """Return what executes a vector instruction."""
    name = instruction.name
    if name in OPERATIONS:
        return _decode_operation(instruction, OPERATIONS[name])
    for table in (LANE_INSTRUCTIONS, MASKED):
        if name in table:
            return table[name](instruction)
    if name.startswith("v_pk_"):
        return decode_packed(instruction)
    if name.startswith("v_fma_mix"):
        return decode_mixed(instruction)
    if found := re.fullmatch(r"v_cmp(x?)_([a-z]+)_(\w\d+)", name):
        return _decode_comparison(instruction, found[2], found[3], writes_exec=bool(found[1]))
    raise instruction.unknown()


def _lane_permutation(instruction: Instruction) -> LanePermutation | None:
    return permutation(instruction) if instruction.encoding == "dpp" else None


def _decode_operation(instruction: Instruction, operation: Operation) -> Execute:
    target, *rest = instruction.operands
    operands = (*rest, target) if operation.accumulates else tuple(rest)
    moved = _lane_permutation(instruction)
    read = sources(instruction, operands, operation.sources, moved)
    compute = _modified(instruction, operation)
    is_plain = moved is None and "dst_sel" not in instruction.modifiers
    is_word = np.dtype(operation.result).itemsize == 4
    if isinstance(compute, np.ufunc) and len(read) == 2 and is_plain and is_word:
        return _ufunc(compute, read, target.register, operation.result)
    return _assignment(
        compute, read, destination(instruction, target.register, operation.result, moved)
    )


def _ufunc(compute: np.ufunc, read: list[Source], register: int, dtype: Dtype) -> Execute:
    """Return the fast path: no temporary where all lanes are enabled."""
    first, second = read

    def execute(waves: Waves) -> None:
        target = waves.vectors[dtype][register]
        if waves.all_active:
            compute(first(waves), second(waves), out=target)
        else:
            np.copyto(target, compute(first(waves), second(waves)), where=waves.active)

    return execute


def _assignment(compute: Compute, read: list[Source], assign: Destination) -> Execute:
    if len(read) == 1:
        (only,) = read
        return lambda waves: assign(waves, compute(only(waves)))
    if len(read) == 2:
        first, second = read
        return lambda waves: assign(waves, compute(first(waves), second(waves)))
    first, second, third = read
    return lambda waves: assign(waves, compute(first(waves), second(waves), third(waves)))


def _modified(instruction: Instruction, operation: Operation) -> Compute:
    """Return the operation with what its instruction does to the result."""
    compute = operation.compute
    factor = instruction.integer("mul", 1) / instruction.integer("div", 1)
    clamps = "clamp" in instruction.flags
    if factor == 1 and not clamps:
        return compute
    if operation.result is not f32:
        if factor == 1 and instruction.name in SATURATING:
            return SATURATING[instruction.name]
        raise instruction.unknown("clamp")

    def modified(*values: Array) -> Array:
        result: Array = compute(*values) * f32(factor)
        return np.clip(np.nan_to_num(result), f32(0), f32(1)) if clamps else result

    return modified


def _decode_comparison(
    instruction: Instruction, condition: str, kind: str, *, writes_exec: bool
) -> Execute:
    target, *rest = instruction.operands
    if instruction.encoding == "dpp" or writes_exec or kind not in TYPES:
        raise instruction.unknown()
    dtypes: tuple[Dtype, ...] = (TYPES[kind], TYPES[kind])
    if condition == "class":
        dtypes = (f32, u32)
        compare: Compute = lambda a, b: (b >> classify(a)) & u32(1) == 1  # noqa: E731
    elif condition in COMPARISONS:
        compare = COMPARISONS[condition]
    else:
        raise instruction.unknown()
    first, second = sources(instruction, tuple(rest), dtypes, None)
    register = target.register
    return lambda waves: waves.write_mask(register, compare(first(waves), second(waves)))


def _select(instruction: Instruction) -> Execute:
    target, *rest = instruction.operands
    moved = _lane_permutation(instruction)
    mask = rest[2].register if len(rest) > 2 else VCC
    if_clear, if_set = sources(instruction, tuple(rest[:2]), (u32, u32), moved)
    assign = destination(instruction, target.register, u32, moved)
    return lambda waves: assign(waves, np.where(waves.mask(mask), if_set(waves), if_clear(waves)))


def _with_carry(compute: Compute) -> Callable[[Instruction], Execute]:
    """Return the decoder of an addition or subtraction, computed in int64, with carry or borrow."""

    def decode(instruction: Instruction) -> Execute:
        target, carry_out, a, b, *carry = instruction.operands
        if instruction.encoding in ("dpp", "sdwa"):
            raise instruction.unknown(instruction.encoding)
        first, second = (vector_source(instruction, x, u32) for x in (a, b))
        assign = destination(instruction, target.register, u32)

        def execute(waves: Waves) -> None:
            carry_in = waves.mask(carry[0].register).astype(i64) if carry else i64(0)
            wide = compute(np.asarray(first(waves), i64), np.asarray(second(waves), i64), carry_in)
            assign(waves, wide.astype(u32))
            waves.write_mask(carry_out.register, (wide < 0) | (wide > 0xFFFFFFFF))

        return execute

    return decode


def _multiply_add_wide(dtype: Dtype, narrow: Dtype) -> Callable[[Instruction], Execute]:
    """Return the decoder of a sum of 65 bits, the highest of which is its carry, or its sign."""
    is_signed = np.dtype(dtype).kind == "i"

    def decode(instruction: Instruction) -> Execute:
        target, carry_out, *rest = instruction.operands
        a, b, c = sources(instruction, tuple(rest), (narrow, narrow, dtype), None)
        assign = destination(instruction, target.register, dtype)

        def execute(waves: Waves) -> None:
            addend, product = c(waves), np.multiply(a(waves), b(waves), dtype=dtype)
            result = product + addend
            highest = result < addend
            if is_signed:  # where both terms have another sign than the sum, theirs is right
                highest = (result ^ ((product ^ result) & (addend ^ result))) < 0
            assign(waves, result)
            waves.write_mask(carry_out.register, highest)

        return execute

    return decode


def _divide_scale(instruction: Instruction) -> Execute:
    """Pass the source on: division is scaled by ``v_div_fixup_f32`` where it has to be."""
    target, flag, value, *_ = instruction.operands
    read = vector_source(instruction, value, f32)
    assign = destination(instruction, target.register, f32)

    def execute(waves: Waves) -> None:
        assign(waves, read(waves))
        waves.write_mask(flag.register, np.zeros_like(waves.active))

    return execute


def _truth_table(dtype: Dtype) -> Callable[[Instruction], Execute]:
    def decode(instruction: Instruction) -> Execute:
        target, *rest = instruction.operands
        table = instruction.integer("bitop3")
        read = sources(instruction, tuple(rest), (dtype, dtype, dtype), None)

        def compute(a: Array, b: Array, c: Array) -> Array:
            result: Array = np.zeros(1, dtype)
            for k in range(8):
                if table >> k & 1:
                    x, y, z = a if k & 4 else ~a, b if k & 2 else ~b, c if k & 1 else ~c
                    result = result | (x & y & z)
            return result

        return _assignment(compute, read, destination(instruction, target.register, dtype))

    return decode


def _nothing(instruction: Instruction) -> Execute:
    return lambda waves: None


MASKED: dict[str, Callable[[Instruction], Execute]] = {
    "v_nop": _nothing,
    "v_cndmask_b32": _select,
    "v_add_co_u32": _with_carry(lambda a, b, carry: a + b),
    "v_addc_co_u32": _with_carry(lambda a, b, carry: a + b + carry),
    "v_sub_co_u32": _with_carry(lambda a, b, carry: a - b),
    "v_subb_co_u32": _with_carry(lambda a, b, carry: a - b - carry),
    "v_subrev_co_u32": _with_carry(lambda a, b, carry: b - a),
    "v_subbrev_co_u32": _with_carry(lambda a, b, carry: b - a - carry),
    "v_mad_u64_u32": _multiply_add_wide(u64, u32),
    "v_mad_i64_i32": _multiply_add_wide(i64, np.int32),
    "v_div_scale_f32": _divide_scale,
    "v_bitop3_b32": _truth_table(u32),
    "v_bitop3_b16": _truth_table(np.uint16),
}
