# SPDX-License-Identifier: Apache-2.0
"""What the chunks of a prefill need before any state is known.

``compare`` multiplies the queries and keys of a chunk with its keys, once for all value heads;
``prepare`` adds a head's decays: how far each token sees the ones before it, and what solves for
the updates.

In a chunk of C = 64 tokens with cumulative log decay G, the updates u of a state S solve

    u_i + sum over j < i of beta_i (k_i k_j) e^(G_i - G_j) u_j = beta_i (v_i - e^G_i S k_i)

so u = inverse (v - e^G S k) with inverse_ij = e^(G_i - G_j) R_ij beta_j, where R is the inverse of
the unit lower triangular I + beta k k^T. The decay stands outside of R, which is bounded by beta
for unit keys: R is found by exact doubling, blocks of 1, 2, 4, ... 64 rows, on tensor cores. No
series is cut short, so repeated keys with beta near 1 are safe.
"""

import triton
import triton.language as tl

from gdn_backend_triton.launch import STEP_SIZES, STEP_TENSORS
from gdn_backend_triton.maths import LOG2_E
from gdn_backend_triton.sequences import locate

CHUNK = tl.constexpr(64)
# nats a single token may decay by: its state is gone to 4e-18, and sums over a chunk stay exact
# enough for the weak decays beside it
STRONGEST = tl.constexpr(-40.0)


