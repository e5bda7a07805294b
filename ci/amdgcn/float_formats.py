# SPDX-License-Identifier: Apache-2.0
"""Conversions between float formats that numpy does not have, or rounds otherwise."""

from __future__ import annotations

import numpy as np

from ci.amdgcn.waves import Array

_SIGN_AND_EXPONENT = np.uint32(0xFF800000)
_XF32 = np.uint32(0xFFFFE000)  # sign, exponent and 10 bits of the mantissa


def to_bfloat16(x: Array) -> Array:
    """Return float32 rounded to the nearest bfloat16, ties to even, as uint32 below 2**16."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), (bits >> np.uint32(16)) | np.uint32(0x40), rounded)


def from_bfloat16(bits: Array) -> Array:
    """Return bfloat16, given as its bits, as float32."""
    wide = np.asarray(bits).astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


def to_xf32(x: Array) -> Array:
    """Return float32 cut to the 10 bits of mantissa that XF32 instructions keep."""
    return (x.view(np.uint32) & _XF32).view(np.float32)


def half_bits(x: Array) -> Array:
    """Return float32 rounded to float16, as uint32 below 2**16."""
    return np.asarray(x, np.float32).astype(np.float16).view(np.uint16).astype(np.uint32)


def exponent(x: Array) -> Array:
    """Return the biased exponent of float32 as int32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits & _SIGN_AND_EXPONENT) << np.uint32(1) >> np.uint32(24)).astype(np.int32)


def classify(x: Array) -> Array:
    """Return the class of float32 as uint32, as ``v_cmp_class_f32`` numbers them."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    negative = bits >> np.uint32(31) == 1
    mantissa = bits & np.uint32(0x7FFFFF)
    is_nan = np.isnan(x)
    conditions = [
        is_nan & (mantissa >> np.uint32(22) == 0),  # signalling
        is_nan,
        np.isinf(x),
        x == 0,
        exponent(x) == 0,  # denormal
    ]
    below = [np.zeros_like(bits), np.ones_like(bits)]
    finite = [np.where(negative, a, b).astype(np.uint32) for a, b in ((2, 9), (5, 6), (4, 7))]
    normal = np.where(negative, 3, 8).astype(np.uint32)
    return np.select(conditions, [*below, *finite], normal)
