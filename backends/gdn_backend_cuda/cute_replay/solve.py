# SPDX-License-Identifier: Apache-2.0
"""What is computed of an item before its state is: X, the values, every head's R x R problem.

All is written in the functions of ``ptx`` alone, passed as ``ops``, so that it also runs on lanes
in NumPy. Rows of X, where 4 of a kind are enough: 0..3 the pending keys, 4..7 the new keys, 8..11
zeros, 12..15 the new queries; else 8 or 16 of each kind. A query's product then lies in the lane,
and at the place, where the tensor core leaves what D adds to it.
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
    """What a slot has: of a channel inputs in front of the drafts; of what is pending some words.

    They are two words, 4 channels, of every fourth row.
    """

    columns: Value
    old: Value


def _kept(ops, shape: Shape, x: Tensors, slot, head, n):
    """Return where k or a v is kept, and from step to step."""
    if n == 1:
        kept, kept_p = x.kept_k + slot * x.kept_k_s + ops.wide(head) * x.kept_k_h, x.kept_k_p
    else:
        value_head = ops.wide(head * shape.heads + (n - 2))
        kept, kept_p = x.kept_v + slot * x.kept_v_s + value_head * x.kept_v_h, x.kept_v_p
    return kept, kept_p


def fetch_drafts(ops, shape: Shape, x: Tensors, row, head, j, vectors) -> list[Value]:
    """Load the new inputs of a thread's channels."""
    drafted = []
    for n in vectors:
        at = x.mixed + row * x.mixed_t + _channel(ops, shape, head, n, j) * x.mixed_d
        drafted.append([ops.global_u16(at + t * x.mixed_t) for t in range(shape.drafts)])
    return drafted


def fetch_channels(ops, shape: Shape, x: Tensors, item: Item, j, vectors) -> list[Channel]:
    """Load what a slot has for a thread."""
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
            kept, kept_p = _kept(ops, shape, x, slot, head, n)
            for first in range(0, shape.room, 4):
                row = (j >> 5) + first
                if first + 4 > shape.room:
                    row = ops.select(row < shape.room, row, j * 0 + (shape.room - 1))
                old.append(ops.global_words(kept + ops.wide(row) * kept_p + ops.wide(j & 31) * 8))
        channels.append(Channel(columns, old))
    return channels


