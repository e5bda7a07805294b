# SPDX-License-Identifier: Apache-2.0
"""Device functions of the causal convolution: where its inputs are, and their weighted sum.

A sequence's inputs are numbered from its first in the call; those before 0 are the W - 1 columns
of its window, oldest first.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gdn_backend_triton.maths import activate

VECTOR = tl.constexpr(8)  # channels that a thread takes at once
VECTOR_BITS = tl.constexpr(3)


def strides(tensor: Tensor | None, axes: int) -> tuple[int, ...]:
    """Return the strides of a tensor of ``axes`` axes, zeros for one that is not given."""
    return (0,) * axes if tensor is None else tensor.stride()


@triton.jit
def load_weight(weight, d, mask, weight_d, weight_w, W: tl.constexpr):
    """Return the W columns of the weight at channels ``d``, in float32."""
    columns = tl.tuple([])
    for i in tl.static_range(W):
        column = tl.load(weight + d * weight_d + i * weight_w, mask=mask, other=0.0)
        columns = columns + (column.to(tl.float32),)
    return columns


@triton.jit
def _apart(vectors, COUNT: tl.constexpr):
    """Return the columns of [COUNT, VECTOR], which stay in the registers they are in."""
    parts = (tl.reshape(vectors, [COUNT, 2, 2, 2]),)
    for _ in tl.static_range(VECTOR_BITS):
        evens = tl.tuple([])
        odds = tl.tuple([])
        for i in tl.static_range(len(parts)):
            even, odd = tl.split(parts[i])
            evens = evens + (even,)
            odds = odds + (odd,)
        parts = evens + odds
    return parts


@triton.jit
def _together(parts, COUNT: tl.constexpr):
    """Return [COUNT * VECTOR] of VECTOR columns [COUNT]."""
    for _ in tl.static_range(VECTOR_BITS):
        joined = tl.tuple([])
        for i in tl.static_range(len(parts) // 2):
            joined = joined + (tl.join(parts[i], parts[len(parts) // 2 + i]),)
        parts = joined
    return tl.reshape(parts[0], [COUNT * VECTOR])


@triton.jit
def load_columns(rows, mask, COUNT: tl.constexpr, N: tl.constexpr):
    """Return the N columns of channels whose numbers lie one behind another, loaded as vectors.

    Args:
        rows: points to the first channel's first number.
        mask: [COUNT, 1], of VECTOR channels each; zeros where it is false.
        COUNT: channels divided by VECTOR.
        N: numbers of a channel.
    """
    at = tl.arange(0, COUNT)[:, None] * (VECTOR * N) + tl.arange(0, VECTOR)[None, :]
    numbers = tl.tuple([])
    for i in tl.static_range(N):
        numbers = numbers + _apart(tl.load(rows + at + i * VECTOR, mask=mask, other=0.0), COUNT)
    columns = tl.tuple([])
    for n in tl.static_range(N):
        column = tl.tuple([])
        for c in tl.static_range(VECTOR):
            column = column + (numbers[c * N + n],)
        columns = columns + (_together(column, COUNT),)
    return columns


@triton.jit
def store_columns(rows, columns, mask, COUNT: tl.constexpr, N: tl.constexpr):
    """Store N columns of channels, see :func:`load_columns`."""
    at = tl.arange(0, COUNT)[:, None] * (VECTOR * N) + tl.arange(0, VECTOR)[None, :]
    numbers = tl.tuple([])
    for n in tl.static_range(N):
        numbers = numbers + _apart(columns[n], COUNT)
    for i in tl.static_range(N):
        vector = tl.tuple([])
        for place in tl.static_range(i * VECTOR, i * VECTOR + VECTOR):
            vector = vector + (numbers[place % N * VECTOR + place // N],)
        values = tl.reshape(_together(vector, COUNT), [COUNT, VECTOR])
        tl.store(rows + at + i * VECTOR, values, mask=mask)


@triton.jit
def load_bias(bias, d, mask, bias_d):
    """Return the bias at channels ``d`` in float32, zeros where there is none."""
    if bias is None:
        return tl.zeros(d.shape, tl.float32)
    else:
        return tl.load(bias + d * bias_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def input_at(position, x, x_t, window, window_l, mask, has_window, W: tl.constexpr):
    """Return the inputs at a position in float32, 0 before the first where there is no window.

    Args:
        position: from 1 - W on.
        x: pointers to the inputs at position 0.
        x_t: stride of a position.
        window: pointers to column 0 of the window.
        window_l: stride of a column.
        mask: which channels there are; nothing is read where it is false.
        has_window: whether the window is read.
        W: width of the convolution.
    """
    new = tl.load(x + position.to(tl.int64) * x_t, mask=mask & (position >= 0), other=0.0)
    column = tl.where(position < 0, position + W - 1, 0)
    reads = mask & has_window & (position < 0)
    old = tl.load(window + column * window_l, mask=reads, other=0.0)
    return tl.where(position < 0, old.to(tl.float32), new.to(tl.float32))


@triton.jit
def window_after(count, x, x_t, window, window_l, mask, has_window, W: tl.constexpr):
    """Return the columns of the window after ``count`` inputs, see :func:`input_at`."""
    columns = tl.tuple([])
    for i in tl.static_range(W - 1):
        column = input_at(count + (i + 1 - W), x, x_t, window, window_l, mask, has_window, W)
        columns = columns + (column,)
    return columns


@triton.jit
def store_window(window, window_l, columns, mask, W: tl.constexpr):
    """Store the columns of a window at pointers to its column 0."""
    for i in tl.static_range(W - 1):
        tl.store(window + i * window_l, columns[i].to(window.dtype.element_ty), mask=mask)


@triton.jit
def convolve(inputs, FIRST: tl.constexpr, weight, bias, W: tl.constexpr, SILU: tl.constexpr):
    """Return the activated convolution of W inputs, oldest first, from number FIRST on."""
    total = bias
    for i in tl.static_range(W):
        total += inputs[FIRST + i].to(tl.float32) * weight[i]
    return activate(total, SILU)
