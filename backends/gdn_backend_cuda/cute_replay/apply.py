# SPDX-License-Identifier: Apache-2.0
"""What a warp computes of a tile of the state: products with X, outputs, and the change.

Written in the functions of ``ptx`` alone, as ``solve`` is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from gdn_backend_cuda.cute_replay.shape import (
    ROWS,
    TERMS,
    V_ROW,
    X_ROW,
    Item,
    K,
    Shape,
    Tensors,
    Value,
)

# by dtype: how many terms of bfloat16 hold all bits of a number, and so many of a state's change
TERMS_OF = {"float32": TERMS, "bfloat16": 1, "float16": 2}
CHANGES = {"float32": TERMS, "bfloat16": 2, "float16": 2}


def _cut(ops, numbers):
    """Return the upper halves of numbers, two a word, and what is left of them."""
    words, rests = [], []
    for i in range(0, len(numbers), 2):
        word, *rest = ops.upper_halves(*numbers[i : i + 2])
        words.append(word)
        rests += rest
    return words, rests


def _terms(ops, numbers, count: int):
    """Return numbers as so many terms of bfloat16, the words of each."""
    terms = []
    for _ in range(count):
        words, numbers = _cut(ops, numbers)
        terms.append(words)
    return terms


def _terms_of_X(ops, shape: Shape, words):
    """Return words of numbers of X as terms of bfloat16, the words of each."""
    if shape.dtype == "bfloat16":
        return [words]
    halves = [half(shape.dtype, w) for w in words for half in (ops.low_half, ops.high_half)]
    return _terms(ops, halves, TERMS_OF[shape.dtype])


def _floats(ops, shape: Shape, words):
    """Return the numbers of a row of the state that words hold."""
    if shape.is_float32:
        return [ops.as_float(word) for word in words]
    return [half(shape.state, w) for w in words for half in (ops.low_half, ops.high_half)]


def _words(ops, shape: Shape, row):
    """Return the words that hold numbers of a row of the state, rounded to its dtype."""
    if shape.is_float32:
        return [ops.as_word(x) for x in row]
    return [ops.round_halves(shape.state, *row[i : i + 2]) for i in range(0, len(row), 2)]


def _pairs(words):
    return [words[i : i + 2] for i in range(0, len(words), 2)]


def _column(shape: Shape, n, t):
    """Return the first of the four columns of K that lane ``t`` of a quad has in block ``n``."""
    return n * 16 + t * 4 if shape.is_float32 else (n // 2) * 32 + t * 8 + (n % 2) * 4


def _for_Y(ops, shape: Shape, lane, buffer, n):
    """Return block ``n`` of X's columns, by 8 rows, as terms for the products with the state."""
    g, t = lane >> 2, lane & 3
    at = buffer + g * X_ROW + _column(shape, n, t) * 2
    words = [w for i in range(0, shape.x_rows, 8) for w in ops.shared_words(at + i * X_ROW, 2)]
    return [_pairs(term) for term in _terms_of_X(ops, shape, words)]


def _for_change(ops, shape: Shape, lane, buffer, n):
    """Return the two halves of block ``n`` of the pending keys' columns, as terms."""
    g, t = lane >> 2, lane & 3
    at = buffer + t * (2 * X_ROW) + (_column(shape, n, g >> 1) + (g & 1)) * 2
    words = []
    for half in range(2):
        for i in range(shape.octets):
            row = at + half * 4 + i * (8 * X_ROW)
            word = ops.pair(ops.shared_u16(row), ops.shared_u16(row + X_ROW))
            words.append(ops.select(t < 2, word, ops.no_bits()) if shape.group == 4 else word)
    terms = _terms_of_X(ops, shape, words)
    return [(term[: shape.octets], term[shape.octets :]) for term in terms]


class Operands(NamedTuple):
    """X as the tensor core takes it, by block of K."""

    for_Y: Callable[[int], Value]
    for_change: Callable[[int], Value]


