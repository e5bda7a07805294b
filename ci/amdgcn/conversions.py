# SPDX-License-Identifier: Apache-2.0
"""The vector operations that convert between types, or take floats apart, as a table."""

from __future__ import annotations

from typing import Any

import numpy as np

from ci.amdgcn.arithmetic import Compute, Operation
from ci.amdgcn.float_formats import from_bfloat16, half_bits, to_bfloat16
from ci.amdgcn.waves import Array

f16, f32, f64 = np.float16, np.float32, np.float64
i16, i32, i64 = np.int16, np.int32, np.int64
u16, u32 = np.uint16, np.uint32


def _to_integer(dtype: type[np.integer[Any]]) -> Compute:
    """Return what rounds towards zero, to the nearest number there is, and NaN to zero."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max

    def convert(x: Array) -> Array:
        whole = np.nan_to_num(np.trunc(np.asarray(x, f64)), nan=0.0, posinf=high, neginf=low)
        return np.clip(whole, low, high).astype(i64).astype(dtype)

    return convert


CONVERSIONS: dict[str, Operation] = {
    "v_cvt_f32_u32": Operation(f32, (u32,), lambda a: np.asarray(a, f32)),
    "v_cvt_f32_i32": Operation(f32, (i32,), lambda a: np.asarray(a, f32)),
    "v_cvt_u32_f32": Operation(u32, (f32,), _to_integer(u32)),
    "v_cvt_i32_f32": Operation(i32, (f32,), _to_integer(i32)),
    "v_cvt_f32_ubyte0": Operation(f32, (u32,), lambda a: (a & u32(255)).astype(f32)),
    "v_cvt_f32_bf16": Operation(f32, (u16,), from_bfloat16),
    "v_cvt_f32_f16": Operation(f32, (f16,), lambda a: np.asarray(a, f32)),
    "v_cvt_f16_f32": Operation(f16, (f32,), lambda a: np.asarray(a, f16)),
    "v_cvt_f16_u16": Operation(f16, (u16,), lambda a: np.asarray(a, f16)),
    "v_cvt_f16_i16": Operation(f16, (i16,), lambda a: np.asarray(a, f16)),
    "v_cvt_u16_f16": Operation(u16, (f16,), _to_integer(u16)),
    "v_cvt_i16_f16": Operation(i16, (f16,), _to_integer(i16)),
    "v_ldexp_f32": Operation(
        f32, (f32, i32), lambda a, b: np.ldexp(np.asarray(a, f64), b).astype(f32)
    ),
    "v_frexp_exp_i32_f32": Operation(
        i32, (f32,), lambda a: np.where(np.isfinite(a), np.frexp(a)[1], 0).astype(i32)
    ),
    "v_pack_b32_f16": Operation(
        u32, (u16, u16), lambda a, b: np.asarray(a, u32) | (np.asarray(b, u32) << u32(16))
    ),
    "v_cvt_pk_bf16_f32": Operation(
        u32, (f32, f32), lambda a, b: to_bfloat16(a) | (to_bfloat16(b) << u32(16))
    ),
    "v_cvt_pk_f16_f32": Operation(
        u32, (f32, f32), lambda a, b: half_bits(a) | (half_bits(b) << u32(16))
    ),
}