def gather(ops, shape: Shape, x: Tensors, item: Item, j, buffer, vectors, filters, drafted,
           channels) -> None:  # fmt: skip
    """Run the convolution on channel ``j`` of ``vectors``, put all into X and the values.

    The new inputs take the place of the pending ones, and the window moves up to them.
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
        Q, none = shape.group, (ops.no_bits(),) * 2
        for r in range(0, Q if n else 0, 4):
            row = (j >> 5) + r
            words = none if r >= shape.room else old[r // 4]
            words = [ops.select(pending > row, word, ops.no_bits()) for word in words]
            ops.put_words(target + row * pitch + (j & 31) * 8, words)
        target = target + j * 2
        first = shape.x_rows - Q if n == 0 else Q
        for r in range(first + shape.drafts, first + Q):
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
        for i in range(W - 1):
            ops.store_u16_if(pending > 0, window + i * x.window_l, columns[i])
        for t in range(shape.drafts):
            ops.store_u16_if(pending >= 0, inputs + t * x.inputs_p, columns[W - 1 + t])


def keep(ops, shape: Shape, x: Tensors, item: Item, thread, threads: int, buffer) -> None:
    """Store the new keys and values where the pending ones were, 16 bytes a thread at a time."""
    pieces = shape.drafts * (K * 2 // 16)
    for n in range(1, 2 + shape.heads):
        source, pitch = buffer, X_ROW
        if n >= 2:
            source, pitch = buffer + (shape.values + (n - 2) * shape.keys * V_ROW), V_ROW
        kept, kept_p = _kept(ops, shape, x, item.slot, item.head, n)
        for first in range(0, pieces, threads):
            piece = thread + first
            is_piece = piece < pieces
            piece = ops.select(is_piece, piece, piece * 0)
            row, at = piece >> 4, (piece & 15) * 16
            words = ops.shared_words(source + (row + shape.group) * pitch + at, 4)
            ops.store_words_if(is_piece, kept + ops.wide(row) * kept_p + ops.wide(at), words)


def products(ops, shape: Shape, lane, buffer):
    """Return products of X's rows as the tensor core leaves them, by two tiles of 8 rows and one.

    They are keys times keys, queries times keys, and queries times queries; nothing of the tiles
    where no row is behind a column.
    """
    g, t = lane >> 2, lane & 3
    tiles = shape.x_rows // 8
    wanted = [
        (row, column) for row in range(0, tiles, 2) for column in range(tiles) if row + 1 >= column
    ]
    sums: list[dict[tuple[int, int], Value]] = [
        dict.fromkeys(wanted, (ops.zero(),) * 4) for _ in range(2)
    ]
    for n in range(K // 16):
        at = buffer + g * X_ROW + t * 8 + n * 32
        words = [ops.shared_words(at + i * X_ROW, 2) for i in range(0, shape.x_rows, 8)]
        words += [(ops.no_bits(),) * 2] * (tiles % 2)
        for row, column in wanted:
            low, high = words[row], words[row + 1]
            rows = (low[0], high[0], low[1], high[1])
            total = sums[n & 1][row, column]
            sums[n & 1][row, column] = ops.product16(rows, words[column], total, shape.dtype)
    return {
        at: [x + y for x, y in zip(one, sums[1][at], strict=True)] for at, one in sums[0].items()
    }


def _of_row(sums, row, column):
    """Return the two products that a lane has of one of its rows of tile ``row``."""
    first = row % 2 * 2
    return sums[row - row % 2, column][first : first + 2]


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
    for n in (1, 2, 4, 8, 16)[: shape.keys.bit_length() - 1]:
        others = ops.shuffle(total, (lane - n) & 31), ops.shuffle(fine, (lane - n) & 31)
        total = total + ops.select(r >= n, others[0], nothing)
        fine = fine + ops.select(r >= n, others[1], nothing)
    return Decays(total, fine, beta)


def solve(ops, shape: Shape, sums, of: Decays, lane, solved) -> None:
    """Solve the R x R problem of one value head: put its terms where they are for ``attend``."""
    g, t, r = lane >> 2, lane & 3, lane & (shape.keys - 1)
    Q, tiles, pitch = shape.group, shape.keys // 8, shape.keys * 4
    first_query = shape.x_rows // 8 - shape.octets
    nothing = ops.zero()
    # norms, in the lanes that hold the squares
    inverse, of_query = [ops.one()] * tiles, [ops.number(shape.scale)] * shape.octets
    if shape.has_norm:
        is_odd = (g & 1) == 1

        def inverse_norm(row):
            squares = _of_row(sums, row, row)
            square = ops.select(is_odd, squares[1], squares[0])
            return ops.reciprocal_root(square + ops.number(1e-6))

        inverse = [inverse_norm(m) for m in range(tiles)]
        of_query = [inverse_norm(first_query + m) * scale for m, scale in enumerate(of_query)]

    def norm_of(x, row):
        return ops.shuffle(x, row * 4 + (row >> 1)) if shape.has_norm else x

    # what couples steps; the decay of a query is that of its key
    queries = solved + shape.keys * pitch
    for m in range(tiles):
        row, query = g + 8 * m, m - (tiles - shape.octets)
        total, fine, beta = (ops.shuffle(x, row) for x in of)
        norm = norm_of(inverse[m], g)
        norm_query = norm_of(of_query[query], g) if query >= 0 else nothing
        for c in range(tiles if query >= 0 else m + 1):
            key_row, query_row = [], []
            for n in range(2):
                j = t * 2 + n
                column = j + 8 * c
                between = total - ops.shuffle(of.total, column)
                decay = ops.exp(between + (fine - ops.shuffle(of.fine, column)))
                other = norm_of(inverse[c], j)
                if c <= m:
                    value = ops.zero() - beta * (_of_row(sums, m, c)[n] * norm * other * decay)
                    key_row.append(ops.as_word(ops.select(column < row, value, nothing)))
                if query >= 0:
                    value = _of_row(sums, first_query + query, c)[n] * norm_query * other * decay
                    query_row.append(ops.as_word(ops.select(column <= row, value, nothing)))
            at = g * pitch + c * 32 + t * 8
            if key_row:
                ops.put_words(solved + m * (8 * pitch) + at, key_row)
            if query_row:
                ops.put_words(queries + query * (8 * pitch) + at, query_row)
    _keep_decays(ops, shape, of, lane, norm_of, inverse, of_query, solved)
    ops.sync_warp()
    # column r of the solution; lanes with the same column have different queries and pending keys
    copies = 32 // shape.keys
    copy, count = lane >> (shape.keys.bit_length() - 1), Q // copies
    # a tile that queries share with others has them in its last rows
    asking = queries + (copy * count + (8 * shape.octets - Q)) * pitch
    rows = [ops.select(r == i, of.beta, nothing) for i in range(shape.keys)]
    answers = [nothing] * count
    for first in range(0, shape.keys, 4):
        # four rows are done, and go into all that follow
        for i in range(first + 1, shape.keys):
            words = ops.shared_words(solved + i * pitch + first * 4, 4)
            for word, row in zip(words, rows[first:i], strict=False):
                rows[i] = rows[i] + ops.as_float(word) * row
        for m in range(count):
            words = ops.shared_words(asking + m * pitch + first * 4, 4)
            for word, row in zip(words, rows[first : first + 4], strict=True):
                answers[m] = answers[m] + ops.as_float(word) * row
    ops.sync_warp()  # the terms take the place of what all lanes have read
    for m in range(count):
        key = rows[m]
        for n in range(1, copies):
            key = ops.select(copy == n, rows[m + n * count], key)
        for row, x in ((0, key), (Q, answers[m])):
            at = solved + (copy * count + m + row) * (2 * shape.keys) + r * 2
            for term in range(TERMS):
                word, x, _ = ops.upper_halves(x, nothing)
                ops.put_u16(at + term * shape.term, word)


def _keep_decays(ops, shape: Shape, of: Decays, lane, norm_of, inverse, of_query, solved) -> None:
    """Keep what needs no substitution: what scales X's rows for Y, and pending keys in the end."""
    Q, nothing = shape.group, ops.zero()
    row, octet = lane & 7, lane >> 3
    norm, norm_query = norm_of(inverse[0], row), norm_of(of_query[0], row)
    for m in range(1, shape.keys // 8):
        norm = ops.select(octet == m, norm_of(inverse[m], row), norm)
    for m in range(1, shape.octets):
        norm_query = ops.select(octet == m + shape.octets, norm_of(of_query[m], row), norm_query)
    decay, decays = ops.exp(of.total + of.fine), solved + shape.decay_at + lane * 4
    ops.put_float_if(lane < shape.keys, decays, norm * decay)
    # a query's decay is its key's; nothing is in front of queries that share a tile
    for_query = ops.select(lane < Q, nothing, norm_query * decay)
    is_row = lane < shape.keys if Q == 4 else (lane >= Q) & (lane < shape.keys)
    ops.put_float_if(is_row, decays + (shape.x_rows - shape.keys) * 4, for_query)
    old, old_fine = ops.shuffle(of.total, Q - 1), ops.shuffle(of.fine, Q - 1)
    left = norm * ops.exp((old - of.total) + (old_fine - of.fine))
    whole, last = ops.exp(old + old_fine), 8 * shape.octets
    left = ops.select(lane < Q, left, ops.select(lane == last, whole, nothing))
    ops.put_float_if(lane <= last, solved + shape.left_at + lane * 4, left)
