# SPDX-License-Identifier: Apache-2.0
"""What is computed of an item before its state is: X, the values, every head's R x R problem.

All is written in the functions of ``ptx`` alone, passed as ``ops``, so that it also runs on lanes
in NumPy. Rows of X, where 4 of a kind are enough: 0..3 the pending keys, 4..7 the new keys, 8..11
zeros, 12..15 the new queries; else 8 of each kind. A query's product then lies in the lane, and at
the place, where the tensor core leaves what D adds to it.
"""

from __future__ import annotations

from typing import NamedTuple

from gdn_backend_cuda.cute_replay.shape import (
    LOG2_E,
    TERMS,
    V_ROW,
    X_ROW,
    Item,
    K,
    Shape,
    Tensors,
    V,
    Value,
    W,
)


def _channel(ops, shape: Shape, head, n, j):
    """Return channel ``j`` of vector ``n``: q, k, or v of a key head's value head ``n - 2``."""
    if n < 2:
        return ops.wide(head * K + n * shape.H * K + j)
    return ops.wide((head * shape.heads + (n - 2)) * V + 2 * shape.H * K + j)


class Filter(NamedTuple):
    """The convolution's weights and bias of a channel."""

    factors: Value
    offset: Value


def fetch_filters(ops, shape: Shape, x: Tensors, head, j, vectors) -> list[Filter]:
    """Load the convolution's weights of a thread's channels."""
    filters = []
    for n in vectors:
        channel = _channel(ops, shape, head, n, j)
        weight = x.weight + channel * x.weight_d
        factors = [ops.global_u16(weight + i * x.weight_w) for i in range(W)]
        offset = ops.global_u16(x.bias + channel * x.bias_d) if shape.has_bias else None
        filters.append(Filter(factors, offset))
    return filters


class Channel(NamedTuple):
    """What a slot has of a channel: inputs in front of the drafts, and what is pending."""

    columns: Value
    old: Value


def _kept(ops, shape: Shape, x: Tensors, slot, head, n, j):
    """Return where a channel of k or of a v is kept, and from step to step."""
    if n == 1:
        kept, kept_p = x.kept_k + slot * x.kept_k_s + ops.wide(head) * x.kept_k_h, x.kept_k_p
    else:
        value_head = ops.wide(head * shape.heads + (n - 2))
        kept, kept_p = x.kept_v + slot * x.kept_v_s + value_head * x.kept_v_h, x.kept_v_p
    return kept + ops.wide(j) * 2, kept_p


def fetch_drafts(ops, shape: Shape, x: Tensors, row, head, j, vectors) -> list[Value]:
    """Load the new inputs of a thread's channels."""
    drafted = []
    for n in vectors:
        at = x.mixed + row * x.mixed_t + _channel(ops, shape, head, n, j) * x.mixed_d
        drafted.append([ops.global_u16(at + t * x.mixed_t) for t in range(shape.drafts)])
    return drafted


def fetch_channels(ops, shape: Shape, x: Tensors, item: Item, j, vectors) -> list[Channel]:
    """Load what a slot has of a thread's channels."""
    slot, pending, _, head = item
    channels = []
    for n in vectors:
        channel = _channel(ops, shape, head, n, j)
        window = x.window + slot * x.window_s + channel * x.window_d
        inputs = x.inputs + slot * x.inputs_s + channel * 2
        columns = []
        for i in range(W - 1):
            at = ops.wide(pending + (i + 1 - W))
            old = window + (at + (W - 1)) * x.window_l
            place = ops.select(at < 0, old, inputs + at * x.inputs_p)
            columns.append(ops.global_u16(place))
        old = []
        if n >= 1:
            kept, kept_p = _kept(ops, shape, x, slot, head, n, j)
            old = [ops.global_u16(kept + r * kept_p) for r in range(shape.room)]
        channels.append(Channel(columns, old))
    return channels


