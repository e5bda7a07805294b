# SPDX-License-Identifier: Apache-2.0
"""What a warp computes of a tile of the state: products with X, outputs, and the change.

Written in the functions of ``ptx`` alone, as ``solve`` is.
"""

from __future__ import annotations

from gdn_backend_cuda.cute_replay.shape import (
    DECAY,
    KEYS,
    LEFT,
    ROWS,
    TERMS,
    V_ROW,
    X_ROW,
    Item,
    K,
    Shape,
    Tensors,
)


def _column(shape: Shape, n, t):
    """Return the first of the four columns of K that lane ``t`` of a quad has in block ``n``."""
    return n * 16 + t * 4 if shape.is_float32 else (n // 2) * 32 + t * 8 + (n % 2) * 4


def operands(ops, shape: Shape, lane, buffer):
    """Return X as the tensor core takes it: for Y, by block of K; for the change, likewise."""
    g, t = lane >> 2, lane & 3
    for_Y, for_change = [], []
    for n in range(K // 16):
        at = buffer + g * X_ROW + _column(shape, n, t) * 2
        for_Y.append((ops.shared_words(at, 2), ops.shared_words(at + 8 * X_ROW, 2)))
        at = buffer + t * (2 * X_ROW) + (_column(shape, n, g >> 1) + (g & 1)) * 2
        halves = []
        for i in range(2):
            word = ops.pair(ops.shared_u16(at + i * 4), ops.shared_u16(at + i * 4 + X_ROW))
            halves.append(ops.select(t < 2, word, ops.no_bits()))
        for_change.append(tuple(halves))
    return for_Y, for_change


def _load_chunks(ops, at, is_odd, n):
    """Return chunks n and n + 1 of 64 bytes of one row, four words each.

    Rows are a multiple of all banks apart: every other one is read in the other order.
    """
    swap = ops.select(is_odd, at * 0 + 64, at * 0)
    one = ops.shared_words(at + n * 64 + swap, 4)
    two = ops.shared_words(at + n * 64 + 64 - swap, 4)
    first = tuple(ops.select(is_odd, y, x) for x, y in zip(one, two, strict=True))
    second = tuple(ops.select(is_odd, x, y) for x, y in zip(one, two, strict=True))
    return first, second


def _put_chunks(ops, at, is_odd, n, first, second) -> None:
    swap = ops.select(is_odd, at * 0 + 64, at * 0)
    one = tuple(ops.select(is_odd, y, x) for x, y in zip(first, second, strict=True))
    two = tuple(ops.select(is_odd, x, y) for x, y in zip(first, second, strict=True))
    ops.put_words(at + n * 64 + swap, one)
    ops.put_words(at + n * 64 + 64 - swap, two)


def _blocks(ops, shape: Shape, at, pitch, is_odd, n):
    """Return two of K's blocks, four for bfloat16, as words of rows 2g and 2g + 1."""
    low = _load_chunks(ops, at, is_odd, n)
    high = _load_chunks(ops, at + pitch, is_odd, n)
    blocks = []
    for x, y in zip(low, high, strict=True):
        if shape.is_float32:
            blocks.append((x, y))
        else:
            blocks += [(x[:2], y[:2]), (x[2:], y[2:])]
    return blocks


def multiply(ops, shape: Shape, lane, tile, for_Y):
    """Multiply a warp's rows by X; return products with its keys and with its queries.

    ``tile`` is [16, K] of the state; row 2g is the tensor core's g, 2g + 1 its g + 8.
    """
    g, t = lane >> 2, lane & 3
    is_odd = (g & 1) == 1
    pitch = shape.tile // ROWS
    at = tile + g * (2 * pitch) + t * 16
    terms = TERMS if shape.is_float32 else 1
    zeros = (ops.zero(),) * 4
    sums = [[zeros, zeros] for _ in range(terms)]
    per_pair = 2 if shape.is_float32 else 4
    for n in range(0, pitch // 64, 2):
        for i, (low, high) in enumerate(_blocks(ops, shape, at, pitch, is_odd, n)):
            keys, queries = for_Y[n // 2 * per_pair + i]
            if not shape.is_float32:
                S = (low[0], high[0], low[1], high[1])
                sums[0][0] = ops.product16(S, keys, sums[0][0])
                sums[0][1] = ops.product16(S, queries, sums[0][1])
                continue
            rest = [ops.as_float(word) for word in (*low[:2], *high[:2], *low[2:], *high[2:])]
            for term in range(terms):
                S = []
                for m in range(4):
                    word, rest[2 * m], rest[2 * m + 1] = ops.upper_halves(*rest[2 * m : 2 * m + 2])
                    S.append(word)
                sums[term][0] = ops.product16(S, keys, sums[term][0])
                sums[term][1] = ops.product16(S, queries, sums[term][1])
    products = []
    for half in range(2):
        total = sums[-1][half]
        for term in range(terms - 2, -1, -1):
            total = [a + b for a, b in zip(total, sums[term][half], strict=True)]
        products.append(total)
    return products


def attend(
    ops, shape: Shape, x: Tensors, item: Item, value_head, lane, first_row, values, solved, products
):
    """Compute Y and D of a warp's rows, store outputs; return what multiplies X in the change."""
    g, t = lane >> 2, lane & 3
    zeros = (ops.zero(),) * 4
    Y = []
    for half in range(2):
        decay = [ops.as_float(w) for w in ops.shared_words(solved + DECAY + half * 32 + t * 8, 2)]
        Y.append([products[half][i] * decay[i & 1] for i in range(4)])
    at = values + t * (2 * V_ROW) + (first_row + g * 2) * 2
    v = [ops.shared_words(at + i * V_ROW, 1)[0] for i in range(2)]
    v = (ops.low_bf16(v[0]), ops.low_bf16(v[1]), ops.high_bf16(v[0]), ops.high_bf16(v[1]))
    rest = [v[i] - Y[0][i] for i in range(4)]
    D = zeros
    factors = [ops.shared_words(solved + term * 128 + lane * 4, 1)[0] for term in range(TERMS)]
    for i in range(TERMS):
        low, rest[0], rest[1] = ops.upper_halves(rest[0], rest[1])
        high, rest[2], rest[3] = ops.upper_halves(rest[2], rest[3])
        for j in range(TERMS - i):
            D = ops.product8((low, high), factors[j], D)
    o = [Y[1][i] + D[i] for i in range(4)]
    out = x.out + ops.wide(value_head) * x.out_h + ops.wide(first_row + g * 2) * 2
    draft = ops.select(t < 2, t, t * 2 - 4)
    at = out + (item.row + ops.wide(draft)) * x.out_t
    for i in range(2):
        is_query = (t >= 2) & (draft + i < shape.drafts)
        ops.store_word_if(is_query, at + i * x.out_t, ops.round_bf16(o[i], o[2 + i]))
    left = [ops.as_float(w) for w in ops.shared_words(solved + LEFT + t * 8, 2)]
    nothing = ops.zero()
    return tuple(ops.select(t < 2, D[i] * left[i & 1], nothing) for i in range(4))


def update(ops, shape: Shape, lane, tile, solved, D, for_change) -> None:
    """Decay a warp's rows of the state in shared memory, and add the change."""
    g, t = lane >> 2, lane & 3
    is_odd = (g & 1) == 1
    pitch = shape.tile // ROWS
    at = tile + g * (2 * pitch) + t * 16
    decay = ops.shared_float(solved + LEFT + KEYS * 4)
    rest, terms = list(D), []
    for _ in range(TERMS if shape.is_float32 else 2):
        low, rest[0], rest[1] = ops.upper_halves(rest[0], rest[1])
        high, rest[2], rest[3] = ops.upper_halves(rest[2], rest[3])
        terms.append((low, high))
    per_pair = 2 if shape.is_float32 else 4
    for n in range(0, pitch // 64, 2):
        low_words, high_words = [], []
        for i, (low, high) in enumerate(_blocks(ops, shape, at, pitch, is_odd, n)):
            if shape.is_float32:
                low = [ops.as_float(word) for word in low]
                high = [ops.as_float(word) for word in high]
            else:
                low = [f(word) for word in low for f in (ops.low_bf16, ops.high_bf16)]
                high = [f(word) for word in high for f in (ops.low_bf16, ops.high_bf16)]
            changed = []
            for half in range(2):
                S = [low[2 * half], low[2 * half + 1], high[2 * half], high[2 * half + 1]]
                S = tuple(s * decay for s in S)
                for term in terms:
                    S = ops.product8(term, for_change[n // 2 * per_pair + i][half], S)
                changed.append(S)
            a, b = changed
            if shape.is_float32:
                low_words += [ops.as_word(s) for s in (a[0], a[1], b[0], b[1])]
                high_words += [ops.as_word(s) for s in (a[2], a[3], b[2], b[3])]
            else:
                low_words += [ops.round_bf16(a[0], a[1]), ops.round_bf16(b[0], b[1])]
                high_words += [ops.round_bf16(a[2], a[3]), ops.round_bf16(b[2], b[3])]
        _put_chunks(ops, at, is_odd, n, low_words[:4], low_words[4:])
        _put_chunks(ops, at + pitch, is_odd, n, high_words[:4], high_words[4:])


def zeros(ops, shape: Shape, x: Tensors, item: Item, value_head, lane, first_row) -> None:
    """Store the outputs of a padded slot."""
    g, t = lane >> 2, lane & 3
    out = x.out + ops.wide(value_head) * x.out_h + ops.wide(first_row + g * 2) * 2
    token = item.row + ops.wide(t)
    ops.store_word_if(t < shape.drafts, out + token * x.out_t, ops.no_bits())