def operands(ops, shape: Shape, lane, buffer) -> Operands:
    """Return X's operands: what is held for all tiles or, where X is too large, loaded for each."""
    loads = [partial(load, ops, shape, lane, buffer) for load in (_for_Y, _for_change)]
    if shape.group == 16:
        return Operands(*loads)
    return Operands(*[[load(n) for n in range(K // 16)].__getitem__ for load in loads])


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
    """Return two of K's blocks, four of 16 bits, as words of rows 2g and 2g + 1."""
    low = _load_chunks(ops, at, is_odd, n)
    high = _load_chunks(ops, at + pitch, is_odd, n)
    blocks = []
    for x, y in zip(low, high, strict=True):
        if shape.is_float32:
            blocks.append((x, y))
        else:
            blocks += [(x[:2], y[:2]), (x[2:], y[2:])]
    return blocks


def multiply(ops, shape: Shape, lane, tile, X: Operands):
    """Multiply a warp's rows by X; return products with every 8 rows of it, the last queries.

    ``tile`` is [16, K] of the state; row 2g is the tensor core's g, 2g + 1 its g + 8.
    """
    g, t = lane >> 2, lane & 3
    is_odd = (g & 1) == 1
    pitch = shape.tile // ROWS
    at = tile + g * (2 * pitch) + t * 16
    terms = TERMS_OF[shape.state]
    zeros = (ops.zero(),) * 4
    tiles = shape.x_rows // 8
    sums = [[zeros] * tiles for _ in range(terms)]
    per_pair = 2 if shape.is_float32 else 4
    for n in range(0, pitch // 64, 2):
        for i, (low, high) in enumerate(_blocks(ops, shape, at, pitch, is_odd, n)):
            S, rest = (low[0], high[0], low[1], high[1]), []
            block = X.for_Y(n // 2 * per_pair + i)
            if shape.state != "bfloat16":
                low, high = _floats(ops, shape, low), _floats(ops, shape, high)
                rest = [*low[:2], *high[:2], *low[2:], *high[2:]]
            for term in range(terms):
                if rest:
                    S, rest = _cut(ops, rest)
                # the last terms of both are below what float32 holds
                for factor in block[: max(TERMS - term, 1)]:
                    for m in range(tiles):
                        sums[term][m] = ops.product16(S, factor[m], sums[term][m])
    products = []
    for m in range(tiles):
        total = sums[-1][m]
        for term in range(terms - 2, -1, -1):
            total = [a + b for a, b in zip(total, sums[term][m], strict=True)]
        products.append(total)
    return products


def _factors(ops, shape: Shape, at, g, t):
    """Return a term of what D sums as the tensor core takes it, by 8 columns of D."""
    pitch = 2 * shape.keys
    row = at + g * pitch + t * 4
    return [
        [ops.shared_words(row + column * pitch + i, 1)[0] for i in range(0, pitch, 16)]
        for column in range(0, 2 * shape.group, 8)
    ]


def _product(ops, a, b, c):
    """Return c and what words of a times those of b are, 16 of what is summed at a time or 8."""
    if len(b) == 1:
        return ops.product8(a, b[0], c)
    for i in range(0, len(b), 2):
        c = ops.product16(a[2 * i : 2 * i + 4], b[i : i + 2], c)
    return c


def _out(ops, x: Tensors, value_head, first_row, g):
    """Return where the outputs of rows 2g and 2g + 1 are, of a sequence in row 0."""
    return x.out + ops.wide(value_head) * x.out_h + ops.wide(first_row + g * 2) * 2


def attend(
    ops, shape: Shape, x: Tensors, item: Item, value_head, lane, first_row, values, solved, products
):
    """Compute Y and D of a warp's rows, store outputs.

    Return what multiplies every 8 rows of X in the change.
    """
    g, t = lane >> 2, lane & 3
    zeros = (ops.zero(),) * 4
    Y = []
    for m, product in enumerate(products):
        at = solved + shape.decay_at + m * 32 + t * 8
        decay = [ops.as_float(w) for w in ops.shared_words(at, 2)]
        Y.append([product[i] * decay[i & 1] for i in range(4)])
    rest = []
    for m in range(shape.keys // 8):
        at = values + (m * 8 + t * 2) * V_ROW + (first_row + g * 2) * 2
        v = [ops.shared_words(at + i * V_ROW, 1)[0] for i in range(2)]
        v = [half(shape.dtype, word) for half in (ops.low_half, ops.high_half) for word in v]
        rest += [v[i] - Y[m][i] for i in range(4)]
    factors = [_factors(ops, shape, solved + term * shape.term, g, t) for term in range(TERMS)]
    D = [zeros] * len(factors[0])
    for i in range(TERMS):
        cut, rest = _cut(ops, rest)
        for j in range(TERMS - i):
            D = [_product(ops, cut, F, d) for F, d in zip(factors[j], D, strict=True)]
    out = _out(ops, x, value_head, first_row, g)
    for m in range(shape.octets):
        o = [y + d for y, d in zip(Y[m - shape.octets], D[m - shape.octets], strict=True)]
        draft = ops.select(t < 2, t, t * 2 - 4) if shape.group == 4 else t * 2 + m * 8
        at = out + (item.row + ops.wide(draft)) * x.out_t
        for i in range(2):
            is_query = draft + i < shape.drafts
            if shape.group == 4:
                is_query = (t >= 2) & is_query
            word = ops.round_halves(shape.dtype, o[i], o[2 + i])
            ops.store_word_if(is_query, at + i * x.out_t, word)
    changes = []
    for m in range(shape.octets):
        at = solved + shape.left_at + m * 32 + t * 8
        left = [ops.as_float(w) for w in ops.shared_words(at, 2)]
        change = [D[m][i] * left[i & 1] for i in range(4)]
        if shape.group == 4:
            # pending and queries share the columns of D
            change = [ops.select(t < 2, d, ops.zero()) for d in change]
        changes += change
    return changes


def update(ops, shape: Shape, lane, tile, solved, changes, X: Operands) -> None:
    """Decay a warp's rows of the state in shared memory, and add the change."""
    g, t = lane >> 2, lane & 3
    is_odd = (g & 1) == 1
    pitch = shape.tile // ROWS
    at = tile + g * (2 * pitch) + t * 16
    decay = ops.shared_float(solved + shape.whole_at)
    terms = _terms(ops, changes, CHANGES[shape.state])
    per_pair = 2 if shape.is_float32 else 4
    for n in range(0, pitch // 64, 2):
        low_words, high_words = [], []
        for i, (low, high) in enumerate(_blocks(ops, shape, at, pitch, is_odd, n)):
            low, high = _floats(ops, shape, low), _floats(ops, shape, high)
            block = X.for_change(n // 2 * per_pair + i)
            changed = []
            for half in range(2):
                S = [low[2 * half], low[2 * half + 1], high[2 * half], high[2 * half + 1]]
                S = tuple(s * decay for s in S)
                for m, term in enumerate(terms):
                    for factor in block[: len(terms) - m]:
                        S = _product(ops, term, factor[half], S)
                changed.append(S)
            a, b = changed
            low_words += _words(ops, shape, (*a[:2], *b[:2]))
            high_words += _words(ops, shape, (*a[2:], *b[2:]))
        _put_chunks(ops, at, is_odd, n, low_words[:4], low_words[4:])
        _put_chunks(ops, at + pitch, is_odd, n, high_words[:4], high_words[4:])


def zeros(ops, shape: Shape, x: Tensors, item: Item, value_head, lane, first_row) -> None:
    """Store the outputs of a padded slot."""
    g, t = lane >> 2, lane & 3
    out = _out(ops, x, value_head, first_row, g)
    for first in range(0, shape.drafts, 4):
        at = out + (item.row + ops.wide(t + first)) * x.out_t
        ops.store_word_if(t + first < shape.drafts, at, ops.no_bits())
