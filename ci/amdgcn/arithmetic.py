# SPDX-License-Identifier: Apache-2.0
"""The vector operations that are a function of their sources, lane by lane, as tables.

A table gives the type that its operations return and the types that they take; whatever else an
instruction says (signs, lanes, parts of registers, masks) is the business of ``vector.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ci.amdgcn.float_formats import exponent
from ci.amdgcn.waves import LANES, Array, Dtype

f16, f32, f64 = np.float16, np.float32, np.float64
i16, i32, i64 = np.int16, np.int32, np.int64
u16, u32, u64 = np.uint16, np.uint32, np.uint64

Compute: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """What an opcode computes; ``accumulates``: its destination is its last source, too."""

    result: Dtype
    sources: tuple[Dtype, ...]
    compute: Compute
    accumulates: bool = False


def _operations(
    result: Dtype,
    sources: tuple[Dtype, ...],
    functions: Mapping[str, Compute],
    *,
    accumulates: bool = False,
) -> dict[str, Operation]:
    return {
        name: Operation(result, sources, compute, accumulates)
        for name, compute in functions.items()
    }


def _exactly(function: Compute) -> Compute:
    """Return ``function`` of float32 computed in float64 and rounded once."""
    return lambda x: function(np.asarray(x, f64)).astype(f32)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c: the product is exact in float64, the sum rounded to it and to float32."""
    product = np.multiply(a, b, dtype=f64)
    total: Array = np.add(product, c, dtype=f64)
    return total.astype(f32)


