# SPDX-License-Identifier: Apache-2.0
"""Scalar instructions: one value for each wave, and the condition code SCC."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from ci.amdgcn.arithmetic import COMPARISONS, Compute, reverse_bits
from ci.amdgcn.assembly import EXEC, Instruction, Operand
from ci.amdgcn.operands import Execute, Source, scalar_source
from ci.amdgcn.waves import Array, Dtype, Waves

i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64


class Signature(NamedTuple):
    """The types of a result and of its sources; ``reads_target``: it is the first source."""

    result: Dtype
    sources: tuple[Dtype, ...]
    reads_target: bool = False


def _short(x: Array) -> Array:
    """Return a 16-bit constant with its sign."""
    return np.asarray(x, u32).astype(u16).view(i16).astype(i32)


def _shift_64(b: Array) -> Array:
    return np.asarray(b & u32(63), u64)


def _bit_field(x: Array, field: Array) -> tuple[Array, Array]:
    """Return bits of ``x``, and the highest of them in place; the width may be that of ``x``."""
    bits = 8 * np.dtype(x.dtype).itemsize
    wide: Dtype = i64 if np.dtype(x.dtype).kind == "i" else u64
    offset = np.asarray(field & u32(bits - 1), wide)
    width = np.minimum((np.asarray(field, u32) >> u32(16)) & u32(127), u32(bits)).astype(u64)
    everything = np.where(width == 64, u64(2**64 - 1), (u64(1) << (width & u64(63))) - u64(1))
    top = np.where(width == 0, u64(0), u64(1) << (np.maximum(width, 1) - u64(1)))
    shifted: Array = np.right_shift(np.asarray(x, wide), offset).view(u64)
    return shifted & everything, top


def _unsigned_field(x: Array, field: Array) -> Array:
    return _bit_field(x, field)[0].astype(x.dtype)


def _signed_field(x: Array, field: Array) -> Array:
    bits, top = _bit_field(x, field)
    return ((bits ^ top) - top).astype(x.dtype)


def _first_bit(x: Array) -> Array:
    lowest = x & (~x + x.dtype.type(1))
    # a power of two is exact in float64
    position = np.frexp(np.asarray(lowest, np.float64))[1] - 1
    return np.where(x == 0, -1, position).astype(i32).view(u32)


def _leading_zeros(x: Array) -> Array:
    length = np.frexp(np.asarray(x, np.float64))[1]
    return np.where(x == 0, -1, 32 - length).astype(i32).view(u32)


def _count_bits(x: Array) -> Array:
    return np.bitwise_count(x).astype(u32)


LOGIC: dict[str, Compute] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}
ONE, TWO = Signature(u32, (u32,)), Signature(u32, (u32, u32))
ONE_64, TWO_64 = Signature(u64, (u64,)), Signature(u64, (u64, u64))
SHIFT_64 = Signature(u64, (u64, u32))

# SCC stays as it is
QUIET: dict[Signature, dict[str, Compute]] = {
    ONE: {
        "s_mov_b32": lambda a: a,
        "s_movk_i32": lambda a: _short(a).view(u32),
        "s_brev_b32": reverse_bits,
        "s_ff1_i32_b32": _first_bit,
        "s_flbit_i32_b32": _leading_zeros,
        "s_sext_i32_i16": lambda a: _short(a).view(u32),
        "s_sext_i32_i8": lambda a: a.astype(u8).view(i8).astype(i32).view(u32),
    },
    TWO: {
        "s_mul_i32": np.multiply,
        "s_mul_hi_u32": lambda a, b: (np.multiply(a, b, dtype=u64) >> u64(32)).astype(u32),
        "s_bfm_b32": lambda a, b: ((u32(1) << (a & u32(31))) - u32(1)) << (b & u32(31)),
        "s_pack_ll_b32_b16": lambda a, b: (a & u32(0xFFFF)) | (b << u32(16)),
        "s_pack_lh_b32_b16": lambda a, b: (a & u32(0xFFFF)) | (b & u32(0xFFFF0000)),
        "s_pack_hh_b32_b16": lambda a, b: (a >> u32(16)) | (b & u32(0xFFFF0000)),
    },
    Signature(i32, (i32, i32)): {
        "s_mul_hi_i32": lambda a, b: (np.multiply(a, b, dtype=i64) >> i64(32)).astype(i32),
    },
    Signature(u32, (u32, u32), reads_target=True): {
        "s_mulk_i32": lambda a, b: a * _short(b).view(u32),
        "s_bitset0_b32": lambda a, b: a & ~(u32(1) << (b & u32(31))),
        "s_bitset1_b32": lambda a, b: a | (u32(1) << (b & u32(31))),
    },
    ONE_64: {"s_mov_b64": lambda a: a},
    Signature(u32, (u64,)): {"s_ff1_i32_b64": _first_bit},
}
# SCC says whether the result is not zero
TESTED: dict[Signature, dict[str, Compute]] = {
    ONE: {"s_not_b32": np.invert, "s_bcnt1_i32_b32": _count_bits},
    TWO: {
        **{f"s_{name}_b32": compute for name, compute in LOGIC.items()},
        "s_lshl_b32": lambda a, b: a << (b & u32(31)),
        "s_lshr_b32": lambda a, b: a >> (b & u32(31)),
        "s_bfe_u32": _unsigned_field,
    },
    Signature(i32, (i32, i32)): {"s_ashr_i32": lambda a, b: a >> (b & i32(31))},
    Signature(i32, (i32,)): {"s_abs_i32": np.abs},
    ONE_64: {"s_not_b64": np.invert},
    TWO_64: {f"s_{name}_b64": compute for name, compute in LOGIC.items()},
    SHIFT_64: {
        "s_lshl_b64": lambda a, b: a << _shift_64(b),
        "s_lshr_b64": lambda a, b: a >> _shift_64(b),
        "s_bfe_u64": _unsigned_field,
    },
    Signature(i32, (i32, u32)): {"s_bfe_i32": _signed_field},
    Signature(i64, (i64, u32)): {
        "s_ashr_i64": lambda a, b: a >> np.asarray(b & u32(63), i64),
        "s_bfe_i64": _signed_field,
    },
    Signature(u32, (u64,)): {"s_bcnt1_i32_b64": _count_bits},
}


def _wide(function: Compute) -> Compute:
    """Return a sum or difference, computed in int64 from two sources and SCC, and its carry."""

    def compute(a: Array, b: Array, scc: Array) -> tuple[Array, Array]:
        exact = function(np.asarray(a, i64), np.asarray(b, i64), scc)
        limits = np.iinfo(a.dtype)
        return exact.astype(a.dtype), (exact < limits.min) | (exact > limits.max)

    return compute


def _shifted_sum(shift: int) -> Compute:
    return _wide(lambda a, b, scc: (a << i64(shift)) + b)


def _extreme(function: Compute) -> Compute:
    """Return the larger or smaller of two, and whether it is the first."""

    def compute(a: Array, b: Array, scc: Array) -> tuple[Array, Array]:
        result = function(a, b)
        return result, result == a

    return compute


# these return SCC themselves, and may read it
FLAGGED: dict[Signature, dict[str, Compute]] = {
    TWO: {
        "s_add_u32": _wide(lambda a, b, scc: a + b),
        "s_addc_u32": _wide(lambda a, b, scc: a + b + scc),
        "s_sub_u32": _wide(lambda a, b, scc: a - b),
        "s_subb_u32": _wide(lambda a, b, scc: a - b - scc),
        **{f"s_lshl{n}_add_u32": _shifted_sum(n) for n in (1, 2, 3, 4)},
        "s_max_u32": _extreme(np.maximum),
        "s_min_u32": _extreme(np.minimum),
        "s_cselect_b32": lambda a, b, scc: (np.where(scc, a, b), scc),
    },
    Signature(i32, (i32, i32)): {
        "s_add_i32": _wide(lambda a, b, scc: a + b),
        "s_sub_i32": _wide(lambda a, b, scc: a - b),
        "s_max_i32": _extreme(np.maximum),
        "s_min_i32": _extreme(np.minimum),
    },
    Signature(i32, (i32, u32), reads_target=True): {
        "s_addk_i32": _wide(lambda a, b, scc: a + _short(b)),
        "s_cmovk_i32": lambda a, b, scc: (np.where(scc, _short(b), a), scc),
    },
    Signature(u32, (u32, u32), reads_target=True): {
        "s_cmov_b32": lambda a, b, scc: (np.where(scc, b, a), scc),
    },
    TWO_64: {"s_cselect_b64": lambda a, b, scc: (np.where(scc, a, b), scc)},
}
COMPARED: dict[str, Dtype] = {"i32": i32, "u32": u32, "u64": u64}


def _by_name(
    table: dict[Signature, dict[str, Compute]],
) -> dict[str, tuple[Signature, Compute]]:
    return {
        name: (signature, compute)
        for signature, functions in table.items()
        for name, compute in functions.items()
    }


_QUIET, _TESTED, _FLAGGED = _by_name(QUIET), _by_name(TESTED), _by_name(FLAGGED)


def decode_scalar(instruction: Instruction) -> Execute:
    """Return what executes a scalar instruction that is no branch."""
    name = instruction.name
    if found := re.fullmatch(r"s_(\w+)_saveexec_b64", name):
        return _save_exec(instruction, LOGIC.get(found[1]))
    if found := re.fullmatch(r"s_cmpk?_([a-z]+)_(\w\d+)", name):
        return _compare(instruction, found[1], COMPARED.get(found[2]))
    if found := re.fullmatch(r"s_bitcmp([01])_b32", name):
        return _test_bit(instruction, u32(int(found[1])))
    if found := re.fullmatch(r"s_load_dword(?:x(\d+))?", name):
        return _load(instruction, int(found[1] or 1))
    for table, assign in ((_QUIET, _quiet), (_TESTED, _tested), (_FLAGGED, _flagged)):
        if name in table:
            signature, compute = table[name]
            target, *operands = instruction.operands
            if signature.reads_target:
                operands = [target, *operands]
            return assign(compute, _sources(instruction, operands, signature), target, signature)
    raise instruction.unknown()


def _sources(
    instruction: Instruction, operands: list[Operand], signature: Signature
) -> list[Source]:
    if len(operands) != len(signature.sources):
        raise instruction.unknown(f"{len(operands)} sources")
    return [
        scalar_source(instruction, operand, dtype)
        for operand, dtype in zip(operands, signature.sources, strict=True)
    ]


def _number(target: Operand, dtype: Dtype) -> int:
    return target.register // 2 if np.dtype(dtype).itemsize == 8 else target.register


def _quiet(compute: Compute, read: list[Source], target: Operand, signature: Signature) -> Execute:
    dtype, register = signature.result, target.register
    number = _number(target, dtype)

    def execute(waves: Waves) -> None:
        waves.scalars[dtype][number][...] = compute(*[source(waves) for source in read])
        waves.scalar_changed(register)

    return execute


def _tested(compute: Compute, read: list[Source], target: Operand, signature: Signature) -> Execute:
    dtype, register = signature.result, target.register
    number = _number(target, dtype)

    def execute(waves: Waves) -> None:
        value = waves.scalars[dtype][number]
        value[...] = compute(*[source(waves) for source in read])
        waves.scc = value != 0
        waves.scalar_changed(register)

    return execute


def _flagged(
    compute: Compute, read: list[Source], target: Operand, signature: Signature
) -> Execute:
    dtype, register = signature.result, target.register
    number = _number(target, dtype)

    def execute(waves: Waves) -> None:
        value, scc = compute(*[source(waves) for source in read], waves.scc)
        waves.scalars[dtype][number][...] = value
        waves.scc = np.broadcast_to(scc, (len(waves),))
        waves.scalar_changed(register)

    return execute


def _save_exec(instruction: Instruction, compute: Compute | None) -> Execute:
    if compute is None:
        raise instruction.unknown()
    target, operand = instruction.operands
    read = scalar_source(instruction, operand, u64)
    saved = target.register // 2

    def execute(waves: Waves) -> None:
        enabled = waves.scalars[u64][EXEC // 2]
        result = compute(read(waves), enabled)
        waves.scalars[u64][saved][...] = enabled
        enabled[...] = result
        waves.scc = enabled != 0
        waves.scalar_changed(EXEC)

    return execute


def _compare(instruction: Instruction, condition: str, dtype: Dtype | None) -> Execute:
    compute = COMPARISONS.get({"lg": "ne"}.get(condition, condition))
    if compute is None or dtype is None:
        raise instruction.unknown()
    first, second = (scalar_source(instruction, x, dtype) for x in instruction.operands)
    if instruction.name.startswith("s_cmpk_") and dtype is i32:
        constant = _short(np.array(instruction.operands[1].value & 0xFFFF))  # type: ignore[operator]
        second = lambda waves: constant  # noqa: E731

    def execute(waves: Waves) -> None:
        waves.scc = np.broadcast_to(compute(first(waves), second(waves)), (len(waves),))

    return execute


def _test_bit(instruction: Instruction, expected: np.uint32) -> Execute:
    value, position = (scalar_source(instruction, x, u32) for x in instruction.operands)

    def execute(waves: Waves) -> None:
        bit = (value(waves) >> (position(waves) & u32(31))) & u32(1)
        waves.scc = np.broadcast_to(bit == expected, (len(waves),))

    return execute


def _load(instruction: Instruction, count: int) -> Execute:
    target, base, offset = instruction.operands
    start = scalar_source(instruction, base, u64)
    more = scalar_source(instruction, offset, u32)
    constant = u64(instruction.integer("offset"))

    def execute(waves: Waves) -> None:
        addresses = start(waves) + np.asarray(more(waves), u64) + constant
        words = waves.memory.load(addresses, 4 * count)
        for k, word in enumerate(words):
            waves.scalars[u32][target.register + k][...] = word

    return execute