@triton.jit
def _product(x, y, plus, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """Return x y + plus, the operands rounded to float16 where LOW."""
    if LOW:
        x = x.to(tl.float16)
        y = y.to(tl.float16)
    return tl.dot(x, y, plus, input_precision=PRECISION)


@triton.jit
def _double(R, X, row, column, ROWS: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverse in blocks of 2 * ROWS rows, given that in blocks of ROWS."""
    joins = (row // (2 * ROWS) == column // (2 * ROWS)) & (row // ROWS > column // ROWS)
    low = tl.where(joins, X, 0.0)
    return _product(_product(R, low, None, LOW, PRECISION), R, R, LOW, PRECISION)


@triton.jit
def _invert_block(X, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverse of I - X for X [16, 16], of which what is below the diagonal counts."""
    row = tl.arange(0, 16)[:, None]
    column = tl.arange(0, 16)[None, :]
    R = tl.where((row // 2 == column // 2) & (row > column), X, 0.0).to(tl.float32)
    R = tl.where(row == column, 1.0, R)
    R = _double(R, X, row, column, 2, LOW, PRECISION)
    R = _double(R, X, row, column, 4, LOW, PRECISION)
    return _double(R, X, row, column, 8, LOW, PRECISION)


@triton.jit
def _apart(G_i, G_j, low_i, low_j, WIDE: tl.constexpr):
    """Return G_i - G_j, at most 0; where sums are WIDE without their rounding."""
    apart = G_i - G_j
    if WIDE:
        apart += low_i - low_j
    return tl.minimum(apart, 0.0)


@triton.jit
def _sums(g, WIDE: tl.constexpr):
    """Return running sums of g [16] in log2, each as two terms.

    One strong decay would blur the weak ones beside it: where WIDE, sums of sixteenths are exact
    and the rest of each decay is too small to lose anything. Else the second term is 0.
    """
    g = tl.maximum(g, STRONGEST) * LOG2_E
    low = tl.zeros_like(g)
    if WIDE:
        coarse = tl.floor(g * 16.0 + 0.5) * 0.0625
        low = tl.cumsum(g - coarse, 0)
        g = coarse
    return tl.cumsum(g, 0), low


@triton.jit
def _last(x):
    """Return the last of x [16]."""
    return tl.sum(tl.where(tl.arange(0, 16) == 15, x, 0.0))


@triton.jit
def _chunk_sums(g, WIDE: tl.constexpr):
    """Return a chunk's running sums and their second terms, and both at the ends of each [16]."""
    G0, low0 = _sums(g[0], WIDE)
    G1, low1 = _sums(g[1], WIDE)
    G2, low2 = _sums(g[2], WIDE)
    G3, low3 = _sums(g[3], WIDE)
    end0 = _last(G0)
    end1 = _last(G1) + end0
    end2 = _last(G2) + end1
    end3 = _last(G3) + end2
    ends = end0, end1, end2, end3
    low_ends = 0.0, 0.0, 0.0, 0.0
    if WIDE:
        low_end0 = _last(low0)
        low_end1 = _last(low1) + low_end0
        low_end2 = _last(low2) + low_end1
        low_end3 = _last(low3) + low_end2
        low1 += low_end0
        low2 += low_end1
        low3 += low_end2
        low_ends = low_end0, low_end1, low_end2, low_end3
    return (G0, G1 + end0, G2 + end1, G3 + end2), (low0, low1, low2, low3), ends, low_ends


@triton.jit
def _load_vectors(x, stride, left):
    """Return x [64] in four, 0 past the end; see ``_load_blocks``."""
    r = tl.arange(0, 16)
    x0 = tl.zeros([16], tl.float32)
    x1 = x0
    x2 = x0
    x3 = x0
    if left > 0:
        x0 = tl.load(x + r * stride, mask=r < left, other=0.0)
        x1 = tl.load(x + (r + 16) * stride, mask=r + 16 < left, other=0.0)
        x2 = tl.load(x + (r + 32) * stride, mask=r + 32 < left, other=0.0)
        x3 = tl.load(x + (r + 48) * stride, mask=r + 48 < left, other=0.0)
    return x0, x1, x2, x3


@triton.jit
def _block(ROW: tl.constexpr, COLUMN: tl.constexpr):
    """Return the offsets of block (ROW, COLUMN) [16, 16] in a chunk's [64, 64]."""
    r = tl.arange(0, 16)
    return (ROW * 16 + r)[:, None] * CHUNK + (COLUMN * 16 + r)[None, :]


@triton.jit
def _load_blocks(x, left):
    """Return the ten blocks of a chunk's x [64, 64] on and below its diagonal, row by row.

    In a branch, always taken, they are all asked for before the first is waited for.
    """
    x00 = tl.zeros([16, 16], x.dtype.element_ty)
    x10 = x00
    x11 = x00
    x20 = x00
    x21 = x00
    x22 = x00
    x30 = x00
    x31 = x00
    x32 = x00
    x33 = x00
    if left > 0:
        x00 = tl.load(x + _block(0, 0))
        x10 = tl.load(x + _block(1, 0))
        x11 = tl.load(x + _block(1, 1))
        x20 = tl.load(x + _block(2, 0))
        x21 = tl.load(x + _block(2, 1))
        x22 = tl.load(x + _block(2, 2))
        x30 = tl.load(x + _block(3, 0))
        x31 = tl.load(x + _block(3, 1))
        x32 = tl.load(x + _block(3, 2))
        x33 = tl.load(x + _block(3, 3))
    return x00, x10, x11, x20, x21, x22, x30, x31, x32, x33


@triton.jit
def _overlap(keys, beta, LOW: tl.constexpr):
    """Return a block of -beta k k^T, in float16 where LOW: the inverse is that of what is kept."""
    X = keys.to(tl.float32) * -beta[:, None]
    if LOW:
        X = X.to(tl.float16)
    return X


@triton.jit
def _store_decayed(
    x, block, sums, factor, ROW: tl.constexpr, COLUMN: tl.constexpr, WIDE: tl.constexpr
):
    """Store a block of a chunk's x [64, 64] times its decays and a factor of each column."""
    G, low, ends, low_ends = sums
    block = block.to(tl.float32)
    if ROW == COLUMN:
        r = tl.arange(0, 16)
        apart = _apart(G[ROW][:, None], G[ROW][None, :], low[ROW][:, None], low[ROW][None, :], WIDE)
        block *= tl.where(r[:, None] >= r[None, :], tl.exp2(apart), 0.0)
    else:
        # fewer exponentials: since the end of the columns, and up to it
        end, low_end = ends[COLUMN], low_ends[COLUMN]
        block *= tl.exp2(_apart(G[ROW], end, low[ROW], low_end, WIDE))[:, None]
        factor *= tl.exp2(_apart(end, G[COLUMN], low_end, low[COLUMN], WIDE))
    block *= factor[None, :]
    tl.store(x + _block(ROW, COLUMN), block.to(x.dtype.element_ty))


@triton.jit
def _store_factors(factors, decay_low, n_q, n_k, sums, ROW: tl.constexpr, WIDE: tl.constexpr):
    """Store the factors of 16 rows."""
    G, low, ends, low_ends = sums
    r = ROW * 16 + tl.arange(0, 16)
    rounded = G[ROW]
    if WIDE:
        # the sum of both terms is rounded here, and what is lost by it is kept
        rounded += low[ROW]
        tl.store(decay_low + r, (G[ROW] - rounded) + low[ROW])
    after = tl.exp2(_apart(ends[3], G[ROW], low_ends[3], low[ROW], WIDE))
    tl.store(factors + r, rounded)
    tl.store(factors + CHUNK + r, tl.exp2(rounded) * -n_k)
    tl.store(factors + 2 * CHUNK + r, tl.exp2(rounded) * n_q)
    tl.store(factors + 3 * CHUNK + r, after * n_k)


@triton.jit
def _attend(attention, factors, decay_low, queries, norms, g, scale, left, WIDE: tl.constexpr):
    """Store a chunk's attention and factors."""
    q = _load_blocks(queries, left)
    n_q = _load_vectors(norms, 1, CHUNK)
    n_k = _load_vectors(norms + CHUNK, 1, CHUNK)
    sums = _chunk_sums(g, WIDE)
    factor = tl.full([16], 1.0, tl.float32) * scale
    for i in tl.static_range(4):
        _store_factors(factors, decay_low, n_q[i] * scale, n_k[i], sums, i, WIDE)
    for i in tl.static_range(4):
        for j in tl.static_range(i + 1):
            _store_decayed(attention, q[i * (i + 1) // 2 + j], sums, factor, i, j, WIDE)


@triton.jit
def _invert(
    inverse, keys, g, beta, beta_t, left, WIDE: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store a chunk's inverse, decayed and times beta."""
    k00, k10, k11, k20, k21, k22, k30, k31, k32, k33 = _load_blocks(keys, left)
    b0, b1, b2, b3 = _load_vectors(beta, beta_t, left)
    sums = _chunk_sums(g, WIDE)
    r0 = _invert_block(_overlap(k00, b0, LOW), LOW, PRECISION)
    r1 = _invert_block(_overlap(k11, b1, LOW), LOW, PRECISION)
    r2 = _invert_block(_overlap(k22, b2, LOW), LOW, PRECISION)
    r3 = _invert_block(_overlap(k33, b3, LOW), LOW, PRECISION)
    _store_decayed(inverse, r0, sums, b0, 0, 0, WIDE)
    _store_decayed(inverse, r1, sums, b1, 1, 1, WIDE)
    _store_decayed(inverse, r2, sums, b2, 2, 2, WIDE)
    _store_decayed(inverse, r3, sums, b3, 3, 3, WIDE)
    # two inverted halves make the inverse of the whole: R_low X R_high stands below the diagonal
    r10 = _product(r1, _overlap(k10, b1, LOW), None, LOW, PRECISION)
    r10 = _product(r10, r0, None, LOW, PRECISION)
    _store_decayed(inverse, r10, sums, b0, 1, 0, WIDE)
    r32 = _product(r3, _overlap(k32, b3, LOW), None, LOW, PRECISION)
    r32 = _product(r32, r2, None, LOW, PRECISION)
    _store_decayed(inverse, r32, sums, b2, 3, 2, WIDE)
    x20 = _overlap(k20, b2, LOW)
    x21 = _overlap(k21, b2, LOW)
    y20 = _product(r2, x20, None, LOW, PRECISION)
    y21 = _product(r2, x21, None, LOW, PRECISION)
    y30 = _product(r3, _overlap(k30, b3, LOW), None, LOW, PRECISION)
    y30 = _product(r32, x20, y30, LOW, PRECISION)
    y31 = _product(r3, _overlap(k31, b3, LOW), None, LOW, PRECISION)
    y31 = _product(r32, x21, y31, LOW, PRECISION)
    r20 = _product(y21, r10, _product(y20, r0, None, LOW, PRECISION), LOW, PRECISION)
    r30 = _product(y31, r10, _product(y30, r0, None, LOW, PRECISION), LOW, PRECISION)
    r21 = _product(y21, r1, None, LOW, PRECISION)
    r31 = _product(y31, r1, None, LOW, PRECISION)
    _store_decayed(inverse, r20, sums, b0, 2, 0, WIDE)
    _store_decayed(inverse, r30, sums, b0, 3, 0, WIDE)
    _store_decayed(inverse, r21, sums, b1, 2, 1, WIDE)
    _store_decayed(inverse, r31, sums, b1, 3, 1, WIDE)


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def compare(
    q, k, queries, keys, norms, cu_seqlens, state_indices, N, T, cu_s, state_indices_s,
    q_t: tl.constexpr, q_h: tl.constexpr, q_k: tl.constexpr,
    k_t: tl.constexpr, k_h: tl.constexpr, k_k: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, L2NORM: tl.constexpr,
    PAD: tl.constexpr, OVERLAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill queries, q k^T, and keys, k k^T [., H, 64, 64], and norms [., H, 2, 64] of each chunk.

    A program owns a chunk of one q/k head. Products are those of normalised rows; blocks of 16 x 16
    above the diagonal are not written. Norms are what q and k are multiplied by.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    k_head = program % H
    sequence, _, end, first = locate(cu_seqlens, cu_s, N, T, program // H, CHUNK)
    if (sequence == N) | (first >= end):
        return
    if tl.load(state_indices + sequence * state_indices_s) <= PAD:
        return
    base = first.to(tl.int64)
    r = tl.arange(0, CHUNK)
    inside = r < end - first
    seen = tl.zeros([CHUNK, CHUNK], tl.float32)
    alike = tl.zeros([CHUNK, CHUNK], tl.float32)
    own = tl.zeros([CHUNK, CHUNK], tl.float32)
    for start_k in tl.static_range(0, K, BK):
        o_k = (start_k + tl.arange(0, BK))[None, :]
        at = q + base * q_t + k_head * q_h + r[:, None] * q_t + o_k * q_k
        qt = tl.load(at, mask=inside[:, None], other=0.0)
        at = k + base * k_t + k_head * k_h + r[:, None] * k_t + o_k * k_k
        kt = tl.load(at, mask=inside[:, None], other=0.0)
        seen = tl.dot(qt, tl.trans(kt), seen, input_precision=PRECISION)
        alike = tl.dot(kt, tl.trans(kt), alike, input_precision=PRECISION)
        if L2NORM:
            own = tl.dot(qt, tl.trans(qt), own, input_precision=PRECISION)
    n_q = tl.full([CHUNK], 1.0, tl.float32)
    n_k = tl.full([CHUNK], 1.0, tl.float32)
    if L2NORM:
        diagonal = r[:, None] == r[None, :]
        n_q = tl.rsqrt(tl.sum(tl.where(diagonal, own, 0.0), 1) + 1e-6)
        n_k = tl.rsqrt(tl.sum(tl.where(diagonal, alike, 0.0), 1) + 1e-6)
    at = norms + program.to(tl.int64) * (2 * CHUNK) + r
    tl.store(at, n_q)
    tl.store(at + CHUNK, n_k)
    seen = seen * n_q[:, None] * n_k[None, :]
    alike = alike * n_k[:, None] * n_k[None, :]
    written = r[:, None] // 16 >= r[None, :] // 16
    tile = program.to(tl.int64) * (CHUNK * CHUNK) + r[:, None] * CHUNK + r[None, :]
    tl.store(queries + tile, seen.to(queries.dtype.element_ty), mask=written)
    tl.store(keys + tile, alike.to(keys.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def prepare(
    g, beta, queries, keys, norms, attention, inverse, factors, decay_low,
    cu_seqlens, state_indices, N, T, scale, g_t, g_h, beta_t, beta_h, cu_s, state_indices_s,
    H: tl.constexpr, HV: tl.constexpr, PAD: tl.constexpr, LOW: tl.constexpr,
    OVERLAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill attention and inverse [., HV, 64, 64] and factors [., HV, 4, 64] of every chunk.

    Of a chunk of one value head one program makes the attention and the factors, the next the
    inverse, in ten blocks of 16 x 16; those above the diagonal are not written. Token i of a chunk
    sees token j with weight e^(G_i - G_j) q_i k_j. Factors are the decay G in log2, and ``read``,
    ``reach`` and ``write``: the state before the chunk is read with ``read`` k, negative because it
    is taken off v, and with ``reach`` q; the one after it gets ``write`` k. They hold decays, norms
    and scale. Past a sequence's end attention and inverse are 0 and factors are finite.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    chunk = tl.program_id(0) // 2
    head = chunk % HV
    place = chunk // HV
    sequence, _, end, first = locate(cu_seqlens, cu_s, N, T, place, CHUNK)
    idle = (sequence == N) | (first >= end)
    if not idle:
        idle = tl.load(state_indices + sequence * state_indices_s) <= PAD
    if idle:
        if OVERLAPS:
            tl.extra.cuda.gdc_wait()
        return
    left = end - first
    g += first.to(tl.int64) * g_t + head * g_h
    beta += first.to(tl.int64) * beta_t + head * beta_h
    g_now = _load_vectors(g, g_t, left)
    if OVERLAPS:
        # nothing is stored before this and no program ends without it
        tl.extra.cuda.gdc_wait()
    WIDE: tl.constexpr = decay_low is not None
    tile = place.to(tl.int64) * H + head // (HV // H)
    chunk = chunk.to(tl.int64)
    if tl.program_id(0) % 2 == 0:
        if WIDE:
            decay_low += chunk * CHUNK
        _attend(
            attention + chunk * (CHUNK * CHUNK), factors + chunk * (4 * CHUNK), decay_low,
            queries + tile * (CHUNK * CHUNK), norms + tile * (2 * CHUNK), g_now, scale, left, WIDE,
        )  # fmt: skip
    else:
        _invert(
            inverse + chunk * (CHUNK * CHUNK), keys + tile * (CHUNK * CHUNK), g_now, beta, beta_t,
            left, WIDE, LOW, PRECISION,
        )  # fmt: skip
