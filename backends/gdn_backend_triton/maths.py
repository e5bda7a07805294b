# SPDX-License-Identifier: Apache-2.0
"""Device functions for the maths that the kernels share, all in float32 and natural log."""

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.target_info import is_cuda, is_hip_cdna3

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # which knows no assembly
MOST_ROUNDED = tl.constexpr(2.0**-8)  # of the square of a unit vector's norm


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), and x itself above 20."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    # log(u) alone loses a small e; the quotient gives back what rounding took from u
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, log1p)


@triton.jit
def gates(a, b, A_log, dt_bias):
    """Return g and beta."""
    g = -tl.exp(A_log.to(tl.float32)) * softplus(a.to(tl.float32) + dt_bias.to(tl.float32))
    return g, tl.sigmoid(b.to(tl.float32))


@triton.jit
def correction(squares):
    """Return what makes up in beta for what rounding did to unit vectors with those squares."""
    # farther from 1 is no rounding: a key near zero
    is_rounded = tl.abs(squares - 1.0) < MOST_ROUNDED
    return tl.where(is_rounded, 1.0 / tl.where(is_rounded, squares, 1.0), 1.0)


@triton.jit
def silu(x):
    """Return x * sigmoid(x), by a reciprocal that is an instruction."""
    return libdevice.fast_dividef(x, 1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def activate(x, SILU: tl.constexpr):
    """Return silu(x), or x."""
    if SILU:
        x = silu(x)
    return x


@triton.jit
def upper_half(x):
    """Return x without the lower half of its bits, in bfloat16, and what is left.

    Three of these hold all bits of a float32, and cost less than rounding does.
    """
    bits = x.to(tl.uint32, bitcast=True) & 0xFFFF0000
    half = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return half, x - bits.to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return x rounded to ``dtype``.

    gfx942 has no instruction for bfloat16, and what LLVM has instead takes four and a half for a
    number. There ties go away from zero, which takes one and a half.
    """
    if is_hip_cdna3() and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True) + 0x8000
        y = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def widened(x):
    """Return numbers of 16 bits, used as they are as well, in float32.

    On NVIDIA bfloat16 is rounded in pairs where it is only used in pairs, else number by number,
    by a unit with an eighth of the rate; so here pairs are taken apart.
    """
    if is_cuda() and x.dtype == tl.bfloat16 and not INTERPRETED:
        y = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def squares_of(rows):
    """Return the sums of squares of rows [., K]."""
    rows = widened(rows)
    return tl.sum(rows * rows, 1)


@triton.jit
def halves(x, dtype: tl.constexpr):
    """Return x rounded to ``dtype``, and what that took from it, rounded as well."""
    high = rounded(x, dtype)
    return high, rounded(x - widened(high), dtype)


@triton.jit
def add_pairs(a, b, c, d):
    """Add two numbers at once, for a reduction."""
    return a + c, b + d


@triton.jit
def add_triples(a, b, c, d, e, f):
    """Add three numbers at once, for a reduction."""
    return a + d, b + e, c + f