def gather(ops, shape: Shape, x: Tensors, item: Item, j, buffer, vectors, filters, drafted,
           channels) -> None:  # fmt: skip
    """Run the convolution on channel ``j`` of ``vectors``, put all into X and the values.

    The new drafts take the place of the pending ones, and the window moves up to the drafts.
    """
    slot, pending, _, head = item
    for n, (factors, offset), (columns, old), new in zip(
        vectors, filters, channels, drafted, strict=True
    ):
        columns = [*columns, *new]
        factors = [ops.here(factor) for factor in factors]
        channel = _channel(ops, shape, head, n, j)
        window = x.window + slot * x.window_s + channel * x.window_d
        inputs = x.inputs + slot * x.inputs_s + channel * 2
        if n < 2:
            target, pitch = buffer, X_ROW
        else:
            target, pitch = buffer + (shape.values + (n - 2) * shape.keys * V_ROW), V_ROW
        target = target + j * 2
        for r, word in enumerate(old):
            word = ops.select(pending > r, word, ops.no_bits())
            ops.put_u16(target + r * pitch, word)
        Q = shape.group
        first = shape.x_rows - Q if n == 0 else Q
        no_rows = [*range(len(old), Q)] if n else []
        for r in (*no_rows, *range(first + shape.drafts, first + Q)):
            ops.put_u16(target + r * pitch, ops.no_bits())
        for t in range(shape.drafts):
            y = ops.zero() if offset is None else ops.low_half(shape.dtype, ops.here(offset))
            for i in range(W):
                x_i, factor = (ops.low_half(shape.dtype, z) for z in (columns[t + i], factors[i]))
                y = y + x_i * factor
            if shape.has_silu:
                root = ops.reciprocal_root(ops.exp2(y * ops.number(-LOG2_E)) + ops.one())
                y = y * root * root
            word = ops.round_halves(shape.dtype, y, ops.zero())
            ops.put_u16(target + (first + t) * pitch, word)
            if n >= 1:
                kept, kept_p = _kept(ops, shape, x, slot, head, n, j)
                ops.store_u16_if(pending >= 0, kept + t * kept_p, word)
        for i in range(W - 1):
            ops.store_u16_if(pending > 0, window + i * x.window_l, columns[i])
        for t in range(shape.drafts):
            ops.store_u16_if(pending >= 0, inputs + t * x.inputs_p, columns[W - 1 + t])


