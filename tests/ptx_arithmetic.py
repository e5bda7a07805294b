# SPDX-License-Identifier: Apache-2.0
"""What instructions of PTX compute, for the lanes of a warp in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
KINDS: dict[str, Any] = {
    "f32": np.float32, "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "u64": np.uint64,
    "s64": np.int64, "b64": np.uint64, "u16": np.uint16, "f16": np.float16, "pred": np.uint64,
    "b8": np.uint8, "b16": np.uint16,
}  # fmt: skip
COMPARE: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip


def _divide(x: Array, y: Array) -> Array:
    return x / y if x.dtype == np.float32 else x // y


def _in_double(function: Callable[[Any], Any]) -> Callable[[Array], Array]:
    return lambda x: np.float32(function(x.astype(np.float64)))


def _field(x: Array, start: Array, length: Array) -> Array:
    size = length.astype(np.int64)
    field = x.astype(np.int64) >> start.astype(np.int64) & (np.int64(1) << size) - 1
    if x.dtype == np.int32:  # the field's first bit is its sign
        field -= (field >> np.maximum(size - 1, 0) & 1) << size
    return field.astype(x.dtype)


def _permuted(x: Array, y: Array, selection: Array) -> Array:
    """Return of 8 bytes those that a number's digits select."""
    both = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    word = np.zeros_like(both)
    for n in range(4):
        digit = selection.astype(np.uint64) >> np.uint64(4 * n) & np.uint64(15)
        assert (digit < 8).all(), "signs are not known here"
        byte = both >> digit * np.uint64(8) & np.uint64(255)
        word |= byte << np.uint64(8 * n)
    return word.astype(np.uint32)


# by the first part of their names
PLAIN: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative,
    "abs": np.abs, "min": np.minimum, "max": np.maximum, "shl": np.left_shift,
    "shr": np.right_shift, "mov": lambda x: x, "mad": lambda x, y, z: x * y + z,
    "rcp": _in_double(np.reciprocal), "ex2": _in_double(np.exp2), "lg2": _in_double(np.log2),
    "rsqrt": _in_double(lambda x: 1 / np.sqrt(x)), "bfe": _field, "prmt": _permuted,
}  # fmt: skip


def compute(parts: Sequence[str], values: Sequence[Array]) -> Array:
    """Return what an instruction without memory gives; ``parts`` are those of its name."""
    name = parts[0]
    if parts[-1] == "pred":
        values = [x != 0 for x in values]
    with np.errstate(all="ignore"):
        if name == "setp":
            return np.asarray(COMPARE[parts[1]](*values))
        if name == "fma":
            return _fused("rm" in parts, *values)
        if parts[:2] == ["mul", "hi"]:
            assert parts[2] == "u32", parts
            return (values[0].astype(np.uint64) * values[1] >> np.uint64(32)).astype(np.uint32)
        return np.asarray(PLAIN[name](*values))


def _fused(rounds_down: bool, x: Array, y: Array, z: Array) -> Array:
    exact = x.astype(np.float64) * y + z
    rounded = exact.astype(np.float32)
    if rounds_down:
        below = np.nextafter(rounded, np.float32(-np.inf))
        return np.where(rounded > exact, below, rounded)
    return rounded


def from_bfloat16(bits: Array) -> Array:
    """Return the numbers that bits are."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: Array) -> Array:
    """Return float32 rounded to bfloat16, in the lower half of a word."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    return bits + np.uint32(0x7FFF) + odd >> np.uint32(16)


def to_float16(x: Array) -> Array:
    """Return float32 rounded to float16, in the lower half of a word."""
    return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def matrix_product(
    a: Sequence[Array], b: Sequence[Array], c: Sequence[Array], kind: str
) -> list[Array]:
    """Place a warp's operands as the manual's tables of fragments do, and multiply.

    Args:
        a: words of [16, depth], four for a depth of 16 and two for 8.
        b: words of [depth, 8].
        c: floats of [16, 8].
        kind: ``bf16`` or ``f16``, of the halves of words.
    """
    lane = np.arange(32)
    g, t, depth = lane // 4, lane % 4, 8 * len(b)
    A, B = np.zeros((16, depth)), np.zeros((depth, 8))
    for n, word in enumerate(a):
        for half in range(2):
            A[g + 8 * (n % 2), 2 * t + 8 * (n // 2) + half] = _half(word, half, kind)
    for n, word in enumerate(b):
        for half in range(2):
            B[2 * t + 8 * n + half, g] = _half(word, half, kind)
    C = A @ B
    sums = (C[g + 8 * (n // 2), 2 * t + n % 2] + c[n] for n in range(4))
    return [np.float32(total) for total in sums]


def _half(word: Array, half: int, kind: str) -> Array:
    if kind == "f16":
        return (word >> np.uint32(16 * half)).astype(np.uint16).view(np.float16)
    shifted = word if half else word << np.uint32(16)
    return np.ascontiguousarray(shifted & np.uint32(0xFFFF0000)).view(np.float32)