def fused_multiply_add_half(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c of float16."""
    return fused_multiply_add(*(np.asarray(x, f32) for x in (a, b, c))).astype(f16)


def _bit_length(x: Array) -> Array:
    return np.frexp(np.asarray(x, f64))[1].astype(u32)


def _lowest_bit(x: Array) -> Array:
    return np.where(x == 0, u32(0xFFFFFFFF), _bit_length(x & (~x + u32(1))) - u32(1))


def _highest_bit(x: Array) -> Array:
    return np.where(x == 0, u32(0xFFFFFFFF), u32(32) - _bit_length(x))


def reverse_bits(x: Array) -> Array:
    """Return uint32 with bit 0 last."""
    octets = np.ascontiguousarray(x).view(np.uint8).reshape(*np.shape(x), 4)
    reversed_bits = np.packbits(np.unpackbits(octets, axis=-1)[..., ::-1], axis=-1)
    return np.ascontiguousarray(reversed_bits).view(u32)[..., 0]


def extract_bits(x: Array, offset: Array, width: Array) -> Array:
    """Return ``width`` bits of uint32, from ``offset`` on."""
    mask = (u32(1) << (width & u32(31))) - u32(1)
    return (x >> (offset & u32(31))) & mask


def extract_signed_bits(x: Array, offset: Array, width: Array) -> Array:
    """Return ``width`` bits of int32 as uint32, from ``offset`` on, their highest as the sign."""
    mask = (u32(1) << (width & u32(31))) - u32(1)
    sign = (mask + u32(1)) >> u32(1)
    bits = (np.asarray(x, u32).view(i32) >> (offset & u32(31)).view(i32)).view(u32) & mask
    return (bits ^ sign) - sign


def _permute_bytes(high: Array, low: Array, selector: Array) -> Array:
    """Return four bytes, each chosen by a byte of the selector from the eight of two words."""
    first = selector.flat[0]
    if first & u32(0xF8F8F8F8) == 0 and (selector == first).all():
        high, low = np.broadcast_arrays(high, low)
        octets = np.stack([low, high], axis=-1).view(np.uint8)
        chosen = octets[..., [int(first) >> 8 * k & 7 for k in range(4)]]
        return np.ascontiguousarray(chosen).view(u32)[..., 0]
    pool = (np.asarray(high, u64) << u64(32)) | low
    result: Array = np.zeros(1, u32)
    for shift in (u32(0), u32(8), u32(16), u32(24)):
        result = result | (_chosen_byte(pool, (selector >> shift) & u32(0xFF)) << shift)
    return result


def _chosen_byte(pool: Array, choice: Array) -> Array:
    # 8 to 11 repeat the sign of byte 1, 3, 5 or 7; 12 is 0 and what is above it 255
    position = np.where(choice < 8, choice * u32(8), (choice & u32(3)) * u32(16) + u32(15))
    byte = (pool >> position.astype(u64)).astype(u32) & u32(0xFF)
    byte = np.where(choice < 8, byte, (byte & u32(1)) * u32(0xFF))
    return np.where(choice < 12, byte, np.where(choice == 12, u32(0), u32(0xFF)))


def _signed_24(x: Array) -> Array:
    return (x << i32(8)) >> i32(8)


def _low_24(x: Array) -> Array:
    return x & u32(0xFFFFFF)


def _high_half(x: Array) -> Array:
    return x >> (u64(32) if x.dtype == u64 else i64(32))


_LANES_BELOW_LOW = np.array([(1 << min(i, 32)) - 1 for i in range(LANES)], u32)
_LANES_BELOW_HIGH = np.array([(1 << max(i - 32, 0)) - 1 for i in range(LANES)], u32)


def _count_bits(x: Array) -> Array:
    return np.bitwise_count(x).astype(u32)


def _median(a: Array, b: Array, c: Array) -> Array:
    middle = np.fmax(np.fmin(a, b), np.fmin(np.fmax(a, b), c))
    has_nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(has_nan, np.fmin(np.fmin(a, b), c), middle)


def _fix_division(quotient: Array, denominator: Array, numerator: Array) -> Array:
    """Return the quotient that a refinement gave, or the true one where that is special.

    Special is also where ``v_div_scale_f32`` would have scaled, which is not modelled.
    """
    distance = exponent(numerator) - exponent(denominator)
    extreme = (np.abs(distance) >= 96) | (exponent(numerator) <= 23)
    for x in (numerator, denominator):
        extreme |= (exponent(x) == 0) | (exponent(x) >= 253)
    true = np.divide(numerator, denominator, dtype=f64).astype(f32)
    return np.where(extreme, true, np.copysign(quotient, true))


MOVES = _operations(
    u32,
    (u32,),
    {
        "v_mov_b32": lambda a: a,
        **{f"v_accvgpr_{way}_b32": lambda a: a for way in ("read", "write", "mov")},
        "v_not_b32": np.invert,
        "v_bfrev_b32": reverse_bits,
        "v_ffbl_b32": _lowest_bit,
        "v_ffbh_u32": _highest_bit,
        "v_ffbh_i32": lambda a: _highest_bit(a ^ (u32(0) - (a >> u32(31)))),
    },
)
UNSIGNED = _operations(
    u32,
    (u32, u32),
    {
        "v_add_u32": np.add,
        "v_sub_u32": np.subtract,
        "v_subrev_u32": lambda a, b: b - a,
        "v_and_b32": np.bitwise_and,
        "v_or_b32": np.bitwise_or,
        "v_xor_b32": np.bitwise_xor,
        "v_xnor_b32": lambda a, b: ~(a ^ b),
        "v_lshlrev_b32": lambda a, b: b << (a & u32(31)),
        "v_lshrrev_b32": lambda a, b: b >> (a & u32(31)),
        "v_mul_lo_u32": np.multiply,
        "v_mul_hi_u32": lambda a, b: _high_half(np.multiply(a, b, dtype=u64)).astype(u32),
        "v_mul_u32_u24": lambda a, b: _low_24(a) * _low_24(b),
        "v_max_u32": np.maximum,
        "v_min_u32": np.minimum,
        "v_bcnt_u32_b32": lambda a, b: _count_bits(a) + b,
        "v_mbcnt_lo_u32_b32": lambda a, b: _count_bits(a & _LANES_BELOW_LOW) + b,
        "v_mbcnt_hi_u32_b32": lambda a, b: _count_bits(a & _LANES_BELOW_HIGH) + b,
        "v_bfm_b32": lambda a, b: ((u32(1) << (a & u32(31))) - u32(1)) << (b & u32(31)),
    },
)
UNSIGNED_OF_THREE = _operations(
    u32,
    (u32, u32, u32),
    {
        "v_add3_u32": lambda a, b, c: a + b + c,
        "v_add_lshl_u32": lambda a, b, c: (a + b) << (c & u32(31)),
        "v_lshl_add_u32": lambda a, b, c: (a << (b & u32(31))) + c,
        "v_lshl_or_b32": lambda a, b, c: (a << (b & u32(31))) | c,
        "v_and_or_b32": lambda a, b, c: (a & b) | c,
        "v_or3_b32": lambda a, b, c: a | b | c,
        "v_xad_u32": lambda a, b, c: (a ^ b) + c,
        "v_bfe_u32": extract_bits,
        "v_bfe_i32": extract_signed_bits,
        "v_bfi_b32": lambda a, b, c: (a & b) | (~a & c),
        "v_alignbit_b32": lambda a, b, c: (
            ((np.asarray(a, u64) << u64(32)) | b) >> np.asarray(c & u32(31), u64)
        ).astype(u32),
        "v_perm_b32": _permute_bytes,
        "v_mad_u32_u24": lambda a, b, c: _low_24(a) * _low_24(b) + c,
        "v_max3_u32": lambda a, b, c: np.maximum(np.maximum(a, b), c),
        "v_min3_u32": lambda a, b, c: np.minimum(np.minimum(a, b), c),
    },
)
SIGNED = _operations(
    i32,
    (i32, i32),
    {
        "v_ashrrev_i32": lambda a, b: b >> (a & i32(31)),
        "v_mul_hi_i32": lambda a, b: _high_half(np.multiply(a, b, dtype=i64)).astype(i32),
        "v_mul_i32_i24": lambda a, b: _signed_24(a) * _signed_24(b),
        "v_max_i32": np.maximum,
        "v_min_i32": np.minimum,
    },
)
SIGNED_OF_THREE = _operations(
    i32,
    (i32, i32, i32),
    {
        "v_mad_i32_i24": lambda a, b, c: _signed_24(a) * _signed_24(b) + c,
        "v_max3_i32": lambda a, b, c: np.maximum(np.maximum(a, b), c),
        "v_min3_i32": lambda a, b, c: np.minimum(np.minimum(a, b), c),
        "v_med3_i32": lambda a, b, c: np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c)),
    },
)
# the hardware approximates the first of these within 1 ulp; here they are rounded to nearest
FLOAT = _operations(
    f32,
    (f32,),
    {
        "v_exp_f32": _exactly(np.exp2),
        "v_log_f32": _exactly(np.log2),
        "v_rcp_f32": _exactly(lambda a: 1.0 / a),
        "v_rcp_iflag_f32": _exactly(lambda a: 1.0 / a),
        "v_rsq_f32": _exactly(lambda a: 1.0 / np.sqrt(a)),
        "v_sin_f32": _exactly(lambda a: np.sin(2 * np.pi * a)),
        "v_cos_f32": _exactly(lambda a: np.cos(2 * np.pi * a)),
        "v_sqrt_f32": np.sqrt,
        "v_trunc_f32": np.trunc,
        "v_floor_f32": np.floor,
        "v_ceil_f32": np.ceil,
        "v_rndne_f32": np.rint,
        "v_fract_f32": lambda a: a - np.floor(a),
        "v_frexp_mant_f32": lambda a: np.frexp(a)[0],
    },
)
FLOAT_OF_TWO = _operations(
    f32,
    (f32, f32),
    {
        "v_add_f32": np.add,
        "v_sub_f32": np.subtract,
        "v_subrev_f32": lambda a, b: b - a,
        "v_mul_f32": np.multiply,
        "v_max_f32": np.fmax,
        "v_min_f32": np.fmin,
    },
)
FLOAT_OF_THREE = _operations(
    f32,
    (f32, f32, f32),
    {
        "v_fma_f32": fused_multiply_add,
        "v_div_fmas_f32": fused_multiply_add,
        "v_div_fixup_f32": _fix_division,
        "v_fmaak_f32": fused_multiply_add,
        "v_fmamk_f32": fused_multiply_add,
        "v_max3_f32": lambda a, b, c: np.fmax(np.fmax(a, b), c),
        "v_min3_f32": lambda a, b, c: np.fmin(np.fmin(a, b), c),
        "v_maximum3_f32": lambda a, b, c: np.maximum(np.maximum(a, b), c),
        "v_minimum3_f32": lambda a, b, c: np.minimum(np.minimum(a, b), c),
        "v_med3_f32": _median,
    },
)
ACCUMULATING = _operations(
    f32, (f32, f32, f32), {"v_fmac_f32": fused_multiply_add}, accumulates=True
)
HALF = _operations(
    f16,
    (f16, f16),
    {
        "v_add_f16": np.add,
        "v_sub_f16": np.subtract,
        "v_mul_f16": np.multiply,
        "v_max_f16": np.fmax,
        "v_min_f16": np.fmin,
    },
)
HALF_OF_THREE = _operations(f16, (f16, f16, f16), {"v_fma_f16": fused_multiply_add_half})
SHORT = _operations(
    u16,
    (u16, u16),
    {
        "v_add_u16": np.add,
        "v_sub_u16": np.subtract,
        "v_mul_lo_u16": np.multiply,
        "v_max_u16": np.maximum,
        "v_min_u16": np.minimum,
        "v_lshlrev_b16": lambda a, b: b << (a & u16(15)),
        "v_lshrrev_b16": lambda a, b: b >> (a & u16(15)),
    },
)
SHORT_OF_THREE = _operations(u16, (u16, u16, u16), {"v_mad_legacy_u16": lambda a, b, c: a * b + c})
SIGNED_SHORT = _operations(
    i16,
    (i16, i16),
    {
        "v_ashrrev_i16": lambda a, b: b >> (a & i16(15)),
        "v_max_i16": np.maximum,
        "v_min_i16": np.minimum,
    },
)
WIDE = {
    "v_mov_b64": Operation(u64, (u64,), lambda a: a),
    "v_lshl_add_u64": Operation(
        u64, (u64, u32, u64), lambda a, b, c: (a << np.asarray(b & u32(7), u64)) + c
    ),
    "v_lshlrev_b64": Operation(u64, (u32, u64), lambda a, b: b << np.asarray(a & u32(63), u64)),
    "v_lshrrev_b64": Operation(u64, (u32, u64), lambda a, b: b >> np.asarray(a & u32(63), u64)),
    "v_ashrrev_i64": Operation(i64, (i32, i64), lambda a, b: b >> np.asarray(a & i32(63), i64)),
}
ARITHMETIC: dict[str, Operation] = {
    **MOVES,
    **UNSIGNED,
    **UNSIGNED_OF_THREE,
    **SIGNED,
    **SIGNED_OF_THREE,
    **FLOAT,
    **FLOAT_OF_TWO,
    **FLOAT_OF_THREE,
    **ACCUMULATING,
    **HALF,
    **HALF_OF_THREE,
    **SHORT,
    **SHORT_OF_THREE,
    **SIGNED_SHORT,
    **WIDE,
}
SATURATING: dict[str, Compute] = {
    "v_add_u32": lambda a, b: np.where(a + b < a, u32(0xFFFFFFFF), a + b),
    "v_sub_u32": lambda a, b: np.where(b > a, u32(0), a - b),
}
COMPARISONS: dict[str, Compute] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lg": lambda a, b: (a < b) | (a > b),
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "neq": np.not_equal,
    "nlt": lambda a, b: ~(a < b),
    "nle": lambda a, b: ~(a <= b),
    "ngt": lambda a, b: ~(a > b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
}