def products(ops, shape: Shape, lane, buffer):
    """Return products of X's rows as the tensor core leaves them.

    All 16 rows times keys and times queries; or keys times 8 keys and 8 more, queries times both,
    and queries times queries.
    """
    g, t = lane >> 2, lane & 3
    count = 2 if shape.group == 4 else 5
    sums = [[(ops.zero(),) * 4] * count for _ in range(2)]
    for n in range(K // 16):
        at = buffer + g * X_ROW + t * 8 + n * 32
        words = [ops.shared_words(at + i * X_ROW, 2) for i in range(0, shape.x_rows, 8)]
        rows = (words[0][0], words[1][0], words[0][1], words[1][1])
        pairs = [(rows, words[0]), (rows, words[1])]
        if shape.group != 4:
            queries = (words[2][0], ops.no_bits(), words[2][1], ops.no_bits())
            pairs += [(queries, columns) for columns in words]
        sums[n & 1] = [
            ops.product16(*pair, x, shape.dtype) for pair, x in zip(pairs, sums[n & 1], strict=True)
        ]
    return [[x + y for x, y in zip(one, two, strict=True)] for one, two in zip(*sums, strict=True)]


def softplus(ops, x):
    """Return log(1 + exp(x)), and x itself above 20."""
    e = ops.exp(ops.select(x > 20.0, ops.number(20.0), x))
    u = ops.add(ops.one(), e)
    rest = ops.add(u, ops.number(-1.0))
    is_small = u == 1.0
    safe = ops.select(is_small, ops.one(), rest)
    log1p = ops.select(is_small, e, ops.log(u) * (e / safe))
    return ops.select(x > 20.0, x, log1p)


class Rates(NamedTuple):
    """What a layer has of a value head's gates."""

    A_log: Value
    dt_bias: Value


class Gates(NamedTuple):
    """What a lane has loaded of a value head's gates, of step ``lane % group``: new, then pending.

    Where there is no such step, of the last one there is.
    """

    a: Value
    b: Value
    g: Value
    beta: Value


class Decays(NamedTuple):
    """Of step ``lane % keys``: the sum of g up to it, coarse and the rest, and beta."""

    total: Value
    fine: Value
    beta: Value


def fetch_rates(ops, shape: Shape, x: Tensors, value_head) -> Rates:
    """Load what a layer has of a value head."""
    head = ops.wide(value_head)
    A_log = ops.global_float(x.A_log + head * 4)
    if shape.float32_dt_bias:
        return Rates(A_log, ops.global_float(x.dt_bias + head * 4))
    return Rates(A_log, ops.global_u16(x.dt_bias + head * 2))


def _step(ops, shape: Shape, lane, count: int):
    step = lane & (shape.group - 1)
    last = step * 0 + (count - 1)
    return ops.wide(step if count == shape.group else ops.select(step < count, step, last))


def _kept_gates(ops, shape: Shape, x: Tensors, slot, value_head, lane):
    """Return where g and beta are kept."""
    head, step = ops.wide(value_head), _step(ops, shape, lane, shape.room)
    g = x.kept_g + slot * x.kept_g_s + step * x.kept_g_p + head * x.kept_g_h
    beta = x.kept_beta + slot * x.kept_beta_s + step * x.kept_beta_p + head * x.kept_beta_h
    return g, beta


def fetch_new_gates(ops, shape: Shape, x: Tensors, row, value_head, lane) -> tuple[Value, Value]:
    """Load a value head's new gates."""
    head, token = ops.wide(value_head), row + _step(ops, shape, lane, shape.drafts)
    a = ops.global_u16(x.a + token * x.a_t + head * x.a_h)
    b = ops.global_u16(x.b + token * x.b_t + head * x.b_h)
    return a, b


def fetch_pending(ops, shape: Shape, x: Tensors, slot, value_head, lane) -> tuple[Value, Value]:
    """Load a value head's pending gates."""
    g, beta = _kept_gates(ops, shape, x, slot, value_head, lane)
    return ops.global_float(g), ops.global_float(beta)


def decays(ops, shape: Shape, x: Tensors, item: Item, value_head, lane, rates: Rates,
           gates: Gates) -> Decays:  # fmt: skip
    """Compute a value head's gates and keep them; return the sums."""
    Q = shape.group
    r, step = lane & (shape.keys - 1), lane & (Q - 1)
    a, b = (ops.low_half(shape.dtype, ops.here(x)) for x in (gates.a, gates.b))
    A_log = ops.shuffle(rates.A_log, lane)  # nothing waits where it is loaded
    dt_bias = rates.dt_bias if shape.float32_dt_bias else ops.low_half(shape.dtype, rates.dt_bias)
    g = ops.zero() - ops.exp(A_log) * softplus(ops, a + dt_bias)
    beta = ops.one() / (ops.one() + ops.exp(ops.zero() - b))
    ops.sync_warp()  # a lane keeps what is new where another has loaded what is pending
    is_new = (lane >= Q) & (lane < Q + shape.drafts)
    kept_g, kept_beta = _kept_gates(ops, shape, x, item.slot, value_head, lane)
    ops.store_float_if(is_new, kept_g, g)
    ops.store_float_if(is_new, kept_beta, beta)
    nothing = ops.zero()
    if shape.drafts < Q:
        g = ops.select(step < shape.drafts, g, nothing)
        beta = ops.select(step < shape.drafts, beta, nothing)
    g = ops.select(r < Q, ops.select(step < item.pending, gates.g, nothing), g)
    beta = ops.select(r < Q, ops.select(step < item.pending, gates.beta, nothing), beta)
    # sums of multiples of 2^-10 are exact; below -104 exp is 0
    g = ops.select(g < -104.0, ops.number(-104.0), g)
    total = ops.add(ops.add(g, ops.number(12288.0)), ops.number(-12288.0))
    fine = g - total
    for n in (1, 2, 4, 8)[: 3 if Q == 4 else 4]:
        others = ops.shuffle(total, (lane - n) & 31), ops.shuffle(fine, (lane - n) & 31)
        total = total + ops.select(r >= n, others[0], nothing)
        fine = fine + ops.select(r >= n, others[1], nothing)
    return Decays(total, fine, beta)


def solve(ops, shape: Shape, sums, of: Decays, lane, scratch, solved) -> None:
    """Solve the R x R problem of one value head."""
    g, t, r = lane >> 2, lane & 3, lane & (shape.keys - 1)
    Q, tiles, pitch = shape.group, shape.keys // 8, shape.keys * 4
    nothing = ops.zero()
    # of a row of a query, products with keys; and the place of its square
    asked = [sums[0][2:]] if Q == 4 else [x[:2] for x in sums[2:4]]
    own = sums[1][2:] if Q == 4 else sums[4][:2]
    # norms, in the lanes that hold the squares
    inverse, of_query = [ops.one()] * tiles, ops.number(shape.scale)
    if shape.has_norm:
        is_odd = (g & 1) == 1
        for m in range(tiles):
            square = ops.select(is_odd, sums[m][2 * m + 1], sums[m][2 * m])
            inverse[m] = ops.reciprocal_root(square + ops.number(1e-6))
        square = ops.select(is_odd, own[1], own[0])
        of_query = ops.reciprocal_root(square + ops.number(1e-6)) * of_query

    def norm_of(x, row):
        return ops.shuffle(x, row * 4 + (row >> 1)) if shape.has_norm else x

    # what couples steps; the last rows are also those of queries, whose decay is their key's
    queries = scratch + shape.keys * pitch
    for m in range(tiles):
        row = g + 8 * m
        total, fine, beta = (ops.shuffle(x, row) for x in of)
        norm, norm_query = norm_of(inverse[m], g), norm_of(of_query, g)
        for c in range(tiles):
            key_row, query_row = [], []
            for n in range(2):
                j = t * 2 + n
                column = j + 8 * c
                between = total - ops.shuffle(of.total, column)
                decay = ops.exp(between + (fine - ops.shuffle(of.fine, column)))
                other = norm_of(inverse[c], j)
                value = ops.zero() - beta * (sums[c][2 * m + n] * norm * other * decay)
                key_row.append(ops.as_word(ops.select(column < row, value, nothing)))
                if m == tiles - 1:
                    value = asked[c][n] * norm_query * other * decay
                    query_row.append(ops.as_word(ops.select(column <= row, value, nothing)))
            at = g * pitch + c * 32 + t * 8
            ops.put_words(scratch + m * (8 * pitch) + at, key_row)
            if m == tiles - 1:
                ops.put_words(queries + at, query_row)
    _keep_decays(ops, shape, of, lane, norm_of, inverse, of_query, solved)
    ops.sync_warp()
    # column r of the solution; lanes with the same column have different queries and pending keys
    rows: list[Value] = []

    def product(total, at, count):
        for first in range(0, count, 4):
            words = ops.shared_words(at + first * 4, 4)
            for word, row in zip(words, rows[first:count], strict=False):
                total = total + ops.as_float(word) * row
        return total

    for i in range(shape.keys):
        row = product(ops.select(r == i, of.beta, nothing), scratch + i * pitch, i)
        rows.append(row)
    if Q == 4:
        q = lane >> 3
        query = product(ops.zero(), queries + (q + Q) * pitch, shape.keys)
        key = ops.select(
            q < 2, ops.select(q == 0, rows[0], rows[1]), ops.select(q == 2, rows[2], rows[3])
        )
        kept = [(0, key), (Q, query)]
    else:
        half, kept = lane >> 4, []
        for m in range(4):
            q = half * 4 + m
            query = product(ops.zero(), queries + q * pitch, shape.keys)
            key = ops.select(half == 0, rows[m], rows[4 + m])
            kept += [(q - half, key), (q - half + Q, query)]
    for first, x in kept:
        at = solved + first * (2 * shape.keys) + lane * 2
        for term in range(TERMS):
            word, x, _ = ops.upper_halves(x, ops.zero())
            ops.put_u16(at + term * shape.term, word)


def _keep_decays(ops, shape: Shape, of: Decays, lane, norm_of, inverse, of_query, solved) -> None:
    """Keep what needs no substitution: what scales X's rows for Y, and pending keys in the end."""
    Q, nothing = shape.group, ops.zero()
    r = lane & 7
    old, old_fine = ops.shuffle(of.total, Q - 1), ops.shuffle(of.fine, Q - 1)
    total, fine = of.total, of.fine
    norm = norm_of(inverse[0], r)
    if Q == 4:
        is_row, place = (lane < shape.keys) | (lane >= 12), lane & 15
        norm = ops.select(lane < shape.keys, norm, norm_of(of_query, r))
    else:
        # lanes 16 to 23 have the queries, whose keys are those of 8 to 15
        key = ops.select(lane < 16, lane, lane - 8)
        total, fine = ops.shuffle(total, key), ops.shuffle(fine, key)
        norm = ops.select(lane < 8, norm, norm_of(inverse[1], r))
        is_row, place = lane < shape.x_rows, lane
        norm = ops.select(lane < 16, norm, norm_of(of_query, r))
    decay = ops.select(is_row, norm * ops.exp(total + fine), nothing)
    ops.put_float_if(lane < shape.x_rows, solved + shape.decay_at + place * 4, decay)
    left = norm * ops.exp((old - total) + (old_fine - fine))
    whole = ops.select(lane == shape.keys, ops.exp(old + old_fine), nothing)
    left = ops.select(lane < Q, left, whole)
    ops.put_float_if(lane <= shape.keys, solved + shape.left_at + place * 4, left)
